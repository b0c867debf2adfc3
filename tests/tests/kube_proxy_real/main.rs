//! kubectl in pods, through a real kube-proxy, our proxy and the packet engine to a real API server;
//! the proxy is killed in the middle of all of it and comes back.
//!
//! Needs root, the programs of `cargo xtask setup --tests`, and the commands `ip`, `mount`, `nft` and
//! `iptables`.

mod kubectl;
mod scene;

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use proxy_tests::proxy::Proxy;
use proxy_tests::row::Family;
use proxy_tests::wait::{bound, until};
use serde_json::{Value, json};

use crate::kubectl::{Kubectl, get, try_get};
use crate::scene::{FLOW, Mode, Pod, Scene};

/// ConfigMaps of the long list, and characters in each. HTTP/2's window lets four million bytes of
/// an answer come that nobody reads; the rest has yet to cross the connection.
const LONG: (usize, usize) = (21, 500_000);

/// Of that, what is read in the beginning, and with each step after it. Never so much that all the
/// rest could have come already.
const SOME: usize = 100_000;
const MORE: usize = 3_000_000;

/// So many events are written at a time.
const EVENTS: usize = 15;

#[test]
fn nftables_v4() {
    kubectl_goes_on_while_the_proxy_comes_and_goes(Mode::Nftables, Family::V4);
}

#[test]
fn nftables_v6() {
    kubectl_goes_on_while_the_proxy_comes_and_goes(Mode::Nftables, Family::V6);
}

#[test]
fn iptables_v4() {
    kubectl_goes_on_while_the_proxy_comes_and_goes(Mode::Iptables, Family::V4);
}

#[test]
fn iptables_v6() {
    kubectl_goes_on_while_the_proxy_comes_and_goes(Mode::Iptables, Family::V6);
}

/// What one pod has open.
struct Open<'a> {
    pod: &'a Pod,
    /// `kubectl get --watch`.
    watch: Kubectl,
    /// A list that is streamed as events and goes on as a watch.
    streamed: Kubectl,
    /// An answer of many megabytes, which is read slowly.
    long: Kubectl,
    connections: BTreeSet<SocketAddr>,
}

impl<'a> Open<'a> {
    fn new(scene: &Scene, pod: &'a Pod) -> Self {
        let watch = Kubectl::start(scene, &pod.host, &watch());
        let query = "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan\
                     &allowWatchBookmarks=true&timeoutSeconds=600";
        let path = format!("--raw=/api/v1/namespaces/{FLOW}/configmaps?{query}");
        let streamed = Kubectl::start(scene, &pod.host, &["get", &path]);
        let long = Kubectl::start_slow(scene, &pod.host, &LONG_LIST);
        // It has begun to come, and goes no further.
        long.read_more(SOME);
        Self { pod, watch, streamed, long, connections: BTreeSet::new() }
    }

    /// Both have told of the first `count` objects, each once and in order.
    #[track_caller]
    fn have_told(&mut self, count: usize) {
        let wanted: Vec<String> = (0..count).map(|n| format!("configmap/{}", name(n))).collect();
        self.watch.await_lines(&wanted, |line| Some(line.to_owned()));
        let wanted: Vec<String> = (0..count).map(name).collect();
        self.streamed.await_lines(&wanted, added);
    }

    /// The connections are still those that they were.
    #[track_caller]
    fn has_kept_its_connections(&self, service: SocketAddr) {
        let now = self.pod.connections(service);
        assert!(self.connections.is_subset(&now), "{now:?}, not {:?}", self.connections);
    }
}

fn kubectl_goes_on_while_the_proxy_comes_and_goes(mode: Mode, family: Family) {
    let scene = Scene::new(mode, family);
    scene.write_long(LONG);
    let mut first = scene.launch().start();
    scene.await_service();
    let pods = [&scene.pod_beside, &scene.pod_elsewhere];
    for pod in pods {
        assert_eq!(get(&scene, &pod.host, "namespaces"), scene.direct("namespaces"));
    }
    scene.write_events(0..EVENTS);
    let mut open = pods.map(|pod| Open::new(&scene, pod));
    for open in &mut open {
        open.have_told(EVENTS);
        until("three connections are open", || open.pod.connections(scene.service).len() == 3);
        open.connections = open.pod.connections(scene.service);
    }
    await_all_relayed_by_kernel(&scene, &first, &open);
    // Also the first of them: the address was known before anybody asked for it.
    let unseen = [("reason", "handshake_not_seen")];
    assert_eq!(first.metric("packet_ineligible_total", &unseen), 0.0);

    first.kill9();
    scene.write_events(EVENTS..2 * EVENTS);
    for open in &mut open {
        open.have_told(2 * EVENTS);
        open.long.read_more(MORE);
        open.has_kept_its_connections(scene.service);
        let service = scene.service;
        let refused = open.pod.host.run(move || TcpStream::connect(service));
        let error = refused.expect_err("nobody listens").kind();
        assert_eq!(error, std::io::ErrorKind::ConnectionRefused);
        try_get(&scene, &open.pod.host, "namespaces").expect_err("nobody listens");
    }

    let second = scene.launch().start();
    scene.write_events(2 * EVENTS..3 * EVENTS);
    for open in &mut open {
        open.have_told(3 * EVENTS);
        open.has_kept_its_connections(scene.service);
    }
    await_all_relayed_by_kernel(&scene, &second, &open);
    for open in &mut open {
        open.long.read_more(MORE);
        assert_eq!(get(&scene, &open.pod.host, "namespaces"), scene.direct("namespaces"));
    }
    // New ones are switched as well.
    let mut later = Vec::new();
    for open in &open {
        let kubectl = Kubectl::start(&scene, &open.pod.host, &watch());
        until("another connection is relayed by the kernel", || {
            let now = open.pod.connections(scene.service);
            now.len() == 4 && now.is_subset(&scene.relayed_by_kernel())
        });
        later.push(kubectl);
    }
    scene.restart_kube_proxies();
    // The nodes' own are translated in another way, or do not pass a device.
    for node in [&scene.node, &scene.other_node] {
        assert_eq!(get(&scene, node, "namespaces"), scene.direct("namespaces"));
    }
    scene.write_events(3 * EVENTS..4 * EVENTS);
    for (open, later) in open.iter_mut().zip(&mut later) {
        open.have_told(4 * EVENTS);
        open.has_kept_its_connections(scene.service);
        let wanted: Vec<String> =
            (0..4 * EVENTS).map(|n| format!("configmap/{}", name(n))).collect();
        later.await_lines(&wanted, |line| Some(line.to_owned()));
    }
    let direct = scene.long_directly();
    assert!(direct.len() > LONG.0 * LONG.1);
    for open in open {
        let long = open.long.rest();
        assert!(items(&long) == items(&direct), "the long list came as another");
        open.watch.kill();
        open.streamed.kill();
        for client in open.connections {
            expect_relayed_by_kernel(&second, client);
        }
    }
    later.into_iter().for_each(Kubectl::kill);
    second.await_metric("connections_relaying", &[("engine", "packet")], 0.0);
}

fn watch() -> [&'static str; 5] {
    ["get", "configmaps", "--namespace=flow", "--watch", "--output=name"]
}

/// Not compressed, so that the window is one of the list's own bytes.
pub const LONG_LIST: [&str; 3] =
    ["get", "--raw=/api/v1/namespaces/long/configmaps", "--disable-compression"];

/// A list without what is before its items: the version is of the moment in which it was asked for.
#[track_caller]
fn items(list: &[u8]) -> &[u8] {
    const BEGIN: &[u8] = b"\"items\":[";
    let at = list.windows(BEGIN.len()).position(|window| window == BEGIN);
    &list[at.expect("a list")..]
}

/// The name of event number `n`.
fn name(n: usize) -> String {
    format!("event-{n:03}")
}

/// Which object a line of a streamed list is about; `None` for bookmarks.
fn added(line: &str) -> Option<String> {
    let event: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    match event["type"].as_str() {
        Some("ADDED") => event["object"]["metadata"]["name"].as_str().map(str::to_owned),
        Some("BOOKMARK") => None,
        _ => panic!("neither added nor a bookmark: {line}"),
    }
}

#[track_caller]
fn await_all_relayed_by_kernel(scene: &Scene, proxy: &Proxy, open: &[Open<'_>]) {
    let wanted: BTreeSet<SocketAddr> =
        open.iter().flat_map(|open| open.connections.iter().copied()).collect();
    let deadline = Instant::now() + bound();
    loop {
        let by_kernel = scene.relayed_by_kernel();
        if wanted.is_subset(&by_kernel) {
            return;
        }
        if Instant::now() > deadline {
            let metrics = proxy.get("/metrics").body;
            let why: Vec<_> = metrics.lines().filter(|line| line.contains("ineligible")).collect();
            let left: Vec<_> = wanted.difference(&by_kernel).collect();
            panic!("not relayed by the kernel within {:?}: {left:?}\n{}", bound(), why.join("\n"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The access log tells of an end that was so relayed.
#[track_caller]
fn expect_relayed_by_kernel(proxy: &Proxy, client: SocketAddr) {
    let ended = proxy.ended_of(client);
    assert_eq!(ended.engine.as_deref(), Some("packet"), "{ended:?}");
    assert!(ended.bytes_down > 0 && ended.bytes_up > 0, "{ended:?}");
}

/// A ConfigMap, as the API has it.
fn config_map(namespace: &str, name: &str, data: String) -> Value {
    json!({ "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": { "name": name, "namespace": namespace }, "data": { "text": data } })
}

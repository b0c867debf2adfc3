//! The reconciler of the real binary against a real kube-apiserver, with exactly the permissions
//! that Steward's add-on grants, unless a test says otherwise.
//!
//! Needs the programs that `cargo xtask setup` installs, and `steward-tcp-proxy` built beside
//! the tests; a missing one fails the test and is named.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use proxy_tests::apiserver::{ADVERTISED, ApiServer, EndpointReconciler, Options};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Far more than anything here takes on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The role of Steward's add-on, rule by rule.
const STEWARD_RULES: &str = r#"
  - { apiGroups: [discovery.k8s.io], resources: [endpointslices],
      verbs: [get, list, watch, create, update, patch] }
  - { apiGroups: [""], resources: [services], verbs: [get, list, watch] }
  - { apiGroups: [coordination.k8s.io], resources: [leases], verbs: [get, create, update] }
  - { apiGroups: [""], resources: [events], verbs: [create, patch] }
"#;

/// What is needed beyond it to keep core `Endpoints` and to delete foreign slices.
const MORE_RULES: &str = r#"
  - { apiGroups: [""], resources: [endpoints], verbs: [get, list, watch, create, patch] }
  - { apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [delete] }
"#;

fn credentials(server: &ApiServer, rules: &str) -> Result<PathBuf> {
    let role = format!(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\n\
         metadata: {{ name: \"steward:tcp-proxy\" }}\nrules:{rules}"
    );
    server.service_account("kube-system", "steward-tcp-proxy", &role)
}

/// A running `steward-tcp-proxy`; dropping it kills it.
struct Proxy {
    child: Child,
    log: PathBuf,
    _dir: TempDir,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // It may have ended already, which tests notice by other means.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn binary() -> Result<PathBuf> {
    let tests = std::env::current_exe()?;
    // target/PROFILE/deps/endpoints_real-HASH
    let profile = tests.parent().and_then(Path::parent).context("where the tests are built")?;
    let binary = profile.join("steward-tcp-proxy");
    ensure!(
        binary.is_file(),
        "{} is missing: build it with `cargo build -p proxy`",
        binary.display()
    );
    Ok(binary)
}

impl Proxy {
    /// Relays to the API server itself, as in a tenant cluster.
    fn start(server: &ApiServer, kubeconfig: &Path, pod_ip: &str, more: &[&str]) -> Result<Self> {
        let mut args = vec![
            format!("--upstream-addr={}", server.address()),
            format!("--kubeconfig={}", kubeconfig.display()),
        ];
        args.extend(more.iter().map(|&arg| arg.to_owned()));
        Self::spawn(&args, &[("POD_IP", pod_ip)])
    }

    /// Returns once its metrics can be asked for.
    fn spawn(args: &[String], env: &[(&str, &str)]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let log = dir.path().join("log");
        let child = Command::new(binary()?)
            .env_clear()
            .envs(env.iter().copied())
            .args(["--listen-addr=127.0.0.1:0", "--admin-addr=127.0.0.1:0"])
            // Nothing of the host is to change for a test of endpoints.
            .args(["--engine=splice", "--admin-socket=off"])
            .args(args)
            .stdin(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .context("start steward-tcp-proxy")?;
        let proxy = Self { child, log, _dir: dir };
        eventually("it starts", &[&proxy], || Ok(proxy.said("admin listening") == 1))?;
        Ok(proxy)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Lines of the log that hold the text.
    fn said(&self, text: &str) -> usize {
        self.log().lines().filter(|line| line.contains(text)).count()
    }

    /// The value of a metric with these labels (as Prometheus writes them); 0 if it has none.
    fn metric(&self, name: &str) -> Result<f64> {
        let log = self.log();
        let line = log.lines().find(|line| line.contains("admin listening"));
        let address = line.and_then(|line| line.split("addr=").nth(1)).context("admin address")?;
        let mut stream = TcpStream::connect(address.trim())?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let wanted = format!("steward_tcp_proxy_{name} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&wanted));
        value.map_or(Ok(0.0), |value| value.trim().parse().context("a number"))
    }
}

/// Asks until the answer is yes. In the end the message tells what there is instead, and the log.
fn eventually(
    what: &str,
    proxies: &[&Proxy],
    mut question: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = question();
        if matches!(answer, Ok(true)) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let logs: String = proxies.iter().map(|proxy| proxy.log()).collect();
            bail!("not within {PATIENCE:?}: {what} ({answer:?})\n{logs}");
        }
        thread::sleep(Duration::from_millis(200));
    }
}

fn get(server: &ApiServer, namespace: &str, object: &str) -> Result<Option<Value>> {
    let args = ["get", object, "--namespace", namespace, "--output=json", "--ignore-not-found"];
    let text = server.kubectl(&args)?;
    if text.trim().is_empty() { Ok(None) } else { Ok(Some(serde_json::from_str(&text)?)) }
}

fn slice(server: &ApiServer, name: &str) -> Result<Option<Value>> {
    get(server, "default", &format!("endpointslice/{name}"))
}

fn addresses(server: &ApiServer, name: &str) -> Result<Vec<String>> {
    let slice = slice(server, name)?.unwrap_or_default();
    let endpoints = slice["endpoints"].as_array().cloned().unwrap_or_default();
    let first = |endpoint: &Value| endpoint["addresses"][0].as_str().unwrap_or("?").to_owned();
    Ok(endpoints.iter().map(first).collect())
}

fn await_addresses(server: &ApiServer, proxy: &Proxy, name: &str, want: &[&str]) -> Result<()> {
    eventually(&format!("{name} with {want:?}"), &[proxy], || Ok(addresses(server, name)? == want))
}

/// All but what is different from one server to the next.
fn content(object: &Value) -> Value {
    let mut content = object.clone();
    content["metadata"] = json!({ "labels": object["metadata"]["labels"] });
    content
}

fn patch(server: &ApiServer, object: &str, kind: &str, patch: &Value) -> Result<()> {
    let (kind, patch) = (format!("--type={kind}"), patch.to_string());
    server.kubectl(&["patch", object, "--namespace=default", &kind, "--patch", &patch]).map(drop)
}

fn foreign_slice(name: &str, family: &str, address: &str) -> String {
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": { "name": name, "namespace": "default",
                      "labels": { "kubernetes.io/service-name": "kubernetes" } },
        "addressType": family,
        "endpoints": [{ "addresses": [address], "conditions": { "ready": true } }],
        "ports": [{ "name": "https", "port": 6443, "protocol": "TCP" }],
    })
    .to_string()
}

/// A slice of our own Service, by hand.
fn own_slice(name: &str, family: &str, endpoints: &[(&str, bool)]) -> String {
    let endpoint = |(address, ready): &(&str, bool)| json!({ "addresses": [address], "conditions": { "ready": ready } });
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": { "name": name, "namespace": "kube-system",
                      "labels": { "kubernetes.io/service-name": "steward-tcp-proxy" } },
        "addressType": family,
        "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        "ports": [{ "name": "proxy", "port": 6443, "protocol": "TCP" }],
    })
    .to_string()
}

/// Nothing is written while nothing changes, though all is compared every second.
fn is_at_rest(server: &ApiServer, proxy: &Proxy, names: &[&str]) -> Result<()> {
    let versions = || -> Result<Vec<Value>> {
        let version = |name: &&str| {
            let slice = slice(server, name)?.with_context(|| format!("{name} is missing"))?;
            Ok(slice["metadata"]["resourceVersion"].clone())
        };
        names.iter().map(version).collect()
    };
    let writes = r#"endpoint_writes_total{kind="endpointslice",result="ok"}"#;
    let passes = r#"reconciles_total{result="unchanged"}"#;
    let (before, writes_before) = (versions()?, proxy.metric(writes)?);
    let passes_before = proxy.metric(passes)?;
    eventually("three passes", &[proxy], || Ok(proxy.metric(passes)? >= passes_before + 3.0))?;
    ensure!(versions()? == before && proxy.metric(writes)? == writes_before, proxy.log());
    Ok(())
}

/// Patches that spoil one field each.
fn slice_drifts() -> [(&'static str, Value); 9] {
    [
        (
            "service label",
            json!({ "metadata": { "labels": { "kubernetes.io/service-name": null } } }),
        ),
        (
            "managed-by",
            json!({ "metadata": { "labels": {
            "endpointslice.kubernetes.io/managed-by": "me" } } }),
        ),
        ("addresses", json!({ "endpoints": [{ "addresses": ["10.9.9.9"] }] })),
        ("no endpoint", json!({ "endpoints": [] })),
        (
            "conditions",
            json!({ "endpoints": [{ "addresses": ["10.0.0.7"],
                                               "conditions": { "ready": false } }] }),
        ),
        ("port name", json!({ "ports": [{ "name": "http", "port": 6443, "protocol": "TCP" }] })),
        ("port", json!({ "ports": [{ "name": "https", "port": 443, "protocol": "TCP" }] })),
        ("protocol", json!({ "ports": [{ "name": "https", "port": 6443, "protocol": "UDP" }] })),
        (
            "two ports",
            json!({ "ports": [
            { "name": "https", "port": 6443, "protocol": "TCP" }, { "name": "x", "port": 1 }] }),
        ),
    ]
}

#[test]
fn with_stewards_role_the_slice_is_created_and_every_drift_repaired() -> Result<()> {
    let server = ApiServer::start(Options::default())?;
    let kubeconfig = credentials(&server, STEWARD_RULES)?;
    let proxy = Proxy::start(&server, &kubeconfig, "10.0.0.7", &["--reconcile-interval=1s"])?;
    await_addresses(&server, &proxy, "kubernetes", &["10.0.0.7"])?;
    let right = content(&slice(&server, "kubernetes")?.context("the slice")?);
    assert_eq!(
        right["metadata"]["labels"],
        json!({ "kubernetes.io/service-name": "kubernetes",
                "endpointslice.kubernetes.io/managed-by": "steward-tcp-proxy" })
    );
    assert_eq!(right["ports"], json!([{ "name": "https", "port": 6443, "protocol": "TCP" }]));
    is_at_rest(&server, &proxy, &["kubernetes"])?;

    let name = "endpointslice/kubernetes";
    for (what, drift) in slice_drifts() {
        patch(&server, name, "merge", &drift)?;
        eventually(what, &[&proxy], || {
            Ok(slice(&server, "kubernetes")?.is_some_and(|slice| content(&slice) == right))
        })?;
    }
    server.kubectl(&["delete", name, "--namespace=default"])?;
    await_addresses(&server, &proxy, "kubernetes", &["10.0.0.7"])?;
    is_at_rest(&server, &proxy, &["kubernetes"])?;

    // What others added stays.
    server.kubectl(&["label", name, "--namespace=default", "team=blue"])?;
    server.kubectl(&["annotate", name, "--namespace=default", "note=mine"])?;
    is_at_rest(&server, &proxy, &["kubernetes"])?;
    assert_eq!(proxy.metric("endpoint_rival")?, 0.0, "{}", proxy.log());
    assert_eq!(proxy.metric(r#"endpoint_addresses{family="ipv4"}"#)?, 1.0);
    assert_eq!(proxy.said("WARN proxy::endpoints"), 1, "{}", proxy.log());
    assert_eq!(proxy.said("may not keep core Endpoints"), 1, "{}", proxy.log());
    assert_eq!(get(&server, "default", "endpoints/kubernetes")?, None);
    Ok(())
}

#[test]
fn with_stewards_role_what_stands_in_the_way_is_emptied_or_avoided() -> Result<()> {
    let server = ApiServer::start(Options::default())?;
    let kubeconfig = credentials(&server, STEWARD_RULES)?;
    server.apply(&foreign_slice("kubernetes", "IPv6", "2001:db8::1"))?;
    server.apply(&foreign_slice("kubernetes-abcde", "IPv4", "192.0.2.99"))?;
    server.apply(&foreign_slice("kubernetes-same", "IPv4", "10.0.0.7"))?;
    let proxy = Proxy::start(&server, &kubeconfig, "10.0.0.7", &["--reconcile-interval=1s"])?;
    await_addresses(&server, &proxy, "kubernetes-v4", &["10.0.0.7"])?;
    await_addresses(&server, &proxy, "kubernetes-abcde", &[])?;
    let emptied = slice(&server, "kubernetes-abcde")?.context("still there")?;
    assert_eq!(emptied["metadata"]["labels"]["kubernetes.io/service-name"], "kubernetes");
    is_at_rest(&server, &proxy, &["kubernetes", "kubernetes-abcde", "kubernetes-same"])?;
    assert_eq!(addresses(&server, "kubernetes")?, ["2001:db8::1"], "no client is led there");
    assert_eq!(addresses(&server, "kubernetes-same")?, ["10.0.0.7"]);

    server.kubectl(&["delete", "endpointslice/kubernetes", "--namespace=default"])?;
    await_addresses(&server, &proxy, "kubernetes", &["10.0.0.7"])?;
    Ok(())
}

#[test]
fn with_more_permissions_slices_in_the_way_are_deleted_and_endpoints_kept_equal() -> Result<()> {
    let options = Options { controllers: true, ..Options::default() };
    let server = ApiServer::start(options)?;
    let kubeconfig = credentials(&server, &format!("{STEWARD_RULES}{MORE_RULES}"))?;
    server.apply(&foreign_slice("kubernetes", "IPv6", "2001:db8::1"))?;
    // Kubernetes mirrors these into a slice, which leads elsewhere.
    let endpoints = json!({
        "apiVersion": "v1", "kind": "Endpoints",
        "metadata": { "name": "kubernetes", "namespace": "default" },
        "subsets": [{ "addresses": [{ "ip": "192.0.2.99" }],
                      "ports": [{ "name": "https", "port": 6443, "protocol": "TCP" }] }],
    });
    server.apply(&endpoints.to_string())?;
    let names = || -> Result<BTreeSet<String>> {
        let selector = "--selector=kubernetes.io/service-name=kubernetes";
        let args = ["get", "endpointslices", "--namespace=default", selector, "--output=name"];
        Ok(server.kubectl(&args)?.lines().map(str::to_owned).collect())
    };
    eventually("the mirror", &[], || Ok(names()?.len() == 2))?;

    let proxy = Proxy::start(&server, &kubeconfig, "10.0.0.7", &["--reconcile-interval=1s"])?;
    await_addresses(&server, &proxy, "kubernetes", &["10.0.0.7"])?;
    let only = BTreeSet::from(["endpointslice.discovery.k8s.io/kubernetes".to_owned()]);
    eventually("one slice", &[&proxy], || Ok(names()? == only))?;
    let kept = || -> Result<Value> {
        Ok(content(&get(&server, "default", "endpoints/kubernetes")?.unwrap_or_default()))
    };
    let label = "endpointslice.kubernetes.io/skip-mirror";
    eventually("Endpoints", &[&proxy], || {
        let endpoints = kept()?;
        Ok(endpoints["metadata"]["labels"][label] == "true"
            && endpoints["subsets"]
                == json!([{ "addresses": [{ "ip": "10.0.0.7" }],
                "ports": [{ "name": "https", "port": 6443, "protocol": "TCP" }] }]))
    })?;
    let right = kept()?;
    let drifts = [
        json!({ "metadata": { "labels": { label: null } } }),
        json!({ "subsets": [{ "addresses": [{ "ip": "10.9.9.9" }], "ports": [{ "port": 1 }] }] }),
        json!({ "subsets": [] }),
    ];
    for drift in drifts {
        patch(&server, "endpoints/kubernetes", "merge", &drift)?;
        eventually(&drift.to_string(), &[&proxy], || Ok(kept()? == right))?;
    }
    server.kubectl(&["delete", "endpoints/kubernetes", "--namespace=default"])?;
    eventually("Endpoints again", &[&proxy], || Ok(kept()? == right))?;
    eventually("one slice", &[&proxy], || Ok(names()? == only))?;
    is_at_rest(&server, &proxy, &["kubernetes"])?;
    assert_eq!(proxy.said("WARN proxy::endpoints"), 0, "{}", proxy.log());
    Ok(())
}

#[test]
fn dual_stack_has_a_slice_for_each_family_of_the_service() -> Result<()> {
    let server = ApiServer::start(Options { dual_stack: true, ..Options::default() })?;
    let kubeconfig = credentials(&server, STEWARD_RULES)?;
    server.apply(&own_slice("own-v4", "IPv4", &[("10.0.0.7", true)]))?;
    server.apply(&own_slice("own-v6", "IPv6", &[("fd00::7", true)]))?;
    let proxy = Proxy::start(&server, &kubeconfig, "10.0.0.7", &["--reconcile-interval=1s"])?;
    await_addresses(&server, &proxy, "kubernetes", &["10.0.0.7"])?;
    assert_eq!(slice(&server, "kubernetes-v6")?, None, "the Service is IPv4 only so far");

    patch(
        &server,
        "service/kubernetes",
        "merge",
        &json!({ "spec": {
        "ipFamilyPolicy": "RequireDualStack" } }),
    )?;
    await_addresses(&server, &proxy, "kubernetes-v6", &["fd00::7"])?;
    let second = slice(&server, "kubernetes-v6")?.context("the slice")?;
    assert_eq!(second["addressType"], "IPv6");
    is_at_rest(&server, &proxy, &["kubernetes", "kubernetes-v6"])?;
    server.kubectl(&["delete", "endpointslice/kubernetes-v6", "--namespace=default"])?;
    await_addresses(&server, &proxy, "kubernetes-v6", &["fd00::7"])?;
    assert_eq!(proxy.metric(r#"endpoint_addresses{family="ipv6"}"#)?, 1.0);
    Ok(())
}

/// Steward's Service, and pods on nodes in zones as a kubelet would report them.
fn pods(server: &ApiServer, hosts: &[(&str, &str)]) -> Result<()> {
    let mut items = vec![json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "steward-tcp-proxy", "namespace": "kube-system" },
        "spec": { "selector": { "app": "steward-tcp-proxy" },
                  "ports": [{ "name": "proxy", "port": 6443, "targetPort": "proxy" }] },
    })];
    for (node, _) in hosts {
        items.push(json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": node,
                          "labels": { "topology.kubernetes.io/zone": format!("zone-{node}") } },
        }));
        items.push(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": node, "namespace": "kube-system",
                          "labels": { "app": "steward-tcp-proxy" } },
            "spec": { "nodeName": node, "hostNetwork": true, "containers": [{
                "name": "proxy", "image": "proxy",
                "ports": [{ "name": "proxy", "containerPort": 6443 }] }] },
        }));
    }
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
    server.apply(&list.to_string())?;
    hosts.iter().try_for_each(|(node, address)| pod_ready(server, node, address, true))
}

fn pod_ready(server: &ApiServer, pod: &str, address: &str, ready: bool) -> Result<()> {
    let status = json!({ "status": {
        "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }], "hostIP": address,
        "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }],
    } });
    let (pod, status) = (format!("pod/{pod}"), status.to_string());
    let args = [
        "patch",
        &pod,
        "--namespace=kube-system",
        "--subresource=status",
        "--type=merge",
        "--patch",
        &status,
    ];
    server.kubectl(&args).map(drop)
}

#[test]
fn pods_are_published_while_ready_with_node_and_zone_and_the_last_one_stays() -> Result<()> {
    let server = ApiServer::start(Options { controllers: true, ..Options::default() })?;
    let kubeconfig = credentials(&server, STEWARD_RULES)?;
    // Before there is any pod or Service: our own address.
    let proxy = Proxy::start(&server, &kubeconfig, "10.0.0.9", &["--reconcile-interval=1s"])?;
    await_addresses(&server, &proxy, "kubernetes", &["10.0.0.9"])?;

    pods(&server, &[("n7", "10.0.0.7"), ("n8", "10.0.0.8")])?;
    await_addresses(&server, &proxy, "kubernetes", &["10.0.0.7", "10.0.0.8"])?;
    let published = slice(&server, "kubernetes")?.context("the slice")?;
    assert_eq!(published["endpoints"][1]["nodeName"], "n8");
    assert_eq!(published["endpoints"][1]["zone"], "zone-n8");
    is_at_rest(&server, &proxy, &["kubernetes"])?;

    pod_ready(&server, "n7", "10.0.0.7", false)?;
    await_addresses(&server, &proxy, "kubernetes", &["10.0.0.8"])?;
    pod_ready(&server, "n7", "10.0.0.7", true)?;
    await_addresses(&server, &proxy, "kubernetes", &["10.0.0.7", "10.0.0.8"])?;
    drop(proxy);

    // One that is not itself ready to serve (nothing listens upstream) never takes away the last.
    let nowhere = "--upstream-addr=127.0.0.1:1";
    let args = ["--reconcile-interval=1s", nowhere];
    let proxy = Proxy::start(&server, &kubeconfig, "10.0.0.9", &args)?;
    pod_ready(&server, "n7", "10.0.0.7", false)?;
    await_addresses(&server, &proxy, "kubernetes", &["10.0.0.8"])?;
    pod_ready(&server, "n8", "10.0.0.8", false)?;
    let own = "endpointslices --selector=kubernetes.io/service-name=steward-tcp-proxy";
    eventually("the controller sees no pod ready", &[&proxy], || {
        let args = format!("get {own} --namespace=kube-system --output=json");
        let list: Value = serde_json::from_str(&server.kubectl(&words(&args))?)?;
        let endpoints = list["items"][0]["endpoints"].as_array().cloned().unwrap_or_default();
        Ok(!endpoints.is_empty() && endpoints.iter().all(|e| e["conditions"]["ready"] == false))
    })?;
    is_at_rest(&server, &proxy, &["kubernetes"])?;
    assert_eq!(addresses(&server, "kubernetes")?, ["10.0.0.8"]);
    server.kubectl(&["delete", "endpointslice/kubernetes", "--namespace=default"])?;
    await_addresses(&server, &proxy, "kubernetes", &["10.0.0.8"])?;
    Ok(())
}

fn words(text: &str) -> Vec<&str> {
    text.split(' ').collect()
}

#[test]
fn replicas_that_start_together_share_the_slice() -> Result<()> {
    let server = ApiServer::start(Options::default())?;
    let kubeconfig = credentials(&server, STEWARD_RULES)?;
    let hosts = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"];
    let start = |ip: &&str| Proxy::start(&server, &kubeconfig, ip, &["--reconcile-interval=1s"]);
    let proxies = hosts.iter().map(start).collect::<Result<Vec<_>>>()?;
    let all: Vec<_> = proxies.iter().collect();
    eventually("all addresses", &all, || Ok(addresses(&server, "kubernetes")? == hosts))?;
    is_at_rest(&server, &proxies[0], &["kubernetes"])?;

    server.apply(&own_slice("own-v4", "IPv4", &[("10.0.0.2", true), ("10.0.0.1", false)]))?;
    eventually("the ready one", &all, || Ok(addresses(&server, "kubernetes")? == ["10.0.0.2"]))?;
    is_at_rest(&server, &proxies[1], &["kubernetes"])?;
    for proxy in &proxies {
        assert_eq!(proxy.metric("endpoint_rival")?, 0.0, "{}", proxy.log());
    }
    Ok(())
}

#[test]
fn an_api_server_that_restarts_finds_its_endpoints_kept() -> Result<()> {
    let mut server = ApiServer::start(Options::default())?;
    let kubeconfig = credentials(&server, STEWARD_RULES)?;
    let proxy = Proxy::start(&server, &kubeconfig, "10.0.0.7", &["--reconcile-interval=1s"])?;
    await_addresses(&server, &proxy, "kubernetes", &["10.0.0.7"])?;
    server.stop_apiserver();
    eventually("the proxy notices", &[&proxy], || Ok(proxy.said("cannot watch") > 0))?;
    server.start_apiserver()?;
    patch(&server, "endpointslice/kubernetes", "merge", &json!({ "endpoints": [] }))?;
    await_addresses(&server, &proxy, "kubernetes", &["10.0.0.7"])?;
    is_at_rest(&server, &proxy, &["kubernetes"])
}

#[test]
fn the_api_servers_own_reconciler_is_recognised_reported_and_not_fought() -> Result<()> {
    let lease = EndpointReconciler::Lease;
    let server = ApiServer::start(Options { endpoint_reconciler: lease, ..Options::default() })?;
    let kubeconfig = credentials(&server, &format!("{STEWARD_RULES}{MORE_RULES}"))?;
    let advertised = ADVERTISED.to_string();
    eventually("the rival's slice", &[], || {
        Ok(addresses(&server, "kubernetes")? == [advertised.as_str()])
    })?;
    let proxy = Proxy::start(&server, &kubeconfig, "10.0.0.7", &["--reconcile-interval=1s"])?;
    // It rewrites every ten seconds, and four times it must have done so; beyond PATIENCE.
    let deadline = Instant::now() + 3 * PATIENCE;
    while proxy.metric("endpoint_rival")? == 0.0 {
        ensure!(Instant::now() < deadline, "not recognised:\n{}", proxy.log());
        thread::sleep(Duration::from_secs(1));
    }
    let writes = r#"endpoint_writes_total{kind="endpointslice",result="ok"}"#;
    let before = proxy.metric(writes)?;
    assert!(before <= 6.0, "{}", proxy.log());
    eventually("left to the rival", &[&proxy], || {
        Ok(addresses(&server, "kubernetes")? == [advertised.as_str()])
    })?;
    thread::sleep(Duration::from_secs(15));
    assert_eq!(proxy.metric(writes)?, before, "fought on:\n{}", proxy.log());
    assert!(proxy.said("keeps being undone") >= 1, "{}", proxy.log());
    let events = server.kubectl(&words("get events --namespace=default --output=json"))?;
    let events: Value = serde_json::from_str(&events)?;
    let events = events["items"].as_array().cloned().unwrap_or_default();
    let ours: Vec<_> = events.iter().filter(|e| e["reason"] == "EndpointRival").collect();
    assert!(!ours.is_empty(), "no Event\n{}", proxy.log());
    let message = ours[0]["message"].as_str().unwrap_or_default();
    assert!(message.contains("kube-apiserver"), "{message}");
    assert_eq!(ours[0]["involvedObject"]["name"], "kubernetes");
    Ok(())
}

#[test]
fn without_credentials_it_says_so_once_and_relays_all_the_same() -> Result<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let upstream = format!("--upstream-addr={}", listener.local_addr()?);
    let proxy = Proxy::spawn(&[upstream], &[])?;
    let no_config = r#"reconciles_total{result="no_config"}"#;
    eventually("two tries", &[&proxy], || Ok(proxy.metric(no_config)? >= 2.0))?;
    assert_eq!(proxy.said("no Kubernetes configuration"), 1, "{}", proxy.log());
    let log = proxy.log();
    let line = log.lines().find(|line| line.contains(" listening addr=")).context("address")?;
    let address = line.split("addr=").nth(1).and_then(|rest| rest.split(' ').next());
    let mut client = TcpStream::connect(address.context("address")?)?;
    let (mut upstream, _) = listener.accept()?;
    client.write_all(b"ping")?;
    let mut bytes = [0; 4];
    upstream.read_exact(&mut bytes)?;
    assert_eq!(&bytes, b"ping");
    Ok(())
}

//! A tenant cluster of two nodes with a pod each, and its API server, which pods reach by the Service
//! `kubernetes` alone.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::ops::Range;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proxy_tests::admin;
use proxy_tests::apiserver::{ApiServer, Options, SERVICE_IP, SERVICE_IP_V6, component};
use proxy_tests::facts::{self, State};
use proxy_tests::netns::Host;
use proxy_tests::proxy::{Launch, binary};
use proxy_tests::row::Family;
use proxy_tests::wait::until;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{LONG_LIST, config_map, name};

/// Namespace of the objects whose coming is watched.
pub const FLOW: &str = "flow";

/// kube-proxy's `--proxy-mode`.
#[derive(Debug, Clone, Copy)]
pub enum Mode {
    Nftables,
    Iptables,
}

/// A pod: a host whose only way out is its node.
pub struct Pod {
    pub host: Arc<Host>,
}

impl Pod {
    fn new(name: &str, node: &Host, net: u8, family: Family) -> Self {
        let host = Arc::new(Host::new(name));
        let wire = node.join(&host, net);
        route(&host, "default", family.of(wire, 1));
        Self { host }
    }

    /// Its ends of established connections to the Service.
    pub fn connections(&self, service: SocketAddr) -> BTreeSet<SocketAddr> {
        let is_ours =
            |socket: &facts::Socket| socket.remote == service && socket.state == State::Established;
        facts::sockets(&self.host).into_iter().filter(is_ours).map(|socket| socket.local).collect()
    }
}

/// All of it. The proxy belongs on `node`, whose address is the Service's only endpoint.
pub struct Scene {
    kube_proxies: Mutex<[KubeProxy; 2]>,
    api: Arc<ApiServer>,
    pub pod_beside: Pod,
    pub pod_elsewhere: Pod,
    pub node: Arc<Host>,
    pub other_node: Arc<Host>,
    management: Arc<Host>,
    /// Where clients ask for the API server.
    pub service: SocketAddr,
    /// The node's address for other nodes.
    node_ip: String,
    folder: TempDir,
}

impl Scene {
    #[track_caller]
    pub fn new(mode: Mode, family: Family) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let [management, node, other_node] =
            ["management", "node", "other-node"].map(|name| Arc::new(Host::new(name)));
        std::fs::create_dir(folder.path().join("bpf")).expect("a folder in it");
        node.mount_own(&folder.path().join("bpf"));
        let (behind, between) = (node.join(&management, 2), node.join(&other_node, 3));
        let aside = other_node.join(&management, 4);
        let pod_beside = Pod::new("pod-beside", &node, 11, family);
        let pod_elsewhere = Pod::new("pod-elsewhere", &other_node, 12, family);
        for host in [&node, &other_node] {
            host.sysctl("ipv4.ip_forward", "1");
            host.sysctl("ipv6.conf.all.forwarding", "1");
        }
        let (service, pods_elsewhere, pods): (IpAddr, _, _) = match family {
            Family::V4 => (SERVICE_IP.into(), "10.12.0.0/24", "10.8.0.0/13"),
            Family::V6 => (SERVICE_IP_V6.into(), "fd00:12::/64", "fd00:10::/28"),
        };
        route(&node, "default", family.of(behind, 2));
        route(&node, pods_elsewhere, family.of(between, 2));
        route(&other_node, "default", family.of(aside, 2));
        let options = Options { address: Some(family.of(behind, 2)), ..Options::default() };
        let api = management.run(move || ApiServer::start(options)).expect("an API server");
        let api = Arc::new(api);
        let scene = |proxies| Self {
            kube_proxies: Mutex::new(proxies),
            api: Arc::clone(&api),
            pod_beside,
            pod_elsewhere,
            node: Arc::clone(&node),
            other_node: Arc::clone(&other_node),
            management: Arc::clone(&management),
            service: SocketAddr::new(service, 443),
            node_ip: family.of(between, 1).to_string(),
            folder,
        };
        let nodes = [
            (Arc::clone(&node), "node", family.of(between, 1).to_string()),
            (Arc::clone(&other_node), "other-node", family.of(between, 2).to_string()),
        ];
        let kubeconfig = api.kubeconfig_admin();
        for (_, name, ip) in &nodes {
            let object =
                json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name } });
            let address = json!([{ "type": "InternalIP", "address": ip }]);
            let status = json!({ "status": { "addresses": address } }).to_string();
            let (api, name) = (Arc::clone(&api), (*name).to_owned());
            management.run(move || {
                api.apply(&object.to_string()).expect("a node");
                let patch = ["patch", "node", &name, "--subresource=status", "--patch", &status];
                api.kubectl(&patch).expect("its address");
            });
        }
        let proxies =
            nodes.map(|(host, name, _)| KubeProxy::start(&host, name, mode, pods, &kubeconfig));
        let scene = scene(proxies);
        for namespace in [FLOW, "long"] {
            scene.kubectl(&["create", "namespace", namespace]);
        }
        scene
    }

    /// Runs kubectl beside the API server.
    #[track_caller]
    fn kubectl(&self, arguments: &[&str]) -> String {
        let words: Vec<String> = arguments.iter().map(|&word| word.to_owned()).collect();
        let api = Arc::clone(&self.api);
        let answer = self.management.run(move || {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            api.kubectl(&words).map_err(|error| format!("{error:#}\n{}", api.log_tails()))
        });
        answer.unwrap_or_else(|error| panic!("{error}"))
    }

    /// kubectl with all rights, for any host.
    pub fn kubectl_command(&self) -> Command {
        self.api.kubectl_command(&self.api.kubeconfig_admin()).expect("kubectl")
    }

    /// The names of all objects of a kind, asked for beside the API server.
    #[track_caller]
    pub fn direct(&self, kind: &str) -> String {
        self.kubectl(&["get", kind, "--output=name"])
    }

    /// A proxy as a node has it, not started yet.
    pub fn launch(&self) -> Launch {
        Launch::new(self.api.address())
            .on(&self.node)
            .flag("engine", "packet")
            .flag("bpffs", self.folder.path().join("bpf/proxy").display())
            .flag("packet-max-rtt", "1s")
            .flag("listen-addr", ":6443")
            .flag("admin-socket", self.socket().display())
            .flag("endpoint-mode", "mirror")
            .flag("kubeconfig", self.api.kubeconfig_admin().display())
            .flag("pod-ip", &self.node_ip)
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("admin.sock")
    }

    /// Waits until the proxy has published itself, and both kube-proxies know.
    #[track_caller]
    pub fn await_service(&self) {
        for pod in [&self.pod_beside, &self.pod_elsewhere] {
            until(&format!("{} reaches the Service", pod.host.name()), || {
                let (service, patience) = (self.service, Duration::from_secs(1));
                let connect = move || TcpStream::connect_timeout(&service, patience);
                pod.host.run(connect).is_ok()
            });
        }
    }

    /// Both kube-proxies are killed and come back.
    #[track_caller]
    pub fn restart_kube_proxies(&self) {
        let mut kube_proxies = self.kube_proxies.lock().expect("no panic");
        kube_proxies.iter_mut().for_each(KubeProxy::restart);
    }

    /// Clients of connections that the kernel relays on the node.
    #[track_caller]
    pub fn relayed_by_kernel(&self) -> BTreeSet<SocketAddr> {
        let socket = format!("--admin-socket={}", self.socket().display());
        let arguments = ["connections", &socket, "list", "--output=json"];
        let text = self.node.output(&binary().display().to_string(), &arguments);
        let rows: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
        let rows = rows.as_array().or_else(|| rows["connections"].as_array());
        let rows = rows.unwrap_or_else(|| panic!("no rows in {text}")).iter();
        let rows = rows.filter(|row| row["engine"] == "packet");
        rows.filter_map(|row| row["client"].as_str()?.parse().ok()).collect()
    }

    #[track_caller]
    fn create(&self, objects: &[Value]) {
        let file = self.folder.path().join("objects.json");
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        std::fs::write(&file, list.to_string()).expect("written");
        self.kubectl(&["create", "--validate=false", "--filename", &file.display().to_string()]);
    }

    /// Creates these objects one after the other.
    #[track_caller]
    pub fn write_events(&self, numbers: Range<usize>) {
        let objects: Vec<Value> =
            numbers.map(|n| config_map(FLOW, &name(n), String::new())).collect();
        self.create(&objects);
    }

    /// Creates so many objects of so many characters.
    #[track_caller]
    pub fn write_long(&self, (count, size): (usize, usize)) {
        // A number for each few bytes, so that no part of the list is like another.
        let text = |n: usize| (0..size / 10).map(|part| format!("{n:03}{part:06}.")).collect();
        let object = |n| config_map("long", &format!("long-{n:03}"), text(n));
        self.create(&(0..count).map(object).collect::<Vec<_>>());
    }

    /// The list of them, asked for beside the API server.
    #[track_caller]
    pub fn long_directly(&self) -> Vec<u8> {
        self.kubectl(&LONG_LIST).into_bytes()
    }
}

#[track_caller]
fn route(host: &Host, to: &str, via: IpAddr) {
    let family = if via.is_ipv4() { "-4" } else { "-6" };
    host.ip(&format!("{family} route add {to} via {via}"));
}

/// A node's kube-proxy. Dropping it kills it; if the test is failing, its log is shown.
struct KubeProxy {
    host: Arc<Host>,
    flags: Vec<String>,
    child: Child,
    folder: TempDir,
}

impl KubeProxy {
    #[track_caller]
    fn start(host: &Arc<Host>, node: &str, mode: Mode, pods: &str, kubeconfig: &Path) -> Self {
        let mode = match mode {
            Mode::Nftables => "nftables",
            Mode::Iptables => "iptables",
        };
        let flags = vec![
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--hostname-override={node}"),
            format!("--proxy-mode={mode}"),
            // What comes from elsewhere is translated twice.
            format!("--cluster-cidr={pods}"),
            // That limit is one for the whole machine.
            "--conntrack-max-per-core=0".to_owned(),
        ];
        let folder = tempfile::tempdir().expect("a folder");
        let child = spawn(host, &flags, folder.path());
        Self { host: Arc::clone(host), flags, child, folder }
    }

    /// Returns when it has written all rules anew.
    #[track_caller]
    fn restart(&mut self) {
        self.end();
        self.child = spawn(&self.host, &self.flags, self.folder.path());
        until("kube-proxy is healthy", || {
            let address = (Ipv4Addr::LOCALHOST, 10256).into();
            let answer = self.host.run(move || admin::get(address, "/healthz"));
            answer.is_ok_and(|answer| answer.status == 200)
        });
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
fn spawn(host: &Host, flags: &[String], folder: &Path) -> Child {
    let log = File::options().create(true).append(true).open(folder.join("log"));
    let mut command = component("kube-proxy").expect("kube-proxy");
    command.args(flags).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log.expect("a log"));
    die_with_parent(&mut command);
    host.run(move || command.spawn()).expect("kube-proxy")
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.folder.path().join("log"));
            eprintln!("--- kube-proxy:\n{}", log.unwrap_or_default());
        }
    }
}

/// Has the kernel kill it when the thread that starts it ends.
pub fn die_with_parent(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe and nothing is allocated between fork and exec.
    unsafe {
        command.pre_exec(|| {
            let signal = Some(rustix::process::Signal::KILL);
            rustix::process::set_parent_process_death_signal(signal)?;
            Ok(())
        });
    }
}

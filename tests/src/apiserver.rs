//! A real kube-apiserver with its etcd, on loopback or on a host of its own, for the length of one
//! test.
//!
//! What a mock cannot answer is decided here: whether an object passes
//! validation, whether a role is wide enough, and who wins when the API server's
//! own endpoint reconciler writes the same object as we do.
//!
//! There is no kubelet and no scheduler: a test creates Node objects and writes
//! Pod status itself. See `tests/kube-bins` for where the programs come from.

mod binaries;
mod pki;
mod process;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::{NamedTempFile, TempDir};

pub use binaries::component;
use pki::{Pair, Pki};
use process::{Nursery, Process, free_ports};

/// The address under which the API server publishes itself when it reconciles
/// `default/kubernetes`. Endpoints may not be loopback, so it is one of
/// TEST-NET-1 (RFC 5737): nothing answers there, and a test can tell the API
/// server's endpoint from ours.
pub const ADVERTISED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);

/// The same for a server that is IPv6, of the documentation's prefix (RFC 3849).
const ADVERTISED_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 10);

/// The cluster IP of the Service `kubernetes`: the first of 10.96.0.0/16.
pub const SERVICE_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);

/// The first cluster IP of the second family, fd00:10:96::/112.
pub const SERVICE_IP_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 1);

/// The controllers that run: what keeps endpoints, tokens and workloads in
/// order. Not node-lifecycle, as no kubelet renews the nodes.
const CONTROLLERS: &str = "serviceaccount-controller,serviceaccount-token-controller,\
    root-ca-certificate-publisher-controller,endpoints-controller,endpointslice-controller,\
    endpointslice-mirroring-controller,namespace-controller,garbage-collector-controller,\
    daemonset-controller,deployment-controller,replicaset-controller";

/// How long a component may take to become useful. It takes a few seconds on an
/// idle machine; the rest is for a machine that compiles at the same time.
const READY: Duration = Duration::from_secs(120);

/// How often readiness is asked for.
const POLL: Duration = Duration::from_millis(100);

/// Who writes the endpoints of `default/kubernetes` inside the API server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EndpointReconciler {
    /// Nobody: the situation in a tenant cluster, where the proxy does it.
    #[default]
    None,
    /// The API server itself, every ten seconds: its default, and our rival.
    Lease,
}

impl EndpointReconciler {
    fn as_flag(self) -> &'static str {
        match self {
            Self::None => "--endpoint-reconciler-type=none",
            Self::Lease => "--endpoint-reconciler-type=lease",
        }
    }
}

/// What kind of cluster [`ApiServer::start`] makes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Services get addresses of 10.96.0.0/16, and if set also of fd00:10:96::/112.
    pub dual_stack: bool,
    /// Who else writes the endpoints of `default/kubernetes`.
    pub endpoint_reconciler: EndpointReconciler,
    /// Also run kube-controller-manager (without node-lifecycle).
    pub controllers: bool,
    /// Where the API server listens; 127.0.0.1 if not set. Of the host on which it is started, which
    /// is the one to ask it from. If it is IPv6, so are Services, and `dual_stack` does not matter.
    pub address: Option<IpAddr>,
}

/// A running API server. Dropping it kills its processes, and no others, and
/// removes its files; if the test itself is killed, the kernel kills them.
pub struct ApiServer {
    // Fields drop in this order: clients of etcd before etcd, processes before
    // the thread that owns them and before the folder they write to.
    controller_manager: Option<Process>,
    apiserver: Option<Process>,
    etcd: Process,
    nursery: Nursery,
    options: Options,
    pki: Pki,
    address: SocketAddr,
    etcd_url: String,
    dir: TempDir,
}

impl ApiServer {
    /// Starts etcd, the API server and, if wanted, the controllers. On return
    /// the API server is ready, `default/kubernetes` exists, and with
    /// controllers each of them has started.
    ///
    /// # Errors
    /// When a program is missing, ends early or is not ready within two
    /// minutes; the message quotes the end of its log.
    pub fn start(options: Options) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("apiserver-").tempdir()?;
        let ip = options.address.unwrap_or(Ipv4Addr::LOCALHOST.into());
        let names: [IpAddr; 6] = [
            ip,
            Ipv4Addr::LOCALHOST.into(),
            Ipv6Addr::LOCALHOST.into(),
            ADVERTISED.into(),
            SERVICE_IP.into(),
            SERVICE_IP_V6.into(),
        ];
        let pki = Pki::generate(&dir.path().join("pki"), &names)?;
        let [etcd_port, peer_port, port] = free_ports()?;
        let etcd_url = format!("http://127.0.0.1:{etcd_port}");
        let nursery = Nursery::new()?;
        let etcd = start_etcd(&nursery, dir.path(), &etcd_url, peer_port)?;
        let mut server = Self {
            controller_manager: None,
            apiserver: None,
            etcd,
            nursery,
            options,
            pki,
            address: (ip, port).into(),
            etcd_url,
            dir,
        };
        server.write_kubeconfig("admin", &certificate_user(&server.pki.admin))?;
        server.start_apiserver()?;
        if options.controllers {
            server.start_controllers()?;
        }
        Ok(server)
    }

    /// `https://127.0.0.1:<port>` (or with [`Options::address`]); the port stays the same across restarts.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// The same as [`ApiServer::url`], as an address to connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The certificate of the authority that signed the serving certificate,
    /// as PEM. That certificate is valid for `localhost`, 127.0.0.1, `::1`, the
    /// names of the Service `kubernetes`, [`ADVERTISED`], the Service's IPs and [`Options::address`].
    pub fn ca_pem(&self) -> &str {
        &self.pki.ca_pem
    }

    /// The kubeconfig file of a user who may do everything. Like all files of
    /// this server it is gone after the drop.
    pub fn kubeconfig_admin(&self) -> PathBuf {
        self.kubeconfig_path("admin")
    }

    /// Runs kubectl as administrator and returns its standard output.
    ///
    /// # Errors
    /// When it cannot be run or fails; the message holds its standard error.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.kubectl_as(&self.kubeconfig_admin(), args)
    }

    /// Runs kubectl with another user's kubeconfig file.
    ///
    /// # Errors
    /// As [`ApiServer::kubectl`]; a refusal by RBAC says `Forbidden`.
    pub fn kubectl_as(&self, kubeconfig: &Path, args: &[&str]) -> Result<String> {
        let mut command = self.kubectl_command(kubeconfig)?;
        let output = command.args(args).output().context("execute kubectl")?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {}: {}", args.join(" "), stderr.trim());
        String::from_utf8(output.stdout).context("kubectl's output is not UTF-8")
    }

    /// kubectl with a user's kubeconfig file, to be run by the caller.
    ///
    /// # Errors
    /// There is none.
    pub fn kubectl_command(&self, kubeconfig: &Path) -> Result<Command> {
        let mut command = component("kubectl")?;
        // Its discovery cache would otherwise land in the home directory and
        // answer for another server that had the same port.
        command.arg("--kubeconfig").arg(kubeconfig);
        command.arg("--cache-dir").arg(self.dir.path().join("kubectl-cache"));
        Ok(command)
    }

    /// Applies the YAML (or JSON) documents as administrator; the answer names
    /// each object and what happened to it.
    ///
    /// # Errors
    /// As [`ApiServer::kubectl`].
    pub fn apply(&self, yaml: &str) -> Result<String> {
        self.apply_as(&self.kubeconfig_admin(), yaml)
    }

    /// Applies the documents with another user's kubeconfig file. kubectl reads
    /// before it writes, so the user needs `get` as well.
    ///
    /// # Errors
    /// As [`ApiServer::kubectl_as`].
    pub fn apply_as(&self, kubeconfig: &Path, yaml: &str) -> Result<String> {
        self.with_file(yaml, |file| self.kubectl_as(kubeconfig, &["apply", "-f", file]))
    }

    /// Creates the namespace (if missing), a service account, the ClusterRole
    /// given as one YAML document and a binding of both, and returns a kubeconfig
    /// file with a token that lasts one hour. On return the role is in effect.
    ///
    /// # Errors
    /// When the API server refuses an object, or the role is not in effect in time.
    pub fn service_account(&self, ns: &str, name: &str, role_yaml: &str) -> Result<PathBuf> {
        let role = self.with_file(role_yaml, |f| self.kubectl(&["apply", "-o=json", "-f", f]))?;
        let role: Value = serde_json::from_str(&role).context("read the applied ClusterRole")?;
        let role_name = role["metadata"]["name"].as_str().context("the ClusterRole has no name")?;
        let account = json!({ "kind": "List", "apiVersion": "v1", "items": [
            { "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": ns } },
            { "apiVersion": "v1", "kind": "ServiceAccount",
              "metadata": { "name": name, "namespace": ns } },
            { "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
              "metadata": { "name": format!("{ns}:{name}:{role_name}") },
              "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
                           "name": role_name },
              "subjects": [{ "kind": "ServiceAccount", "name": name, "namespace": ns }] },
        ]});
        // Server-side apply, because the namespace may be one of the built-in
        // ones, which lack the annotation that client-side apply asks for.
        self.with_file(&account.to_string(), |file| {
            self.kubectl(&["apply", "--server-side", "-f", file])
        })?;
        let token = self.kubectl(&["create", "token", name, "-n", ns, "--duration=1h"])?;
        let kubeconfig =
            self.write_kubeconfig(&format!("{ns}-{name}"), &json!({ "token": token.trim() }))?;
        self.await_role(&kubeconfig, &role)?;
        Ok(kubeconfig)
    }

    /// Kills the API server as a crash would (etcd and the controllers go on):
    /// connections are reset and its port refuses new ones. No effect when it is
    /// stopped already.
    pub fn stop_apiserver(&mut self) {
        self.apiserver = None;
    }

    /// Starts a stopped API server again, on the same port and with the same
    /// data, and waits until it is ready.
    ///
    /// # Errors
    /// When it is running, ends early or is not ready in time.
    pub fn start_apiserver(&mut self) -> Result<()> {
        ensure!(self.apiserver.is_none(), "the API server is running already");
        let process =
            self.nursery.spawn("kube-apiserver", self.apiserver_command()?, &self.log("apiserver"));
        self.apiserver = Some(process?);
        self.await_ready("kube-apiserver", |server| {
            // Cheaper than kubectl while nothing listens.
            TcpStream::connect_timeout(&server.address, POLL)?;
            server.kubectl(&["get", "--raw=/readyz", "--request-timeout=5s"])?;
            // These two are written only after the server calls itself ready.
            server.kubectl(&["get", "namespace/default", "namespace/kube-system"])?;
            server.kubectl(&["get", "service/kubernetes", "--namespace=default"]).map(drop)
        })
    }

    /// The ends of all logs, for the message of a failed assertion.
    pub fn log_tails(&self) -> String {
        let all = [Some(&self.etcd), self.apiserver.as_ref(), self.controller_manager.as_ref()];
        all.into_iter().flatten().map(|process| process.log_tail() + "\n").collect()
    }

    /// The process id of the running API server, to read its memory or its
    /// sockets from /proc; `None` while it is stopped.
    pub fn apiserver_pid(&self) -> Option<u32> {
        self.apiserver.as_ref().map(Process::id)
    }

    fn start_controllers(&mut self) -> Result<()> {
        let user = certificate_user(&self.pki.controller_manager);
        let kubeconfig = self.write_kubeconfig("controller-manager", &user)?;
        let mut command = component("kube-controller-manager")?;
        command
            .arg(flag("kubeconfig", &kubeconfig))
            .arg(flag("root-ca-file", &self.pki.ca))
            .arg(flag("service-account-private-key-file", &self.pki.service_account_private))
            .arg(format!("--controllers={CONTROLLERS}"))
            .args(["--leader-elect=false", "--use-service-account-credentials=true"])
            // No listener: nobody asks it for its health or metrics.
            .arg("--secure-port=0");
        let log = self.log("controller-manager");
        self.controller_manager =
            Some(self.nursery.spawn("kube-controller-manager", command, &log)?);
        self.await_ready("kube-controller-manager", |server| {
            // One controller writes the first, another the second.
            server.kubectl(&["get", "configmap/kube-root-ca.crt", "--namespace=default"])?;
            server.kubectl(&["get", "serviceaccount/default", "--namespace=default"]).map(drop)
        })
    }

    fn apiserver_command(&self) -> Result<Command> {
        let (advertised, services): (IpAddr, _) = match self.address.ip() {
            IpAddr::V6(_) => (ADVERTISED_V6.into(), "fd00:10:96::/112"),
            IpAddr::V4(_) if self.options.dual_stack => {
                (ADVERTISED.into(), "10.96.0.0/16,fd00:10:96::/112")
            }
            IpAddr::V4(_) => (ADVERTISED.into(), "10.96.0.0/16"),
        };
        let mut command = component("kube-apiserver")?;
        command
            .arg(format!("--etcd-servers={}", self.etcd_url))
            .arg(format!("--bind-address={}", self.address.ip()))
            .arg(format!("--secure-port={}", self.address.port()))
            .arg(format!("--advertise-address={advertised}"))
            .arg(format!("--service-cluster-ip-range={services}"))
            .arg(self.options.endpoint_reconciler.as_flag())
            .arg("--authorization-mode=Node,RBAC")
            // Proxies are tested as host-network pods with capabilities.
            .arg("--allow-privileged=true")
            .arg(flag("client-ca-file", &self.pki.ca))
            .arg(flag("tls-cert-file", &self.pki.serving.cert))
            .arg(flag("tls-private-key-file", &self.pki.serving.key))
            .arg("--service-account-issuer=https://kubernetes.default.svc.cluster.local")
            .arg(flag("service-account-signing-key-file", &self.pki.service_account_private))
            .arg(flag("service-account-key-file", &self.pki.service_account_public))
            // Unset, it is a system folder.
            .arg(flag("cert-dir", &self.dir.path().join("pki")));
        Ok(command)
    }

    /// Waits until `probe` succeeds.
    ///
    /// # Errors
    /// When a child has ended, or after [`READY`], with the last probe's error.
    fn await_ready(&mut self, what: &str, probe: impl Fn(&Self) -> Result<()>) -> Result<()> {
        let deadline = Instant::now() + READY;
        loop {
            self.etcd.check()?;
            for process in self.apiserver.iter_mut().chain(&mut self.controller_manager) {
                process.check()?;
            }
            let Err(error) = probe(self) else { return Ok(()) };
            if Instant::now() > deadline {
                bail!("{what} not ready after {READY:?}: {error:#}\n{}", self.log_tails());
            }
            thread::sleep(POLL);
        }
    }

    /// The authorizer learns of a new binding through a watch, so a client that
    /// is too quick is refused. Waits until a permission of the role is granted.
    fn await_role(&self, kubeconfig: &Path, role: &Value) -> Result<()> {
        let rules = role["rules"].as_array().map(Vec::as_slice).unwrap_or_default();
        // A rule about URLs, or about objects by name, cannot be asked for like this.
        let Some(rule) = rules.iter().find(|rule| {
            rule["resources"][0].is_string() && rule["resourceNames"].as_array().is_none()
        }) else {
            return Ok(());
        };
        let text = |field: &str| rule[field][0].as_str().unwrap_or_default();
        let resource = format!("{}.{}", text("resources"), text("apiGroups"));
        let question = ["auth", "can-i", text("verbs"), resource.trim_end_matches('.'), "-A"];
        let deadline = Instant::now() + READY;
        while let Err(error) = self.kubectl_as(kubeconfig, &question) {
            ensure!(Instant::now() < deadline, "the role has no effect: {error:#}");
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Calls `action` with the name of a temporary file that holds `text`: unlike
    /// a pipe, it cannot block both sides.
    fn with_file<T>(&self, text: &str, action: impl FnOnce(&str) -> Result<T>) -> Result<T> {
        let file = NamedTempFile::new_in(self.dir.path())?;
        fs::write(file.path(), text)?;
        action(file.path().to_str().context("the temporary folder's name is not UTF-8")?)
    }

    fn write_kubeconfig(&self, name: &str, user: &Value) -> Result<PathBuf> {
        let path = self.kubeconfig_path(name);
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "test", "cluster": {
                "server": self.url(), "certificate-authority": self.pki.ca } }],
            "users": [{ "name": name, "user": user }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": name } }],
            "current-context": "test",
        });
        // JSON is YAML, so no YAML library is needed.
        fs::write(&path, config.to_string()).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    fn kubeconfig_path(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.kubeconfig"))
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.log"))
    }
}

fn start_etcd(nursery: &Nursery, dir: &Path, url: &str, peer_port: u16) -> Result<Process> {
    let peer = format!("http://127.0.0.1:{peer_port}");
    let mut command = component("etcd")?;
    command
        .arg(flag("data-dir", &dir.join("etcd")))
        .arg(format!("--listen-client-urls={url}"))
        .arg(format!("--advertise-client-urls={url}"))
        .arg(format!("--listen-peer-urls={peer}"))
        .arg(format!("--initial-advertise-peer-urls={peer}"))
        .arg(format!("--initial-cluster=default={peer}"))
        // The data is thrown away anyhow, and a busy disk would stall every write.
        .arg("--unsafe-no-fsync")
        .arg("--log-level=warn");
    nursery.spawn("etcd", command, &dir.join("etcd.log"))
}

fn certificate_user(pair: &Pair) -> Value {
    json!({ "client-certificate": pair.cert, "client-key": pair.key })
}

fn flag(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}

//! The harness's own test: the API server it starts is real, and grants
//! Steward's role exactly what Steward grants it.

use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use proxy_tests::apiserver::{ADVERTISED, ApiServer, EndpointReconciler, Options};
use serde_json::Value;

/// The permissions of the proxy in Steward's add-on, and no more.
const STEWARD_ROLE: &str = r#"
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: steward-tcp-proxy
rules:
  - apiGroups: ["discovery.k8s.io"]
    resources: ["endpointslices"]
    verbs: ["get", "list", "watch", "create", "update", "patch"]
  - apiGroups: [""]
    resources: ["services"]
    verbs: ["get", "list", "watch"]
  - apiGroups: ["coordination.k8s.io"]
    resources: ["leases"]
    verbs: ["get", "create", "update"]
  - apiGroups: [""]
    resources: ["events"]
    verbs: ["create", "patch"]
"#;

const SLICE: &str = r#"
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: kubernetes
  namespace: default
  labels:
    kubernetes.io/service-name: kubernetes
addressType: IPv4
endpoints:
  - addresses: ["198.51.100.7"]
    conditions: { ready: true }
ports:
  - { name: https, port: 6443, protocol: TCP }
"#;

const ENDPOINTS: &str = r#"
apiVersion: v1
kind: Endpoints
metadata:
  name: kubernetes
  namespace: default
subsets:
  - addresses: [{ ip: 198.51.100.7 }]
    ports: [{ name: https, port: 6443, protocol: TCP }]
"#;

/// Repeats `question` until it has an answer, for at most 30 s.
fn eventually_some<T>(what: &str, question: impl Fn() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(answer) = question()? {
            return Ok(answer);
        }
        ensure!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Repeats `question` until it answers yes, for at most 30 s.
fn eventually(what: &str, question: impl Fn() -> Result<bool>) -> Result<()> {
    eventually_some(what, || Ok(question()?.then_some(())))
}

#[test]
fn stewards_role_may_write_slices_but_not_endpoints() -> Result<()> {
    let server = ApiServer::start(Options::default())?;
    server.apply(r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"by-admin"}}"#)?;
    let steward = server.service_account("kube-system", "steward-tcp-proxy", STEWARD_ROLE)?;

    server.apply_as(&steward, SLICE)?;
    let address = "jsonpath={.endpoints[0].addresses[0]}";
    let slice = ["get", "endpointslice", "kubernetes", "-n", "default", "-o", address];
    ensure!(server.kubectl(&slice)? == "198.51.100.7");

    // `create` does not read first: it is the write itself that is refused.
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), ENDPOINTS)?;
    let file = file.path().to_str().context("UTF-8")?;
    let refused = server.kubectl_as(&steward, &["create", "-f", file]).unwrap_err().to_string();
    ensure!(refused.contains("Forbidden") && refused.contains("create"), "{refused}");
    server.kubectl(&["create", "-f", file]).context("the object itself is valid")?;
    Ok(())
}

#[test]
fn dual_stack_with_controllers_and_a_rival_reconciler() -> Result<()> {
    let server = ApiServer::start(Options {
        dual_stack: true,
        endpoint_reconciler: EndpointReconciler::Lease,
        controllers: true,
        ..Options::default()
    })?;
    let slice = ["get", "endpointslices", "-n", "default", "-o", "json"];
    eventually("the API server publishes itself", || {
        Ok(server.kubectl(&slice)?.contains(&ADVERTISED.to_string()))
    })?;

    server.apply(
        r#"
apiVersion: v1
kind: Service
metadata: { name: both, namespace: default }
spec:
  ipFamilyPolicy: RequireDualStack
  selector: { app: both }
  ports: [{ port: 80 }]
"#,
    )?;
    let service = server.kubectl(&["get", "service", "both", "-n", "default", "-o", "json"])?;
    let service: Value = serde_json::from_str(&service)?;
    let ips: Vec<&str> = service["spec"]["clusterIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(Value::as_str)
        .collect();
    ensure!(ips.len() == 2 && ips[0].starts_with("10.96.") && ips[1].starts_with("fd00:10:96:"));

    let of_both = ["get", "endpointslices", "-n", "default", "-o", "name", "-l"];
    let of_both = [&of_both[..], &["kubernetes.io/service-name=both"]].concat();
    eventually("the controllers write a slice for each family", || {
        Ok(server.kubectl(&of_both)?.lines().count() == 2)
    })
}

#[test]
fn an_outage_ends_on_the_same_port_with_the_same_data() -> Result<()> {
    let mut server = ApiServer::start(Options::default())?;
    let steward = server.service_account("kube-system", "steward-tcp-proxy", STEWARD_ROLE)?;
    server.apply(SLICE)?;
    let pid = server.apiserver_pid().context("it runs")?;

    server.stop_apiserver();
    ensure!(server.apiserver_pid().is_none());
    ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "the process is still there");
    ensure!(TcpStream::connect(server.address()).is_err(), "the port still answers");
    ensure!(server.kubectl(&["get", "namespaces"]).is_err());

    server.start_apiserver()?;
    ensure!(server.start_apiserver().is_err(), "started twice");
    // The token and the role were made before the outage.
    server.kubectl_as(&steward, &["get", "services", "-A"])?;
    // Without a reconciler nobody removes the slice, although the API server's
    // log claims at each start that it removed "stale" endpoints.
    server.kubectl(&["get", "endpointslice/kubernetes", "-n", "default"])?;
    Ok(())
}

/// The harness promises this to tests that start a server on a helper thread.
#[test]
fn the_server_outlives_the_thread_that_started_it() -> Result<()> {
    let started = std::thread::spawn(|| ApiServer::start(Options::default())).join();
    let server = started.map_err(|_| anyhow::anyhow!("the thread panicked"))??;
    std::thread::sleep(Duration::from_millis(200));
    server.kubectl(&["get", "--raw=/readyz"])?;
    Ok(())
}

/// Set in the process that the next test kills.
const VICTIM: &str = "APISERVER_SMOKE_VICTIM";

/// Not a test of its own: the process that the next test kills.
#[test]
fn victim() -> Result<()> {
    if std::env::var_os(VICTIM).is_none() {
        return Ok(());
    }
    let _server = ApiServer::start(Options::default())?;
    std::thread::sleep(Duration::from_secs(300));
    anyhow::bail!("nobody killed this process")
}

#[test]
fn a_killed_test_leaves_no_process_behind() -> Result<()> {
    let mut victim = Command::new(std::env::current_exe()?)
        .args(["--exact", "victim"])
        .env(VICTIM, "1")
        .stdout(Stdio::null())
        .spawn()?;
    let children = eventually_some("etcd and the API server run", || {
        Ok(Some(children_of(victim.id())?).filter(|children| children.len() >= 2))
    });
    victim.kill()?;
    victim.wait()?;
    for child in children? {
        let process = format!("/proc/{child}");
        eventually("the child is gone", || Ok(!Path::new(&process).exists()))?;
    }
    Ok(())
}

/// The process ids of all children of all threads of `pid`.
fn children_of(pid: u32) -> Result<Vec<u32>> {
    let mut children = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = std::fs::read_to_string(thread?.path().join("children"))?;
        for child in text.split_whitespace() {
            children.push(child.parse()?);
        }
    }
    Ok(children)
}

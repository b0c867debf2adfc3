//! Reconcilers on a [`Fake`], and words for what tests say often.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::fake::Fake;
use crate::config::{EndpointConfig, EndpointMode};
use crate::endpoints::Asked;
use crate::endpoints::reconciler::{Leave, Reconciler};
use crate::metrics::Metrics;

/// The switch that stands for readiness.
#[derive(Clone)]
pub struct Switch(pub Arc<AtomicBool>);

impl Leave for Switch {
    async fn granted(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// One reconciler at work; dropping it ends it.
pub struct Replica {
    pub metrics: Arc<Metrics>,
    pub ready: Arc<AtomicBool>,
    /// Addresses that clients ask for.
    pub asked: Arc<Mutex<BTreeSet<SocketAddr>>>,
    task: JoinHandle<()>,
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Replica {
    pub fn start(fake: &Fake, config: EndpointConfig) -> Self {
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let ready = Arc::new(AtomicBool::new(true));
        let leave = Switch(Arc::clone(&ready));
        let asked = Arc::<Mutex<BTreeSet<SocketAddr>>>::default();
        let learnt = Arc::clone(&asked);
        let learn: Asked = Box::new(move |address| {
            learnt.lock().expect("no panic").insert(address);
        });
        let reconciler = Reconciler::new(config, leave, Arc::clone(&metrics), fake.client(), learn);
        Self { metrics, ready, asked, task: tokio::spawn(reconciler.run()) }
    }

    /// Passes that ended so.
    pub fn passes(&self, result: &str) -> u64 {
        self.metrics.reconciles.with_label_values(&[result]).get()
    }

    pub fn rival(&self) -> i64 {
        self.metrics.endpoint_rival.get()
    }

    pub fn published(&self, family: &str) -> i64 {
        self.metrics.endpoint_addresses.with_label_values(&[family]).get()
    }
}

/// Steward's unchanged manifests.
pub fn config(pod_ip: &str) -> EndpointConfig {
    EndpointConfig {
        mode: EndpointMode::Mirror,
        service_name: "steward-tcp-proxy".to_owned(),
        service_port: 6443,
        reconcile_interval: Duration::from_secs(30),
        kubeconfig: None,
        pod_ip: (!pod_ip.is_empty()).then(|| pod_ip.parse().expect("an address")),
    }
}

/// Virtual seconds go by.
pub async fn seconds(count: u64) {
    tokio::time::sleep(Duration::from_secs(count)).await;
}

/// `default/kubernetes` of these families, primary first.
pub fn service(fake: &Fake, families: &[&str]) {
    let ips: Vec<_> =
        families.iter().map(|f| if *f == "IPv4" { "10.96.0.1" } else { "fd00:10:96::1" }).collect();
    fake.put(
        "kube-apiserver",
        "services",
        json!({
            "metadata": { "name": "kubernetes", "namespace": "default" },
            "spec": { "clusterIP": ips[0], "clusterIPs": ips, "ipFamilies": families,
                      "ports": [{ "name": "https", "port": 443 }] },
        }),
    );
}

/// A cluster with the usual Service.
pub fn cluster() -> Fake {
    let fake = Fake::default();
    service(&fake, &["IPv4"]);
    fake
}

pub fn own_endpoint(ip: &str, node: &str, ready: bool) -> Value {
    json!({ "addresses": [ip], "nodeName": node, "zone": format!("zone-{node}"),
            "conditions": { "ready": ready, "serving": ready, "terminating": false } })
}

/// Our Service's slice, as the endpointslice controller writes it.
pub fn own_slice(fake: &Fake, name: &str, family: &str, endpoints: &[Value]) {
    fake.put(
        "kube-controller-manager",
        "endpointslices",
        json!({
            "metadata": { "name": name, "namespace": "kube-system",
                          "labels": { "kubernetes.io/service-name": "steward-tcp-proxy" } },
            "addressType": family,
            "endpoints": endpoints,
            "ports": [{ "name": "proxy", "port": 6443, "protocol": "TCP" }],
        }),
    );
}

/// Ready IPv4 endpoints `10.0.0.N` on nodes `nN`.
pub fn ready_on(fake: &Fake, hosts: &[u8]) {
    let endpoints: Vec<_> = hosts
        .iter()
        .map(|n| own_endpoint(&format!("10.0.0.{n}"), &format!("n{n}"), true))
        .collect();
    own_slice(fake, "own-v4", "IPv4", &endpoints);
}

/// Somebody's slice of `default/kubernetes`.
pub fn foreign_slice(fake: &Fake, manager: &str, name: &str, family: &str, ips: &[&str]) {
    let endpoints: Vec<_> = ips.iter().map(|ip| json!({ "addresses": [ip] })).collect();
    fake.put(
        manager,
        "endpointslices",
        json!({
            "metadata": { "name": name, "namespace": "default",
                          "labels": { "kubernetes.io/service-name": "kubernetes" } },
            "addressType": family,
            "endpoints": endpoints,
            "ports": [{ "name": "https", "port": 6443, "protocol": "TCP" }],
        }),
    );
}

pub fn slice(fake: &Fake, name: &str) -> Option<Value> {
    fake.get("endpointslices", "default", name)
}

/// The addresses of a slice in their order; none if it is missing.
pub fn addresses(fake: &Fake, name: &str) -> Vec<String> {
    let slice = slice(fake, name).unwrap_or_default();
    let endpoints = slice["endpoints"].as_array().cloned().unwrap_or_default();
    let first = |endpoint: &Value| endpoint["addresses"][0].as_str().unwrap_or("?").to_owned();
    endpoints.iter().map(first).collect()
}

/// The addresses of the core `Endpoints`.
pub fn core_addresses(fake: &Fake) -> Vec<String> {
    let endpoints = fake.get("endpoints", "default", "kubernetes").unwrap_or_default();
    let addresses = endpoints["subsets"][0]["addresses"].as_array().cloned().unwrap_or_default();
    addresses.iter().map(|address| address["ip"].as_str().unwrap_or("?").to_owned()).collect()
}

/// No call of that verb on that kind is allowed.
pub fn forbid(fake: &Fake, verb: &'static str, kind: &'static str) {
    fake.fault(usize::MAX, super::fake::Effect::Refuse(403, "Forbidden"), move |call| {
        call.kind == kind && (verb == "*" || call.verb() == verb)
    });
}

/// What the add-on's role does not give.
pub fn as_steward_grants(fake: &Fake) {
    forbid(fake, "delete", "endpointslices");
    forbid(fake, "*", "endpoints");
}

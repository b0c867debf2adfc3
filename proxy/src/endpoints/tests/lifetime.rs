//! From the first look for credentials to the drain.

use std::sync::Arc;
use std::time::Duration;

use super::harness::{config, seconds};
use crate::config::{EndpointConfig, EndpointMode, Host, HostPort, UpstreamAddrs};
use crate::drain::Drain;
use crate::endpoints::{connect, run};
use crate::metrics::Metrics;
use crate::packet::eventually::Eventually;
use crate::readiness::Readiness;
use crate::upstream::Upstream;

const KUBECONFIG: &str = r#"{
    "apiVersion": "v1", "kind": "Config", "current-context": "tenant",
    "clusters": [{ "name": "tenant", "cluster": { "server": "https://127.0.0.1:1" } }],
    "users": [{ "name": "proxy", "user": { "token": "secret" } }],
    "contexts": [{ "name": "tenant", "context": { "cluster": "tenant", "user": "proxy" } }]
}"#;

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new().expect("metrics"))
}

async fn run_with(config: EndpointConfig, metrics: Arc<Metrics>, drain: &Drain) {
    let loopback = HostPort { host: Host::Ip([127, 0, 0, 1].into()), port: 1 };
    let elsewhere = (std::net::Ipv4Addr::LOCALHOST, 1).into();
    let upstream = Upstream::new(
        &UpstreamAddrs(vec![loopback]),
        Duration::from_secs(1),
        elsewhere,
        Eventually::default(),
        Arc::clone(&metrics),
    );
    let readiness = Readiness::new(drain.watcher(), Arc::new(upstream));
    run(config, readiness, metrics, drain.watcher(), Box::new(|_| {})).await;
}

#[tokio::test(start_paused = true)]
async fn mode_off_ends_at_once() {
    let config = EndpointConfig { mode: EndpointMode::Off, ..config("10.0.0.7") };
    let metrics = metrics();
    run_with(config, Arc::clone(&metrics), &Drain::default()).await;
    assert_eq!(metrics.reconciles.with_label_values(&["no_config"]).get(), 0);
}

#[tokio::test(start_paused = true)]
async fn credentials_that_appear_late_are_found_and_looked_for_ever_less_often() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let config = EndpointConfig { kubeconfig: Some(file.path().to_owned()), ..config("10.0.0.7") };
    let metrics = metrics();
    let tries = || metrics.reconciles.with_label_values(&["no_config"]).get();
    let found = connect::client(&config, &metrics);
    tokio::pin!(found);
    assert!(tokio::time::timeout(Duration::from_secs(3600), &mut found).await.is_err());
    assert!((60..130).contains(&tries()), "{} tries in an hour", tries());
    std::fs::write(file.path(), KUBECONFIG).expect("written");
    let found = tokio::time::timeout(Duration::from_secs(61), found).await;
    assert_eq!(found.expect("found within a minute").default_namespace(), "default");
}

#[tokio::test(start_paused = true)]
async fn draining_ends_it_whatever_it_waits_for() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let drain = Drain::default();
    let config = EndpointConfig { kubeconfig: Some(file.path().to_owned()), ..config("10.0.0.7") };
    tokio::join!(run_with(config, metrics(), &drain), async {
        seconds(30).await;
        drain.begin();
    });
}

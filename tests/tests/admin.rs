//! What can be seen: metrics, health, readiness, version, the access log.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use proxy_tests::peers::{Peer, both};
use proxy_tests::proxy::{Launch, Proxy};
use proxy_tests::servers::{ClosedPort, Upstream};
use proxy_tests::wait::{eventually, until};

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// One connection that carries `up` and `down` bytes and is closed by its client.
fn exchange(proxy: &Proxy, upstream: &Upstream, up: u64, down: u64) -> SocketAddr {
    let client = Peer::connect(proxy.address());
    let server = upstream.accept();
    both(|| client.send_stream(1, up), || server.receive_stream(1, up));
    both(|| server.send_stream(2, down), || client.receive_stream(2, down));
    client.finish();
    server.expect_eof();
    server.finish();
    client.expect_eof();
    client.address()
}

#[test]
fn bytes_and_connections_are_counted_exactly() {
    for engine in ["copy", "splice"] {
        let upstream = Upstream::new(V4);
        let proxy = Launch::new(upstream.address()).flag("engine", engine).start();
        for _ in 0..3 {
            exchange(&proxy, &upstream, 1_000_001, 2_000_003);
        }
        let live = Peer::connect(proxy.address());
        let server = upstream.accept();
        live.send(b"0123456789");
        server.receive(b"0123456789");
        let _ = proxy.access_log(3);
        proxy.await_metric("connections_relaying", &[("engine", engine)], 1.0);
        // Bytes of a living connection are counted as they move.
        proxy.await_metric("bytes_total", &[("direction", "up")], 3_000_013.0);
        proxy.await_metric("bytes_total", &[("direction", "down")], 6_000_009.0);
        proxy.await_metric("connections_accepted_total", &[], 4.0);
        let closed = [("engine", engine), ("reason", "client_closed")];
        proxy.await_metric("connections_ended_total", &closed, 3.0);
        proxy.await_metric("connections_ended_total", &[], 3.0);
        proxy.await_metric("connections_dialling", &[], 0.0);
        proxy.await_metric("handshake_duration_seconds_count", &[], 4.0);
        proxy.await_metric("dial_duration_seconds_count", &[("result", "connected")], 4.0);
        proxy.await_metric("upstream_reachable", &[], 1.0);
        proxy.await_metric("draining", &[], 0.0);
        live.reset();
        let reset = [("engine", engine), ("reason", "client_reset")];
        proxy.await_metric("connections_ended_total", &reset, 1.0);
        proxy.await_metric("connections_relaying", &[], 0.0);
    }
}

#[test]
fn metrics_are_well_formed_and_share_one_prefix() {
    let upstream = Upstream::new(V4);
    let proxy = Launch::new(upstream.address()).start();
    exchange(&proxy, &upstream, 1, 1);
    let text = proxy.get("/metrics").body;
    let mut described = Vec::new();
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').expect("a help text");
            assert!(!help.is_empty());
            described.push(name);
        } else if !line.starts_with('#') {
            let sample = described.iter().any(|name| line.starts_with(name));
            assert!(sample, "no help text for {line}");
        }
    }
    assert!(described.iter().all(|n| n.starts_with("steward_tcp_proxy_")), "{described:?}");
    let engines = [("engine_wished", "splice"), ("engine_default", "splice")];
    assert_eq!(proxy.metric("build_info", &engines), 1.0);
}

#[test]
fn the_access_log_tells_of_each_connection_once() {
    let upstream = Upstream::new(V4);
    let proxy = Launch::new(upstream.address()).start();
    let clients = [(10, 0), (0, 20), (70_000, 300_000)]
        .map(|(up, down)| (exchange(&proxy, &upstream, up, down), up, down));
    let log = proxy.access_log(3);
    assert_eq!(log.len(), 3);
    for (client, up, down) in clients {
        let ended = proxy.ended_of(client);
        assert_eq!((ended.bytes_up, ended.bytes_down), (up, down));
        assert_eq!(ended.upstream, Some(upstream.address().to_string()));
        assert_eq!(ended.engine.as_deref(), Some("splice"));
        assert_eq!(ended.reason, "client_closed");
        assert!(ended.duration_ms > 0.0 && ended.duration_ms < 30_000.0, "{ended:?}");
    }
}

#[test]
fn readiness_follows_the_upstream() {
    let upstream = Upstream::new(V4);
    let proxy = Launch::new(upstream.address()).start();
    assert_eq!(proxy.get("/readyz").status, 200);
    let nobody = upstream.close();
    until("not ready", || proxy.get("/readyz").status == 503);
    assert_eq!(proxy.metric("upstream_reachable", &[]), 0.0);
    assert_eq!(proxy.get("/healthz").status, 200, "an upstream's failure is not ours");
    let _upstream = nobody.open();
    until("ready again", || proxy.get("/readyz").status == 200);
    assert_eq!(proxy.metric("upstream_reachable", &[]), 1.0);
}

#[test]
fn one_upstream_of_several_is_enough_to_be_ready() {
    let nobody = ClosedPort::new(V4);
    let upstream = Upstream::new(V4);
    let both = format!("{},{}", nobody.address(), upstream.address());
    let proxy = Launch::new(both).start();
    assert_eq!(proxy.get("/readyz").status, 200);
}

/// A probe must not cost the API server a TLS handshake, nor an entry in TIME_WAIT.
#[test]
fn a_probe_carries_no_byte() {
    let upstream = Upstream::new(V4);
    let proxy = Launch::new(upstream.address()).start();
    assert_eq!(proxy.get("/readyz").status, 200);
    upstream.accept().expect_reset();
    // Asked again and again, the answer is remembered for a while.
    for _ in 0..50 {
        assert_eq!(proxy.get("/readyz").status, 200);
    }
    let more = std::iter::from_fn(|| upstream.accept_within(Duration::ZERO)).count();
    assert!(more < 10, "{more} probes for 50 questions");
    // Clients who are served prove as much as a probe, and a probe is no client.
    assert_eq!(proxy.metric("connections_accepted_total", &[]), 0.0);
}

#[test]
fn health_and_version_are_told_and_other_paths_are_not_found() {
    let upstream = Upstream::new(V4);
    let proxy = Launch::new(upstream.address()).start();
    assert_eq!(proxy.get("/healthz").status, 200);
    let version = proxy.get("/version");
    assert_eq!(version.status, 200);
    assert!(version.body.contains(env!("CARGO_PKG_VERSION")), "{version:?}");
    assert_eq!(proxy.get("/").status, 404);
}

#[test]
fn a_bare_port_listens_on_both_families() {
    for ip in [V4, V6] {
        let upstream = Upstream::new(ip);
        let launch = Launch::new(upstream.address()).flag("listen-addr", ":0");
        let proxy = launch.flag("admin-addr", ":0").start();
        for client_ip in [V4, V6] {
            let client = Peer::connect(SocketAddr::new(client_ip, proxy.address().port()));
            let server = upstream.accept();
            client.send(b"hello");
            server.receive(b"hello");
            client.reset();
            server.expect_reset();
        }
        // Clients of IPv4 appear as such, not in IPv6's disguise.
        let log = proxy.access_log(2);
        let of_v4 = log.iter().filter(|ended| ended.client.starts_with("127.0.0.1:"));
        assert_eq!(of_v4.count(), 1, "{log:?}");
        for admin_ip in [V4, V6] {
            let admin = SocketAddr::new(admin_ip, proxy.admin().port());
            let answer = eventually("the admin address answers", || {
                proxy_tests::admin::get(admin, "/healthz").ok()
            });
            assert_eq!(answer.status, 200);
        }
    }
}

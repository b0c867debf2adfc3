//! Reaching one server: refused, swallowed, late, gone in the middle; names.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proxy_tests::peers::Ending;
use proxy_tests::servers::ClosedPort;
use proxy_tests::wait::eventually;

use crate::setting::{Relayed, Setting};

const V4: Ipv4Addr = Ipv4Addr::LOCALHOST;
const V6: Ipv6Addr = Ipv6Addr::LOCALHOST;

pub fn a_refused_client_is_reset_at_once(at: &Setting) {
    let nobody = at.closed_port();
    // Would the refusal not end it at once, the test would end before the time-out does.
    let proxy = at.launch(nobody.address()).flag("connect-timeout", "10m").start();
    let client = at.connect(&proxy);
    client.expect_reset();
    let ended = proxy.ended();
    assert_eq!(ended.reason, "upstream_refused");
    assert_eq!((ended.bytes_up, ended.bytes_down), (0, 0));
    assert_eq!(ended.client, client.address().to_string());
    let labels = [("engine", "none"), ("reason", "upstream_refused")];
    proxy.await_metric("connections_ended_total", &labels, 1.0);
    proxy.await_metric("connections_dialling", &[], 0.0);
}

pub fn a_blackholed_client_is_reset_after_the_time_out(at: &Setting) {
    let hole = at.blackhole();
    let proxy = at.launch(hole.address()).flag("connect-timeout", "1s").start();
    let client = at.connect(&proxy);
    client.send(b"request");
    client.expect_reset();
    let ended = proxy.ended();
    assert_eq!(ended.reason, "upstream_timeout");
    assert!(ended.duration_ms >= 900.0, "gave up early: {ended:?}");
    let labels = [("engine", "none"), ("reason", "upstream_timeout")];
    proxy.await_metric("connections_ended_total", &labels, 1.0);
}

pub fn a_late_server_gets_everything(at: &Setting) {
    let hole = at.blackhole();
    let proxy = at.launch(hole.address()).flag("connect-timeout", "25s").start();
    let client = at.connect(&proxy);
    client.send_stream(1, 20_000);
    proxy.await_metric("connections_dialling", &[], 1.0);
    let upstream = hole.answer();
    let server = upstream.accept();
    server.receive_stream(1, 20_000);
    server.send_stream(2, 20_000);
    client.receive_stream(2, 20_000);
    client.finish();
    server.expect_eof();
}

pub fn a_client_that_leaves_while_dialling_is_noticed(at: &Setting) {
    let hole = at.blackhole();
    let proxy = at.launch(hole.address()).flag("connect-timeout", "10m").start();
    let silent = at.connect(&proxy);
    let talking = at.connect(&proxy);
    talking.send(b"request");
    proxy.await_metric("connections_dialling", &[], 2.0);
    silent.reset();
    talking.reset();
    let ended = proxy.access_log(2);
    assert!(ended.iter().all(|e| e.reason == "client_gone"), "{ended:?}");
    proxy.await_metric("connections_dialling", &[], 0.0);
}

/// A server process that is killed resets its connections and refuses new ones.
pub fn a_server_that_dies_takes_its_connections_along(at: &Setting) {
    let Relayed { proxy, upstream, client, server } = at.relayed();
    client.send(b"request");
    server.receive(b"request");
    server.send_stream(1, 100_000);
    let nobody = at.close(upstream);
    server.reset();
    assert_eq!(client.receive_until_end(1).1, Ending::Reset);
    assert_eq!(proxy.ended_of(client.address()).reason, "server_reset");
    let late = at.connect(&proxy);
    late.expect_reset();
    assert_eq!(proxy.ended_of(late.address()).reason, "upstream_refused");
    // And it comes back.
    let upstream = nobody.open();
    let client = at.connect(&proxy);
    client.send(b"again");
    upstream.accept().receive(b"again");
}

pub fn a_name_is_resolved(at: &Setting) {
    // The name may have addresses of both families; the other one has no listener, surely.
    let (upstream, _nobody) = eventually("a port free in both families", || {
        let upstream = at.upstream();
        let used = upstream.address();
        let other: IpAddr = if used.is_ipv4() { V6.into() } else { V4.into() };
        let nobody = ClosedPort::try_bind(SocketAddr::new(other, used.port())).ok()?;
        Some((upstream, nobody))
    });
    let port = upstream.address().port();
    let proxy = at.launch(format_args!("localhost:{port}")).start();
    let client = at.connect(&proxy);
    client.send(b"by name");
    let server = upstream.accept();
    server.receive(b"by name");
    client.finish();
    server.expect_eof();
    drop(server);
    assert_eq!(proxy.ended().upstream, Some(upstream.address().to_string()));
}

pub fn a_name_that_does_not_resolve(at: &Setting) {
    let proxy = at.launch("nowhere.invalid:6443").flag("connect-timeout", "20s").start();
    let client = at.connect(&proxy);
    client.expect_reset();
    assert_eq!(proxy.ended().reason, "upstream_unresolved");
    let labels = [("engine", "none"), ("reason", "upstream_unresolved")];
    proxy.await_metric("connections_ended_total", &labels, 1.0);
}

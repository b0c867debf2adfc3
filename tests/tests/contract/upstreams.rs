//! Several servers: which one is tried, and when the next.

use std::time::Duration;

use proxy_tests::proxy::Proxy;
use proxy_tests::servers::Upstream;

use crate::setting::Setting;

/// Makes a request through the proxy that must reach `upstream`.
#[track_caller]
fn served_by(at: &Setting, proxy: &Proxy, upstream: &Upstream) {
    let client = at.connect(proxy);
    client.send(b"request");
    let server = upstream.accept();
    server.receive(b"request");
    server.send(b"response");
    client.receive(b"response");
    let address = client.address();
    drop(client);
    server.expect_eof();
    drop(server);
    let ended = proxy.ended_of(address);
    assert_eq!(ended.upstream, Some(upstream.address().to_string()));
    assert_eq!(ended.reason, "client_closed");
}

pub fn the_next_one_is_used_when_the_first_refuses(at: &Setting) {
    let nobody = at.closed_port();
    let second = at.upstream();
    let both = format!("{},{}", nobody.address(), second.address());
    let proxy = at.launch(both).flag("connect-timeout", "10m").start();
    served_by(at, &proxy, &second);
    assert!(proxy.metric("dial_duration_seconds_count", &[]) >= 2.0, "the first was not tried");
}

pub fn the_next_one_is_tried_within_the_time_out(at: &Setting) {
    let hole = at.blackhole();
    let second = at.upstream();
    let both = format!("{},{}", hole.address(), second.address());
    let proxy = at.launch(both).flag("connect-timeout", "10s").start();
    served_by(at, &proxy, &second);
}

pub fn a_failed_one_is_tried_last_for_a_while(at: &Setting) {
    let first = at.closed_port();
    let second = at.upstream();
    let both = format!("{},{}", first.address(), second.address());
    let proxy = at.launch(both).start();
    served_by(at, &proxy, &second);
    // It is back, but has to prove itself.
    let first = first.open();
    served_by(at, &proxy, &second);
    assert!(first.accept_within(Duration::ZERO).is_none(), "the failed one was tried first");
}

pub fn a_failed_one_is_still_better_than_none(at: &Setting) {
    let first = at.closed_port();
    let second = at.upstream();
    let both = format!("{},{}", first.address(), second.address());
    let proxy = at.launch(both).start();
    served_by(at, &proxy, &second);
    let first = first.open();
    let second = at.close(second);
    served_by(at, &proxy, &first);
    drop(second);
    served_by(at, &proxy, &first);
}

pub fn all_refuse(at: &Setting) {
    let (one, two) = (at.closed_port(), at.closed_port());
    let both = format!("{},{}", one.address(), two.address());
    let proxy = at.launch(both).flag("connect-timeout", "10m").start();
    for _ in 0..3 {
        let client = at.connect(&proxy);
        client.expect_reset();
        assert_eq!(proxy.ended_of(client.address()).reason, "upstream_refused");
    }
    let labels = [("engine", "none"), ("reason", "upstream_refused")];
    proxy.await_metric("connections_ended_total", &labels, 3.0);
}

//! SIGTERM: no new connections, live ones go on to their end or to the deadline.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr};
use std::thread;

use proxy_tests::admin;
use proxy_tests::peers::Peer;
use proxy_tests::process::need_open_files;
use proxy_tests::proxy::{Launch, Proxy};
use proxy_tests::servers::{ClosedPort, Upstream};
use proxy_tests::wait::until;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const ENGINES: [&str; 2] = ["copy", "splice"];

fn start(engine: &str, drain_timeout: &str) -> (Proxy, Upstream, Peer, Peer) {
    let upstream = Upstream::new(LOOPBACK);
    let launch = Launch::new(upstream.address()).flag("engine", engine);
    let proxy = launch.flag("drain-timeout", drain_timeout).start();
    let client = Peer::connect(proxy.address());
    let server = upstream.accept();
    client.send(b"before");
    server.receive(b"before");
    (proxy, upstream, client, server)
}

/// Waits until nobody listens any more. Binding tells, without a connection that would have to
/// be drained as well.
#[track_caller]
fn await_closed(proxy: &Proxy) {
    until("the listener is closed", || ClosedPort::try_bind(proxy.address()).is_ok());
    let refused = Peer::try_connect(proxy.address()).expect_err("nobody listens");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn live_connections_go_on_to_their_end() {
    for engine in ENGINES {
        let (mut proxy, upstream, client, server) = start(engine, "10m");
        assert_eq!(proxy.get("/readyz").status, 200);
        proxy.sigterm();
        await_closed(&proxy);
        let ready = proxy.get("/readyz");
        assert_eq!(ready.status, 503, "{}", ready.body);
        assert!(ready.body.contains("draining"), "{}", ready.body);
        assert_eq!(proxy.get("/healthz").status, 200);
        assert_eq!(proxy.metric("draining", &[]), 1.0);
        thread::scope(|threads| {
            threads.spawn(|| client.send_in_random_sizes(1, 3_000_000));
            threads.spawn(|| server.receive_stream(1, 3_000_000));
            threads.spawn(|| server.send_in_random_sizes(2, 3_000_000));
            threads.spawn(|| client.receive_stream(2, 3_000_000));
        });
        client.finish();
        server.expect_eof();
        assert!(!proxy.has_ended(), "it ended before its last connection");
        server.send(b"the last word");
        client.receive(b"the last word");
        server.finish();
        client.expect_eof();
        assert_eq!(proxy.exit_code(), Some(0));
        let ended = proxy.ended();
        assert_eq!(ended.reason, "client_closed");
        assert_eq!((ended.bytes_up, ended.bytes_down), (3_000_006, 3_000_013));
        drop(upstream);
    }
}

#[test]
fn without_connections_it_ends_at_once() {
    let upstream = Upstream::new(LOOPBACK);
    let mut proxy = Launch::new(upstream.address()).flag("drain-timeout", "10m").start();
    proxy.sigterm();
    assert_eq!(proxy.exit_code(), Some(0));
    assert!(admin::get(proxy.admin(), "/readyz").is_err(), "somebody still answers");
}

#[test]
fn the_deadline_resets_what_is_left() {
    for engine in ENGINES {
        let (mut proxy, _upstream, client, server) = start(engine, "500ms");
        proxy.sigterm();
        client.expect_reset();
        server.expect_reset();
        assert_eq!(proxy.ended().reason, "cut_by_drain");
        assert_eq!(proxy.exit_code(), Some(1));
    }
}

#[test]
fn a_second_signal_resets_at_once() {
    for engine in ENGINES {
        let (mut proxy, _upstream, client, server) = start(engine, "10m");
        proxy.sigterm();
        await_closed(&proxy);
        client.send(b"still there");
        server.receive(b"still there");
        proxy.sigterm();
        client.expect_reset();
        server.expect_reset();
        assert_eq!(proxy.ended().reason, "cut_by_drain");
        assert_eq!(proxy.exit_code(), Some(1));
    }
}

/// A half-closed connection is as alive as any, and cutting it must not look like its end.
#[test]
fn a_cut_after_half_close_is_no_clean_end() {
    for engine in ENGINES {
        let (mut proxy, _upstream, client, server) = start(engine, "10m");
        client.finish();
        server.expect_eof();
        server.send(b"part of an answer");
        client.receive(b"part of an answer");
        proxy.sigterm();
        await_closed(&proxy);
        proxy.sigterm();
        client.expect_reset();
        server.expect_reset_unread();
        assert_eq!(proxy.exit_code(), Some(1));
    }
}

/// The kernel has completed their handshakes: for the clients, the connection exists.
#[test]
fn clients_in_the_accept_queue_are_served() {
    // More than any acceptor takes in one go.
    const QUEUED: u64 = 500;
    need_open_files(2 * QUEUED + 200);
    for engine in ENGINES {
        let (mut proxy, upstream, client, server) = start(engine, "10m");
        proxy.pause();
        let queued: Vec<_> = (0..QUEUED).map(|_| Peer::connect(proxy.address())).collect();
        proxy.sigterm();
        proxy.resume();
        let servers: Vec<_> = queued.iter().map(|_| upstream.accept()).collect();
        servers.iter().for_each(|server| server.send(b"220 ready"));
        queued.iter().for_each(|late| late.receive(b"220 ready"));
        drop((queued, servers, client, server));
        assert_eq!(proxy.exit_code(), Some(0));
    }
}

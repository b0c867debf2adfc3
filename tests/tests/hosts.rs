//! Client, proxy and server on hosts of their own, with real routes and wires that can be cut.
//!
//! Needs root and the `ip` command (network namespaces).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use proxy_tests::netns::{Host, Wire};
use proxy_tests::peers::{Peer, both};
use proxy_tests::proxy::{Launch, Proxy};
use proxy_tests::servers::{ClosedPort, Upstream};

const ENGINES: [&str; 2] = ["copy", "splice"];

/// Three hosts in a row. Fields end in this order: the proxy before the host it runs on.
struct Row {
    proxy: Proxy,
    client_host: Host,
    server_host: Host,
    upstream: Upstream,
    _proxy_host: Host,
    behind: Wire,
}

/// The addresses, on the two wires, of the family that `ip` chooses.
fn row(engine: &'static str, ip: fn(Wire, u8) -> IpAddr) -> Row {
    let [client_host, proxy_host, server_host] = ["client", "proxy", "server"].map(Host::new);
    let before = client_host.join(&proxy_host, 1);
    let behind = proxy_host.join(&server_host, 2);
    let (listen, serve) = (SocketAddr::new(ip(before, 2), 0), ip(behind, 2));
    let upstream = server_host.run(move || Upstream::new(serve));
    let launch = Launch::new(upstream.address()).flag("engine", engine);
    let launch = launch.flag("listen-addr", listen).flag("connect-timeout", "1s");
    let proxy = proxy_host.run(move || launch.start());
    Row { proxy, client_host, server_host, upstream, _proxy_host: proxy_host, behind }
}

impl Row {
    fn connect(&self) -> Peer {
        let to = self.proxy.address();
        self.client_host.run(move || Peer::connect(to))
    }
}

#[test]
fn bytes_pass_between_hosts_over_both_families() {
    for engine in ENGINES {
        for ip in [Wire::v4, Wire::v6] {
            let row = row(engine, ip);
            let client = row.connect();
            let server = row.upstream.accept();
            both(
                || {
                    both(
                        || client.send_stream(1, 20_000_000),
                        || server.receive_stream(1, 20_000_000),
                    )
                },
                || {
                    both(
                        || server.send_stream(2, 20_000_000),
                        || client.receive_stream(2, 20_000_000),
                    )
                },
            );
            client.finish();
            server.expect_eof();
            server.finish();
            client.expect_eof();
            let ended = row.proxy.ended();
            assert_eq!(ended.reason, "client_closed");
            assert_eq!(ended.client, client.address().to_string());
        }
    }
}

#[test]
fn a_host_without_a_route_is_unreachable_at_once() {
    let host = Host::new("lonely");
    for address in ["192.0.2.1:6443", "[2001:db8::1]:6443"] {
        let launch = Launch::new(address).flag("connect-timeout", "10m");
        let proxy = host.run(move || launch.start());
        let to = proxy.address();
        let client = host.run(move || Peer::connect(to));
        client.expect_reset();
        assert_eq!(proxy.ended().reason, "upstream_unreachable");
    }
}

#[test]
fn a_server_behind_a_dead_wire_times_out() {
    let row = row("splice", Wire::v4);
    row.server_host.ip(&format!("link set {} down", row.behind.device()));
    let client = row.connect();
    client.expect_reset();
    // The kernel may say first that nobody answers for the address.
    let reason = row.proxy.ended().reason;
    assert!(["upstream_timeout", "upstream_unreachable"].contains(&reason.as_str()), "{reason}");
}

#[test]
fn a_transfer_survives_a_wire_that_is_dead_for_a_while() {
    for engine in ENGINES {
        let row = row(engine, Wire::v4);
        let client = row.connect();
        let server = row.upstream.accept();
        client.send_stream(1, 10_000);
        server.receive_stream(1, 10_000);
        let device = row.behind.device();
        row.server_host.ip(&format!("link set {device} down"));
        client.send_stream(2, 50_000);
        server.send_stream(3, 50_000);
        row.server_host.ip(&format!("link set {device} up"));
        server.receive_stream(2, 50_000);
        client.receive_stream(3, 50_000);
        both(|| client.send_stream(4, 5_000_000), || server.receive_stream(4, 5_000_000));
        client.finish();
        server.expect_eof();
        server.finish();
        client.expect_eof();
        assert_eq!(row.proxy.ended().reason, "client_closed");
    }
}

#[test]
fn a_name_is_resolved_again_when_its_address_fails() {
    let [old_ip, new_ip] = [1, 2].map(|last| IpAddr::from([127, 0, 0, last]));
    let old = Upstream::new(old_ip);
    let port = old.address().port();
    let new =
        ClosedPort::try_bind(SocketAddr::new(new_ip, port)).expect("127.0.0.2 is free").open();
    let hosts = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(hosts.path(), format!("{old_ip} api.test\n")).expect("writes");
    let proxy = Launch::new(format!("api.test:{port}")).hosts(hosts.path()).start();

    let early = Peer::connect(proxy.address());
    let early_server = old.accept();
    std::fs::write(hosts.path(), format!("{new_ip} api.test\n")).expect("writes");
    let _closed = old.close();
    // Its answer would hold for minutes, but the address refuses.
    let client = Peer::connect(proxy.address());
    let server = new.accept();
    client.send(b"to the new one");
    server.receive(b"to the new one");
    early.send(b"still with the old one");
    early_server.receive(b"still with the old one");
}

/// The second address of a network, and all of loopback but the first: the kernel does not send
/// from those by itself, so a connection to them does not look like one to ourselves.
#[test]
fn an_upstream_that_is_the_proxy_itself_is_never_dialled() {
    let host = Arc::new(Host::new("circle"));
    host.ip("addr add 192.0.2.1/24 dev lo");
    host.ip("addr add 192.0.2.2/24 dev lo");
    let upstream = host.run(|| Upstream::new(IpAddr::from([127, 0, 0, 1])));
    let good = upstream.address();
    let to = SocketAddr::from(([127, 0, 0, 1], 6443));
    for ip in ["127.0.0.1", "127.0.0.2", "192.0.2.1", "192.0.2.2", "[::1]"] {
        for is_alone in [true, false] {
            let own = format!("{ip}:6443");
            let addresses = if is_alone { own } else { format!("{own},{good}") };
            let launch = Launch::new(addresses).flag("listen-addr", ":6443");
            let proxy = launch.on(&host).start();
            if is_alone {
                // Nobody was contacted before, so this is found out now.
                assert_eq!(proxy.get("/readyz").status, 503, "{ip}");
            }
            let client = host.run(move || Peer::connect(to));
            if is_alone {
                client.expect_reset();
                assert_eq!(proxy.ended().reason, "upstream_is_self", "{ip}");
            } else {
                let server = upstream.accept();
                client.send(b"to the other one");
                server.receive(b"to the other one");
            }
            assert_eq!(proxy.metric("connections_accepted_total", &[]), 1.0, "{ip}");
        }
    }
}

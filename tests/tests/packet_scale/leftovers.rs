//! After many connections, short and long ones, nothing is left of them.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use proxy_tests::facts::{self, Socket, Sockstat, State};
use proxy_tests::maps;
use proxy_tests::peers::Peer;
use proxy_tests::row::{Family, Row};
use proxy_tests::servers::Upstream;
use proxy_tests::wait::within;
use serde_json::Value;

use crate::node::Node;

const SHORT: usize = 10_000;
const LONG: usize = 1_000;

/// Clients, and servers, that are busy at once.
const AT_ONCE: usize = 4;

/// After an orderly end, the addresses are kept for 60 s; and then there is a busy machine.
const AFTER_THE_LAST: Duration = Duration::from_secs(100);

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    ClientFirst,
    ServerFirst,
    ResetByClient,
    ResetByServer,
    Killed,
}

const WAYS: [Way; 5] =
    [Way::ClientFirst, Way::ServerFirst, Way::ResetByClient, Way::ResetByServer, Way::Killed];

#[test]
fn nothing_is_left_of_short_and_long_connections() {
    let family = Family::V6;
    let row = Row::new();
    // As a host may have it.
    row.node.sysctl("ipv4.ip_local_reserved_ports", "8080,30000-30009");
    let bare = (facts::sockstat(&row.node), Node::reserved_ports(&row));
    let back = row.back(family);
    let upstream = row.server.run(move || Upstream::new(back));
    let mut node = Node::new(row, upstream.address(), SHORT + LONG);
    let to = SocketAddr::new(node.row.front(family), node.proxy.address().port());
    let start = node.traces();
    let started = facts::sockstat(node.host());
    let maps: Vec<u32> = maps::of(node.proxy.process()).into_keys().collect();
    assert_ne!(Node::reserved_ports(&node.row), bare.1, "no port is reserved");
    println!("{start:?}, {started:?}");

    short_ones(&node, &upstream, to);
    println!("after the short ones: {:?}", node.traces());
    let pairs = long_ones(&node, &upstream, to);
    let full = node.traces();
    println!("with the long ones: {full:?}");
    assert_ne!(full, start, "this test sees nothing");
    end(&node, pairs);
    node.await_switched(0);
    node.await_traces(&start, AFTER_THE_LAST);
    node.proxy.await_metric("packet_room", &[], (SHORT + LONG) as f64);
    await_sockets(&node, &started);

    // And nothing of the proxy itself.
    node.proxy.sigterm();
    assert_eq!(node.proxy.exit_code(), Some(0));
    assert_eq!(Node::reserved_ports(&node.row), bare.1);
    await_sockets(&node, &bare.0);
    // The kernel lets go of maps a little later.
    within(Duration::from_secs(30), "no map is left", || {
        (!maps.iter().any(|id| maps::is_there(*id))).then_some(())
    });
}

/// Waits until no more sockets are there than there were, and none is remembered.
#[track_caller]
fn await_sockets(node: &Node, before: &Sockstat) {
    // Asking for metrics leaves some.
    let admin = node.proxy.admin();
    let is_remembered = |socket: &Socket| {
        socket.state == State::TimeWait && ![socket.local, socket.remote].contains(&admin)
    };
    within(AFTER_THE_LAST, "no socket is left", || {
        let now = facts::sockstat(node.host());
        // Those of the whole machine are others' as well; but a thousand of each kind were ours.
        let is_as_before = |now: u64, before: u64| now < before + LONG as u64 / 2;
        (now.used <= before.used
            && now.in_use <= before.in_use
            && is_as_before(now.allocated, before.allocated)
            && is_as_before(now.orphans, before.orphans)
            && is_as_before(now.pages, before.pages)
            && !facts::sockets(node.host()).iter().any(is_remembered))
        .then(|| println!("{now:?}"))
    });
}

/// Ask once and close; the client first, or the server.
fn short_ones(node: &Node, upstream: &Upstream, to: SocketAddr) {
    thread::scope(|threads| {
        for _ in 0..AT_ONCE {
            threads.spawn(|| {
                for _ in 0..SHORT / AT_ONCE {
                    let server = upstream.accept();
                    let mut who = [0];
                    server.receive_into(&mut who);
                    server.send(b"an answer");
                    if who == *b"c" {
                        server.expect_eof();
                    }
                }
            });
        }
        node.row.client.run(move || {
            thread::scope(|threads| {
                for _ in 0..AT_ONCE {
                    threads.spawn(move || {
                        for number in 0..SHORT / AT_ONCE {
                            let client = Peer::connect(to);
                            let closes_first = number % 2 == 0;
                            client.send(if closes_first { b"c" } else { b"s" });
                            client.receive(b"an answer");
                            if !closes_first {
                                client.expect_eof();
                            }
                        }
                    });
                }
            });
        });
    });
}

/// Each with some bytes both ways, before and after the switch.
fn long_ones(node: &Node, upstream: &Upstream, to: SocketAddr) -> Vec<(Way, Peer, Peer)> {
    let talk = |client: &Peer, server: &Peer| {
        client.send_stream(1, 10_000);
        server.receive_stream(1, 10_000);
        server.send_stream(2, 20_000);
        client.receive_stream(2, 20_000);
    };
    let pair = |number: usize| {
        let client = node.row.client.run(move || Peer::connect(to));
        let server = upstream.accept();
        talk(&client, &server);
        (WAYS[number % WAYS.len()], client, server)
    };
    let pairs: Vec<_> = (0..LONG).map(pair).collect();
    node.await_switched(LONG);
    assert_eq!(facts::connections(node.host()), 0);
    for (_, client, server) in &pairs {
        talk(client, server);
    }
    pairs
}

fn end(node: &Node, pairs: Vec<(Way, Peer, Peer)>) {
    let rows: Value =
        serde_json::from_str(&node.connections(&["list", "--output=json"])).expect("JSON");
    let rows = rows["connections"].as_array().expect("an array");
    let id = |client: SocketAddr| {
        let client = client.to_string();
        let row = rows.iter().find(|row| row["client"] == client.as_str());
        row.and_then(|row| row["id"].as_str()).expect("every connection is listed").to_owned()
    };
    let meant = pairs.iter().filter(|(way, ..)| *way == Way::Killed);
    let meant: Vec<String> = meant.map(|(_, client, _)| id(client.address())).collect();
    let words: Vec<&str> = meant.iter().map(String::as_str).collect();
    node.connections(&[&["kill"], &words[..]].concat());
    for (way, client, server) in pairs {
        match way {
            Way::ClientFirst => {
                client.finish();
                server.expect_eof();
                server.finish();
                client.expect_eof();
            }
            Way::ServerFirst => {
                server.finish();
                client.expect_eof();
                client.finish();
                server.expect_eof();
            }
            Way::ResetByClient => {
                client.reset();
                server.expect_reset();
            }
            Way::ResetByServer => {
                server.reset();
                client.expect_reset();
            }
            Way::Killed => {
                client.expect_reset();
                server.expect_reset();
            }
        }
    }
}

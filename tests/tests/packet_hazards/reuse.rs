//! A client that comes back from the same port while what it had before is still remembered.

use proxy_tests::facts::{self, State};
use proxy_tests::peers::Peer;
use proxy_tests::row::Family;
use proxy_tests::wait::until;

use crate::ground::{Ground, Switched, Traffic, both_families};

both_families!(after_an_end, after_a_reset, after_a_crash);

/// A new connection from there is one through the proxy, in the end switched as well.
#[track_caller]
fn comes_back(ground: &Ground, from: std::net::SocketAddr, ends: usize) {
    let front = ground.front();
    // The kernel lets it in by itself, however long the proxy takes to learn of it.
    ground.proxy.pause();
    let client = ground.row.client.run(move || Peer::connect_from(from, front));
    until("it is let in", || {
        let sockets = facts::sockets(ground.node());
        sockets.iter().any(|s| s.remote == from && s.state == State::Established)
    });
    ground.proxy.resume();
    let server = ground.upstream.accept();
    client.send_stream(7, 100_000);
    server.receive_stream(7, 100_000);
    server.send_stream(8, 100_000);
    client.receive_stream(8, 100_000);
    // Nothing of the old connection is in the way.
    ground.await_switched(1);
    client.finish();
    server.expect_eof();
    server.finish();
    client.expect_eof();
    let ended = ground.proxy.access_log(ends + 1);
    let last = &ended[ends];
    assert_eq!((last.bytes_up, last.bytes_down), (100_000, 100_000), "{ended:?}");
    assert_eq!(last.client, from.to_string());
}

fn after_an_end(family: Family) {
    let ground = Ground::new(family);
    let connection = ground.switched();
    Traffic::new().pass(&connection, 10_000);
    let Switched { client, server, .. } = connection;
    let from = client.address();
    // The server keeps the memory of it, so the client's port is free.
    server.finish();
    client.expect_eof();
    client.finish();
    server.expect_eof();
    drop((client, server));
    assert_eq!(ground.proxy.ended().reason, "server_closed");
    comes_back(&ground, from, 1);
}

fn after_a_reset(family: Family) {
    let ground = Ground::new(family);
    let connection = ground.switched();
    let from = connection.client.address();
    connection.client.reset();
    connection.server.expect_reset();
    comes_back(&ground, from, 1);
}

/// The client's host has forgotten the connection without a word (it was restarted, say). Its SYN
/// is answered with the numbers of the old one, to which it says RST; the next SYN is let in.
fn after_a_crash(family: Family) {
    let ground = Ground::new(family);
    let connection = ground.switched();
    let from = connection.client.address();
    // Nothing of its last words gets out.
    let client = &ground.row.client;
    let filter = |verb: &str| {
        let prefix = if family == Family::V4 { "" } else { "-6" };
        let front = ground.front().ip();
        let length = if family == Family::V4 { 32 } else { 128 };
        client.ip(&format!("{prefix} route {verb} blackhole {front}/{length}"));
    };
    filter("add");
    connection.client.reset();
    filter("del");
    comes_back(&ground, from, 1);
    connection.server.expect_reset();
}

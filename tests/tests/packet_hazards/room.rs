//! The table of connections is full, or has been used many times.

use proxy_tests::peers::Peer;
use proxy_tests::row::{Family, Row};

use crate::ground::{Ground, RELAYING, both_families};

both_families!(
    beyond_the_limit_clients_are_refused,
    ended_ones_leave_their_place,
    without_a_port_they_stay_in_userspace,
    nothing_leaks,
);

/// Every connection has a place in the kernel's tables.
const LIMIT: u32 = 16;

fn limited(family: Family) -> Ground {
    Ground::with(Row::new(), family, &[("max-connections", &LIMIT.to_string())])
}

fn beyond_the_limit_clients_are_refused(family: Family) {
    let ground = limited(family);
    let mut pairs: Vec<_> = (0..LIMIT).map(|_| ground.pair()).collect();
    ground.await_switched(LIMIT);
    assert_eq!(ground.proxy.metric("packet_room", &[]), 0.0);
    let front = ground.front();
    ground.row.client.run(move || Peer::connect(front).expect_reset());
    assert_eq!(ground.proxy.ended().reason, "over_limit");
    // The others never knew.
    for (client, server) in &pairs {
        client.send(b"still here?");
        server.receive(b"still here?");
    }
    let (client, server) = pairs.pop().expect("one of them");
    client.reset();
    server.expect_reset();
    ground.proxy.await_metric(RELAYING, &[], f64::from(LIMIT - 1));
    ground.proxy.await_metric("packet_room", &[], 1.0);
    pairs.push(ground.pair());
    ground.await_switched(LIMIT);
}

/// For a minute the kernel's tables remember connections that have ended. Others are not refused
/// for that; only they stay in userspace.
fn ended_ones_leave_their_place(family: Family) {
    let ground = limited(family);
    let pairs: Vec<_> = (0..LIMIT).map(|_| ground.pair()).collect();
    ground.await_switched(LIMIT);
    for (client, server) in &pairs {
        client.finish();
        server.expect_eof();
        server.finish();
        client.expect_eof();
    }
    ground.proxy.await_metric(RELAYING, &[], 0.0);
    let others: Vec<_> = (0..LIMIT).map(|_| ground.pair()).collect();
    for (client, server) in &others {
        client.send(b"any place?");
        server.receive(b"any place?");
        server.send(b"yes");
        client.receive(b"yes");
    }
    ground.proxy.await_metric("packet_ineligible_total", &[("reason", "full")], f64::from(LIMIT));
}

/// A connection to one server takes a port of the node, of which those that the kernel hands out to
/// nobody else are few.
fn without_a_port_they_stay_in_userspace(family: Family) {
    const PORTS: u32 = 32;
    let row = Row::new();
    // Its upper half is the proxy's, and nothing is above.
    row.node.sysctl("ipv4.ip_local_port_range", "65472 65535");
    let ground = Ground::with(row, family, &[]);
    ground.proxy.log_line("ports are fewer than connections may be", |line| {
        line["ports"] == PORTS && line["level"] == "WARN"
    });
    assert_eq!(ground.proxy.metric("packet_room", &[]), f64::from(PORTS));
    let pairs: Vec<_> = (0..PORTS + 8).map(|_| ground.pair()).collect();
    ground.proxy.await_metric(RELAYING, &[("engine", "packet")], PORTS.into());
    ground.proxy.await_metric("packet_ineligible_total", &[("reason", "ports")], 8.0);
    assert_eq!(ground.proxy.metric("packet_room", &[]), 0.0);
    for (client, server) in &pairs {
        client.send(b"kernel or not");
        server.receive(b"kernel or not");
    }
}

/// More connections than the tables have entries, by two orders of magnitude; were any entry left
/// behind, there would soon be no switch any more.
fn nothing_leaks(family: Family) {
    const SHORT: u32 = 2_000;
    let ground = limited(family);
    // The proxy learns of ends a little later than the ends do.
    let await_ended = |count: u32| {
        ground.proxy.await_metric("connections_ended_total", &[], count.into());
    };
    for number in 0..SHORT {
        if number % (LIMIT / 2) == 0 {
            await_ended(number);
        }
        let (client, server) = ground.pair();
        client.send(b"short");
        server.receive(b"short");
        server.reset();
        client.expect_reset();
    }
    await_ended(SHORT);
    for _ in 0..16 {
        // One less than there are: the last one's place is free only a moment after it was reset.
        let pairs: Vec<_> = (1..LIMIT).map(|_| ground.pair()).collect();
        ground.await_switched(LIMIT - 1);
        ground.connections(&["kill", "--all"]);
        for (client, server) in &pairs {
            client.expect_reset();
            server.expect_reset();
        }
        ground.proxy.await_metric("packet_room", &[], LIMIT.into());
    }
}

//! Ends of switched connections reach the other end as they are, and the access log.

use std::time::Duration;

use proxy_tests::forge::{ACK, FIN, PSH, RST, SYN, Segment};
use proxy_tests::peers::{Ending, both};
use proxy_tests::row::{Family, Row};
use proxy_tests::sniff::{Sniffer, Way};
use proxy_tests::stream::Dice;
use proxy_tests::wait::{patient, until};

use crate::ground::{Ground, RELAYING, Switched, Traffic, both_families};

both_families!(
    a_reset_by_the_client,
    a_reset_by_the_server,
    half_closed_by_the_client,
    half_closed_by_the_server,
    both_at_once,
    idle_connections_are_reset,
    silent_ends_are_asked_and_live,
    ends_that_nobody_asked_live,
    one_that_vanished_is_found,
    their_bytes_are_counted,
    killed_by_hand,
    of_which_nobody_was_told,
    forged_ones_are_taken_back,
    one_that_forged_numbers_hide_is_found,
    one_that_vanished_is_found_among_forged_segments,
);

/// The programs have no room to tell of anything, and then both directions end.
fn of_which_nobody_was_told(family: Family) {
    /// Events that fit: 256 KiB, 32 bytes each with their headers.
    const ROOM: usize = (256 << 10) / 32;
    let row = Row::new();
    for host in [&row.node, &row.server] {
        host.ip("link set wire2 mtu 1300");
    }
    let ground = Ground::with(row, family, &[]);
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    traffic.pass(&connection, 100_000);
    ground.proxy.pause();
    // Each is too large for the way on, which is worth an event.
    let [from, to] = connection.front;
    let large = Segment::new(from, to, PSH | ACK).payload(&[0; 1400]);
    // Twice: on a busy machine some may be dropped on their way.
    for _ in 0..2 * ROOM {
        large.send_from(&ground.row.client);
    }
    connection.close();
    ground.proxy.resume();
    let ended = ground.proxy.ended();
    let (reason, bytes) = (ended.reason.as_str(), traffic.bytes());
    assert_eq!((reason, ended.bytes_up, ended.bytes_down), ("client_closed", bytes, bytes));
    assert!(ground.odd_segments("event_lost") > 0.0, "there was room for all");
}

/// Somebody knows the numbers: says FIN in the client's name, a little ahead of it, and in the
/// server's that this is acknowledged. Neither end believes it, and what they go on to say shows
/// that it was not so.
fn forged_ones_are_taken_back(family: Family) {
    const AHEAD: u32 = 100;
    let ground = Ground::new(family);
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    let row = &ground.row;
    let ends = [(&row.client, row.before), (&row.server, row.behind)];
    let sniffers = ends.map(|(host, wire)| Sniffer::start(host, &wire.device()));
    traffic.pass(&connection, 100_000);
    // After the last byte, in the numbers of that wire.
    let last = |side: usize, way: Way| {
        let first = sniffers[side].await_segment("bytes", |s| s.way == way && s.len > 0);
        first.seq.wrapping_add(traffic.bytes() as u32)
    };
    let [next, got] = [Way::Out, Way::In].map(|way| last(0, way));
    let [from, to] = connection.front;
    let fin = Segment::new(from, to, FIN | ACK).numbers(next.wrapping_add(AHEAD), got);
    fin.send_from(&row.client);
    sniffers[1].await_segment("the end", |s| s.way == Way::In && s.flags & FIN != 0);
    let [from, to] = connection.back;
    let [next_there, got_there] = [Way::Out, Way::In].map(|way| last(1, way));
    let ack = got_there.wrapping_add(AHEAD + 1);
    Segment::new(from, to, ACK).numbers(next_there, ack).send_from(&row.server);
    let ack = next.wrapping_add(AHEAD + 1);
    sniffers[0].await_segment("its acknowledgement", |s| s.way == Way::In && s.ack == ack);
    // Past it in one segment.
    traffic.pass(&connection, 1000);
    traffic.pass(&connection, 100_000);
    assert_eq!(ground.list().len(), 1);
    assert_eq!(ground.proxy.metric("connections_ended_total", &[]), 0.0);
    // Now the server ends first, and the client goes on for a while.
    connection.server.finish();
    connection.client.expect_eof();
    connection.client.send_stream(3, 2_000_000);
    connection.server.receive_stream(3, 2_000_000);
    assert_eq!(ground.list().len(), 1);
    connection.client.finish();
    connection.server.expect_eof();
    let ended = ground.proxy.ended();
    let (reason, bytes) = (ended.reason.as_str(), traffic.bytes());
    assert_eq!(
        (reason, ended.bytes_up, ended.bytes_down),
        ("server_closed", bytes + 2_000_000, bytes)
    );
}

/// Somebody knows the numbers, and says in the client's name that it is further than it is: so what it
/// then ends with seems to be long past. Asked, the server says that there is nothing any more.
fn one_that_forged_numbers_hide_is_found(family: Family) {
    const AHEAD: u32 = 50_000;
    // So that the answer to the first question counts, and not that there is none to the third.
    let ground = Ground::with(Row::new(), family, &[("packet-keepalive", "4s")]);
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    let row = &ground.row;
    let sniffer = Sniffer::start(&row.client, &row.before.device());
    let beyond = Sniffer::start(&row.server, &row.behind.device());
    traffic.pass(&connection, 100_000);
    let last = |way: Way| {
        let first = sniffer.await_segment("bytes", |s| s.way == way && s.len > 0);
        first.seq.wrapping_add(traffic.bytes() as u32)
    };
    let [next, got] = [Way::Out, Way::In].map(last);
    let [from, to] = connection.front;
    let forged = Segment::new(from, to, ACK).numbers(next.wrapping_add(AHEAD), got);
    forged.send_from(&row.client);
    let first = beyond.await_segment("bytes", |s| s.way == Way::In && s.len > 0).seq;
    let ahead = first.wrapping_add(traffic.bytes() as u32 + AHEAD);
    beyond.await_segment("the forged one", |s| s.way == Way::In && s.seq == ahead);
    connection.close();
    let ended = ground.proxy.ended();
    assert_eq!((ended.reason.as_str(), ended.bytes_down), ("server_reset", traffic.bytes()));
    // It counts too much, and no more than that.
    let most = traffic.bytes() + u64::from(AHEAD);
    assert!((traffic.bytes()..=most).contains(&ended.bytes_up), "{ended:?}");
    ground.proxy.await_metric(RELAYING, &[], 0.0);
}

fn a_reset_by_the_client(family: Family) {
    let ground = Ground::new(family);
    let Switched { client, server, .. } = ground.switched();
    client.send_stream(1, 5_000);
    server.receive_stream(1, 5_000);
    client.reset();
    server.expect_reset();
    let ended = ground.proxy.ended();
    assert_eq!((ended.reason.as_str(), ended.bytes_up), ("client_reset", 5_000));
    ground.proxy.await_metric(RELAYING, &[], 0.0);
}

fn a_reset_by_the_server(family: Family) {
    let ground = Ground::new(family);
    let Switched { client, server, .. } = ground.switched();
    server.send_stream(1, 5_000);
    client.receive_stream(1, 5_000);
    server.reset();
    client.expect_reset();
    let ended = ground.proxy.ended();
    assert_eq!((ended.reason.as_str(), ended.bytes_down), ("server_reset", 5_000));
    ground.proxy.await_metric(RELAYING, &[], 0.0);
}

fn half_closed_by_the_client(family: Family) {
    let ground = Ground::new(family);
    let Switched { client, server, .. } = ground.switched();
    client.send_stream(1, 300_000);
    client.finish();
    assert_eq!(server.receive_until_end(1), (300_000, Ending::Eof));
    both(|| server.send_stream(2, 3_000_000), || client.receive_stream(2, 3_000_000));
    server.finish();
    client.expect_eof();
    let ended = ground.proxy.ended();
    assert_eq!(
        (ended.reason.as_str(), ended.bytes_up, ended.bytes_down),
        ("client_closed", 300_000, 3_000_000)
    );
}

fn half_closed_by_the_server(family: Family) {
    let ground = Ground::new(family);
    let Switched { client, server, .. } = ground.switched();
    server.send_stream(1, 300_000);
    server.finish();
    assert_eq!(client.receive_until_end(1), (300_000, Ending::Eof));
    both(|| client.send_stream(2, 3_000_000), || server.receive_stream(2, 3_000_000));
    client.finish();
    server.expect_eof();
    let ended = ground.proxy.ended();
    assert_eq!(
        (ended.reason.as_str(), ended.bytes_up, ended.bytes_down),
        ("server_closed", 3_000_000, 300_000)
    );
}

fn both_at_once(family: Family) {
    for _ in 0..5 {
        let ground = Ground::new(family);
        let connection = ground.switched();
        let mut traffic = Traffic::new();
        traffic.pass(&connection, 100_000);
        both(|| connection.client.finish(), || connection.server.finish());
        connection.client.expect_eof();
        connection.server.expect_eof();
        let ended = ground.proxy.ended();
        assert!(ended.reason.ends_with("_closed"), "{ended:?}");
        assert_eq!((ended.bytes_up, ended.bytes_down), (100_000, 100_000));
    }
}

fn idle_connections_are_reset(family: Family) {
    let ground = Ground::with(Row::new(), family, &[("idle-timeout", "2s")]);
    // Nothing passes after the switch.
    let Switched { client, server, .. } = ground.switched();
    client.expect_reset();
    server.expect_reset();
    let ended = ground.proxy.ended();
    assert_eq!(ended.reason, "idle_timeout");
    assert!(ended.duration_ms >= 2000.0, "not idle for 2 s after {} ms", ended.duration_ms);
}

fn their_bytes_are_counted(family: Family) {
    let ground = Ground::new(family);
    let counted = || {
        ["up", "down"].map(|way| ground.proxy.metric("bytes_total", &[("direction", way)]) as u64)
    };
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    traffic.pass(&connection, 3_000_000);
    until("the bytes are counted", || counted() == [traffic.bytes(); 2]);
    connection.close();
    assert_eq!(ground.proxy.ended().reason, "client_closed");
    assert_eq!(counted(), [traffic.bytes(); 2]);
}

/// A proxy that asks ends which are silent for so long. On a slow machine their answers take longer.
fn asking(family: Family) -> (Ground, Duration) {
    let after = patient(Duration::from_millis(500));
    let keepalive = format!("{}ms", after.as_millis());
    (Ground::with(Row::new(), family, &[("packet-keepalive", &keepalive)]), after)
}

/// The process has no turn for longer than an end may be silent: not the end's fault.
fn ends_that_nobody_asked_live(family: Family) {
    let (ground, after) = asking(family);
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    traffic.pass(&connection, 100_000);
    ground.proxy.pause();
    let sniffer = Sniffer::start(&ground.row.client, &ground.row.before.device());
    std::thread::sleep(after * 4);
    ground.proxy.resume();
    let first = sniffer.await_segment("a question", |seen| seen.way == Way::In);
    assert_eq!(first.flags & RST, 0, "{first:?}");
    traffic.pass(&connection, 100_000);
    connection.close();
    assert_eq!(ground.proxy.ended().reason, "client_closed");
}

/// Nobody says anything but the node, which asks.
fn silent_ends_are_asked_and_live(family: Family) {
    let (ground, _) = asking(family);
    let row = &ground.row;
    let connection = ground.switched();
    let ends = [(&row.client, row.before), (&row.server, row.behind)];
    let sniffers = ends.map(|(host, wire)| Sniffer::start(host, &wire.device()));
    for sniffer in &sniffers {
        // For longer than what counts as gone; the other end's answers come along as well.
        until("questions", || {
            sniffer.so_far().iter().filter(|s| s.way == Way::In && s.len == 0).count() >= 20
        });
    }
    let mut traffic = Traffic::new();
    traffic.pass(&connection, 1_000_000);
    connection.close();
    assert_eq!(ground.proxy.ended().reason, "client_closed");
}

/// The client's host loses its wire; the server learns of it, and nothing is kept.
fn one_that_vanished_is_found(family: Family) {
    let ground = Ground::with(Row::new(), family, &[("packet-keepalive", "500ms")]);
    let connection = ground.switched();
    Traffic::new().pass(&connection, 100_000);
    ground.row.client.ip("link set wire1 down");
    connection.server.expect_reset();
    assert_eq!(ground.proxy.ended().reason, "client_timed_out");
}

/// The client hears nothing any more, and so says nothing. Somebody who knows no numbers goes on in its
/// name, which is no sign of life.
fn one_that_vanished_is_found_among_forged_segments(family: Family) {
    let ground = Ground::with(Row::new(), family, &[("packet-keepalive", "500ms")]);
    let connection = ground.switched();
    Traffic::new().pass(&connection, 100_000);
    let client = &ground.row.client;
    for command in [
        "add table inet deaf",
        "add chain inet deaf hear { type filter hook input priority 0; policy drop; }",
    ] {
        client.output("nft", &[command]);
    }
    let [from, to] = connection.front;
    let mut dice = Dice::new(7);
    until("the client counts as gone", || {
        for flags in [ACK, PSH | ACK, FIN | ACK, SYN, RST] {
            let numbers = (dice.roll() as u32, dice.roll() as u32);
            Segment::new(from, to, flags).numbers(numbers.0, numbers.1).send_from(client);
        }
        ground.proxy.metric("connections_ended_total", &[]) > 0.0
    });
    connection.server.expect_reset();
    assert_eq!(ground.proxy.ended().reason, "client_timed_out");
}

fn killed_by_hand(family: Family) {
    let ground = Ground::new(family);
    let connection = ground.switched();
    Traffic::new().pass(&connection, 100_000);
    let rows = ground.list();
    ground.connections(&["kill", rows[0]["id"].as_str().expect("an id")]);
    connection.client.expect_reset();
    connection.server.expect_reset();
    assert_eq!(ground.proxy.ended().reason, "killed");
    assert_eq!(ground.list().len(), 0);
}

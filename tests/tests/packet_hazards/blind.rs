//! Segments forged by somebody who knows who talks to whom, but no numbers.

use std::sync::Arc;

use proxy_tests::forge::{ACK, FIN, PSH, RST, SYN, Segment};
use proxy_tests::netns::Host;
use proxy_tests::row::Family;
use proxy_tests::stream::Dice;

use crate::ground::{Ground, Switched, Traffic, both_families};

const KINDS: [(u8, usize); 9] = [
    (RST, 0),
    (RST | ACK, 0),
    (SYN, 0),
    (SYN | ACK, 0),
    (FIN, 0),
    (FIN | ACK, 0),
    (ACK, 0),
    (PSH | ACK, 900),
    (0, 100),
];

/// Of each kind, from each host, in each end's name.
const EACH: u32 = 40;

both_families!(random_numbers_do_no_harm, while_bytes_flow, random_clocks_before_any_byte);

fn random_numbers_do_no_harm(family: Family) {
    let ground = Ground::new(family);
    let hosts = attackers(&ground);
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    traffic.pass(&connection, 200_000);
    let before = only_row(&ground);
    for host in &hosts {
        shower(host, &connection);
        traffic.pass(&connection, 10_000);
    }
    unharmed(&ground, connection, traffic, &before);
}

fn while_bytes_flow(family: Family) {
    let ground = Ground::new(family);
    let hosts = attackers(&ground);
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    let before = only_row(&ground);
    std::thread::scope(|threads| {
        let showers = threads.spawn(|| hosts.iter().for_each(|host| shower(host, &connection)));
        while !showers.is_finished() {
            traffic.pass(&connection, 1_000_000);
        }
    });
    unharmed(&ground, connection, traffic, &before);
}

/// An end's clock is not known before its first segment, and nobody else's is taken for it.
fn random_clocks_before_any_byte(family: Family) {
    let ground = Ground::new(family);
    let mut dice = Dice::new(5);
    // Every other clock would do no harm.
    for _ in 0..6 {
        let connection = ground.switched();
        let row = &ground.row;
        for (host, [from, to]) in [(&row.client, connection.front), (&row.server, connection.back)]
        {
            for flags in [ACK, PSH | ACK, RST, RST | ACK] {
                let (seq, ack) = (dice.roll() as u32, dice.roll() as u32);
                let mut segment = Segment::new(from, to, flags).numbers(seq, ack);
                segment.options = vec![1, 1, 8, 10];
                segment.options.extend((dice.roll() as u32).to_be_bytes());
                segment.options.extend((dice.roll() as u32).to_be_bytes());
                segment.payload(&[0x55; 10]).send_from(host);
            }
        }
        Traffic::new().pass(&connection, 10_000);
        connection.close();
        ground.proxy.await_metric("connections_relaying", &[("engine", "packet")], 0.0);
    }
}

fn only_row(ground: &Ground) -> serde_json::Value {
    let rows = ground.list();
    assert_eq!(rows.len(), 1, "{rows:?}");
    rows[0].clone()
}

#[track_caller]
fn unharmed(
    ground: &Ground,
    connection: Switched,
    mut traffic: Traffic,
    before: &serde_json::Value,
) {
    traffic.pass(&connection, 200_000);
    let row = only_row(ground);
    for field in ["id", "client", "upstream", "engine"] {
        assert_eq!(row[field], before[field], "{row}, before: {before}");
    }
    let bytes = traffic.bytes();
    assert_eq!((row["bytes_up"].as_u64(), row["bytes_down"].as_u64()), (Some(bytes), Some(bytes)));
    assert_eq!(ground.proxy.metric("connections_ended_total", &[]), 0.0);
    connection.close();
    let ended = ground.proxy.ended();
    assert_eq!(
        (ended.reason.as_str(), ended.bytes_up, ended.bytes_down),
        ("client_closed", bytes, bytes)
    );
}

/// The client's host, the server's, and one on a device that has nothing to do with either; all
/// reach every address of the node.
fn attackers(ground: &Ground) -> [Arc<Host>; 3] {
    let row = &ground.row;
    let stranger = Arc::new(Host::new("stranger"));
    let third = row.node.join(&stranger, 3);
    let ways = [(&row.client, row.before, 2), (&row.server, row.behind, 1), (&stranger, third, 1)];
    for (host, wire, node) in ways {
        host.ip(&format!("route add default via {}", wire.v4(node)));
        host.ip(&format!("-6 route add default via {}", wire.v6(node)));
    }
    // The guard is asked, not the check of source addresses.
    for device in ["all", "default", "wire1", "wire2", "wire3"] {
        row.node.sysctl(&format!("ipv4.conf.{device}.rp_filter"), "0");
    }
    [Arc::clone(&row.client), Arc::clone(&row.server), stranger]
}

fn shower(host: &Arc<Host>, connection: &Switched) {
    let mut dice = Dice::new(host.name().len() as u64);
    for [from, to] in [connection.front, connection.back] {
        for (flags, len) in KINDS {
            for _ in 0..EACH {
                let (seq, ack) = (dice.roll() as u32, dice.roll() as u32);
                let mut segment = Segment::new(from, to, flags).numbers(seq, ack);
                segment.window = dice.roll() as u16;
                segment.payload(&vec![0x55; len]).send_from(host);
            }
        }
    }
}

//! Frames that carry a VLAN's tag. The device below the VLAN's sees them first, with the tag beside
//! the packet: a program that took them there would send the tag on with them.

use std::sync::Arc;

use proxy_tests::netns::Host;
use proxy_tests::row::{Family, Row};

use crate::ground::{Ground, Traffic, both_families};

both_families!(
    a_tagged_client,
    a_tagged_server,
    a_tagged_client_and_a_server_on_the_device_below,
    a_tagged_server_and_a_client_on_the_device_below,
);

const TAG: u8 = 9;

fn a_tagged_client(family: Family) {
    let mut row = Row::new();
    let Some(tagged) = row.client.join_tagged(&row.node, row.before, TAG) else { return };
    row.before = tagged;
    relays(row, family);
}

fn a_tagged_server(family: Family) {
    let mut row = Row::new();
    let Some(tagged) = row.node.join_tagged(&row.server, row.behind, TAG) else { return };
    row.behind = tagged;
    relays(row, family);
}

/// The same device takes the packets in and sends them on: in with a tag, out without.
fn a_tagged_client_and_a_server_on_the_device_below(family: Family) {
    let [node, other] = ["node", "other"].map(|name| Arc::new(Host::new(name)));
    let behind = node.join(&other, 1);
    let Some(before) = other.join_tagged(&node, behind, TAG) else { return };
    let (client, server) = (Arc::clone(&other), other);
    relays(Row { client, node, server, before, behind, faults: Vec::new() }, family);
}

/// In without, out with a tag.
fn a_tagged_server_and_a_client_on_the_device_below(family: Family) {
    let [node, other] = ["node", "other"].map(|name| Arc::new(Host::new(name)));
    let before = other.join(&node, 1);
    let Some(behind) = node.join_tagged(&other, before, TAG) else { return };
    let (client, server) = (Arc::clone(&other), other);
    relays(Row { client, node, server, before, behind, faults: Vec::new() }, family);
}

/// Both streams pass whole and end in order, and no segment went another way than it should.
#[track_caller]
fn relays(row: Row, family: Family) {
    let ground = Ground::with(row, family, &[]);
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    traffic.pass(&connection, 1);
    traffic.pass(&connection, 3_000_000);
    for what in ["guarded", "misplaced", "unfit", "too_big"] {
        assert_eq!(ground.odd_segments(what), 0.0, "{what}");
    }
    connection.close();
    let (ended, bytes) = (ground.proxy.ended(), traffic.bytes());
    assert_eq!((ended.bytes_up, ended.bytes_down), (bytes, bytes));
    assert_eq!((ended.engine.as_deref(), &*ended.reason), (Some("packet"), "client_closed"));
}

//! Devices and routers that take less than they did when the connection was made.

use std::sync::Arc;

use proxy_tests::netns::Host;
use proxy_tests::row::{Family, Row};
use proxy_tests::servers::Upstream;
use proxy_tests::wait::until;

use crate::ground::{Ground, RELAYING, Switched, Traffic, both_families};

const SMALL: u32 = 1400;

both_families!(
    our_own_device_shrinks,
    a_router_towards_the_server_shrinks,
    forged_words_of_a_router_change_nothing,
    clients_on_a_smaller_wire,
    servers_on_a_smaller_wire,
    clients_that_take_less_than_the_wire,
    servers_that_take_less_than_the_wire,
    wires_that_differ_later,
    packets_above_the_usual_largest,
);

/// A row in which these hosts' devices on `wire` take [`SMALL`] packets.
fn with_small(wire: &str, hosts: &[fn(&Row) -> &Arc<Host>]) -> Row {
    let row = Row::new();
    for host in hosts {
        host(&row).ip(&format!("link set {wire} mtu {SMALL}"));
    }
    row
}

/// Both ends send as much at once as they may, and nothing that is too large for anybody.
#[track_caller]
fn fits(ground: &Ground, connection: Switched) {
    let mut traffic = Traffic::new();
    traffic.pass(&connection, 5_000_000);
    assert_eq!(ground.odd_segments("too_big"), 0.0);
    let bytes = traffic.bytes();
    let client = connection.client.address();
    connection.close();
    let ended = ground.proxy.ended_of(client);
    assert_eq!((ended.bytes_up, ended.bytes_down), (bytes, bytes));
}

/// An overlay's device: the server must be told what its clients take.
fn clients_on_a_smaller_wire(family: Family) {
    let row = with_small("wire1", &[|row| &row.client, |row| &row.node]);
    let ground = Ground::with(row, family, &[]);
    let connection = ground.switched();
    fits(&ground, connection);
}

/// The other way round: clients must be told what the way to the server takes.
fn servers_on_a_smaller_wire(family: Family) {
    let row = with_small("wire2", &[|row| &row.node, |row| &row.server]);
    let ground = Ground::with(row, family, &[]);
    let connection = ground.switched();
    fits(&ground, connection);
}

/// Nothing on the node shows that the client, somewhere behind a router, has a smaller wire.
fn clients_that_take_less_than_the_wire(family: Family) {
    let row = with_small("wire1", &[|row| &row.client]);
    let ground = Ground::with(row, family, &[]);
    let connection = ground.switched();
    fits(&ground, connection);
}

/// The same of the server: what it takes shows in its answer to the first connection, whose client
/// has been told already. The next one fits.
fn servers_that_take_less_than_the_wire(family: Family) {
    let row = with_small("wire2", &[|row| &row.server]);
    let ground = Ground::with(row, family, &[]);
    let (client, server) = ground.pair();
    ground.proxy.await_metric("packet_ineligible_total", &[("reason", "segment_size")], 1.0);
    drop((client, server));
    ground.proxy.await_metric(RELAYING, &[], 0.0);
    let connection = ground.switched();
    fits(&ground, connection);
}

/// A device's limit changes: connections that come later go by the new one.
fn wires_that_differ_later(family: Family) {
    let ground = Ground::new(family);
    let before = ground.switched();
    for host in [ground.node(), &ground.row.server] {
        host.ip(&format!("link set wire2 mtu {SMALL}"));
    }
    before.client.reset();
    before.server.expect_reset();
    let stays = || ground.proxy.metric("packet_ineligible_total", &[("reason", "segment_size")]);
    let relayed = || ground.proxy.metric(RELAYING, &[("engine", "packet")]);
    ground.proxy.await_metric(RELAYING, &[], 0.0);
    // How soon the proxy learns of it is the kernel's choice.
    until("clients are told", || {
        let (client, server) = ground.pair();
        let earlier = stays();
        until("it was looked at", || relayed() > 0.0 || stays() > earlier);
        let is_switched = relayed() > 0.0;
        client.reset();
        server.expect_reset();
        ground.proxy.await_metric(RELAYING, &[], 0.0);
        is_switched
    });
    let connection = ground.switched();
    fits(&ground, connection);
}

fn our_own_device_shrinks(family: Family) {
    for wire in ["wire1", "wire2"] {
        let ground = Ground::new(family);
        let connection = ground.switched();
        let mut traffic = Traffic::new();
        traffic.pass(&connection, 2_000_000);
        ground.node().ip(&format!("link set {wire} mtu {SMALL}"));
        // What the far side sends is the far side's own matter: a wire has one size.
        let far = if wire == "wire1" { &ground.row.client } else { &ground.row.server };
        far.ip(&format!("link set {wire} mtu {SMALL}"));
        // How soon the proxy learns of it is the kernel's choice.
        until("something is too big", || {
            traffic.pass(&connection, 1_000_000);
            ground.odd_segments("too_big") > 0.0
        });
        traffic.pass(&connection, 5_000_000);
        unharmed(&ground, connection, &traffic);
    }
}

#[track_caller]
fn unharmed(ground: &Ground, connection: Switched, traffic: &Traffic) {
    connection.close();
    let ended = ground.proxy.ended();
    let (reason, bytes) = (ended.reason.as_str(), traffic.bytes());
    assert_eq!((reason, ended.bytes_up, ended.bytes_down), ("client_closed", bytes, bytes));
}

/// Client, node, router, server in a row.
fn routed(family: Family) -> (Ground, Arc<Host>) {
    let mut row = Row::new();
    let router = Arc::new(Host::new("router"));
    let server = Arc::new(Host::new("far server"));
    // In the server's place is the router.
    let old = std::mem::replace(&mut row.server, Arc::clone(&server));
    drop(old);
    let near = row.node.join(&router, 5);
    let far = router.join(&server, 6);
    router.sysctl("ipv4.ip_forward", "1");
    router.sysctl("ipv6.conf.all.forwarding", "1");
    row.node.ip(&format!("route add 10.6.0.0/24 via {}", near.v4(2)));
    row.node.ip(&format!("-6 route add fd00:6::/64 via {}", near.v6(2)));
    server.ip(&format!("route add default via {}", far.v4(1)));
    server.ip(&format!("-6 route add default via {}", far.v6(1)));
    let ip = family.of(far, 2);
    let upstream = server.run(move || Upstream::new(ip));
    (Ground::in_front_of(row, family, upstream, &[]), router)
}

fn a_router_towards_the_server_shrinks(family: Family) {
    let (ground, router) = routed(family);
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    traffic.pass(&connection, 2_000_000);
    for host in [&router, &ground.row.server] {
        host.ip(&format!("link set wire6 mtu {SMALL}"));
    }
    traffic.pass(&connection, 5_000_000);
    assert!(ground.odd_segments("too_big") > 0.0, "the router said nothing");
    unharmed(&ground, connection, &traffic);
}

/// A message about a segment that nobody sent must not reach the client: it would make it send
/// smaller ones.
fn forged_words_of_a_router_change_nothing(family: Family) {
    use proxy_tests::forge::{ACK, PSH, Segment, too_big};
    use proxy_tests::sniff::{Sniffer, Way};
    use proxy_tests::stream::Dice;

    let ground = Ground::new(family);
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    traffic.pass(&connection, 100_000);
    let mut dice = Dice::new(3);
    let [server, ours] = connection.back;
    for _ in 0..300 {
        let (seq, ack) = (dice.roll() as u32, dice.roll() as u32);
        let quoted = Segment::new(ours, server, PSH | ACK).numbers(seq, ack).payload(&[0; 1400]);
        let mtu = if family == Family::V4 { 700 } else { 1280 };
        too_big(&ground.row.server, &quoted, mtu);
    }
    let sniffer = Sniffer::start(&ground.row.client, &ground.row.before.device());
    traffic.pass(&connection, 1_000_000);
    // Nor is the client told, although it would not believe it either.
    assert_eq!(ground.odd_segments("too_big"), 0.0);
    let most = sniffer.stop().iter().filter(|s| s.way == Way::Out).map(|s| s.len).max();
    assert!(most > Some(1400), "the client sends {most:?} bytes at once at most");
    unharmed(&ground, connection, &traffic);
}

/// Devices between which the kernel passes packets of more than 64 KiB ("BIG TCP"), as some network
/// plugins set them up: in IPv6 these have a header of their own.
fn packets_above_the_usual_largest(family: Family) {
    let row = Row::new();
    let ends = [(&row.client, 1), (&row.node, 1), (&row.node, 2), (&row.server, 2)];
    for (host, number) in ends {
        let set = format!("link set wire{number} gso_max_size 185000 gro_max_size 185000");
        if let Err(error) = host.try_ip(&set) {
            eprintln!("not tested, this kernel lacks it (Linux 5.19): gro_max_size: {error}");
            return;
        }
    }
    let ground = Ground::with(row, family, &[]);
    let connection = ground.switched();
    let mut traffic = Traffic::new();
    traffic.pass(&connection, 20_000_000);
    for what in ["guarded", "too_big", "unfit"] {
        assert_eq!(ground.odd_segments(what), 0.0, "{what}");
    }
    let (bytes, client) = (traffic.bytes(), connection.client.address());
    connection.close();
    let ended = ground.proxy.ended_of(client);
    assert_eq!((ended.bytes_up, ended.bytes_down), (bytes, bytes));
}

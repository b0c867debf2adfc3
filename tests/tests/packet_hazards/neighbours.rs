//! Neighbours whose address is found out late: a handshake that had to wait for it looks like one
//! over a long way.

use proxy_tests::facts::{self, State};
use proxy_tests::row::{Family, Row};
use proxy_tests::wait::until;

use crate::ground::{Ground, RELAYING, both_families};

both_families!(a_slow_one_is_not_far_away);

/// The kernel asks for an address once a second, so the handshake takes at least that long.
fn a_slow_one_is_not_far_away(family: Family) {
    let ground = Ground::with(Row::new(), family, &[("packet-max-rtt", "500ms")]);
    let ip = ground.row.back(family);
    let (length, plain) = if family == Family::V4 { (24, "") } else { (64, "nodad") };
    let device = ground.row.behind.device();
    let address = |verb: &str, flags: &str| {
        ground.row.server.ip(&format!("addr {verb} {ip}/{length} dev {device} {flags}"));
    };
    // Nobody answers for it.
    address("del", "");
    let front = ground.front();
    let client = ground.row.client.run(move || proxy_tests::peers::Peer::connect(front));
    until("the node asks", || {
        let sockets = facts::sockets(ground.node());
        sockets.iter().any(|socket| socket.state == State::SynSent)
    });
    address("add", plain);
    let server = ground.upstream.accept();
    let far = || ground.proxy.metric("packet_ineligible_total", &[("reason", "round_trip")]);
    let relayed = || ground.proxy.metric(RELAYING, &[("engine", "packet")]);
    until("it was looked at", || far() + relayed() > 0.0);
    // That is how far away it is.
    client.send(b"are you there?");
    server.receive(b"are you there?");
    ground.await_switched(1);
    server.send(b"yes");
    client.receive(b"yes");
}

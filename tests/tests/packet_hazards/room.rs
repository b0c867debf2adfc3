//! The table of connections is full, or has been used many times.

use proxy_tests::peers::Peer;
use proxy_tests::row::{Family, Row};

use crate::ground::{Ground, RELAYING, both_families};

both_families!(beyond_the_limit_clients_are_refused, nothing_leaks);

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

/// More connections than the tables have entries, by two orders of magnitude; were any entry left
/// behind, there would soon be no switch any more.
fn nothing_leaks(family: Family) {
    let ground = limited(family);
    for _ in 0..2_000 {
        let (client, server) = ground.pair();
        client.send(b"short");
        server.receive(b"short");
        server.reset();
        client.expect_reset();
    }
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

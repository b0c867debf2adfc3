//! Windows whose scales differ as far as they can.

use proxy_tests::peers::{Peer, both};
use proxy_tests::row::{Family, Row};
use proxy_tests::wait::until;

use crate::ground::{Ground, both_families};

both_families!(the_largest_scale, a_large_scale);

/// A scale of 14, in steps of 16 KiB: whether such a client is switched depends on its window.
fn the_largest_scale(family: Family) {
    all_sizes(family, "1073741824");
}

/// A scale of 11, in steps of 2 KiB.
fn a_large_scale(family: Family) {
    let switched = all_sizes(family, "67108864");
    assert!(switched > 0.0, "not even large clients were switched");
}

/// Clients with windows of all sizes get everything, whoever relays it.
fn all_sizes(family: Family, largest: &str) -> f64 {
    let row = Row::new();
    row.node.sysctl("ipv4.tcp_rmem", &format!("4096 131072 {largest}"));
    let ground = Ground::with(row, family, &[]);
    let front = ground.front();
    for kilobytes in [2, 4, 16, 64, 1024] {
        let looked = switched(&ground) + stayed(&ground);
        let connect = move || Peer::connect_with_receive_buffer(front, kilobytes * 1024);
        let client = ground.row.client.run(connect);
        let server = ground.upstream.accept();
        until("it was looked at", || switched(&ground) + stayed(&ground) > looked);
        both(|| server.send_stream(1, 500_000), || client.receive_stream(1, 500_000));
        both(|| client.send_stream(2, 500_000), || server.receive_stream(2, 500_000));
        println!("{kilobytes} KiB: {} switched so far, {} not", switched(&ground), stayed(&ground));
    }
    switched(&ground)
}

fn switched(ground: &Ground) -> f64 {
    ground.proxy.metric("packet_switch_duration_seconds_count", &[])
}

fn stayed(ground: &Ground) -> f64 {
    ground.proxy.metric("packet_ineligible_total", &[])
}

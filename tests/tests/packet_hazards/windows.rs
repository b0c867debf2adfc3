//! Windows whose scales differ as far as they can.

use proxy_tests::peers::{Peer, both};
use proxy_tests::row::{Family, Row};

use crate::ground::{Ground, both_families};

both_families!(small_clients_before_a_node_with_the_largest_scale);

fn small_clients_before_a_node_with_the_largest_scale(family: Family) {
    let row = Row::new();
    // A scale of 14, the largest there is.
    row.node.sysctl("ipv4.tcp_rmem", "4096 131072 1073741824");
    let ground = Ground::with(row, family, &[]);
    let front = ground.front();
    for kilobytes in [2, 4, 16, 64, 1024] {
        let looked = looks(&ground);
        let client = ground
            .row
            .client
            .run(move || Peer::connect_with_receive_buffer(front, kilobytes * 1024));
        let server = ground.upstream.accept();
        proxy_tests::wait::until("it was looked at", || looks(&ground) > looked);
        both(|| server.send_stream(1, 500_000), || client.receive_stream(1, 500_000));
        both(|| client.send_stream(2, 500_000), || server.receive_stream(2, 500_000));
        println!(
            "{kilobytes} KiB: {} switched so far, {} not",
            ground.proxy.metric("connections_relaying", &[("engine", "packet")]),
            ground.proxy.metric("packet_ineligible_total", &[]),
        );
        drop((client, server));
    }
}

/// Attempts that succeeded or did not.
fn looks(ground: &Ground) -> f64 {
    ground.proxy.metric("packet_switch_duration_seconds_count", &[])
        + ground.proxy.metric("packet_ineligible_total", &[])
}

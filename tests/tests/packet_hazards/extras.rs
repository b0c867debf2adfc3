//! Packets with more in their IP headers than rewriting knows.

use proxy_tests::peers::{Peer, both};
use proxy_tests::row::Family;

use crate::ground::{Ground, RELAYING};

/// Three times nothing, and the end (RFC 791): routers that know none let it pass.
const OPTIONS: [u8; 4] = [1, 1, 1, 0];

/// Each of its segments would be dropped.
#[test]
fn a_client_with_ip_options_stays_in_userspace() {
    let ground = Ground::new(Family::V4);
    let front = ground.front();
    let client = ground.row.client.run(move || Peer::connect_with_ip_options(front, &OPTIONS));
    let server = ground.upstream.accept();
    let seen = [("reason", "foreign_option")];
    ground.proxy.await_metric("packet_ineligible_total", &seen, 1.0);
    both(|| client.send_stream(1, 1_000_000), || server.receive_stream(1, 1_000_000));
    both(|| server.send_stream(2, 1_000_000), || client.receive_stream(2, 1_000_000));
    assert_eq!(ground.proxy.metric(RELAYING, &[("engine", "splice")]), 1.0);
    client.finish();
    server.expect_eof();
    server.finish();
    client.expect_eof();
    assert_eq!(ground.proxy.ended().reason, "client_closed");
}

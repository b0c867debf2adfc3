//! Ends of switched connections reach the other end as they are, and the access log.

use proxy_tests::peers::{Ending, both};
use proxy_tests::row::{Family, Row};

use crate::ground::{Ground, RELAYING, Switched, Traffic, both_families};

both_families!(
    a_reset_by_the_client,
    a_reset_by_the_server,
    half_closed_by_the_client,
    half_closed_by_the_server,
    both_at_once,
    idle_connections_are_reset,
    killed_by_hand,
);

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
    let ground = Ground::with(Row::new(), family, &[("idle-timeout", "1s")]);
    let Switched { client, server, .. } = ground.switched();
    client.expect_reset();
    server.expect_reset();
    assert_eq!(ground.proxy.ended().reason, "idle_timeout");
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

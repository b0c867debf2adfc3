//! Readers that do not read, for a while or for good.

use std::time::Duration;

use proxy_tests::facts;
use proxy_tests::netns::Host;
use proxy_tests::peers::{Peer, backlog_bound, both};
use proxy_tests::row::{Family, Row};
use proxy_tests::stalled::{self, Stalled};
use proxy_tests::wait::until;

use crate::ground::{Ground, both_families};

both_families!(
    stalled_readers_cost_the_node_nothing,
    a_reader_that_uploads_first,
    a_reader_that_uploads_first_in_the_kernel,
    a_reader_that_pauses_has_a_fast_connection_later
);

/// For a moment; for a minute in `packet_scale`.
fn stalled_readers_cost_the_node_nothing(family: Family) {
    const COUNT: u32 = 100;
    let row = Row::new();
    stalled::small_buffers(&row);
    let ground = Ground::with(row, family, &[]);
    let before = facts::sockstat(ground.node());
    let pairs: Vec<_> = (0..COUNT).map(|_| ground.pair()).collect();
    ground.await_switched(COUNT);
    let stalled = Stalled::new(ground.node(), ground.proxy.process(), before, pairs);
    for _ in 0..3 {
        stalled.look();
        std::thread::sleep(Duration::from_secs(1));
    }
    stalled.end();
}

/// What it reads only after it has sent all this.
const ANSWER: u64 = 3_000_000;
const UPLOAD: u64 = 400_000_000;

fn upload_then_read(client: &Peer, server: &Peer) {
    std::thread::scope(|threads| {
        threads.spawn(|| server.send_stream(2, ANSWER));
        both(|| client.send_stream(1, UPLOAD), || server.receive_stream(1, UPLOAD));
        client.receive_stream(2, ANSWER);
    });
}

/// Bytes that the proxy holds at the switch must not keep what goes the other way.
fn a_reader_that_uploads_first(family: Family) {
    let ground = Ground::new(family);
    let (client, server) = ground.pair();
    client.shrink_buffers();
    upload_then_read(&client, &server);
    // Switched or not: as long as the answer is in its hands, the proxy must not leave.
    client.finish();
    server.expect_eof();
    server.finish();
    client.expect_eof();
    let ended = ground.proxy.ended();
    assert_eq!((ended.bytes_up, ended.bytes_down), (UPLOAD, ANSWER));
}

/// The same where nobody holds anything: the rest of the answer waits at the server.
fn a_reader_that_uploads_first_in_the_kernel(family: Family) {
    let ground = Ground::new(family);
    let connection = ground.switched();
    connection.client.shrink_buffers();
    upload_then_read(&connection.client, &connection.server);
    assert_eq!(facts::connections(ground.node()), 0);
    connection.close();
    let ended = ground.proxy.ended();
    assert_eq!(ended.engine.as_deref(), Some("packet"));
    assert_eq!((ended.bytes_up, ended.bytes_down), (UPLOAD, ANSWER));
}

/// What was made small to bring a connection to a quiet moment is as large as ever afterwards, also
/// if there was no such moment.
fn a_reader_that_pauses_has_a_fast_connection_later(family: Family) {
    const MORE: u64 = 50_000_000;
    let ground = Ground::new(family);
    let (front, bound) = (ground.front(), ground.node().run(backlog_bound));
    // At once: it must not be found idle, and switched.
    let (client, sent) = ground.row.client.run(move || {
        let client = Peer::connect(front);
        let sent = client.fill(1, bound);
        (client, sent)
    });
    let server = ground.upstream.accept();
    let labels = [("reason", "busy")];
    until("it was given up", || ground.proxy.metric("packet_ineligible_total", &labels) >= 6.0);
    server.receive_stream(1, sent);
    both(|| client.send_stream(2, MORE), || server.receive_stream(2, MORE));
    let queues = receive_queues(ground.node());
    let usual = ground.node().read("/proc/sys/net/ipv4/tcp_rmem");
    let usual: u64 = usual.split_whitespace().nth(1).expect("three").parse().expect("a number");
    assert!(queues.len() == 2 && queues.iter().all(|size| *size >= usual), "{queues:?}");
}

/// What the sockets of all connections may queue.
fn receive_queues(host: &Host) -> Vec<u64> {
    let text = host.output("ss", &["-tmn"]);
    let sizes = text.match_indices(",rb").map(|(at, name)| &text[at + name.len()..]);
    let digits = |text: &str| text.split(',').next().and_then(|digits| digits.parse().ok());
    sizes.map(|text| digits(text).expect("a size")).collect()
}

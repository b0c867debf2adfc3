//! Readers that do not read, for a while or for good.

use std::time::Duration;

use proxy_tests::netns::Host;
use proxy_tests::peers::{backlog_bound, both, fill_all};
use proxy_tests::row::{Family, Row};
use proxy_tests::wait::until;
use proxy_tests::{facts, maps};

use crate::ground::{Ground, both_families};

both_families!(
    stalled_readers_cost_the_node_nothing,
    a_reader_that_uploads_first,
    a_reader_that_pauses_has_a_fast_connection_later
);

/// What is on its way lies at the two ends, whose buffers are small here, to the byte: the node has
/// nothing, for as long as it lasts. (The machine's memory as a whole shows it only roughly, since
/// others use it as well.)
fn stalled_readers_cost_the_node_nothing(family: Family) {
    const COUNT: u32 = 100;
    const SECONDS: u32 = 10;
    let row = Row::new();
    for host in [&row.client, &row.server] {
        host.sysctl("ipv4.tcp_rmem", "4096 131072 196608");
        host.sysctl("ipv4.tcp_wmem", "4096 16384 196608");
    }
    let ground = Ground::with(row, family, &[]);
    let start = facts::sockstat(ground.node());
    let pairs: Vec<_> = (0..COUNT).map(|_| ground.pair()).collect();
    ground.await_switched(COUNT);
    let process = ground.proxy.process();
    let maps_memory = || maps::of(process).values().sum::<u64>();
    let (memory, maps_before) = (process.private_memory(), maps_memory());
    let available = facts::available_memory();
    let servers: Vec<_> = pairs.iter().map(|(_, server)| server).collect();
    let sent = fill_all(&servers, 1, ground.node().run(backlog_bound));
    assert!(sent.iter().all(|bytes| *bytes > 0 && *bytes < 2 << 20), "{sent:?}");
    for _ in 0..SECONDS {
        // The ends probe each other, so that what they know may be a segment behind for a moment.
        for ((client, server), sent) in pairs.iter().zip(&sent) {
            until("all that was sent lies at the ends", || {
                client.unread() + server.unacknowledged() == *sent
            });
        }
        let stat = facts::sockstat(ground.node());
        assert_eq!(facts::connections(ground.node()), 0);
        assert!(stat.in_use == start.in_use && stat.used <= start.used, "{stat:?}, {start:?}");
        assert!(maps_memory() <= maps_before, "maps grow");
        let grown = process.private_memory().saturating_sub(memory);
        assert!(grown < 4 << 20, "the proxy took {grown} bytes for {COUNT} readers");
        std::thread::sleep(Duration::from_secs(1));
    }
    let less = available.saturating_sub(facts::available_memory());
    println!("{} bytes sent; the machine has {less} less", sent.iter().sum::<u64>());
    // Who reads again gets everything.
    for ((client, server), sent) in pairs.iter().zip(sent) {
        server.finish();
        let got = client.receive_until_end(1);
        assert_eq!(got, (sent, proxy_tests::peers::Ending::Eof));
    }
}

/// Bytes that the proxy holds at the switch must not keep what goes the other way.
fn a_reader_that_uploads_first(family: Family) {
    const ANSWER: u64 = 3_000_000;
    const UPLOAD: u64 = 100_000_000;
    let ground = Ground::new(family);
    let (client, server) = ground.pair();
    client.shrink_buffers();
    std::thread::scope(|threads| {
        threads.spawn(|| server.send_stream(2, ANSWER));
        both(|| client.send_stream(1, UPLOAD), || server.receive_stream(1, UPLOAD));
        client.receive_stream(2, ANSWER);
    });
    // Switched or not: as long as the answer is in its hands, the proxy must not leave.
    client.finish();
    server.expect_eof();
    server.finish();
    client.expect_eof();
    let ended = ground.proxy.ended();
    assert_eq!((ended.bytes_up, ended.bytes_down), (UPLOAD, ANSWER));
}

/// What was made small to bring a connection to a quiet moment is as large as ever afterwards, also
/// if there was no such moment.
fn a_reader_that_pauses_has_a_fast_connection_later(family: Family) {
    const MORE: u64 = 50_000_000;
    let ground = Ground::new(family);
    let (client, server) = ground.pair();
    let sent = client.fill(1, ground.node().run(backlog_bound));
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

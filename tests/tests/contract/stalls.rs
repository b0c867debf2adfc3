//! Readers that do not read: the writer is slowed, memory is bounded, nothing is lost, and
//! nobody else suffers.

use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::peers::{Peer, both, fill_all};
use proxy_tests::process::need_open_files;

use crate::setting::{Setting, Side};

const MIB: u64 = 1 << 20;

pub fn a_stalled_reader_slows_the_writer_and_loses_nothing(at: &Setting) {
    for side in Side::BOTH {
        let (proxy, writer, reader) = at.relayed().seen_from(side);
        writer.shrink_buffers();
        reader.shrink_buffers();
        let sent = writer.fill(1, at.backlog_bound());
        let memory = proxy.process().resident_memory();
        assert!(memory < 64 * MIB, "the proxy's own memory is {memory} bytes");
        // The other way is open all the time.
        both(|| reader.send_stream(2, 3_000_000), || writer.receive_stream(2, 3_000_000));
        reader.receive_stream(1, sent);
        both(|| writer.send_stream(3, 3_000_000), || reader.receive_stream(3, 3_000_000));
        writer.finish();
        reader.expect_eof();
    }
}

pub fn both_directions_stalled_at_once(at: &Setting) {
    let (proxy, client, server) = at.relayed().seen_from(Side::Client);
    let sent = fill_all(&[&client, &server], 1, 2 * at.backlog_bound());
    server.receive_stream(1, sent[0]);
    client.receive_stream(1, sent[1]);
    client.finish();
    server.expect_eof();
    server.finish();
    client.expect_eof();
    let ended = proxy.ended();
    assert_eq!((ended.bytes_up, ended.bytes_down), (sent[0], sent[1]));
}

/// Connections whose reader does not read, the server in one half of them, the client in the
/// other, each filled until nothing moves.
fn stalled<'a>(at: &Setting, pairs: &'a [(Peer, Peer)]) -> Vec<(&'a Peer, u64)> {
    for (client, server) in pairs {
        client.shrink_buffers();
        server.shrink_buffers();
    }
    let ends = |number: usize| {
        let (client, server) = &pairs[number];
        if number.is_multiple_of(2) { (client, server) } else { (server, client) }
    };
    let (writers, readers): (Vec<_>, Vec<_>) = (0..pairs.len()).map(ends).unzip();
    let sent = fill_all(&writers, 1, at.backlog_bound());
    readers.into_iter().zip(sent).collect()
}

pub fn fifty_stalled_connections_cost_no_memory(at: &Setting) {
    let at = at.frugal();
    let (proxy, upstream) = at.start();
    let (client, server) = at.pair(&proxy, &upstream);
    // What the first transfer needs once and for all is not theirs.
    both(|| client.send_stream(2, 5_000_000), || server.receive_stream(2, 5_000_000));
    let before = proxy.process().resident_memory();
    let pairs: Vec<_> = (0..50).map(|_| at.pair(&proxy, &upstream)).collect();
    let stalled = stalled(&at, &pairs);
    let grown = proxy.process().resident_memory().saturating_sub(before);
    assert!(grown < 8 * MIB, "50 stalled connections cost {grown} bytes");
    for (reader, sent) in stalled {
        reader.receive_stream(1, sent);
    }
}

/// More of them than there are pipes, buffers or whatever else an engine shares.
pub fn three_hundred_stalled_connections_do_not_starve_a_healthy_one(at: &Setting) {
    const STALLED: usize = 300;
    let at = at.frugal();
    need_open_files(2 * STALLED as u64 + 200);
    let (proxy, upstream) = at.start();
    let pairs: Vec<_> = (0..STALLED).map(|_| at.pair(&proxy, &upstream)).collect();
    let stalled = stalled(&at, &pairs);
    let (client, server) = at.pair(&proxy, &upstream);
    for round in 0..20 {
        client.send_stream(round, 100);
        server.receive_stream(round, 100);
        server.send_stream(round, 5_000);
        client.receive_stream(round, 5_000);
    }
    both(|| client.send_stream(2, 5_000_000), || server.receive_stream(2, 5_000_000));
    both(|| server.send_stream(3, 5_000_000), || client.receive_stream(3, 5_000_000));
    // Then it is as quiet as the others, and waiting for any of them costs no CPU time.
    let (before, since) = (proxy.process().cpu_ticks(), Instant::now());
    thread::sleep(Duration::from_secs(2));
    let (ticks, wall) = (proxy.process().cpu_ticks() - before, since.elapsed().as_millis() / 10);
    assert!(u128::from(ticks) < wall / 4, "{ticks} ticks of CPU time in {wall} of stalling");
    client.finish();
    server.expect_eof();
    for (reader, sent) in stalled {
        reader.receive_stream(1, sent);
    }
}

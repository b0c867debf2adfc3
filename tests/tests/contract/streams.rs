//! Every byte once and in order, each way.

use std::sync::Barrier;
use std::thread;

use proxy_tests::peers::{Peer, both};
use proxy_tests::process::need_open_files;
use proxy_tests::stream::Dice;

use crate::setting::{Relayed, Setting};

const UP: u64 = 1;
const DOWN: u64 = 2;

/// Lets `send` run at both ends while both receive `len` bytes; then ends both directions and
/// checks what the proxy counted.
fn transfer(at: &Setting, len: u64, send: impl Fn(&Peer, u64, u64) + Sync) {
    let Relayed { proxy, client, server, .. } = at.relayed();
    thread::scope(|threads| {
        threads.spawn(|| send(&client, UP, len));
        threads.spawn(|| send(&server, DOWN, len));
        threads.spawn(|| server.receive_stream(UP, len));
        threads.spawn(|| client.receive_stream(DOWN, len));
    });
    client.finish();
    server.expect_eof();
    server.finish();
    client.expect_eof();
    let ended = proxy.ended();
    assert_eq!((ended.bytes_up, ended.bytes_down), (len, len));
    assert_eq!(ended.reason, "client_closed");
    // A connection may be over, or too busy, before it can be handed to the kernel.
    let fits = at.engine == "packet" && ended.engine.as_deref() == Some("splice");
    assert!(fits || ended.engine.as_deref() == Some(at.engine), "{:?}", ended.engine);
}

pub fn two_hundred_megabytes_each_way_at_once(at: &Setting) {
    transfer(at, 200_000_000, |peer, seed, len| peer.send_stream(seed, len));
}

pub fn writes_of_every_size_both_ways(at: &Setting) {
    transfer(at, 20_000_000, |peer, seed, len| peer.send_in_random_sizes(seed, len));
}

pub fn one_byte_at_a_time_both_ways(at: &Setting) {
    transfer(at, 20_000, |peer, seed, len| peer.send_byte_by_byte(seed, len));
}

pub fn ping_pong(at: &Setting) {
    let Relayed { proxy: _proxy, client, server, .. } = at.relayed();
    client.no_delay();
    server.no_delay();
    let rounds = || {
        let mut dice = Dice::new(3);
        (0..2_000).map(move |round| (round, dice.size(3_000) as u64, dice.size(3_000) as u64))
    };
    both(
        || {
            for (round, request, response) in rounds() {
                client.send_stream(round, request);
                client.receive_stream(!round, response);
            }
        },
        || {
            for (round, request, response) in rounds() {
                server.receive_stream(round, request);
                server.send_stream(!round, response);
            }
        },
    );
}

/// An engine that moves small and large amounts in different ways changes between them here.
pub fn bulk_and_single_bytes_by_turns(at: &Setting) {
    let Relayed { proxy: _proxy, client, server, .. } = at.relayed();
    let turns: u64 = 40;
    let write = |peer: &Peer, seed| {
        for turn in 0..turns {
            peer.send_stream(seed + turn, 700_001);
            peer.send_byte_by_byte(seed + turn, 50);
        }
    };
    let read = |peer: &Peer, seed| {
        for turn in 0..turns {
            peer.receive_stream(seed + turn, 700_001);
            peer.receive_stream(seed + turn, 50);
        }
    };
    thread::scope(|threads| {
        threads.spawn(|| write(&client, 1_000));
        threads.spawn(|| write(&server, 2_000));
        threads.spawn(|| read(&server, 1_000));
        threads.spawn(|| read(&client, 2_000));
    });
}

pub fn a_thousand_connections_at_once(at: &Setting) {
    const CONNECTIONS: usize = 1_000;
    const WORKERS: usize = 4;
    need_open_files(2 * CONNECTIONS as u64 + 200);
    let (proxy, upstream) = at.start();
    let pairs: Vec<_> = (0..CONNECTIONS).map(|_| at.pair(&proxy, &upstream)).collect();
    proxy.await_metric("connections_relaying", &[("engine", at.engine)], CONNECTIONS as f64);
    let all_sent = Barrier::new(WORKERS);
    let exchange = |share: &[(Peer, Peer)], first: u64| {
        let seeds = || share.iter().zip((first..).step_by(2));
        for round in 0..3 {
            for ((client, server), seed) in seeds() {
                client.send_stream(seed, 9_000 + seed * 3 + round);
                server.send_stream(seed + 1, 9_000 + seed + round);
            }
            // Bytes of all connections are under way before anybody reads the first.
            all_sent.wait();
            for ((client, server), seed) in seeds() {
                server.receive_stream(seed, 9_000 + seed * 3 + round);
                client.receive_stream(seed + 1, 9_000 + seed + round);
            }
        }
        share.iter().for_each(|(client, _)| client.finish());
        share.iter().for_each(|(_, server)| server.expect_eof());
    };
    thread::scope(|threads| {
        for (number, share) in pairs.chunks(CONNECTIONS / WORKERS).enumerate() {
            let (exchange, first) = (&exchange, (number * share.len() * 2) as u64);
            threads.spawn(move || exchange(share, first));
        }
    });
    drop(pairs);
    let ended = proxy.access_log(CONNECTIONS);
    assert!(ended.iter().all(|e| e.reason == "client_closed"), "{ended:?}");
    proxy.await_metric("connections_relaying", &[], 0.0);
}

pub fn the_server_speaks_first(at: &Setting) {
    let Relayed { proxy: _proxy, client, server, .. } = at.relayed();
    server.send(b"220 ready");
    client.receive(b"220 ready");
    client.send(b"QUIT");
    server.receive(b"QUIT");
}

//! `kill -9` of a proxy whose programs are not pinned: both ends are told by RST.

use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
use std::thread;
use std::time::Duration;

use proxy_tests::forge::FIN;
use proxy_tests::peers::Ending;
use proxy_tests::row::Family;
use proxy_tests::sniff::Sniffer;
use proxy_tests::stream::Dice;

use crate::ground::{Ground, Traffic, both_families};

both_families!(after_the_switch, around_the_switch);

fn after_the_switch(family: Family) {
    let mut ground = Ground::new(family);
    let connection = ground.switched();
    Traffic::new().pass(&connection, 100_000);
    ground.proxy.kill9();
    // Where the programs are filters (Linux before 6.6), they stay, and the kernel empties their
    // array a moment later: until then they relay.
    for peer in [&connection.client, &connection.server] {
        let (_, error) = peer.send_until_error(1);
        assert!(matches!(error.kind(), ConnectionReset | BrokenPipe), "{error}");
    }
}

/// At any time: before, during and after. Neither end ever takes what it has for the whole.
fn around_the_switch(family: Family) {
    let mut dice = Dice::new(77);
    for round in 0..10 {
        let mut ground = Ground::new(family);
        let (client, server) = ground.pair();
        let moment = Duration::from_micros(dice.roll() % 60_000);
        let wires =
            [(&ground.row.client, ground.row.before), (&ground.row.server, ground.row.behind)];
        let captures = wires.map(|(host, wire)| Sniffer::start(host, &wire.device()));
        thread::scope(|threads| {
            let ends = [(&client, 1, 2), (&server, 2, 1)].map(|(peer, out, back)| {
                let writing = threads.spawn(move || peer.send_until_error(out).1);
                (writing, threads.spawn(move || peer.receive_until_end(back)))
            });
            thread::sleep(moment);
            ground.proxy.kill9();
            for (writing, reading) in ends {
                let error = writing.join().expect("an error").kind();
                let (bytes, ending) = reading.join().expect("an end");
                // The kernel tells of a reset once, here or there; a clean end it never calls so.
                let reset =
                    error == ConnectionReset || (ending == Ending::Reset && error == BrokenPipe);
                assert!(reset, "round {round} ({moment:?}): {error} {ending:?} after {bytes}");
            }
        });
        for capture in captures {
            let ends: Vec<_> =
                capture.stop().into_iter().filter(|seen| seen.flags & FIN != 0).collect();
            assert!(ends.is_empty(), "round {round} ({moment:?}): {ends:?}");
        }
    }
}

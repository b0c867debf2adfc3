//! `kill -9` at any moment around the switch: a stream is whole, or it is cut off by a reset; it
//! never seems whole when it is not, and nothing hangs once the next process is there.

use std::io::ErrorKind;
use std::thread;
use std::time::Duration;

use proxy_tests::peers::Ending;
use proxy_tests::stream::Dice;

use crate::ground::{Ground, Pair, await_relayed_by_kernel};

const ROUNDS: u64 = 8;
const PAIRS: u64 = 8;

/// Bytes each way of the largest stream.
const MOST: usize = 40_000_000;

/// With its programs attached, but not all pins in their places.
pub fn while_it_starts(at: &Ground) {
    at.launch().start().kill9();
    let move_back = format!("cd {}/*/* && mv guard guard-new", at.bpffs().display());
    at.row.node.output("sh", &["-c", &move_back]);
    let proxy = at.launch().start();
    at.switched(&proxy, 1)[0].talk();
}

pub fn at_random(at: &Ground) {
    let seed = std::env::var("TAKEOVER_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("TAKEOVER_SEED={seed}");
    let mut dice = Dice::new(seed);
    let (mut whole, mut cut) = (0, 0);
    let mut proxy = at.launch().start();
    for round in 0..ROUNDS {
        let pairs: Vec<Pair> = (0..PAIRS).map(|_| at.pair()).collect();
        let sizes: Vec<u64> = pairs.iter().map(|_| dice.size(MOST) as u64).collect();
        let ends = thread::scope(|threads| {
            let mut running = Vec::new();
            for (number, (pair, &size)) in pairs.iter().zip(&sizes).enumerate() {
                let (up, down) = (2 * number as u64, 2 * number as u64 + 1);
                for (peer, out, back) in [(&pair.client, up, down), (&pair.server, down, up)] {
                    let writing = threads.spawn(move || peer.try_send_all(out, size));
                    let reading = threads.spawn(move || peer.receive_until_end(back));
                    running.push((size, writing, reading));
                }
            }
            // The switch begins after some 20 ms and takes some.
            thread::sleep(Duration::from_micros(15_000 + dice.roll() % 60_000));
            proxy.kill9();
            proxy = at.launch().start();
            let joined = running.into_iter().map(|(size, writing, reading)| {
                let (written, read) = (writing.join(), reading.join());
                (size, written.expect("writes"), read.expect("an end, and the right bytes"))
            });
            joined.collect::<Vec<_>>()
        });
        for (size, written, (received, ending)) in ends {
            // The kernel tells of a reset once, to the writer or to the reader.
            let told = written.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
            if ending == Ending::Reset || told {
                cut += 1;
            } else {
                assert_eq!(received, size, "round {round}: a clean end before all was there");
                whole += 1;
            }
        }
        drop(pairs);
    }
    println!("{whole} whole, {cut} cut");
    // Nothing is left behind but what has just ended.
    await_relayed_by_kernel(&proxy, 0.0);
    at.switched(&proxy, 1)[0].talk();
}

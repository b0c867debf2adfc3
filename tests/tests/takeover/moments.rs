//! `kill -9` at any moment around the switch: a stream is whole, or it is cut off by a reset; it
//! never seems whole when it is not, and nothing hangs once the next process is there.

use std::thread;
use std::time::Duration;

use proxy_tests::peers::{Ending, Peer};
use proxy_tests::stream::Dice;

use crate::ground::{Ground, Pair, await_relayed_by_kernel};

const ROUNDS: u64 = 16;
const PAIRS: u64 = 8;

/// Bytes each way of the largest stream.
const MOST: usize = 40_000_000;

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
                // A writer that is cut off learns of it here or as a reader.
                threads.spawn(move || pair.client.try_send_all(up, size));
                threads.spawn(move || pair.server.try_send_all(down, size));
                let read = |reader: &'_ Peer, seed| reader.receive_until_end(seed);
                running.push((size, threads.spawn(move || read(&pair.server, up))));
                running.push((size, threads.spawn(move || read(&pair.client, down))));
            }
            // The switch begins after some 20 ms and takes some.
            thread::sleep(Duration::from_micros(15_000 + dice.roll() % 60_000));
            proxy.kill9();
            proxy = at.launch().start();
            let join = |(size, end): (u64, thread::ScopedJoinHandle<'_, _>)| (size, end.join());
            running.into_iter().map(join).collect::<Vec<_>>()
        });
        for (size, end) in ends {
            match end.expect("an end within the bound, and the right bytes until then") {
                (received, Ending::Eof) => {
                    assert_eq!(received, size, "round {round}: a clean end before all was there");
                    whole += 1;
                }
                (_, Ending::Reset) => cut += 1,
            }
        }
        drop(pairs);
    }
    println!("{whole} whole, {cut} cut");
    // Nothing is left behind but what has just ended.
    await_relayed_by_kernel(&proxy, 0.0);
    at.switched(&proxy, 1)[0].talk();
}

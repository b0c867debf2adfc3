//! Streams that never pause: they are brought to a quiet moment all the same.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;

use proxy_tests::peers::Peer;
use proxy_tests::row::Family;
use proxy_tests::stream::Stream;

use crate::ground::{Ground, both_families, send};

both_families!(uploads_under_way, downloads_under_way);

/// At once: they take processor time and buffers from each other.
const STREAMS: u32 = 8;
/// Bytes that a sender writes before it asks whether to go on.
const BLOCK: u64 = 256 * 1024;

fn uploads_under_way(family: Family) {
    under_way(family, |(client, server)| (client, server));
}

fn downloads_under_way(family: Family) {
    under_way(family, |(client, server)| (server, client));
}

type Pair<'a> = (&'a Peer, &'a Peer);

/// `order` says who of client and server sends, and who receives.
fn under_way(family: Family, order: fn(Pair<'_>) -> Pair<'_>) {
    let ground = Ground::new(family);
    let pairs: Vec<_> = (0..STREAMS).map(|_| ground.pair()).collect();
    let is_enough = AtomicBool::new(false);
    std::thread::scope(|threads| {
        for (client, server) in &pairs {
            let (from, to) = order((client, server));
            let (announce, blocks) = channel();
            let is_enough = &is_enough;
            threads.spawn(move || {
                let mut stream = Stream::new(3);
                while !is_enough.load(Ordering::Relaxed) && announce.send(()).is_ok() {
                    send(from, &mut stream, BLOCK);
                }
            });
            threads.spawn(move || {
                let mut stream = Stream::new(3);
                blocks.iter().for_each(|()| to.receive_next(&mut stream, BLOCK));
            });
        }
        // Whatever comes of it, or the senders would go on for ever.
        let waited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            ground.await_switched(STREAMS);
        }));
        is_enough.store(true, Ordering::Relaxed);
        if let Err(panic) = waited {
            std::panic::resume_unwind(panic);
        }
    });
    for (client, server) in pairs {
        client.finish();
        server.expect_eof();
        server.finish();
        client.expect_eof();
        assert_eq!(ground.proxy.ended_of(client.address()).reason, "client_closed");
    }
}

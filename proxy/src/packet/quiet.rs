//! Ends that say nothing: are they still there, and has the connection a limit?
//!
//! A switched connection has no socket of ours that would ask. An end that is gone without a word
//! (its host lost power, its pod was cut off) would keep its record, its port and its place for
//! ever, and NATs and load balancers on the way forget who is silent for some minutes.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use proxy_common::{CLIENT, Half, PHASE_SETTLED, Record, SERVER};
use tokio::time::Instant;

use super::inject::Segment;
use super::record::{is_over, silence};
use super::{Packet, tcp};
use crate::relay::{Reason, Side};

/// So many times what an end may be silent before it is asked, and it counts as gone.
const PATIENCE: u32 = 3;

/// Records between which others get a turn.
const CHUNK: usize = 256;

/// Asks ends that are silent.
pub struct Keepalive {
    /// How long an end may be silent before it is asked.
    after: Duration,
    /// An end that nobody asked, because no process was there or it had no turn, is not gone for
    /// that.
    since_ns: u64,
    looked_ns: u64,
}

impl Keepalive {
    /// `after` is how long an end may be silent before it is asked.
    pub fn new(after: Duration) -> Self {
        let now = tcp::monotonic_ns();
        Self { after, since_ns: now, looked_ns: now }
    }

    /// How often to look.
    pub fn interval(&self) -> Duration {
        self.after / 2
    }

    /// Asks all ends that have been silent for long, and resets connections whose end has not
    /// answered for much longer.
    pub async fn look(&mut self, packet: &Arc<Packet>) {
        // One for all: while this goes through them, it may be stopped as well.
        let now = tcp::monotonic_ns();
        let lapse = Duration::from_nanos(now.saturating_sub(self.looked_ns));
        self.looked_ns = now;
        if lapse >= self.after {
            self.since_ns = now;
        }
        for chunk in packet.table().in_use().chunks(CHUNK) {
            for slot in chunk {
                let record = packet.table().read(*slot);
                let Some(record) = record.filter(is_living) else { continue };
                for side in [Side::Client, Side::Server] {
                    let (half, other) = halves(&record, side);
                    let seen =
                        Duration::from_nanos(now.saturating_sub(half.seen_ns.max(self.since_ns)));
                    if seen >= self.after * PATIENCE {
                        packet.kill(*slot, Reason::TimedOut(side).as_label());
                        break;
                    }
                    if seen >= self.after {
                        // One that cannot be reached counts as gone soon.
                        let _ = packet.injector.probe(&question(half, other));
                    }
                }
            }
            tokio::task::yield_now().await;
        }
    }
}

/// A byte that the end has had long ago, as from the other end: it answers with where it is.
fn question(half: &Half, other: &Half) -> Segment {
    // As the other end would announce it: conntrack on the way believes it.
    let window = (u32::from(other.window) << other.shift()) >> half.our_shift();
    Segment {
        source: half.local.into(),
        destination: half.remote.into(),
        sequence: half.acked.wrapping_sub(1),
        acknowledgement: other.acked.wrapping_sub(half.seq_add),
        window: u16::try_from(window).unwrap_or(u16::MAX),
        timestamps: None,
    }
}

fn halves(record: &Record, side: Side) -> (&Half, &Half) {
    let [client, server] = [&record.halves[CLIENT], &record.halves[SERVER]];
    match side {
        Side::Client => (client, server),
        Side::Server => (server, client),
    }
}

fn is_living(record: &Record) -> bool {
    record.phase == PHASE_SETTLED && record.halves[CLIENT].told == 0 && !is_over(record)
}

/// `--idle-timeout`: no byte, whatever else passes.
pub struct Idle {
    timeout: Duration,
    /// By slot: the generation, all bytes, and since when they are so many.
    known: HashMap<u32, (u32, u64, Instant)>,
}

impl Idle {
    /// For connections that may be without a byte for so long.
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, known: HashMap::new() }
    }

    /// How often to look.
    pub fn interval(&self) -> Duration {
        (self.timeout / 4).max(Duration::from_millis(50))
    }

    /// Resets what has been without a byte for too long.
    pub fn look(&mut self, packet: &Arc<Packet>) {
        let mut known = HashMap::new();
        for slot in packet.table().in_use() {
            let record = packet.table().read(slot);
            let Some(record) = record.filter(is_living) else { continue };
            let bytes = record.halves[CLIENT].bytes.wrapping_add(record.halves[SERVER].bytes);
            let since = match self.known.get(&slot.index) {
                Some(&(generation, before, since))
                    if generation == slot.generation && before == bytes =>
                {
                    since
                }
                // There was no byte since the last segment, at least.
                _ => Instant::now().checked_sub(silence(&record)).unwrap_or_else(Instant::now),
            };
            if since.elapsed() >= self.timeout {
                packet.kill(slot, Reason::Idle.as_label());
            } else {
                known.insert(slot.index, (slot.generation, bytes, since));
            }
        }
        self.known = known;
    }
}

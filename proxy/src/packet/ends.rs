//! What happens to switched connections after the switch: their ends, segments that are too large,
//! changes of devices and routes.
//!
//! Hardly anything here runs while nothing happens: the programs tell of ends through a ring buffer,
//! the kernel tells of devices and routes, and timers exist only for connections that are closing,
//! beside one slow one ([`quiet`](super::quiet)).

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use proxy_common::{
    CLIENT, Counter, EVENT_CLOSED, EVENT_LEFT, EVENT_RESET, EVENT_STRAY, EVENT_TOO_BIG, Event,
    Half, MARK_FIN, PHASE_SETTLED, Record, SERVER,
};
use tokio::time::{Instant, interval, sleep_until};

use super::inject::TooBig;
use super::object::next_event;
use super::quiet::{Idle, Keepalive};
use super::record::{ending, first_to_close, is_over, silence};
use super::table::Slot;
use super::{News, Packet};
use crate::relay::{Reason, Side};

/// How long the tuples of a closed connection stay ours after its last segment: a lost last
/// acknowledgement makes the other end send its FIN again (TIME_WAIT, RFC 9293; Linux: 60 s).
const AFTER_CLOSE: Duration = Duration::from_secs(60);

/// How long after a RST: the other end may not have taken it, and go on.
const AFTER_RESET: Duration = Duration::from_secs(3);

/// How long both ends may keep silent after both have said that this is all. One that is there repeats
/// that every two minutes at least, until it is acknowledged or given up (Linux: TCP_RTO_MAX); one that
/// is gone (a pod and its device, say) never acknowledges anything, and nobody would tell of it.
const ABANDONED: Duration = Duration::from_secs(300);

/// When to look again at a connection that has ended before its switch was done.
const SOON: Duration = Duration::from_millis(100);

/// A connection that has ended, or seems to have.
struct Closing {
    slot: Slot,
    due: Instant,
    kind: Kind,
    /// The access log knows.
    is_told: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Both FINs are acknowledged.
    Closed,
    /// A RST of this side was passed on.
    Reset(Side),
    /// One FIN is acknowledged. It may stay like this for as long as the ends want, unless both
    /// have sent one: see [`ABANDONED`].
    Half,
}

/// All of them, in the order in which they are due: there may be tens of thousands at once.
#[derive(Default)]
struct Closings {
    by_slot: HashMap<u32, Closing>,
    by_due: BTreeSet<(Instant, u32)>,
}

impl Closings {
    /// The one with this very use of the slot.
    fn get(&self, slot: Slot) -> Option<&Closing> {
        self.by_slot.get(&slot.index).filter(|closing| closing.slot == slot)
    }

    /// Instead of what was known of its slot.
    fn insert(&mut self, closing: Closing) {
        self.remove(closing.slot.index);
        self.by_due.insert((closing.due, closing.slot.index));
        self.by_slot.insert(closing.slot.index, closing);
    }

    fn remove(&mut self, index: u32) -> Option<Closing> {
        let closing = self.by_slot.remove(&index)?;
        self.by_due.remove(&(closing.due, index));
        if self.by_slot.is_empty() {
            // It never gives memory back by itself.
            self.by_slot = HashMap::new();
        }
        Some(closing)
    }

    /// When the next one is due.
    fn next_due(&self) -> Option<Instant> {
        self.by_due.first().map(|(due, _)| *due)
    }

    /// Takes out what is due.
    fn take_due(&mut self, now: Instant) -> Vec<Closing> {
        let due = self.by_due.iter().take_while(|(due, _)| *due <= now);
        let due: Vec<u32> = due.map(|(_, index)| *index).collect();
        due.into_iter().filter_map(|index| self.remove(index)).collect()
    }
}

/// Runs until the process ends.
pub async fn run(packet: Arc<Packet>, news: News, idle_timeout: Option<Duration>) {
    let mut keepalive = packet.keepalive().map(Keepalive::new);
    let mut asking = keepalive.as_ref().map(|keepalive| interval(keepalive.interval()));
    let mut idle = idle_timeout.map(Idle::new);
    let mut idling = idle.as_ref().map(|idle| interval(idle.interval()));
    let News { mut events, mut watch } = news;
    let mut closing = Closings::default();
    look_through(&packet, &mut closing);
    let mut lost = packet.count(Counter::EventLost);
    loop {
        let next = closing.next_due();
        tokio::select! {
            ready = events.readable_mut() => {
                let Ok(mut ready) = ready else { return };
                let Some(_turn) = packet.turn() else { return };
                while let Some(event) = next_event(ready.get_inner_mut()) {
                    handle(&packet, &mut closing, event);
                }
                ready.clear_ready();
                let lost_by_now = packet.count(Counter::EventLost);
                if lost_by_now != lost {
                    lost = lost_by_now;
                    look_through(&packet, &mut closing);
                }
            }
            () = packet.left() => return,
            changed = watch.changed() => {
                if changed.is_err() {
                    // Without word of changes, connections must not depend on noticing them.
                    tracing::warn!("the kernel tells no more of devices and routes");
                    return;
                }
                let Some(_turn) = packet.turn() else { return };
                packet.refresh();
            }
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                let Some(_turn) = packet.turn() else { return };
                sweep(&packet, &mut closing);
            }
            () = tick(&mut asking) => {
                let Some(_turn) = packet.turn() else { return };
                if let Some(keepalive) = &mut keepalive {
                    keepalive.look(&packet).await;
                }
            }
            () = tick(&mut idling) => {
                let Some(_turn) = packet.turn() else { return };
                if let Some(idle) = &mut idle {
                    idle.look(&packet);
                }
            }
        }
    }
}

/// Never, without an interval.
async fn tick(interval: &mut Option<tokio::time::Interval>) {
    match interval {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}

fn handle(packet: &Arc<Packet>, closing: &mut Closings, event: Event) {
    let slot = Slot { index: event.slot, generation: event.generation };
    let Some(record) = packet.table().read(slot) else { return };
    let side = if usize::from(event.side) == CLIENT { Side::Client } else { Side::Server };
    match event.kind {
        EVENT_TOO_BIG => tell_too_big(packet, &record, &event),
        // One end's FIN; the other's event comes with its own.
        EVENT_CLOSED if !is_over(&record) => {
            let due = Instant::now() + ABANDONED;
            if closing.get(slot).is_none() {
                closing.insert(Closing { slot, due, kind: Kind::Half, is_told: false });
            }
        }
        EVENT_CLOSED => {
            let due = Instant::now() + AFTER_CLOSE;
            let ended = Closing { slot, due, kind: Kind::Closed, is_told: false };
            if closing.get(slot).is_none_or(|known| known.kind != Kind::Closed) {
                closing.insert(tell(packet, ended, &record));
            }
        }
        EVENT_RESET => {
            let due = Instant::now() + AFTER_RESET;
            let kind = Kind::Reset(side);
            if closing.get(slot).is_none_or(|known| known.kind == Kind::Half) {
                closing.insert(Closing { slot, due, kind, is_told: false });
            }
        }
        EVENT_LEFT => {
            // The client is sure that it is over; nobody else will miss it.
            let known = closing.remove(slot.index).filter(|known| known.slot == slot);
            if known.is_none_or(|known| !known.is_told) {
                packet.tell_end(slot, &record, ending(&record).as_label());
            }
            packet.retire(slot, &record);
        }
        EVENT_STRAY => packet.refresh(),
        _ => {}
    }
}

/// Finds ends in the records themselves: those of which nobody was told, since no process lived or
/// the programs had no room.
fn look_through(packet: &Arc<Packet>, closing: &mut Closings) {
    for slot in packet.table().in_use() {
        let Some(record) = packet.table().read(slot) else { continue };
        let reset = |side: usize| record.halves[side].reset != 0;
        let (kind, wait) = if is_over(&record) {
            (Kind::Closed, AFTER_CLOSE)
        } else if reset(CLIENT) {
            (Kind::Reset(Side::Client), AFTER_RESET)
        } else if reset(SERVER) {
            (Kind::Reset(Side::Server), AFTER_RESET)
        } else if record.halves.iter().any(|half| half.acked_fin != 0) {
            (Kind::Half, ABANDONED)
        } else {
            continue;
        };
        if closing.get(slot).is_some_and(|known| known.kind != Kind::Half || kind == Kind::Half) {
            continue;
        }
        let due = Instant::now() + wait.saturating_sub(silence(&record));
        let is_told = record.halves[CLIENT].told != 0;
        let mut ended = Closing { slot, due, kind, is_told };
        if !is_told && kind == Kind::Closed {
            ended = tell(packet, ended, &record);
        }
        closing.insert(ended);
    }
}

/// Tells the access log. As long as the switch is not done the connection may still end there, so
/// that comes first; then this looks again soon.
fn tell(packet: &Packet, mut closing: Closing, record: &Record) -> Closing {
    if record.phase == PHASE_SETTLED {
        let reason = match closing.kind {
            Kind::Closed | Kind::Half => Reason::Closed(first_to_close(record)),
            Kind::Reset(side) => Reason::Reset(side),
        };
        packet.tell_end(closing.slot, record, reason.as_label());
        closing.is_told = true;
    } else {
        closing.due = Instant::now() + SOON;
    }
    closing
}

/// When to look again at a connection of which one FIN is acknowledged; `None` if it is over.
fn left_to_half_closed(record: &Record, silent: Duration) -> Option<Duration> {
    let has_ended = |half: &Half| half.marks & MARK_FIN != 0 || half.early_fin != 0;
    if is_over(record) {
        None
    } else if record.halves.iter().all(has_ended) {
        Some(ABANDONED.saturating_sub(silent)).filter(|left| !left.is_zero())
    } else {
        Some(ABANDONED)
    }
}

/// Ends what is due, unless it has come back to life.
fn sweep(packet: &Arc<Packet>, closing: &mut Closings) {
    let now = Instant::now();
    for mut ended in closing.take_due(now) {
        // Absent: killed meanwhile, or the switch did not succeed.
        let Some(record) = packet.table().read(ended.slot) else { continue };
        if ended.kind == Kind::Half
            && let Some(left) = left_to_half_closed(&record, silence(&record))
        {
            closing.insert(Closing { due: now + left, ..ended });
            continue;
        }
        if let Kind::Reset(side) = ended.kind {
            let half = &record.halves[if side == Side::Client { CLIENT } else { SERVER }];
            if half.reset == 0 {
                // Not genuine: its sender went on.
                continue;
            }
        }
        if !ended.is_told {
            ended = tell(packet, ended, &record);
        }
        let silent = silence(&record);
        if !ended.is_told {
            closing.insert(ended);
        } else if matches!(ended.kind, Kind::Closed | Kind::Half) && silent < AFTER_CLOSE {
            // The wait begins anew with each segment.
            let due = now + (AFTER_CLOSE - silent);
            closing.insert(Closing { due, kind: Kind::Closed, ..ended });
        } else {
            packet.retire(ended.slot, &record);
        }
    }
}

/// Tells the sender of a segment that was too large, as a router would: from our address, which is
/// the only one that it knows on this way.
fn tell_too_big(packet: &Packet, record: &Record, event: &Event) {
    let half = &record.halves[usize::from(event.side) & 1];
    let (sender, us): (SocketAddr, SocketAddr) = (half.remote.into(), half.local.into());
    let original = TooBig {
        source: sender,
        destination: us,
        sequence: event.sequence,
        length: u32::from(half.mtu).max(event.mtu),
    };
    let _ = packet.injector.too_big(us.ip(), sender, &original, event.mtu);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_closed_connections_live_until_both_have_ended_and_are_gone() {
        let long = ABANDONED * 100;
        let mut record = Record::default();
        record.halves[CLIENT].marks = MARK_FIN;
        record.halves[SERVER].acked_fin = 1;
        assert_eq!(left_to_half_closed(&record, long), Some(ABANDONED), "one may listen for ever");
        for early in [false, true] {
            record.halves[SERVER].marks = if early { 0 } else { MARK_FIN };
            record.halves[SERVER].early_fin = u8::from(early);
            let second = Duration::from_secs(1);
            assert_eq!(left_to_half_closed(&record, ABANDONED - second), Some(second));
            assert_eq!(left_to_half_closed(&record, ABANDONED), None);
        }
        record.halves[CLIENT].acked_fin = 1;
        assert_eq!(left_to_half_closed(&record, Duration::ZERO), None);
    }
}

//! From a tuple to the record of its connection, for every program that meets a segment of one,
//! and word of what happens there to the loader.

use proxy_common::{CLIENT, Counter, Event, FlowRef, MARK_LEFT, PHASE_LIVE, Record, SERVER, Tuple};

use crate::{EVENTS, FLOWS, OWN_PORTS, RECORDS, count};

/// Where the tuple of a segment leads; false if nowhere.
///
/// No two connections have one local port towards servers, so there the port alone leads to the
/// record, which has the rest of the tuple.
#[inline(never)]
pub fn find(tuple: &Tuple, flow: &mut FlowRef) -> bool {
    if let Some(own) = OWN_PORTS.get(u32::from(tuple.destination.port))
        && own.tag != 0
        && let Some(record) = RECORDS.get_ptr_mut(own.slot)
    {
        // SAFETY: the loader writes a record's constants only while nobody can find it.
        let server = unsafe { &(*record).halves[SERVER] };
        if server.remote == tuple.source && server.local == tuple.destination {
            *flow = *own;
            return true;
        }
    }
    // SAFETY: entries are inserted and deleted, never replaced; the reference is checked against
    // the record's generation before anything is done with it.
    match unsafe { FLOWS.get(tuple) } {
        Some(found) => {
            *flow = *found;
            true
        }
        None => false,
    }
}

/// Whether segments of the connection are ours to send on.
#[inline(always)]
pub fn is_live(record: *mut Record, flow: FlowRef) -> bool {
    // SAFETY: plain reads of aligned words that the loader may be writing.
    let (phase, generation, marks) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*record).phase),
            core::ptr::read_volatile(&raw const (*record).generation),
            core::ptr::read_volatile(&raw const (*record).halves[CLIENT].marks),
        )
    };
    phase >= PHASE_LIVE
        && flow.is_of(generation)
        && flow.tag & FlowRef::GUARD_ONLY == 0
        && marks & MARK_LEFT == 0
}

/// Tells the loader. Without room the loader finds out when it next looks through the records.
#[inline(always)]
pub fn tell(
    record: *mut Record,
    flow: FlowRef,
    kind: u8,
    side: usize,
    (sequence, mtu): (u32, u32),
) {
    let event = Event {
        slot: flow.slot,
        // SAFETY: as in is_live.
        generation: unsafe { core::ptr::read_volatile(&raw const (*record).generation) },
        sequence,
        mtu,
        kind,
        side: side as u8,
        padding: [0; 2],
    };
    if EVENTS.output::<Event>(event, 0).is_err() {
        count(Counter::EventLost);
    }
}

//! The way of a segment of a switched connection: past what must not go on, to the other end.
//!
//! Byte k of one end's stream is byte k plus a constant of the connection to the other end, so a
//! segment needs new addresses, ports, numbers, timestamps and a window in the right scale. Both
//! ends then have one TCP conversation with each other, and all that TCP guarantees.
//!
//! No packet is trusted by itself: RST, SYN and FIN are only passed on, and what is remembered of a
//! segment is remembered only if its numbers lie where the two ends are.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC};
use aya_ebpf::helpers::bpf_redirect_neigh;
use proxy_common::{
    CLIENT, Counter, EVENT_LEFT, EVENT_TOO_BIG, FlowRef, Half, MARK_LEFT, PHASE_SETTLED, Record,
    SERVER, flags,
};

use crate::flows::{is_live, tell};
use crate::follow::follow;
use crate::handshake;
use crate::headers::{JUMBO_HEADER, Segment, TCP_HEADER};
use crate::rewrite::rewrite;
use crate::{RECORDS, TC_ACT_SHOT, count, duty};

const PACKET_HOST: u32 = 0;

/// The verdict on a segment whose tuple is known.
#[inline(never)]
pub fn forward(skb: *mut __sk_buff, segment: &Segment, slot: u32, tag: u32) -> i32 {
    let flow = FlowRef { slot, tag };
    let Some(record) = RECORDS.get_ptr_mut(slot) else {
        return TC_ACT_UNSPEC;
    };
    if !is_live(record, flow) {
        return TC_ACT_UNSPEC;
    }
    let side = flow.side();
    // SAFETY: the index is 0 or 1. The loader writes a record's constants only while nobody can
    // find it, and reuses it only after every program that did find it has ended.
    let (half, other) = unsafe {
        let halves = (&raw mut (*record).halves).cast::<Half>();
        (&mut *halves.add(side), &mut *halves.add(side ^ 1))
    };
    // SAFETY: the context is the kernel's, alive for the whole run of the program.
    let buffer = unsafe { &mut *skb };
    // The entry may have been given to another connection while it was being read.
    if half.remote != segment.tuple.source || half.local != segment.tuple.destination {
        return TC_ACT_UNSPEC;
    }
    let device = buffer.ifindex;
    if buffer.vlan_present != 0 {
        // Not for this device, but for a VLAN device on it, where it will come by again.
        return TC_ACT_UNSPEC;
    }
    if buffer.pkt_type != PACKET_HOST || (device != half.in_ifindex && device != half.out_ifindex) {
        count(Counter::Misplaced);
        return TC_ACT_UNSPEC;
    }
    if buffer.mark == duty::COPY {
        return if half.duty != 0 { duty::localize(skb, segment, half) } else { TC_ACT_SHOT };
    }
    if is_too_big(skb, segment, other.mtu) {
        count(Counter::TooBig);
        tell(record, flow, EVENT_TOO_BIG, side, (segment.sequence, other.mtu.into()));
        return TC_ACT_SHOT;
    }
    if segment.hops <= 1 {
        return TC_ACT_SHOT;
    }
    if is_farewell(segment, record, side as u32) != 0 {
        tell(record, flow, EVENT_LEFT, side, (0, 0));
        return TC_ACT_UNSPEC;
    }
    if half.duty != 0 {
        duty::copy(skb, segment, other);
    }
    let news = follow(segment, half, other);
    if news != 0 {
        tell(record, flow, news, side, (0, 0));
    }
    if rewrite(skb, segment, half, other) != 0 {
        count(Counter::Unfit);
        return TC_ACT_SHOT;
    }
    // SAFETY: no preconditions; without parameters the kernel asks the routing table for the next
    // hop on that device, so a new gateway is noticed at once.
    unsafe { bpf_redirect_neigh(other.out_ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Whether this is the client's first segment of a new connection, after the end of this one: it
/// goes to a server that we choose, so from here on the tuple is the stack's. (A function of its
/// own that returns a number: what the verifier learns in it does not double the paths behind it.)
#[inline(never)]
fn is_farewell(segment: &Segment, record: *mut Record, side: u32) -> u8 {
    if segment.flags & handshake::KIND != flags::SYN || side != CLIENT as u32 {
        return 0;
    }
    // SAFETY: as in flows::is_live.
    let (phase, client, server) = unsafe {
        let halves = (&raw mut (*record).halves).cast::<Half>();
        (core::ptr::read_volatile(&raw const (*record).phase), &mut *halves, &*halves.add(SERVER))
    };
    let is_reset = client.reset | server.reset != 0;
    if phase != PHASE_SETTLED || (!is_reset && (client.acked_fin == 0 || server.acked_fin == 0)) {
        return 0;
    }
    client.marks |= MARK_LEFT;
    1
}

/// Whether the segment, or what it will be cut into, exceeds what the device takes.
#[inline(always)]
fn is_too_big(skb: *mut __sk_buff, segment: &Segment, mtu: u16) -> bool {
    // SAFETY: as in forward.
    let piece = unsafe { (*skb).gso_size };
    let length = if piece == 0 {
        segment.length
    } else {
        // What tells the length is left out of what it is cut into.
        let jumbo = if segment.tcp == JUMBO_HEADER as u32 { 8 } else { 0 };
        segment.tcp - jumbo + TCP_HEADER as u32 + segment.options + piece
    };
    mtu != 0 && length > u32::from(mtu)
}

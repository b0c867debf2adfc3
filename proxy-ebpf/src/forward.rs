//! Rewrites the segments of switched connections and sends them on to the other end.
//!
//! Byte k of one end's stream is byte k plus a constant of the connection to the other end, so a
//! segment needs new addresses, ports, numbers, timestamps and a window in the right scale. Both
//! ends then have one TCP conversation with each other, and all that TCP guarantees.
//!
//! No packet is trusted by itself: RST, SYN and FIN are only passed on, and what is remembered of a
//! segment is remembered only if its numbers lie where the two ends are.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::{
    bpf_clone_redirect, bpf_csum_diff, bpf_csum_update, bpf_ktime_get_ns, bpf_l3_csum_replace,
    bpf_l4_csum_replace, bpf_redirect_neigh, bpf_skb_change_tail, bpf_skb_store_bytes,
};
use proxy_common::{
    CLIENT, Counter, EVENT_CLOSED, EVENT_LEFT, EVENT_RESET, EVENT_TOO_BIG, Event, FlowRef,
    HOOK_INGRESS, Half, MARK_FIN, MARK_FIRST, MARK_LEFT, OptionsBuffer, PHASE_LIVE, PHASE_SETTLED,
    Record, SERVER, Tuple, flags,
};

use crate::handshake;
use crate::headers::{self, IPV4_HEADER, IPV6_HEADER, JUMBO_HEADER, Segment, TCP_HEADER};
use crate::{EVENTS, FLOWS, OWN_PORTS, RECORDS, SCRATCH, Scratch, count};

/// Ethernet's header. Devices without one are not fit for switched connections.
const LINK: u32 = 14;
/// On a copy of a segment that is on its way to our own socket; "stcp".
const COPY: u32 = 0x7374_6370;
/// The flags that pass: not the reserved ones, nor Accurate ECN's, which is never agreed here.
const PASSING: u16 = 0x00ff;
/// A segment cannot lie further ahead than the receiver's window, which may have been larger a
/// moment ago.
const SLACK: u32 = 256 * 1024;

const TC_ACT_SHOT: i32 = aya_ebpf::bindings::TC_ACT_SHOT as i32;
const PACKET_HOST: u32 = 0;
/// Bytes of options where there are only timestamps, after two that mean nothing: what every stack
/// sends that is known (RFC 7323, appendix A).
const TIMESTAMPS_ALONE: u32 = 12;
/// The first four of them.
const BEFORE_TIMESTAMPS: u32 = u32::from_ne_bytes([1, 1, OPTION_TIMESTAMPS, 10]);
/// Not 0 for done nor 1 for failed.
const UNUSUAL: u8 = 2;
/// The IP headers, in words of four bytes.
const IPV4_WORDS: usize = IPV4_HEADER / 4;
const IPV6_WORDS: usize = IPV6_HEADER / 4;
const JUMBO_WORDS: usize = JUMBO_HEADER / 4;
const OPTION_NOP: u8 = 1;
const OPTION_SACK: u8 = 5;
const OPTION_TIMESTAMPS: u8 = 8;

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
    if buffer.mark == COPY {
        return if half.duty != 0 { localize(skb, segment, half) } else { TC_ACT_SHOT };
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
    // (A large packet's copy could not be made a small one: its headers say that it is large.)
    if half.duty != 0
        && segment.flags & (flags::SYN | flags::RST | flags::ACK) == flags::ACK
        && segment.tcp != JUMBO_HEADER as u32
    {
        let mark = buffer.mark;
        buffer.mark = COPY;
        // SAFETY: no preconditions. If it fails, our socket misses one acknowledgement.
        let _ = unsafe { bpf_clone_redirect(skb, device, BPF_F_INGRESS.into()) };
        buffer.mark = mark;
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

/// A segment of our own socket, on its way to an end: acknowledges what the other end has
/// acknowledged since, in whose place it speaks. Left as it was, it would be refused once that lies
/// more than a window ahead (RFC 5961, section 5.2), and bytes sent again would never arrive.
#[inline(never)]
pub fn speak_for(skb: *mut __sk_buff, segment: &Segment) -> u8 {
    let arriving = Tuple { source: segment.tuple.destination, destination: segment.tuple.source };
    let mut flow = FlowRef::default();
    if !find(&arriving, &mut flow) {
        return 0;
    }
    let Some(record) = RECORDS.get_ptr_mut(flow.slot) else {
        return 0;
    };
    if !is_live(record, flow)
        || segment.flags & (flags::SYN | flags::RST | flags::ACK) != flags::ACK
    {
        return 0;
    }
    // SAFETY: as in forward.
    let (half, other) = unsafe {
        let halves = (&raw const (*record).halves).cast::<Half>();
        (&*halves.add(flow.side()), &*halves.add(flow.side() ^ 1))
    };
    if half.remote != arriving.source || half.local != arriving.destination {
        return 0;
    }
    let acknowledged = other.acked.wrapping_sub(half.seq_add);
    if !is_before(segment.acknowledgement, acknowledged) {
        return 0;
    }
    let Some(old) = headers::load::<16>(skb, segment.tcp) else {
        return 1;
    };
    let mut new = old;
    let window = scale(u32::from(other.window) << other.shift(), half.our_shift());
    new[8..12].copy_from_slice(&acknowledged.to_be_bytes());
    new[14..16].copy_from_slice(&window.to_be_bytes());
    if !store(skb, LINK + segment.tcp, &new, 0) {
        return 1;
    }
    adjust(skb, segment.tcp, difference(&old, &new), 0)
}

/// A window in the scale of who announces it; never closed by rounding, which might be for good.
#[inline(always)]
fn scale(window: u32, shift: u8) -> u16 {
    let scaled = window >> (shift & 15);
    if scaled > 65535 {
        65535
    } else if scaled == 0 && window != 0 {
        1
    } else {
        scaled as u16
    }
}

/// Whether this is the client's first segment of a new connection, after the end of this one: it
/// goes to a server that we choose, so from here on the tuple is the stack's. (A function of its
/// own that returns a number: what the verifier learns in it does not double the paths behind it.)
#[inline(never)]
fn is_farewell(segment: &Segment, record: *mut Record, side: u32) -> u8 {
    if segment.flags & handshake::KIND != flags::SYN || side != CLIENT as u32 {
        return 0;
    }
    // SAFETY: as in is_live.
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

/// Bytes of payload.
#[inline(always)]
fn payload(segment: &Segment) -> u32 {
    segment.length.saturating_sub(segment.tcp + TCP_HEADER as u32 + segment.options)
}

#[inline(always)]
pub fn is_before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// Remembers what the segment tells of the connection; returns the event it amounts to, or 0.
#[inline(never)]
fn follow(segment: &Segment, half: &mut Half, other: &mut Half) -> u8 {
    half.packets = half.packets.wrapping_add(1);
    let fin = u32::from(segment.flags & flags::FIN != 0);
    let end = segment.sequence.wrapping_add(payload(segment)).wrapping_add(fin);
    if segment.flags & flags::RST != 0 {
        // Not a sign of life: a host that has forgotten the connection answers so for ever.
        return reset(segment, half, other);
    }
    // SAFETY: no preconditions.
    half.seen_ns = unsafe { bpf_ktime_get_ns() };
    if segment.flags & (flags::SYN | flags::ACK) != flags::ACK {
        return 0;
    }
    // What the other end has room for, in this end's numbers.
    let room = (u32::from(other.window) << other.shift()).wrapping_add(SLACK);
    let ahead = end.wrapping_sub(half.sent);
    let is_plausible = ahead.wrapping_add(room) <= room.wrapping_mul(2);
    let acknowledged = segment.acknowledgement.wrapping_sub(other.seq_add);
    // As RFC 5961, section 5.2: who guesses must guess two numbers.
    let window = (u32::from(half.window) << half.shift()).wrapping_add(SLACK);
    // Bytes that came by way of our sockets during the switch are not in `sent` yet.
    if !is_plausible
        || is_before(other.sent.wrapping_add(SLACK), acknowledged)
        || is_before(segment.acknowledgement, half.acked.wrapping_sub(window))
    {
        return 0;
    }
    if half.reset != 0 {
        // It went on.
        half.reset = 0;
    }
    let mut marks = half.marks;
    half.window = segment.window;
    let has_fin = marks & MARK_FIN != 0;
    let new_fin = fin != 0 && !has_fin && half.early_fin == 0 && !is_before(end, half.sent);
    if has_fin && is_before(half.fin, end) {
        // It was not the end: somebody else had guessed its number.
        marks &= !(MARK_FIN | MARK_FIRST);
    }
    // Without branches, each of which doubles what the verifier has to walk through.
    let step = ahead & !((ahead as i32 >> 31) as u32);
    let sent = half.sent.wrapping_add(step);
    half.sent = sent;
    // From the number and not by adding what is new: segments of one direction may be in the hands
    // of two CPUs at once. FIN has a number but is no byte; what follows it may come before it.
    let ends = u32::from(new_fin) | u32::from(marks & MARK_FIN) | u32::from(half.early_fin & 1);
    let bytes = half.bytes;
    let more = sent.wrapping_sub(half.first).wrapping_sub(ends).wrapping_sub(bytes as u32);
    half.bytes = bytes.wrapping_add(i64::from(more as i32) as u64);
    if is_before(half.acked, segment.acknowledgement) {
        half.acked = segment.acknowledgement;
    }
    if new_fin {
        half.fin = end;
        marks |= if other.marks & MARK_FIN == 0 && other.early_fin == 0 {
            MARK_FIN | MARK_FIRST
        } else {
            MARK_FIN
        };
    }
    let has_ended = other.marks & MARK_FIN != 0 || other.early_fin != 0;
    let is_acknowledged = has_ended && !is_before(acknowledged, other.fin);
    let is_news = is_acknowledged && half.acked_fin == 0;
    if is_news {
        half.acked_fin = 1;
    } else if !has_ended && half.acked_fin != 0 {
        half.acked_fin = 0;
    }
    // Only segments of this end write this half, and of those only FIN and what takes it back.
    if half.marks != marks {
        half.marks = marks;
    }
    // Told for either end: the loader looks whether it is both. (Here two CPUs might each miss what
    // the other is just writing.)
    if is_news { EVENT_CLOSED } else { 0 }
}

/// A RST counts if the other end can take it for genuine: its number is one that this end is at.
#[inline(always)]
fn reset(segment: &Segment, half: &mut Half, other: &Half) -> u8 {
    let expected = other.acked.wrapping_sub(half.seq_add);
    let is_genuine =
        !is_before(segment.sequence, expected) && !is_before(half.sent, segment.sequence);
    if !is_genuine || half.reset != 0 {
        return 0;
    }
    half.reset = 1;
    EVENT_RESET
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

/// Gives the segment the addresses and numbers that it has on the other connection; 0 if all of it
/// was possible.
#[inline(never)]
fn rewrite(skb: *mut __sk_buff, segment: &Segment, half: &mut Half, other: &Half) -> u8 {
    let is_four = segment.family == 4;
    if is_four && segment.tcp != IPV4_HEADER as u32 {
        // Options that the sender addressed to this hop, not to the next.
        return 1;
    }
    let is_jumbo = segment.tcp == JUMBO_HEADER as u32;
    if segment.options == TIMESTAMPS_ALONE {
        let outcome = if is_four {
            write_headers::<IPV4_WORDS, 13>(skb, segment, half, other)
        } else if is_jumbo {
            write_headers::<JUMBO_WORDS, 20>(skb, segment, half, other)
        } else {
            write_headers::<IPV6_WORDS, 18>(skb, segment, half, other)
        };
        if outcome != UNUSUAL {
            return outcome;
        }
    }
    if segment.options > 0 && rewrite_options(skb, segment, half, other) != 0 {
        return 1;
    }
    if is_four {
        write_headers::<IPV4_WORDS, 10>(skb, segment, half, other)
    } else if is_jumbo {
        write_headers::<JUMBO_WORDS, 17>(skb, segment, half, other)
    } else {
        write_headers::<IPV6_WORDS, 15>(skb, segment, half, other)
    }
}

/// Options in any order. Hardly any segment that is not one of a handshake has others than
/// timestamps alone; those with selective acknowledgements come here.
#[inline(never)]
fn rewrite_options(skb: *mut __sk_buff, segment: &Segment, half: &mut Half, other: &Half) -> u8 {
    let Some(scratch) = SCRATCH.get_ptr_mut(u32::from(HOOK_INGRESS)) else {
        return 1;
    };
    // SAFETY: the value is this CPU's own, one for each hook, and a hook does not interrupt itself.
    let scratch = unsafe { &mut *scratch };
    scratch.old = [0; size_of::<OptionsBuffer>()];
    let first = segment.tcp + TCP_HEADER as u32;
    if !headers::load_options(skb, first, segment.options, &mut scratch.old) {
        return 1;
    }
    scratch.new = scratch.old;
    scratch.length = segment.options;
    if translate_options(scratch, half, other) != 0 {
        return 1;
    }
    write_options(skb, segment.tcp, scratch)
}

/// Timestamps and selective acknowledgements in the other connection's numbers.
///
/// First the options are found, then they are translated, each once: what is done inside of the
/// loop multiplies the states that the verifier walks through.
#[inline(never)]
fn translate_options(scratch: &mut Scratch, half: &mut Half, other: &Half) -> u8 {
    if find_options(scratch) != 0 {
        return 1;
    }
    // SAFETY: plain reads through a reference; volatile, so that the verifier does not know what
    // the loop has found.
    let (timestamps, blocks, size) = unsafe {
        (
            core::ptr::read_volatile(&raw const scratch.timestamps),
            core::ptr::read_volatile(&raw const scratch.blocks),
            core::ptr::read_volatile(&raw const scratch.blocks_size),
        )
    };
    if timestamps != 0 {
        translate_timestamps(scratch, half, other, timestamps);
    }
    if blocks != 0 {
        translate_blocks(scratch, other.seq_add, blocks, size);
    }
    0
}

/// Where the values of the two options are; 1 if the options cannot be read.
#[inline(never)]
fn find_options(scratch: &mut Scratch) -> u8 {
    scratch.cursor = 0;
    scratch.timestamps = 0;
    scratch.blocks = 0;
    scratch.blocks_size = 0;
    for _ in 0..40 {
        // The cursor is kept in memory for the reason that TcpOptions::parse_in_place gives.
        // SAFETY: plain reads through a reference.
        let (at, length) = unsafe {
            (
                core::ptr::read_volatile(&raw const scratch.cursor),
                core::ptr::read_volatile(&raw const scratch.length),
            )
        };
        if at >= length {
            return 0;
        }
        let kind = byte(&scratch.old, at);
        if kind == 0 {
            return 0;
        }
        let size = if kind == OPTION_NOP { 1 } else { u32::from(byte(&scratch.old, at + 1)) };
        if kind != OPTION_NOP && (size < 2 || at + size > length) {
            return 1;
        }
        if kind == OPTION_TIMESTAMPS {
            if size != 10 {
                return 1;
            }
            scratch.timestamps = at + 2;
        } else if kind == OPTION_SACK {
            scratch.blocks = at + 2;
            scratch.blocks_size = size - 2;
        }
        // SAFETY: a plain write through a reference.
        unsafe { core::ptr::write_volatile(&raw mut scratch.cursor, at + size) };
    }
    0
}

#[inline(never)]
fn translate_timestamps(scratch: &mut Scratch, half: &mut Half, other: &Half, at: u32) {
    let (value, echo) = timestamps(half, other, word(&scratch.old, at), word(&scratch.old, at + 4));
    put(&mut scratch.new, at, value);
    put(&mut scratch.new, at + 4, echo);
}

/// Value and echo as the other end must see them.
#[inline(always)]
fn timestamps(half: &mut Half, other: &Half, value: u32, echo: u32) -> (u32, u32) {
    if half.ts_fixed == 0 {
        // From here on its clock continues ours, as the other end knows it. Two CPUs that get here
        // at once differ by a tick, which is allowed (RFC 7323 leaves one; so does Linux).
        // SAFETY: no preconditions.
        let now = unsafe { bpf_ktime_get_ns() } / 1_000_000;
        half.ts_add = (now as u32).wrapping_add(other.ts_clock).wrapping_sub(value);
        half.ts_fixed = 1;
    }
    // Before the other end's clock is known there is nothing to echo; zero is no time for anybody.
    let echoed = if other.ts_fixed == 0 || echo == 0 { 0 } else { echo.wrapping_sub(other.ts_add) };
    (value.wrapping_add(half.ts_add), echoed)
}

#[inline(never)]
fn translate_blocks(scratch: &mut Scratch, add: u32, at: u32, size: u32) {
    for edge in 0..8 {
        if edge * 4 + 4 > size {
            return;
        }
        let number = word(&scratch.old, at + edge * 4);
        put(&mut scratch.new, at + edge * 4, number.wrapping_sub(add));
    }
}

#[inline(always)]
fn byte(bytes: &OptionsBuffer, at: u32) -> u8 {
    bytes[(at & 63) as usize]
}

#[inline(always)]
fn word(bytes: &OptionsBuffer, at: u32) -> u32 {
    u32::from_be_bytes([
        byte(bytes, at),
        byte(bytes, at + 1),
        byte(bytes, at + 2),
        byte(bytes, at + 3),
    ])
}

#[inline(always)]
fn put(bytes: &mut OptionsBuffer, at: u32, value: u32) {
    let [a, b, c, d] = value.to_be_bytes();
    bytes[(at & 63) as usize] = a;
    bytes[((at + 1) & 63) as usize] = b;
    bytes[((at + 2) & 63) as usize] = c;
    bytes[((at + 3) & 63) as usize] = d;
}

/// Stores the options that changed, word by word, and corrects the checksum for all of them: they
/// need not be aligned, so only the difference of the whole is right.
#[inline(never)]
fn write_options(skb: *mut __sk_buff, tcp: u32, scratch: &mut Scratch) -> u8 {
    // SAFETY: both buffers have 64 bytes, of which 40 are compared.
    let difference = unsafe {
        bpf_csum_diff(scratch.old.as_mut_ptr().cast(), 40, scratch.new.as_mut_ptr().cast(), 40, 0)
    };
    for index in 0..10u32 {
        if index * 4 >= scratch.length {
            break;
        }
        let first = (index * 4) as usize;
        let old: [u8; 4] = [
            scratch.old[first],
            scratch.old[first + 1],
            scratch.old[first + 2],
            scratch.old[first + 3],
        ];
        let new: [u8; 4] = [
            scratch.new[first],
            scratch.new[first + 1],
            scratch.new[first + 2],
            scratch.new[first + 3],
        ];
        if old != new && !store(skb, LINK + tcp + TCP_HEADER as u32 + index * 4, &new, 0) {
            return 1;
        }
    }
    adjust(skb, tcp, difference, 0)
}

/// The IP header of `IP` words and the TCP header behind it, with the timestamps option if `ALL`
/// has the three words of it: all read at once and stored at once, because each call of the kernel
/// costs about as much as the rest of this.
///
/// [`UNUSUAL`], and nothing changed, if there should be timestamps and are not.
#[inline(never)]
fn write_headers<const IP: usize, const ALL: usize>(
    skb: *mut __sk_buff,
    segment: &Segment,
    half: &mut Half,
    other: &Half,
) -> u8 {
    // Not on the stack, which is small: up to 5.10's verifier rounds each frame up.
    let Some(scratch) = SCRATCH.get_ptr_mut(u32::from(HOOK_INGRESS)) else {
        return 1;
    };
    // SAFETY: as in rewrite_options; the array has at least so many words, whatever they hold.
    let words = unsafe { &mut *(&raw mut (*scratch).headers).cast::<[u32; ALL]>() };
    if !headers::load_words(skb, 0, words) {
        return if ALL > IP + 5 { UNUSUAL } else { 1 };
    }
    // Of TCP's own header; its checksum itself is left to the kernel, which knows whether a device
    // is still to make it.
    let before = sum_of::<IP, ALL>(words, u32::MAX);
    if ALL > IP + 5 {
        if words[IP + 5] != BEFORE_TIMESTAMPS {
            return UNUSUAL;
        }
        let (value, echo) = (u32::from_be(words[IP + 6]), u32::from_be(words[IP + 7]));
        let (value, echo) = timestamps(half, other, value, echo);
        words[IP + 6] = value.to_be();
        words[IP + 7] = echo.to_be();
    }
    let (acknowledgement, window) = answer(segment, half, other);
    let ports = u32::from(other.local.port) << 16 | u32::from(other.remote.port);
    words[IP] = ports.to_be();
    words[IP + 1] = segment.sequence.wrapping_add(half.seq_add).to_be();
    words[IP + 2] = acknowledgement.to_be();
    let offset = (segment.options as u16 / 4 + 5) << 12;
    let flags = offset | segment.flags & PASSING;
    words[IP + 3] = (u32::from(flags) << 16 | u32::from(window)).to_be();
    let difference = fold32(before + sum_of::<IP, ALL>(words, 0));
    let outside = if IP == IPV4_WORDS {
        write_ipv4(words, half, other);
        // This header's own checksum makes up for what changes in it.
        0
    } else {
        write_ipv6(words, half, other)
    };
    if !store_words(skb, LINK, words) {
        return 1;
    }
    let tcp = IP as u32 * 4;
    if outside != 0 {
        // This header has no checksum of its own, so a device's sum over the packet must be told.
        // Fails where there is none, which is as well.
        // SAFETY: no preconditions.
        let _ = unsafe { bpf_csum_update(skb, outside) };
    }
    if adjust(skb, tcp, i64::from(difference), 0) != 0 {
        return 1;
    }
    adjust(skb, tcp, i64::from(half.pseudo), BPF_F_PSEUDO_HDR.into())
}

/// What the segment acknowledges and announces, in the other connection's numbers and scale.
#[inline(always)]
fn answer(segment: &Segment, half: &Half, other: &Half) -> (u32, u16) {
    let mut acknowledgement = segment.acknowledgement;
    let mut window = u32::from(segment.window) << half.shift();
    if half.duty != 0 && is_before(acknowledgement, half.own_end) {
        // Our socket has acknowledged more to the other end than this end has taken yet.
        window = window.saturating_sub(half.own_end.wrapping_sub(acknowledgement));
        acknowledgement = half.own_end;
    }
    (acknowledgement.wrapping_sub(other.seq_add), scale(window, other.our_shift()))
}

/// The sum of the words from the TCP header on; with `invert` it is what they take from a sum.
#[inline(always)]
fn sum_of<const IP: usize, const ALL: usize>(words: &[u32; ALL], invert: u32) -> u64 {
    let (mut sum, mut at) = (0, IP);
    while at < ALL {
        sum += u64::from(words[at] ^ invert);
        at += 1;
    }
    sum
}

#[inline(always)]
fn write_ipv4<const ALL: usize>(words: &mut [u32; ALL], half: &Half, other: &Half) {
    let [version, class, high, low] = words[0].to_ne_bytes();
    let [hops, protocol, a, b] = words[2].to_ne_bytes();
    let mut sum = u64::from(!words[0])
        + u64::from(!u16::from_ne_bytes([hops, protocol]))
        + u64::from(!u16::from_ne_bytes([a, b]))
        + u64::from(half.pseudo);
    let hops = hops.wrapping_sub(1);
    // The sender's DSCP means nothing on the other connection; its ECN bits do.
    words[0] = u32::from_ne_bytes([version, class & 3, high, low]);
    sum += u64::from(words[0]) + u64::from(u16::from_ne_bytes([hops, protocol]));
    let [a, b] = fold(fold32(sum)).to_ne_bytes();
    words[2] = u32::from_ne_bytes([hops, protocol, a, b]);
    words[3] = word_of(&other.local.address, 3);
    words[4] = word_of(&other.remote.address, 3);
}

/// Returns by how much the sum over this header changes.
#[inline(always)]
fn write_ipv6<const ALL: usize>(words: &mut [u32; ALL], half: &Half, other: &Half) -> u32 {
    let mut sum = u64::from(!words[0]) + u64::from(!words[1]) + u64::from(half.pseudo);
    let [_, class, _, _] = words[0].to_ne_bytes();
    // Traffic class: ECN alone, as above. The flow label was the sender's for its own connection.
    words[0] = u32::from_ne_bytes([0x60, class & 0x30, 0, 0]);
    let [high, low, next, hops] = words[1].to_ne_bytes();
    words[1] = u32::from_ne_bytes([high, low, next, hops.wrapping_sub(1)]);
    sum += u64::from(words[0]) + u64::from(words[1]);
    let mut at = 0;
    while at < 4 {
        words[2 + at] = word_of(&other.local.address, at);
        words[6 + at] = word_of(&other.remote.address, at);
        at += 1;
    }
    fold32(sum)
}

#[inline(always)]
fn word_of(address: &[u8; 16], index: usize) -> u32 {
    let at = index * 4;
    u32::from_ne_bytes([address[at], address[at + 1], address[at + 2], address[at + 3]])
}

/// A sum of words in 32 bits, as the kernel has it.
#[inline(always)]
fn fold32(sum: u64) -> u32 {
    let once = (sum & 0xffff_ffff) + (sum >> 32);
    ((once & 0xffff_ffff) + (once >> 32)) as u32
}

/// Makes the copy of a segment what our own socket may see of it: an acknowledgement, of nothing
/// but its own bytes, by an end that has sent nothing more.
#[inline(never)]
fn localize(skb: *mut __sk_buff, segment: &Segment, half: &Half) -> i32 {
    let header = segment.tcp + TCP_HEADER as u32 + segment.options;
    // SAFETY: no preconditions; nothing here holds a pointer into the packet.
    if unsafe { bpf_skb_change_tail(skb, LINK + header, 0) } != 0 {
        return TC_ACT_SHOT;
    }
    let outcome =
        if segment.family == 4 { shorten_ipv4(skb, header) } else { shorten_ipv6(skb, header) };
    if outcome != 0
        || trim_options(skb, segment, half) != 0
        || write_acknowledgement(skb, segment, half) != 0
    {
        return TC_ACT_SHOT;
    }
    // SAFETY: as in forward.
    unsafe { (*skb).mark = 0 };
    TC_ACT_UNSPEC
}

#[inline(always)]
fn shorten_ipv4(skb: *mut __sk_buff, length: u32) -> u8 {
    let Some(old) = headers::load::<4>(skb, 0) else {
        return 1;
    };
    let [high, low] = (length as u16).to_be_bytes();
    let new = [old[0], old[1], high, low];
    let difference = difference(&old, &new);
    if !store(skb, LINK, &new, 0) {
        return 1;
    }
    // SAFETY: no preconditions.
    let status = unsafe { bpf_l3_csum_replace(skb, LINK + 10, 0, difference as u64, 0) };
    u8::from(status != 0)
}

#[inline(always)]
fn shorten_ipv6(skb: *mut __sk_buff, length: u32) -> u8 {
    let new = ((length - IPV6_HEADER as u32) as u16).to_be_bytes();
    u8::from(!store(skb, LINK + 4, &new, BPF_F_RECOMPUTE_CSUM.into()))
}

/// The payload is gone, so the checksum cannot be corrected but is made anew.
#[inline(never)]
fn write_acknowledgement(skb: *mut __sk_buff, segment: &Segment, half: &Half) -> u8 {
    let acknowledgement = if is_before(half.own_end, segment.acknowledgement) {
        half.own_end
    } else {
        segment.acknowledgement
    };
    let Some(scratch) = SCRATCH.get_ptr_mut(u32::from(HOOK_INGRESS)) else {
        return 1;
    };
    // SAFETY: as in rewrite_options.
    let scratch = unsafe { &mut *scratch };
    // Pseudo-header and TCP header as one, in the kernel's memory: the stack is small.
    let words = &mut scratch.headers;
    let (source, destination) = (&segment.tuple.source, &segment.tuple.destination);
    let mut at = 0;
    while at < 4 {
        words[at] = word_of(&source.address, at);
        words[4 + at] = word_of(&destination.address, at);
        at += 1;
    }
    if segment.family == 4 {
        // What marks a mapped address is no part of the sum.
        words[2] = 0;
        words[6] = 0;
    }
    // Length and protocol, which both families sum alike.
    words[8] = (TCP_HEADER as u32 + segment.options).to_be();
    words[9] = u32::from(headers::IPPROTO_TCP).to_be();
    words[10] = (u32::from(source.port) << 16 | u32::from(destination.port)).to_be();
    words[11] = half.own_next.to_be();
    words[12] = acknowledgement.to_be();
    let offset = (segment.options as u16 / 4 + 5) << 12;
    let flags = u32::from(offset | flags::ACK);
    words[13] = (flags << 16 | u32::from(segment.window)).to_be();
    words[14] = 0;
    // SAFETY: 15 of the 20 words are summed, and 40 bytes of the options' 64: those past the
    // options are zero.
    let sum = unsafe {
        let sum = bpf_csum_diff(core::ptr::null_mut(), 0, words.as_mut_ptr(), 60, 0) as u32;
        bpf_csum_diff(core::ptr::null_mut(), 0, scratch.old.as_mut_ptr().cast(), 40, sum) as u32
    };
    // The sum is of the machine's own words, so its bytes are already in the packet's order.
    let [a, b] = fold(sum).to_ne_bytes();
    words[14] = u32::from_ne_bytes([a, b, 0, 0]);
    let header: &[u32; TCP_HEADER / 4] = &[words[10], words[11], words[12], words[13], words[14]];
    // SAFETY: as in store.
    let status = unsafe {
        bpf_skb_store_bytes(
            skb,
            LINK + segment.tcp,
            header.as_ptr().cast(),
            TCP_HEADER as u32,
            BPF_F_RECOMPUTE_CSUM.into(),
        )
    };
    u8::from(status != 0)
}

/// Leaves the options for [`write_acknowledgement`] to sum, with selective acknowledgements of
/// nothing but what our own socket has sent. It would ignore others; but a firewall or translation
/// on this host, past which the copy comes and the bytes did not, would take it for forged.
#[inline(never)]
fn trim_options(skb: *mut __sk_buff, segment: &Segment, half: &Half) -> u8 {
    let Some(scratch) = SCRATCH.get_ptr_mut(u32::from(HOOK_INGRESS)) else {
        return 1;
    };
    // SAFETY: as in rewrite_options.
    let scratch = unsafe { &mut *scratch };
    scratch.old = [0; size_of::<OptionsBuffer>()];
    let first = segment.tcp + TCP_HEADER as u32;
    if !headers::load_options(skb, first, segment.options, &mut scratch.old) {
        return 1;
    }
    scratch.length = segment.options;
    if find_options(scratch) != 0 {
        return 1;
    }
    // SAFETY: as in translate_options.
    let (at, size) = unsafe {
        (
            core::ptr::read_volatile(&raw const scratch.blocks),
            core::ptr::read_volatile(&raw const scratch.blocks_size),
        )
    };
    for edge in 0..8 {
        if at == 0 || edge * 4 + 4 > size {
            return 0;
        }
        let place = at + edge * 4;
        if !is_before(half.own_end, word(&scratch.old, place)) {
            continue;
        }
        put(&mut scratch.old, place, half.own_end);
        let bytes = half.own_end.to_be_bytes();
        if !store(skb, LINK + first + place, &bytes, BPF_F_RECOMPUTE_CSUM.into()) {
            return 1;
        }
    }
    0
}

#[inline(always)]
fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    let twice = (once & 0xffff) + (once >> 16);
    !(twice as u16)
}

#[inline(always)]
fn difference<const N: usize>(old: &[u8; N], new: &[u8; N]) -> i64 {
    // SAFETY: pointers and sizes describe the arrays, which the helper only reads.
    unsafe {
        bpf_csum_diff(
            old.as_ptr().cast_mut().cast(),
            N as u32,
            new.as_ptr().cast_mut().cast(),
            N as u32,
            0,
        )
    }
}

#[inline(always)]
fn store<const N: usize>(skb: *mut __sk_buff, offset: u32, bytes: &[u8; N], flags: u64) -> bool {
    // SAFETY: the pointer and the size describe `bytes`; the kernel checks the offset.
    let status =
        unsafe { bpf_skb_store_bytes(skb, offset, bytes.as_ptr().cast(), N as u32, flags) };
    status == 0
}

#[inline(always)]
fn store_words<const N: usize>(skb: *mut __sk_buff, offset: u32, words: &[u32; N]) -> bool {
    // SAFETY: as in store.
    let status =
        unsafe { bpf_skb_store_bytes(skb, offset, words.as_ptr().cast(), N as u32 * 4, 0) };
    status == 0
}

/// Corrects the TCP checksum by a difference.
#[inline(always)]
fn adjust(skb: *mut __sk_buff, tcp: u32, difference: i64, flags: u64) -> u8 {
    // SAFETY: no preconditions; the kernel checks the offset.
    let status = unsafe { bpf_l4_csum_replace(skb, LINK + tcp + 16, 0, difference as u64, flags) };
    u8::from(status != 0)
}

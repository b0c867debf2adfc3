//! What our own sockets still have to do with a switched connection.
//!
//! A socket that had bytes on their way when its connection was switched has a duty: it sends them
//! again until they are acknowledged. For that it gets copies of the acknowledgements, in which it
//! sees nothing but its own bytes; and what it sends is made to fit what the ends have said since.

use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS, BPF_F_RECOMPUTE_CSUM, TC_ACT_UNSPEC};
use aya_ebpf::helpers::{
    bpf_clone_redirect, bpf_csum_diff, bpf_l3_csum_replace, bpf_skb_change_tail,
    bpf_skb_store_bytes,
};
use proxy_common::{FlowRef, HOOK_INGRESS, Half, Tuple, flags};

use crate::flows::{find, is_live};
use crate::follow::SLACK;
use crate::headers::{self, IPV6_HEADER, JUMBO_HEADER, Segment, TCP_HEADER, is_before, word_of};
use crate::options::{find_options, put, read_options, word};
use crate::patch::{LINK, adjust, difference, fold, store};
use crate::rewrite::scale;
use crate::{RECORDS, SCRATCH, TC_ACT_SHOT};

/// On a copy of a segment that is on its way to our own socket; "stcp".
pub const COPY: u32 = 0x7374_6370;

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
    // SAFETY: as in forward::forward.
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

/// Sends a copy of an acknowledgement the way that it came, for our own socket. Not of one for bytes
/// that the other end has not sent: our socket could not tell that it was forged, since the copy's
/// own numbers always fit.
#[inline(always)]
pub fn copy(skb: *mut __sk_buff, segment: &Segment, other: &Half) {
    let acknowledged = segment.acknowledgement.wrapping_sub(other.seq_add);
    if is_before(other.sent.wrapping_add(SLACK), acknowledged) {
        return;
    }
    // A large packet's copy could not be made a small one: its headers say that it is large.
    if segment.flags & (flags::SYN | flags::RST | flags::ACK) != flags::ACK
        || segment.tcp == JUMBO_HEADER as u32
    {
        return;
    }
    // SAFETY: the context is the kernel's, alive for the whole run of the program.
    let buffer = unsafe { &mut *skb };
    let mark = buffer.mark;
    buffer.mark = COPY;
    // SAFETY: no preconditions. If it fails, our socket misses one acknowledgement.
    let _ = unsafe { bpf_clone_redirect(skb, buffer.ifindex, BPF_F_INGRESS.into()) };
    buffer.mark = mark;
}

/// Makes the copy of a segment what our own socket may see of it: an acknowledgement, of nothing
/// but its own bytes, by an end that has sent nothing more.
#[inline(never)]
pub fn localize(skb: *mut __sk_buff, segment: &Segment, half: &Half) -> i32 {
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
    // SAFETY: as in copy.
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
    // SAFETY: as in options::rewrite_options.
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
    // SAFETY: as in patch::store.
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
    // SAFETY: as in options::rewrite_options.
    let scratch = unsafe { &mut *scratch };
    if !read_options(skb, segment, scratch) || find_options(scratch) != 0 {
        return 1;
    }
    // SAFETY: as in options::translate_options.
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
        let first = segment.tcp + TCP_HEADER as u32;
        if !store(skb, LINK + first + place, &bytes, BPF_F_RECOMPUTE_CSUM.into()) {
            return 1;
        }
    }
    0
}

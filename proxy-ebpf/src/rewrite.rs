//! Gives a segment the headers that it has on the other connection.
//!
//! What every segment has, and the one option that most have, is read at once and stored at once;
//! any other options take the longer way through `options`.

use aya_ebpf::bindings::{__sk_buff, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::bpf_csum_update;
use proxy_common::{HOOK_INGRESS, Half};

use crate::SCRATCH;
use crate::headers::{self, IPV4_HEADER, IPV6_HEADER, JUMBO_HEADER, Segment, is_before, word_of};
use crate::options::{OPTION_TIMESTAMPS, rewrite_options, timestamps};
use crate::patch::{LINK, adjust, fold, fold32, store_words};

/// The flags that pass: not the reserved ones, nor Accurate ECN's, which is never agreed here.
const PASSING: u16 = 0x00ff;
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

/// Gives the segment the addresses and numbers that it has on the other connection; 0 if all of it
/// was possible.
#[inline(never)]
pub fn rewrite(skb: *mut __sk_buff, segment: &Segment, half: &mut Half, other: &Half) -> u8 {
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
    // SAFETY: as in options::rewrite_options; the array has at least so many words, whatever they hold.
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

/// A window in the scale of who announces it. Less than its unit is nothing: rounded up, more would be
/// sent than there is room for. That is refused, and the sender, who believes in loss, repeats it after
/// ever longer pauses, also once there is room again; behind a closed window it waits for word. Not for
/// good: nothing is switched whose receiver has no more than some units.
#[inline(always)]
pub fn scale(window: u32, shift: u8) -> u16 {
    let scaled = window >> (shift & 15);
    if scaled > 65535 { 65535 } else { scaled as u16 }
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

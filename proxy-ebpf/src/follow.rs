//! What is remembered of a connection: how far each end is, and how it ends.
//!
//! Nobody else follows it any more, and the loader has only this to tell a connection that lives
//! from one that is over. So a number is believed only if it lies where the two ends are.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use proxy_common::{CLOCK_READY, EVENT_CLOSED, EVENT_RESET, Half, MARK_FIN, MARK_FIRST, flags};

use crate::headers::{Segment, TCP_HEADER, is_before};

/// A segment cannot lie further ahead than the receiver's window, which may have been larger a
/// moment ago.
pub const SLACK: u32 = 256 * 1024;

/// Remembers what the segment tells of the connection; returns the event it amounts to, or 0.
#[inline(never)]
pub fn follow(segment: &Segment, half: &mut Half, other: &mut Half) -> u8 {
    half.packets = half.packets.wrapping_add(1);
    let fin = u32::from(segment.flags & flags::FIN != 0);
    let end = segment.sequence.wrapping_add(payload(segment)).wrapping_add(fin);
    if segment.flags & flags::RST != 0 {
        // Not a sign of life: a host that has forgotten the connection answers so for ever.
        return reset(segment, half, other);
    }
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
    // Not before: who knows no numbers must not keep what is long gone.
    // SAFETY: no preconditions.
    half.seen_ns = unsafe { bpf_ktime_get_ns() };
    if half.ts_fixed == 0 {
        half.ts_fixed = CLOCK_READY;
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

/// Bytes of payload.
#[inline(always)]
fn payload(segment: &Segment) -> u32 {
    segment.length.saturating_sub(segment.tcp + TCP_HEADER as u32 + segment.options)
}

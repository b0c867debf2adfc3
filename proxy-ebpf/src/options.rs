//! Options of a segment in the other connection's numbers, wherever in it they are.
//!
//! A place that is known only once the options have been read is what verifiers have most trouble
//! with, so all of that is here: in memory that is no stack, each loop a function of its own.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_csum_diff, bpf_ktime_get_ns};
use proxy_common::{CLOCK_FIXED, CLOCK_READY, HOOK_INGRESS, Half, OptionsBuffer};

use crate::headers::{self, Segment, TCP_HEADER};
use crate::patch::{LINK, adjust, store};
use crate::{SCRATCH, Scratch};

const OPTION_NOP: u8 = 1;
const OPTION_SACK: u8 = 5;
pub const OPTION_TIMESTAMPS: u8 = 8;

/// Options in any order. Hardly any segment that is not one of a handshake has others than
/// timestamps alone; those with selective acknowledgements come here.
#[inline(never)]
pub fn rewrite_options(
    skb: *mut __sk_buff,
    segment: &Segment,
    half: &mut Half,
    other: &Half,
) -> u8 {
    let Some(scratch) = SCRATCH.get_ptr_mut(u32::from(HOOK_INGRESS)) else {
        return 1;
    };
    // SAFETY: the value is this CPU's own, one for each hook, and a hook does not interrupt itself.
    let scratch = unsafe { &mut *scratch };
    if !read_options(skb, segment, scratch) {
        return 1;
    }
    scratch.new = scratch.old;
    if translate_options(scratch, half, other) != 0 {
        return 1;
    }
    write_options(skb, segment.tcp, scratch)
}

/// Leaves the segment's options in `scratch`, with zeros behind them; false if they cannot be read.
#[inline(always)]
pub fn read_options(skb: *mut __sk_buff, segment: &Segment, scratch: &mut Scratch) -> bool {
    scratch.old = [0; size_of::<OptionsBuffer>()];
    let first = segment.tcp + TCP_HEADER as u32;
    if !headers::load_options(skb, first, segment.options, &mut scratch.old) {
        return false;
    }
    scratch.length = segment.options;
    true
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
pub fn find_options(scratch: &mut Scratch) -> u8 {
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
pub fn timestamps(half: &mut Half, other: &Half, value: u32, echo: u32) -> (u32, u32) {
    let mut add = half.ts_add;
    if half.ts_fixed != CLOCK_FIXED {
        // From here on its clock continues ours, as the other end knows it. Two CPUs that get here
        // at once differ by a tick, which is allowed (RFC 7323 leaves one; so does Linux).
        // SAFETY: no preconditions.
        let now = unsafe { bpf_ktime_get_ns() } / 1_000_000;
        add = (now as u32).wrapping_add(other.ts_clock).wrapping_sub(value);
        // Not by what somebody else sends in its name: all that it says later would be too old.
        if half.ts_fixed == CLOCK_READY {
            half.ts_add = add;
            half.ts_fixed = CLOCK_FIXED;
        }
    }
    // Before the other end's clock is known there is nothing to echo; zero is no time for anybody.
    let is_known = other.ts_fixed == CLOCK_FIXED;
    let echoed = if !is_known || echo == 0 { 0 } else { echo.wrapping_sub(other.ts_add) };
    (value.wrapping_add(add), echoed)
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
pub fn word(bytes: &OptionsBuffer, at: u32) -> u32 {
    u32::from_be_bytes([
        byte(bytes, at),
        byte(bytes, at + 1),
        byte(bytes, at + 2),
        byte(bytes, at + 3),
    ])
}

#[inline(always)]
pub fn put(bytes: &mut OptionsBuffer, at: u32, value: u32) {
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

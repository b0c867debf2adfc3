//! The programs that run in the kernel: maps, license, panic handler, and the list of hooks.
//!
//! Each hook is a pair: the function here maps a result to a verdict, its `try_…` holds the logic.
#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the hook macro drops the doc comments of what it expands to")]

mod packet;

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::programs::TcContext;
use proxy_common::{Counter, Endpoint, HOOK_EGRESS, HOOK_INGRESS, Pending, Tuple};

/// Accepting ends whose handshakes are observed.
#[map]
static WATCHED: HashMap<Endpoint, u32> = HashMap::with_max_entries(4096, 0);

/// Ports of all watched ends, a bit each.
#[map]
static WATCHED_PORTS: Array<u64> = Array::with_max_entries(1024, 0);

/// Handshakes that wait for their completing segment; a flood of SYNs pushes out the oldest.
#[map]
static PENDING: LruHashMap<Tuple, Pending> = LruHashMap::with_max_entries(8192, 0);

/// Segments of handshakes, as `proxy_common::Handshake`.
#[map]
static HANDSHAKES: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// See `proxy_common::Counter`.
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::COUNT, 0);

/// Segments that arrive.
///
/// TC_ACT_UNSPEC whatever happens: other people's programs on the device have their say. (With
/// TC_ACT_OK they would not.)
#[classifier]
pub fn packet_ingress(ctx: TcContext) -> i32 {
    if let Err(failure) = packet::try_observe(&ctx, HOOK_INGRESS) {
        count(failure);
    }
    TC_ACT_UNSPEC
}

/// Segments that leave; verdict as above.
#[classifier]
pub fn packet_egress(ctx: TcContext) -> i32 {
    if let Err(failure) = packet::try_observe(&ctx, HOOK_EGRESS) {
        count(failure);
    }
    TC_ACT_UNSPEC
}

#[inline(always)]
fn count(what: Counter) {
    if let Some(counter) = COUNTERS.get_ptr_mut(what as u32) {
        // SAFETY: the value is this CPU's own, and a tc program is not interrupted by another
        // on its CPU.
        unsafe { *counter += 1 };
    }
}

/// Helpers that these programs call are open to GPL-compatible ones only.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier accepts no path that leads here.
    loop {}
}

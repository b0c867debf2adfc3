//! The programs that run in the kernel: maps, license, panic handler, and the list of hooks.
//!
//! Each hook is a pair: the function here maps a result to a verdict, its `try_…` holds the logic.
#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the hook macro drops the doc comments of what it expands to")]

mod duty;
mod flows;
mod follow;
mod forward;
mod guard;
mod handshake;
mod headers;
mod icmp;
mod options;
mod patch;
mod rewrite;

use aya_ebpf::Global;
use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC};
use aya_ebpf::macros::{classifier, map, sk_lookup};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray, RingBuf, SockMap};
use aya_ebpf::programs::{SkLookupContext, TcContext};
use proxy_common::{
    Counter, Endpoint, FlowRef, HOOK_EGRESS, HOOK_INGRESS, OptionsBuffer, Pending, Record, Seen,
    TcpOptions, Tuple,
};

/// The programs behind the gates. The kernel empties such an array when nobody has it open or
/// pinned any more: programs of a process that is gone then let everything pass.
#[map]
static STAGES: ProgramArray = ProgramArray::with_max_entries(4, 0);

/// Tuples of switched connections, as segments arrive from their clients.
#[map]
static FLOWS: HashMap<Tuple, FlowRef> = HashMap::with_max_entries(32768, BPF_F_NO_PREALLOC);

/// See `linux/bpf.h`: memory for entries that are there, not for all that fit.
const BPF_F_NO_PREALLOC: u32 = 1;

/// The same for servers, by the local port towards them; see `flows::find`.
#[map]
static OWN_PORTS: Array<FlowRef> = Array::with_max_entries(65536, 0);

/// What is done to the segments of each; the loader has it mapped into its memory.
#[map]
static RECORDS: Array<Record> = Array::with_max_entries(10240, BPF_F_MMAPABLE);

/// See `linux/bpf.h`.
const BPF_F_MMAPABLE: u32 = 1 << 10;

/// What the loader should know, as `proxy_common::Event`.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// When the guard last told of a stray: nanoseconds of CLOCK_MONOTONIC.
#[map]
static LAST_STRAY: Array<u64> = Array::with_max_entries(1, 0);

/// Takes what the guard swallows.
#[map]
static GUARD_SOCKETS: SockMap = SockMap::with_max_entries(2, 0);

/// Accepting ends whose handshakes are observed.
#[map]
static WATCHED: HashMap<Endpoint, u32> = HashMap::with_max_entries(4096, 0);

/// Ports of all watched ends, a bit each.
#[map]
static WATCHED_PORTS: Array<u64> = Array::with_max_entries(1024, 0);

/// Handshakes that went by; a flood of SYNs pushes out the oldest.
#[map]
static SEEN: LruHashMap<Tuple, Seen> = LruHashMap::with_max_entries(16384, 0);

/// Handshakes whose completing segment is still to be reported.
#[map]
static PENDING: LruHashMap<Tuple, Pending> = LruHashMap::with_max_entries(1024, 0);

/// Segments of handshakes, as `proxy_common::Handshake`, while [`REPORT`] is set.
#[map]
static HANDSHAKES: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);

/// Whether handshakes are reported one by one, which `check` shows.
#[unsafe(no_mangle)]
static REPORT: Global<u8> = Global::new(0);

/// See `proxy_common::Counter`.
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::COUNT, 0);

/// Room for options, which kernels before 5.12 do not let a program index on its stack. One for
/// each hook: a segment that leaves can be interrupted by one that arrives.
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(4, 0);

/// See [`SCRATCH`].
#[repr(C)]
pub struct Scratch {
    old: OptionsBuffer,
    new: OptionsBuffer,
    options: TcpOptions,
    length: u32,
    cursor: u32,
    /// IPv6 with the length of a large packet, TCP and its timestamps, or less.
    headers: [u32; 20],
    /// Where the value of this option is; 0 for none.
    timestamps: u32,
    /// The same of selective acknowledgements, and how long it is.
    blocks: u32,
    blocks_size: u32,
}

/// What is attached to devices, for segments that arrive.
#[classifier]
pub fn packet_gate_in(ctx: TcContext) -> i32 {
    // SAFETY: nothing here needs to be dropped.
    unsafe { STAGES.tail_call(&ctx, HOOK_INGRESS.into()) };
    TC_ACT_UNSPEC
}

/// What is attached to devices, for segments that leave.
///
/// Only what sockets of this host send matters here. What was received before it leaves (forwarded,
/// or rewritten by us a moment ago) remembers by which device that was.
#[classifier]
pub fn packet_gate_out(ctx: TcContext) -> i32 {
    // SAFETY: the context is the kernel's, alive for the whole run of the program.
    if unsafe { (*ctx.skb.skb).ingress_ifindex } != 0 {
        return TC_ACT_UNSPEC;
    }
    // SAFETY: as above.
    unsafe { STAGES.tail_call(&ctx, HOOK_EGRESS.into()) };
    TC_ACT_UNSPEC
}

/// Segments that arrive.
///
/// TC_ACT_UNSPEC for all that is not ours: other people's programs on the device have their say.
/// (With TC_ACT_OK they would not.)
#[classifier]
pub fn packet_ingress(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let mut segment = headers::Segment::EMPTY;
    match headers::read(skb, &mut segment) {
        headers::WATCHED_PORT => {}
        headers::UNREADABLE => {
            count(Counter::Unreadable);
            return TC_ACT_UNSPEC;
        }
        headers::ICMP => {
            icmp::listen(skb);
            return TC_ACT_UNSPEC;
        }
        _ => return TC_ACT_UNSPEC,
    }
    let mut flow = FlowRef::default();
    if flows::find(&segment.tuple, &mut flow) {
        let verdict = forward::forward(skb, &segment, flow.slot, flow.tag);
        if verdict != TC_ACT_UNSPEC {
            return verdict;
        }
    }
    observe(skb, &segment, HOOK_INGRESS)
}

/// Segments that leave. They are observed, and those of our own sockets corrected while their
/// connection is being switched.
#[classifier]
pub fn packet_egress(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let mut segment = headers::Segment::EMPTY;
    match headers::read(skb, &mut segment) {
        headers::WATCHED_PORT => {
            if duty::speak_for(skb, &segment) != 0 {
                count(Counter::Unfit);
            }
            observe(skb, &segment, HOOK_EGRESS)
        }
        headers::UNREADABLE => {
            count(Counter::Unreadable);
            TC_ACT_UNSPEC
        }
        _ => TC_ACT_UNSPEC,
    }
}

#[inline(always)]
fn observe(skb: *mut __sk_buff, segment: &headers::Segment, hook: u8) -> i32 {
    if let Err(failure) = handshake::try_observe(skb, segment, hook) {
        count(failure);
    }
    TC_ACT_UNSPEC
}

/// Segments that look for a socket.
#[sk_lookup]
pub fn packet_guard(ctx: SkLookupContext) -> u32 {
    let _ = guard::try_guard(&ctx);
    SK_PASS
}

/// See `linux/bpf.h`: go on, with the socket that was assigned if one was.
const SK_PASS: u32 = 1;

/// Of the type that the other verdicts have.
const TC_ACT_SHOT: i32 = aya_ebpf::bindings::TC_ACT_SHOT as i32;

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

//! Swallows segments of switched connections that reach the stack.
//!
//! No socket of ours is left for them, so the stack would answer with RST and end a connection
//! that is alive: when a CNI plugin removes our program for a moment, when a path moves to a device
//! that does not have it yet, for fragments. What is swallowed is retransmitted by its sender. The
//! loader is told, so that it looks whether each device still has the programs: of TCX programs
//! that are taken off the kernel sends no word.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::programs::SkLookupContext;
use proxy_common::{
    CLIENT, Counter, EVENT_STRAY, Endpoint, FlowRef, MARK_LEFT, PHASE_FREE, PHASE_LIVE, Tuple,
};

use crate::flows::{find, tell};
use crate::headers::{IPPROTO_TCP, mapped};
use crate::{GUARD_SOCKETS, LAST_STRAY, RECORDS, count};

const AF_INET: u32 = 2;

/// One field of the context. Volatile, because the verifier allows only accesses at constant
/// offsets, and the optimizer would join two branches that read different fields into one access at
/// an offset that it has computed.
macro_rules! field {
    ($lookup:ident.$($field:tt)+) => {
        // SAFETY: the context is the kernel's, alive for the whole run of the program.
        unsafe { core::ptr::read_volatile(&raw const (*$lookup).$($field)+) }
    };
}

/// Steers the segment to the listener that drops everything, if its connection is a switched one.
#[inline(always)]
pub fn try_guard(ctx: &SkLookupContext) -> Option<()> {
    let lookup = ctx.lookup;
    if field!(lookup.protocol) != u32::from(IPPROTO_TCP) {
        return None;
    }
    let is_four = field!(lookup.family) == AF_INET;
    // All of them, whatever the family: the kernel gives zeros for the other one.
    let remote_4 = field!(lookup.remote_ip4).to_ne_bytes();
    let local_4 = field!(lookup.local_ip4).to_ne_bytes();
    let remote_6 = joined([
        field!(lookup.remote_ip6[0]),
        field!(lookup.remote_ip6[1]),
        field!(lookup.remote_ip6[2]),
        field!(lookup.remote_ip6[3]),
    ]);
    let local_6 = joined([
        field!(lookup.local_ip6[0]),
        field!(lookup.local_ip6[1]),
        field!(lookup.local_ip6[2]),
        field!(lookup.local_ip6[3]),
    ]);
    let source = Endpoint {
        address: if is_four { mapped(remote_4) } else { remote_6 },
        port: u16::from_be(field!(lookup.remote_port)),
    };
    let destination = Endpoint {
        address: if is_four { mapped(local_4) } else { local_6 },
        port: field!(lookup.local_port) as u16,
    };
    let tuple = Tuple { source, destination };
    let mut flow = FlowRef::default();
    if !find(&tuple, &mut flow) {
        return None;
    }
    let record = RECORDS.get_ptr_mut(flow.slot)?;
    // SAFETY: plain reads of aligned words that the loader or other programs may be writing.
    let (phase, generation, marks) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*record).phase),
            core::ptr::read_volatile(&raw const (*record).generation),
            core::ptr::read_volatile(&raw const (*record).halves[CLIENT].marks),
        )
    };
    if phase == PHASE_FREE || !flow.is_of(generation) || marks & MARK_LEFT != 0 {
        return None;
    }
    count(Counter::Guarded);
    if phase >= PHASE_LIVE && is_time_to_tell() {
        tell(record, flow, EVENT_STRAY, 0, (0, 0));
    }
    GUARD_SOCKETS.redirect_sk_lookup(ctx, u32::from(!is_four), 0).ok()
}

/// Whether the loader has not been told of a stray for a while: somebody may send them on purpose.
#[inline(always)]
fn is_time_to_tell() -> bool {
    const PAUSE_NS: u64 = 500_000_000;
    let Some(last) = LAST_STRAY.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: aligned; two CPUs at once would tell twice.
    unsafe {
        let is_time = now.wrapping_sub(core::ptr::read_volatile(last)) >= PAUSE_NS;
        if is_time {
            core::ptr::write_volatile(last, now);
        }
        is_time
    }
}

#[inline(always)]
fn joined(words: [u32; 4]) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

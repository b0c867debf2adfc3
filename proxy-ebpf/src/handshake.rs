//! Observes the handshakes of watched endpoints.
//!
//! What SYN and SYN-ACK say is kept for the loader, which asks for it when a connection is about
//! to be switched: the offsets between two connections come from there, and having seen the
//! handshake here proves that the segments that follow will be seen here as well.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use proxy_common::{
    Counter, Endpoint, HOOK_INGRESS, Handshake, Opening, OptionsBuffer, Pending, SEEN_SYN,
    SEEN_SYN_ACK, STEP_ACK, STEP_SYN, STEP_SYN_ACK, Seen, TcpOptions, Tuple, WATCH_LOCAL, flags,
};

use crate::headers::{self, IPV4_HEADER, Segment, TCP_HEADER};
use crate::options::read_options;
use crate::{HANDSHAKES, PENDING, REPORT, SCRATCH, SEEN, WATCHED};

const SYN_ACK: u16 = flags::SYN | flags::ACK;
/// What [`report`] came to: there, without room in the ring, or not readable.
const REPORTED: u8 = 0;
const LOST: u8 = 1;
const UNREPORTED: u8 = 2;
/// What tells the steps of a handshake from everything else.
pub const KIND: u16 = flags::SYN | flags::ACK | flags::RST | flags::FIN;

/// Keeps what the segment says if it belongs to a handshake that is watched.
///
/// The steps are functions of their own in the object as well: together they may use 512 bytes of
/// stack, and inlined they would all be alive at once.
#[inline(always)]
pub fn try_observe(skb: *mut __sk_buff, segment: &Segment, hook: u8) -> Result<(), Counter> {
    if note(skb, segment, hook) != 0 {
        return Err(Counter::Unreadable);
    }
    if REPORT.load() == 0 {
        return Ok(());
    }
    match step(segment, hook) {
        0 => Ok(()),
        step => match report(skb, hook, step, segment) {
            REPORTED => Ok(()),
            LOST => Err(Counter::Lost),
            _ => Err(Counter::Unreadable),
        },
    }
}

/// Keeps one step; 1 if it could not be read.
#[inline(never)]
fn note(skb: *mut __sk_buff, segment: &Segment, hook: u8) -> u8 {
    let source = &segment.tuple.source;
    let destination = &segment.tuple.destination;
    match segment.flags & KIND {
        flags::SYN if is_asked_here(watched(destination), hook) => note_syn(skb, segment, hook),
        SYN_ACK if is_answered_here(watched(source), hook) => note_answer(skb, segment, hook),
        _ => 0,
    }
}

/// Whether a SYN to an endpoint of this role passes this hook on its way in or out: what a
/// listener here is asked arrives, what we ask leaves.
#[inline(always)]
fn is_asked_here(role: u32, hook: u8) -> bool {
    role != 0 && (role == WATCH_LOCAL) == (hook == HOOK_INGRESS)
}

#[inline(always)]
fn is_answered_here(role: u32, hook: u8) -> bool {
    role != 0 && (role == WATCH_LOCAL) != (hook == HOOK_INGRESS)
}

#[inline(never)]
fn note_syn(skb: *mut __sk_buff, segment: &Segment, hook: u8) -> u8 {
    let Some(opening) = open(skb, segment, hook) else {
        return 1;
    };
    let seen = Seen {
        state: SEEN_SYN,
        // SAFETY: the context is the kernel's, alive for the whole run of the program.
        ifindex: unsafe { (*skb).ifindex },
        client: opening,
        server: Opening::default(),
    };
    // Without room the connection is not switched; nothing else.
    let _ = SEEN.insert(segment.tuple, seen, 0);
    0
}

#[inline(never)]
fn note_answer(skb: *mut __sk_buff, segment: &Segment, hook: u8) -> u8 {
    let tuple = Tuple { source: segment.tuple.destination, destination: segment.tuple.source };
    let Some(seen) = SEEN.get_ptr_mut(tuple) else {
        return 0;
    };
    // SAFETY: the kernel keeps the value readable and writable for the run of the program, even
    // if it is evicted meanwhile. Two CPUs at it at once need two SYNs for one tuple.
    let seen = unsafe { &mut *seen };
    // The first answer holds: a later one is the same again, or somebody else's.
    if seen.state != SEEN_SYN || segment.acknowledgement != seen.client.sequence.wrapping_add(1) {
        return 0;
    }
    let Some(opening) = open(skb, segment, hook) else {
        return 1;
    };
    seen.server = opening;
    if hook == HOOK_INGRESS {
        // SAFETY: as in note_syn.
        seen.ifindex = unsafe { (*skb).ifindex };
    }
    seen.state = SEEN_SYN_ACK;
    0
}

/// What a SYN or SYN-ACK says.
#[inline(always)]
fn open(skb: *mut __sk_buff, segment: &Segment, hook: u8) -> Option<Opening> {
    let scratch = SCRATCH.get_ptr_mut(u32::from(hook))?;
    // SAFETY: the value is this CPU's own, one for each hook, and neither hook interrupts itself.
    let scratch = unsafe { &mut *scratch };
    scratch.options = TcpOptions::default();
    if !read_options(skb, segment, scratch) {
        return None;
    }
    // From memory, for the reason that parse_in_place gives.
    // SAFETY: a plain read through a reference.
    let length = unsafe { core::ptr::read_volatile(&raw const scratch.length) };
    scratch.options.parse_in_place(&scratch.old, length);
    // Options of the IP header (security labels, say) would be on each segment, and rewriting knows
    // none.
    if segment.family == 4 && segment.tcp != IPV4_HEADER as u32 {
        scratch.options.present |= TcpOptions::MALFORMED;
    }
    Some(Opening {
        sequence: segment.sequence,
        options: scratch.options,
        window: segment.window,
        flags: segment.flags,
    })
}

/// Which step of a watched handshake the segment is; 0 for none.
#[inline(never)]
fn step(segment: &Segment, hook: u8) -> u8 {
    match segment.flags & KIND {
        flags::SYN if watched(&segment.tuple.destination) != 0 => STEP_SYN,
        SYN_ACK if watched(&segment.tuple.source) != 0 => {
            expect_completion(segment);
            STEP_SYN_ACK
        }
        flags::ACK if completes(segment, hook) => STEP_ACK,
        _ => 0,
    }
}

/// Remembers what the client's next segment must carry. Failing to is no loss but of one event.
#[inline(always)]
fn expect_completion(syn_ack: &Segment) {
    let tuple = Tuple { source: syn_ack.tuple.destination, destination: syn_ack.tuple.source };
    let pending = Pending {
        sequence: syn_ack.acknowledgement,
        acknowledgement: syn_ack.sequence.wrapping_add(1),
        reported: 0,
    };
    let _ = PENDING.insert(tuple, pending, 0);
}

/// Whether this is the segment that completes a handshake, and this hook has not said so yet.
///
/// The entry goes once its last hook has reported: the ingress of the side that listens, or the
/// egress of the side that connects. Both hooks see it on loopback and between local namespaces.
#[inline(always)]
fn completes(segment: &Segment, hook: u8) -> bool {
    let Some(pending) = PENDING.get_ptr_mut(segment.tuple) else {
        return false;
    };
    // SAFETY: the kernel keeps the value readable and writable for the run of the program, even
    // if it is evicted meanwhile; a race with another CPU costs at most one event too many.
    let pending = unsafe { &mut *pending };
    let exact =
        pending.sequence == segment.sequence && pending.acknowledgement == segment.acknowledgement;
    if !exact || pending.reported & (1 << hook) != 0 {
        return false;
    }
    pending.reported |= 1 << hook;
    let listens_here = watched(&segment.tuple.destination) == WATCH_LOCAL;
    if listens_here == (hook == HOOK_INGRESS) {
        let _ = PENDING.remove(segment.tuple);
    }
    true
}

/// Puts the event together in the ring buffer's own memory, which, unlike the stack, kernels
/// before 5.12 let a program index with a variable.
#[inline(never)]
fn report(skb: *mut __sk_buff, hook: u8, step: u8, segment: &Segment) -> u8 {
    let Some(mut entry) = HANDSHAKES.reserve::<Handshake>(0) else {
        return LOST;
    };
    // SAFETY: the entry is ours until submitted or discarded, and has this type's size and
    // alignment.
    let event = unsafe { &mut *entry.as_mut_ptr() };
    *event = Handshake {
        // SAFETY: no preconditions.
        time_ns: unsafe { bpf_ktime_get_ns() },
        source: segment.tuple.source,
        destination: segment.tuple.destination,
        // SAFETY: as in read_ip.
        ifindex: unsafe { (*skb).ifindex },
        sequence: segment.sequence,
        acknowledgement: segment.acknowledgement,
        options: TcpOptions::default(),
        window: segment.window,
        flags: segment.flags,
        step,
        hook,
        family: segment.family,
        traffic_class: segment.traffic_class,
        raw_options_len: segment.options as u8,
        raw_options: [0; size_of::<OptionsBuffer>()],
        padding: [0; 7],
    };
    let first = segment.tcp + TCP_HEADER as u32;
    if !headers::load_options(skb, first, segment.options, &mut event.raw_options) {
        entry.discard(0);
        return UNREPORTED;
    }
    // The length from memory too, for the reason that parse_in_place gives: after the loop above
    // the verifier knows eleven different ranges of it.
    // SAFETY: a plain read through a reference.
    let length = unsafe { core::ptr::read_volatile(&raw const event.raw_options_len) };
    event.options.parse_in_place(&event.raw_options, length.into());
    tell(skb, event);
    entry.submit(0);
    REPORTED
}

/// The debug message. The loader sets its level as a constant of the object; where that is lower,
/// the verifier removes all of this.
#[inline(always)]
fn tell(skb: *mut __sk_buff, event: &Handshake) {
    let (step, hook, device) = (event.step, event.hook, event.ifindex);
    let (sequence, flags) = (event.sequence, event.flags);
    debug!(
        TcContext::new(skb),
        "step {} at hook {} of device {}: sequence {}, flags {:x}",
        step,
        hook,
        device,
        sequence,
        flags
    );
}

/// The role of a watched endpoint, by its address or as one of all addresses of its port; 0 for
/// what is not watched.
#[inline(never)]
fn watched(endpoint: &Endpoint) -> u32 {
    // SAFETY: the value is copied at once; the loader replaces it as one aligned word.
    if let Some(role) = unsafe { WATCHED.get(endpoint) } {
        return *role;
    }
    let any = Endpoint { address: [0; 16], port: endpoint.port };
    // SAFETY: as above.
    unsafe { WATCHED.get(any) }.copied().unwrap_or(0)
}

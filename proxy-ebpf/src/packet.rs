//! tc: observes the handshakes of watched endpoints.
//!
//! Three kinds of segments are reported: SYN, SYN-ACK, and the one that completes the handshake.
//! Everything else leaves after two array look-ups, so that traffic which is not ours pays little.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_skb_load_bytes_relative, bpf_skb_pull_data};
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use proxy_common::{
    Counter, Endpoint, HOOK_INGRESS, Handshake, OptionsBuffer, Pending, STEP_ACK, STEP_SYN,
    STEP_SYN_ACK, TcpOptions, Tuple, WATCH_LOCAL, flags, port_bit,
};

use crate::{HANDSHAKES, PENDING, WATCHED, WATCHED_PORTS};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const IPPROTO_TCP: u8 = 6;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;

/// What the headers of a TCP segment say.
struct Segment {
    source: Endpoint,
    destination: Endpoint,
    sequence: u32,
    acknowledgement: u32,
    /// Where the TCP header begins, from the start of the IP header.
    tcp: u32,
    /// Bytes of options after the fixed TCP header.
    options: u32,
    flags: u16,
    window: u16,
    family: u8,
    traffic_class: u8,
}

/// What reading the headers came to. (Numbers, because a function of a kernel program returns one.)
const OTHER: u8 = 0;
const WATCHED_PORT: u8 = 1;
const UNREADABLE: u8 = 2;

/// Reports the segment if it belongs to a handshake that is watched.
///
/// The steps are functions of their own in the object as well: together they may use 512 bytes of
/// stack, and inlined they would all be alive at once.
#[inline(always)]
pub fn try_observe(ctx: &TcContext, hook: u8) -> Result<(), Counter> {
    let skb = ctx.skb.skb;
    let mut segment = Segment::EMPTY;
    let mut outcome = read_headers(skb, &mut segment);
    if outcome == UNREADABLE {
        gather_headers(skb);
        outcome = read_headers(skb, &mut segment);
    }
    match outcome {
        WATCHED_PORT => {}
        UNREADABLE => return Err(Counter::Unreadable),
        _ => return Ok(()),
    }
    match step(&segment, hook) {
        0 => Ok(()),
        step => report(skb, hook, step, &segment),
    }
}

impl Segment {
    const EMPTY: Self = Self {
        source: Endpoint { address: [0; 16], port: 0 },
        destination: Endpoint { address: [0; 16], port: 0 },
        sequence: 0,
        acknowledgement: 0,
        tcp: 0,
        options: 0,
        flags: 0,
        window: 0,
        family: 0,
        traffic_class: 0,
    };
}

#[inline(always)]
fn read_headers(skb: *mut __sk_buff, segment: &mut Segment) -> u8 {
    match read_ip(skb, segment) {
        WATCHED_PORT => read_tcp(skb, segment),
        other => other,
    }
}

/// Everything but a whole TCP segment is something other. Extension headers of IPv6 are not
/// followed: no TCP stack puts them before a handshake, and who does so is not fit for rewriting.
#[inline(never)]
fn read_ip(skb: *mut __sk_buff, segment: &mut Segment) -> u8 {
    // SAFETY: the context is the kernel's, alive for the whole run of the program.
    let protocol = unsafe { (*skb).protocol };
    match u16::from_be(protocol as u16) {
        ETH_P_IP => read_ipv4(skb, segment),
        ETH_P_IPV6 => read_ipv6(skb, segment),
        _ => OTHER,
    }
}

#[inline(always)]
fn read_ipv4(skb: *mut __sk_buff, segment: &mut Segment) -> u8 {
    let Some(header) = load::<20>(skb, 0) else {
        return UNREADABLE;
    };
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff;
    if header[9] != IPPROTO_TCP || fragment != 0 {
        return OTHER;
    }
    segment.source.address = mapped([header[12], header[13], header[14], header[15]]);
    segment.destination.address = mapped([header[16], header[17], header[18], header[19]]);
    segment.tcp = u32::from(header[0] & 0x0f) * 4;
    segment.family = 4;
    segment.traffic_class = header[1];
    WATCHED_PORT
}

#[inline(always)]
fn read_ipv6(skb: *mut __sk_buff, segment: &mut Segment) -> u8 {
    let Some(header) = load::<IPV6_HEADER>(skb, 0) else {
        return UNREADABLE;
    };
    if header[6] != IPPROTO_TCP {
        return OTHER;
    }
    segment.source.address.copy_from_slice(&header[8..24]);
    segment.destination.address.copy_from_slice(&header[24..40]);
    segment.tcp = IPV6_HEADER as u32;
    segment.family = 6;
    segment.traffic_class = header[0] << 4 | header[1] >> 4;
    WATCHED_PORT
}

/// A segment that has nothing to do with a watched port is something other.
#[inline(never)]
fn read_tcp(skb: *mut __sk_buff, segment: &mut Segment) -> u8 {
    let Some(header) = load::<TCP_HEADER>(skb, segment.tcp) else {
        return UNREADABLE;
    };
    segment.source.port = u16::from_be_bytes([header[0], header[1]]);
    segment.destination.port = u16::from_be_bytes([header[2], header[3]]);
    if !is_port_watched(segment.source.port) && !is_port_watched(segment.destination.port) {
        return OTHER;
    }
    segment.sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    segment.acknowledgement = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
    segment.flags = u16::from_be_bytes([header[12], header[13]]) & 0x0fff;
    segment.window = u16::from_be_bytes([header[14], header[15]]);
    let length = u32::from(header[12] >> 4) * 4;
    segment.options = length.wrapping_sub(TCP_HEADER as u32);
    if length < TCP_HEADER as u32 { OTHER } else { WATCHED_PORT }
}

/// Which step of a watched handshake the segment is; 0 for none.
#[inline(never)]
fn step(segment: &Segment, hook: u8) -> u8 {
    match segment.flags & (flags::SYN | flags::ACK | flags::RST | flags::FIN) {
        flags::SYN if watched(&segment.destination) != 0 => STEP_SYN,
        SYN_ACK if watched(&segment.source) != 0 => {
            expect_completion(segment);
            STEP_SYN_ACK
        }
        flags::ACK if completes(segment, hook) => STEP_ACK,
        _ => 0,
    }
}

const SYN_ACK: u16 = flags::SYN | flags::ACK;

/// Remembers what the client's next segment must carry. Failing to is no loss but of one event.
#[inline(always)]
fn expect_completion(syn_ack: &Segment) {
    let tuple = Tuple { client: syn_ack.destination, server: syn_ack.source };
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
    if !is_port_watched(segment.destination.port) {
        return false;
    }
    let tuple = Tuple { client: segment.source, server: segment.destination };
    let Some(pending) = PENDING.get_ptr_mut(tuple) else {
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
    let listens_here = watched(&segment.destination) == WATCH_LOCAL;
    if listens_here == (hook == HOOK_INGRESS) {
        let _ = PENDING.remove(tuple);
    }
    true
}

/// Puts the event together in the ring buffer's own memory, which, unlike the stack, kernels
/// before 5.12 let a program index with a variable.
#[inline(always)]
fn report(skb: *mut __sk_buff, hook: u8, step: u8, segment: &Segment) -> Result<(), Counter> {
    let mut entry = HANDSHAKES.reserve::<Handshake>(0).ok_or(Counter::Lost)?;
    // SAFETY: the entry is ours until submitted or discarded, and has this type's size and
    // alignment.
    let event = unsafe { &mut *entry.as_mut_ptr() };
    *event = Handshake {
        // SAFETY: no preconditions.
        time_ns: unsafe { bpf_ktime_get_ns() },
        source: segment.source,
        destination: segment.destination,
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
    if !load_options(skb, first, segment.options, &mut event.raw_options) {
        gather_headers(skb);
        if !load_options(skb, first, segment.options, &mut event.raw_options) {
            entry.discard(0);
            return Err(Counter::Unreadable);
        }
    }
    // The length from memory too, for the reason that parse_in_place gives: after the loop above
    // the verifier knows eleven different ranges of it.
    // SAFETY: a plain read through a reference.
    let length = unsafe { core::ptr::read_volatile(&raw const event.raw_options_len) };
    event.options.parse_in_place(&event.raw_options, length.into());
    tell(skb, event);
    entry.submit(0);
    Ok(())
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

/// Reads `length` bytes of options, word by word: each call has a size that the verifier knows.
#[inline(never)]
fn load_options(skb: *mut __sk_buff, first: u32, length: u32, into: &mut OptionsBuffer) -> bool {
    for (word, chunk) in into.chunks_exact_mut(4).enumerate() {
        let at = word as u32 * 4;
        if at >= length {
            break;
        }
        let Some(bytes) = load::<4>(skb, first + at) else {
            return false;
        };
        chunk.copy_from_slice(&bytes);
    }
    true
}

/// Brings the headers into the packet's first, contiguous part, the only one that [`load`] reads.
/// They nearly always are there: drivers see to it. (Asking for it each time would make the kernel
/// copy the headers of every segment that it keeps for retransmission.)
#[inline(never)]
fn gather_headers(skb: *mut __sk_buff) {
    /// Ethernet with one tag, IPv4 with all options (more than IPv6), TCP with all options.
    const HEADERS: u32 = 14 + 4 + 60 + 60;
    // SAFETY: as in read_ip.
    let length = unsafe { (*skb).len };
    // SAFETY: no preconditions; nothing here holds a pointer into the packet.
    let _ = unsafe { bpf_skb_pull_data(skb, if length < HEADERS { length } else { HEADERS }) };
}

/// `N` bytes from the start of the IP header on, whether or not the device has another header
/// before it; `None` if they are not all in the packet's contiguous part.
#[inline(always)]
fn load<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u8; N]> {
    let mut bytes = [0u8; N];
    // SAFETY: the pointer and the size describe `bytes`; the kernel checks the offset.
    let status = unsafe {
        bpf_skb_load_bytes_relative(
            skb.cast(),
            offset,
            bytes.as_mut_ptr().cast(),
            N as u32,
            BPF_HDR_START_NET,
        )
    };
    (status == 0).then_some(bytes)
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

#[inline(always)]
fn is_port_watched(port: u16) -> bool {
    let (word, bit) = port_bit(port);
    WATCHED_PORTS.get(word).is_some_and(|word| word & bit != 0)
}

#[inline(always)]
fn mapped([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

//! What the headers of a segment say, read the same way by every hook.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::{bpf_skb_load_bytes_relative, bpf_skb_pull_data};
use proxy_common::{Endpoint, OptionsBuffer, Tuple, port_bit};

use crate::WATCHED_PORTS;

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
pub const IPPROTO_TCP: u8 = 6;
const IPPROTO_ICMP: u8 = 1;
const IPPROTO_ICMPV6: u8 = 58;
const IPPROTO_HOPOPTS: u8 = 0;
/// RFC 2675.
const OPTION_JUMBO: u8 = 0xc2;
pub const IPV4_HEADER: usize = 20;
pub const IPV6_HEADER: usize = 40;
/// The same with the option that tells the length of a packet above 64 KiB. Such packets are never on
/// a wire: Linux passes them between its parts where devices are set up for it ("BIG TCP").
pub const JUMBO_HEADER: usize = IPV6_HEADER + 8;
pub const TCP_HEADER: usize = 20;

/// What the headers of a TCP segment say.
pub struct Segment {
    pub tuple: Tuple,
    pub sequence: u32,
    pub acknowledgement: u32,
    /// Where the TCP header begins, from the start of the IP header.
    pub tcp: u32,
    /// Bytes of options after the fixed TCP header.
    pub options: u32,
    /// Bytes of the packet from the IP header on, as that says.
    pub length: u32,
    pub flags: u16,
    pub window: u16,
    pub family: u8,
    pub traffic_class: u8,
    /// TTL or hop limit.
    pub hops: u8,
}

/// What reading the headers came to. (Numbers, because a function of a kernel program returns one.)
pub const OTHER: u8 = 0;
pub const WATCHED_PORT: u8 = 1;
pub const UNREADABLE: u8 = 2;
pub const ICMP: u8 = 3;

impl Segment {
    pub const EMPTY: Self = Self {
        tuple: Tuple {
            source: Endpoint { address: [0; 16], port: 0 },
            destination: Endpoint { address: [0; 16], port: 0 },
        },
        sequence: 0,
        acknowledgement: 0,
        tcp: 0,
        options: 0,
        length: 0,
        flags: 0,
        window: 0,
        family: 0,
        traffic_class: 0,
        hops: 0,
    };
}

/// Reads the headers; where they are not contiguous, makes them so first.
#[inline(always)]
pub fn read(skb: *mut __sk_buff, segment: &mut Segment) -> u8 {
    let outcome = read_as_it_is(skb, segment);
    if outcome != UNREADABLE {
        return outcome;
    }
    gather(skb);
    read_as_it_is(skb, segment)
}

#[inline(always)]
fn read_as_it_is(skb: *mut __sk_buff, segment: &mut Segment) -> u8 {
    match read_ip(skb, segment) {
        WATCHED_PORT => read_tcp(skb, segment),
        other => other,
    }
}

/// Everything but a whole TCP segment is something other. Extension headers of IPv6 (but
/// for [`JUMBO_HEADER`]) are not followed: no TCP stack puts them before a handshake, and who does so is not fit for rewriting.
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
    let Some(header) = load::<IPV4_HEADER>(skb, 0) else {
        return UNREADABLE;
    };
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff;
    if header[9] != IPPROTO_TCP || fragment != 0 {
        return if header[9] == IPPROTO_ICMP && fragment == 0 { ICMP } else { OTHER };
    }
    segment.tuple.source.address = mapped([header[12], header[13], header[14], header[15]]);
    segment.tuple.destination.address = mapped([header[16], header[17], header[18], header[19]]);
    segment.tcp = u32::from(header[0] & 0x0f) * 4;
    segment.family = 4;
    segment.traffic_class = header[1];
    segment.length = u32::from(u16::from_be_bytes([header[2], header[3]]));
    if segment.length == 0 {
        segment.length = length_of(skb);
    }
    segment.hops = header[8];
    WATCHED_PORT
}

#[inline(always)]
fn read_ipv6(skb: *mut __sk_buff, segment: &mut Segment) -> u8 {
    let Some(header) = load::<IPV6_HEADER>(skb, 0) else {
        return UNREADABLE;
    };
    let mut protocol = header[6];
    segment.tcp = IPV6_HEADER as u32;
    segment.length = 40 + u32::from(u16::from_be_bytes([header[4], header[5]]));
    if segment.length == 40 {
        segment.length = length_of(skb);
        if protocol == IPPROTO_HOPOPTS && segment.length > 40 + 65535 {
            let Some(jumbo) = load::<8>(skb, IPV6_HEADER as u32) else {
                return UNREADABLE;
            };
            if jumbo[1] != 0 || jumbo[2] != OPTION_JUMBO {
                return OTHER;
            }
            protocol = jumbo[0];
            segment.tcp = JUMBO_HEADER as u32;
        }
    }
    if protocol != IPPROTO_TCP {
        return if protocol == IPPROTO_ICMPV6 { ICMP } else { OTHER };
    }
    segment.tuple.source.address.copy_from_slice(&header[8..24]);
    segment.tuple.destination.address.copy_from_slice(&header[24..40]);
    segment.family = 6;
    segment.traffic_class = header[0] << 4 | header[1] >> 4;
    segment.hops = header[7];
    WATCHED_PORT
}

/// Bytes of a packet that is longer than its header can say. (With Ethernet's header, as everywhere
/// that these programs are attached.)
#[inline(always)]
fn length_of(skb: *mut __sk_buff) -> u32 {
    // SAFETY: as in read_ip.
    unsafe { (*skb).len }.saturating_sub(14)
}

/// A segment that has nothing to do with a watched port is something other.
#[inline(never)]
fn read_tcp(skb: *mut __sk_buff, segment: &mut Segment) -> u8 {
    let Some(header) = load::<TCP_HEADER>(skb, segment.tcp) else {
        return UNREADABLE;
    };
    segment.tuple.source.port = u16::from_be_bytes([header[0], header[1]]);
    segment.tuple.destination.port = u16::from_be_bytes([header[2], header[3]]);
    if !is_port_watched(segment.tuple.source.port)
        && !is_port_watched(segment.tuple.destination.port)
    {
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

/// Reads `length` bytes of options; where they are not contiguous, makes them so first.
#[inline(always)]
pub fn load_options(
    skb: *mut __sk_buff,
    first: u32,
    length: u32,
    into: &mut OptionsBuffer,
) -> bool {
    if load_options_as_they_are(skb, first, length, into) {
        return true;
    }
    gather(skb);
    load_options_as_they_are(skb, first, length, into)
}

/// Word by word: each call has a size that the verifier knows.
#[inline(never)]
fn load_options_as_they_are(
    skb: *mut __sk_buff,
    first: u32,
    length: u32,
    into: &mut OptionsBuffer,
) -> bool {
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
pub fn gather(skb: *mut __sk_buff) {
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
pub fn load<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u8; N]> {
    let mut bytes = Aligned([0u8; N]);
    // SAFETY: the pointer and the size describe `bytes`; the kernel checks the offset.
    let status = unsafe { load_into(skb, offset, bytes.0.as_mut_ptr(), N as u32) };
    (status == 0).then_some(bytes.0)
}

/// The same in words of the machine's own order, as checksums sum them. (Into the caller's memory:
/// a second copy on the way would not fit into the stack.)
#[inline(always)]
pub fn load_words<const N: usize>(skb: *mut __sk_buff, offset: u32, words: &mut [u32; N]) -> bool {
    // SAFETY: as in load; each word is four bytes of any value.
    let status = unsafe { load_into(skb, offset, words.as_mut_ptr().cast(), N as u32 * 4) };
    status == 0
}

/// So that words of it are read at once, and not byte by byte.
#[repr(C, align(8))]
struct Aligned<const N: usize>([u8; N]);

/// # Safety
/// `into` has room for `length` bytes.
#[inline(always)]
unsafe fn load_into(skb: *mut __sk_buff, offset: u32, into: *mut u8, length: u32) -> i64 {
    // SAFETY: by the caller; the kernel checks the offset.
    unsafe {
        bpf_skb_load_bytes_relative(skb.cast(), offset, into.cast(), length, BPF_HDR_START_NET)
    }
}

#[inline(always)]
pub fn mapped([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// A word of an address, in the order that [`load_words`] has.
#[inline(always)]
pub fn word_of(address: &[u8; 16], index: usize) -> u32 {
    let at = index * 4;
    u32::from_ne_bytes([address[at], address[at + 1], address[at + 2], address[at + 3]])
}

#[inline(always)]
pub fn is_port_watched(port: u16) -> bool {
    let (word, bit) = port_bit(port);
    WATCHED_PORTS.get(word).is_some_and(|word| word & bit != 0)
}

/// Whether one sequence number comes before another; they wrap around.
#[inline(always)]
pub fn is_before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

//! Routers that say that a segment was too large for the way on.
//!
//! Such a message quotes the segment as we sent it on, in the name of our address, and no socket of
//! ours is left that would heed it. The loader tells its true sender. What a message quotes must be
//! a segment that is on its way right now: whoever does not see the connection cannot know one, and
//! cannot make its ends send small segments for nothing (RFC 5927, sections 4.1 and 7).

use aya_ebpf::bindings::__sk_buff;
use proxy_common::{Counter, EVENT_TOO_BIG, Endpoint, FlowRef, Half, Tuple};

use crate::flows::{find, is_live, tell};
use crate::headers::{
    self, IPPROTO_TCP, IPV4_HEADER, IPV6_HEADER, is_before, is_port_watched, load, mapped,
};
use crate::{RECORDS, count};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
/// Type, code, checksum, two unused bytes, size of the next link (RFC 1191, section 4); in IPv6
/// the size has all four bytes (RFC 4443, section 3.2).
const ICMP_HEADER: u32 = 8;
/// Type 3: destination unreachable; code 4: fragmentation needed and DF set.
const FRAGMENTATION_NEEDED: [u8; 2] = [3, 4];
/// Type 2, code 0.
const PACKET_TOO_BIG: [u8; 2] = [2, 0];
const PACKET_HOST: u32 = 0;

/// The quoted segment, as far as it matters.
struct Quote {
    /// As segments from the other direction arrive.
    tuple: Tuple,
    sequence: u32,
    /// What the router says that would fit, in bytes from the IP header on.
    mtu: u32,
}

/// Looks whether the packet, which is ICMP, is such a message and tells the loader. The packet itself goes its way.
#[inline(never)]
pub fn listen(skb: *mut __sk_buff) -> i32 {
    // SAFETY: the context is the kernel's, alive for the whole run of the program.
    let (protocol, kind) = unsafe { ((*skb).protocol, (*skb).pkt_type) };
    if kind != PACKET_HOST {
        return 0;
    }
    let mut quote = Quote {
        tuple: Tuple {
            source: Endpoint { address: [0; 16], port: 0 },
            destination: Endpoint { address: [0; 16], port: 0 },
        },
        sequence: 0,
        mtu: 0,
    };
    // There are few of them, so none is looked at twice.
    headers::gather(skb);
    let is_quote = match u16::from_be(protocol as u16) {
        ETH_P_IP => quoted_ipv4(skb, &mut quote),
        ETH_P_IPV6 => quoted_ipv6(skb, &mut quote),
        _ => false,
    };
    if is_quote {
        heed(&quote);
    }
    0
}

#[inline(always)]
fn quoted_ipv4(skb: *mut __sk_buff, quote: &mut Quote) -> bool {
    let Some(outer) = load::<IPV4_HEADER>(skb, 0) else {
        return false;
    };
    let message = u32::from(outer[0] & 0x0f) * 4;
    let Some(icmp) = load::<{ ICMP_HEADER as usize }>(skb, message) else {
        return false;
    };
    let Some(inner) = load::<IPV4_HEADER>(skb, message + ICMP_HEADER) else {
        return false;
    };
    // The quote has no options: what we rewrite has none.
    if [icmp[0], icmp[1]] != FRAGMENTATION_NEEDED || inner[0] != 0x45 || inner[9] != IPPROTO_TCP {
        return false;
    }
    quote.mtu = u32::from(u16::from_be_bytes([icmp[6], icmp[7]]));
    quote.tuple.destination.address = mapped([inner[12], inner[13], inner[14], inner[15]]);
    quote.tuple.source.address = mapped([inner[16], inner[17], inner[18], inner[19]]);
    quoted_tcp(skb, message + ICMP_HEADER + IPV4_HEADER as u32, quote)
}

#[inline(always)]
fn quoted_ipv6(skb: *mut __sk_buff, quote: &mut Quote) -> bool {
    let message = IPV6_HEADER as u32;
    let Some(icmp) = load::<{ ICMP_HEADER as usize }>(skb, message) else {
        return false;
    };
    if [icmp[0], icmp[1]] != PACKET_TOO_BIG {
        return false;
    }
    let Some(inner) = load::<IPV6_HEADER>(skb, message + ICMP_HEADER) else {
        return false;
    };
    if inner[6] != IPPROTO_TCP {
        return false;
    }
    quote.mtu = u32::from_be_bytes([icmp[4], icmp[5], icmp[6], icmp[7]]);
    quote.tuple.destination.address.copy_from_slice(&inner[8..24]);
    quote.tuple.source.address.copy_from_slice(&inner[24..40]);
    quoted_tcp(skb, message + ICMP_HEADER + IPV6_HEADER as u32, quote)
}

/// Routers quote eight bytes of the segment at least: ports and sequence number.
#[inline(always)]
fn quoted_tcp(skb: *mut __sk_buff, at: u32, quote: &mut Quote) -> bool {
    let Some(tcp) = load::<8>(skb, at) else {
        return false;
    };
    quote.tuple.destination.port = u16::from_be_bytes([tcp[0], tcp[1]]);
    quote.tuple.source.port = u16::from_be_bytes([tcp[2], tcp[3]]);
    quote.sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    is_port_watched(quote.tuple.source.port) || is_port_watched(quote.tuple.destination.port)
}

#[inline(never)]
fn heed(quote: &Quote) -> i32 {
    let mut flow = FlowRef::default();
    if !find(&quote.tuple, &mut flow) {
        return 0;
    }
    let Some(record) = RECORDS.get_ptr_mut(flow.slot) else {
        return 0;
    };
    if !is_live(record, flow) {
        return 0;
    }
    let side = flow.side();
    // SAFETY: the index is 0 or 1; as in forward::forward.
    let (towards, sender) = unsafe {
        let halves = (&raw const (*record).halves).cast::<Half>();
        (&*halves.add(side), &*halves.add(side ^ 1))
    };
    let sequence = quote.sequence.wrapping_sub(sender.seq_add);
    // Between what was acknowledged and what was sent.
    if is_before(quote.sequence, towards.acked) || !is_before(sequence, sender.sent) {
        return 0;
    }
    count(Counter::TooBig);
    tell(record, flow, EVENT_TOO_BIG, side ^ 1, (sequence, quote.mtu));
    0
}

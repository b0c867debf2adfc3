//! Single segments and ICMP errors for connections that have no socket any more.
//!
//! Kernel facts that this file stands on:
//! - A socket of protocol IPPROTO_RAW sends packets with their IP header as they are, from any
//!   source address (raw(7), ipv6(7); `inet_create` and `inet6_create` set HDRINCL for it). It
//!   receives only packets of protocol 255; a filter that drops all of those keeps its queue
//!   empty.
//! - Of an IPv4 header the kernel still fills in total length, checksum and a zero identification
//!   (raw(7)); of an IPv6 header nothing (`rawv6_send_hdrinc`).
//! - Such packets pass netfilter's OUTPUT and POSTROUTING chains. Where conntrack knows the
//!   connection and translates it, the source must be the address *before* translation, and the
//!   numbers must be ones that conntrack still believes (see
//!   [`Conntrack::refresh`](super::conntrack::Conntrack::refresh)); what it does not believe leaves
//!   untranslated.
//! - RST counts only with exactly the sequence number that its receiver expects next (RFC 5961,
//!   section 3.2); whether its timestamps are old does not matter (RFC 7323, section 5.2).
//! - An ICMP error counts only if the sequence number in it is one of unacknowledged bytes, or the
//!   next one (`tcp_v4_err`, `tcp_v6_err`; RFC 5927, section 4.1).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use proxy_common::flags;
use socket2::{Domain, Protocol, SockAddr, SockFilter, Socket, Type};

/// Bytes of an IPv4 header without options.
const IPV4_HEADER: u16 = 20;
/// Bytes of an IPv6 header.
const IPV6_HEADER: u16 = 40;
/// Hops that a packet may take, as Linux has it.
const HOPS: u8 = 64;
/// IPv4's bit against fragmentation.
const DO_NOT_FRAGMENT: u16 = 1 << 14;

const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Sends segments that no socket of ours would send. Needs CAP_NET_RAW.
#[derive(Debug)]
pub struct Injector {
    v4: Socket,
    /// None on a host without IPv6.
    v6: Option<Socket>,
}

/// One TCP segment without payload. Addresses are as they are on the wire (before translation by
/// netfilter, where it translates the connection); IPv4 may come in IPv6's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Who seems to send it; need not be an address of this host.
    pub source: SocketAddr,
    /// Who gets it.
    pub destination: SocketAddr,
    /// Sequence number.
    pub sequence: u32,
    /// What seems to have been received so far.
    pub acknowledgement: u32,
    /// Receive window, scaled as the connection wants it.
    pub window: u16,
    /// The timestamps option's value and echo reply. A connection that negotiated them wants them
    /// on every segment but RST (RFC 7323, section 3.2).
    pub timestamps: Option<(u32, u32)>,
}

/// A segment that was too big, as its sender sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooBig {
    /// Its sender.
    pub source: SocketAddr,
    /// Whom it was for.
    pub destination: SocketAddr,
    /// Its sequence number.
    pub sequence: u32,
    /// Bytes of the whole packet, IP header included.
    pub length: u32,
}

impl Injector {
    /// Opens the sockets, in the network namespace of this thread.
    ///
    /// # Errors
    /// EPERM: no CAP_NET_RAW. No descriptors left.
    pub fn new() -> io::Result<Self> {
        let v6 = match open(Domain::IPV6) {
            Ok(socket) => Some(socket),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { v4: open(Domain::IPV4)?, v6 })
    }

    /// Sends RST with exactly these numbers.
    ///
    /// # Errors
    /// EAGAIN: the send buffer is full. ENETUNREACH and its like: no route. EPERM: a firewall
    /// dropped it. `InvalidInput`: two families. `Unsupported`: no IPv6 here.
    pub fn reset(&self, segment: &Segment) -> io::Result<()> {
        self.send_segment(segment, flags::RST | flags::ACK)
    }

    /// Sends a bare ACK. With the sequence number before the next one, the receiver answers it at
    /// once if it still has the connection as we think (a keepalive, RFC 9293, section 3.8.4), with
    /// RST if it has no such connection. Linux answers such probes twice a second at most
    /// (net.ipv4.tcp_invalid_ratelimit).
    ///
    /// The timestamp's value must not be older than the last one the receiver saw: recent kernels
    /// (seen on 6.18) drop a bare ACK with an older one without a word
    /// (`tcp_disordered_ack_check`). If that one is not known, leave the option out; Linux answers
    /// all the same.
    ///
    /// # Errors
    /// As of [`Self::reset`].
    pub fn probe(&self, segment: &Segment) -> io::Result<()> {
        self.send_segment(segment, flags::ACK)
    }

    /// Tells `to`, who sent `original`, that the way on takes packets of `mtu` bytes at most, in
    /// the name of `from`: "fragmentation needed" (RFC 1191) or "packet too big" (RFC 8201). Of
    /// `original` it quotes the headers; what is unknown of them is zero, and so is the payload,
    /// which is left out.
    ///
    /// # Errors
    /// As of [`Self::reset`].
    pub fn too_big(
        &self,
        from: IpAddr,
        to: SocketAddr,
        original: &TooBig,
        mtu: u32,
    ) -> io::Result<()> {
        let quoted = Segment {
            source: original.source,
            destination: original.destination,
            sequence: original.sequence,
            acknowledgement: 0,
            window: 0,
            timestamps: None,
        };
        let inner = Ends::new(original.source.ip(), original.destination.ip())?;
        let mut quote = inner.header(TCP, original.length, DO_NOT_FRAGMENT);
        quote.extend(quoted.header(flags::ACK));
        let outer = Ends::new(from, to.ip())?;
        let (protocol, message) = match outer {
            Ends::V4(..) => {
                // The field has 16 bits (RFC 1191, section 4).
                let mtu = mtu.min(u16::MAX.into()).to_be_bytes();
                (ICMP, icmp([3, 4, 0, 0], mtu, &quote, &[]))
            }
            Ends::V6(..) => {
                let pseudo = outer.pseudo_header(ICMPV6, 8 + quote.len());
                (ICMPV6, icmp([2, 0, 0, 0], mtu.to_be_bytes(), &quote, &pseudo))
            }
        };
        self.send(outer, to, protocol, 0, &message)
    }

    fn send_segment(&self, segment: &Segment, flags: u16) -> io::Result<()> {
        let ends = Ends::new(segment.source.ip(), segment.destination.ip())?;
        let mut tcp = segment.header(flags);
        let pseudo = ends.pseudo_header(TCP, tcp.len());
        let sum = checksum(&[&pseudo, &tcp]);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        self.send(ends, segment.destination, TCP, DO_NOT_FRAGMENT, &tcp)
    }

    fn send(
        &self,
        ends: Ends,
        to: SocketAddr,
        protocol: u8,
        fragmenting: u16,
        payload: &[u8],
    ) -> io::Result<()> {
        // Both headers are far shorter than what 32 bits count.
        let length = u32::from(ends.header_length()) + payload.len() as u32;
        let mut packet = ends.header(protocol, length, fragmenting);
        packet.extend(payload);
        let (socket, address) = match (ends, &self.v6) {
            (Ends::V4(_, to), _) => (&self.v4, SocketAddr::V4(SocketAddrV4::new(to, 0))),
            (Ends::V6(_, ip), Some(socket)) => {
                // A link-local address needs its device.
                let scope = if let SocketAddr::V6(to) = to { to.scope_id() } else { 0 };
                (socket, SocketAddr::V6(SocketAddrV6::new(ip, 0, 0, scope)))
            }
            (Ends::V6(..), None) => return Err(io::ErrorKind::Unsupported.into()),
        };
        // Such a socket sends a packet as a whole or not at all.
        socket.send_to(&packet, &SockAddr::from(address)).map(drop)
    }
}

fn open(domain: Domain) -> io::Result<Socket> {
    let protocol = Some(Protocol::from(libc::IPPROTO_RAW));
    let socket = Socket::new(domain, Type::RAW.nonblocking(), protocol)?;
    // BPF_RET with 0: keep no byte, drop the packet.
    socket.attach_filter(&[SockFilter::new(6, 0, 0, 0)])?;
    // The kernel raises it to its minimum.
    socket.set_recv_buffer_size(0)?;
    Ok(socket)
}

impl Segment {
    /// The TCP header, its checksum zero.
    fn header(&self, flags: u16) -> Vec<u8> {
        let words: u16 = if self.timestamps.is_some() { 8 } else { 5 };
        let mut tcp = Vec::with_capacity(usize::from(words) * 4);
        tcp.extend(self.source.port().to_be_bytes());
        tcp.extend(self.destination.port().to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledgement.to_be_bytes());
        tcp.extend((words << 12 | flags).to_be_bytes());
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0; 4]);
        if let Some((value, echo)) = self.timestamps {
            // Laid out as every stack does it (RFC 7323, appendix A).
            tcp.extend([1, 1, 8, 10]);
            tcp.extend(value.to_be_bytes());
            tcp.extend(echo.to_be_bytes());
        }
        tcp
    }
}

/// A packet's two addresses.
#[derive(Debug, Clone, Copy)]
enum Ends {
    V4(Ipv4Addr, Ipv4Addr),
    V6(Ipv6Addr, Ipv6Addr),
}

impl Ends {
    fn new(source: IpAddr, destination: IpAddr) -> io::Result<Self> {
        match (source.to_canonical(), destination.to_canonical()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => Ok(Self::V4(source, destination)),
            (IpAddr::V6(source), IpAddr::V6(destination)) => Ok(Self::V6(source, destination)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "addresses of two families")),
        }
    }

    fn header_length(self) -> u16 {
        match self {
            Self::V4(..) => IPV4_HEADER,
            Self::V6(..) => IPV6_HEADER,
        }
    }

    /// An IP header for a packet of `length` bytes in all.
    fn header(self, protocol: u8, length: u32, fragmenting: u16) -> Vec<u8> {
        let field = |length: u32| u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes();
        let mut header = Vec::with_capacity(128);
        match self {
            Self::V4(source, destination) => {
                header.extend([0x45, 0]);
                header.extend(field(length));
                header.extend([0, 0]);
                header.extend(fragmenting.to_be_bytes());
                header.extend([HOPS, protocol, 0, 0]);
                header.extend(source.octets());
                header.extend(destination.octets());
                let sum = checksum(&[&header]);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            Self::V6(source, destination) => {
                header.extend([0x60, 0, 0, 0]);
                header.extend(field(length.saturating_sub(IPV6_HEADER.into())));
                header.extend([protocol, HOPS]);
                header.extend(source.octets());
                header.extend(destination.octets());
            }
        }
        header
    }

    /// What the checksums of TCP and ICMPv6 cover beside the payload (RFC 9293, section 3.1; RFC
    /// 8200, section 8.1).
    fn pseudo_header(self, protocol: u8, length: usize) -> Vec<u8> {
        let mut pseudo = Vec::with_capacity(40);
        match self {
            Self::V4(source, destination) => {
                pseudo.extend(source.octets());
                pseudo.extend(destination.octets());
            }
            Self::V6(source, destination) => {
                pseudo.extend(source.octets());
                pseudo.extend(destination.octets());
            }
        }
        // IPv4's form has 16 bits for the length and one byte less for zeros: the same sum.
        pseudo.extend((length as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, protocol]);
        pseudo
    }
}

/// An ICMP message: type, code and a zero checksum, then four bytes that depend on the type, then
/// a quote.
fn icmp(start: [u8; 4], rest: [u8; 4], quote: &[u8], pseudo_header: &[u8]) -> Vec<u8> {
    let mut message = [start, rest].concat();
    message.extend(quote);
    let sum = checksum(&[pseudo_header, &message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// The Internet checksum (RFC 1071) of `parts` one after the other, each of even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u64;
    for part in parts {
        debug_assert_eq!(part.len() % 2, 0);
        for pair in part.chunks_exact(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], pair[1]]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_known_one() {
        // The header that RFC 1071's readers know from Wikipedia's example.
        let header = [
            0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0x00, 0x00, 0xc0, 0xa8,
            0x00, 0x01, 0xc0, 0xa8, 0x00, 0xc7,
        ];
        assert_eq!(checksum(&[&header]), 0xb861);
        assert_eq!(checksum(&[&header[..10], &header[10..]]), 0xb861);
        assert_eq!(checksum(&[&[0xff; 200], &[0xff; 40]]), 0);
    }

    #[test]
    fn both_families_in_one_packet_are_refused() {
        assert!(Ends::new(Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()).is_err());
        let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
        let ends = Ends::new(mapped.into(), Ipv4Addr::LOCALHOST.into()).expect("one family");
        assert!(matches!(ends, Ends::V4(..)));
    }

    #[test]
    fn a_length_that_has_no_room_is_not_cut_to_a_small_one() {
        let ends = Ends::V4(Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST);
        assert_eq!(ends.header(TCP, 0x1_0001, 0)[2..4], [0xff, 0xff]);
    }
}

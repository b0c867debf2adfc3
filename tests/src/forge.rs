//! TCP segments made by hand, sent from a host in anybody's name.

use std::mem::size_of;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::netns::Host;

/// FIN.
pub const FIN: u8 = 0x01;
/// SYN.
pub const SYN: u8 = 0x02;
/// RST.
pub const RST: u8 = 0x04;
/// PSH.
pub const PSH: u8 = 0x08;
/// ACK.
pub const ACK: u8 = 0x10;

const TCP: u8 = 6;
const HEADER: usize = 20;

/// A segment. Both addresses are of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// In whose name.
    pub source: SocketAddr,
    /// To whom.
    pub destination: SocketAddr,
    /// Sequence number of the first byte (or of SYN or FIN).
    pub seq: u32,
    /// The next expected byte; without meaning unless ACK is set.
    pub ack: u32,
    /// Such as [`RST`] | [`ACK`].
    pub flags: u8,
    /// As in the header, not scaled.
    pub window: u16,
    /// Options as they are sent; padded to words with zeros (end of options).
    pub options: Vec<u8>,
    /// Data.
    pub payload: Vec<u8>,
}

impl Segment {
    /// A segment without options and data.
    #[must_use]
    pub fn new(source: SocketAddr, destination: SocketAddr, flags: u8) -> Self {
        let (options, payload) = (Vec::new(), Vec::new());
        Self { source, destination, seq: 0, ack: 0, flags, window: 1024, options, payload }
    }

    /// With these numbers.
    #[must_use]
    pub fn numbers(self, seq: u32, ack: u32) -> Self {
        Self { seq, ack, ..self }
    }

    /// With these data.
    #[must_use]
    pub fn payload(self, payload: &[u8]) -> Self {
        Self { payload: payload.to_vec(), ..self }
    }

    /// The whole packet, IP's header first, checksums right.
    ///
    /// # Panics
    /// The addresses are of two families, or it is too large.
    #[track_caller]
    #[must_use]
    pub fn packet(&self) -> Vec<u8> {
        let segment = self.segment();
        let len = u16::try_from(segment.len()).expect("fits a packet");
        let mut packet = match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let total = (len + HEADER as u16).to_be_bytes();
                // Version and length, total length, not a fragment (DF), TTL 64.
                let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, TCP, 0, 0];
                header.extend(source.octets());
                header.extend(destination.octets());
                let sum = (!sum(0, &header)).to_be_bytes();
                header[10..12].copy_from_slice(&sum);
                header
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let len = len.to_be_bytes();
                let mut header = vec![0x60, 0, 0, 0, len[0], len[1], TCP, 64];
                header.extend(source.octets());
                header.extend(destination.octets());
                header
            }
            (source, destination) => panic!("{source} and {destination} are of two families"),
        };
        packet.extend(segment);
        packet
    }

    /// TCP's header and data.
    fn segment(&self) -> Vec<u8> {
        let words = HEADER / 4 + self.options.len().div_ceil(4);
        let mut bytes = Vec::new();
        bytes.extend(self.source.port().to_be_bytes());
        bytes.extend(self.destination.port().to_be_bytes());
        bytes.extend(self.seq.to_be_bytes());
        bytes.extend(self.ack.to_be_bytes());
        bytes.extend([(words as u8) << 4, self.flags]);
        bytes.extend(self.window.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&self.options);
        bytes.resize(words * 4, 0);
        bytes.extend(&self.payload);
        let pseudo = match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => sum(sum(0, &a.octets()), &b.octets()),
            (IpAddr::V6(a), IpAddr::V6(b)) => sum(sum(0, &a.octets()), &b.octets()),
            _ => 0,
        };
        let rest = [0, TCP, (bytes.len() >> 8) as u8, bytes.len() as u8];
        let checksum = !sum(sum(pseudo, &rest), &bytes);
        bytes[16..18].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }

    /// Sends it from `host`, by that host's routes.
    ///
    /// # Panics
    /// The kernel refuses (no route, for example).
    #[track_caller]
    pub fn send_from(&self, host: &Host) {
        let (packet, destination) = (self.packet(), self.destination.ip());
        let sent = host.run(move || {
            // IPPROTO_RAW: the packet has its IP header already, for both families.
            let domain = if destination.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
            let protocol = Protocol::from(libc::IPPROTO_RAW);
            let socket = Socket::new(domain, Type::RAW.cloexec(), Some(protocol))?;
            socket.send_to(&packet, &SockAddr::from(SocketAddr::new(destination, 0)))
        });
        if let Err(error) = sent {
            panic!("sending {self:?} from {}: {error}", host.name());
        }
    }

    /// Puts it on `device` of `host` as it is, to Ethernet address `to`: past the host's routes, so
    /// also to a wrong neighbour.
    ///
    /// # Panics
    /// There is no such device.
    #[track_caller]
    pub fn put_on(&self, host: &Host, device: &str, to: [u8; 6]) {
        let kind = if self.destination.is_ipv4() { libc::ETH_P_IP } else { libc::ETH_P_IPV6 };
        let (packet, device) = (self.packet(), device.to_owned());
        let sent = host.run(move || {
            let address = link_address(&device, kind as u16, to)?;
            let socket = Socket::new(Domain::PACKET, Type::DGRAM.cloexec(), None)?;
            // SAFETY: the buffer and the address live until the call returns, and their sizes are
            // their own.
            let sent = unsafe {
                libc::sendto(
                    socket.as_raw_fd(),
                    packet.as_ptr().cast(),
                    packet.len(),
                    0,
                    (&raw const address).cast(),
                    size_of::<libc::sockaddr_ll>() as libc::socklen_t,
                )
            };
            if sent < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
        if let Err(error) = sent {
            panic!("putting {self:?} on a device of {}: {error}", host.name());
        }
    }
}

/// Sends from `host` what a router would say of `segment` in the name of whom it is for: the way on
/// takes `mtu` bytes at most.
///
/// # Panics
/// The kernel refuses.
#[track_caller]
pub fn too_big(host: &Host, segment: &Segment, mtu: u16) {
    let (to, from) = (segment.source.ip(), segment.destination.ip());
    let packet = segment.packet();
    let [high, low] = mtu.to_be_bytes();
    let (mut message, pseudo, protocol, domain) = match (from, to) {
        (IpAddr::V4(_), _) => (vec![3, 4, 0, 0, 0, 0, high, low], 0, 1, Domain::IPV4),
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let quote = &packet[..packet.len().min(600)];
            let length = (8 + quote.len()) as u16;
            let rest = [0, 58, (length >> 8) as u8, length as u8];
            let pseudo = sum(sum(sum(0, &from.octets()), &to.octets()), &rest);
            (vec![2, 0, 0, 0, 0, 0, high, low], pseudo, 58, Domain::IPV6)
        }
        _ => panic!("{from} and {to} are of two families"),
    };
    message.extend(&packet[..packet.len().min(600)]);
    let checksum = (!sum(pseudo, &message)).to_be_bytes();
    message[2..4].copy_from_slice(&checksum);
    let sent = host.run(move || {
        let socket = Socket::new(domain, Type::RAW.cloexec(), Some(Protocol::from(protocol)))?;
        // Otherwise the kernel would take it for its own choice among several addresses.
        socket.bind(&SockAddr::from(SocketAddr::new(from, 0)))?;
        socket.send_to(&message, &SockAddr::from(SocketAddr::new(to, 0)))
    });
    if let Err(error) = sent {
        panic!("sending a router's words from {}: {error}", host.name());
    }
}

/// The address of packet sockets for `device` of this thread's host.
pub(crate) fn link_address(
    device: &str,
    kind: u16,
    to: [u8; 6],
) -> std::io::Result<libc::sockaddr_ll> {
    let name = std::ffi::CString::new(device)?;
    // SAFETY: the name is a string that ends with zero and lives until the call returns.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(std::io::Error::last_os_error());
    }
    let mut address = [0; 8];
    address[..6].copy_from_slice(&to);
    Ok(libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: kind.to_be(),
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: address,
    })
}

/// The Internet checksum's sum (RFC 1071) over `bytes`, going on from `sum`.
fn sum(sum: u16, bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| u32::from(*b)));
    let mut total = u32::from(sum) + words.sum::<u32>();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::Wire;
    use crate::peers::Peer;
    use crate::servers::Upstream;
    use crate::sniff::{Sniffer, Way};

    /// A host's answer shows that it took the segment for a real one: checksums are right.
    #[test]
    fn forged_segments_are_believed() {
        let (one, two) = (Host::new("one"), Host::new("two"));
        let wire = one.join(&two, 12);
        for ip in [Wire::v4 as fn(Wire, u8) -> IpAddr, Wire::v6] {
            let (here, there) = (ip(wire, 1), ip(wire, 2));
            let upstream = two.run(move || Upstream::new(there));
            let to = upstream.address();
            let client = one.run(move || Peer::connect(to));
            let server = upstream.accept();
            let sniffer = Sniffer::start(&one, &wire.device());
            client.send(b"x");
            server.receive(b"x");
            let seen = sniffer.await_segment("the byte", |s| s.way == Way::Out && s.len == 1);
            assert_eq!((seen.source, seen.destination), (client.address(), to));

            // To a port that nobody has: RST, with the numbers that it must have.
            let closed = SocketAddr::new(there, 9);
            let source = SocketAddr::new(here, 999);
            Segment::new(source, closed, SYN).numbers(7_000, 0).send_from(&one);
            let answer = sniffer.await_segment("RST", |s| s.flags & RST != 0);
            assert_eq!((answer.source, answer.destination), (closed, source));
            assert_eq!(answer.ack, 7_001);

            // In the client's name, with the number that the server expects: the end.
            let rst = Segment::new(client.address(), to, RST).numbers(seen.seq + 1, 0);
            rst.send_from(&one);
            server.expect_reset();
            let all = sniffer.stop();
            assert!(all.iter().any(|s| s.flags & RST != 0 && s.way == Way::Out), "{all:?}");
        }
    }

    #[test]
    fn a_segment_put_on_a_device_passes_it() {
        let (one, two) = (Host::new("one"), Host::new("two"));
        let wire = one.join(&two, 12);
        let sniffer = Sniffer::start(&two, &wire.device());
        let [from, to] = [1, 2].map(|end| SocketAddr::new(wire.v6(end), 77));
        let segment = Segment::new(from, to, PSH | ACK).numbers(1, 2).payload(b"data");
        segment.put_on(&one, &wire.device(), [2, 0, 0, 0, 0, 1]);
        let seen = sniffer.await_segment("it", |s| s.len == 4);
        assert_eq!((seen.seq, seen.ack, seen.flags, seen.way), (1, 2, PSH | ACK, Way::Past));
    }
}

//! What netfilter's connection tracking thinks of a connection, over ctnetlink.
//!
//! A switched connection's segments no longer pass conntrack. Its entry must not expire while the
//! connection lives: without it the host would no longer translate what goes the ordinary way
//! again (segments that we inject, ICMP errors), and a service's entry may count for others. And
//! it should go when the connection does.
//!
//! Message layout: linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h; numbers in attributes are
//! big-endian, netlink's own headers are in the host's order. The kernel answers before sendto(2)
//! returns, so nothing here waits.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use socket2::SockRef;

/// Messages of the conntrack subsystem.
const SET: u16 = libc::NFNL_SUBSYS_CTNETLINK as u16 * 256;
const GET: u16 = SET + 1;
const DELETE: u16 = SET + 2;

const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL_INFO: u16 = 4;
const TIMEOUT: u16 = 7;
/// Within a tuple.
const ADDRESSES: u16 = 1;
const PORTS: u16 = 2;
/// Within addresses.
const V4_SOURCE: u16 = 1;
const V4_DESTINATION: u16 = 2;
const V6_SOURCE: u16 = 3;
const V6_DESTINATION: u16 = 4;
/// Within ports.
const PROTOCOL: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
/// Within protocol information, and then within that of TCP.
const INFO_TCP: u16 = 1;
const TCP_FLAGS_ORIGINAL: u16 = 4;
const TCP_FLAGS_REPLY: u16 = 5;
/// IP_CT_TCP_FLAG_BE_LIBERAL: segments outside the window are believed.
const BE_LIBERAL: u8 = 8;
/// IPS_SRC_NAT and IPS_DST_NAT.
const STATUS_NAT: u32 = 1 << 4 | 1 << 5;

/// NLA_F_NESTED, and all bits of an attribute's type that are not its number.
const NESTED: u16 = 1 << 15;
const TYPE_FLAGS: u16 = 3 << 14;

const NETLINK_HEADER: usize = 16;
const NETFILTER_HEADER: usize = 4;

/// SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST have one number.
const ORIGINAL_DESTINATION: libc::c_int = libc::SO_ORIGINAL_DST;

/// A socket to ctnetlink of the network namespace it was opened in. Needs CAP_NET_ADMIN.
#[derive(Debug)]
pub struct Conntrack {
    socket: OwnedFd,
    sequence: u32,
}

/// One direction of a TCP connection, as its segments carry it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    /// Who sends.
    pub source: SocketAddr,
    /// Who receives.
    pub destination: SocketAddr,
}

/// What conntrack knows of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Segments in the direction of the first one, before translation.
    pub original: Tuple,
    /// Answers, before they are translated back.
    pub reply: Tuple,
    /// When it goes if no segment is seen until then; whole seconds. Zero if the kernel does not
    /// tell (an entry that is offloaded or about to go).
    pub timeout: Duration,
    /// Whether addresses or ports are translated.
    pub is_translated: bool,
}

impl Tuple {
    /// The other direction, if nothing is translated.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self { source: self.destination, destination: self.source }
    }
}

impl Conntrack {
    /// Opens the socket and asks for something that cannot be; `None` where the kernel has no
    /// ctnetlink, so where there is nothing to look after (or no way to).
    ///
    /// # Errors
    /// EPERM: no CAP_NET_ADMIN. No descriptors left.
    pub fn open() -> io::Result<Option<Self>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let kind = SocketType::RAW;
        let opened = rustix::net::socket_with(AddressFamily::NETLINK, kind, flags, Some(NETFILTER));
        let socket = match opened {
            Ok(socket) => socket,
            Err(rustix::io::Errno::PROTONOSUPPORT | rustix::io::Errno::AFNOSUPPORT) => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        rustix::net::connect(&socket, &SocketAddrNetlink::new(0, 0))?;
        let mut conntrack = Self { socket, sequence: 0 };
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        match conntrack.find(nowhere, nowhere) {
            Ok(_) => Ok(Some(conntrack)),
            // nfnetlink has no such subsystem (`nfnetlink_rcv_msg`).
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The entry that has `source` and `destination` as its original or as its reply tuple: the
    /// kernel keeps both in one table. Entries in conntrack zones are not found.
    ///
    /// # Errors
    /// `InvalidInput`: two families. Those of the kernel.
    pub fn find(
        &mut self,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> io::Result<Option<Entry>> {
        let (family, tuple) = tuple_attribute(Tuple { source, destination })?;
        match self.ask(GET, 0, family, &tuple) {
            Ok(Some(attributes)) => {
                let malformed = || io::Error::from(io::ErrorKind::InvalidData);
                parse_entry(&attributes).map(Some).ok_or_else(malformed)
            }
            Ok(None) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Lets the entry of `tuple` (either of its two) live for `timeout` from now, in whole seconds.
    /// It also makes conntrack believe segments outside of what it takes for the windows: it has
    /// not seen what passed meanwhile, and what it does not believe is not translated. False
    /// if there is no entry.
    ///
    /// # Errors
    /// EPERM: the entry has a fixed timeout. Others as of [`Self::find`].
    pub fn refresh(&mut self, tuple: Tuple, timeout: Duration) -> io::Result<bool> {
        let (family, mut attributes) = tuple_attribute(tuple)?;
        let seconds = u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX);
        put(&mut attributes, TIMEOUT, &seconds.to_be_bytes());
        put_nested(&mut attributes, PROTOCOL_INFO, |info| {
            put_nested(info, INFO_TCP, |tcp| {
                // struct nf_ct_tcp_flags: the flags, and which of them are meant.
                put(tcp, TCP_FLAGS_ORIGINAL, &[BE_LIBERAL, BE_LIBERAL]);
                put(tcp, TCP_FLAGS_REPLY, &[BE_LIBERAL, BE_LIBERAL]);
            });
        });
        self.order(SET, family, &attributes)
    }

    /// Removes the entry of `tuple` (either of its two). False if there is none.
    ///
    /// # Errors
    /// As of [`Self::find`].
    pub fn delete(&mut self, tuple: Tuple) -> io::Result<bool> {
        let (family, attributes) = tuple_attribute(tuple)?;
        self.order(DELETE, family, &attributes)
    }

    fn order(&mut self, message: u16, family: u8, attributes: &[u8]) -> io::Result<bool> {
        match self.ask(message, libc::NLM_F_ACK as u16, family, attributes) {
            Ok(_) => Ok(true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends one request. The attributes of the answer; `None` for a mere acknowledgement.
    fn ask(
        &mut self,
        message: u16,
        flags: u16,
        family: u8,
        attributes: &[u8],
    ) -> io::Result<Option<Vec<u8>>> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = NETLINK_HEADER + NETFILTER_HEADER + attributes.len();
        let mut request = Vec::with_capacity(length);
        // A request is some hundred bytes at most.
        request.extend((length as u32).to_ne_bytes());
        request.extend(message.to_ne_bytes());
        request.extend((flags | libc::NLM_F_REQUEST as u16).to_ne_bytes());
        request.extend(self.sequence.to_ne_bytes());
        request.extend(0_u32.to_ne_bytes());
        request.extend([family, libc::NFNETLINK_V0 as u8, 0, 0]);
        request.extend(attributes);
        rustix::net::send(&self.socket, &request, SendFlags::empty())?;
        loop {
            let mut buffer = [MaybeUninit::uninit(); 8192];
            let ((bytes, _), _) =
                rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            if let Some(answer) = parse_answers(bytes, self.sequence)? {
                return Ok(answer);
            }
        }
    }
}

/// Where the client of an accepted socket wanted to, before this host's netfilter sent it here.
/// `None` if it wanted here (or to an address that the kernel cannot tell: no conntrack).
///
/// # Errors
/// Those of getsockname(2) and, but for the said cases, getsockopt(2).
pub fn original_destination(socket: impl AsFd) -> io::Result<Option<SocketAddr>> {
    let local = SockRef::from(&socket).local_addr()?.as_socket();
    let Some(local) = local.map(canonical) else { return Ok(None) };
    let level = if local.is_ipv4() { libc::SOL_IP } else { libc::SOL_IPV6 };
    // SAFETY: the closure tells the kernel how much room there is; it fills in a `sockaddr_in` or a
    // `sockaddr_in6` with its family, and says how long it is.
    let asked = unsafe {
        socket2::SockAddr::try_init(|storage, length| {
            let fd = socket.as_fd().as_raw_fd();
            let result = libc::getsockopt(fd, level, ORIGINAL_DESTINATION, storage.cast(), length);
            if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        })
    };
    match asked {
        Ok(((), address)) => {
            Ok(address.as_socket().map(canonical).filter(|address| *address != local))
        }
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOPROTOOPT)) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// IPv4 in its own form, and nothing but address and port.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn is_absent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

/// Looks through a datagram. `None`: nothing in it belongs to request `sequence`.
fn parse_answers(mut bytes: &[u8], sequence: u32) -> io::Result<Option<Option<Vec<u8>>>> {
    let malformed = || io::Error::from(io::ErrorKind::InvalidData);
    while bytes.len() >= NETLINK_HEADER {
        let length = u32::from_ne_bytes(array(bytes, 0).ok_or_else(malformed)?) as usize;
        let kind = u16::from_ne_bytes(array(bytes, 4).ok_or_else(malformed)?);
        let answers = u32::from_ne_bytes(array(bytes, 8).ok_or_else(malformed)?);
        let body = bytes.get(NETLINK_HEADER..length).ok_or_else(malformed)?;
        if answers == sequence {
            if i32::from(kind) != libc::NLMSG_ERROR {
                let attributes = body.get(NETFILTER_HEADER..).ok_or_else(malformed)?;
                return Ok(Some(Some(attributes.to_vec())));
            }
            return match i32::from_ne_bytes(array(body, 0).ok_or_else(malformed)?) {
                0 => Ok(Some(None)),
                error => Err(io::Error::from_raw_os_error(-error)),
            };
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(None)
}

fn parse_entry(attributes: &[u8]) -> Option<Entry> {
    let original = parse_tuple(find(attributes, TUPLE_ORIGINAL)?)?;
    let reply = parse_tuple(find(attributes, TUPLE_REPLY)?)?;
    let number = |kind| Some(u32::from_be_bytes(array(find(attributes, kind)?, 0)?));
    let status = number(STATUS).unwrap_or(0);
    Some(Entry {
        original,
        reply,
        timeout: Duration::from_secs(number(TIMEOUT).unwrap_or(0).into()),
        is_translated: status & STATUS_NAT != 0 || reply != original.reversed(),
    })
}

fn parse_tuple(tuple: &[u8]) -> Option<Tuple> {
    let addresses = find(tuple, ADDRESSES)?;
    let address = |v4, v6| -> Option<IpAddr> {
        if let Some(ip) = find(addresses, v4) {
            return array::<4>(ip, 0).map(IpAddr::from);
        }
        array::<16>(find(addresses, v6)?, 0).map(IpAddr::from)
    };
    let ports = find(tuple, PORTS)?;
    let port = |kind| Some(u16::from_be_bytes(array(find(ports, kind)?, 0)?));
    Some(Tuple {
        source: SocketAddr::new(address(V4_SOURCE, V6_SOURCE)?, port(SOURCE_PORT)?),
        destination: SocketAddr::new(
            address(V4_DESTINATION, V6_DESTINATION)?,
            port(DESTINATION_PORT)?,
        ),
    })
}

/// The payload of the first attribute of type `kind`.
fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(array(attributes, 0)?));
        let found = u16::from_ne_bytes(array(attributes, 2)?) & !TYPE_FLAGS;
        let payload = attributes.get(4..length)?;
        if found == kind {
            return Some(payload);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// The family, and an attribute that names the entry by one of its tuples: the kernel takes it for
/// either (`nf_conntrack_find_get`).
fn tuple_attribute(tuple: Tuple) -> io::Result<(u8, Vec<u8>)> {
    let (source, destination) = (canonical(tuple.source), canonical(tuple.destination));
    let mut ip = Vec::new();
    let family = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            put(&mut ip, V4_SOURCE, &source.octets());
            put(&mut ip, V4_DESTINATION, &destination.octets());
            libc::AF_INET
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            put(&mut ip, V6_SOURCE, &source.octets());
            put(&mut ip, V6_DESTINATION, &destination.octets());
            libc::AF_INET6
        }
        _ => {
            let what = "addresses of two families";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
    };
    let mut attributes = Vec::new();
    put_nested(&mut attributes, TUPLE_ORIGINAL, |tuple| {
        put(tuple, ADDRESSES | NESTED, &ip);
        put_nested(tuple, PORTS, |ports| {
            put(ports, PROTOCOL, &[libc::IPPROTO_TCP as u8]);
            put(ports, SOURCE_PORT, &source.port().to_be_bytes());
            put(ports, DESTINATION_PORT, &destination.port().to_be_bytes());
        });
    });
    // Both families are below 256.
    Ok((family as u8, attributes))
}

fn put(attributes: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    // No attribute here has more than a hundred bytes.
    attributes.extend((4 + payload.len() as u16).to_ne_bytes());
    attributes.extend(kind.to_ne_bytes());
    attributes.extend(payload);
    attributes.resize(attributes.len().next_multiple_of(4), 0);
}

fn put_nested(attributes: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    fill(&mut inner);
    put(attributes, kind | NESTED, &inner);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn a_tuple_survives_the_way_through_attributes() {
        for (source, destination) in
            [("10.0.0.1:1", "10.0.0.2:65535"), ("[fd00::1]:40000", "[fd00::2]:443")]
        {
            let tuple = Tuple { source: address(source), destination: address(destination) };
            let (_, attributes) = tuple_attribute(tuple).expect("one family");
            let payload = find(&attributes, TUPLE_ORIGINAL).expect("there");
            assert_eq!(parse_tuple(payload), Some(tuple));
            assert_eq!(find(&attributes, TUPLE_REPLY), None);
        }
    }

    #[test]
    fn ipv4_in_the_form_of_ipv6_is_ipv4() {
        let mapped = address("[::ffff:10.0.0.1]:1");
        let tuple = Tuple { source: mapped, destination: address("10.0.0.2:2") };
        let (family, attributes) = tuple_attribute(tuple).expect("one family");
        assert_eq!(i32::from(family), libc::AF_INET);
        let parsed = parse_tuple(find(&attributes, TUPLE_ORIGINAL).expect("there"));
        assert_eq!(parsed.map(|tuple| tuple.source), Some(address("10.0.0.1:1")));
    }

    #[test]
    fn what_is_cut_off_is_no_entry() {
        let tuple = Tuple { source: address("10.0.0.1:1"), destination: address("10.0.0.2:2") };
        let (_, mut attributes) = tuple_attribute(tuple).expect("one family");
        let original = find(&attributes, TUPLE_ORIGINAL).expect("there").to_vec();
        put(&mut attributes, TUPLE_REPLY | NESTED, &original);
        put(&mut attributes, TIMEOUT, &7_u32.to_be_bytes());
        let entry = parse_entry(&attributes).expect("whole");
        assert!(entry.is_translated, "the reply is not the reverse");
        assert_eq!(entry.timeout, Duration::from_secs(7));
        let both = attributes.len() - 8;
        for length in 0..both {
            assert_eq!(parse_entry(&attributes[..length]), None, "{length}");
        }
        // An attribute that claims to be shorter than its own header ends the search.
        assert_eq!(find(&[0; 64], TUPLE_ORIGINAL), None);
    }

    #[test]
    fn an_answer_to_an_earlier_request_is_passed_over() {
        let mut late = Vec::new();
        for field in [20_u32, libc::NLMSG_ERROR as u32, 1, 0, 0] {
            late.extend(field.to_ne_bytes());
        }
        assert!(matches!(parse_answers(&late, 2), Ok(None)));
        assert!(matches!(parse_answers(&late, 1), Ok(Some(None))));
        late[16..20].copy_from_slice(&(-libc::ENOENT).to_ne_bytes());
        assert!(is_absent(&parse_answers(&late, 1).expect_err("an error")));
        assert!(parse_answers(&late[..18], 1).is_err());
    }
}

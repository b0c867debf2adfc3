//! What the tc program tells about the segments of a TCP handshake.

use core::mem::{offset_of, size_of};

use crate::options::{OptionsBuffer, TcpOptions};

/// One end of a connection. IPv4 addresses are written as v4-mapped IPv6 ones, so that a
/// dual-stack listener needs one kind of key.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Endpoint {
    /// In network order; all zero in a watched endpoint means every address.
    pub address: [u8; 16],
    /// TCP port.
    pub port: u16,
}

/// Names a connection: in the map of handshakes by who opened it and who was asked, in the map of
/// flows by who sends the segment and to whom.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Tuple {
    /// Who sent the SYN, or the segment.
    pub source: Endpoint,
    /// To whom.
    pub destination: Endpoint,
}

/// Value of a watched endpoint: a listener in this network namespace.
pub const WATCH_LOCAL: u32 = 1;
/// Value of a watched endpoint: somebody whom this network namespace connects to.
pub const WATCH_REMOTE: u32 = 2;

/// [`Handshake::step`]: the client asks.
pub const STEP_SYN: u8 = 1;
/// [`Handshake::step`]: the server answers.
pub const STEP_SYN_ACK: u8 = 2;
/// [`Handshake::step`]: the client's first segment that acknowledges the answer, bare or not.
pub const STEP_ACK: u8 = 3;

/// [`Handshake::hook`]: seen as it arrived from the device.
pub const HOOK_INGRESS: u8 = 1;
/// [`Handshake::hook`]: seen as it left for the device.
pub const HOOK_EGRESS: u8 = 2;

/// Bits of [`Handshake::flags`], RFC 9293 and (AE) RFC 9768.
pub mod flags {
    /// The sender will send no more.
    pub const FIN: u16 = 1 << 0;
    /// Sequence numbers begin.
    pub const SYN: u16 = 1 << 1;
    /// The connection is aborted.
    pub const RST: u16 = 1 << 2;
    /// The acknowledgement number counts.
    pub const ACK: u16 = 1 << 4;
    /// ECN echo; on a SYN: the sender offers ECN.
    pub const ECE: u16 = 1 << 6;
    /// Congestion window reduced; on a SYN: the sender offers ECN.
    pub const CWR: u16 = 1 << 7;
    /// Accurate ECN; on a SYN together with ECE and CWR: the sender offers it.
    pub const AE: u16 = 1 << 8;
}

/// One segment of a handshake.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handshake {
    /// When the program saw it: nanoseconds of CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// Its sender.
    pub source: Endpoint,
    /// Its receiver.
    pub destination: Endpoint,
    /// Device whose hook saw it.
    pub ifindex: u32,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number; means nothing on a SYN.
    pub acknowledgement: u32,
    /// The options that a relay must translate or compare.
    pub options: TcpOptions,
    /// Announced window, before scaling; on SYN and SYN-ACK it is never scaled.
    pub window: u16,
    /// All twelve flag bits; see [`flags`].
    pub flags: u16,
    /// One of the `STEP_` constants.
    pub step: u8,
    /// One of the `HOOK_` constants.
    pub hook: u8,
    /// 4 or 6.
    pub family: u8,
    /// DSCP and ECN bits of the IP header.
    pub traffic_class: u8,
    /// Bytes of [`Self::raw_options`] that the segment had.
    pub raw_options_len: u8,
    /// The options as they came, for kinds that [`TcpOptions`] does not know (MPTCP, Fast Open,
    /// Accurate ECN: their mere presence decides). Bytes past the length are zero.
    pub raw_options: OptionsBuffer,
    /// Named, so that every byte of the record is written.
    pub padding: [u8; 7],
}

/// A handshake whose answer was seen: what the client's next segment will carry.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pending {
    /// Sequence number of the client's first byte.
    pub sequence: u32,
    /// Sequence number of the server's first byte, which the client acknowledges.
    pub acknowledgement: u32,
    /// Bit `1 << hook` for each hook that has reported the completing segment.
    pub reported: u32,
}

/// One side of a handshake: what its SYN or SYN-ACK said.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Opening {
    /// Sequence number of the SYN; the first byte has the next one.
    pub sequence: u32,
    /// The options that a relay must translate or compare.
    pub options: TcpOptions,
    /// Announced window; never scaled here.
    pub window: u16,
    /// All twelve flag bits; see [`flags`].
    pub flags: u16,
}

/// [`Seen::state`]: the client has asked.
pub const SEEN_SYN: u32 = 1;
/// [`Seen::state`]: the server has answered what the client asked. That the client has taken this
/// answer is what its socket, or ours, being established says.
pub const SEEN_SYN_ACK: u32 = 2;

/// A handshake as the programs saw it go by.
///
/// A later SYN for the same tuple starts it over. A forged one can therefore keep a connection
/// from being switched, but not bring wrong numbers in: nobody answers it with a SYN-ACK.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seen {
    /// One of the `SEEN_` constants.
    pub state: u32,
    /// Device on which the peer's part of the handshake arrived.
    pub ifindex: u32,
    /// Who opened the connection.
    pub client: Opening,
    /// Who was asked.
    pub server: Opening,
}

/// Things that the program counts. The value is the index into the map.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counter {
    /// A handshake segment went by without an event: the ring buffer was full.
    Lost = 0,
    /// A TCP segment whose headers could not be read, or do not fit into it.
    Unreadable = 1,
    /// A segment of a switched connection came from another device, or was not meant for this
    /// host; it went to the stack, where the guard waits.
    Misplaced = 2,
    /// A segment of a switched connection could not be rewritten, and was dropped.
    Unfit = 3,
    /// A segment of a switched connection reached the stack, and was swallowed.
    Guarded = 4,
    /// A segment of a switched connection was larger than its device takes, and was dropped; or a
    /// router further on said so of one. Its sender is told.
    TooBig = 5,
    /// An event did not fit into its ring buffer.
    EventLost = 6,
}

impl Counter {
    /// How many there are.
    pub const COUNT: u32 = 7;
}

/// Index of the word, and mask of the bit in it, that stands for `port` in the bitmap of ports.
#[inline(always)]
#[must_use]
pub const fn port_bit(port: u16) -> (u32, u64) {
    (port as u32 >> 6, 1 << (port & 63))
}

const _: () = {
    assert!(size_of::<Endpoint>() == 18);
    assert!(size_of::<Tuple>() == 36);
    assert!(size_of::<Pending>() == 12);
    assert!(offset_of!(Handshake, ifindex) == 44);
    assert!(offset_of!(Handshake, window) == 72);
    assert!(offset_of!(Handshake, padding) + 7 == size_of::<Handshake>());
    assert!(size_of::<Handshake>() == 152);
    assert!(size_of::<Opening>() == 24);
    assert!(size_of::<Seen>() == 56);
};

#[cfg(feature = "user")]
mod pod {
    use super::{Endpoint, Pending, Seen, Tuple};

    // SAFETY: repr(C), only integers, and no padding: see the size assertions above.
    unsafe impl aya::Pod for Endpoint {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Tuple {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Pending {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Seen {}
}

#[cfg(feature = "user")]
mod user {
    use core::net::{IpAddr, Ipv6Addr, SocketAddr};

    use super::{Endpoint, Handshake};

    impl From<SocketAddr> for Endpoint {
        fn from(address: SocketAddr) -> Self {
            let ip = match address.ip() {
                // Every address, whatever the family: all zero, see [`Endpoint::address`].
                ip if ip.is_unspecified() => Ipv6Addr::UNSPECIFIED,
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            Self { address: ip.octets(), port: address.port() }
        }
    }

    impl From<Endpoint> for SocketAddr {
        fn from(endpoint: Endpoint) -> Self {
            let ip = Ipv6Addr::from(endpoint.address).to_canonical();
            Self::new(ip, endpoint.port)
        }
    }

    impl Handshake {
        /// Reads a record of the ring buffer; `None` if it has another size, so another layout.
        #[must_use]
        pub fn from_record(record: &[u8]) -> Option<Self> {
            if record.len() != size_of::<Self>() {
                return None;
            }
            // SAFETY: the record has the size of this type, all of whose bit patterns are valid
            // (integers only); read_unaligned asks nothing of the pointer's alignment.
            Some(unsafe { record.as_ptr().cast::<Self>().read_unaligned() })
        }
    }
}

#[cfg(all(test, feature = "user"))]
mod tests {
    use core::net::SocketAddr;

    use super::*;

    #[test]
    fn addresses_of_both_families_survive_the_way_through_a_key() {
        for text in ["192.0.2.1:443", "[2001:db8::1]:6443"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(SocketAddr::from(Endpoint::from(address)), address);
        }
    }

    #[test]
    fn every_address_of_a_family_is_every_address() {
        for text in ["0.0.0.0:443", "[::]:443"] {
            let endpoint = Endpoint::from(text.parse::<SocketAddr>().unwrap());
            assert_eq!(endpoint, Endpoint { address: [0; 16], port: 443 }, "{text}");
        }
    }

    #[test]
    fn every_port_has_a_bit_of_its_own_in_1024_words() {
        let mut words = [0u64; 1024];
        for port in 0..=u16::MAX {
            let (word, bit) = port_bit(port);
            let word = &mut words[word as usize];
            assert_eq!(*word & bit, 0, "port {port}");
            *word |= bit;
        }
    }

    #[test]
    fn a_record_of_another_size_is_refused() {
        assert!(Handshake::from_record(&[0; size_of::<Handshake>() - 1]).is_none());
        let event = Handshake::from_record(&[1; size_of::<Handshake>()]).unwrap();
        assert_eq!(event.sequence, 0x0101_0101);
    }
}

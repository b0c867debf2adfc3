//! TCP headers that pass a device of a host, all of them: a capture that lost any fails its test.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use crate::forge::link_address;
use crate::netns::Host;
use crate::wait::eventually;

/// Bytes in which packets wait for us: plenty for the busiest second of a test.
static ROOM: libc::c_int = 64 << 20;

/// Bytes kept of each packet: IPv6's header and TCP's with all its options.
const KEPT: usize = 40 + 60;

/// How often a quiet capture looks whether it is to end.
const LOOK: Duration = Duration::from_millis(20);

/// Which way a packet went, seen from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the host, by its Ethernet address.
    In,
    /// From the host.
    Out,
    /// By, addressed to another one.
    Past,
}

/// One packet's TCP header. With segmentation offload it may stand for many segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Which way it went.
    pub way: Way,
    /// From.
    pub source: SocketAddr,
    /// To.
    pub destination: SocketAddr,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// As in [`crate::forge`].
    pub flags: u8,
    /// As in the header, not scaled.
    pub window: u16,
    /// Bytes of data.
    pub len: usize,
}

/// A capture that goes on until it is stopped or dropped.
#[derive(Debug)]
pub struct Sniffer {
    socket: Arc<Socket>,
    seen: Arc<Mutex<Vec<Seen>>>,
    over: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Sniffer {
    /// Begins on `device` of `host`: what passes after the return is seen. On the way in that is
    /// before tc's programs, on the way out behind them.
    ///
    /// # Panics
    /// No such device, or no CAP_NET_RAW.
    #[track_caller]
    #[must_use]
    pub fn start(host: &Host, device: &str) -> Self {
        let name = device.to_owned();
        let socket = host.run(move || open(&name));
        let socket = socket.unwrap_or_else(|e| panic!("capturing on {device}: {e}"));
        let socket = Arc::new(socket);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let over = Arc::new(AtomicBool::new(false));
        let (from, to, end) = (Arc::clone(&socket), Arc::clone(&seen), Arc::clone(&over));
        let reader = std::thread::spawn(move || {
            let mut packet = [0; KEPT];
            loop {
                match receive(&from, &mut packet) {
                    Some((kept, way)) => {
                        let seen = parse(&packet[..kept], way);
                        to.lock().unwrap_or_else(PoisonError::into_inner).extend(seen);
                    }
                    // Only an empty queue may end it.
                    None if end.load(Relaxed) => return,
                    None => {}
                }
            }
        });
        Self { socket, seen, over, reader: Some(reader) }
    }

    /// What was seen so far.
    #[must_use]
    pub fn so_far(&self) -> Vec<Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for the first segment that `matches`.
    ///
    /// # Panics
    /// None came within [`crate::wait::bound`]; the message names `what`.
    #[track_caller]
    pub fn await_segment(&self, what: &str, matches: impl Fn(&Seen) -> bool) -> Seen {
        eventually(what, || self.so_far().into_iter().find(&matches))
    }

    /// Ends the capture and gives all that was seen.
    ///
    /// # Panics
    /// Packets were lost: the capture proves nothing.
    #[track_caller]
    #[must_use]
    pub fn stop(mut self) -> Vec<Seen> {
        self.end();
        let lost = lost(&self.socket);
        assert_eq!(lost, 0, "the capture lost {lost} packets");
        self.so_far()
    }

    fn end(&mut self) {
        self.over.store(true, Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.end();
    }
}

fn open(device: &str) -> std::io::Result<Socket> {
    // Without a protocol nothing arrives before it is bound to its one device.
    let socket = Socket::new(Domain::PACKET, Type::DGRAM.cloexec(), None)?;
    // SAFETY: the value is an int that lives until the call returns.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const ROOM).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if set != 0 {
        return Err(std::io::Error::last_os_error());
    }
    cut(&socket)?;
    socket.set_read_timeout(Some(LOOK))?;
    let address = link_address(device, libc::ETH_P_ALL as u16, [0; 6])?;
    // SAFETY: the address lives until the call returns, and its size is its own.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if bound != 0 { Err(std::io::Error::last_os_error()) } else { Ok(socket) }
}

/// Lets the kernel keep no more than the headers of each packet.
fn cut(socket: &Socket) -> std::io::Result<()> {
    const RETURN: u16 = 0x06;
    let code = [libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: KEPT as u32 }];
    let program = libc::sock_fprog { len: 1, filter: code.as_ptr().cast_mut() };
    // SAFETY: the kernel copies the program, which lives until the call returns.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if set != 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// The next packet's first bytes, or `None` after [`LOOK`] without one.
fn receive(socket: &Socket, packet: &mut [u8]) -> Option<(usize, Way)> {
    // SAFETY: all-zero bytes are a valid sockaddr_ll.
    let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: buffer and address are ours, live until the call returns, and have these sizes.
    let got = unsafe {
        libc::recvfrom(
            socket.as_raw_fd(),
            packet.as_mut_ptr().cast(),
            packet.len(),
            0,
            (&raw mut from).cast(),
            &mut size,
        )
    };
    let way = match from.sll_pkttype {
        libc::PACKET_OUTGOING => Way::Out,
        libc::PACKET_OTHERHOST => Way::Past,
        _ => Way::In,
    };
    usize::try_from(got).ok().map(|got| (got, way))
}

fn lost(socket: &Socket) -> u32 {
    let mut counts = [0u32; 2];
    let mut size = size_of_val(&counts) as libc::socklen_t;
    // SAFETY: PACKET_STATISTICS fills a tpacket_stats: two u32, packets and losses.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            counts.as_mut_ptr().cast(),
            &mut size,
        )
    };
    assert_eq!(got, 0, "PACKET_STATISTICS: {}", std::io::Error::last_os_error());
    counts[1]
}

/// The TCP header in `packet`, if it is a whole one.
pub(crate) fn parse(packet: &[u8], way: Way) -> Option<Seen> {
    const TCP: u8 = 6;
    let word = |bytes: &[u8], at: usize| -> Option<u16> {
        Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
    };
    let (source, destination, header, total): (IpAddr, IpAddr, usize, usize) =
        match packet.first()? >> 4 {
            4 if packet.get(9) == Some(&TCP) => {
                let ip = |at: usize| -> Option<[u8; 4]> { packet.get(at..at + 4)?.try_into().ok() };
                let header = usize::from(packet[0] & 0xf) * 4;
                let total = usize::from(word(packet, 2)?);
                (Ipv4Addr::from(ip(12)?).into(), Ipv4Addr::from(ip(16)?).into(), header, total)
            }
            6 if packet.get(6) == Some(&TCP) => {
                let ip =
                    |at: usize| -> Option<[u8; 16]> { packet.get(at..at + 16)?.try_into().ok() };
                let total = 40 + usize::from(word(packet, 4)?);
                (Ipv6Addr::from(ip(8)?).into(), Ipv6Addr::from(ip(24)?).into(), 40, total)
            }
            _ => return None,
        };
    let tcp = packet.get(header..)?;
    let long = |at: usize| -> Option<u32> {
        Some(u32::from_be_bytes(tcp.get(at..at + 4)?.try_into().ok()?))
    };
    let data = usize::from(tcp.get(12)? >> 4) * 4;
    Some(Seen {
        way,
        source: SocketAddr::new(source, word(tcp, 0)?),
        destination: SocketAddr::new(destination, word(tcp, 2)?),
        seq: long(4)?,
        ack: long(8)?,
        flags: *tcp.get(13)?,
        window: word(tcp, 14)?,
        len: total.checked_sub(header + data)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forge::{FIN, RST, SYN};
    use crate::peers::{Peer, both};
    use crate::servers::Upstream;

    #[test]
    fn a_connection_is_seen_from_its_beginning_to_its_end() {
        const BYTES: u64 = 5_000_000;
        let (one, two) = (Host::new("one"), Host::new("two"));
        let wire = one.join(&two, 12);
        for ip in [wire.v4(2), wire.v6(2)] {
            let sniffer = Sniffer::start(&two, &wire.device());
            let upstream = two.run(move || Upstream::new(ip));
            let to = upstream.address();
            let client = one.run(move || Peer::connect(to));
            let server = upstream.accept();
            both(|| client.send_stream(1, BYTES), || server.receive_stream(1, BYTES));
            let from = client.address();
            client.finish();
            server.expect_eof();
            server.finish();
            client.expect_eof();
            drop((client, server));
            sniffer.await_segment("the server's end", |s| s.way == Way::Out && s.flags & FIN != 0);
            let seen = sniffer.stop();
            let mine = || seen.iter().filter(|s| s.source == from && s.way == Way::In);
            assert_eq!(mine().filter(|s| s.flags & SYN != 0).count(), 1);
            assert!(mine().map(|s| s.len as u64).sum::<u64>() >= BYTES);
            assert!(seen.iter().all(|s| s.flags & RST == 0));
        }
    }
}

//! TCP from below: the numbers of a socket, and the segments that a host sees.

use std::io::{Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Host;
use crate::sniff::{self, Way};
use crate::wait::bound;

/// `from` connects to `address` on `to`. The first of the two is the client's.
///
/// # Panics
/// It does not come about.
#[track_caller]
#[must_use]
pub fn connection(from: &Host, to: &Host, address: SocketAddr) -> (TcpStream, TcpStream) {
    let listener = to.run(move || TcpListener::bind(address)).expect("binds");
    let address = listener.local_addr().expect("bound");
    let client = from.run(move || TcpStream::connect_timeout(&address, bound())).expect("connects");
    let (server, _) = listener.accept().expect("accepts");
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(bound())).expect("is a socket");
        stream.set_nodelay(true).expect("is a socket");
    }
    (client, server)
}

/// Sends `count` bytes and awaits them at the other end.
///
/// # Panics
/// They do not arrive.
#[track_caller]
pub fn pass(mut from: &TcpStream, mut to: &TcpStream, count: usize) {
    std::thread::scope(|scope| {
        scope.spawn(move || from.write_all(&vec![b'x'; count]).expect("writes"));
        to.read_exact(&mut vec![0; count]).expect("arrives");
    });
}

/// What the next segment of a quiet connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// Value of the timestamps option.
    pub timestamp: u32,
}

/// Reads the numbers of `stream` (TCP_REPAIR; needs root).
///
/// # Panics
/// The kernel refuses.
#[track_caller]
#[must_use]
pub fn numbers(stream: &TcpStream) -> Numbers {
    const RECEIVE_QUEUE: u32 = 1;
    const SEND_QUEUE: u32 = 2;
    // Leaves repair mode without the probe that it ends with otherwise.
    const OFF_WITHOUT_PROBE: u32 = u32::MAX;
    set_option(stream, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1);
    let next = |queue| {
        set_option(stream, libc::IPPROTO_TCP, libc::TCP_REPAIR_QUEUE, queue);
        option(stream, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ)
    };
    let (sequence, acknowledgement) = (next(SEND_QUEUE), next(RECEIVE_QUEUE));
    let timestamp = option(stream, libc::IPPROTO_TCP, libc::TCP_TIMESTAMP);
    set_option(stream, libc::IPPROTO_TCP, libc::TCP_REPAIR, OFF_WITHOUT_PROBE);
    Numbers { sequence, acknowledgement, timestamp }
}

/// Ends a connection without a word to its peer (TCP_REPAIR; needs root).
///
/// # Panics
/// The kernel refuses.
#[track_caller]
pub fn vanish(stream: TcpStream) {
    set_option(&stream, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1);
    // Not by closing alone: a process that is just being started by another test has a copy of
    // the descriptor until it executes its program, and the connection would live as long.
    rustix::net::connect_unspec(&stream).expect("disconnects");
}

/// The path MTU that the connection goes by, in bytes.
///
/// # Panics
/// The kernel does not tell.
#[track_caller]
#[must_use]
pub fn path_mtu(stream: &TcpStream) -> u32 {
    if stream.local_addr().expect("is a socket").is_ipv4() {
        option(stream, libc::IPPROTO_IP, libc::IP_MTU)
    } else {
        option(stream, libc::IPPROTO_IPV6, libc::IPV6_MTU)
    }
}

#[track_caller]
fn option(stream: &TcpStream, level: i32, name: i32) -> u32 {
    let mut value = 0_u32;
    let mut length = size_of::<u32>() as libc::socklen_t;
    // SAFETY: `value` is ours, and `length` says how long it is.
    let result = unsafe {
        let value = (&raw mut value).cast();
        libc::getsockopt(stream.as_raw_fd(), level, name, value, &raw mut length)
    };
    assert_eq!(result, 0, "option {name}: {}", std::io::Error::last_os_error());
    value
}

#[track_caller]
fn set_option(stream: &TcpStream, level: i32, name: i32, value: u32) {
    let length = size_of::<u32>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes of `value`, which is ours.
    let result = unsafe {
        let value = (&raw const value).cast();
        libc::setsockopt(stream.as_raw_fd(), level, name, value, length)
    };
    assert_eq!(result, 0, "option {name}: {}", std::io::Error::last_os_error());
}

/// A segment as a host saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its sender.
    pub source: SocketAddr,
    /// Its receiver.
    pub destination: SocketAddr,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// The lower eight flag bits.
    pub flags: u8,
    /// Bytes of payload.
    pub payload: usize,
}

/// Sees all segments that arrive at a host or leave it from now on.
#[derive(Debug)]
pub struct Capture(Socket);

impl Capture {
    /// Begins.
    ///
    /// # Panics
    /// No root.
    #[track_caller]
    #[must_use]
    pub fn new(host: &Host) -> Self {
        let all = i32::from((libc::ETH_P_ALL as u16).to_be());
        let open = move || Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(all)));
        Self(host.run(open).expect("needs CAP_NET_RAW"))
    }

    /// The next segment that `wanted` says yes to, even if it was before this call.
    ///
    /// # Panics
    /// None comes.
    #[track_caller]
    pub fn next(&self, wanted: impl Fn(&Seen) -> bool) -> Seen {
        self.0.set_read_timeout(Some(bound())).expect("is a socket");
        loop {
            match self.receive() {
                Ok(Some(seen)) if wanted(&seen) => return seen,
                Ok(_) => {}
                Err(error) => panic!("no such segment was seen: {error}"),
            }
        }
    }

    /// Whatever was seen up to now.
    ///
    /// # Panics
    /// The socket fails.
    #[track_caller]
    #[must_use]
    pub fn so_far(&self) -> Vec<Seen> {
        self.0.set_nonblocking(true).expect("is a socket");
        let mut all = Vec::new();
        loop {
            match self.receive() {
                Ok(seen) => all.extend(seen),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        self.0.set_nonblocking(false).expect("is a socket");
        all
    }

    fn receive(&self) -> std::io::Result<Option<Seen>> {
        let mut buffer = [MaybeUninit::<u8>::uninit(); 256];
        let length = self.0.recv_with_flags(&mut buffer, libc::MSG_TRUNC)?;
        let bytes: Vec<u8> = buffer[..length.min(256)]
            .iter()
            // SAFETY: recv has written this many bytes of the buffer.
            .map(|byte| unsafe { byte.assume_init() })
            .collect();
        Ok(parse(&bytes))
    }
}

fn parse(packet: &[u8]) -> Option<Seen> {
    // Which way it went does not matter here.
    let seen = sniff::parse(packet, Way::In)?;
    Some(Seen {
        source: seen.source,
        destination: seen.destination,
        sequence: seen.seq,
        acknowledgement: seen.ack,
        flags: seen.flags,
        payload: seen.len,
    })
}

//! The two ends of a relayed connection, both in the test's hand, with all the bad manners that
//! real peers have: writing byte by byte, not reading, ending one direction only, resetting,
//! sending urgent data, accepting late or never.
//!
//! Methods block, up to [`bound`], and panic with what happened instead of what was expected.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use socket2::{Domain, SockRef, Socket, Type};

use crate::stream::{Dice, Stream};
use crate::wait::{bound, until};

const CHUNK: usize = 64 * 1024;

/// Bytes; the kernel doubles it.
const SMALL_BUFFER: usize = 96 * 1024;

/// Largest number of bytes that may pile up between a writer and a reader that does not read:
/// one receive and one send buffer of the proxy at their largest, as this kernel allows them,
/// and 1 MiB for pipes and the peers' own small buffers ([`Peer::shrink_buffers`]).
///
/// # Panics
/// The kernel does not tell.
#[must_use]
pub fn backlog_bound() -> u64 {
    let largest = |name: &str| -> u64 {
        let path = format!("/proc/sys/net/ipv4/{name}");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let last = text.split_whitespace().last().and_then(|n| n.parse().ok());
        last.unwrap_or_else(|| panic!("{path}: {text:?}"))
    };
    largest("tcp_rmem") + largest("tcp_wmem") + (1 << 20)
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// FIN: the other end said that this is all.
    Eof,
    /// RST: cut off.
    Reset,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Peer {
    stream: TcpStream,
    name: &'static str,
    /// RST was so quick that it ended `connect` itself, which has told of it already.
    reset_early: bool,
}

impl Peer {
    /// Connects to `to`, which must answer within [`bound`].
    ///
    /// # Panics
    /// It did not.
    #[track_caller]
    #[must_use]
    pub fn connect(to: SocketAddr) -> Self {
        match Self::try_connect(to) {
            Ok(peer) => peer,
            Err(error) => panic!("connecting to {to}: {error}"),
        }
    }

    /// Connects to `to`, within [`bound`]. A reset right after the handshake is no error here;
    /// it is told by [`Self::expect_reset`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn try_connect(to: SocketAddr) -> std::io::Result<Self> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM.cloexec(), None)?;
        let reset_early = match socket.connect_timeout(&to.into(), bound()) {
            Ok(()) => false,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => true,
            Err(error) => return Err(error),
        };
        Ok(Self { reset_early, ..Self::new(socket.into(), "client") })
    }

    /// Connects to `to` with an SO_RCVBUF of `bytes` (of which the kernel makes twice as many), so
    /// with small windows and a small scale of them.
    ///
    /// # Panics
    /// No connection within [`bound`].
    #[track_caller]
    #[must_use]
    pub fn connect_with_receive_buffer(to: SocketAddr, bytes: usize) -> Self {
        Self::connect_prepared(to, |socket| socket.set_recv_buffer_size(bytes))
    }

    /// Connects to `to` from `from`, also if an earlier connection from there is in TIME_WAIT.
    ///
    /// # Panics
    /// No connection within [`bound`].
    #[track_caller]
    #[must_use]
    pub fn connect_from(from: SocketAddr, to: SocketAddr) -> Self {
        Self::connect_prepared(to, |socket| {
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())
        })
    }

    /// Connects to `to` with these options in the IPv4 header of each packet.
    ///
    /// # Panics
    /// No connection within [`bound`].
    #[track_caller]
    #[must_use]
    pub fn connect_with_ip_options(to: SocketAddr, options: &[u8]) -> Self {
        Self::connect_prepared(to, |socket| {
            // SAFETY: pointer and length describe the slice, which the kernel copies.
            let status = unsafe {
                libc::setsockopt(
                    std::os::fd::AsRawFd::as_raw_fd(socket),
                    libc::IPPROTO_IP,
                    libc::IP_OPTIONS,
                    options.as_ptr().cast(),
                    libc::socklen_t::try_from(options.len()).unwrap_or(0),
                )
            };
            if status == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        })
    }

    #[track_caller]
    fn connect_prepared(
        to: SocketAddr,
        prepare: impl FnOnce(&Socket) -> std::io::Result<()>,
    ) -> Self {
        let connected = || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM.cloexec(), None)?;
            prepare(&socket)?;
            socket.connect_timeout(&to.into(), bound())?;
            Ok::<_, std::io::Error>(socket)
        };
        match connected() {
            Ok(socket) => Self::new(socket.into(), "client"),
            Err(error) => panic!("connecting to {to}: {error}"),
        }
    }

    pub(crate) fn new(stream: TcpStream, name: &'static str) -> Self {
        let settings =
            [stream.set_read_timeout(Some(bound())), stream.set_write_timeout(Some(bound()))];
        assert!(settings.iter().all(Result::is_ok), "{settings:?}");
        Self { stream, name, reset_early: false }
    }

    /// This end's own address.
    ///
    /// # Panics
    /// Never on a socket that was connected.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.stream.local_addr().expect("a connected socket has an address")
    }

    /// Sends small writes at once (TCP_NODELAY).
    ///
    /// # Panics
    /// The kernel refuses.
    pub fn no_delay(&self) {
        self.stream.set_nodelay(true).expect("TCP_NODELAY");
    }

    /// Fixes this end's own buffers at a small size, so that most of what a stalled connection
    /// holds is held by the proxy. (Below loopback's segment size of 64 KiB, a window that opens
    /// again does so only by probes, five times a second.)
    ///
    /// # Panics
    /// The kernel refuses.
    pub fn shrink_buffers(&self) {
        let socket = SockRef::from(&self.stream);
        socket.set_recv_buffer_size(SMALL_BUFFER).expect("SO_RCVBUF");
        socket.set_send_buffer_size(SMALL_BUFFER).expect("SO_SNDBUF");
    }

    /// Sends `bytes`.
    ///
    /// # Panics
    /// They cannot be sent.
    #[track_caller]
    pub fn send(&self, bytes: &[u8]) {
        if let Err(error) = (&self.stream).write_all(bytes) {
            panic!("the {} cannot send {} bytes: {error}", self.name, bytes.len());
        }
    }

    /// Sends the first `len` bytes of the stream of `seed`.
    ///
    /// # Panics
    /// They cannot be sent.
    #[track_caller]
    pub fn send_stream(&self, seed: u64, len: u64) {
        self.send_in_sizes(seed, len, || CHUNK);
    }

    /// As [`Self::send_stream`], in writes of 1 byte to 64 KiB.
    ///
    /// # Panics
    /// They cannot be sent.
    #[track_caller]
    pub fn send_in_random_sizes(&self, seed: u64, len: u64) {
        let mut dice = Dice::new(seed);
        self.send_in_sizes(seed, len, || dice.size(CHUNK));
    }

    /// As [`Self::send_stream`], one byte per segment.
    ///
    /// # Panics
    /// They cannot be sent.
    #[track_caller]
    pub fn send_byte_by_byte(&self, seed: u64, len: u64) {
        self.no_delay();
        self.send_in_sizes(seed, len, || 1);
    }

    #[track_caller]
    fn send_in_sizes(&self, seed: u64, len: u64, mut size: impl FnMut() -> usize) {
        let mut stream = Stream::new(seed);
        let mut buffer = [0; CHUNK];
        while stream.position() < len {
            let left = usize::try_from(len - stream.position()).unwrap_or(usize::MAX);
            let chunk = &mut buffer[..size().min(left)];
            stream.fill(chunk);
            self.send(chunk);
        }
    }

    /// Sends the stream of `seed` until an error comes, which is returned with the bytes that
    /// this end's socket took before it. The error is [`ErrorKind::WouldBlock`] if nobody took
    /// anything for [`bound`].
    #[must_use]
    pub fn send_until_error(&self, seed: u64) -> (u64, std::io::Error) {
        let mut stream = Stream::new(seed);
        let mut buffer = [0; CHUNK];
        loop {
            stream.peek(&mut buffer);
            match (&self.stream).write(&buffer) {
                Ok(sent) => stream.advance(sent),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return (stream.position(), error),
            }
        }
    }

    /// Sends the first `len` bytes of the stream of `seed`, and ends this direction.
    ///
    /// # Errors
    /// The connection broke meanwhile.
    pub fn try_send_all(&self, seed: u64, len: u64) -> std::io::Result<()> {
        let mut stream = Stream::new(seed);
        let mut buffer = [0; CHUNK];
        while stream.position() < len {
            let left = usize::try_from(len - stream.position()).unwrap_or(usize::MAX);
            let chunk = &mut buffer[..left.min(CHUNK)];
            stream.fill(chunk);
            (&self.stream).write_all(chunk)?;
        }
        self.stream.shutdown(Shutdown::Write)
    }

    /// Sends one byte as urgent data (MSG_OOB).
    ///
    /// # Panics
    /// It cannot be sent.
    #[track_caller]
    pub fn send_urgent(&self, byte: u8) {
        let sent = SockRef::from(&self.stream).send_out_of_band(&[byte]);
        assert!(matches!(sent, Ok(1)), "the {} cannot send urgent data: {sent:?}", self.name);
    }

    /// Takes urgent bytes in their place among the others (SO_OOBINLINE).
    ///
    /// # Panics
    /// The kernel refuses.
    pub fn take_urgent_inline(&self) {
        SockRef::from(&self.stream).set_out_of_band_inline(true).expect("SO_OOBINLINE");
    }

    /// Ends this direction: FIN after all that was sent.
    ///
    /// # Panics
    /// The connection is broken.
    #[track_caller]
    pub fn finish(&self) {
        if let Err(error) = self.stream.shutdown(Shutdown::Write) {
            panic!("the {} cannot end its direction: {error}", self.name);
        }
    }

    /// Breaks the connection: RST at once, whatever was still to be sent.
    ///
    /// # Panics
    /// The kernel refuses.
    pub fn reset(self) {
        SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
    }

    /// Receives whatever comes next, as many bytes as there is room for.
    ///
    /// # Panics
    /// Fewer came.
    #[track_caller]
    pub fn receive_into(&self, buffer: &mut [u8]) {
        if let Err(error) = (&self.stream).read_exact(buffer) {
            panic!("the {} waits for {} bytes: {error}", self.name, buffer.len());
        }
    }

    /// Bytes that have arrived here and were not read.
    ///
    /// # Panics
    /// The kernel does not tell.
    #[must_use]
    pub fn unread(&self) -> u64 {
        rustix::io::ioctl_fionread(&self.stream).expect("FIONREAD")
    }

    /// Bytes that were sent here and that the other end's kernel has not acknowledged.
    ///
    /// # Panics
    /// The kernel does not tell.
    #[must_use]
    pub fn unacknowledged(&self) -> u64 {
        let mut count: libc::c_int = 0;
        // SAFETY: SIOCOUTQ (TIOCOUTQ) writes one int.
        let status =
            unsafe { libc::ioctl(self.stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
        assert_eq!(status, 0, "SIOCOUTQ: {}", std::io::Error::last_os_error());
        u64::try_from(count).expect("a count")
    }

    /// Receives exactly `expected`.
    ///
    /// # Panics
    /// Something else came, or nothing.
    #[track_caller]
    pub fn receive(&self, expected: &[u8]) {
        let mut got = vec![0; expected.len()];
        if let Err(error) = (&self.stream).read_exact(&mut got) {
            panic!("the {} waits for {} bytes: {error}", self.name, expected.len());
        }
        assert!(
            got == expected,
            "the {} got {:?}, not {:?}",
            self.name,
            show(&got),
            show(expected)
        );
    }

    /// Receives the first `len` bytes of the stream of `seed`.
    ///
    /// # Panics
    /// Something else came, or nothing.
    #[track_caller]
    pub fn receive_stream(&self, seed: u64, len: u64) {
        self.receive_in_sizes(seed, len, || CHUNK);
    }

    /// As [`Self::receive_stream`], in reads of at most `size` bytes.
    ///
    /// # Panics
    /// Something else came, or nothing.
    #[track_caller]
    pub fn receive_in_sizes(&self, seed: u64, len: u64, mut size: impl FnMut() -> usize) {
        let mut stream = Stream::new(seed);
        let mut buffer = [0; CHUNK];
        while stream.position() < len {
            let left = usize::try_from(len - stream.position()).unwrap_or(usize::MAX);
            let most = size().min(left).min(CHUNK);
            let at = stream.position();
            match self.read(&mut buffer[..most]) {
                Ok(0) => panic!("the {} got EOF after {at} of {len} bytes", self.name),
                Ok(got) => self.compare(&mut stream, &buffer[..got]),
                Err(error) => panic!("the {} after {at} of {len} bytes: {error}", self.name),
            }
        }
    }

    /// Receives the next `len` bytes of `stream`.
    ///
    /// # Panics
    /// Something else came, or nothing.
    #[track_caller]
    pub fn receive_next(&self, stream: &mut Stream, len: u64) {
        let end = stream.position() + len;
        let mut buffer = [0; CHUNK];
        while stream.position() < end {
            let left = usize::try_from(end - stream.position()).unwrap_or(CHUNK).min(CHUNK);
            match self.read(&mut buffer[..left]) {
                Ok(0) => panic!("the {} got EOF after {} bytes", self.name, stream.position()),
                Ok(got) => self.compare(stream, &buffer[..got]),
                Err(error) => panic!("the {} after {}: {error}", self.name, stream.position()),
            }
        }
    }

    /// Reads once. A read with a time-out is not taken up again by the kernel when the process was
    /// stopped or frozen meanwhile, even without any signal handler (signal(7)).
    fn read(&self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match (&self.stream).read(buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    #[track_caller]
    fn compare(&self, stream: &mut Stream, got: &[u8]) {
        if let Err(error) = stream.check(got) {
            panic!("the {} got something else: {error}", self.name);
        }
    }

    /// Receives bytes of the stream of `seed` until it ends, and says after how many, and how.
    ///
    /// # Panics
    /// Other bytes came, or no end.
    #[track_caller]
    #[must_use]
    pub fn receive_until_end(&self, seed: u64) -> (u64, Ending) {
        self.receive_rest(Stream::new(seed))
    }

    /// As [`Self::receive_until_end`], for a stream of which some was received already; the
    /// count begins at its first byte all the same.
    ///
    /// # Panics
    /// Other bytes came, or no end.
    #[track_caller]
    #[must_use]
    pub fn receive_rest(&self, mut stream: Stream) -> (u64, Ending) {
        let mut buffer = [0; CHUNK];
        loop {
            match self.read(&mut buffer) {
                Ok(0) => return (stream.position(), Ending::Eof),
                Ok(got) => self.compare(&mut stream, &buffer[..got]),
                Err(error) if is_reset(&error) => return (stream.position(), Ending::Reset),
                Err(error) => panic!("the {} waits for an end: {error}", self.name),
            }
        }
    }

    /// Waits until `count` bytes lie in this end's own buffer, unread.
    ///
    /// # Panics
    /// Fewer came within [`bound`].
    #[track_caller]
    pub fn await_unread(&self, count: u64) {
        let what = format!("{count} bytes lie unread at the {}", self.name);
        until(&what, || rustix::io::ioctl_fionread(&self.stream).is_ok_and(|n| n >= count));
    }

    /// Whether `count` bytes lie in this end's own buffer, unread, within `bound`.
    #[must_use]
    pub fn unread_within(&self, count: u64, bound: Duration) -> bool {
        let deadline = Instant::now() + bound;
        loop {
            if rustix::io::ioctl_fionread(&self.stream).is_ok_and(|n| n >= count) {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Receives FIN, and no byte before it.
    ///
    /// # Panics
    /// Something else came, or nothing.
    #[track_caller]
    pub fn expect_eof(&self) {
        match self.read(&mut [0; CHUNK]) {
            Ok(0) => {}
            Ok(more) => panic!("the {} got {more} bytes instead of the end", self.name),
            Err(error) => panic!("the {} waits for the end: {error}", self.name),
        }
    }

    /// Receives RST, and no byte before it.
    ///
    /// # Panics
    /// Something else came, or nothing.
    #[track_caller]
    pub fn expect_reset(&self) {
        match self.read(&mut [0; CHUNK]) {
            Ok(0) if self.reset_early => {}
            Ok(0) => panic!("the {} got a clean EOF instead of a reset", self.name),
            Ok(more) => panic!("the {} got {more} bytes instead of a reset", self.name),
            Err(error) if is_reset(&error) => {}
            Err(error) => panic!("the {} waits for a reset: {error}", self.name),
        }
    }

    /// Learns of RST without reading, so also behind unread bytes, and after the other end's FIN,
    /// where `read` says nothing but EOF any more.
    ///
    /// # Panics
    /// No RST came.
    #[track_caller]
    pub fn expect_reset_unread(&self) {
        let timeout = Timespec { tv_sec: bound().as_secs() as i64, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
        let ready = retry_on_intr(|| poll(&mut fds, Some(&timeout)));
        assert!(matches!(ready, Ok(1)), "the {} waits for a reset in vain", self.name);
        // EPIPE is what Linux calls a reset that follows the other end's FIN.
        match self.stream.take_error() {
            Ok(Some(error)) if is_reset(&error) => {}
            other => panic!("the {} saw no reset but {other:?}", self.name),
        }
    }

    /// Sends the stream of `seed` without ever blocking, until nothing has moved for a second;
    /// says how many bytes left.
    ///
    /// # Panics
    /// More than `bound` bytes left: somebody keeps them.
    #[track_caller]
    #[must_use]
    pub fn fill(&self, seed: u64, bound: u64) -> u64 {
        fill_all(&[self], seed, bound)[0]
    }

    /// Sends what fits now, returns how many bytes did.
    #[track_caller]
    fn send_what_fits(&self, stream: &mut Stream, bound: u64) -> u64 {
        let before = stream.position();
        let mut buffer = [0; CHUNK];
        loop {
            stream.peek(&mut buffer);
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            match SockRef::from(&self.stream).send_with_flags(&buffer, flags) {
                Ok(sent) => stream.advance(sent),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("the {} pushes: {error}", self.name),
            }
            let sent = stream.position();
            assert!(sent <= bound, "{sent} bytes went to a peer that reads nothing");
        }
        stream.position() - before
    }
}

/// [`Peer::fill`] for many peers at once, all with the stream of `seed`.
///
/// # Panics
/// More than `bound` bytes of one peer left.
#[track_caller]
#[must_use]
pub fn fill_all(peers: &[&Peer], seed: u64, bound: u64) -> Vec<u64> {
    const QUIET: Duration = Duration::from_secs(1);
    let mut streams = vec![Stream::new(seed); peers.len()];
    let mut moved = Instant::now();
    while moved.elapsed() < QUIET {
        for (peer, stream) in peers.iter().zip(&mut streams) {
            if peer.send_what_fits(stream, bound) > 0 {
                moved = Instant::now();
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    streams.iter().map(Stream::position).collect()
}

fn is_reset(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

fn show(bytes: &[u8]) -> String {
    let head = &bytes[..bytes.len().min(64)];
    String::from_utf8_lossy(head).into_owned()
}

/// Runs both at once and fails when either does.
#[track_caller]
pub fn both(one: impl FnOnce() + Send, other: impl FnOnce() + Send) {
    thread::scope(|threads| {
        threads.spawn(one);
        threads.spawn(other);
    });
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::servers::Upstream;

    /// A connection that does not pass through the proxy.
    fn direct_pair() -> (Peer, Peer) {
        let upstream = Upstream::new(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let client = Peer::connect(upstream.address());
        (client, upstream.accept())
    }

    #[test]
    fn ends_are_told_apart() {
        let (client, server) = direct_pair();
        client.send_stream(1, 10_000);
        client.finish();
        assert_eq!(server.receive_until_end(1), (10_000, Ending::Eof));
        client.reset();
        server.expect_reset_unread();

        let (client, server) = direct_pair();
        server.reset();
        client.expect_reset();
    }

    #[test]
    fn a_reset_is_seen_behind_unread_bytes() {
        let (client, server) = direct_pair();
        client.send(b"unread");
        client.reset();
        server.expect_reset_unread();
    }

    #[test]
    #[should_panic(expected = "clean EOF instead of a reset")]
    fn an_end_is_no_reset() {
        let (client, server) = direct_pair();
        drop(client);
        server.expect_reset();
    }

    #[test]
    #[should_panic(expected = "byte 5 of stream 1")]
    fn wrong_bytes_are_noticed() {
        let (client, server) = direct_pair();
        let mut bytes = [0; 10];
        Stream::new(1).fill(&mut bytes);
        bytes[5] ^= 0xff;
        client.send(&bytes);
        server.receive_stream(1, 10);
    }

    #[test]
    fn filling_stops_at_a_reader_that_does_not_read() {
        let (client, server) = direct_pair();
        let sent = client.fill(9, backlog_bound() * 2);
        client.finish();
        assert_eq!(server.receive_until_end(9), (sent, Ending::Eof));
    }
}

//! One TCP socket of a relay: what the kernel is asked for, and how it is waited on.
//!
//! Kernel facts that this file stands on:
//! - `close` with SO_LINGER {1, 0} sends RST and drops what is queued (tcp(7), socket(7)). Both
//!   sockets of a pair carry it from their first moment until an orderly end, so that whatever
//!   ends the process (SIGKILL included) cannot look like the end of a stream.
//! - Accepted sockets inherit SO_LINGER, SO_OOBINLINE, SO_KEEPALIVE, TCP_NODELAY and the TCP
//!   timers from their listener (`sk_clone_lock`), which saves the calls for each connection; a
//!   test in this file holds the kernel to it.
//! - With an urgent mark pending, reads stop short of it (`tcp_recvmsg_locked`), and `splice`
//!   makes no progress over it at all (`tcp_read_sock`): see [`Socket::has_seen_urgent`].
//! - TCP_USER_TIMEOUT also counts time spent on a closed window, although the peer answers every
//!   probe (`tcp_probe_timer`, since 5.11): see [`SendQueue::is_stalled`].

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Duration;

use crate::packet::ports::Port;
use rustix::net::{RecvFlags, SendFlags};
use socket2::{Domain, Protocol, SockAddr, SockRef, TcpKeepalive, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Idle time before the first keepalive probe. Load balancers forget idle connections after
/// 60 s (some clouds' classic ones) to 350 s; below 55 s we are heard by all of them.
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(45);
/// Time between keepalive probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// Probes without an answer before the connection counts as dead.
const KEEPALIVE_PROBES: u32 = 3;
/// How long sent bytes may stay unacknowledged before the peer counts as dead.
pub const USER_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes that may wait in a send queue without being on their way. Without this bound a reader that
/// stalls would make the kernel queue as much as tcp_wmem allows (4 MiB and more), on top of what
/// already waits at the source; enough of them, and the host runs into TCP memory pressure, which
/// hurts everybody on it. In `ARCHITECTURE.md` are the measurements.
const UNSENT_BYTES: u32 = 256 * 1024;
/// Half of the bytes that a receive queue has to begin with, and that tuning gives it at most (tcp(7):
/// tcp_rmem): the kernel doubles what it is asked for.
static QUEUES: OnceLock<(i32, i32)> = OnceLock::new();

fn queues() -> (i32, i32) {
    const USUAL: (i32, i32) = (128 << 10, 6 << 20);
    let setting = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_rmem").unwrap_or_default();
    let number = |at| setting.split_whitespace().nth(at).and_then(|text| text.parse().ok());
    (number(1).unwrap_or(USUAL.0) / 2, number(2).unwrap_or(USUAL.1) / 2)
}

/// A non-blocking TCP socket with tokio's readiness.
#[derive(Debug)]
pub struct Socket {
    fd: AsyncFd<OwnedFd>,
}

/// The socket towards the client.
#[derive(Debug)]
pub struct Downstream(pub Socket);

/// The socket towards the server, and its port if that is one that nobody else uses.
#[derive(Debug)]
pub struct Upstream(pub Socket, pub Option<Box<Port>>);

/// The two ends' addresses, IPv4 in its own form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// Ours.
    pub local: SocketAddr,
    /// The peer's.
    pub peer: SocketAddr,
}

impl Socket {
    /// Takes over a non-blocking socket.
    ///
    /// # Errors
    /// The reactor has no room for it (epoll's limit of watches).
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // PRIORITY (EPOLLPRI) tells of urgent data; errors are always reported.
        let interest = Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY;
        // SAFETY: an `OwnedFd` is open, always names the same descriptor, and the `AsyncFd` owns it
        // until it is dropped; it is never taken out.
        let fd = unsafe { AsyncFd::register_with_interest(fd, interest | Interest::ERROR) }?;
        Ok(Self { fd })
    }

    /// Connects to `address`, after `before` had its way with the socket. Dropping the future gives
    /// up the attempt.
    ///
    /// # Errors
    /// What the kernel says: ECONNREFUSED, EHOSTUNREACH, ETIMEDOUT, no descriptors, no ports.
    pub async fn connect(
        address: SocketAddr,
        before: impl FnOnce(&SockRef<'_>),
    ) -> io::Result<Self> {
        let kind = Type::STREAM.nonblocking();
        let socket = socket2::Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
        prepare(&SockRef::from(&socket))?;
        before(&SockRef::from(&socket));
        match socket.connect(&SockAddr::from(address)) {
            Ok(()) => return Self::new(socket.into()),
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error),
        }
        let socket = Self::new(socket.into())?;
        socket.writable().await?;
        match socket.take_error() {
            Some(error) => Err(error),
            None => Ok(socket),
        }
    }

    /// Ends when bytes, the end of the stream or an error can be read. One task at a time may
    /// wait: the reactor keeps one waker for it, which spares the future a node in a list.
    ///
    /// # Errors
    /// The reactor is shutting down.
    pub async fn readable(&self) -> io::Result<()> {
        poll_fn(|context| self.fd.poll_read_ready(context).map_ok(drop)).await
    }

    /// Ends when the send buffer has room. One task at a time may wait, as for
    /// [`Self::readable`].
    ///
    /// # Errors
    /// The reactor is shutting down.
    pub async fn writable(&self) -> io::Result<()> {
        poll_fn(|context| self.fd.poll_write_ready(context).map_ok(drop)).await
    }

    /// Our end's address, IPv4 in its own form.
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_ip(&self) -> io::Result<IpAddr> {
        let address = SockRef::from(&self.fd).local_addr()?.as_socket();
        let address = address.ok_or(io::ErrorKind::Unsupported)?;
        Ok(address.ip().to_canonical())
    }

    /// Both ends' addresses.
    ///
    /// # Errors
    /// Those of getsockname(2) and getpeername(2).
    pub fn addresses(&self) -> io::Result<Addresses> {
        let socket = SockRef::from(&self.fd);
        let plain = |address: SockAddr| {
            let address = address.as_socket().ok_or(io::ErrorKind::Unsupported)?;
            Ok::<_, io::Error>(SocketAddr::new(address.ip().to_canonical(), address.port()))
        };
        Ok(Addresses { local: plain(socket.local_addr()?)?, peer: plain(socket.peer_addr()?)? })
    }

    /// Whether the peer has sent FIN (and everything before it has arrived).
    #[must_use]
    pub fn is_at_end(&self) -> bool {
        Info::of(self.as_fd()).is_some_and(|info| info.has_ended())
    }

    /// Ends when the connection has failed: RST, a time-out, a lost route.
    pub async fn failed(&self) -> io::Error {
        match self.fd.ready(Interest::ERROR).await {
            // A read or write may have collected the error before us; RST is what remains.
            Ok(_) => self.take_error().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
            Err(error) => error,
        }
    }

    /// Runs `read`, unless nothing can have arrived since it last said
    /// [`io::ErrorKind::WouldBlock`].
    ///
    /// # Errors
    /// Those of `read`.
    pub fn try_read<R>(&self, read: impl FnOnce(&OwnedFd) -> io::Result<R>) -> io::Result<R> {
        self.fd.try_io(Interest::READABLE, read)
    }

    /// Runs `write`, unless nothing can have left since it last said
    /// [`io::ErrorKind::WouldBlock`].
    ///
    /// # Errors
    /// Those of `write`.
    pub fn try_write<R>(&self, write: impl FnOnce(&OwnedFd) -> io::Result<R>) -> io::Result<R> {
        self.fd.try_io(Interest::WRITABLE, write)
    }

    /// Whether urgent data has ever arrived (or the stream has ended). From then on a short read
    /// does not prove that the queue is empty: reads stop at the urgent mark.
    #[must_use]
    pub fn has_seen_urgent(&self) -> bool {
        self.fd.try_io(Interest::PRIORITY, |_| Ok(())).is_ok()
    }

    /// Sends FIN after all bytes written so far.
    ///
    /// # Errors
    /// ENOTCONN: the peer has reset the connection.
    pub fn shutdown_write(&self) -> io::Result<()> {
        rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write).map_err(io::Error::from)
    }

    /// From here on, closing sends what is queued and then FIN, instead of RST.
    pub fn let_close_orderly(&self) {
        // Fails only on what is no socket; then there is nothing to linger either.
        let _ = SockRef::from(&self.fd).set_linger(None);
    }

    /// Asks the kernel to notice when the peer is gone (keepalive and TCP_USER_TIMEOUT). Accepted
    /// sockets have that from their listener. Those that connect get it only once they have lived
    /// for a while: it takes five calls, and a peer does not count as gone before 60 s anyway.
    pub fn watch_peer(&self) {
        // Fails only on what is no TCP socket; then there is no peer either.
        let _ = watch_peer(&SockRef::from(&self.fd));
    }

    /// Lifts TCP_USER_TIMEOUT, or sets it to its usual [`USER_TIMEOUT`].
    pub fn lift_user_timeout(&self, lift: bool) {
        let timeout = if lift { None } else { Some(USER_TIMEOUT) };
        // A failure leaves the previous value, which is a valid choice as well.
        let _ = SockRef::from(&self.fd).set_tcp_user_timeout(timeout);
    }

    /// Keeps the receive queue at about so many bytes, and the window with it: the kernel tunes
    /// neither any more. What was announced before stays valid (a receiver must not shrink its
    /// window, RFC 9293). To be ended by [`Self::let_flow`].
    pub fn hold_back(&self, bytes: usize) {
        // A failure leaves them as they were, which is a valid choice as well. (The kernel doubles
        // the number for its own overhead, socket(7).)
        let _ = SockRef::from(&self.fd).set_recv_buffer_size(bytes);
    }

    /// Leaves the receive queue to the kernel's tuning again.
    ///
    /// That enlarges a queue only when more is read in a round trip than ever before, which one that
    /// was made smaller does not let happen again (`tcp_rcv_space_adjust`). So it gets the size back
    /// that tuning had come to.
    pub fn let_flow(&self) {
        let (usual, most) = *QUEUES.get_or_init(queues);
        let set = |option, value: i32| set_option(self.as_fd(), libc::SOL_SOCKET, option, &value);
        let has = SockRef::from(&self.fd).recv_buffer_size().unwrap_or(0);
        let read = Info::of(self.as_fd()).map_or(0, |info| info.read_at_once());
        let wanted =
            i32::try_from(read).unwrap_or(i32::MAX).saturating_mul(2).clamp(usual, most.max(usual));
        if i32::try_from(has / 2).unwrap_or(i32::MAX) < wanted {
            let _ = set(libc::SO_RCVBUFFORCE, wanted);
        }
        // Since 5.15; on older ones the size stays ours, so it becomes what tuning comes to at last.
        if set(libc::SO_BUF_LOCK, 0).is_err() {
            let _ = set(libc::SO_RCVBUFFORCE, most);
        }
    }

    /// Whether something waits to be sent: bytes, or FIN.
    #[must_use]
    pub fn holds_unsent(&self) -> bool {
        // What is no TCP socket any more has no queue either.
        ask(self.as_fd(), libc::SIOCOUTQNSD).is_ok_and(|unsent| unsent > 0)
    }

    /// What is still queued for the peer.
    #[must_use]
    pub fn send_queue(&self) -> SendQueue {
        // What is no TCP socket any more has no queue either.
        send_queue(self.fd.as_fd()).unwrap_or_default()
    }

    fn take_error(&self) -> Option<io::Error> {
        SockRef::from(&self.fd).take_error().unwrap_or_else(Some)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What is still queued for the peer, and what is known of the peer meanwhile.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SendQueue {
    /// Segments sent and not acknowledged.
    unacknowledged: u32,
    /// Bytes written but never sent; FIN counts as one.
    unsent: u32,
    /// Bytes that the peer says it has room for.
    window: u32,
    /// Probes and retransmissions since the peer was last heard.
    unanswered: u8,
    /// Milliseconds since the peer's last acknowledgement.
    silence: u32,
}

impl SendQueue {
    /// Everything was acknowledged.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.unacknowledged == 0 && self.unsent == 0
    }

    /// The peer reads no more but is alive: something waits, it has closed its window, and it
    /// answers. (A peer short of memory may close the window over segments that it then drops,
    /// so some may be on their way as well.)
    #[must_use]
    pub fn is_stalled(self) -> bool {
        let waits = self.unsent > 0 && self.unacknowledged == 0;
        let closed = !self.is_empty() && self.window == 0;
        (waits || closed) && !self.is_peer_silent()
    }

    /// Several questions in a row went without an answer, for as long as a dead peer is given.
    fn is_peer_silent(self) -> bool {
        self.unanswered >= 2 && Duration::from_millis(self.silence.into()) >= USER_TIMEOUT
    }
}

/// Copies what is queued into `buffer` and leaves it queued.
///
/// # Errors
/// Those of recv(2).
pub fn peek(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(rustix::net::recv(fd, buffer, RecvFlags::PEEK | RecvFlags::DONTWAIT)?.0)
}

/// Takes exactly `count` queued bytes away without copying them (MSG_TRUNC, tcp(7)); `scratch`
/// is left as it is and only lends its length.
///
/// # Errors
/// Those of recv(2); EAGAIN cannot happen for bytes that [`peek`] has shown.
pub fn discard(fd: impl AsFd, scratch: &mut [u8], mut count: usize) -> io::Result<()> {
    while count > 0 {
        let want = count.min(scratch.len());
        let flags = RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        match rustix::net::recv(fd.as_fd(), &mut scratch[..want], flags)? {
            (_, 0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            (_, taken) => count -= taken.min(count),
        }
    }
    Ok(())
}

/// Hands `bytes` to the kernel, as many as it takes.
///
/// # Errors
/// Those of send(2); SIGPIPE is never raised.
pub fn send(fd: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    Ok(rustix::net::send(fd, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
}

/// What both sockets of a pair need from their first moment on.
fn prepare(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))?;
    // Urgent bytes stay in their place in the stream instead of being skipped.
    socket.set_out_of_band_inline(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(UNSENT_BYTES)
}

/// What accepted sockets are to inherit.
///
/// # Errors
/// Those of setsockopt(2).
pub fn prepare_listener(socket: &SockRef<'_>) -> io::Result<()> {
    prepare(socket)?;
    watch_peer(socket)
}

/// What tells a socket that its peer is gone.
fn watch_peer(socket: &SockRef<'_>) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))
}

/// One of the requests of tcp(7) that answer with a number of bytes.
///
/// # Errors
/// Those of ioctl(2).
pub fn ask(fd: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<u32> {
    let mut value: libc::c_int = 0;
    // SAFETY: these requests write one int to the address.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) };
    if status == 0 { Ok(value.unsigned_abs()) } else { Err(io::Error::last_os_error()) }
}

/// Reads what the kernel knows of a connection.
fn send_queue(fd: BorrowedFd<'_>) -> Option<SendQueue> {
    let info = Info::of(fd)?;
    Some(SendQueue {
        unacknowledged: info.word(24),
        unsent: info.word(144),
        window: info.send_window(),
        unanswered: info.raw[3].max(info.raw[2]),
        silence: info.word(56),
    })
}

/// `struct tcp_info` (linux/tcp.h), read by offsets: it only ever grows at its end, and libc's
/// definition stops before `tcpi_notsent_bytes` (4.6) and `tcpi_snd_wnd` (5.4).
#[derive(Debug, Clone)]
pub struct Info {
    raw: [u8; Self::SIZE],
}

impl Info {
    const SIZE: usize = 232;
    /// Bit of [`Self::options`]: timestamps.
    pub const TIMESTAMPS: u8 = 1;
    /// Bit of [`Self::options`]: selective acknowledgements.
    pub const SACK: u8 = 2;
    /// Bit of [`Self::options`]: scaled windows.
    pub const WINDOW_SCALE: u8 = 4;
    /// Bit of [`Self::options`]: timestamps count microseconds (6.7).
    pub const MICROSECONDS: u8 = 64;

    /// Asks the kernel; `None` for what is no TCP socket.
    #[must_use]
    pub fn of(fd: BorrowedFd<'_>) -> Option<Self> {
        let mut raw = [0; Self::SIZE];
        let mut length = libc::socklen_t::try_from(raw.len()).ok()?;
        // SAFETY: `fd` is borrowed for the call; `raw` is ours, `length` says how long it is, and
        // the kernel writes at most that much.
        let result = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                raw.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        (result == 0 && length as usize >= raw.len()).then_some(Self { raw })
    }

    /// An established connection with the usual options, for tests of what is made of it.
    #[cfg(test)]
    #[must_use]
    pub fn sample() -> Self {
        let mut raw = [0; Self::SIZE];
        raw[0] = 1;
        raw[5] = Self::TIMESTAMPS | Self::SACK | Self::WINDOW_SCALE;
        raw[6] = 0x77;
        raw[228..232].copy_from_slice(&64240u32.to_ne_bytes());
        Self { raw }
    }

    /// The same with these round trips: the average, and the smallest if one was measured.
    #[cfg(test)]
    #[must_use]
    pub fn with_round_trips(mut self, average: Duration, smallest: Option<Duration>) -> Self {
        let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        self.raw[68..72].copy_from_slice(&micros(average).to_ne_bytes());
        self.raw[148..152].copy_from_slice(&smallest.map_or(u32::MAX, micros).to_ne_bytes());
        self
    }

    fn word(&self, at: usize) -> u32 {
        let bytes: [u8; 4] = self.raw[at..at + 4].try_into().unwrap_or_default();
        u32::from_ne_bytes(bytes)
    }

    fn long(&self, at: usize) -> u64 {
        let bytes: [u8; 8] = self.raw[at..at + 8].try_into().unwrap_or_default();
        u64::from_ne_bytes(bytes)
    }

    /// Both directions are open.
    #[must_use]
    pub fn is_established(&self) -> bool {
        self.raw[0] == 1
    }

    /// The peer has sent FIN.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        // TIME_WAIT, CLOSE_WAIT, LAST_ACK, CLOSING (net/tcp_states.h).
        matches!(self.raw[0], 6 | 8 | 9 | 11)
    }

    /// The connection is over (or the socket was never connected).
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.raw[0] == 7
    }

    /// What was agreed in the handshake.
    #[must_use]
    pub fn options(&self) -> u8 {
        self.raw[5]
    }

    /// Shift of the windows that the peer announces.
    #[must_use]
    pub fn peer_shift(&self) -> u8 {
        self.raw[6] & 15
    }

    /// Shift of the windows that we announce.
    #[must_use]
    pub fn our_shift(&self) -> u8 {
        self.raw[6] >> 4
    }

    /// Bytes that the peer has room for beyond what it has acknowledged.
    #[must_use]
    pub fn send_window(&self) -> u32 {
        self.word(228)
    }

    /// Bytes that may be on their way at once as far as congestion control goes.
    #[must_use]
    pub fn congestion_window(&self) -> u32 {
        self.word(80).saturating_mul(self.word(16))
    }

    /// Upper bound of the window that we announce now.
    #[must_use]
    pub fn receive_window_bound(&self) -> u32 {
        self.word(64)
    }

    /// Round-trip time: the smallest that was seen if any, else the average.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        let smallest = self.word(148);
        let average = self.word(68);
        Duration::from_micros(
            if smallest == u32::MAX || smallest == 0 { average } else { smallest }.into(),
        )
    }

    /// Largest segment that we said we take, without options.
    #[must_use]
    pub fn announced_segment(&self) -> u32 {
        self.word(84)
    }

    /// Bytes that the peer has acknowledged; the connecting side counts its SYN as one.
    #[must_use]
    pub fn bytes_acked(&self) -> u64 {
        self.long(120)
    }

    /// The most bytes that were read within a round trip, by which the kernel tunes the receive queue.
    #[must_use]
    pub fn read_at_once(&self) -> u32 {
        self.word(96)
    }

    /// Bytes that arrived in order; FIN counts as one.
    #[must_use]
    pub fn bytes_received(&self) -> u64 {
        self.long(128)
    }
}

/// Sets an option that no library names.
///
/// # Errors
/// Those of setsockopt(2).
pub(crate) fn set_option<T>(
    fd: BorrowedFd<'_>,
    level: i32,
    option: i32,
    value: &T,
) -> io::Result<()> {
    // SAFETY: pointer and length describe `value`, which the kernel only reads.
    let status = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpStream};

    use super::*;
    use crate::config::ListenAddr;
    use crate::listeners;

    fn pair() -> (TcpStream, TcpStream) {
        let any = ListenAddr { ip: Some(Ipv4Addr::LOCALHOST.into()), port: 0 };
        let bound = listeners::bind(any, 1).expect("a port");
        let listener = bound.listen().expect("listens").remove(0);
        listener.set_nonblocking(false).expect("is a socket");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
        (client, listener.accept().expect("accepts").0)
    }

    #[test]
    fn accepted_sockets_inherit_what_the_listener_was_given() {
        let (_client, accepted) = pair();
        let accepted = SockRef::from(&accepted);
        assert_eq!(accepted.linger().expect("asks"), Some(Duration::ZERO));
        assert!(accepted.out_of_band_inline().expect("asks"));
        assert!(accepted.tcp_nodelay().expect("asks"));
        assert!(accepted.keepalive().expect("asks"));
        assert_eq!(accepted.tcp_keepalive_time().expect("asks"), KEEPALIVE_IDLE);
        assert_eq!(accepted.tcp_user_timeout().expect("asks"), Some(USER_TIMEOUT));
        assert_eq!(accepted.tcp_notsent_lowat().expect("asks"), UNSENT_BYTES);
    }

    #[test]
    fn discard_takes_exactly_what_was_peeked() {
        let (mut client, mut accepted) = pair();
        client.write_all(b"hello world").expect("writes");
        let mut scratch = [0; 32];
        while peek(&accepted, &mut scratch).unwrap_or(0) < 11 {}
        discard(&accepted, &mut [0; 4], 6).expect("discards");
        drop(client);
        let mut rest = String::new();
        accepted.set_nonblocking(false).expect("is a socket");
        accepted.read_to_string(&mut rest).expect("reads");
        assert_eq!(rest, "world");
    }

    #[test]
    fn a_closed_window_is_a_stall_only_while_the_peer_answers() {
        let stalled = SendQueue { unsent: 1, ..SendQueue::default() };
        assert!(stalled.is_stalled());
        let dropping = SendQueue { unacknowledged: 1, unanswered: 1, silence: 90_000, ..stalled };
        assert!(dropping.is_stalled(), "one probe under way proves nothing");
        let dead = SendQueue { unanswered: 2, silence: 60_000, ..stalled };
        assert!(!dead.is_stalled());
        let answering = SendQueue { unanswered: 0, ..dead };
        assert!(answering.is_stalled());
        let slow = SendQueue { unacknowledged: 3, window: 5000, ..stalled };
        assert!(!slow.is_stalled());
        assert!(!SendQueue::default().is_stalled());
    }

    #[test]
    fn a_peer_that_reads_no_more_is_told_from_one_that_is_slow() {
        let (client, accepted) = pair();
        let queue = |socket: &TcpStream| send_queue(socket.as_fd()).expect("a TCP socket");
        assert!(queue(&accepted).is_empty());
        let full = [0; 65536];
        accepted.set_nonblocking(true).expect("is a socket");
        while send(&accepted, &full).is_ok() {}
        assert!(ask(accepted.as_fd(), libc::SIOCOUTQNSD).expect("asks") > 0);
        // What was on its way when the window closed is acknowledged within a moment.
        while !queue(&accepted).is_stalled() {
            std::thread::yield_now();
        }
        drop(client);
    }
}

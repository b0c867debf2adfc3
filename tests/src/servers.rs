//! Servers as the proxy meets them: accepting when the test wants it, refusing, swallowing SYNs.

use std::io::ErrorKind;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use socket2::{Domain, Socket, Type};

use crate::peers::Peer;
use crate::wait::bound;

/// A server's listening socket; it accepts when it is told to, and not before.
#[derive(Debug)]
pub struct Upstream {
    listener: Socket,
    address: SocketAddr,
}

impl Upstream {
    /// Listens on a port of `ip` that the kernel chooses.
    ///
    /// # Panics
    /// That is not possible.
    #[track_caller]
    #[must_use]
    pub fn new(ip: IpAddr) -> Self {
        ClosedPort::new(ip).open()
    }

    /// Listens at `address` (port 0 for any) beside others that were made by this; the kernel
    /// spreads the clients evenly.
    ///
    /// # Panics
    /// That is not possible.
    #[track_caller]
    #[must_use]
    pub fn sharing(address: SocketAddr) -> Self {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::STREAM.cloexec(), None).expect("a TCP socket");
        socket.set_reuse_port(true).expect("SO_REUSEPORT");
        match socket.bind(&address.into()) {
            Ok(()) => {}
            Err(error) => panic!("binding {address}: {error}"),
        }
        let address = socket.local_addr().ok().and_then(|a| a.as_socket());
        ClosedPort { socket, address: address.expect("a bound socket has an address") }.open()
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes the next connection, waiting for it.
    ///
    /// # Panics
    /// None came within [`bound`].
    #[track_caller]
    #[must_use]
    pub fn accept(&self) -> Peer {
        match self.accept_within(bound()) {
            Some(peer) => peer,
            None => panic!("no connection reached {} within {:?}", self.address, bound()),
        }
    }

    /// Takes the next connection if one comes within `bound`.
    ///
    /// # Panics
    /// The kernel refuses.
    #[track_caller]
    #[must_use]
    pub fn accept_within(&self, bound: Duration) -> Option<Peer> {
        let timeout =
            Timespec { tv_sec: bound.as_secs() as i64, tv_nsec: i64::from(bound.subsec_nanos()) };
        let mut fds = [PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN)];
        match retry_on_intr(|| poll(&mut fds, Some(&timeout))) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(error) => panic!("waiting at {}: {error}", self.address),
        }
        match self.listener.accept() {
            Ok((socket, _)) => Some(Peer::new(socket.into(), "server")),
            Err(error) => panic!("accepting at {}: {error}", self.address),
        }
    }

    /// Stops listening; connections in the queue are reset, the address stays ours: the kernel
    /// leaves a port to a socket that asked for it by its number (`tcp_set_state`).
    ///
    /// # Panics
    /// That is not possible.
    #[track_caller]
    #[must_use]
    pub fn close(self) -> ClosedPort {
        self.listener.shutdown(Shutdown::Read).expect("shutdown");
        ClosedPort { socket: self.listener, address: self.address }
    }
}

/// An address that answers every SYN with RST, and stays ours meanwhile.
#[derive(Debug)]
pub struct ClosedPort {
    socket: Socket,
    address: SocketAddr,
}

impl ClosedPort {
    /// A port of `ip` that the kernel chooses.
    ///
    /// # Panics
    /// That is not possible.
    #[track_caller]
    #[must_use]
    pub fn new(ip: IpAddr) -> Self {
        Self::bind(SocketAddr::new(ip, 0))
    }

    #[track_caller]
    fn bind(address: SocketAddr) -> Self {
        match Self::try_bind(address) {
            Ok(port) => port,
            Err(error) => panic!("binding {address}: {error}"),
        }
    }

    /// Takes just this address.
    ///
    /// # Errors
    /// It is somebody else's.
    ///
    /// # Panics
    /// This machine does not know the family.
    pub fn try_bind(address: SocketAddr) -> std::io::Result<Self> {
        let chosen = Self::bind_once(address)?;
        // By its number, for what `Upstream::close` needs.
        if address.port() == 0 { Self::bind_once(chosen.address) } else { Ok(chosen) }
    }

    fn bind_once(address: SocketAddr) -> std::io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.cloexec(), None)
            .expect("a TCP socket");
        socket.set_reuse_address(true).expect("SO_REUSEADDR");
        socket.bind(&address.into())?;
        let address = socket.local_addr().ok().and_then(|a| a.as_socket());
        Ok(Self { socket, address: address.expect("a bound socket has an address") })
    }

    /// Where nobody listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Begins to listen.
    ///
    /// # Panics
    /// That is not possible.
    #[track_caller]
    #[must_use]
    pub fn open(self) -> Upstream {
        self.socket.listen(4096).expect("listen");
        Upstream { listener: self.socket, address: self.address }
    }
}

/// An address that swallows every SYN: a listener whose accept queue is full.
#[derive(Debug)]
pub struct Blackhole {
    upstream: Upstream,
    fillers: usize,
}

impl Blackhole {
    /// A port of `ip` that the kernel chooses.
    ///
    /// # Panics
    /// The queue cannot be filled.
    #[track_caller]
    #[must_use]
    pub fn new(ip: IpAddr) -> Self {
        let port = ClosedPort::new(ip);
        port.socket.listen(0).expect("listen");
        let upstream = Upstream { listener: port.socket, address: port.address };
        let swallowed = Duration::from_millis(300);
        for fillers in 0..8 {
            // The client's end may go: what was established stays in the queue.
            match TcpStream::connect_timeout(&upstream.address, swallowed) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::TimedOut && fillers > 0 => {
                    return Self { upstream, fillers };
                }
                Err(error) => panic!("filling the queue of {}: {error}", upstream.address),
            }
        }
        panic!("the queue of {} does not fill up", upstream.address);
    }

    /// Where nothing answers.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.upstream.address
    }

    /// Answers from now on, also those SYNs that are sent again.
    ///
    /// # Panics
    /// That is not possible.
    #[track_caller]
    #[must_use]
    pub fn answer(self) -> Upstream {
        for _ in 0..self.fillers {
            drop(self.upstream.accept());
        }
        self.upstream.listener.listen(4096).expect("listen");
        self.upstream
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blackhole_swallows_and_answers_later() {
        for ip in ["127.0.0.1", "::1"] {
            let hole = Blackhole::new(ip.parse().expect("an address"));
            let to = hole.address();
            let swallowed = TcpStream::connect_timeout(&to, Duration::from_millis(200));
            assert_eq!(swallowed.expect_err("swallowed").kind(), ErrorKind::TimedOut);
            std::thread::scope(|threads| {
                let client = threads.spawn(|| Peer::connect(to));
                let upstream = hole.answer();
                let _server = upstream.accept();
                client.join().expect("answered in the end");
            });
        }
    }
}

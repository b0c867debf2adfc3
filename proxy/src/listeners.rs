//! The listening sockets: one for each worker, all of one address.
//!
//! Kernel facts that this file stands on:
//! - Among sockets of one address that all have SO_REUSEPORT, the kernel spreads new connections by
//!   a hash of their tuple (socket(7)); each has a queue of its own, so nobody wakes in vain.
//! - Sockets with SO_REUSEADDR can be bound to one address as long as none of them listens;
//!   listen(2) looks again (`inet_csk_listen_start`), and there each pair must have SO_REUSEPORT.
//!   So the first listens without: then nobody else does, another proxy of ours included.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use tracing::debug;

use crate::config::ListenAddr;
use crate::socket::prepare_listener;

/// Connections waiting to be accepted; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// A port taken: nobody else can have it, and who connects is still refused.
#[derive(Debug)]
pub struct Bound {
    first: Socket,
    others: Vec<Socket>,
    /// With the port that was asked for, or the one that the kernel chose.
    address: SocketAddr,
}

/// Binds `count` sockets to `address`: every address of both families in one socket where the host
/// has IPv6.
///
/// # Errors
/// Those of bind(2), with the address that was tried.
pub fn bind(address: ListenAddr, count: usize) -> io::Result<Bound> {
    let at = |ip: IpAddr| {
        let address = SocketAddr::new(ip, address.port);
        Bound::new(address, count)
            .map_err(|error| io::Error::new(error.kind(), format!("listen on {address}: {error}")))
    };
    match address.ip {
        Some(ip) => at(ip),
        None => match at(Ipv6Addr::UNSPECIFIED.into()) {
            // A host without IPv6 says EAFNOSUPPORT or, with it switched off, EADDRNOTAVAIL.
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied
                ) =>
            {
                debug!(%error, "no IPv6 listener, taking IPv4 alone");
                at(Ipv4Addr::UNSPECIFIED.into())
            }
            result => result,
        },
    }
}

impl Bound {
    fn new(address: SocketAddr, count: usize) -> io::Result<Self> {
        let first = bind_one(address)?;
        let address = first.local_addr()?.as_socket().ok_or(io::ErrorKind::Unsupported)?;
        let others = (1..count).map(|_| bind_one(address)).collect::<io::Result<_>>()?;
        Ok(Self { first, others, address })
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Copies of the descriptors, which are the listeners' later.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn descriptors(&self) -> io::Result<Vec<OwnedFd>> {
        let all = std::iter::once(&self.first).chain(&self.others);
        all.map(|socket| Ok(socket.try_clone()?.into())).collect()
    }

    /// Clients may come. Accepted sockets are ready for a relay.
    ///
    /// # Errors
    /// Those of listen(2): somebody else has done so since the port was taken.
    pub fn listen(self) -> io::Result<Vec<TcpListener>> {
        let told = |error: io::Error| {
            io::Error::new(error.kind(), format!("listen on {}: {error}", self.address))
        };
        self.first.listen(BACKLOG).map_err(told)?;
        for socket in std::iter::once(&self.first).chain(&self.others) {
            if !self.others.is_empty() {
                socket.set_reuse_port(true)?;
            }
        }
        for socket in &self.others {
            socket.listen(BACKLOG).map_err(told)?;
        }
        Ok(std::iter::once(self.first).chain(self.others).map(TcpListener::from).collect())
    }
}

fn bind_one(address: SocketAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // The unspecified address takes IPv4 clients as well, whatever the sysctl says.
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    prepare_listener(&SockRef::from(&socket))?;
    socket.bind(&SockAddr::from(address))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::net::TcpStream;

    use super::*;

    fn any(count: usize) -> Bound {
        let ip = Some(Ipv4Addr::LOCALHOST.into());
        bind(ListenAddr { ip, port: 0 }, count).expect("a port")
    }

    #[test]
    fn clients_are_spread_over_all() {
        let bound = any(2);
        let address = bound.address();
        let listeners = bound.listen().expect("listens");
        let mut clients = Vec::new();
        let mut accepted = [0; 2];
        // By a hash of the client's port: that 200 of them meet one listener does not happen.
        for _ in 0..200 {
            clients.push(TcpStream::connect(address).expect("connects"));
        }
        for (listener, count) in listeners.iter().zip(&mut accepted) {
            while listener.accept().is_ok() {
                *count += 1;
            }
        }
        assert_eq!(accepted.iter().sum::<i32>(), 200);
        assert!(accepted.iter().all(|count| *count > 0), "{accepted:?}");
    }

    #[test]
    fn no_second_process_shares_the_port_unawares() {
        let bound = any(2);
        let address = bound.address();
        let ours = ListenAddr { ip: Some(address.ip()), port: address.port() };
        let early = bind(ours, 2).expect("nobody listens yet");
        let _listeners = bound.listen().expect("listens");
        let late = bind(ours, 2).expect_err("somebody listens");
        assert_eq!(late.kind(), ErrorKind::AddrInUse);
        let early = early.listen().expect_err("somebody listens");
        assert_eq!(early.kind(), ErrorKind::AddrInUse);
    }
}

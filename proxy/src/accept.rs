//! Accepting clients: limited, and never at rest for long.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tracing::warn;

use crate::access;
use crate::drain::Watcher;
use crate::session::{self, Shared};
use crate::socket::Socket;
use crate::workers::Seat;

/// Accepted in one go before other tasks of the thread get a turn.
const BATCH: usize = 64;

/// First and longest pause after the process or the system ran out of something.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// Accepts clients until draining begins, and then once more those that the kernel has already
/// let in: closing the listener would reset them. Each client takes one of the `places`.
pub async fn run(listener: TcpListener, seat: Seat, shared: Arc<Shared>, places: Arc<Semaphore>) {
    let drain = shared.limits.drain.clone();
    let listener = match Socket::new(listener.into()) {
        Ok(listener) => listener,
        Err(error) => return warn!(%error, "the listener cannot be watched"),
    };
    let acceptor = Acceptor { listener, seat, shared, places, drain };
    tokio::select! {
        () = acceptor.accept_for_ever() => {}
        () = acceptor.drain.draining() => {}
    }
    tokio::select! {
        () = acceptor.empty_the_queue() => {}
        () = acceptor.drain.cut() => {}
    }
}

struct Acceptor {
    listener: Socket,
    seat: Seat,
    shared: Arc<Shared>,
    places: Arc<Semaphore>,
    drain: Watcher,
}

impl Acceptor {
    async fn accept_for_ever(&self) {
        let mut pause = PAUSES.0;
        loop {
            match self.accept_batch() {
                Ok(true) => tokio::task::yield_now().await,
                Ok(false) => {
                    pause = PAUSES.0;
                    // Cannot fail while the reactor lives, and it outlives us.
                    let _ = self.listener.readable().await;
                }
                Err(error) => {
                    let cause = cause(&error);
                    self.shared.metrics.accept_errors.with_label_values(&[cause]).inc();
                    warn!(%error, ?pause, "cannot accept; clients wait in the kernel's queue");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSES.1);
                }
            }
        }
    }

    /// Takes all who wait, if need be as live connections end and descriptors are free again.
    async fn empty_the_queue(&self) {
        loop {
            match self.accept_one() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => tokio::time::sleep(PAUSES.0).await,
            }
        }
    }

    /// Takes up to [`BATCH`] clients; true if more may be waiting.
    fn accept_batch(&self) -> io::Result<bool> {
        for _ in 0..BATCH {
            match self.listener.try_read(|_| self.accept_one()) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Takes one client; EAGAIN if none waits.
    fn accept_one(&self) -> io::Result<()> {
        let (fd, address) = match accept(self.listener.as_fd()) {
            Ok(accepted) => accepted,
            // The client, or the network on its behalf, gave up between SYN and now (accept(2)
            // asks to treat these like EAGAIN); the next one may be fine.
            Err(error) if is_clients_fault(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        self.shared.metrics.accepted.inc();
        let Ok(permit) = Arc::clone(&self.places).try_acquire_owned() else {
            // Dropping it sends RST: refused at once.
            access::refused(&self.shared.metrics, address);
            return Ok(());
        };
        let session = session::serve(Arc::clone(&self.shared), fd, address, permit);
        self.seat.spawn(self.drain.track(session));
        Ok(())
    }
}

fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, SocketAddr)> {
    let flags = rustix::net::SocketFlags::NONBLOCK | rustix::net::SocketFlags::CLOEXEC;
    let (fd, address) = rustix::net::acceptfrom_with(listener, flags)?;
    let address = address
        .and_then(|address| SocketAddr::try_from(address).ok())
        .unwrap_or_else(|| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0));
    // IPv4 clients of a dual-stack listener come as ::ffff:a.b.c.d; people think of a.b.c.d.
    Ok((fd, SocketAddr::new(address.ip().to_canonical(), address.port())))
}

fn is_clients_fault(error: &io::Error) -> bool {
    const CODES: [i32; 9] = [
        libc::ECONNABORTED,
        libc::EPROTO,
        libc::ENETDOWN,
        libc::ENOPROTOOPT,
        libc::EHOSTDOWN,
        libc::ENONET,
        libc::EHOSTUNREACH,
        libc::EOPNOTSUPP,
        libc::ENETUNREACH,
    ];
    let code = error.raw_os_error();
    code == Some(libc::EINTR) || CODES.iter().any(|known| code == Some(*known))
}

/// The label of what stopped us from accepting.
fn cause(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "process_descriptors",
        Some(libc::ENFILE) => "system_descriptors",
        Some(libc::ENOMEM | libc::ENOBUFS) => "memory",
        Some(libc::ENOSPC) => "epoll_watches",
        _ => "other",
    }
}

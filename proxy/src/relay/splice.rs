//! Engine `splice`: for bulk, pages move through a pipe without being copied to userspace.
//!
//! Pipes come from a fixed pool, and a direction holds one only while bytes are inside it. A pool
//! that is used up (by readers that stalled with a pipe half full) is no failure: the direction
//! goes on as `copy` does, which holds nothing.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with};
use tracing::warn;

use crate::metrics::Metrics;
use crate::socket::Socket;

/// What a pipe is asked to hold. Measured against 64 KiB and 1 MiB in `ARCHITECTURE.md`.
const PIPE_CAPACITY: usize = 256 * 1024;

/// Pipes at most: with the capacity above 32 MiB, half of what the kernel lets a user without
/// privileges have by default (fs.pipe-user-pages-soft).
const POOL_SIZE: usize = 128;

/// An empty pipe and room for its bytes' count.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
    inside: usize,
}

/// Lends empty pipes, at most a fixed number at once.
#[derive(Debug)]
pub struct PipePool {
    state: Mutex<PoolState>,
    /// Set once splice(2) itself has failed, which no other connection need find out.
    refused: AtomicBool,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct PoolState {
    idle: Vec<Pipe>,
    made: usize,
}

/// A pipe on loan. Dropped empty, it goes back; dropped with bytes inside, it is closed, and its
/// place in the pool is free again.
#[derive(Debug)]
pub struct Lent {
    pipe: Option<Pipe>,
    pool: Arc<PipePool>,
}

impl PipePool {
    /// An empty pool; pipes are made when first needed.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { state: Mutex::default(), refused: AtomicBool::new(false), metrics }
    }

    /// A pipe, unless all are lent or the process is out of descriptors.
    #[must_use]
    pub fn lend(self: &Arc<Self>) -> Option<Lent> {
        if self.refused.load(Ordering::Relaxed) {
            return None;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let pipe = match state.idle.pop() {
            Some(pipe) => pipe,
            None if state.made < POOL_SIZE => {
                let pipe = Pipe::new().ok()?;
                state.made += 1;
                self.metrics.pipes.inc();
                pipe
            }
            None => return None,
        };
        Some(Lent { pipe: Some(pipe), pool: Arc::clone(self) })
    }

    /// splice(2) does not work here: a seccomp profile or a sandbox refuses it, or memory is
    /// short. From now on every direction copies.
    fn refuse(&self, error: &io::Error) {
        if !self.refused.swap(true, Ordering::Relaxed) {
            warn!(%error, "splice(2) fails on this host; bytes are copied from now on");
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(pipe) = self.pipe.take() else { return };
        let mut state = self.pool.state.lock().unwrap_or_else(PoisonError::into_inner);
        if pipe.inside == 0 {
            state.idle.push(pipe);
        } else {
            state.made -= 1;
            self.pool.metrics.pipes.dec();
        }
    }
}

impl Lent {
    /// Bytes inside.
    #[must_use]
    pub fn inside(&self) -> usize {
        self.pipe.as_ref().map_or(0, |pipe| pipe.inside)
    }

    /// Fills the empty pipe from `source`. `Ok(0)` and [`io::ErrorKind::WouldBlock`] both mean
    /// only that nothing could be spliced: at an urgent mark the kernel says so although bytes
    /// (or FIN) follow, so the caller must ask with a read.
    ///
    /// # Errors
    /// Those of the connection. Where splice(2) itself fails, no pipe is lent any more and the
    /// answer is 0: nothing was moved, so copying can go on from here.
    pub fn fill(&mut self, source: &Socket) -> io::Result<usize> {
        let Some(pipe) = &mut self.pipe else { return Ok(0) };
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let filled = source.try_read(|fd| {
            Ok(rustix::pipe::splice(fd, None, &pipe.write, None, pipe.capacity, flags)?)
        });
        match filled {
            Err(error) if is_splices_own(&error) => {
                self.pool.refuse(&error);
                Ok(0)
            }
            filled => {
                pipe.inside += *filled.as_ref().unwrap_or(&0);
                filled
            }
        }
    }

    /// Empties the pipe into `destination`, as far as that takes it.
    ///
    /// # Errors
    /// Those of splice(2); [`io::ErrorKind::WouldBlock`] when the send buffer is full. What is
    /// inside can still be had with [`Self::take`].
    pub fn empty(&mut self, destination: &Socket) -> io::Result<usize> {
        let Some(pipe) = &mut self.pipe else { return Ok(0) };
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let moved = destination.try_write(|fd| {
            Ok(rustix::pipe::splice(&pipe.read, None, fd, None, pipe.inside, flags)?)
        })?;
        pipe.inside -= moved;
        Ok(moved)
    }
}

impl Lent {
    /// Where splice(2) fails with bytes inside: takes them out, so that they can be written.
    /// `None` if `error` is the connection's own.
    pub fn take(&mut self, error: &io::Error) -> Option<Vec<u8>> {
        let pipe = self.pipe.as_mut().filter(|_| is_splices_own(error))?;
        self.pool.refuse(error);
        let mut bytes = vec![0; pipe.inside];
        let mut taken = 0;
        while taken < bytes.len() {
            match rustix::io::read(&pipe.read, &mut bytes[taken..]) {
                Ok(count) if count > 0 => taken += count,
                _ => return None,
            }
        }
        pipe.inside = 0;
        Some(bytes)
    }
}

/// Errors that say something about splice(2) on this host and nothing about a connection.
fn is_splices_own(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    let own = [libc::EPERM, libc::EACCES, libc::ENOSYS, libc::EINVAL, libc::ENOMEM];
    own.into_iter().any(|known| code == Some(known))
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // Refused (EPERM) when the user has used up pages for pipes; a smaller pipe works too.
        let _ = fcntl_setpipe_size(&write, PIPE_CAPACITY);
        let capacity = fcntl_getpipe_size(&write)?;
        Ok(Self { read, write, capacity, inside: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Arc<PipePool> {
        Arc::new(PipePool::new(Arc::new(Metrics::new().expect("registers"))))
    }

    #[test]
    fn the_pool_lends_no_more_than_its_size_and_takes_back() {
        let pool = pool();
        let lent: Vec<_> = std::iter::from_fn(|| pool.lend()).collect();
        assert_eq!(lent.len(), POOL_SIZE);
        drop(lent);
        assert!(pool.lend().is_some());
        assert_eq!(pool.metrics.pipes.get(), i64::try_from(POOL_SIZE).expect("fits"));
    }

    #[test]
    fn where_splice_is_refused_bytes_come_out_and_no_pipe_is_lent_again() {
        let pool = pool();
        let mut lent = pool.lend().expect("one is free");
        if let Some(pipe) = &mut lent.pipe {
            pipe.inside = rustix::io::write(&pipe.write, b"under way").expect("writes");
        }
        let of_connection = io::Error::from_raw_os_error(libc::ECONNRESET);
        assert_eq!(lent.take(&of_connection), None);
        assert!(pool.lend().is_some());
        let refused = io::Error::from_raw_os_error(libc::EPERM);
        assert_eq!(lent.take(&refused).as_deref(), Some(&b"under way"[..]));
        assert_eq!(lent.inside(), 0);
        assert!(pool.lend().is_none());
    }

    #[test]
    fn a_pipe_with_bytes_inside_is_never_lent_again() {
        let pool = pool();
        let mut lent = pool.lend().expect("one is free");
        if let Some(pipe) = &mut lent.pipe {
            pipe.inside = rustix::io::write(&pipe.write, b"left behind").expect("writes");
        }
        drop(lent);
        assert_eq!(pool.metrics.pipes.get(), 0);
        assert_eq!(pool.lend().expect("one is free").inside(), 0);
    }
}

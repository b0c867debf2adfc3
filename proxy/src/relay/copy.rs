//! Engine `copy`: bytes through a buffer of the thread.
//!
//! It never owns a byte. What is queued at the source is *peeked*, handed to the destination, and
//! only what the destination took is then taken off the source's queue (MSG_TRUNC, which copies
//! nothing). A stalled destination therefore costs no userspace memory: the bytes stay in the
//! source's receive queue, where its TCP window slows the sender down.

use std::cell::RefCell;
use std::io;

use crate::socket::{self, Socket};

/// As much as one step moves. Larger ones gained nothing in measurements, and this keeps a step
/// short enough to share a thread.
pub const CHUNK: usize = 64 * 1024;

thread_local! {
    /// One for each thread of the runtime, in use only inside [`step`], which never waits.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into_boxed_slice());
}

/// What one step achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// This many bytes; all that was seen at the source.
    Moved(usize),
    /// This many bytes, then the destination was full; more bytes are queued at the source.
    Full(usize),
    /// The source has nothing.
    SourceEmpty,
    /// The destination takes nothing; bytes are queued at the source.
    DestinationFull,
    /// The source has sent FIN and everything before it was moved.
    EndOfStream,
}

/// What failed: a step touches both sockets.
#[derive(Debug)]
pub enum Fault {
    /// Reading.
    Source(io::Error),
    /// Writing.
    Destination(io::Error),
}

/// Moves up to [`CHUNK`] bytes. `queued` says that bytes are known to wait at the source, so that
/// the reactor's opinion is not asked.
///
/// # Errors
/// The side that failed, and how.
pub fn step(source: &Socket, destination: &Socket, queued: bool) -> Result<Step, Fault> {
    SCRATCH.with_borrow_mut(|scratch| {
        let Some(seen) = peek(source, scratch, queued).map_err(Fault::Source)? else {
            return Ok(Step::SourceEmpty);
        };
        if seen == 0 {
            return Ok(Step::EndOfStream);
        }
        let sent = match send(destination, &scratch[..seen]).map_err(Fault::Destination)? {
            0 => return Ok(Step::DestinationFull),
            sent => sent,
        };
        socket::discard(source, scratch, sent).map_err(Fault::Source)?;
        Ok(if sent == seen { Step::Moved(sent) } else { Step::Full(sent) })
    })
}

/// Peeks into `scratch`; `None` if nothing is there, 0 at the end of the stream.
fn peek(source: &Socket, scratch: &mut [u8], queued: bool) -> io::Result<Option<usize>> {
    let mut seen = None;
    let result = if queued {
        socket::peek(source, scratch).map(|n| seen = Some(n))
    } else {
        source.try_read(|fd| {
            let n = socket::peek(fd, scratch)?;
            seen = Some(n);
            // A short read empties the queue, so the reactor can be told that nothing is left,
            // which saves the call that would find out. Not so near an urgent mark.
            let emptied = n > 0 && n < scratch.len() && !source.has_seen_urgent();
            if emptied { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        })
    };
    match result {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(seen),
    }
}

/// Writes what the destination takes, which may be nothing.
///
/// # Errors
/// Those of send(2).
pub fn send(destination: &Socket, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    let result = destination.try_write(|fd| {
        sent = socket::send(fd, bytes)?;
        // The kernel takes less only when the buffer is full, and then tells when there is room
        // again (`sk_stream_wait_memory` sets SOCK_NOSPACE): saves the call that would find out.
        if sent < bytes.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    match result {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(sent),
    }
}

//! Runs a relay: one pump for each direction, and what ends them early.

use std::future::poll_fn;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use futures::future::try_join;
use prometheus::IntCounter;
use tokio::time::Instant;

use super::copy::{self, CHUNK, Fault, Step};
use super::splice::{Lent, PipePool};
use super::{End, Engine, Reason, Side};
use crate::drain::Watcher;
use crate::socket::{Downstream, SendQueue, Socket, Upstream};

/// Bytes that one direction may move before others on its thread get a turn.
const TURN: usize = 1024 * 1024;

/// Bytes in one splice below which copying is cheaper than the pipe.
const WORTH_A_PIPE: usize = 16 * 1024;

/// How often a connection that moved bytes is looked at until its send queues are empty.
const LOOK_INTERVAL: Duration = Duration::from_secs(20);

/// What every relay of the process shares.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Where `splice` gets its pipes.
    pub pipes: Arc<PipePool>,
    /// End a relay that moved no byte for this long.
    pub idle_timeout: Option<Duration>,
    /// Tells when to cut.
    pub drain: Watcher,
}

/// Where moved bytes are counted.
#[derive(Debug, Clone)]
pub struct Counters {
    /// From clients to servers.
    pub up: IntCounter,
    /// From servers to clients.
    pub down: IntCounter,
}

/// Relays until both directions have ended or something fails. The sockets are then closed by
/// their owner: with FIN if the reason is orderly, else with RST.
pub async fn run(
    engine: Engine,
    client: &Downstream,
    server: &Upstream,
    limits: &Limits,
    counters: &Counters,
) -> End {
    let moved = Moved::default();
    let first_closed = OnceLock::new();
    let pool = (engine == Engine::Splice).then_some(&limits.pipes);
    let pump = |source, destination, moved| Pump {
        source,
        destination,
        moved,
        pool,
        first_closed: &first_closed,
    };
    let (at_client, at_server) = ((&client.0, Side::Client), (&server.0, Side::Server));
    let up = pump(at_client, at_server, (&moved.up, &counters.up)).run();
    let down = pump(at_server, at_client, (&moved.down, &counters.down)).run();
    let reason = tokio::select! {
        // Pumps first: a side that failed may have sent bytes before, which are still to be read.
        biased;
        result = try_join(up, down) => match result {
            Ok(_) => Reason::Closed(first_closed.get().copied().unwrap_or(Side::Client)),
            Err(reason) => reason,
        },
        error = client.0.failed() => fault(Side::Client, &error),
        error = server.0.failed() => fault(Side::Server, &error),
        () = limits.drain.cut() => Reason::Cut,
        () = watch(&moved, [&client.0, &server.0], limits.idle_timeout) => Reason::Idle,
    };
    if reason.is_orderly() {
        client.0.let_close_orderly();
        server.0.let_close_orderly();
    }
    End {
        reason,
        bytes_up: moved.up.load(Ordering::Relaxed),
        bytes_down: moved.down.load(Ordering::Relaxed),
    }
}

/// Bytes moved so far. All of it belongs to one task; atomics only because that may change its
/// thread.
#[derive(Debug, Default)]
struct Moved {
    up: AtomicU64,
    down: AtomicU64,
}

impl Moved {
    fn total(&self) -> u64 {
        self.up.load(Ordering::Relaxed).wrapping_add(self.down.load(Ordering::Relaxed))
    }
}

/// One direction.
struct Pump<'a> {
    source: (&'a Socket, Side),
    destination: (&'a Socket, Side),
    pool: Option<&'a Arc<PipePool>>,
    moved: (&'a AtomicU64, &'a IntCounter),
    /// The side whose stream ended first, shared with the other direction.
    first_closed: &'a OnceLock<Side>,
}

impl Pump<'_> {
    /// Moves bytes until the source's FIN has been passed on.
    async fn run(self) -> Result<(), Reason> {
        // Whether the source sends so much at once that a pipe pays.
        let mut bulk = false;
        // Whether bytes are known to wait at the source, whatever the reactor says.
        let mut queued = false;
        let mut turn = 0;
        loop {
            if bulk
                && !queued
                && let Some(pipe) = self.pool.and_then(|pool| pool.lend())
            {
                let moved = self.through(pipe).await?;
                // Nothing spliced proves nothing (see `Lent::fill`): a read decides.
                queued = moved == 0;
                bulk = queued || moved >= WORTH_A_PIPE;
                take_turns(&mut turn, moved).await;
                continue;
            }
            let step = copy::step(self.source.0, self.destination.0, queued);
            queued = matches!(step, Ok(Step::DestinationFull | Step::Full(_)));
            match step {
                Ok(Step::Moved(count)) => {
                    bulk = count == CHUNK || (bulk && count >= WORTH_A_PIPE);
                    self.count(count);
                    take_turns(&mut turn, count).await;
                }
                Ok(Step::Full(count)) => {
                    self.count(count);
                    self.wait_for_room().await?;
                }
                Ok(Step::DestinationFull) => self.wait_for_room().await?,
                Ok(Step::SourceEmpty) => self.wait_for_bytes().await?,
                Ok(Step::EndOfStream) => return self.finish(),
                Err(Fault::Source(error)) => return Err(fault(self.source.1, &error)),
                Err(Fault::Destination(error)) => return Err(fault(self.destination.1, &error)),
            }
        }
    }

    /// Moves one pipe's worth. Returns 0 if nothing could be spliced.
    async fn through(&self, mut pipe: Lent) -> Result<usize, Reason> {
        let filled = match pipe.fill(self.source.0) {
            Ok(filled) => filled,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(fault(self.source.1, &error)),
        };
        while pipe.inside() > 0 {
            match pipe.empty(self.destination.0) {
                Ok(moved) => self.count(moved),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait_for_room().await?;
                }
                Err(error) => return Err(fault(self.destination.1, &error)),
            }
        }
        Ok(filled)
    }

    /// The source's stream has ended: so does the destination's, after all that was written.
    fn finish(self) -> Result<(), Reason> {
        let (destination, side) = self.destination;
        destination.shutdown_write().map_err(|error| fault(side, &error))?;
        // Refused if the other direction ended before, which is what it is for.
        let _ = self.first_closed.set(self.source.1);
        Ok(())
    }

    async fn wait_for_bytes(&self) -> Result<(), Reason> {
        let (source, side) = self.source;
        source.readable().await.map_err(|error| fault(side, &error))
    }

    async fn wait_for_room(&self) -> Result<(), Reason> {
        let (destination, side) = self.destination;
        destination.writable().await.map_err(|error| fault(side, &error))
    }

    fn count(&self, bytes: usize) {
        let bytes = bytes as u64;
        self.moved.0.fetch_add(bytes, Ordering::Relaxed);
        self.moved.1.inc_by(bytes);
    }
}

/// Lets others on this thread run once a turn's worth was moved. A small message costs the thread
/// as much as some kilobytes of a large one.
async fn take_turns(turn: &mut usize, moved: usize) {
    *turn += moved.max(4096);
    if *turn >= TURN {
        *turn = 0;
        tokio::task::yield_now().await;
    }
}

/// Whose fault an error is, and what kind.
fn fault(side: Side, error: &io::Error) -> Reason {
    match error.kind() {
        // EPIPE and ENOTCONN follow on a RST whose ECONNRESET another call has collected.
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::NotConnected => Reason::Reset(side),
        io::ErrorKind::TimedOut => Reason::TimedOut(side),
        _ => Reason::Failed(side),
    }
}

/// Ends when no byte has moved for `idle_timeout`, or up to a quarter more. Beside that, keeps
/// TCP_USER_TIMEOUT from ending a connection whose peer is alive but reads no more, as behind
/// `kubectl logs -f | less`: what has no limit on a direct connection has none here.
///
/// Costs nothing while nothing moves: no timer runs unless bytes moved or wait in a send queue.
async fn watch(moved: &Moved, sockets: [&Socket; 2], idle_timeout: Option<Duration>) {
    let interval = idle_timeout.map_or(LOOK_INTERVAL, |idle| LOOK_INTERVAL.min(idle / 4));
    let mut seen = moved.total();
    let mut quiet_since = Instant::now();
    let mut lifted = [false; 2];
    let mut pending = idle_timeout.is_some();
    loop {
        // Whatever moves bytes polls this task, and so looks here.
        poll_fn(|_| if pending || moved.total() != seen { Poll::Ready(()) } else { Poll::Pending })
            .await;
        tokio::time::sleep(interval).await;
        let now_moved = moved.total();
        if now_moved != seen {
            (seen, quiet_since) = (now_moved, Instant::now());
        }
        if idle_timeout.is_some_and(|idle| quiet_since.elapsed() >= idle) {
            return;
        }
        pending = idle_timeout.is_some();
        for (socket, lifted) in sockets.into_iter().zip(&mut lifted) {
            let queue = socket.send_queue();
            let stalled = queue == SendQueue::ClosedWindow;
            if stalled != *lifted {
                socket.lift_user_timeout(stalled);
                *lifted = stalled;
            }
            pending |= queue != SendQueue::Empty;
        }
    }
}

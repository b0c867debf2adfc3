//! Runs a relay: one pump for each direction, and what ends them early.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use prometheus::IntCounter;
use tokio::time::Instant;

use super::copy::{self, CHUNK, Fault, Step};
use super::splice::PipePool;
use super::{End, Engine, Moved, Reason, Side};
use crate::drain::Watcher;
use crate::socket::{Downstream, Socket, Upstream};

/// Bytes that one direction may move before others on its thread get a turn.
const TURN: usize = 1024 * 1024;

/// The same while a better engine is about to look at the connection, which wants little in our
/// hands: it gets its turn after so much. And the queue that sources may fill meanwhile, which is what
/// the kernel gives a connection to begin with, before it tunes it.
const YOUNG_TURN: usize = 64 * 1024;

/// Bytes in one read after which the kernel may have tuned the queue.
const TUNES: usize = 8 * 1024;

/// Bytes in one splice below which copying is cheaper than the pipe.
const WORTH_A_PIPE: usize = 16 * 1024;

/// How often a connection that moved bytes is looked at until its send queues are empty.
const LOOK_INTERVAL: Duration = Duration::from_secs(20);

/// How old a connection is before all of that begins: most have ended by then.
const YOUTH: Duration = Duration::from_secs(1);

/// How long the last bytes before a RST may take to the other side.
const LAST_WORDS: Duration = Duration::from_secs(1);

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

/// When a relay is to pause for a better engine: once it is this old, or has moved this much. Short
/// connections come to neither, and so pay nothing for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Time from now on.
    pub after: Duration,
    /// Bytes moved, both directions together, from the connection's beginning.
    pub bytes: u64,
}

/// Why [`run`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is over.
    Ended(End),
    /// The moment has come. No byte is in our own hands: what is not counted as moved is in the
    /// sockets' queues.
    Paused(Moved),
}

/// Relays until both directions have ended or something fails. The sockets are then closed by
/// their owner: with FIN if the reason is orderly, else with RST. With `pause`, returns at that
/// moment instead; `moved` is what an earlier run of the same connection has moved.
///
/// An idle relay lives as long as its connection, so its state is kept small: here and below,
/// `async move` blocks use what they are given in place (an `async fn` would keep it twice), and
/// what only a busy, stuck or ending relay needs is boxed.
pub fn run<'a>(
    engine: Engine,
    client: &'a Downstream,
    server: &'a Upstream,
    limits: &'a Limits,
    counters: &'a Counters,
    moved: Moved,
    pause: Option<Box<Moment>>,
) -> impl Future<Output = Outcome> + Send {
    let relay = Relay {
        client: &client.0,
        server: &server.0,
        pool: (engine == Engine::Splice).then_some(&limits.pipes),
        counters,
        up: AtomicU64::new(moved.up),
        down: AtomicU64::new(moved.down),
        is_resumed: moved != Moved::default(),
        is_young: pause.is_some() && moved == Moved::default(),
        in_pipe: AtomicU8::new(0),
        held_back: AtomicU8::new(0),
        first_to_end: OnceLock::new(),
    };
    async move {
        // Boxed, and gone with its timer where nobody asked for it.
        let mut moment = pause.map(|pause| Box::pin(relay.moment(*pause)));
        let reason = tokio::select! {
            biased;
            () = poll_fn(|context| match &mut moment {
                Some(moment) => moment.as_mut().poll(context),
                None => Poll::Pending,
            }) => return Outcome::Paused(relay.so_far()),
            result = relay.to_the_end() => match result {
                Ok(()) => Reason::Closed(*relay.first_to_end.get_or_init(|| Side::Client)),
                Err(reason) => reason,
            },
            () = limits.drain.cut() => Reason::Cut,
            () = relay.watch(limits.idle_timeout) => Reason::Idle,
        };
        if let Reason::Reset(side) = reason {
            Box::pin(relay.last_words(side)).await;
        }
        let Moved { up, down } = relay.so_far();
        Outcome::Ended(End { reason, bytes_up: up, bytes_down: down })
    }
}

/// What a relay does when `from` has sent RST, for whoever else moves its bytes; returns all that
/// was moved.
pub(crate) async fn last_words(
    (client, server): (&Downstream, &Upstream),
    counters: &Counters,
    moved: Moved,
    from: Side,
) -> Moved {
    let relay = Relay {
        client: &client.0,
        server: &server.0,
        pool: None,
        counters,
        up: AtomicU64::new(moved.up),
        down: AtomicU64::new(moved.down),
        is_resumed: true,
        is_young: false,
        in_pipe: AtomicU8::new(0),
        held_back: AtomicU8::new(0),
        first_to_end: OnceLock::new(),
    };
    relay.last_words(from).await;
    relay.so_far()
}

/// What both directions of one relay share.
struct Relay<'a> {
    client: &'a Socket,
    server: &'a Socket,
    pool: Option<&'a Arc<PipePool>>,
    counters: &'a Counters,
    /// Bytes moved so far. One task writes them; atomics only because it may change its thread.
    up: AtomicU64,
    down: AtomicU64,
    /// Bytes may wait in the sockets of which the reactor does not tell again.
    is_resumed: bool,
    /// This is the run before the first look of a better engine.
    is_young: bool,
    /// Directions that have bytes in a pipe, one bit each ([`Side::bit`]).
    in_pipe: AtomicU8,
    /// Sides whose queue the kernel is kept from tuning, likewise.
    held_back: AtomicU8,
    /// The side whose stream ended first.
    first_to_end: OnceLock<Side>,
}

#[expect(clippy::manual_async_fn, reason = "an async fn would keep its arguments twice")]
impl Relay<'_> {
    /// Ends when both streams have ended and all their bytes are at least on their way, or when
    /// one side has failed. From the end on, closing the sockets sends FIN.
    fn to_the_end(&self) -> impl Future<Output = Result<(), Reason>> {
        async move {
            self.both().await?;
            let is_late = self.client.holds_unsent() || self.server.holds_unsent();
            if is_late {
                self.pass_on_the_second_end()?;
            }
            for side in [Side::Client, Side::Server] {
                if is_late {
                    Box::pin(self.unless_fails(side, self.sent_to(side))).await?;
                }
                self.socket(side).let_close_orderly();
            }
            Ok(())
        }
    }

    /// Ends when the send queue holds nothing unsent. A socket that is closed earlier is an orphan,
    /// which the kernel gives up on although its peer is alive: after TCP_USER_TIMEOUT, or after
    /// tcp_orphan_retries probes of a closed window. No event tells of it, so this looks.
    async fn sent_to(&self, side: Side) -> Result<(), Reason> {
        let mut pause = Duration::from_millis(1);
        while self.socket(side).holds_unsent() {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
        Ok(())
    }

    /// `from` has sent RST. What it sent before is passed on as far as the other side takes it: a
    /// server that answers early and closes with the request's rest unread sends its answer and
    /// then RST, and on a direct connection the client reads both. Takes no longer than
    /// [`LAST_WORDS`], and no time where nothing is left or the other side does not read.
    async fn last_words(&self, from: Side) {
        let (source, destination) = (self.socket(from), self.socket(from.other()));
        if self.in_pipe.load(Ordering::Relaxed) & from.bit() != 0 {
            // These bytes went with their pump. What is queued behind them must not go ahead.
            return;
        }
        while let Ok(Step::Moved(count)) = copy::step(source, destination, true) {
            self.count(from, count);
        }
        let deadline = Instant::now() + LAST_WORDS;
        let mut pause = Duration::from_millis(1);
        while Instant::now() < deadline {
            // Closing throws away what is queued, so that has to leave before.
            let queue = destination.send_queue();
            if queue.is_empty() || queue.is_stalled() {
                return;
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }

    /// Ends when both directions have ended, or one has failed. A pump whose stream has ended
    /// still answers for its source until the other one is done as well.
    fn both(&self) -> impl Future<Output = Result<(), Reason>> {
        async move {
            let mut up = pin!(self.pump(Side::Client));
            let mut down = pin!(self.pump(Side::Server));
            tokio::select! {
                biased;
                result = &mut up => {
                    result?;
                    Box::pin(self.unless_fails(Side::Client, down)).await
                }
                result = &mut down => {
                    result?;
                    Box::pin(self.unless_fails(Side::Server, up)).await
                }
            }
        }
    }

    /// Moves bytes that `from` sends until its FIN has been passed on.
    ///
    /// At any time a pump answers for its source: while it waits for bytes, reading them brings
    /// the error; while it waits for anything else, it watches for errors beside that. So every
    /// failure of either socket is seen at once, whatever both directions are doing.
    fn pump(&self, from: Side) -> impl Future<Output = Result<(), Reason>> {
        async move {
            // Whether the source sends so much at once that a pipe pays.
            let mut bulk = false;
            // Whether bytes are known to wait at the source, whatever the reactor says.
            let mut queued = self.is_resumed;
            let mut turn = 0;
            loop {
                if bulk && !queued && !self.is_young() && self.pool.is_some() {
                    match Box::pin(self.through_pipe(from)).await? {
                        Piped::Moved(count) => {
                            bulk = count >= WORTH_A_PIPE;
                            if is_turn_over(&mut turn, count, TURN) {
                                tokio::task::yield_now().await;
                            }
                            continue;
                        }
                        // The reactor now believes that nothing is left, but see `Lent::fill`.
                        Piped::Blocked => queued = true,
                        Piped::Nothing => {}
                    }
                }
                let step = copy::step(self.socket(from), self.socket(from.other()), queued);
                queued = matches!(step, Ok(Step::DestinationFull | Step::Full(_)));
                match step {
                    Ok(Step::Moved(count)) => {
                        bulk = count == CHUNK || (bulk && count >= WORTH_A_PIPE);
                        self.count(from, count);
                        self.stay_small(from, count);
                        if is_turn_over(&mut turn, count, self.turn()) {
                            tokio::task::yield_now().await;
                        }
                    }
                    Ok(Step::Full(count)) => {
                        self.count(from, count);
                        self.stay_small(from, count);
                        Box::pin(self.room_at(from.other())).await?;
                    }
                    Ok(Step::DestinationFull) => Box::pin(self.room_at(from.other())).await?,
                    Ok(Step::SourceEmpty) => self.bytes_at(from).await?,
                    Ok(Step::EndOfStream) => return self.pass_on_the_end(from),
                    Err(Fault::Source(error)) => return Err(fault(from, &error)),
                    Err(Fault::Destination(error)) => return Err(fault(from.other(), &error)),
                }
            }
        }
    }

    /// Whether the first look is still to come. With a direction at its end there will be none.
    fn is_young(&self) -> bool {
        self.is_young && self.first_to_end.get().is_none()
    }

    /// How much one direction may move at once.
    fn turn(&self) -> usize {
        if self.is_young() { YOUNG_TURN } else { TURN }
    }

    /// Keeps the kernel from letting megabytes queue up for a source whose bytes are read fast.
    fn stay_small(&self, from: Side, moved: usize) {
        let is_due = self.is_young() && moved >= TUNES;
        if is_due && self.held_back.fetch_or(from.bit(), Ordering::Relaxed) & from.bit() == 0 {
            self.socket(from).hold_back(YOUNG_TURN);
        }
    }

    /// Moves up to one pipe's worth.
    async fn through_pipe(&self, from: Side) -> Result<Piped, Reason> {
        let Some(mut pipe) = self.pool.and_then(|pool| pool.lend()) else {
            return Ok(Piped::Nothing);
        };
        let filled = match pipe.fill(self.socket(from)) {
            Ok(0) => return Ok(Piped::Nothing),
            Ok(filled) => filled,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Piped::Blocked),
            Err(error) => return Err(fault(from, &error)),
        };
        self.in_pipe.fetch_or(from.bit(), Ordering::Relaxed);
        while pipe.inside() > 0 {
            match pipe.empty(self.socket(from.other())) {
                Ok(moved) => self.count(from, moved),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.room_at(from.other()).await?;
                }
                Err(error) => match pipe.take(&error) {
                    Some(bytes) => self.write_all(from, &bytes).await?,
                    None => return Err(fault(from.other(), &error)),
                },
            }
        }
        self.in_pipe.fetch_and(!from.bit(), Ordering::Relaxed);
        Ok(Piped::Moved(filled))
    }

    /// Writes what was taken out of a pipe.
    async fn write_all(&self, from: Side, mut bytes: &[u8]) -> Result<(), Reason> {
        while !bytes.is_empty() {
            let sent = copy::send(self.socket(from.other()), bytes);
            let sent = sent.map_err(|error| fault(from.other(), &error))?;
            self.count(from, sent);
            bytes = &bytes[sent..];
            if !bytes.is_empty() {
                self.room_at(from.other()).await?;
            }
        }
        Ok(())
    }

    /// The stream of `from` has ended: so does the other socket's, after all that was written. The
    /// second end is passed on by closing that socket, which both are about to be unless bytes wait.
    fn pass_on_the_end(&self, from: Side) -> Result<(), Reason> {
        if self.first_to_end.get().is_some() {
            return Ok(());
        }
        let shut = self.socket(from.other()).shutdown_write();
        shut.map_err(|error| fault(from.other(), &error))?;
        // What is still to come has no look to wait for.
        if self.held_back.load(Ordering::Relaxed) & from.other().bit() != 0 {
            self.socket(from.other()).let_flow();
        }
        self.first_to_end.get_or_init(|| from);
        Ok(())
    }

    /// Without closing: no end waits for a reader that stalls, least of all one of the other
    /// direction, nor longer than for the bytes before it.
    fn pass_on_the_second_end(&self) -> Result<(), Reason> {
        let Some(first) = self.first_to_end.get().copied() else { return Ok(()) };
        self.socket(first).shutdown_write().map_err(|error| fault(first, &error))
    }

    /// Ends when there is something to read, an error included.
    fn bytes_at(&self, side: Side) -> impl Future<Output = Result<(), Reason>> {
        let socket = self.socket(side);
        async move { socket.readable().await.map_err(|error| fault(side, &error)) }
    }

    /// Ends when the send buffer of `side` has room, or the other side fails.
    async fn room_at(&self, side: Side) -> Result<(), Reason> {
        let socket = self.socket(side);
        let room = async { socket.writable().await.map_err(|error| fault(side, &error)) };
        self.unless_fails(side.other(), room).await
    }

    /// Ends with `other`, or when `side` fails first.
    async fn unless_fails(
        &self,
        side: Side,
        other: impl Future<Output = Result<(), Reason>>,
    ) -> Result<(), Reason> {
        tokio::select! {
            biased;
            result = other => result,
            error = self.socket(side).failed() => Err(fault(side, &error)),
        }
    }

    /// Ends at the moment that was asked for, if no byte is in a pipe and neither direction has
    /// ended.
    fn moment(&self, Moment { after, bytes }: Moment) -> impl Future<Output = ()> {
        async move {
            let mut timer = Box::pin(tokio::time::sleep(after));
            let mut is_due = false;
            // Polled first whenever anything moves; a timer sees to connections in which nothing
            // does.
            poll_fn(|context| {
                is_due = is_due || self.moved() >= bytes || timer.as_mut().poll(context).is_ready();
                let is_whole =
                    self.in_pipe.load(Ordering::Relaxed) == 0 && self.first_to_end.get().is_none();
                if is_due && is_whole { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
        }
    }

    fn so_far(&self) -> Moved {
        Moved { up: self.up.load(Ordering::Relaxed), down: self.down.load(Ordering::Relaxed) }
    }

    /// Ends when no byte has moved for `idle_timeout`, or up to a quarter more. Beside that,
    /// keeps TCP_USER_TIMEOUT from ending a connection whose peer is alive but reads no more, as
    /// behind `kubectl logs -f | less`: what has no limit on a direct connection has none here.
    ///
    /// Costs nothing while nothing moves: but for the beginning, no timer runs unless bytes moved
    /// or wait in a queue.
    fn watch(&self, idle_timeout: Option<Duration>) -> impl Future<Output = ()> {
        async move {
            // Boxed, so that it takes no room once it is over.
            let young = idle_timeout.map_or(YOUTH, |idle| YOUTH.min(idle / 8));
            Box::pin(tokio::time::sleep(young)).await;
            self.server.watch_peer();
            let mut seen = 0;
            loop {
                // Whatever moves bytes polls this task, and so looks here.
                let moved = || idle_timeout.is_some() || self.moved() != seen;
                poll_fn(|_| if moved() { Poll::Ready(()) } else { Poll::Pending }).await;
                match Box::pin(self.watch_closely(idle_timeout)).await {
                    Watched::Idle => return,
                    Watched::Quiet(moved) => seen = moved,
                }
            }
        }
    }

    /// Looks again and again until nothing moves and nothing waits in a send queue.
    async fn watch_closely(&self, idle_timeout: Option<Duration>) -> Watched {
        let interval = idle_timeout.map_or(LOOK_INTERVAL, |idle| LOOK_INTERVAL.min(idle / 8));
        let mut seen = self.moved();
        let mut quiet_since = Instant::now();
        // An earlier run may have ended with either lifted.
        let mut lifted = [self.is_resumed; 2];
        loop {
            tokio::time::sleep(interval).await;
            let mut busy = self.moved() != seen;
            if busy {
                (seen, quiet_since) = (self.moved(), Instant::now());
            }
            if idle_timeout.is_some_and(|idle| quiet_since.elapsed() >= idle) {
                return Watched::Idle;
            }
            for (socket, lifted) in [self.client, self.server].into_iter().zip(&mut lifted) {
                let queue = socket.send_queue();
                busy |= !queue.is_empty();
                if queue.is_stalled() != *lifted {
                    *lifted = queue.is_stalled();
                    socket.lift_user_timeout(*lifted);
                }
            }
            if !busy && idle_timeout.is_none() {
                return Watched::Quiet(seen);
            }
        }
    }

    fn socket(&self, side: Side) -> &Socket {
        match side {
            Side::Client => self.client,
            Side::Server => self.server,
        }
    }

    fn count(&self, from: Side, bytes: usize) {
        let bytes = bytes as u64;
        let (total, counter) = match from {
            Side::Client => (&self.up, &self.counters.up),
            Side::Server => (&self.down, &self.counters.down),
        };
        total.fetch_add(bytes, Ordering::Relaxed);
        counter.inc_by(bytes);
    }

    fn moved(&self) -> u64 {
        self.up.load(Ordering::Relaxed).wrapping_add(self.down.load(Ordering::Relaxed))
    }
}

/// What a pipe achieved.
enum Piped {
    /// This many bytes.
    Moved(usize),
    /// Nothing, and the reactor waits for news from the source.
    Blocked,
    /// Nothing: no pipe was free, or the source had an end or an urgent mark to show. The reactor
    /// has learnt nothing, so a read may go by what it says.
    Nothing,
}

/// What watching closely has found.
enum Watched {
    /// The idle time-out has passed.
    Idle,
    /// Nothing moves and nothing waits; so many bytes had moved.
    Quiet(u64),
}

/// Whether others on this thread may run, since a whole turn's worth was moved. A small message costs
/// the thread as much as some kilobytes of a large one.
fn is_turn_over(turn: &mut usize, moved: usize, whole: usize) -> bool {
    *turn += moved.max(4096);
    let is_over = *turn >= whole;
    if is_over {
        *turn = 0;
    }
    is_over
}

/// Whose fault an error is, and what kind.
pub(crate) fn fault(side: Side, error: &io::Error) -> Reason {
    match error.kind() {
        // EPIPE and ENOTCONN follow on a RST whose ECONNRESET another call has collected.
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::NotConnected => Reason::Reset(side),
        io::ErrorKind::TimedOut => Reason::TimedOut(side),
        _ => Reason::Failed(side),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use socket2::SockRef;
    use tokio::time::timeout;

    use super::*;
    use crate::metrics::Metrics;

    /// Two ends of a connection that is made as std makes it.
    fn pair() -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let ours = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
        ours.set_nonblocking(true).expect("is a socket");
        let theirs = listener.accept().expect("accepts").0;
        (Socket::new(ours.into()).expect("registers"), theirs)
    }

    #[tokio::test(start_paused = true)]
    async fn once_it_has_lived_for_a_second_a_vanished_server_is_noticed() {
        let ((client, _client), (server, _server)) = (pair(), pair());
        let (client, server) = (Downstream(client), Upstream(server, None));
        let metrics = Arc::new(Metrics::new().expect("registers"));
        let pipes = Arc::new(PipePool::new(Arc::clone(&metrics)));
        let limits = Limits { pipes, idle_timeout: None, drain: Watcher::default() };
        let counters = Counters { up: metrics.bytes_up.clone(), down: metrics.bytes_down.clone() };
        let relay = run(Engine::Copy, &client, &server, &limits, &counters, Moved::default(), None);
        let mut relay = pin!(relay);
        let is_watched = || SockRef::from(&server.0).keepalive().expect("asks");
        assert!(timeout(YOUTH / 2, &mut relay).await.is_err(), "nothing ends it");
        assert!(!is_watched(), "short connections are spared the calls");
        assert!(timeout(YOUTH, &mut relay).await.is_err(), "nothing ends it");
        assert!(is_watched());
    }
}

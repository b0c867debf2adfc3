//! The threads that relay: one for each core, each with a runtime of its own.
//!
//! What a connection needs stays on the thread where it began, so its sockets, its task and its
//! timers are never handed from core to core. One runtime for all of them balances better and costs
//! more: its threads wake each other and take tasks from each other (`ARCHITECTURE.md` has the
//! figures). Balance is made here, once for each connection, when it is accepted.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tokio::runtime::{Builder, Handle, Runtime, RuntimeMetrics};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// By how many connections a worker may be ahead of another before it hands new ones over, which
/// costs a wake-up.
const SLACK: usize = 2;

/// All of them; they end when this is dropped.
#[derive(Debug)]
pub struct Workers {
    all: Arc<[Worker]>,
    stop: CancellationToken,
    threads: Vec<thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Worker {
    runtime: Handle,
    /// Knows how many tasks live there: one for each connection, and few others.
    metrics: RuntimeMetrics,
}

/// One worker's view: whoever accepts there decides where a connection lives.
#[derive(Debug)]
pub struct Seat {
    all: Arc<[Worker]>,
    own: usize,
    /// Whom it was compared with last.
    last: AtomicUsize,
}

impl Worker {
    fn new(runtime: Handle) -> Self {
        let metrics = runtime.metrics();
        Self { runtime, metrics }
    }
}

impl Workers {
    /// Starts as many as the process may use cores.
    ///
    /// # Errors
    /// No more threads or descriptors.
    pub fn start() -> io::Result<Self> {
        Self::start_some(thread::available_parallelism().map_or(1, usize::from))
    }

    fn start_some(count: usize) -> io::Result<Self> {
        let stop = CancellationToken::new();
        let (mut all, mut threads) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            all.push(Worker::new(runtime.handle().clone()));
            threads.push(start_thread(runtime, stop.clone())?);
        }
        Ok(Self { all: all.into(), stop, threads })
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.all.len()
    }

    /// Gives each one of `what`, and runs what `accept` makes of it there.
    pub fn on_each<T, F>(
        &self,
        what: impl IntoIterator<Item = T>,
        mut accept: impl FnMut(Seat, T) -> F,
    ) -> Vec<JoinHandle<()>>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let seat = |own| Seat { all: Arc::clone(&self.all), own, last: AtomicUsize::new(own) };
        let each = self.all.iter().zip(what).enumerate();
        each.map(|(own, (worker, what))| worker.runtime.spawn(accept(seat(own), what))).collect()
    }
}

fn start_thread(runtime: Runtime, stop: CancellationToken) -> io::Result<thread::JoinHandle<()>> {
    // The name is what `top -H` shows.
    let thread = thread::Builder::new().name("relay".to_owned());
    thread.spawn(move || runtime.block_on(stop.cancelled()))
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.cancel();
        for thread in self.threads.drain(..) {
            // It has no result, and a panic has been told of.
            let _ = thread.join();
        }
    }
}

impl Seat {
    /// Where there is but the present runtime.
    #[must_use]
    pub fn alone() -> Self {
        let worker = Worker::new(Handle::current());
        Self { all: Arc::new([worker]), own: 0, last: AtomicUsize::new(0) }
    }

    /// Spawns `session`: here, unless another worker has clearly less to do.
    pub fn spawn(&self, session: impl Future<Output = ()> + Send + 'static) {
        self.all[self.choose()].runtime.spawn(session);
    }

    /// Compares with one other worker, the next one each time: to look at all of them would cost
    /// the more the more there are.
    fn choose(&self) -> usize {
        let load = |index: usize| self.all[index].metrics.num_alive_tasks();
        let mut other = (self.last.load(Ordering::Relaxed) + 1) % self.all.len();
        if other == self.own {
            other = (other + 1) % self.all.len();
        }
        self.last.store(other, Ordering::Relaxed);
        let theirs = load(other);
        if load(self.own) > theirs + SLACK.max(theirs / 2) { other } else { self.own }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn who_is_clearly_ahead_hands_over() {
        let workers = Workers::start_some(3).expect("threads");
        let seats = Mutex::new(Vec::new());
        let accepting = workers.on_each([(); 3], |seat, ()| {
            seats.lock().expect("no panic").push(seat);
            async {}
        });
        while !accepting.iter().all(JoinHandle::is_finished) {
            thread::yield_now();
        }
        let seats = seats.into_inner().expect("no panic");
        let add = |count: usize| (0..count).for_each(|_| seats[1].spawn(std::future::pending()));
        let loads = || {
            let load = |worker: &Worker| worker.metrics.num_alive_tasks();
            workers.all.iter().map(load).collect::<Vec<_>>()
        };
        add(3);
        assert_eq!(loads(), [0, 3, 0], "a few are no reason");
        add(27);
        let all = loads();
        assert_eq!(all.iter().sum::<usize>(), 30);
        let least = all.iter().min().copied().unwrap_or_default();
        assert!(all.iter().all(|load| *load <= least + SLACK.max(least / 2) + 1), "{all:?}");
    }

    #[test]
    fn alone_it_keeps_all() {
        let workers = Workers::start_some(1).expect("a thread");
        let (send, receive) = std::sync::mpsc::channel();
        workers.on_each([()], |seat, ()| {
            let send = send.clone();
            async move {
                seat.spawn(async move {
                    let _ = send.send(());
                });
            }
        });
        receive.recv().expect("the session ran");
    }
}

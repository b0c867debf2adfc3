//! Thousands of conversations over wires that lose, double, reorder and delay segments: every byte
//! arrives once and in order, every direction ends when its end was said, and none is cut off.
//!
//! Needs root, the `ip` command (network namespaces) and TAP devices. A run's seed is printed, and
//! can be given again as `BAD_WIRES_SEED`; each conversation that fails names its own.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proxy_tests::lossy::Faults;
use proxy_tests::process::need_open_files;
use proxy_tests::proxy::Launch;
use proxy_tests::row::Family::{self, V4, V6};
use proxy_tests::row::Row;
use proxy_tests::script::{End, Failure, Script, answer, begin};
use proxy_tests::wait::bound;

/// Makes each of the tests once per engine.
macro_rules! engines {
    ($($name:ident: $engine:literal $flags:tt;)*) => {
        $(mod $name {
            use super::*;
            const ENGINE: Engine = Engine { name: $engine, flags: &$flags };

            #[test]
            fn clean_v4() {
                talk(ENGINE, V4, Ground::Clean, 360);
            }
            #[test]
            fn clean_v6() {
                talk(ENGINE, V6, Ground::Clean, 360);
            }
            #[test]
            fn five_of_a_thousand_v4() {
                talk(ENGINE, V4, Ground::Bad(Faults::of_thousand(5)), 360);
            }
            #[test]
            fn five_of_a_thousand_v6() {
                talk(ENGINE, V6, Ground::Bad(Faults::of_thousand(5)), 360);
            }
            #[test]
            fn twenty_of_a_thousand_v4() {
                talk(ENGINE, V4, Ground::Bad(Faults::of_thousand(20)), 360);
            }
            #[test]
            fn twenty_of_a_thousand_v6() {
                talk(ENGINE, V6, Ground::Bad(Faults::of_thousand(20)), 360);
            }
            #[test]
            fn far_away_v4() {
                talk(ENGINE, V4, Ground::Bad(Faults::NONE.delayed(FAR)), 120);
            }
            #[test]
            fn far_away_v6() {
                talk(ENGINE, V6, Ground::Bad(Faults::NONE.delayed(FAR)), 120);
            }
        })*
    };
}

// An engine, and what flags it needs beside its name.
engines! {
    splice: "splice" [];
    packet: "packet" [("packet-max-rtt", "1s")];
}

/// What a packet takes on each wire, each way.
const FAR: Duration = Duration::from_millis(25);

/// Largest bulk step of a conversation each way, in bytes.
const MOST: usize = 3_000_000;

/// Conversations at once.
const WORKERS: usize = 60;

#[derive(Clone, Copy)]
struct Engine {
    name: &'static str,
    flags: &'static [(&'static str, &'static str)],
}

#[derive(Clone, Copy)]
enum Ground {
    /// Wires as the kernel makes them: segments of 64 KiB, checksums not computed.
    Clean,
    Bad(Faults),
}

/// What happened to the conversations of one run, by seed and end.
#[derive(Debug, Default)]
struct Results {
    whole: Mutex<BTreeMap<u64, Vec<End>>>,
    failed: Mutex<Vec<Failure>>,
}

impl Results {
    fn add(&self, end: End, result: Result<u64, Failure>) {
        match result {
            Ok(seed) => {
                let mut whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
                whole.entry(seed).or_default().push(end);
            }
            Err(failure) => {
                self.failed.lock().unwrap_or_else(PoisonError::into_inner).push(failure);
            }
        }
    }
}

/// Numbers for `count` conversations.
#[derive(Debug)]
struct Seeds {
    first: u64,
    count: u64,
    taken: AtomicU64,
}

impl Seeds {
    fn next(&self) -> Option<u64> {
        let number = self.taken.fetch_add(1, Relaxed);
        (number < self.count).then(|| self.first + number)
    }

    fn all(&self) -> impl Iterator<Item = u64> {
        self.first..self.first + self.count
    }
}

fn run_seed() -> u64 {
    match std::env::var("BAD_WIRES_SEED") {
        Ok(text) => text.parse().expect("BAD_WIRES_SEED is a number"),
        Err(_) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
            // Seeds of conversations follow each other; those of runs are far apart.
            (now.as_nanos() as u64 & 0xffff_ffff) << 20
        }
    }
}

/// `count` conversations through a proxy: in one half of them the client speaks first, in the
/// other the server does.
fn talk(engine: Engine, family: Family, ground: Ground, count: u64) {
    need_open_files(4_000);
    let seed = run_seed();
    println!("BAD_WIRES_SEED={seed}");
    let row = match ground {
        Ground::Clean => Row::new(),
        Ground::Bad(faults) => Row::over_bad_wires(faults, seed),
    };
    let at = SocketAddr::new(row.back(family), 0);
    let listener = row.server.run(move || TcpListener::bind(at)).expect("a server listens");
    let mut launch = Launch::new(listener.local_addr().expect("bound"))
        .flag("engine", engine.name)
        .flag("listen-addr", "[::]:0")
        .flag("connect-timeout", "60s");
    for (name, value) in engine.flags {
        launch = launch.flag(name, value);
    }
    let proxy = launch.on(&row.node).start();
    let front = SocketAddr::new(row.front(family), proxy.address().port());
    let listener = Arc::new(listener);

    let mut bytes = (0, 0);
    for (speaks_first, first) in [(End::Client, seed), (End::Server, seed + (1 << 16))] {
        let seeds = Arc::new(Seeds { first, count: count / 2, taken: AtomicU64::new(0) });
        converse(&row, front, &listener, speaks_first, &seeds);
        for seed in seeds.all() {
            let (up, down) = Script::new(seed, speaks_first, MOST).bytes();
            bytes = (bytes.0 + up, bytes.1 + down);
        }
    }
    for bad in &row.faults {
        println!("{:?}", bad.harm());
    }
    if let Ground::Bad(Faults { lost: 1.., .. }) = ground {
        let hurt = |bad: &proxy_tests::lossy::BadWire| {
            let harm = bad.harm();
            harm.lost > 0 && harm.doubled > 0 && harm.reordered > 0
        };
        assert!(row.faults.iter().all(hurt), "the wires did no harm");
    }
    let ended = proxy.access_log(count as usize);
    let odd: Vec<_> = ended.iter().filter(|e| !e.reason.ends_with("_closed")).collect();
    assert!(odd.is_empty(), "ended in another way than the peers did: {odd:?}");
    let logged = ended.iter().fold((0, 0), |(up, down), e| (up + e.bytes_up, down + e.bytes_down));
    assert_eq!(logged, bytes, "bytes in the access log, and said");
}

/// Has all conversations of `seeds`, a bounded number at once.
fn converse(
    row: &Row,
    front: SocketAddr,
    listener: &Arc<TcpListener>,
    speaks_first: End,
    seeds: &Arc<Seeds>,
) {
    let begun = Instant::now();
    let results = Arc::new(Results::default());
    let (log, numbers) = (Arc::clone(&results), Arc::clone(seeds));
    let clients = row.client.run(move || {
        workers(move || {
            // Who is spoken to counts along: as many connections, whichever comes first.
            while let Some(number) = numbers.next() {
                log.add(End::Client, client(front, speaks_first, number));
            }
        })
    });
    let (log, numbers) = (Arc::clone(&results), Arc::clone(seeds));
    let listener = Arc::clone(listener);
    let left = Arc::new(Seeds { taken: AtomicU64::new(0), ..*numbers });
    let servers = row.server.run(move || {
        workers(move || {
            while let Some(number) = left.next() {
                log.add(End::Server, server(&listener, speaks_first, number));
            }
        })
    });
    for worker in clients.into_iter().chain(servers) {
        worker.join().expect("no panic");
    }
    let failed = results.failed.lock().unwrap_or_else(PoisonError::into_inner);
    for Failure { seed, what } in &*failed {
        println!("conversation {seed} ({speaks_first:?} first): {what}");
    }
    let whole = results.whole.lock().unwrap_or_else(PoisonError::into_inner);
    let halves: Vec<_> =
        seeds.all().filter(|s| whole.get(s).is_none_or(|e| e.len() != 2)).collect();
    println!("{} conversations, {speaks_first:?} first: {:?}", seeds.count, begun.elapsed());
    assert!(failed.is_empty() && halves.is_empty(), "{} failed: {halves:?}", failed.len());
}

fn workers(work: impl Fn() + Clone + Send + 'static) -> Vec<std::thread::JoinHandle<()>> {
    (0..WORKERS).map(|_| std::thread::spawn(work.clone())).collect()
}

fn client(front: SocketAddr, speaks_first: End, number: u64) -> Result<u64, Failure> {
    let fail = |what: String| Failure { seed: number, what };
    let connected = TcpStream::connect_timeout(&front, 2 * bound());
    let socket = connected.map_err(|e| fail(format!("Client, connecting: {e}")))?;
    take_part(&socket, End::Client, speaks_first, number)
}

fn server(listener: &TcpListener, speaks_first: End, number: u64) -> Result<u64, Failure> {
    let fail = |what: String| Failure { seed: number, what };
    let timeout = rustix::event::Timespec { tv_sec: 2 * bound().as_secs() as i64, tv_nsec: 0 };
    let mut fds = [rustix::event::PollFd::new(listener, rustix::event::PollFlags::IN)];
    match rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&timeout))) {
        Ok(1..) => {}
        other => return Err(fail(format!("Server, no connection came: {other:?}"))),
    }
    let (socket, _) = listener.accept().map_err(|e| fail(format!("Server, accepting: {e}")))?;
    take_part(&socket, End::Server, speaks_first, number)
}

/// Who speaks first takes conversation `number`; the other is told which one it is in.
fn take_part(socket: &TcpStream, end: End, speaks_first: End, number: u64) -> Result<u64, Failure> {
    if end == speaks_first {
        begin(socket, end, &Script::new(number, speaks_first, MOST)).map(|()| number)
    } else {
        answer(socket, end, MOST)
    }
}

//! Plain TCP load: a server that echoes, swallows or pours, and clients that time it.
//!
//! A connection begins with a message of [`MESSAGE`] bytes, which comes back. Its byte [`MODE`]
//! chooses what follows: `E` more such messages; `S` one more, then the server swallows until the
//! end of the stream and answers with the count; `G` one more, then the server gives bytes until
//! the client goes. So every connection speaks before it streams, as real protocols do.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::meter::Meter;

/// Bytes of an echoed message: a small request.
const MESSAGE: usize = 64;

/// The byte of the first message that chooses; the eight before it hold a number.
const MODE: usize = 8;

/// Bytes that a bulk stream writes at once.
const BLOCK: usize = 256 * 1024;

/// A peer that is silent for so long has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bulk bytes that have reached their readers, whichever host they are on: all hosts are in this
/// process, and one load runs at a time.
static ARRIVED: AtomicU64 = AtomicU64::new(0);

/// What the clients do, on how many connections at once.
#[derive(Debug, Clone, Copy)]
pub enum Load {
    /// Request and answer in turn.
    Echo(usize),
    /// Client to server; every byte is accounted for.
    Up(usize),
    /// Server to client.
    Down(usize),
    /// Connect, one request and its answer, close, again and again.
    Connect(usize),
}

/// How long a load runs.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// Not measured: connections are made, windows grow, engines switch.
    pub warm_up: Duration,
    /// Measured.
    pub time: Duration,
}

/// What a load measured.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// Messages or connections per second.
    pub per_second: f64,
    /// Bits per second over 10^9.
    pub gbit: f64,
    /// Median time of one exchange, microseconds.
    pub p50_us: f64,
    /// 99th percentile, microseconds.
    pub p99_us: f64,
    /// Messages or connections.
    pub exchanges: usize,
    /// Processor time of the proxy, seconds.
    pub proxy_seconds: f64,
    /// Of client, proxy and server together.
    pub all_seconds: f64,
}

/// Serves as long as this process lives, on as many threads as there were connections at once:
/// a new one for each would be what a connection costs. They are on the host that calls this.
///
/// # Errors
/// The address cannot be bound.
pub fn serve(address: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
    let server = Arc::new(Server { listener, idle: AtomicUsize::new(0) });
    server.hire()?;
    Ok(())
}

struct Server {
    listener: TcpListener,
    /// Threads that wait for a connection.
    idle: AtomicUsize,
}

impl Server {
    fn hire(self: &Arc<Self>) -> std::io::Result<()> {
        let server = Arc::clone(self);
        self.idle.fetch_add(1, Ordering::Relaxed);
        std::thread::Builder::new().name("server".to_owned()).spawn(move || server.work())?;
        Ok(())
    }

    fn work(self: &Arc<Self>) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.idle.fetch_sub(1, Ordering::Relaxed) == 1 {
                // Without one more thread the next client waits, and tells of it.
                let _ = self.hire();
            }
            // The client of a connection that fails tells why.
            let _ = serve_one(stream);
            self.idle.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn serve_one(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut message = [0; MESSAGE];
    let mut echo = |stream: &mut TcpStream| {
        stream.read_exact(&mut message)?;
        stream.write_all(&message)?;
        Ok::<_, std::io::Error>(message[MODE])
    };
    match echo(&mut stream)? {
        b'S' => {
            echo(&mut stream)?;
            let total = swallow(&mut stream, || true)?;
            stream.write_all(&total.to_be_bytes())
        }
        b'G' => {
            echo(&mut stream)?;
            let block = vec![7; BLOCK];
            loop {
                stream.write_all(&block)?;
            }
        }
        _ => loop {
            echo(&mut stream)?;
        },
    }
}

/// Reads until the end of the stream, or as long as `more`; how many bytes.
fn swallow(stream: &mut TcpStream, more: impl Fn() -> bool) -> std::io::Result<u64> {
    let mut block = vec![0; BLOCK];
    let mut total = 0;
    while more() {
        let n = stream.read(&mut block)? as u64;
        if n == 0 {
            break;
        }
        total += n;
        ARRIVED.fetch_add(n, Ordering::Relaxed);
    }
    Ok(total)
}

/// Runs the load from the host that calls this; `proxy` watches the proxy.
///
/// # Errors
/// A connection failed or answered wrongly.
pub fn run(load: Load, target: SocketAddr, span: Span, proxy: Meter) -> Result<Figures> {
    let clock = Clock::default();
    match load {
        Load::Echo(count) => in_threads(count, &clock, span, proxy, || echo(target, &clock)),
        Load::Connect(count) => in_threads(count, &clock, span, proxy, || connects(target, &clock)),
        Load::Up(count) => in_threads(count, &clock, span, proxy, || upload(target, &clock)),
        Load::Down(count) => in_threads(count, &clock, span, proxy, || download(target, &clock)),
    }
}

/// What all connections of a load go by.
#[derive(Default)]
struct Clock(AtomicU8);

impl Clock {
    const MEASURED: u8 = 1;
    const OVER: u8 = 2;

    fn is(&self, phase: u8) -> bool {
        self.0.load(Ordering::Relaxed) == phase
    }

    fn set(&self, phase: u8) {
        self.0.store(phase, Ordering::Relaxed);
    }
}

/// A client's connection.
struct Client {
    stream: TcpStream,
    message: [u8; MESSAGE],
    number: u64,
}

impl Client {
    fn connect(target: SocketAddr, mode: u8) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&target, PATIENCE)
            .with_context(|| format!("connect to {target}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut message = [1; MESSAGE];
        message[MODE] = mode;
        Ok(Self { stream, message, number: 0 })
    }

    /// One request and its answer.
    fn exchange(&mut self) -> Result<()> {
        self.number += 1;
        self.message[..MODE].copy_from_slice(&self.number.to_be_bytes());
        let sent = self.message;
        self.stream.write_all(&sent).context("send a request")?;
        self.stream.read_exact(&mut self.message).context("receive an answer")?;
        ensure!(self.message == sent, "a message came back wrong");
        Ok(())
    }
}

/// Nanoseconds of each exchange that began while it counted.
type Times = Vec<u32>;

fn echo(target: SocketAddr, clock: &Clock) -> Result<Times> {
    let mut client = Client::connect(target, b'E')?;
    timed(clock, || client.exchange())
}

fn connects(target: SocketAddr, clock: &Clock) -> Result<Times> {
    timed(clock, || Client::connect(target, b'E')?.exchange())
}

fn timed(clock: &Clock, mut exchange: impl FnMut() -> Result<()>) -> Result<Times> {
    let mut took = Times::with_capacity(1 << 16);
    while !clock.is(Clock::OVER) {
        let counts = clock.is(Clock::MEASURED);
        let before = Instant::now();
        exchange()?;
        if counts {
            took.push(u32::try_from(before.elapsed().as_nanos()).unwrap_or(u32::MAX));
        }
    }
    Ok(took)
}

fn upload(target: SocketAddr, clock: &Clock) -> Result<Times> {
    let mut client = Client::connect(target, b'S')?;
    client.exchange()?;
    client.exchange()?;
    let block = vec![3; BLOCK];
    let mut sent = 0_u64;
    while !clock.is(Clock::OVER) {
        client.stream.write_all(&block).context("send a block")?;
        sent += block.len() as u64;
    }
    client.stream.shutdown(Shutdown::Write)?;
    let mut counted = [0; 8];
    client.stream.read_exact(&mut counted).context("receive the count")?;
    let counted = u64::from_be_bytes(counted);
    ensure!(counted == sent, "the server counted {counted} bytes of {sent}");
    Ok(Times::new())
}

fn download(target: SocketAddr, clock: &Clock) -> Result<Times> {
    let mut client = Client::connect(target, b'G')?;
    client.exchange()?;
    client.exchange()?;
    let more = || !clock.is(Clock::OVER);
    swallow(&mut client.stream, more).context("receive blocks")?;
    ensure!(!more(), "the stream ended early");
    Ok(Times::new())
}

/// Does `work` on `count` threads and measures it once it is warm.
fn in_threads(
    count: usize,
    clock: &Clock,
    span: Span,
    proxy: Meter,
    work: impl Fn() -> Result<Times> + Sync,
) -> Result<Figures> {
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..count).map(|_| scope.spawn(&work)).collect();
        std::thread::sleep(span.warm_up);
        let arrived = || ARRIVED.load(Ordering::Relaxed);
        // Clients and servers are threads of this process, and proxies its children.
        let all = Meter::of(Some(std::process::id()));
        let before = [proxy, all].map(Meter::seconds);
        let (begun, bytes) = (Instant::now(), arrived());
        clock.set(Clock::MEASURED);
        std::thread::sleep(span.time);
        let bytes = arrived() - bytes;
        let elapsed = begun.elapsed().as_secs_f64();
        // Before they are told to stop: the time of threads that have ended is not known.
        let after = [proxy, all].map(Meter::seconds);
        clock.set(Clock::OVER);
        let mut times = Times::new();
        for worker in workers {
            times.extend(worker.join().map_err(|_| anyhow::anyhow!("a client panicked"))??);
        }
        times.sort_unstable();
        let at = |share: f64| {
            let index = (times.len() as f64 * share) as usize;
            times.get(index).map_or(0.0, |ns| f64::from(*ns) / 1000.0)
        };
        Ok(Figures {
            per_second: times.len() as f64 / elapsed,
            gbit: bytes as f64 * 8.0 / elapsed / 1e9,
            p50_us: at(0.5),
            p99_us: at(0.99),
            exchanges: times.len(),
            proxy_seconds: after[0] - before[0],
            all_seconds: after[1] - before[1],
        })
    })
}

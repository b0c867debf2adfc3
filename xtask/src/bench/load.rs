//! Plain TCP load: a server that echoes, swallows or pours, and clients that time it.
//!
//! The first byte of a connection chooses: `E` echoes messages of [`MESSAGE`] bytes, `S` swallows
//! until the end of the stream and answers with the count, `G` gives bytes until the client goes.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

/// Bytes of an echoed message: a small request.
pub const MESSAGE: usize = 64;

/// Bytes that a bulk stream writes at once.
const BLOCK: usize = 256 * 1024;

/// What a phase measured.
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
}

/// Serves as long as this process lives, a thread for each connection. The threads are on the
/// host that calls this.
///
/// # Errors
/// The address cannot be bound.
pub fn serve(address: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
    std::thread::Builder::new().name("server".to_owned()).spawn(move || {
        for stream in listener.incoming().flatten() {
            // A connection that fails ends its thread; its client tells why.
            let _ = std::thread::Builder::new().spawn(move || serve_one(stream));
        }
    })?;
    Ok(())
}

fn serve_one(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut mode = [0];
    stream.read_exact(&mut mode)?;
    match mode[0] {
        b'E' => {
            let mut message = [0; MESSAGE];
            loop {
                stream.read_exact(&mut message)?;
                stream.write_all(&message)?;
            }
        }
        b'S' => {
            let mut block = vec![0; BLOCK];
            let mut total = 0_u64;
            loop {
                match stream.read(&mut block)? {
                    0 => break,
                    n => total += n as u64,
                }
            }
            stream.write_all(&total.to_be_bytes())
        }
        _ => {
            let block = vec![7; BLOCK];
            loop {
                stream.write_all(&block)?;
            }
        }
    }
}

/// Request and answer in turn on `connections` connections.
///
/// # Errors
/// A connection failed or answered wrongly.
pub fn echo(target: SocketAddr, connections: usize, time: Duration) -> Result<Figures> {
    let stop = AtomicBool::new(false);
    let started = Instant::now();
    let mut all = in_threads(connections, &stop, time, || {
        let mut stream = connect(target, b'E')?;
        let mut took = Vec::with_capacity(1 << 16);
        let mut message = [0; MESSAGE];
        let mut number = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            number += 1;
            message[..8].copy_from_slice(&number.to_be_bytes());
            let before = Instant::now();
            stream.write_all(&message)?;
            stream.read_exact(&mut message)?;
            took.push(before.elapsed().as_nanos() as u32);
            ensure!(message[..8] == number.to_be_bytes(), "a message came back wrong");
        }
        Ok(took)
    })?;
    Ok(timed(&mut all, started.elapsed()))
}

/// Connect, one request, close, again and again on `clients` threads.
///
/// # Errors
/// A connection failed or answered wrongly.
pub fn connect_request_close(
    target: SocketAddr,
    clients: usize,
    time: Duration,
) -> Result<Figures> {
    let stop = AtomicBool::new(false);
    let started = Instant::now();
    let mut all = in_threads(clients, &stop, time, || {
        let mut took = Vec::with_capacity(1 << 14);
        let mut message = [1; MESSAGE];
        while !stop.load(Ordering::Relaxed) {
            let before = Instant::now();
            let mut stream = connect(target, b'E')?;
            stream.write_all(&message)?;
            stream.read_exact(&mut message)?;
            drop(stream);
            took.push(before.elapsed().as_nanos() as u32);
        }
        Ok(took)
    })?;
    Ok(timed(&mut all, started.elapsed()))
}

/// Client to server on `streams` streams; every byte is accounted for.
///
/// # Errors
/// A connection failed, or the server counted other bytes than were sent.
pub fn upload(target: SocketAddr, streams: usize, time: Duration) -> Result<Figures> {
    let stop = AtomicBool::new(false);
    let started = Instant::now();
    let all = in_threads(streams, &stop, time, || {
        let mut stream = connect(target, b'S')?;
        let block = vec![3; BLOCK];
        let mut sent = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            stream.write_all(&block)?;
            sent += block.len() as u64;
        }
        stream.shutdown(Shutdown::Write)?;
        let mut counted = [0; 8];
        stream.read_exact(&mut counted)?;
        ensure!(u64::from_be_bytes(counted) == sent, "the server counted other bytes");
        Ok(vec![sent])
    })?;
    Ok(bulk(&all, started.elapsed()))
}

/// Server to client on `streams` streams.
///
/// # Errors
/// A connection failed.
pub fn download(target: SocketAddr, streams: usize, time: Duration) -> Result<Figures> {
    let stop = AtomicBool::new(false);
    let started = Instant::now();
    let all = in_threads(streams, &stop, time, || {
        let mut stream = connect(target, b'G')?;
        let mut block = vec![0; BLOCK];
        let mut got = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            let n = stream.read(&mut block)?;
            ensure!(n > 0, "the stream ended early");
            got += n as u64;
        }
        Ok(vec![got])
    })?;
    Ok(bulk(&all, started.elapsed()))
}

fn connect(target: SocketAddr, mode: u8) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(target).with_context(|| format!("connect to {target}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(&[mode])?;
    Ok(stream)
}

fn in_threads<T: Send>(
    count: usize,
    stop: &AtomicBool,
    time: Duration,
    work: impl Fn() -> Result<Vec<T>> + Sync,
) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..count).map(|_| scope.spawn(&work)).collect();
        std::thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for worker in workers {
            all.extend(worker.join().map_err(|_| anyhow::anyhow!("a client panicked"))??);
        }
        Ok(all)
    })
}

fn timed(nanoseconds: &mut [u32], elapsed: Duration) -> Figures {
    nanoseconds.sort_unstable();
    let at = |share: f64| {
        let index = (nanoseconds.len() as f64 * share) as usize;
        nanoseconds.get(index).map_or(0.0, |ns| f64::from(*ns) / 1000.0)
    };
    Figures {
        exchanges: nanoseconds.len(),
        per_second: nanoseconds.len() as f64 / elapsed.as_secs_f64(),
        p50_us: at(0.5),
        p99_us: at(0.99),
        ..Figures::default()
    }
}

fn bulk(bytes: &[u64], elapsed: Duration) -> Figures {
    let total: u64 = bytes.iter().sum();
    Figures { gbit: total as f64 * 8.0 / elapsed.as_secs_f64() / 1e9, ..Figures::default() }
}

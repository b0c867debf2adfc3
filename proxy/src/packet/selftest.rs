//! The self-test: before the engine may have real connections, it relays two of its own.
//!
//! Three private network namespaces play client, node and server; the node's runs the real engine
//! with the real programs. One connection is switched, carries a known stream each way while
//! segments get lost, and ends in order; the other is switched and reset. What does not work on
//! this kernel shows here, and not on somebody's connection.

mod ground;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use proxy_common::WATCH_LOCAL;
use socket2::{Domain, SockFilter, SockRef, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tracing::subscriber::NoSubscriber;

use super::attach::Method;
use super::eligible::Ineligible;
use super::eventually::Eventually;
use super::{Packet, ends, pins};
use crate::config::{Host, HostPort, ListenAddr, PacketConfig, UpstreamAddrs};
use crate::drain::Drain;
use crate::metrics::Metrics;
use crate::relay::{Counters, Engine, Limits, PipePool, Wish};
use crate::session::Shared;
use crate::upstream::Upstream;
use crate::workers::Seat;
use crate::{accept, listeners};
use ground::{End, Ground, ip};

/// The connections take some 50 ms, on a machine that is busy enough a hundred times that.
const PATIENCE: Duration = Duration::from_secs(10);

/// For loading the programs. The verifier is what takes most of the time: where a processor is slow,
/// shared or throttled, tens of seconds, which say nothing against the engine.
const TO_LOAD: Duration = Duration::from_secs(120);

/// For all that follows. Nobody can end a thread that the kernel does not let go of.
const HARD_LIMIT: Duration = Duration::from_secs(30);

/// The longest that it can take.
pub const LONGEST: Duration = TO_LOAD.saturating_add(HARD_LIMIT);

/// Bytes of the stream each way.
const STREAM: usize = 512 * 1024;

/// Of how many large segments one is lost, while the first half of the stream arrives.
const LOST: u32 = 16;

/// What came of it.
#[derive(Debug)]
pub enum Verdict {
    /// The engine works here; what was done.
    Passed(String),
    /// There is no ground to try it on: no privilege for a namespace, or no veth.
    NotTried(io::Error),
    /// The engine does not work here.
    Failed(anyhow::Error),
}

/// What the thread of the test tells.
enum Word {
    Loaded,
    Done(Verdict),
}

/// Tries the engine. Takes a moment, but never longer than [`LONGEST`]; nothing stays behind.
#[must_use]
pub fn run() -> Verdict {
    let (tell, told) = channel();
    let begun = Instant::now();
    // A thread of its own, whose namespace changes. Not joined: one that hangs in the kernel ends
    // with the process.
    let spawned = std::thread::Builder::new().name("self-test".into()).spawn(move || {
        // Its engine's log lines would be taken for those of the real one.
        let _silent = tracing::subscriber::set_default(NoSubscriber::default());
        let verdict = match Ground::make() {
            Ok(ground) => test(&ground, &|| drop(tell.send(Word::Loaded))),
            Err(error) => Verdict::NotTried(error),
        };
        let _ = tell.send(Word::Done(verdict));
    });
    if let Err(error) = spawned {
        return Verdict::NotTried(error);
    }
    let word = match told.recv_timeout(TO_LOAD) {
        Ok(Word::Loaded) => told.recv_timeout(HARD_LIMIT),
        other => other,
    };
    match word {
        Ok(Word::Done(Verdict::Passed(detail))) => {
            Verdict::Passed(format!("{detail}, in {} ms", begun.elapsed().as_millis()))
        }
        Ok(Word::Done(verdict)) => verdict,
        Ok(Word::Loaded) | Err(RecvTimeoutError::Timeout) => {
            Verdict::Failed(anyhow::anyhow!("it hangs"))
        }
        Err(RecvTimeoutError::Disconnected) => Verdict::Failed(anyhow::anyhow!("it panicked")),
    }
}

fn test(ground: &Ground, loaded: &dyn Fn()) -> Verdict {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Verdict::NotTried(error),
    };
    match runtime.block_on(Test::run(ground, loaded)) {
        Ok(()) => Verdict::Passed(format!(
            "a connection switched, {} KiB each way with losses, half-close; one reset ({})",
            STREAM >> 10,
            if ground.has_v6 { "IPv4, IPv6" } else { "IPv4" }
        )),
        Err(error) => Verdict::Failed(error),
    }
}

/// A running engine.
struct Test<'a> {
    ground: &'a Ground,
    packet: Arc<Packet>,
}

impl<'a> Test<'a> {
    async fn run(ground: &'a Ground, loaded: &dyn Fn()) -> Result<()> {
        let metrics = Arc::new(Metrics::new()?);
        let (max_rtt, attach) = (Duration::from_secs(1), Method::default());
        let config = PacketConfig { bpffs: None, max_rtt, keepalive: None, attach };
        // Each relay of the test has a listener of its own, which it has watched itself.
        let nowhere = SocketAddr::from(([0; 4], 0));
        let places = Arc::new(Semaphore::new(16));
        let (packet, news) =
            Packet::start(&config, pins::be_the_one()?, nowhere, 16, places, metrics)?;
        loaded();
        tokio::spawn(ends::run(Arc::clone(&packet), news, None));
        let test = Self { ground, packet };
        tokio::try_join!(
            async {
                in_time(test.in_order(false)).await.context("a connection that ends in order")
            },
            async {
                in_time(test.reset(ground.has_v6)).await.context("a connection that is reset")
            },
        )?;
        Ok(())
    }

    /// A stream each way, then one end after the other.
    async fn in_order(&self, is_v6: bool) -> Result<()> {
        let (mut client, mut server) = self.switched(is_v6).await?;
        for stream in [&client, &server] {
            lose(stream)?;
        }
        exchange(&mut client, &mut server).await?;
        client.shutdown().await.context("ending the client's direction")?;
        ensure!(server.read(&mut [0; 1]).await? == 0, "bytes came after the stream's end");
        server.write_all(b"after").await.context("sending on a half-closed connection")?;
        let mut rest = Vec::new();
        server.shutdown().await.context("ending the server's direction")?;
        client.read_to_end(&mut rest).await.context("receiving on a half-closed connection")?;
        ensure!(rest == b"after", "a half-closed connection brought {} bytes", rest.len());
        // The programs tell of the end. (Counted by the engine of both connections.)
        let ended = self.packet.metrics.ended.with_label_values(&["packet", "client_closed"]);
        while ended.get() == 0 {
            sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// A RST in the middle.
    async fn reset(&self, is_v6: bool) -> Result<()> {
        let (client, mut server) = self.switched(is_v6).await?;
        SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
        drop(client);
        match server.read(&mut [0; 1]).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            other => bail!("RST was not passed on: {other:?}"),
        }
    }

    /// Both ends of a connection that was relayed by us and is now by the kernel.
    async fn switched(&self, is_v6: bool) -> Result<(TcpStream, TcpStream)> {
        let at_server = SocketAddr::new(ip(End::Server, true, is_v6), 0);
        let listener = self.ground.at(End::Server, || std::net::TcpListener::bind(at_server))?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let (port, metrics) = self.relay(listener.local_addr()?)?;
        let domain = if is_v6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket =
            self.ground.at(End::Client, || socket2::Socket::new(domain, Type::STREAM, None))?;
        socket.set_nonblocking(true)?;
        let socket = TcpSocket::from_std_stream(socket.into());
        let node = SocketAddr::new(ip(End::Client, false, is_v6), port);
        let (client, accepted) = tokio::join!(socket.connect(node), listener.accept());
        let mut client = client.context("connecting")?;
        let (mut server, _) = accepted.context("accepting")?;
        ping(&mut client, &mut server).await.context("relayed in userspace")?;
        self.is_switched(&metrics).await?;
        ping(&mut client, &mut server).await.context("relayed by the kernel")?;
        Ok((client, server))
    }

    /// Starts a relay to `server`, as the real one is started; its port.
    fn relay(&self, server: SocketAddr) -> Result<(u16, Arc<Metrics>)> {
        let listener = listeners::bind(ListenAddr { ip: None, port: 0 }, 1)?.listen()?.remove(0);
        let listening = listener.local_addr()?;
        self.packet.watch(listening, WATCH_LOCAL);
        let metrics = Arc::new(Metrics::new()?);
        let host = HostPort { host: Host::Ip(server.ip()), port: server.port() };
        let packet = Eventually::default();
        ensure!(packet.fill(&self.packet), "a new one is empty");
        let upstream = Upstream::new(
            &UpstreamAddrs(vec![host]),
            PATIENCE,
            listening,
            packet.clone(),
            Arc::clone(&metrics),
        );
        let shared = Shared {
            wish: Wish::Only(Engine::Packet),
            packet,
            upstream: Arc::new(upstream),
            limits: Limits {
                pipes: Arc::new(PipePool::new(Arc::clone(&metrics))),
                idle_timeout: None,
                drain: Drain::default().watcher(),
            },
            counters: Counters { up: metrics.bytes_up.clone(), down: metrics.bytes_down.clone() },
            metrics: Arc::clone(&metrics),
        };
        tokio::spawn(accept::run(
            listener,
            Seat::alone(),
            Arc::new(shared),
            Arc::new(Semaphore::new(1)),
        ));
        Ok((listening.port(), metrics))
    }

    /// Waits until the relay whose metrics these are has handed its only connection over.
    async fn is_switched(&self, metrics: &Metrics) -> Result<()> {
        let splice = Wish::Only(Engine::Packet).decide().as_label();
        let in_userspace = metrics.relaying.with_label_values(&[splice]);
        loop {
            for reason in Ineligible::ALL.into_iter().filter(|reason| !reason.may_pass()) {
                // The engine counts them, for whichever of the connections.
                let stays = self.packet.metrics.packet_ineligible.clone();
                let label = reason.as_label();
                ensure!(stays.with_label_values(&[label]).get() == 0, "not switched: {label}");
            }
            for reason in ["client_error", "server_error", "client_reset", "server_reset"] {
                let ended = metrics.ended.with_label_values(&[splice, reason]);
                ensure!(ended.get() == 0, "the switch failed ({reason})");
            }
            if in_userspace.get() == 0 {
                return Ok(());
            }
            sleep(Duration::from_millis(1)).await;
        }
    }
}

async fn in_time(connection: impl Future<Output = Result<()>>) -> Result<()> {
    match timeout(PATIENCE, connection).await {
        Ok(outcome) => outcome,
        Err(_) => bail!("not done after {} s", PATIENCE.as_secs()),
    }
}

/// A few bytes there and back.
async fn ping(client: &mut TcpStream, server: &mut TcpStream) -> Result<()> {
    let mut buffer = [0; 4];
    client.write_all(b"ping").await?;
    server.read_exact(&mut buffer).await?;
    ensure!(&buffer == b"ping", "the server got {buffer:?}");
    server.write_all(b"pong").await?;
    client.read_exact(&mut buffer).await?;
    ensure!(&buffer == b"pong", "the client got {buffer:?}");
    Ok(())
}

/// A known stream each way, at the same time.
async fn exchange(client: &mut TcpStream, server: &mut TcpStream) -> Result<()> {
    let (mut up, mut down) = (vec![0; STREAM], vec![0; STREAM]);
    fastrand::Rng::with_seed(1).fill(&mut up);
    fastrand::Rng::with_seed(2).fill(&mut down);
    let ((mut from_server, mut to_server), (mut from_client, mut to_client)) =
        (client.split(), server.split());
    tokio::try_join!(
        send(&mut to_server, &up),
        send(&mut to_client, &down),
        receive(&mut from_client, &up),
        receive(&mut from_server, &down),
    )?;
    Ok(())
}

async fn send(to: &mut WriteHalf<'_>, stream: &[u8]) -> Result<()> {
    to.write_all(stream).await.context("sending a stream")
}

async fn receive(from: &mut ReadHalf<'_>, expected: &[u8]) -> Result<()> {
    let (first, second) = expected.split_at(expected.len() / 2);
    for (half, part) in [first, second].into_iter().enumerate() {
        let mut buffer = vec![0; part.len()];
        from.read_exact(&mut buffer).await.context("receiving a stream")?;
        ensure!(buffer == part, "a stream arrived with other bytes than were sent");
        if half == 0 {
            // Nothing comes after the last segments, so only time would show that one is missing.
            SockRef::from(from.as_ref()).detach_filter()?;
        }
    }
    Ok(())
}

/// Has some large segments that arrive for this socket dropped before TCP sees them.
fn lose(stream: &TcpStream) -> Result<()> {
    /// linux/filter.h: what the load from this offset gives is a random number.
    const RANDOM: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM) as u32;
    let step = |code: u32, yes, no, k| SockFilter::new(code as u16, yes, no, k);
    let filter = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_LEN, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 2, 1000),
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, RANDOM),
        step(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, u32::MAX / LOST),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    Ok(SockRef::from(stream).attach_filter(&filter)?)
}

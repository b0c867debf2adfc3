//! The only place where parts are wired together.
//!
//! The workers move bytes; a runtime of its own answers scrapes and talks to Kubernetes, so that
//! neither a slow scrape nor a large watch event can delay a client.

use std::io::Write as _;
use std::net::SocketAddr;
use std::panic::PanicHookInfo;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tracing::{debug, error, info, warn};

use crate::config::{Config, EndpointMode, Host, HostPort, PacketConfig, UpstreamAddrs};
use crate::drain::Drain;
use crate::metrics::{Metrics, Refresh};
use crate::packet::eventually::Eventually;
use crate::packet::object::Refused;
use crate::packet::selftest::{self, Verdict};
use crate::packet::{self, Packet, pins};
use crate::readiness::Readiness;
use crate::relay::{Counters, Engine, Limits, PipePool, Reason, Wish};
use crate::session::Shared;
use crate::upstream::Upstream;
use crate::workers::Workers;
use crate::{accept, admin, control, endpoints, listeners, logging, preflight};

/// Descriptors beside those of connections: listeners, pipes, epoll, log, API client.
const OTHER_DESCRIPTORS: u64 = 512;

/// How often a drain looks whether connections that only this process keeps alive have ended.
const SETTLED_LOOK: Duration = Duration::from_millis(100);

/// Runs the proxy until a signal ends it. Exit status 0 after a clean drain, 1 if it could not
/// start or if connections had to be cut.
#[must_use]
pub fn main(config: Config) -> ExitCode {
    let metrics = match Metrics::new() {
        Ok(metrics) => Arc::new(metrics),
        Err(error) => {
            eprintln!("steward-tcp-proxy: metrics: {error}");
            return ExitCode::FAILURE;
        }
    };
    let usual_hook = end_on_panic();
    // Flushes what is still buffered when it is dropped, last of all.
    let _flush = logging::init(config.log_format, config.verbosity);
    let started = App::start(&config, metrics);
    std::panic::set_hook(usual_hook);
    match started.and_then(|app| app.run_to_end(&config)) {
        Ok(code) => code,
        Err(error) => {
            error!("cannot run: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Why threads cannot be started.
const FEW_THREADS: &str = "is the limit of processes or threads (ulimit -u, pids cgroup) too low?";

type PanicHook = Box<dyn Fn(&PanicHookInfo<'_>) + Sync + Send>;

/// While the proxy starts, a panic is a lack of threads (tokio and the log's writer do not return
/// that as an error, and waiting for the others could then take for ever): one line, and the end.
fn end_on_panic() -> PanicHook {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(|info| {
        let text = info.payload().downcast_ref::<String>().map(String::as_str);
        let what = text.or(info.payload().downcast_ref::<&str>().copied()).unwrap_or("panic");
        let hint = FEW_THREADS;
        let _ = writeln!(std::io::stderr(), "steward-tcp-proxy: cannot start: {what}; {hint}");
        std::process::exit(1);
    }));
    usual
}

/// A started proxy.
pub struct App {
    /// Where clients are accepted.
    pub listening: SocketAddr,
    /// Where metrics and health are served.
    pub admin: Option<SocketAddr>,
    /// Takes the admin socket's name away at the end.
    _admin_socket: Option<control::Held>,
    drain: Drain,
    metrics: Arc<Metrics>,
    packet: Eventually,
    accepting: Vec<JoinHandle<()>>,
    signals: Signals,
    workers: Workers,
    side: Runtime,
}

impl App {
    /// Binds everything, then starts everything.
    ///
    /// # Errors
    /// An address cannot be bound, or the system lacks threads or descriptors.
    pub fn start(config: &Config, metrics: Arc<Metrics>) -> anyhow::Result<Self> {
        raise_descriptor_limit(config.max_connections);
        let workers = Workers::start().context(FEW_THREADS)?;
        let bound = listeners::bind(config.listen, workers.count())?;
        let admin_listener = config.admin.map(admin::bind).transpose()?;
        let listening = bound.address();
        let admin = admin_listener.as_ref().map(std::net::TcpListener::local_addr).transpose()?;

        let side = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("side")
            .enable_all()
            .build()?;
        let signals = side.block_on(async { Signals::new() }).context("signal handlers")?;

        let drain = Drain::default();
        let timeout = config.connect_timeout;
        let places = Arc::new(Semaphore::new(config.max_connections));
        let packet = Eventually::default();
        packet.keep_listeners(bound.descriptors()?);
        let starter = Starter {
            config: config.packet.clone(),
            listening,
            upstream: config.upstream.clone(),
            max_connections: config.max_connections,
            places: Arc::clone(&places),
            metrics: Arc::clone(&metrics),
            idle_timeout: config.idle_timeout,
            side: side.handle().clone(),
            packet: packet.clone(),
        };
        starter.start_as(config.engine)?;
        // Not before the engine that was asked for by name is there: who connects is served by it.
        let listeners = bound.listen()?;
        let upstream = Upstream::new(
            &config.upstream,
            timeout,
            listening,
            packet.clone(),
            Arc::clone(&metrics),
        );
        let upstream = Arc::new(upstream);
        let readiness = Readiness::new(drain.watcher(), Arc::clone(&upstream));
        let shared = Shared {
            wish: config.engine,
            packet: packet.clone(),
            upstream,
            limits: Limits {
                pipes: Arc::new(PipePool::new(Arc::clone(&metrics))),
                idle_timeout: config.idle_timeout,
                drain: drain.watcher(),
            },
            counters: Counters { up: metrics.bytes_up.clone(), down: metrics.bytes_down.clone() },
            metrics: Arc::clone(&metrics),
        };
        metrics.describe_process(config.engine, config.engine.decide())?;
        let shared = Arc::new(shared);
        let accepting = workers.on_each(listeners, |seat, listener| {
            accept::run(listener, seat, Arc::clone(&shared), Arc::clone(&places))
        });
        readiness.listening();
        if let Some(listener) = admin_listener {
            side.spawn(admin::serve(listener, Arc::clone(&metrics), readiness.clone()));
        }
        let admin_socket = config.admin_socket.as_deref().map(|path| {
            let connections = packet::Handle(packet.clone(), side.handle().clone());
            control::start(path, Arc::new(connections), side.handle())
        });
        if config.endpoints.mode != EndpointMode::Off {
            let endpoints = config.endpoints.clone();
            // kube-proxy of this node leads clients from there to us.
            let packet = packet.clone();
            let asked: endpoints::Asked = Box::new(move |address| packet.watch_translated(address));
            let metrics = Arc::clone(&metrics);
            side.spawn(endpoints::run(endpoints, readiness, metrics, drain.watcher(), asked));
        }
        let app = Self {
            listening,
            admin,
            _admin_socket: admin_socket,
            drain,
            metrics,
            packet,
            accepting,
            signals,
            workers,
            side,
        };
        app.announce(config);
        Ok(app)
    }

    fn announce(&self, config: &Config) {
        info!(
            addr = %self.listening,
            upstream = %config.upstream,
            engine_wished = config.engine.as_label(),
            // With the packet engine too every connection begins in userspace.
            begins_with = config.engine.decide().as_label(),
            endpoint_mode = config.endpoints.mode.as_label(),
            version = crate::VERSION,
            "listening"
        );
        if let Some(addr) = self.admin {
            info!(%addr, "admin listening");
        }
    }

    /// Waits for the signal to end, then drains.
    fn run_to_end(mut self, config: &Config) -> anyhow::Result<ExitCode> {
        let (drain, signals) = (&self.drain, &mut self.signals);
        let accepting = &mut self.accepting;
        let engine = self.packet.clone();
        let clean = self.side.block_on(async {
            let name = signals.next().await;
            drain.begin();
            self.metrics.draining.set(1);
            info!(signal = name, deadline = ?config.drain_timeout, "draining");
            let engine = engine.close();
            let packet = engine.filter(|packet| !packet.is_pinned());
            let mut drained = pin!(async {
                // Waits for switches under way, which may have to wait for an end that reads nothing.
                if let Some(engine) = engine {
                    engine.hand_over().await;
                }
                // Whom the kernel has let in becomes a session before the last one can end.
                for accepting in accepting {
                    let _ = accepting.await;
                }
                drain.drained().await;
                // Pinned, they go on without us.
                while packet.is_some_and(|packet| packet.live() > 0) {
                    tokio::time::sleep(SETTLED_LOOK).await;
                }
            });
            tokio::select! {
                biased;
                () = &mut drained => return true,
                () = tokio::time::sleep(config.drain_timeout) => {
                    warn!(connections = drain.live(), "drain deadline: resetting what is left");
                }
                name = signals.next() => {
                    warn!(signal = name, connections = drain.live(), "second signal: resetting");
                }
            }
            let clean = drain.live() == 0 && packet.is_none();
            drain.cut();
            if let Some(packet) = packet {
                packet.kill_all(Reason::Cut.as_label());
            }
            drained.await;
            clean
        });
        self.packet.settle();
        if let Some(packet) = self.packet.get().filter(|packet| !packet.is_pinned()) {
            packet.release_ports();
        }
        drop(self.workers);
        info!(clean, "ended");
        self.side.shutdown_background();
        Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Starts the engine of the kernel.
struct Starter {
    config: PacketConfig,
    listening: SocketAddr,
    upstream: UpstreamAddrs,
    max_connections: usize,
    places: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    idle_timeout: Option<Duration>,
    side: Handle,
    packet: Eventually,
}

impl Starter {
    /// Waits for it where it was asked for by name. Else it comes when it is tested and loaded, if
    /// it can work here at all.
    fn start_as(self, wish: Wish) -> anyhow::Result<()> {
        match wish {
            Wish::Auto => {
                let thread = std::thread::Builder::new().name("engine".to_owned());
                thread.spawn(move || self.start_or_tell()).context("a thread")?;
                Ok(())
            }
            Wish::Only(Engine::Packet) => self.start().map_err(|error| {
                tell_verifier(&error);
                let hint = obstacle(&error).map_or_else(|| format!("; {HINT}"), |_| String::new());
                anyhow!("engine packet cannot work here: {error:#}{hint}")
            }),
            Wish::Only(_) => {
                drop(self.packet.take_listeners());
                Ok(())
            }
        }
    }

    /// Waits for as long as another process has it: that may end any time, above all while the one
    /// is replaced by the other.
    fn start_or_tell(&self) {
        let mut told = String::new();
        loop {
            let Err(error) = self.start() else { return };
            let reason = format!("{error:#}");
            let Some(obstacle) = obstacle(&error) else {
                tell_verifier(&error);
                info!(reason, hint = HINT, "no relaying in the kernel; engine splice");
                return;
            };
            if reason != told {
                info!(reason, "relaying in userspace (engine splice) until that is over");
                told = reason;
            }
            if !obstacle.passes(|| self.packet.is_awaited()) {
                return;
            }
        }
    }

    fn start(&self) -> anyhow::Result<()> {
        let missing = preflight::missing_capabilities();
        ensure!(missing.is_empty(), "missing capabilities: {}", missing.join(", "));
        // Takes seconds if another has it; the self-test, which comes next, takes its time as well.
        let namespace = pins::be_the_one()?;
        if !self.packet.is_awaited() {
            return Ok(());
        }
        let untested = test_packet()?;
        // None: the process ends before the engine is there.
        let Some(_starting) = self.packet.begin() else { return Ok(()) };
        let _entered = self.side.enter();
        let (places, metrics) = (Arc::clone(&self.places), Arc::clone(&self.metrics));
        let (listening, most) = (self.listening, self.max_connections);
        let (packet, news) =
            Packet::start(&self.config, namespace, listening, most, places, metrics)?;
        packet.bound_segments_of(self.packet.take_listeners());
        for HostPort { host, port } in &self.upstream.0 {
            if let Host::Ip(ip) = host {
                packet.expect_upstream(SocketAddr::new(*ip, *port));
            }
        }
        if !self.packet.fill(&packet) {
            self.side.block_on(packet.hand_over());
            if !packet.is_pinned() {
                packet.release_ports();
            }
            return Ok(());
        }
        let reader = Arc::clone(&packet);
        let refresh = Refresh(Box::new(move || reader.refresh_metrics()));
        let _ = self.metrics.refresh.set(refresh);
        self.side.spawn(packet::ends::run(packet, news, self.idle_timeout));
        if let Some(error) = untested {
            info!(%error, "no self-test of the kernel's engine, which is used without");
        }
        info!("the kernel relays connections that begin from here on and fit");
        Ok(())
    }
}

/// Where to find out why the engine of the kernel cannot work.
const HINT: &str = "`steward-tcp-proxy check` names what is missing";

/// Nothing is missing: another process has the engine, or has left something that only its pins
/// can do with.
fn obstacle(error: &anyhow::Error) -> Option<&pins::Failure> {
    let failure = error.chain().find_map(|cause| cause.downcast_ref());
    failure.filter(|failure| !matches!(failure, pins::Failure::Absent(_)))
}

/// What a refused program did wrong fills pages, which few can read.
fn tell_verifier(error: &anyhow::Error) {
    if let Some(Refused { name, log, .. }) = error.chain().find_map(|cause| cause.downcast_ref()) {
        debug!(program = name, log, "what the verifier says");
    }
}

/// Keeps an engine that does not work on this kernel away from connections. Why it was not tested,
/// if it was not.
fn test_packet() -> anyhow::Result<Option<std::io::Error>> {
    match selftest::run() {
        Verdict::Passed(detail) => {
            debug!(detail, "self-test of the kernel's engine passed");
            Ok(None)
        }
        Verdict::NotTried(error) => Ok(Some(error)),
        Verdict::Failed(error) => Err(error.context("the self-test")),
    }
}

/// SIGTERM and SIGINT, which mean the same.
struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    /// The name of the next one.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}

/// Takes all the descriptors we may have, and says so if they do not suffice.
fn raise_descriptor_limit(max_connections: usize) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let have = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let need = (max_connections as u64).saturating_mul(2).saturating_add(OTHER_DESCRIPTORS);
    if have < need {
        warn!(
            have,
            need,
            "the descriptor limit (ulimit -n) is too low for --max-connections; \
             beyond it clients wait, or are refused if the upstream cannot be dialled"
        );
    }
}

//! The show itself, step by step: direct first, then each engine.

use std::fs::File;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::client::Target;
use super::curl;
use super::load::{self, Direction};
use super::progress::Progress;
use super::relay::{Counts, Relay};
use super::standin;
use super::table::{self, Row};
use crate::lab::{Host, Plan, spawn_here};

/// The engines shown, beside direct and [`KERNEL`].
const ENGINES: [&str; 2] = ["splice", "copy"];

/// What the way is called whose connections the kernel relays where it can: `--engine=auto`.
const KERNEL: &str = "packet";

/// Every load is done this often each way, in turns, so that whatever else the machine does hits
/// all of them alike.
const ROUNDS: usize = 3;

/// Connections of the requests that keep theirs, and how long a round is.
const KEEP_ALIVE: (usize, Duration) = (16, Duration::from_millis(800));

/// Clients that open a connection per request.
const NEW_CONNECTIONS: (usize, Duration) = (4, Duration::from_millis(500));

/// Connections of bulk transfers, each direction.
const BULK: (usize, Duration) = (4, Duration::from_millis(400));

/// Watches, and how many events each gets; an event comes every 100 ms.
const WATCHES: (usize, u64) = (10, 5);

/// Connections that are shown in the kernel, and for how long.
const SHOWN: (usize, Duration) = (4, Duration::from_millis(1500));

/// Until they are there (a connection begins in userspace), and how long the proxy is then watched.
const SWITCHED: Duration = Duration::from_millis(500);
const WATCHED: Duration = Duration::from_millis(500);

/// Events of the watch that goes on while the proxy drains.
const LAST_EVENTS: u64 = 15;

/// Of [`Show::run`], beside the one about the kernel.
const STEPS: usize = 9;

/// Far more than a step takes on a slow machine, or a round of a load.
const STEP_LIMIT: Duration = Duration::from_secs(40);
const ROUND_LIMIT: Duration = Duration::from_secs(12);

/// For whatever takes little time.
const SOON: Duration = Duration::from_secs(5);
const MOMENT: Duration = Duration::from_millis(200);

/// All that the show needs; it runs on the client's host.
#[derive(Debug)]
pub struct Show {
    /// The program to show.
    pub proxy: PathBuf,
    /// Where it runs.
    pub node: Host,
    /// Where the stand-in runs.
    pub server: Host,
    /// Their addresses.
    pub plan: Plan,
}

/// The running stand-in.
#[derive(Debug)]
struct Server {
    address: SocketAddr,
    /// The CA's certificate, PEM.
    ca: String,
    /// The same, for curl; it has no name and so goes with us.
    ca_file: File,
    /// Ends when dropped.
    process: Child,
}

/// A way from client to server, and what was measured on it.
struct Way {
    to: Target,
    row: Row,
    /// Unless direct: the proxy on the way, and its counts before the loads.
    relay: Option<(Relay, Counts)>,
    /// Unless direct: what it did during the loads.
    work: Option<Work>,
}

/// A proxy's part in its connections.
#[derive(Debug, Clone, Copy)]
struct Work {
    connections: u64,
    in_kernel: u64,
    cpu: Duration,
}

impl Show {
    /// From the first byte to the table.
    ///
    /// # Errors
    /// The first thing that is not as it must be.
    pub async fn run(self) -> Result<()> {
        let begun = Instant::now();
        let mut progress = Progress::new(STEPS + usize::from(self.may_show_kernel()));
        let engines = self.engines().iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let title = format!("start: HTTPS server, proxies with {engines}");
        let (mut server, mut ways, why_not) =
            progress.step(&title, STEP_LIMIT, self.start()).await?;
        if let Some(reason) = &why_not {
            progress.tell(&format!("demo: the kernel relays nothing here: {reason}"));
        }
        if let Err(error) = self.measure(&mut progress, &server, &mut ways).await {
            return Err(explained(error, &mut server, ways).await);
        }
        let works: Vec<_> = ways.iter().map(|way| (way.row.way, way.work)).collect();
        let (ends, rows): (Vec<_>, Vec<_>) =
            ways.into_iter().map(|way| ((way.to, way.relay), way.row)).unzip();
        let work = async {
            for (to, relay) in ends {
                if let Some((relay, _)) = relay {
                    drain(relay, &to).await?;
                }
            }
            Ok(())
        };
        progress.step("SIGTERM to each proxy, during a watch", STEP_LIMIT, work).await?;
        progress.tell(&format!("demo: done in {:.0} s", begun.elapsed().as_secs_f64()));
        drop(progress);
        tell(&rows, &works);
        Ok(())
    }

    async fn measure(
        &self,
        progress: &mut Progress,
        server: &Server,
        ways: &mut [Way],
    ) -> Result<()> {
        let work = self.greet(server, ways);
        for line in progress.step("curl, each way", STEP_LIMIT, work).await? {
            progress.tell(&line);
        }
        if self.may_show_kernel() {
            let work = self.show_kernel(ways);
            for line in progress.step("connections in the kernel", STEP_LIMIT, work).await? {
                progress.tell(&line);
            }
        }
        measure_times(progress, ways).await?;
        measure_bulk(progress, ways).await?;
        let work = self.verify(ways);
        progress.step("the proxies' counts against their clients'", STEP_LIMIT, work).await
    }

    /// Also why the kernel's engine is not shown, if it is not.
    async fn start(&self) -> Result<(Server, Vec<Way>, Option<String>)> {
        let server = self.start_server().await.context("the API server's stand-in")?;
        let to = Target::new(server.address, &server.ca)?;
        let mut ways = vec![Way { to, row: Row::new("direct")?, relay: None, work: None }];
        let mut why_not = None;
        for (index, (engine, flag)) in (0..).zip(self.engines()) {
            let listen = self.plan.listen(index);
            let relay = Relay::start(&self.proxy, &self.node, listen, server.address, flag);
            let mut relay = relay.await.context(engine)?;
            if engine == KERNEL
                && let Err(reason) = relay.await_kernel().await
            {
                why_not = Some(reason);
                continue;
            }
            let address = SocketAddr::new(self.plan.node, relay.listening.port());
            let to = Target::new(address, &server.ca)?;
            let relay = Some((relay, Counts::default()));
            ways.push(Way { to, row: Row::new(engine)?, relay, work: None });
        }
        if !self.may_show_kernel() {
            why_not = Some("over loopback nothing passes its programs".to_owned());
        }
        Ok((server, ways, why_not))
    }

    /// This machine's own network is left alone.
    fn may_show_kernel(&self) -> bool {
        !self.plan.node.is_loopback()
    }

    /// Names, and values of `--engine`.
    fn engines(&self) -> Vec<(&'static str, &'static str)> {
        let kernel = self.may_show_kernel().then_some((KERNEL, "auto"));
        kernel.into_iter().chain(ENGINES.map(|engine| (engine, engine))).collect()
    }

    /// What the proxy says of connections that the kernel relays, and what they cost it. Answers that,
    /// line by line.
    async fn show_kernel(&self, ways: &[Way]) -> Result<Vec<String>> {
        let Some(way) = ways.iter().find(|way| way.row.way == KERNEL) else { return Ok(vec![]) };
        let Some((relay, _)) = &way.relay else { return Ok(vec![]) };
        let (connections, time) = SHOWN;
        let look = async {
            sleep(SWITCHED).await;
            let before = relay.cpu()?;
            sleep(WATCHED).await;
            let used = relay.cpu()?.saturating_sub(before);
            Ok((used, relay.list(&self.proxy, &self.node).await?))
        };
        let load = load::keep_alive(&way.to, connections, time);
        let (times, (used, list)) = tokio::try_join!(load, look)?;
        ensure!(list.contains(KERNEL), "none of these is relayed by the kernel:\n{list}");
        let mut lines = vec![format!(
            "demo: {connections} connections with {:.0} requests/s: the proxy used {} ms of CPU in \
             {} ms, and this is what `steward-tcp-proxy connections list` said meanwhile:",
            times.per_second(),
            used.as_millis(),
            WATCHED.as_millis()
        )];
        lines.extend(list.lines().map(|line| format!("  {line}")));
        Ok(lines)
    }

    async fn start_server(&self) -> Result<Server> {
        let address = SocketAddr::new(self.plan.server, self.plan.server_port);
        let mut command = Command::from(crate::shell::this_program());
        command.args(["demo", "--as-server", &address.to_string()]).stdout(Stdio::piped());
        let mut process = self.server.spawn(command)?;
        let mut output = BufReader::new(process.stdout.take().context("no output")?).lines();
        let line = timeout(SOON, output.next_line()).await.context("says nothing")??;
        let said: Value = serde_json::from_str(&line.context("has ended at once")?)?;
        let text = |field: &str| said[field].as_str().context("says something else");
        let (address, ca) = (text("address")?.parse()?, text("ca")?.to_owned());
        let mut ca_file = tempfile::tempfile()?;
        ca_file.write_all(ca.as_bytes())?;
        Ok(Server { address, ca, ca_file, process })
    }

    /// curl asks for the version, by the name in the certificate, each way. Answers what it did.
    async fn greet(&self, server: &Server, ways: &mut [Way]) -> Result<Vec<String>> {
        let url = format!("https://{}/version", standin::NAME);
        let (us, descriptor) = (std::process::id(), server.ca_file.as_raw_fd());
        let ca_file = format!("/proc/{us}/fd/{descriptor}");
        let mut lines = Vec::new();
        for way in ways {
            let connect_to = format!("::{}", way.to.address);
            let curl = curl::command(&["--cacert", &ca_file, "--connect-to", &connect_to, &url])?;
            let answer = curl::output(spawn_here(curl)?).await.context(way.row.way)?;
            ensure!(answer.trim_end() == standin::VERSION, "{}: answer {answer}", way.row.way);
            lines.push(format!("demo: {}: curl --connect-to {connect_to} {url}: ok", way.row.way));
            if let Some((relay, before)) = &mut way.relay {
                // curl's bytes are in it, which nobody else counts.
                *before = relay.quiet(&self.node).await?;
            }
        }
        Ok(lines)
    }

    async fn verify(&self, ways: &mut [Way]) -> Result<()> {
        for way in ways {
            way.row.moved = way.to.meter.read();
            if let Some((relay, before)) = &way.relay {
                let compared = relay.verify(&self.node, *before, way.row.moved);
                let after = compared.await.context(way.row.way)?;
                let (in_kernel, cpu) = after.since(*before);
                let connections = way.row.moved.connections;
                way.work = Some(Work { connections, in_kernel, cpu });
            }
        }
        Ok(())
    }
}

/// What clients notice of a process that has died says little: adds its end.
async fn explained(error: Error, server: &mut Server, ways: Vec<Way>) -> Error {
    let mut error = error;
    // It is gone from the network a moment before it has ended.
    if let Ok(Ok(status)) = timeout(MOMENT, server.process.wait()).await {
        error = error.context(format!("the stand-in has ended ({status})"));
    }
    for way in ways {
        let Some((relay, _)) = way.relay else { continue };
        if let Some(end) = relay.died(MOMENT).await {
            error = error.context(format!("the proxy with {} has ended ({end})", way.row.way));
        }
    }
    error
}

/// One load, each way, round by round.
async fn in_turns<T>(
    ways: &mut [Way],
    load: impl AsyncFn(&Target) -> Result<T>,
    note: impl Fn(&mut Row, T) -> Result<()>,
) -> Result<()> {
    for _ in 0..ROUNDS {
        for way in &mut *ways {
            let measured = timeout(ROUND_LIMIT, load(&way.to))
                .await
                .unwrap_or_else(|_| Err(anyhow!("not done within {} s", ROUND_LIMIT.as_secs())));
            let measured = measured.context(way.row.way)?;
            note(&mut way.row, measured)?;
        }
    }
    Ok(())
}

async fn measure_times(progress: &mut Progress, ways: &mut [Way]) -> Result<()> {
    let (connections, time) = KEEP_ALIVE;
    let title = format!("requests on {connections} connections, each way in turns");
    let load = async |to: &Target| load::keep_alive(to, connections, time).await;
    let work = in_turns(ways, load, |row, times| row.requests.add(&times));
    progress.step(&title, STEP_LIMIT, work).await?;

    let (clients, time) = NEW_CONNECTIONS;
    let title = format!("{clients} clients with a new connection per request, in turns");
    let load = async |to: &Target| load::new_connections(to, clients, time).await;
    let work = in_turns(ways, load, |row, times| row.fresh.add(&times));
    progress.step(&title, STEP_LIMIT, work).await?;

    let (watchers, events) = WATCHES;
    let title = format!("{watchers} watches, in turns");
    let load = async |to: &Target| load::watch(to, watchers, events, Arc::default()).await;
    let work = in_turns(ways, load, |row, times| row.events.add(&times));
    progress.step(&title, STEP_LIMIT, work).await
}

async fn measure_bulk(progress: &mut Progress, ways: &mut [Way]) -> Result<()> {
    let (connections, time) = BULK;
    for (direction, name) in [(Direction::Down, "download"), (Direction::Up, "upload")] {
        let title = format!("{name} on {connections} connections, in turns");
        let load = async |to: &Target| load::bulk(to, direction, connections, time).await;
        let work = in_turns(ways, load, |row, volume| {
            let sum = if direction == Direction::Down { &mut row.down } else { &mut row.up };
            sum.add(volume);
            Ok(())
        });
        progress.step(&title, STEP_LIMIT, work).await?;
    }
    Ok(())
}

/// SIGTERM while a watch goes on: new clients are refused, the watch goes on to its last event,
/// and the proxy ends with status 0.
async fn drain(relay: Relay, to: &Target) -> Result<()> {
    let first = Arc::new(Notify::new());
    let watch = load::watch(to, 1, LAST_EVENTS, Arc::clone(&first));
    let terminate = async {
        first.notified().await;
        relay.terminate()?;
        let refused = async {
            while TcpStream::connect(to.address).await.is_ok() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        // Well before the watch's end: what is refused then, is refused by a live proxy.
        let limit = Duration::from_secs(1);
        timeout(limit, refused).await.context("new clients are still accepted after SIGTERM")
    };
    tokio::try_join!(watch, terminate)?;
    relay.ended().await
}

fn tell(rows: &[Row], works: &[(&str, Option<Work>)]) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("\n{}\n", table::render(rows));
    for (way, work) in works {
        let Some(Work { connections, in_kernel, cpu }) = work else { continue };
        let cpu = cpu.as_secs_f64();
        let kernel = if *way == KERNEL {
            format!("; the kernel relayed {in_kernel} of its {connections} connections")
        } else {
            String::new()
        };
        println!("{way}: the proxy used {cpu:.2} s of CPU{kernel}");
    }
    if works.iter().any(|(way, _)| *way == KERNEL) {
        println!(
            "\npacket is --engine=auto: connections that live for 20 ms are handed to the kernel, and\n\
             cost the proxy nothing from then on; shorter ones (new) are splice's."
        );
    }
    println!();
    println!(
        "reqs: on {} open connections; new: {} clients, a TLS connection per request; down, up:\n\
         {} connections; watch: from sending an event to its arrival. Clients, proxy and server\n\
         share {cores} processors, and TLS at both ends takes a good part of them.\n\n\
         Checked: certificates end to end; every answer, event and byte; the proxies' counts of\n\
         connections and bytes, equal to their clients'; that every connection ended in order;\n\
         and that on SIGTERM new clients were refused, a watch went on to its end, and each\n\
         proxy then ended with status 0.",
        KEEP_ALIVE.0, NEW_CONNECTIONS.0, BULK.0
    );
}

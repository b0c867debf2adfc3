//! The show itself, step by step: direct first, then each engine.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::NamedTempFile;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::client::Target;
use super::curl;
use super::lab::{Host, Plan, spawn_here};
use super::load::{self, Direction};
use super::progress::Progress;
use super::relay::Relay;
use super::standin;
use super::table::{self, Row};

/// The engines shown, beside direct.
const ENGINES: [&str; 2] = ["splice", "copy"];

/// Steps of each way, and those that only a proxy has.
const STEPS: (usize, usize) = (6, 3);

/// Connections of the requests that keep theirs, and how long they go on.
const KEEP_ALIVE: (usize, Duration) = (16, Duration::from_secs(3));

/// Clients that open a connection per request.
const NEW_CONNECTIONS: (usize, Duration) = (4, Duration::from_secs(2));

/// Connections of bulk transfers, each way.
const BULK: (usize, Duration) = (4, Duration::from_millis(1500));

/// Watches, and how many events each gets; an event comes every 100 ms.
const WATCHES: (usize, u64) = (10, 25);

/// Events of the watch that goes on while the proxy drains.
const LAST_EVENTS: u64 = 8;

/// A slow machine may take several times as long as a step is meant to.
const STEP_LIMIT: Duration = Duration::from_secs(20);

/// For whatever takes a moment only.
const SOON: Duration = Duration::from_secs(5);

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
    /// The same, for curl.
    ca_file: NamedTempFile,
    /// Ends when dropped.
    _process: Child,
}

impl Show {
    /// From the first byte to the table.
    ///
    /// # Errors
    /// The first thing that is not as it must be.
    pub async fn run(self) -> Result<()> {
        let begun = Instant::now();
        let steps = STEPS.0 + (STEPS.0 + STEPS.1) * ENGINES.len();
        let mut progress = Progress::new(steps);
        let server = self.start_server().await.context("the API server's stand-in")?;
        let mut rows = vec![direct(&mut progress, &server).await?];
        for engine in ENGINES {
            rows.push(self.through(&mut progress, engine, &server).await?);
        }
        progress.tell(&format!("demo: done in {:.0} s", begun.elapsed().as_secs_f64()));
        drop(progress);
        tell(&rows);
        Ok(())
    }

    async fn start_server(&self) -> Result<Server> {
        let address = SocketAddr::new(self.plan.server, self.plan.server_port);
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["demo", "--as-server", &address.to_string()]).stdout(Stdio::piped());
        let mut process = self.server.spawn(command)?;
        let mut output = BufReader::new(process.stdout.take().context("no output")?).lines();
        let line = timeout(SOON, output.next_line()).await.context("says nothing")??;
        let said: Value = serde_json::from_str(&line.context("has ended at once")?)?;
        let text = |field: &str| said[field].as_str().context("says something else");
        let (address, ca) = (text("address")?.parse()?, text("ca")?.to_owned());
        let mut ca_file = NamedTempFile::with_prefix("steward-demo-ca-")?;
        ca_file.write_all(ca.as_bytes())?;
        Ok(Server { address, ca, ca_file, _process: process })
    }

    /// All loads through a proxy, and what is checked of the proxy itself.
    async fn through(
        &self,
        progress: &mut Progress,
        engine: &'static str,
        server: &Server,
    ) -> Result<Row> {
        let start = Relay::start(&self.proxy, &self.node, &self.plan, server.address, engine);
        let relay = progress.step(&format!("{engine}: start"), STEP_LIMIT, start).await?;
        let address = SocketAddr::new(self.plan.node, relay.listening.port());
        let to = Target::new(address, &server.ca)?;
        greet(progress, engine, &to, server).await?;
        // curl's bytes are in it, which nobody else counts.
        let before = relay.quiet(&self.node).await?;
        let row = measure(progress, engine, &to).await?;
        let check = relay.verify(&self.node, before, row.moved);
        progress.step(&format!("{engine}: compare byte counts"), STEP_LIMIT, check).await?;
        let end = drain(relay, &to);
        progress.step(&format!("{engine}: SIGTERM during a watch"), STEP_LIMIT, end).await?;
        Ok(row)
    }
}

/// The same loads past the proxy; the node does no more than route them.
async fn direct(progress: &mut Progress, server: &Server) -> Result<Row> {
    let to = Target::new(server.address, &server.ca)?;
    greet(progress, "direct", &to, server).await?;
    measure(progress, "direct", &to).await
}

/// curl asks for the version, by the name in the certificate.
async fn greet(progress: &mut Progress, way: &str, to: &Target, server: &Server) -> Result<()> {
    let (port, address) = (server.address.port(), to.address);
    let url = format!("https://{}:{port}/version", standin::NAME);
    let connect_to = format!("::{address}");
    let ca_file = server.ca_file.path().to_string_lossy();
    let work = async {
        let curl = curl::command(&["--cacert", &ca_file, "--connect-to", &connect_to, &url])?;
        let answer = curl::output(spawn_here(curl)?).await?;
        ensure!(answer.trim_end() == standin::VERSION, "unexpected answer: {answer}");
        Ok(())
    };
    progress.step(&format!("{way}: curl {url}"), STEP_LIMIT, work).await?;
    progress.tell(&format!("demo: {way}: curl --connect-to {connect_to} {url} was answered"));
    Ok(())
}

async fn measure(progress: &mut Progress, way: &'static str, to: &Target) -> Result<Row> {
    let name = |load: &str| format!("{way}: {load}");
    let (connections, time) = KEEP_ALIVE;
    let title = name(&format!("requests on {connections} connections"));
    let work = load::keep_alive(to, connections, time);
    let requests = progress.step(&title, STEP_LIMIT, work).await?;

    let (clients, time) = NEW_CONNECTIONS;
    let title = name(&format!("{clients} clients, a connection per request"));
    let work = load::new_connections(to, clients, time);
    let fresh = progress.step(&title, STEP_LIMIT, work).await?;

    let (watchers, count) = WATCHES;
    let title = name(&format!("{watchers} watches"));
    let work = load::watch(to, watchers, count, Arc::default());
    let events = progress.step(&title, STEP_LIMIT, work).await?;

    let (connections, time) = BULK;
    let title = name(&format!("download on {connections} connections"));
    let work = load::bulk(to, Direction::Down, connections, time);
    let down = progress.step(&title, STEP_LIMIT, work).await?;
    let title = name(&format!("upload on {connections} connections"));
    let work = load::bulk(to, Direction::Up, connections, time);
    let up = progress.step(&title, STEP_LIMIT, work).await?;
    Ok(Row { way, moved: to.meter.read(), requests, fresh, down, up, events })
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
        let limit = Duration::from_millis(500);
        timeout(limit, refused).await.context("new clients are still accepted after SIGTERM")
    };
    tokio::try_join!(watch, terminate)?;
    relay.ended().await
}

fn tell(rows: &[Row]) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{}", table::render(rows));
    println!(
        "\nClients, proxy and server share {cores} processors, and clients and server do TLS on \
         them.\n\
         Checked: certificates end to end, every answer, event and byte; each proxy's counts of\n\
         connections and bytes equal its clients', every connection ended in order, and SIGTERM \
         let\n\
         a watch finish, refused new clients and ended with status 0."
    );
}

//! The proxy as a process on the node: started, watched through its log and its metrics, ended.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::client::Moved;
use super::curl;
use crate::lab::Host;

/// For whatever takes a moment only.
const SOON: Duration = Duration::from_secs(5);

/// For the kernel's engine to be tested and loaded, on a slow machine.
const LOADED: Duration = Duration::from_secs(20);

/// The last lines of a log are kept, for the error message.
const KEPT_LINES: usize = 12;

/// A running proxy.
#[derive(Debug)]
pub struct Relay {
    /// What it was told to use.
    engine: &'static str,
    /// Where clients are accepted.
    pub listening: SocketAddr,
    admin: SocketAddr,
    child: Child,
    log: JoinHandle<VecDeque<String>>,
    /// See [`Self::await_kernel`].
    verdict: Option<oneshot::Receiver<Verdict>>,
    /// Of the admin socket, which asks about connections.
    socket: TempDir,
}

/// Whether the kernel relays, and if not, why.
type Verdict = Result<(), String>;

/// What its metrics say.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Bytes and connections so far.
    pub moved: Moved,
    /// Connections that relay or are about to.
    live: u64,
    /// Connections that ended in order, under the engine asked for.
    orderly: u64,
    /// Those of them that the kernel relayed.
    in_kernel: u64,
    /// Time of a processor that the process has used.
    cpu: Duration,
}

impl Counts {
    /// Connections that the kernel has relayed since `before`, and the process's own time since.
    pub fn since(&self, before: Self) -> (u64, Duration) {
        (self.in_kernel - before.in_kernel, self.cpu.saturating_sub(before.cpu))
    }
}

impl Relay {
    /// Starts it, and waits until it listens and is ready.
    ///
    /// # Errors
    /// It does not come up; its own words are in the message.
    pub async fn start(
        binary: &Path,
        node: &Host,
        (listen, admin): (String, String),
        upstream: SocketAddr,
        engine: &'static str,
    ) -> Result<Self> {
        let socket = tempfile::tempdir()?;
        let mut command = Command::new(binary);
        command.args([
            format!("--listen-addr={listen}"),
            format!("--upstream-addr={upstream}"),
            "--endpoint-mode=off".to_owned(),
            format!("--admin-addr={admin}"),
            format!("--admin-socket={}", socket.path().join("admin").display()),
            format!("--engine={engine}"),
            // Nothing shall be left behind, and the machine's own load is no distance.
            "--bpffs=off".to_owned(),
            "--packet-max-rtt=1s".to_owned(),
            "--log-format=json".to_owned(),
        ]);
        // It would hide the lines that tell the addresses.
        command.env_remove("RUST_LOG").stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = node.spawn(command)?;
        let mut lines = BufReader::new(child.stderr.take().context("no log")?).lines();
        let told = timeout(SOON, addresses(&mut lines)).await;
        let told = told.context("the proxy does not tell where it listens")??;
        let (listening, admin, verdict) = told;
        let (tell, told) = oneshot::channel();
        let tell = match verdict {
            Some(verdict) => {
                let _ = tell.send(verdict);
                None
            }
            None => Some(tell),
        };
        let log = tokio::spawn(tail(lines, tell));
        let verdict = Some(told);
        let relay = Self { engine, listening, admin, child, log, verdict, socket };
        relay.admin(node, "readyz").await.context("the proxy is not ready")?;
        Ok(relay)
    }

    /// Waits until the kernel relays; or why it does not, if so.
    pub async fn await_kernel(&mut self) -> Verdict {
        let Some(told) = self.verdict.take() else { return Ok(()) };
        match timeout(LOADED, told).await {
            Ok(Ok(verdict)) => verdict,
            Ok(Err(_)) => Err("the proxy has ended".to_owned()),
            Err(_) => Err(format!("not loaded within {} s", LOADED.as_secs())),
        }
    }

    /// What `connections list` says.
    ///
    /// # Errors
    /// It fails.
    pub async fn list(&self, binary: &Path, node: &Host) -> Result<String> {
        let mut command = Command::new(binary);
        let socket = format!("--admin-socket={}", self.socket.path().join("admin").display());
        command.args(["connections", "list", &socket]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        curl::output(node.spawn(command)?).await
    }

    /// Time of a processor that the process has used so far.
    ///
    /// # Errors
    /// It has ended.
    pub fn cpu(&self) -> Result<Duration> {
        let id = self.child.id().context("the proxy has ended")?;
        let text = std::fs::read_to_string(format!("/proc/{id}/stat"))?;
        // The name, in parentheses, may hold anything; utime and stime are fields 14 and 15.
        let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
        let ticks = ticks.sum::<Result<u64, _>>()?;
        Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
    }

    /// What the admin address answers.
    async fn admin(&self, node: &Host, page: &str) -> Result<String> {
        let url = format!("http://{}/{page}", self.admin);
        curl::output(node.spawn(curl::command(&["--retry", "3", &url])?)?).await
    }

    /// What it has counted so far.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn counts(&self, node: &Host) -> Result<Counts> {
        let text = self.admin(node, "metrics").await?;
        let count = |name: &str, labels: &[&str]| sum(&text, name, labels);
        // The best for each connection may be any.
        let engine = match self.engine {
            "auto" => String::new(),
            engine => format!("engine=\"{engine}\""),
        };
        let ended = |engine: &str| {
            let closed = |by: &str| count("connections_ended_total", &[engine, by]);
            closed("reason=\"client_closed\"") + closed("reason=\"server_closed\"")
        };
        Ok(Counts {
            moved: Moved {
                connections: count("connections_accepted_total", &[]),
                sent: count("bytes_total", &["direction=\"up\""]),
                received: count("bytes_total", &["direction=\"down\""]),
            },
            live: count("connections_relaying", &[]) + count("connections_dialling", &[]),
            orderly: ended(&engine),
            in_kernel: ended("engine=\"packet\""),
            cpu: self.cpu()?,
        })
    }

    /// Waits until no connection is left, then checks that since `before` it counted what its
    /// clients moved, to the byte, and that every connection ended in order. Answers what it counted.
    ///
    /// # Errors
    /// The first count that differs.
    pub async fn verify(&self, node: &Host, before: Counts, clients: Moved) -> Result<Counts> {
        let after = self.quiet(node).await?;
        let pairs = [
            ("connections", before.moved.connections, after.moved.connections, clients.connections),
            ("bytes up", before.moved.sent, after.moved.sent, clients.sent),
            ("bytes down", before.moved.received, after.moved.received, clients.received),
            ("orderly ends", before.orderly, after.orderly, clients.connections),
        ];
        for (what, before, after, clients) in pairs {
            let proxy = after - before;
            ensure!(proxy == clients, "{what}: the proxy counted {proxy}, its clients {clients}");
        }
        Ok(after)
    }

    /// The counts once no connection is left.
    ///
    /// # Errors
    /// Some stay.
    pub async fn quiet(&self, node: &Host) -> Result<Counts> {
        let begun = Instant::now();
        loop {
            let counts = self.counts(node).await?;
            if counts.live == 0 {
                return Ok(counts);
            }
            ensure!(begun.elapsed() < SOON, "{} connections have not ended", counts.live);
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Asks it to end.
    ///
    /// # Errors
    /// It has ended already.
    pub fn terminate(&self) -> Result<()> {
        let id = self.child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
        let id = id.context("the proxy had ended before it was asked to")?;
        Ok(kill_process(id, Signal::TERM)?)
    }

    /// If it has ended: how, and its last words.
    pub async fn died(mut self, within: Duration) -> Option<String> {
        let status = timeout(within, self.child.wait()).await.ok()?.ok()?;
        let log = self.log.await.ok()?;
        let last = log.back().map_or("it said nothing", |line| line.as_str());
        Some(format!("{status}; its last words: {last}"))
    }

    /// Waits for the end that [`Self::terminate`] asked for.
    ///
    /// # Errors
    /// It hangs, or its exit status is not 0.
    pub async fn ended(mut self) -> Result<()> {
        let status = timeout(SOON, self.child.wait()).await.context("the proxy does not end")??;
        let log = self.log.await?;
        ensure!(status.success(), "the proxy ended with {status}; its log:\n{}", shown(&log));
        Ok(())
    }
}

/// The sum over all samples of a metric that bear these labels.
fn sum(metrics: &str, name: &str, labels: &[&str]) -> u64 {
    let samples = metrics.lines().filter_map(|line| {
        let (series, value) = line.strip_prefix("steward_tcp_proxy_")?.rsplit_once(' ')?;
        let (metric, given) = series.split_once('{').unwrap_or((series, ""));
        let is_meant = metric == name && labels.iter().all(|label| given.contains(label));
        is_meant.then(|| value.parse::<u64>().ok()).flatten()
    });
    samples.sum()
}

/// Reads the log up to the lines that tell where it listens. With what it says of the kernel until
/// then.
async fn addresses(
    log: &mut Lines<BufReader<ChildStderr>>,
) -> Result<(SocketAddr, SocketAddr, Option<Verdict>)> {
    let (mut listening, mut admin, mut kernel) = (None, None, None);
    let mut seen = VecDeque::new();
    while let Some(line) = log.next_line().await? {
        let entry: Value = serde_json::from_str(&line).unwrap_or_default();
        let address = || entry["addr"].as_str().and_then(|text| text.parse().ok());
        match entry["message"].as_str() {
            Some("listening") => listening = address(),
            Some("admin listening") => admin = address(),
            _ => kernel = kernel.or(verdict(&entry)),
        }
        if let Some((listening, admin)) = listening.zip(admin) {
            return Ok((listening, admin, kernel));
        }
        seen.push_back(line);
    }
    bail!("the proxy ended at once; its log:\n{}", shown(&seen))
}

/// What a line says of the kernel's engine, if it does.
fn verdict(entry: &Value) -> Option<Verdict> {
    let message = entry["message"].as_str()?;
    if message.starts_with("the kernel relays") {
        return Some(Ok(()));
    }
    let reason = entry["reason"].as_str().unwrap_or("no reason given");
    message.contains("engine splice").then(|| Err(reason.to_owned()))
}

/// Reads the log to its end, so that it never fills its pipe; answers its last lines. Tells the first
/// word about the kernel.
async fn tail(
    mut log: Lines<BufReader<ChildStderr>>,
    mut tell: Option<oneshot::Sender<Verdict>>,
) -> VecDeque<String> {
    let mut kept = VecDeque::with_capacity(KEPT_LINES);
    while let Ok(Some(line)) = log.next_line().await {
        if tell.is_some()
            && let Some(verdict) = verdict(&serde_json::from_str(&line).unwrap_or_default())
            && let Some(tell) = tell.take()
        {
            let _ = tell.send(verdict);
        }
        if kept.len() == KEPT_LINES {
            kept.pop_front();
        }
        kept.push_back(line);
    }
    kept
}

fn shown(lines: &VecDeque<String>) -> String {
    lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_by_name_and_labels() {
        let text = "# HELP steward_tcp_proxy_ended text\n\
                    steward_tcp_proxy_ended{engine=\"copy\",reason=\"a\"} 3\n\
                    steward_tcp_proxy_ended{engine=\"copy\",reason=\"b\"} 4\n\
                    steward_tcp_proxy_ended_total 9\n";
        assert_eq!(sum(text, "ended", &["engine=\"copy\""]), 7);
        assert_eq!(sum(text, "ended", &["engine=\"copy\"", "reason=\"b\""]), 4);
        assert_eq!(sum(text, "ended_total", &[]), 9);
    }
}

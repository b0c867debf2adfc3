//! The proxy as a process on the node: started, watched through its log and its metrics, ended.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::client::Moved;
use super::curl;
use crate::lab::Host;

/// For whatever takes a moment only.
const SOON: Duration = Duration::from_secs(5);

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
}

/// What its metrics say.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Bytes and connections so far.
    pub moved: Moved,
    /// Connections that relay or are about to.
    live: u64,
    /// Connections that ended in order, under the engine asked for.
    orderly: u64,
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
        let mut command = Command::new(binary);
        command.args([
            format!("--listen-addr={listen}"),
            format!("--upstream-addr={upstream}"),
            "--endpoint-mode=off".to_owned(),
            format!("--admin-addr={admin}"),
            "--admin-socket=off".to_owned(),
            format!("--engine={engine}"),
            "--log-format=json".to_owned(),
        ]);
        // It would hide the lines that tell the addresses.
        command.env_remove("RUST_LOG").stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = node.spawn(command)?;
        let mut lines = BufReader::new(child.stderr.take().context("no log")?).lines();
        let told = timeout(SOON, addresses(&mut lines)).await;
        let (listening, admin) = told.context("the proxy does not tell where it listens")??;
        let relay = Self { engine, listening, admin, child, log: tokio::spawn(tail(lines)) };
        relay.admin(node, "readyz").await.context("the proxy is not ready")?;
        Ok(relay)
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
        let engine = format!("engine=\"{}\"", self.engine);
        let closed = |by: &str| count("connections_ended_total", &[&engine, by]);
        Ok(Counts {
            moved: Moved {
                connections: count("connections_accepted_total", &[]),
                sent: count("bytes_total", &["direction=\"up\""]),
                received: count("bytes_total", &["direction=\"down\""]),
            },
            live: count("connections_relaying", &[]) + count("connections_dialling", &[]),
            orderly: closed("reason=\"client_closed\"") + closed("reason=\"server_closed\""),
        })
    }

    /// Waits until no connection is left, then checks that since `before` it counted what its
    /// clients moved, to the byte, and that every connection ended in order.
    ///
    /// # Errors
    /// The first count that differs.
    pub async fn verify(&self, node: &Host, before: Counts, clients: Moved) -> Result<()> {
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
        Ok(())
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

/// Reads the log up to the lines that tell where it listens.
async fn addresses(log: &mut Lines<BufReader<ChildStderr>>) -> Result<(SocketAddr, SocketAddr)> {
    let (mut listening, mut admin) = (None, None);
    let mut seen = VecDeque::new();
    while let Some(line) = log.next_line().await? {
        let entry: Value = serde_json::from_str(&line).unwrap_or_default();
        let address = || entry["addr"].as_str().and_then(|text| text.parse().ok());
        match entry["message"].as_str() {
            Some("listening") => listening = address(),
            Some("admin listening") => admin = address(),
            _ => {}
        }
        if let Some(both) = listening.zip(admin) {
            return Ok(both);
        }
        seen.push_back(line);
    }
    bail!("the proxy ended at once; its log:\n{}", shown(&seen))
}

/// Reads the log to its end, so that it never fills its pipe; answers its last lines.
async fn tail(mut log: Lines<BufReader<ChildStderr>>) -> VecDeque<String> {
    let mut kept = VecDeque::with_capacity(KEPT_LINES);
    while let Ok(Some(line)) = log.next_line().await {
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

//! `cargo xtask demo`: client, node and server as three hosts on this machine, real HTTPS traffic
//! between them, through the proxy and past it, and a table that compares the two.

mod client;
mod curl;
mod load;
mod payload;
mod progress;
mod relay;
mod show;
mod standin;
mod table;

use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Error, Result, bail, ensure};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use crate::lab::{self, Lab};
use crate::setup::{self, Scope};
use crate::shell::{cargo, run as sh, say, target};
use show::Show;

/// The whole show takes less than half of this.
const LIMIT: Duration = Duration::from_secs(120);

/// The flags of `demo`.
#[derive(clap::Args)]
pub struct Flags {
    /// Show this steward-tcp-proxy; nothing is set up or built
    #[arg(long, value_name = "FILE")]
    proxy: Option<PathBuf>,

    /// Plain loopback, also as root
    #[arg(long)]
    loopback: bool,

    /// The process of the API server's stand-in.
    #[arg(long, hide = true, value_name = "ADDR")]
    as_server: Option<SocketAddr>,
}

/// The verb, and the process that it starts.
///
/// # Errors
/// Set-up or build fail, the proxy does anything else than it must, or someone interrupts.
pub fn run(flags: &Flags) -> Result<()> {
    if let Some(address) = flags.as_server {
        return standin::serve(address);
    }
    let Some(proxy) = &flags.proxy else {
        return build_and_go_on(flags.loopback);
    };
    ensure!(proxy.is_file(), "{} is no file", proxy.display());
    let Lab { client, node, server, plan } = lab(flags.loopback)?;
    let show = Show { proxy: proxy.clone(), node, server, plan };
    client.run(move || {
        // Made on the client's host, so that its threads and sockets are there.
        let runtime = Runtime::new()?;
        let outcome = runtime.block_on(bounded(show.run()));
        runtime.shutdown_timeout(Duration::from_secs(1));
        lab::reap();
        outcome
    })?
}

/// Builds this program as well: unoptimized clients would measure themselves. The optimized one
/// takes the place of this one.
fn build_and_go_on(loopback: bool) -> Result<()> {
    say("demo: first set-up and a release build of the proxy and its clients, then half a minute \
         of traffic");
    setup::ensure_all(Scope::Demo)?;
    sh(&mut cargo(&["build", "--release", "--package", "proxy", "--package", "xtask"]))?;
    let folder = target().join("release");
    let mut optimized = Command::new(folder.join("xtask"));
    optimized.arg("demo").arg("--proxy").arg(folder.join("steward-tcp-proxy"));
    if loopback {
        optimized.arg("--loopback");
    }
    Err(Error::new(optimized.exec()).context("cannot run the optimized demo"))
}

fn lab(loopback: bool) -> Result<Lab> {
    let why = if loopback {
        "as asked".to_owned()
    } else {
        match Lab::from_namespaces() {
            Ok(lab) => {
                say("demo: three hosts from network namespaces: client - node - server");
                return Ok(lab);
            }
            Err(error) => format!("{error:#}"),
        }
    };
    say(&format!("demo: plain loopback instead of hosts from network namespaces ({why})"));
    Lab::on_loopback()
}

/// Ends with an error on a signal, and when it takes too long. Whatever was started ends with it.
async fn bounded(show: impl Future<Output = Result<()>>) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let name = tokio::select! {
        outcome = timeout(LIMIT, show) => {
            return outcome
                .with_context(|| format!("demo: has not ended within {} s", LIMIT.as_secs()))?
                .context("demo");
        }
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
        _ = hang_up.recv() => "SIGHUP",
    };
    bail!("demo: interrupted by {name}; everything that it started is gone")
}

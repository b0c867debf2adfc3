//! `cargo xtask bench`: plain TCP through each way between the same three hosts, in turns, and
//! tables of medians. Only ratios within one run mean anything: the machine is noisy, and client,
//! proxy and server share it.
//!
//! Every way crosses the same two wires: direct connections are routed by the node, the others
//! end at a proxy on it.

mod load;
mod meter;
mod table;
mod ways;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{getpid, set_child_subreaper};
use serde_json::json;

use crate::lab::{self, Host, Lab};
use crate::setup::{self, Scope};
use crate::shell::{cargo, run as sh, say, target};
use load::{Load, Span};
use table::{Column, Row, Tables};
use ways::Way;

/// The flags of `bench`.
#[derive(clap::Args)]
pub struct Flags {
    /// Rounds; each goes through all ways, and medians are shown
    #[arg(long, default_value_t = 3)]
    rounds: usize,

    /// Milliseconds of each measurement
    #[arg(long, default_value_t = 700)]
    time: u64,

    /// Milliseconds before each measurement, in which the load runs as well
    #[arg(long, default_value_t = 300)]
    warm_up: u64,

    /// One round of 300 ms each: half a minute
    #[arg(long)]
    quick: bool,

    /// Only these ways, separated by commas: direct, packet, splice, copy, nginx, haproxy, envoy
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,

    /// Only these loads, separated by commas: echo1, echo16, up1, down1, up8, down8, connect
    #[arg(long, value_delimiter = ',')]
    loads: Vec<String>,

    /// Beside that: direct, auto and splice for a client that is so far away (round trip, 50ms)
    #[arg(long, value_name = "TIME", value_parser = milliseconds)]
    far: Option<Duration>,

    /// Only the far client
    #[arg(long, requires = "far")]
    only_far: bool,

    /// Write the figures to this file, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// The second stage: measure, in an optimized build
    #[arg(long, hide = true)]
    measure: bool,
}

/// `50ms` or `50`.
fn milliseconds(text: &str) -> Result<Duration, String> {
    match text.strip_suffix("ms").unwrap_or(text).parse() {
        Ok(number @ 1..=1000) => Ok(Duration::from_millis(number)),
        _ => Err("give milliseconds from 1 to 1000, such as 50ms".to_owned()),
    }
}

const COLUMNS: [Column; 7] = [
    Column { title: "echo 1", load: Load::Echo(1) },
    Column { title: "echo 16", load: Load::Echo(16) },
    Column { title: "up 1", load: Load::Up(1) },
    Column { title: "down 1", load: Load::Down(1) },
    Column { title: "up 8", load: Load::Up(8) },
    Column { title: "down 8", load: Load::Down(8) },
    Column { title: "connect", load: Load::Connect(8) },
];

/// A far client's requests wait for the wire, whoever relays; connecting adds nothing to that.
const FAR: [Column; 6] = [
    Column { title: "echo 1", load: Load::Echo(1) },
    Column { title: "echo 16", load: Load::Echo(16) },
    Column { title: "up 1", load: Load::Up(1) },
    Column { title: "down 1", load: Load::Down(1) },
    Column { title: "up 8", load: Load::Up(8) },
    Column { title: "down 8", load: Load::Down(8) },
];

/// The ways of a far client.
const FAR_WAYS: [&str; 3] = ["direct", "auto", "splice"];

/// Round trips in which a stream's window has grown to what the wire holds, or nearly.
const GROWING: u32 = 20;

/// The verb.
///
/// # Errors
/// No root, a build that fails, or a connection that does.
pub fn run(flags: &Flags) -> Result<()> {
    let (rounds, time) = if flags.quick { (1, 300) } else { (flags.rounds, flags.time) };
    ensure!(rounds > 0 && time > 0, "--rounds and --time must be more than zero");
    let wanted = wanted(&flags.only)?;
    let columns = columns(&flags.loads)?;
    if !flags.measure {
        return build_and_go_on();
    }
    let begun = Instant::now();
    // What proxies leave behind is ours to collect: in a container there may be no one else.
    set_child_subreaper(Some(getpid()))?;
    let runtime = tokio::runtime::Runtime::new()?;
    let _entered = runtime.enter();
    let span =
        Span { warm_up: Duration::from_millis(flags.warm_up), time: Duration::from_millis(time) };
    let mut failures = Vec::new();
    let mut json = json!({"rounds": rounds, "milliseconds": time});
    if !flags.only_far {
        json["near"] = near(&wanted, &columns, rounds, span, &mut failures)?;
    }
    if let Some(delay) = flags.far {
        let rounds = rounds.min(2);
        json["far"] = far(delay, rounds, span, &mut failures)?;
        json["far_milliseconds"] = json!(delay.as_millis());
    }
    lab::reap();
    if let Some(file) = &flags.json {
        table::write(file, &json).with_context(|| file.display().to_string())?;
    }
    say(&format!("bench: measured for {:.0} s", begun.elapsed().as_secs_f64()));
    if failures.is_empty() { Ok(()) } else { bail!("failed: {}", failures.join("; ")) }
}

/// The ways that were asked for, as they are shown.
fn wanted(only: &[String]) -> Result<Vec<&'static str>> {
    for name in only {
        ensure!(
            ways::NAMES.contains(&name.as_str()),
            "{name} is none of {}",
            ways::NAMES.join(", ")
        );
    }
    let is_wanted = |name: &&str| only.is_empty() || only.iter().any(|wanted| wanted == name);
    Ok(ways::NAMES.into_iter().filter(is_wanted).collect())
}

/// The loads that were asked for: titles without spaces.
fn columns(only: &[String]) -> Result<Vec<Column>> {
    let name = |column: &Column| column.title.replace(' ', "");
    for wanted in only {
        let all: Vec<String> = COLUMNS.iter().map(name).collect();
        ensure!(all.contains(wanted), "{wanted} is none of {}", all.join(", "));
    }
    let is_wanted = |column: &&Column| only.is_empty() || only.contains(&name(column));
    Ok(COLUMNS.iter().filter(is_wanted).copied().collect())
}

/// Unoptimized clients would measure themselves, so the rest is done by an optimized build. The
/// proxy is built as for the image.
fn build_and_go_on() -> Result<()> {
    setup::ensure_all(Scope::Demo)?;
    sh(&mut cargo(&["build", "--release", "--package", "xtask"]))?;
    sh(&mut cargo(&["build", "--profile", "dist", "--package", "proxy"]))?;
    let mut optimized = std::process::Command::new(target().join("release/xtask"));
    optimized.args(std::env::args_os().skip(1)).arg("--measure");
    use std::os::unix::process::CommandExt as _;
    Err(anyhow::Error::new(optimized.exec()).context("cannot run the optimized bench"))
}

fn near(
    wanted: &[&'static str],
    columns: &[Column],
    rounds: usize,
    span: Span,
    failures: &mut Vec<String>,
) -> Result<serde_json::Value> {
    let labs = [Lab::from_namespaces()?, Lab::from_namespaces()?];
    let apart: Vec<&str> = ways::NAMES.into_iter().filter(|name| *name != "packet").collect();
    let ways = start(&[(&labs[0], &apart), (&labs[1], &["packet"])], wanted)?;
    say(&format!("bench: {} through {}", counted(rounds), names(&ways)));
    let rows = measure(&labs, &ways, columns, rounds, span, failures)?;
    let tables = Tables { columns, rows: &rows, seconds: span.time.as_secs_f64() };
    tables.print();
    Ok(tables.json())
}

fn far(
    delay: Duration,
    rounds: usize,
    span: Span,
    failures: &mut Vec<String>,
) -> Result<serde_json::Value> {
    let span =
        Span { warm_up: span.warm_up.max(delay * GROWING), time: span.time.max(delay * GROWING) };
    let labs = [Lab::with_far_client(delay)?];
    let ways = start(&[(&labs[0], &FAR_WAYS)], &FAR_WAYS)?;
    say(&format!("bench: {} of a client {} ms away", counted(rounds), delay.as_millis()));
    let rows = measure(&labs, &ways, &FAR, rounds, span, failures)?;
    let tables = Tables { columns: &FAR, rows: &rows, seconds: span.time.as_secs_f64() };
    println!("\nThe client is {} ms away:", delay.as_millis());
    tables.print();
    Ok(tables.json())
}

fn counted(rounds: usize) -> String {
    format!("{rounds} round{}", if rounds == 1 { "" } else { "s" })
}

fn names(ways: &[Way]) -> String {
    ways.iter().map(|way| way.name).collect::<Vec<_>>().join(", ")
}

/// Prepares the hosts and starts the ways.
fn start(labs: &[(&Lab, &[&'static str])], wanted: &[&str]) -> Result<Vec<Way>> {
    for (lab, _) in labs {
        for host in [&lab.client, &lab.node, &lab.server] {
            keep_ports_free(host)?;
        }
        let origin = SocketAddr::new(lab.plan.server, lab.plan.server_port);
        lab.server.run(move || load::serve(origin))??;
    }
    ways::start(labs, &target().join("dist/steward-tcp-proxy"), wanted)
}

/// Whoever closes first keeps the port for a minute (TIME_WAIT), and thousands of connections a
/// second would use them up.
fn keep_ports_free(host: &Host) -> Result<()> {
    let settings = [("ip_local_port_range", "10000 65535"), ("tcp_tw_reuse", "1")];
    for (name, value) in settings {
        let file = format!("/proc/sys/net/ipv4/{name}");
        host.run(move || std::fs::write(file, value))?.context(name)?;
    }
    Ok(())
}

/// Each round goes through all columns, each column through all ways; every round begins with
/// another way, so that none has always the same one before it.
fn measure(
    labs: &[Lab],
    ways: &[Way],
    columns: &[Column],
    rounds: usize,
    span: Span,
    failures: &mut Vec<String>,
) -> Result<Vec<Row>> {
    let empty = || columns.iter().map(|_| vec![None; rounds]).collect();
    let mut rows: Vec<Row> =
        ways.iter().map(|way| Row { name: way.name, figures: empty() }).collect();
    for round in 0..rounds {
        for (index, column) in columns.iter().enumerate() {
            say(&format!("bench: round {} of {rounds}: {}", round + 1, column.title));
            for turn in 0..ways.len() {
                let place = (turn + round) % ways.len();
                let way = &ways[place];
                let (load, target, meter) = (column.load, way.address, way.meter);
                let measured =
                    labs[way.lab].client.run(move || load::run(load, target, span, meter))?;
                match measured {
                    Ok(figures) => rows[place].figures[index][round] = Some(figures),
                    Err(error) => {
                        let failure = format!("{} through {}: {error:#}", column.title, way.name);
                        say(&format!("bench: FAILED: {failure}"));
                        failures.push(failure);
                    }
                }
            }
        }
    }
    Ok(rows)
}

//! `cargo xtask bench`: plain TCP through each way between the same two hosts, in turns, and a table
//! of medians. Only ratios within one run mean anything: the machine is noisy, and client, proxy
//! and server share it.

mod load;
mod ways;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::lab::{self, Lab};
use crate::setup::{self, Scope};
use crate::shell::{cargo, run as sh, say, target};
use load::Figures;
use ways::Way;

/// Streams of the wide bulk columns, and connections of the wide echo column.
const WIDE: (usize, usize) = (8, 16);

/// The flags of `bench`.
#[derive(clap::Args)]
pub struct Flags {
    /// Rounds; each goes through all ways, and medians are shown
    #[arg(long, default_value_t = 3)]
    rounds: usize,

    /// Milliseconds of each measurement
    #[arg(long, default_value_t = 1000)]
    time: u64,

    /// Only these ways, separated by commas: direct, splice, copy, nginx, haproxy
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,

    /// The second stage: measure, in an optimized build
    #[arg(long, hide = true)]
    measure: bool,
}

/// A column: what it is called, and which figure of which load it shows.
struct Column {
    title: &'static str,
    load: fn(SocketAddr, Duration) -> Result<Figures>,
    show: fn(&Figures) -> f64,
}

const COLUMNS: [Column; 7] = [
    Column {
        title: "echo 1 /s",
        load: |target, time| load::echo(target, 1, time),
        show: |f| f.per_second,
    },
    Column {
        title: "echo 16 /s",
        load: |target, time| load::echo(target, WIDE.1, time),
        show: |f| f.per_second,
    },
    Column {
        title: "up 1 Gb/s",
        load: |target, time| load::upload(target, 1, time),
        show: |f| f.gbit,
    },
    Column {
        title: "down 1",
        load: |target, time| load::download(target, 1, time),
        show: |f| f.gbit,
    },
    Column {
        title: "up 8",
        load: |target, time| load::upload(target, WIDE.0, time),
        show: |f| f.gbit,
    },
    Column {
        title: "down 8",
        load: |target, time| load::download(target, WIDE.0, time),
        show: |f| f.gbit,
    },
    Column {
        title: "connect /s",
        load: |target, time| load::connect_request_close(target, WIDE.0, time),
        show: |f| f.per_second,
    },
];

/// What one way has achieved: for each column its figures, round by round.
struct Row {
    name: &'static str,
    figures: Vec<Vec<Figures>>,
    /// Seconds of processor time that the proxy used, by column.
    cpu: Vec<f64>,
}

/// The verb.
///
/// # Errors
/// No root, a build that fails, or a connection that does.
pub fn run(flags: &Flags) -> Result<()> {
    ensure!(flags.rounds > 0 && flags.time > 0, "--rounds and --time must be more than zero");
    if !flags.measure {
        return build_and_go_on();
    }
    let Lab { client, node, server, plan } =
        Lab::from_namespaces().context("bench needs hosts from network namespaces")?;
    let origin = SocketAddr::new(plan.server, plan.server_port);
    server.run(move || load::serve(origin))??;
    let runtime = tokio::runtime::Runtime::new()?;
    let _entered = runtime.enter();
    let proxy = target().join("release/steward-tcp-proxy");
    let mut ways = ways::start(&node, plan.node, origin, &proxy, &flags.only)?;
    let time = Duration::from_millis(flags.time);
    let rounds = flags.rounds;
    let (rows, ways) = client.run(move || {
        let rows = measure(&mut ways, rounds, time);
        (rows, ways)
    })?;
    drop(ways);
    lab::reap();
    print(&rows?);
    Ok(())
}

/// Unoptimized clients would measure themselves, so the rest is done by an optimized build.
fn build_and_go_on() -> Result<()> {
    setup::ensure_all(Scope::Demo)?;
    sh(&mut cargo(&["build", "--release", "--package", "proxy", "--package", "xtask"]))?;
    let mut optimized = std::process::Command::new(target().join("release/xtask"));
    optimized.args(std::env::args_os().skip(1)).arg("--measure");
    use std::os::unix::process::CommandExt as _;
    Err(anyhow::Error::new(optimized.exec()).context("cannot run the optimized bench"))
}

fn measure(ways: &mut [Way], rounds: usize, time: Duration) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> = ways
        .iter()
        .map(|way| Row {
            name: way.name,
            figures: COLUMNS.iter().map(|_| Vec::new()).collect(),
            cpu: vec![0.0; COLUMNS.len()],
        })
        .collect();
    for round in 1..=rounds {
        for (index, column) in COLUMNS.iter().enumerate() {
            say(&format!("bench: round {round} of {rounds}: {}", column.title));
            for (way, row) in ways.iter_mut().zip(&mut rows) {
                let before = way.cpu_seconds();
                let figures = (column.load)(way.address, time)
                    .with_context(|| format!("{} through {}", column.title, way.name))?;
                row.cpu[index] += way.cpu_seconds() - before;
                row.figures[index].push(figures);
            }
        }
    }
    Ok(rows)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn print(rows: &[Row]) {
    print!("{:<8}", "way");
    COLUMNS.iter().for_each(|column| print!(" {:>11}", column.title));
    println!(" {:>9} {:>9} {:>8}", "p50 us", "p99 us", "cpu us");
    for row in rows {
        print!("{:<8}", row.name);
        for (column, figures) in COLUMNS.iter().zip(&row.figures) {
            let value = median(figures.iter().map(column.show).collect());
            if value < 1000.0 { print!(" {value:>11.2}") } else { print!(" {value:>11.0}") }
        }
        let echo = &row.figures[1];
        let at = |show: fn(&Figures) -> f64| median(echo.iter().map(show).collect());
        let exchanges: f64 = echo.iter().map(|f| f.exchanges as f64).sum();
        let cpu = row.cpu[1] * 1e6 / exchanges.max(1.0);
        println!(" {:>9.0} {:>9.0} {cpu:>8.1}", at(|f| f.p50_us), at(|f| f.p99_us));
    }
    println!(
        "\nMedians. p50, p99 and the proxy's processor time per exchange belong to echo {}.",
        WIDE.1
    );
}

//! `cargo xtask test`: set-up, format, lints, documentation, and all tests by tier.
//!
//! Once set-up is done, a step that fails does not stop those after it: one run shows everything
//! that is wrong. A tier whose needs are not met fails with a clear word; nothing is skipped in
//! silence.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::kube_bins;
use crate::setup::{self, Scope};
use crate::shell::{cargo, root, run as sh, say, target, this_program};

/// What the suites run, below the target folder.
const PROGRAM: &str = "debug/steward-tcp-proxy";

/// Every file of `tests/tests` and `proxy/tests`, by what it needs, quick ones first. To add a
/// suite, name its file here.
const SUITES: &[(Tier, &str)] = &[
    (Tier::Unit, "readme"),
    (Tier::Contract, "cli"),
    (Tier::Contract, "admin"),
    (Tier::Contract, "control"),
    (Tier::Contract, "limits"),
    (Tier::Contract, "drain"),
    (Tier::Contract, "contract"),
    (Tier::Kernel, "cleanup"),
    (Tier::Kernel, "observer"),
    (Tier::Kernel, "inject"),
    (Tier::Kernel, "conntrack"),
    (Tier::Kernel, "ports"),
    (Tier::Kernel, "devices"),
    (Tier::Kernel, "hosts"),
    (Tier::Kernel, "wires"),
    (Tier::Kernel, "bad_wires"),
    (Tier::Kernel, "takeover"),
    (Tier::Kernel, "packet_hazards"),
    (Tier::Kernel, "packet_scale"),
    (Tier::Kernel, "check"),
    (Tier::Kernel, "selftest"),
    (Tier::Kube, "apiserver_smoke"),
    (Tier::Kube, "endpoints_real"),
    (Tier::Kube, "kube_proxy_real"),
];

/// What a step needs, and so when it can run.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// Format, lints, documentation, unit tests: no privilege
    Unit,
    /// The program against nasty peers over loopback; what needs a host of its own, root
    Contract,
    /// Namespaces, kernel programs and the demo: root
    Kernel,
    /// A real API server and kube-proxy: root, and Go, or their programs in KUBEBUILDER_ASSETS
    Kube,
    /// Everything
    All,
}

/// What a machine with another kernel runs, see `kernels`: suites of the engine in the kernel.
pub fn kernel_suites() -> impl Iterator<Item = &'static str> {
    // `hosts` is about the other engines, and names; `packet_scale` measures a real machine.
    let of_kernel = |tier: Tier, suite: &str| match suite {
        "hosts" | "packet_scale" => false,
        "control" => true,
        _ => tier == Tier::Kernel,
    };
    SUITES.iter().filter(move |(tier, suite)| of_kernel(*tier, suite)).map(|(_, suite)| *suite)
}

/// The flags of `test`.
#[derive(clap::Args)]
pub struct Flags {
    /// Which tests
    #[arg(long, value_enum, default_value = "all")]
    tier: Tier,
}

/// What happened to each step.
#[derive(Default)]
struct Report {
    steps: Vec<(String, Duration, Result<()>)>,
}

/// The verb.
///
/// # Errors
/// At least one step failed.
pub fn run(flags: &Flags) -> Result<()> {
    let begun = Instant::now();
    let wants = |tier: Tier| flags.tier == Tier::All || flags.tier == tier;
    let mut report = Report::default();
    let scope = match flags.tier {
        Tier::All | Tier::Kube => Scope::Tests,
        Tier::Contract | Tier::Kernel => Scope::Networks,
        Tier::Unit => Scope::Demo,
    };
    report.step("setup", || setup::ensure_all(scope));
    if report.has_failed() {
        // Whatever comes next would fail for the same reason, and hide it.
        return report.end(begun.elapsed());
    }
    if wants(Tier::Unit) {
        unit(&mut report);
    }
    report.step("every suite has a tier", every_suite_has_a_tier);
    report.step("build the program", || sh(&mut cargo(&["build"])));
    for &(tier, suite) in SUITES.iter().filter(|(tier, _)| wants(*tier)) {
        report.step(&format!("suite {suite}"), || run_suite(tier, suite));
    }
    if wants(Tier::Kernel) {
        report.step("demo", demo);
    }
    report.end(begun.elapsed())
}

/// The README's other command, with the program as the suites use it: not optimized, so its
/// figures mean nothing here, but all that it checks is checked.
fn demo() -> Result<()> {
    sh(this_program().arg("demo").arg("--proxy").arg(target().join(PROGRAM)))
}

/// No step names packages: which ones are built decides which features their dependencies have,
/// so every other choice would build half of them again.
fn unit(report: &mut Report) {
    let steps: [(&str, &[&str]); 5] = [
        ("format", &["fmt", "--all", "--check"]),
        ("lints", &["clippy", "--all-targets", "--", "-D", "warnings"]),
        ("documentation", &["doc", "--no-deps", "--document-private-items"]),
        ("unit tests", &["test", "--lib", "--bins"]),
        ("examples in documentation", &["test", "--doc"]),
    ];
    for (name, args) in steps {
        let mut command = cargo(args);
        if name == "documentation" {
            // The documentation is for those who work on this: it has the private items too.
            command.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links");
        }
        report.step(name, || sh(&mut command));
    }
}

/// A suite that nobody runs proves nothing.
fn every_suite_has_a_tier() -> Result<()> {
    let folders = ["tests/tests", "proxy/tests"].map(|folder| root().join(folder));
    let mut found = BTreeSet::new();
    for entry in folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten() {
        let path = entry?.path();
        // As cargo finds them: a file, or a folder with a main.rs.
        if path.extension().is_some_and(|extension| extension == "rs")
            || path.join("main.rs").exists()
        {
            found.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    let listed: BTreeSet<String> = SUITES.iter().map(|(_, suite)| (*suite).to_owned()).collect();
    let differing: Vec<_> = found.symmetric_difference(&listed).cloned().collect();
    ensure!(
        differing.is_empty(),
        "xtask/src/test.rs and the folders of suites differ in: {}",
        differing.join(", ")
    );
    Ok(())
}

fn run_suite(tier: Tier, suite: &str) -> Result<()> {
    let mut command = cargo(&["test", "--test", suite]);
    command.env("STEWARD_TCP_PROXY_BIN", target().join(PROGRAM));
    meet_needs(tier, &mut command)?;
    sh(&mut command)
}

fn meet_needs(tier: Tier, command: &mut Command) -> Result<()> {
    if tier == Tier::Kernel && !rustix::process::geteuid().is_root() {
        bail!("this tier makes network namespaces and loads kernel programs: run it as root");
    }
    if tier == Tier::Kube {
        let folder = kube_bins::ensure().context("this tier runs a real API server")?;
        command.env("STEWARD_KUBE_BINS", folder);
    }
    Ok(())
}

impl Report {
    fn step(&mut self, name: &str, work: impl FnOnce() -> Result<()>) {
        say(&format!("--- {name}"));
        let begun = Instant::now();
        let outcome = work();
        let took = begun.elapsed();
        match &outcome {
            Ok(()) => say(&format!("--- {name}: ok, {:.1} s", took.as_secs_f64())),
            Err(failure) => say(&format!("--- {name}: FAILED: {failure:#}")),
        }
        self.steps.push((name.to_owned(), took, outcome));
    }

    fn has_failed(&self) -> bool {
        self.steps.iter().any(|(_, _, outcome)| outcome.is_err())
    }

    fn end(self, took: Duration) -> Result<()> {
        println!("{:<28} {:>8}  result", "step", "seconds");
        let mut failed = Vec::new();
        for (name, took, outcome) in self.steps {
            let word = if outcome.is_ok() { "ok" } else { "FAILED" };
            println!("{name:<28} {:>8.1}  {word}", took.as_secs_f64());
            failed.extend(outcome.err().map(|failure| format!("{name} ({failure:#})")));
        }
        println!("{:<28} {:>8.1}", "all", took.as_secs_f64());
        ensure!(failed.is_empty(), "failed: {}", failed.join("; "));
        Ok(())
    }
}

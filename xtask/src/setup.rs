//! `cargo xtask setup`: finds or installs what is missing. Says what it does before it does it,
//! touches nothing that is already there, and goes on after a failure so that one run tells all
//! that cannot be had.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::build_ebpf;
use crate::kube_bins;
use crate::packages::Apt;
use crate::shell::{command, run as sh, say, which};
use crate::toolchain::{self, Toolchain, Way, answer};

/// bpf-linker's release for Debian's rustc. Later ones may have dropped its LLVM.
const LINKER_VERSION: &str = "0.13.0";

/// The package that tells whether a Debian has what we need.
const CORE_PACKAGE: &str = "libstd-rust-web-dev-bpf";

/// Programs that demo and tests run, with the package that has each.
const TOOLS: [(&str, &str); 2] = [("ip", "iproute2"), ("curl", "curl")];

/// Programs that only the suites of namespaces and kernel programs run.
const TEST_TOOLS: [(&str, &str); 3] =
    [("nft", "nftables"), ("ethtool", "ethtool"), ("tc", "iproute2")];

/// Programs that only the suites with Kubernetes's own run: a kube-proxy calls it.
const KUBE_TOOLS: [(&str, &str); 1] = [("iptables", "iptables")];

/// The flags of `setup`.
#[derive(clap::Args)]
pub struct Flags {
    /// Also what the tests need: Kubernetes's own programs, built with Go (some minutes, once)
    #[arg(long)]
    tests: bool,
}

/// How much to set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// What the demo needs: everything that builds and runs the proxy.
    Demo,
    /// That, and what sets up the networks that the tests are made in.
    Networks,
    /// That, and Kubernetes's own programs.
    Tests,
}

/// The verb: sets up, and proves the toolchain by building the kernel programs with it.
///
/// # Errors
/// One line with everything that cannot be had.
pub fn run(flags: &Flags) -> Result<()> {
    ensure_all(if flags.tests { Scope::Tests } else { Scope::Demo })?;
    prove_toolchain()?;
    say("setup: everything is there");
    Ok(())
}

/// Sets up without the proof, for verbs that build anyway.
///
/// # Errors
/// One line with everything that cannot be had.
pub fn ensure_all(scope: Scope) -> Result<()> {
    let apt = Apt::find();
    let mut outcomes = vec![tools(apt.as_ref(), scope), ebpf_toolchain(apt.as_ref())];
    if scope == Scope::Tests {
        outcomes.push(kube_bins::ensure().map(|_| ()));
    }
    let failures: Vec<String> = outcomes
        .into_iter()
        .filter_map(Result::err)
        .map(|failure| format!("{failure:#}"))
        .collect();
    ensure!(failures.is_empty(), "setup: cannot be had here: {}", failures.join("; "));
    Ok(())
}

fn tools(apt: Option<&Apt>, scope: Scope) -> Result<()> {
    let more = if scope >= Scope::Networks { TEST_TOOLS.as_slice() } else { &[] };
    let kube = if scope >= Scope::Tests { KUBE_TOOLS.as_slice() } else { &[] };
    let wanted = TOOLS.iter().chain(more).chain(kube).copied();
    let missing: Vec<(&str, &str)> =
        wanted.filter(|(program, _)| which(program).is_none()).collect();
    let (programs, packages): (Vec<_>, Vec<_>) = missing.into_iter().unzip();
    if programs.is_empty() {
        say("tools: all are there");
        return Ok(());
    }
    match apt {
        Some(apt) => apt.install(&packages),
        None => bail!(
            "the programs {} (install the packages {}, or run this as root on Debian)",
            programs.join(", "),
            packages.join(", ")
        ),
    }
}

fn ebpf_toolchain(apt: Option<&Apt>) -> Result<()> {
    if let Some(found) = Toolchain::find() {
        say(&format!("eBPF toolchain: {}", describe(&found)));
        return Ok(());
    }
    say("eBPF toolchain: incomplete; looking for Debian's packages first, then for rustup");
    let debian = apt.filter(|apt| toolchain::has_debian_core() || apt.offers(CORE_PACKAGE));
    let outcome = match debian.map(debian_way) {
        Some(Ok(())) => Ok(()),
        Some(Err(failure)) => {
            say(&format!("Debian's way failed: {failure:#}; trying rustup's"));
            nightly_way().with_context(|| format!("eBPF toolchain: {failure:#}, and then"))
        }
        None => nightly_way().context("eBPF toolchain"),
    };
    outcome?;
    let found = Toolchain::find().context("eBPF toolchain: installed, yet it cannot be called")?;
    say(&format!("eBPF toolchain: {}", describe(&found)));
    Ok(())
}

fn describe(found: &Toolchain) -> String {
    let way = match found.way {
        Way::Debian => "Debian's rustc",
        Way::Nightly => "rustup's nightly",
    };
    format!("{way}, and {}", found.linker.display())
}

/// rustc with `core` for BPF, its LLVM, and bpf-linker built against that LLVM.
fn debian_way(apt: &Apt) -> Result<()> {
    if !toolchain::has_debian_core() {
        apt.install(&["rustc-web", "cargo-web", CORE_PACKAGE])?;
    }
    if toolchain::has_rustup() && !Way::Debian.has_core() {
        say("telling rustup of Debian's toolchain, under a name of its own");
        let link = ["toolchain", "link", toolchain::DEBIAN, toolchain::DEBIAN_PREFIX];
        sh(&mut command("rustup", &link))?;
    }
    if toolchain::linker().is_some() {
        return Ok(());
    }
    debian_linker(apt)
}

/// bpf-linker, with the LLVM of Debian's rustc.
fn debian_linker(apt: &Apt) -> Result<()> {
    let llvm = debian_llvm()?;
    apt.install(&[&format!("llvm-{llvm}-dev"), &format!("libpolly-{llvm}-dev"), "g++"])?;
    install_linker_from_source(&llvm)
}

/// The major version of the LLVM in Debian's rustc. The linker must read its bitcode.
fn debian_llvm() -> Result<String> {
    let rustc = Path::new(toolchain::DEBIAN_PREFIX).join("bin/rustc");
    answer(Command::new(rustc).arg("-vV"))
        .and_then(|text| {
            let version = text.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
            Some(version.split('.').next()?.to_owned())
        })
        .context("Debian's rustc does not tell its LLVM's version")
}

/// Into cargo's own folder, where it survives a `cargo clean` and serves every clone.
fn install_linker_from_source(llvm: &str) -> Result<()> {
    say("building bpf-linker, one to three minutes");
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(prefix.join("bin")).chain(std::env::split_paths(&path));
    let feature = format!("llvm-{llvm}");
    let args =
        ["install", "bpf-linker", "--quiet", "--locked", "--force", "--version", LINKER_VERSION];
    let mut install = command("cargo", &args);
    install.args(["--no-default-features", "--features", &feature]);
    // llvm-sys looks for llvm-config on PATH.
    install.env("LLVM_PREFIX", &prefix).env("PATH", std::env::join_paths(folders)?);
    sh(&mut install)
}

/// rustup's nightly with the source of `core`, and bpf-linker as released.
fn nightly_way() -> Result<()> {
    ensure!(
        toolchain::has_rustup(),
        "neither Debian 12's packages (as root) nor rustup can be used: install rustup, or run \
         this as root on Debian 12"
    );
    if !Way::Nightly.has_core() {
        say("installing or updating rustup's nightly with the source of core; your default stays");
        let args = ["toolchain", "install", "nightly", "--profile=minimal", "--component=rust-src"];
        sh(&mut command("rustup", &args))?;
    }
    if toolchain::linker().is_some() { Ok(()) } else { install_released_linker() }
}

/// The released program is linked with the newest LLVM, which reads what older ones write.
fn install_released_linker() -> Result<()> {
    if which("cargo-binstall").is_some() {
        say("installing bpf-linker with cargo-binstall");
        return sh(&mut command("cargo", &["binstall", "--no-confirm", "--force", "bpf-linker"]));
    }
    let folder = toolchain::cargo_home().context("no home folder for bpf-linker")?.join("bin");
    std::fs::create_dir_all(&folder)?;
    ensure!(which("zstd").is_some(), "bpf-linker (to unpack its release, install zstd)");
    let name = format!("bpf-linker-{}-unknown-linux-musl.tar.zst", std::env::consts::ARCH);
    let url = format!("https://github.com/aya-rs/bpf-linker/releases/latest/download/{name}");
    say(&format!("downloading bpf-linker's release into {}", folder.display()));
    let archive = folder.join(&name);
    let downloaded = sh(command("curl", &["-fsSL", "--retry", "2", "-o"]).arg(&archive).arg(&url))
        .and_then(|()| {
            let unpack = ["--use-compress-program=zstd", "-x", "-f"];
            sh(command("tar", &unpack).arg(&archive).arg("-C").arg(&folder))
        });
    let _ = std::fs::remove_file(&archive);
    downloaded.context("bpf-linker's release")
}

/// A linker with an older LLVM than rustc's is only noticed by linking. Toolchains move on under
/// an old linker, so a new one is worth one try.
fn prove_toolchain() -> Result<()> {
    let Err(failure) = build_ebpf::build() else {
        return Ok(());
    };
    let found = Toolchain::find().context("eBPF toolchain")?;
    say(&format!("{failure:#}; trying with a new bpf-linker"));
    match found.way {
        Way::Debian => debian_linker(&Apt::find().context("no right to install packages")?)?,
        Way::Nightly => install_released_linker()?,
    }
    build_ebpf::build()
}

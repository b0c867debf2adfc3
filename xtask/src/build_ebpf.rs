//! `cargo xtask build-ebpf`: the kernel programs alone, as a file to look at.
//!
//! aya-build is made for build scripts: it takes its orders from the variables that cargo gives
//! them and answers in cargo's language. So it runs in a process of its own with such variables,
//! and its answers are turned into plain lines.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};

use crate::shell::{root, say, target, this_program};
use crate::toolchain::Toolchain;

/// File name of the object, which its Cargo.toml gives.
const OBJECT: &str = "steward-ebpf";

const MISSING: &str = "the eBPF toolchain is missing: run `cargo xtask setup`";

/// The flags of `build-ebpf`.
#[derive(clap::Args)]
pub struct Flags {
    /// The inner process.
    #[arg(long, hide = true)]
    as_build_script: bool,
}

/// The verb, and the process that it starts.
///
/// # Errors
/// No toolchain, or the programs do not build.
pub fn run(flags: &Flags) -> Result<()> {
    if flags.as_build_script { Toolchain::find().context(MISSING)?.build(&root()) } else { build() }
}

/// Builds into `target/ebpf`.
///
/// # Errors
/// No toolchain, or the programs do not build.
pub fn build() -> Result<()> {
    let toolchain = Toolchain::find().context(MISSING)?;
    let folder = target().join("ebpf");
    std::fs::create_dir_all(&folder)?;
    say("building the kernel programs");
    let endian = if cfg!(target_endian = "big") { "big" } else { "little" };
    let mut child = this_program()
        .args(["build-ebpf", "--as-build-script"])
        .current_dir(root())
        .envs(toolchain.environment())
        .env("OUT_DIR", &folder)
        .env("CARGO_CFG_TARGET_ENDIAN", endian)
        .env("CARGO_CFG_TARGET_ARCH", std::env::consts::ARCH)
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            if let Some(text) = line?.strip_prefix("cargo:warning=") {
                eprintln!("{text}");
            }
        }
    }
    ensure!(child.wait()?.success(), "the kernel programs did not build");
    say(&format!("built {}", folder.join(OBJECT).display()));
    Ok(())
}

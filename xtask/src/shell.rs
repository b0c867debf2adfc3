//! Commands that are shown before they run.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// The repository.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Where cargo builds.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// A command in the repository's folder.
pub fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).current_dir(root());
    command
}

/// This very program, even if cargo has put a newer one in its place meanwhile, as it does when
/// `cargo xtask test` builds the workspace.
pub fn this_program() -> Command {
    Command::new("/proc/self/exe")
}

/// The cargo that runs us, and so the toolchain that the user chose.
pub fn cargo(args: &[&str]) -> Command {
    let cargo = env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    command(&cargo, args)
}

/// Tells what is there or what happens next.
pub fn say(text: &str) {
    eprintln!("xtask: {text}");
}

/// Shows the command, runs it, and fails if it does.
///
/// # Errors
/// It cannot be started, or ends with another status than 0.
pub fn run(command: &mut Command) -> Result<()> {
    eprintln!("xtask: $ {}", shown(command));
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("cannot run {program}"))?;
    ensure!(status.success(), "{} ended with {status}", shown(command));
    Ok(())
}

/// The command as one would type it.
fn shown(command: &Command) -> String {
    // PATH is long and says nothing.
    let variables = command.get_envs().filter(|(name, _)| *name != "PATH");
    let variables = variables.filter_map(|(name, value)| {
        Some(format!("{}={}", name.to_string_lossy(), value?.to_string_lossy()))
    });
    let program = Path::new(command.get_program());
    let program = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy();
    let args = command.get_args().map(|arg| arg.to_string_lossy().into_owned());
    let words: Vec<String> =
        variables.chain(std::iter::once(program.into_owned())).chain(args).collect();
    words.join(" ")
}

/// Where a program is, on PATH or in the folders of the system's administrator, which a user's
/// PATH often lacks.
pub fn which(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin", "/usr/local/bin", "/usr/local/go/bin"];
    env::split_paths(&path)
        .chain(system.iter().map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

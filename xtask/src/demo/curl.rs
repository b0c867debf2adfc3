//! curl, as a person would use it.

use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use tokio::process::{Child, Command};

use crate::shell::which;

/// curl with these arguments, bounded in time, past any HTTP proxy of the user's.
///
/// # Errors
/// There is no curl.
pub fn command(args: &[&str]) -> Result<Command> {
    let mut curl = Command::new(which("curl").context("no curl command")?);
    // A configuration file of the user's counts only if this is not the first argument.
    curl.arg("--disable");
    curl.args(["--silent", "--show-error", "--fail", "--noproxy", "*", "--max-time", "5"]);
    curl.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(curl)
}

/// What it printed.
///
/// # Errors
/// It failed; the message is its own.
pub async fn output(curl: Child) -> Result<String> {
    let output = curl.wait_with_output().await?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", error.trim());
    Ok(String::from_utf8(output.stdout)?)
}

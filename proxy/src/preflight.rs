//! Verb `check`.

use std::process::ExitCode;

use crate::cli::CheckFlags;

/// Prints the table.
#[must_use]
pub fn check(_flags: &CheckFlags) -> ExitCode {
    ExitCode::FAILURE
}

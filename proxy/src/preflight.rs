//! Verb `check`: what this kernel and these privileges allow.
//!
//! Two kinds of rows. *Facts* are read: capabilities, seccomp, security modules, mounts. *Trials*
//! are done with the real kernel programs: create, load, attach to a device in a network namespace
//! of their own, see a handshake. Distribution kernels carry backports and profiles differ, so
//! only a trial proves anything; the facts are there to name the gate when one fails.
//!
//! Nothing stays behind: the namespace dies with its thread, programs and maps with the process.

mod facts;
mod gates;
mod loopback;
mod show;
mod trial;

use std::io::{self, Write as _};
use std::process::ExitCode;

use crate::cli::{CheckFlags, Output};
use facts::Host;
pub use facts::missing_capabilities;
use tracing_subscriber::EnvFilter;
use trial::{Finding, Stage};

/// What `--verbose` shows: the kernel programs name their own crate as the source.
const KERNEL_MESSAGES: &str = "warn,steward_ebpf=debug";

/// What is known about one gate.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
struct Row {
    gate: &'static str,
    status: Status,
    detail: String,
    /// What to do, in failing rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

/// The verdict on one gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    /// Open.
    Ok,
    /// Closed, and the packet engine needs it open.
    Failed,
    /// Whatever it is, the packet engine does without.
    NotNeeded,
    /// An earlier row failed.
    NotTried,
}

impl Status {
    fn as_label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "FAILED",
            Self::NotNeeded => "not needed",
            Self::NotTried => "not tried",
        }
    }
}

impl Row {
    fn new(gate: &'static str, status: Status, detail: impl Into<String>) -> Self {
        Self { gate, status, detail: detail.into(), remedy: None }
    }

    fn failed(gate: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..Self::new(gate, Status::Failed, detail) }
    }
}

/// Everything that `check` prints.
#[derive(Debug, serde::Serialize)]
struct Report {
    ok: bool,
    version: &'static str,
    kernel: String,
    rows: Vec<Row>,
    handshakes: Vec<show::Segment>,
}

/// Looks, tries, prints. The status is 0 if all that the packet engine needs is there, else 1.
#[must_use]
pub fn check(flags: &CheckFlags) -> ExitCode {
    if flags.verbose {
        // Messages of the kernel programs arrive through the log crate, which this also connects.
        tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new(KERNEL_MESSAGES))
            .with_writer(io::stderr)
            .with_ansi(false)
            .init();
    }
    let report = Report::make(flags.verbose);
    let text = match flags.output {
        Output::Table => show::table(&report),
        Output::Json => show::json(&report),
    };
    // A reader that has gone (head, a closed terminal) changes nothing about what was found.
    let _ = io::stdout().write_all(text.as_bytes());
    if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Report {
    fn make(verbose: bool) -> Self {
        let host = Host::read();
        let findings = trial::run(verbose);
        let mut rows = host.rows();
        rows.extend(Stage::ALL.map(|stage| trial_row(&host, stage, &findings.stages)));
        blame(&host, &findings.stages, &mut rows);
        Self {
            ok: rows.iter().all(|row| matches!(row.status, Status::Ok | Status::NotNeeded)),
            version: crate::VERSION,
            kernel: host.release,
            rows,
            handshakes: findings.segments.iter().map(show::Segment::from).collect(),
        }
    }
}

fn trial_row(host: &Host, stage: Stage, findings: &[(Stage, Finding)]) -> Row {
    let gate = stage.as_label();
    match findings.iter().find(|(found, _)| *found == stage) {
        None => Row::new(gate, Status::NotTried, "an earlier row failed"),
        Some((_, Ok(detail))) => Row::new(gate, Status::Ok, detail),
        Some((_, Err(failure))) => {
            let closed = gates::closed(host, stage, failure);
            Row::failed(gate, format!("{failure}; closed gate: {}", closed.gate), closed.remedy)
        }
    }
}

/// A gate that looked open, or that is mostly not needed, but that a trial ran into.
fn blame(host: &Host, findings: &[(Stage, Finding)], rows: &mut [Row]) {
    for (stage, finding) in findings {
        let Err(failure) = finding else { continue };
        let closed = gates::closed(host, *stage, failure);
        for row in rows.iter_mut().filter(|row| row.gate == closed.gate) {
            if row.status != Status::Failed {
                row.status = Status::Failed;
                row.remedy = Some(closed.remedy.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::trial::Failure;

    fn refused(call: &'static str) -> Failure {
        Failure::from(io::Error::from_raw_os_error(libc::EPERM)).during(call)
    }

    #[test]
    fn a_stage_that_was_not_reached_is_not_tried() {
        let row = trial_row(&Host::privileged(), Stage::Attach, &[]);
        assert_eq!((row.gate, row.status), ("attach", Status::NotTried));
    }

    #[test]
    fn a_refusal_despite_all_privileges_is_blamed_on_the_security_module() {
        let host = Host::privileged();
        let findings = [(Stage::Load, Err(refused("bpf")))];
        let mut rows = host.rows();
        assert!(rows.iter().all(|row| row.status != Status::Failed), "{rows:#?}");
        blame(&host, &findings, &mut rows);
        let failed: Vec<_> = rows.iter().filter(|row| row.status == Status::Failed).collect();
        assert_eq!(failed.len(), 1, "{failed:#?}");
        assert_eq!(failed[0].gate, gates::LSM);
        assert!(failed[0].remedy.is_some());
    }
}

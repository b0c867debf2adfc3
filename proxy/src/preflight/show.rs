//! What `check` found, for people and for programs.

use std::fmt::Write as _;
use std::net::SocketAddr;

use proxy_common::{HOOK_INGRESS, Handshake, STEP_SYN, STEP_SYN_ACK, TcpOptions};

use super::{Report, Status};

/// One observed segment, in words.
#[derive(Debug, serde::Serialize)]
pub(super) struct Segment {
    step: &'static str,
    hook: &'static str,
    source: SocketAddr,
    destination: SocketAddr,
    ifindex: u32,
    time_ns: u64,
    sequence: u32,
    acknowledgement: u32,
    flags: u16,
    window: u16,
    mss: Option<u16>,
    window_scale: Option<u8>,
    sack_permitted: bool,
    /// TSval and TSecr.
    timestamps: Option<(u32, u32)>,
}

impl From<&Handshake> for Segment {
    fn from(event: &Handshake) -> Self {
        let options = event.options;
        Self {
            step: step(event.step),
            hook: hook(event.hook),
            source: event.source.into(),
            destination: event.destination.into(),
            ifindex: event.ifindex,
            time_ns: event.time_ns,
            sequence: event.sequence,
            acknowledgement: event.acknowledgement,
            flags: event.flags,
            window: event.window,
            mss: options.has(TcpOptions::HAS_MSS).then_some(options.mss),
            window_scale: options.has(TcpOptions::HAS_WINDOW_SCALE).then_some(options.window_scale),
            sack_permitted: options.has(TcpOptions::SACK_PERMITTED),
            timestamps: options
                .has(TcpOptions::HAS_TIMESTAMPS)
                .then_some((options.tsval, options.tsecr)),
        }
    }
}

/// A step of the handshake by its name.
pub(super) fn step(step: u8) -> &'static str {
    match step {
        STEP_SYN => "SYN",
        STEP_SYN_ACK => "SYN-ACK",
        _ => "ACK",
    }
}

/// A hook by its name.
pub(super) fn hook(hook: u8) -> &'static str {
    if hook == HOOK_INGRESS { "ingress" } else { "egress" }
}

/// A row per gate, with what to do below each that failed, and the verdict last.
pub(super) fn table(report: &Report) -> String {
    let mut text = String::new();
    for row in &report.rows {
        let _ = writeln!(text, "{:<17} {:<10}  {}", row.gate, row.status.as_label(), row.detail);
        if let Some(remedy) = &row.remedy {
            let _ = writeln!(text, "{:<17} {:<10}  -> {remedy}", "", "");
        }
    }
    let failed = report.rows.iter().filter(|row| row.status == Status::Failed).count();
    let verdict = match failed {
        0 => "everything that the kernel engines need is there".to_owned(),
        1 => "1 gate is closed; engines splice and copy need none".to_owned(),
        n => format!("{n} gates are closed; engines splice and copy need none"),
    };
    let _ = writeln!(text, "{verdict}");
    text
}

/// One object on one line.
pub(super) fn json(report: &Report) -> String {
    // Serialising strings and numbers into memory cannot fail.
    serde_json::to_string(report).map(|text| text + "\n").unwrap_or_default()
}

/// An error's text for one line of a table: of a verifier's log only what it ends with.
pub(super) fn last_lines(text: &str) -> String {
    const KEPT: usize = 4;
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match lines.len().checked_sub(KEPT + 1) {
        Some(left_out) => {
            let tail = lines[left_out + 1..].join(" | ");
            format!("{} | ... | {tail}", lines[0])
        }
        None => lines.join(" | "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Row;

    #[test]
    fn the_table_shows_the_remedy_below_its_row_and_counts_what_is_closed() {
        let report = Report {
            ok: false,
            version: "0",
            kernel: "6.18".into(),
            rows: vec![
                Row::new("kernel", Status::Ok, "6.18"),
                Row::failed("CAP_BPF", "absent", "add it"),
            ],
            handshakes: Vec::new(),
        };
        let text = table(&report);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("FAILED") && lines[2].trim() == "-> add it", "{text}");
        assert!(lines[3].starts_with("1 gate is closed"), "{text}");
    }

    #[test]
    fn of_a_long_log_the_first_line_and_the_end_are_kept() {
        let log = "load failed\n1\n2\n3\n4\n5\n6\n";
        assert_eq!(last_lines(log), "load failed | ... | 3 | 4 | 5 | 6");
        assert_eq!(last_lines("one line"), "one line");
    }
}

//! The README promises to name every flag, metric and reason. This holds it to that.

use clap::CommandFactory;
use proxy::cli::Flags;
use proxy::metrics::Metrics;
use proxy::relay::{Reason, Side};
use proxy::upstream::DialError;

const README: &str = include_str!("../../README.md");

fn missing(names: impl IntoIterator<Item = String>) -> Vec<String> {
    names.into_iter().filter(|name| !README.contains(name.as_str())).collect()
}

#[test]
fn every_flag_is_in_the_readme() {
    let flags = Flags::command();
    let shown = flags.get_arguments().filter(|flag| !flag.is_hide_set());
    let names = shown.filter_map(|a| a.get_long()).map(|l| format!("`--{l}`"));
    assert_eq!(missing(names), [""; 0]);
}

#[test]
fn every_default_is_in_the_readme() {
    for flag in Flags::command().get_arguments().filter(|flag| !flag.is_hide_set()) {
        let Some(name) = flag.get_long() else { continue };
        let row = README.lines().find(|line| line.contains(&format!("`--{name}`")));
        for default in flag.get_default_values() {
            // Of switches that do nothing by default the README says so in words.
            let default = default.to_string_lossy();
            let shown = row.is_some_and(|row| row.contains(&format!("`{default}`")));
            assert!(shown || default == "false", "--{name} has default {default}: {row:?}");
        }
    }
}

#[test]
fn every_metric_is_in_the_readme() {
    let metrics = Metrics::new().expect("registers");
    assert!(metrics.names.len() > 10, "{:?}", metrics.names);
    assert_eq!(missing(metrics.names), [""; 0]);
}

#[test]
fn every_reason_is_in_the_readme() {
    let mut reasons = vec![Reason::Idle, Reason::Cut];
    for side in [Side::Client, Side::Server] {
        reasons.extend([
            Reason::Closed(side),
            Reason::Reset(side),
            Reason::TimedOut(side),
            Reason::Failed(side),
        ]);
    }
    let dials = [
        DialError::Unresolved,
        DialError::Unreachable,
        DialError::TimedOut,
        DialError::Refused,
        DialError::Loop,
        DialError::Local,
    ];
    let reasons = reasons.into_iter().map(Reason::as_label);
    let labels = reasons.chain(dials.into_iter().map(DialError::as_label));
    assert_eq!(missing(labels.map(|label| format!("`{label}`"))), [""; 0]);
}

//! Without pins: one word of warning, and connections end with their process.

use std::io::ErrorKind::{BrokenPipe, ConnectionReset};

use proxy_tests::peers::Peer;

use crate::ground::{Ground, Pair, await_relayed_by_kernel};

fn is_warning(line: &serde_json::Value) -> bool {
    let text = line["message"].as_str().unwrap_or_default();
    line["level"] == "WARN" && text.contains("end with this process")
}

pub fn a_warning_and_resets_when_killed(at: &Ground) {
    // The folder is there, but on another file system.
    let mut proxy = at.launch().flag("bpffs", "/tmp/steward-tcp-proxy-none").start();
    proxy.log_line("the warning", is_warning);
    assert_eq!(proxy.count_lines(is_warning), 1);
    let pairs = at.switched(&proxy, 2);
    proxy.kill9();
    // No program is in the way any more: the node's own stack answers.
    // (Not at once: the kernel empties the array of programs behind our back.)
    for peer in pairs.iter().flat_map(|pair| [&pair.client, &pair.server]) {
        let (_, error) = peer.send_until_error(1);
        assert!(matches!(error.kind(), ConnectionReset | BrokenPipe), "{error}");
    }
    let next = at.launch().flag("bpffs", "off").start();
    assert_eq!(next.count_lines(is_warning), 0, "it was asked for");
    at.switched(&next, 1)[0].talk();
}

pub fn sigterm_waits_for_their_end(at: &Ground) {
    let mut proxy = at.launch().flag("bpffs", "off").flag("drain-timeout", "10m").start();
    let pairs = at.switched(&proxy, 2);
    proxy.sigterm();
    proxy.await_metric("draining", &[], 1.0);
    for pair in &pairs {
        pair.talk();
    }
    pairs[0].close();
    await_relayed_by_kernel(&proxy, 1.0);
    assert!(!proxy.has_ended(), "one connection lives");
    pairs[1].close();
    assert_eq!(proxy.exit_code(), Some(0));
}

pub fn the_deadline_and_a_second_signal_reset_them(at: &Ground) {
    for timeout in ["1s", "10m"] {
        let launch = at.launch().flag("bpffs", "off").flag("drain-timeout", timeout);
        let mut proxy = launch.start();
        let pairs = at.switched(&proxy, 2);
        proxy.sigterm();
        proxy.await_metric("draining", &[], 1.0);
        if timeout == "10m" {
            proxy.sigterm();
        }
        pairs.iter().for_each(Pair::expect_reset);
        assert_eq!(proxy.exit_code(), Some(1), "{timeout}");
        let reasons: Vec<_> = proxy.access_log(2).into_iter().map(|ended| ended.reason).collect();
        assert_eq!(reasons, ["cut_by_drain"; 2], "{timeout}");
    }
}

/// Two at once without pins: the second must not give out ports of the first one's connections,
/// which have no socket any more.
pub fn ports_belong_to_one_process(at: &Ground) {
    let mut first = at.launch().flag("bpffs", "off").start();
    let pairs = at.switched(&first, 1);
    let auto = at.launch().flag("bpffs", "off").flag("engine", "auto").flag("listen-addr", ":6444");
    let second = auto.start();
    second.log_line("the reason", |line| {
        line["reason"].as_str().is_some_and(|reason| reason.contains("another process uses"))
    });
    pairs[0].talk();
    drop(second);
    first.kill9();
    // Its place is free at once.
    let next = at.launch().flag("bpffs", "off").start();
    at.switched(&next, 1)[0].talk();
}

/// Two at once with one directory of pins: the second must not touch the first one's connections.
pub fn pins_belong_to_one_process(at: &Ground) {
    let first = at.launch().start();
    let pairs = at.switched(&first, 1);
    let auto = at.launch().flag("engine", "auto").flag("listen-addr", ":6444").start();
    auto.log_line("the reason", |line| {
        line["reason"].as_str().is_some_and(|reason| reason.contains("another process uses"))
    });
    let to = std::net::SocketAddr::new(at.address().ip(), 6444);
    let client = at.row.client.run(move || Peer::connect(to));
    let other = Pair { client, server: at.upstream.accept() };
    other.talk();
    pairs[0].talk();
    drop(auto);
    pairs[0].talk();
    await_relayed_by_kernel(&first, 1.0);
}

/// What is pinned goes on relaying, so ports are in use of which a process without pins knows
/// nothing: under `auto` it relays in userspace, and says what to do.
pub fn beside_what_another_has_pinned(at: &Ground) {
    let mut pinned = at.launch().start();
    let pairs = at.switched(&pinned, 2);
    pairs[0].close();
    pinned.sigterm();
    assert_eq!(pinned.exit_code(), Some(0));
    let next = at.launch().flag("engine", "auto").flag("bpffs", "off").start();
    let line = next.log_line("the engine's line", |line| line["reason"].is_string());
    assert!(line["reason"].as_str().is_some_and(|reason| reason.contains("cleanup")), "{line}");
    pairs[1].talk();
    let pair = at.pair();
    pair.talk();
    pair.close();
    assert_eq!(next.ended().engine.as_deref(), Some("splice"));
}

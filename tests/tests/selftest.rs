//! The engine in the kernel tries itself before it may have connections. Needs root: the engine
//! loads programs, each proxy on a host of its own (a network namespace).

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::Arc;

use proxy_tests::capabilities::keep_capabilities;
use proxy_tests::netns::Host;
use proxy_tests::peers::Peer;
use proxy_tests::proxy::{Launch, binary};
use proxy_tests::seccomp::Call;
use proxy_tests::servers::{ClosedPort, Upstream};
use proxy_tests::wait::until;
use rustix::thread::CapabilitySet;
use serde_json::Value;

/// Freezing a socket, the last step of a switch, which nothing needs before the first switch:
/// setsockopt(_, IPPROTO_TCP, TCP_REPAIR, …).
fn freezing() -> Call {
    const TCP_REPAIR: u32 = 19;
    Call::new(libc::SYS_setsockopt).with(1, libc::IPPROTO_TCP as u32).with(2, TCP_REPAIR)
}

fn launch(engine: &str) -> Launch {
    let host = Arc::new(Host::new("node"));
    // Fewer than the usual, lest a low limit of descriptors be the first thing that is told.
    let launch = Launch::new("127.0.0.1:9").flag("max-connections", 100);
    launch.flag("engine", engine).on(&host)
}

fn begins(line: &Value, beginning: &str) -> bool {
    line["message"].as_str().is_some_and(|message| message.starts_with(beginning))
}

#[test]
fn an_engine_that_cannot_finish_a_switch_gets_no_connection() {
    let proxy = launch("auto").refuse(freezing()).start();
    // Whatever the self-test's own engine says, it would be said before.
    let is_usual = |line: &Value| begins(line, "listening") || begins(line, "admin listening");
    let line = proxy.log_line("the engine's line", |line| !is_usual(line));
    assert!(begins(&line, "no relaying in the kernel") && line["level"] == "INFO", "{line:#}");
    let reason = line["reason"].as_str().expect("a reason");
    assert!(reason.starts_with("the self-test: a connection that"), "{reason}");
}

#[test]
fn under_auto_clients_need_not_wait_for_it() {
    let proxy = launch("auto").start();
    proxy.log_line("the engine", |line| begins(line, "the kernel relays connections"));
    proxy.log_line("the listener", |line| begins(line, "listening"));
}

/// The log of a proxy that cannot start with this engine.
fn refused(prepare: impl FnOnce(&mut Command)) -> String {
    let mut command = Command::new(binary());
    command.args(["--upstream-addr=127.0.0.1:9", "--listen-addr=127.0.0.1:0", "--bpffs=off"]);
    command.args(["--admin-addr=127.0.0.1:0", "--admin-socket=off", "--endpoint-mode=off"]);
    command.args(["--max-connections=100", "--engine=packet"]).env_remove("RUST_LOG");
    prepare(&mut command);
    let output = Host::new("node").run(move || command.output()).expect("it starts");
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{log}");
    log
}

#[test]
fn asked_for_by_name_it_is_fatal() {
    let log = refused(|command| freezing().refuse_to(command));
    assert!(log.contains("engine packet cannot work here: the self-test"), "{log}");
    assert!(log.contains("steward-tcp-proxy check"), "{log}");
}

#[test]
fn capabilities_that_are_missing_are_named_in_one_line() {
    let needed = [
        (CapabilitySet::BPF, "BPF"),
        (CapabilitySet::NET_ADMIN, "NET_ADMIN"),
        (CapabilitySet::NET_RAW, "NET_RAW"),
        (CapabilitySet::PERFMON, "PERFMON"),
    ];
    let all = needed.iter().fold(CapabilitySet::empty(), |all, (one, _)| all | *one);
    let cases = needed.iter().map(|(one, name)| (all - *one, (*name).to_owned())).chain([
        (CapabilitySet::SYS_ADMIN, "NET_ADMIN, NET_RAW".to_owned()),
        (CapabilitySet::empty(), "BPF, NET_ADMIN, NET_RAW, PERFMON".to_owned()),
    ]);
    for (kept, missing) in cases {
        let log = refused(|command| keep_capabilities(command, kept));
        assert!(log.contains(&format!("missing capabilities: {missing};")), "{log}");
        assert!(log.contains("steward-tcp-proxy check"), "{log}");
        assert_eq!(log.lines().count(), 1, "{log}");
    }
}

#[test]
fn beside_another_process_that_has_it_one_relays_in_userspace_and_says_so() {
    let host = Arc::new(Host::new("node"));
    let launch = |engine| Launch::new("127.0.0.1:9").flag("engine", engine).on(&host);
    let first = launch("packet").start();
    let second = launch("auto").start();
    let line = second.log_line("the reason", |line| line["reason"].is_string());
    assert!(begins(&line, "relaying in userspace"), "{line:#}");
    assert!(line["reason"].as_str().is_some_and(|why| why.contains("another process")), "{line:#}");
    assert_eq!(line["level"], "INFO", "{line:#}");
    drop(first);
}

#[test]
fn without_namespaces_it_is_used_untested() {
    let proxy = launch("packet").refuse(Call::new(libc::SYS_unshare)).start();
    let line = proxy.log_line("the first line", |_| true);
    assert!(begins(&line, "no self-test") && line["level"] == "INFO", "{line:#}");
    assert!(line["error"].as_str().is_some_and(|error| error.contains("unshare")), "{line:#}");
    proxy.log_line("the engine", |line| begins(line, "the kernel relays connections"));
}

/// Nothing is used then.
#[test]
fn untested_and_unusable_is_told_in_one_line() {
    let log = refused(|command| {
        Call::new(libc::SYS_unshare).refuse_to(command);
        Call::new(libc::SYS_membarrier).refuse_to(command);
    });
    assert!(log.contains("engine packet cannot work here: membarrier"), "{log}");
    assert_eq!(log.lines().count(), 1, "{log}");
}

#[test]
fn where_all_works_the_engine_is_all_that_is_said() {
    let proxy = launch("packet").start();
    let line = proxy.log_line("the first line", |_| true);
    assert!(begins(&line, "the kernel relays connections"), "{line:#}");
    let line = proxy.log_line("the next line", |line| !begins(line, "the kernel relays"));
    assert!(begins(&line, "listening"), "{line:#}");
    // Every connection does, and becomes the kernel's if it fits.
    assert_eq!(line["begins_with"], "splice", "{line:#}");
}

/// On `host`, without the self-test, which takes a while and leaves nothing anyway.
fn untested(host: &Arc<Host>, engine: &str, upstream: &Upstream) -> Launch {
    let launch = Launch::new(upstream.address()).flag("max-connections", 100);
    launch.flag("engine", engine).refuse(Call::new(libc::SYS_unshare)).on(host)
}

fn host_with_upstream() -> (Arc<Host>, Upstream) {
    let host = Arc::new(Host::new("node"));
    let upstream = host.run(|| Upstream::new(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    (host, upstream)
}

/// Nobody but the engine itself gives ports back that it has reserved.
#[test]
fn sigterm_while_it_starts_leaves_no_port_reserved() {
    let (host, upstream) = host_with_upstream();
    let is_reserved = || !host.read("/proc/sys/net/ipv4/ip_local_reserved_ports").trim().is_empty();
    for _ in 0..5 {
        let mut proxy = untested(&host, "auto", &upstream).start();
        until("ports are reserved", is_reserved);
        proxy.sigterm();
        assert_eq!(proxy.exit_code(), Some(0));
        assert!(!is_reserved(), "and stay so");
    }
}

/// Who comes after SIGTERM is refused, whatever the engine still waits for.
#[test]
fn sigterm_while_it_starts_closes_the_listener() {
    let (host, upstream) = host_with_upstream();
    // It takes the other's place only after some seconds of waiting in vain.
    let other = untested(&host, "packet", &upstream).start();
    let mut proxy = untested(&host, "auto", &upstream).start();
    let address = proxy.address();
    let client = host.run(move || Peer::connect(address));
    let server = upstream.accept();
    client.send(b"before");
    server.receive(b"before");
    proxy.sigterm();
    until("the listener is closed", || host.run(move || ClosedPort::try_bind(address).is_ok()));
    let gave_up = proxy.count_lines(|line| begins(line, "another process relays"));
    assert_eq!(gave_up, 0, "closed only once the engine was no longer waited for");
    client.finish();
    server.expect_eof();
    server.finish();
    client.expect_eof();
    assert_eq!(proxy.exit_code(), Some(0));
    drop(other);
}

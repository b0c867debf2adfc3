//! The command line from the outside: what is refused, printed, or put up with.

use std::net::{IpAddr, Ipv4Addr, TcpListener};

use proxy_tests::peers::Peer;
use proxy_tests::proxy::{Launch, run};
use proxy_tests::servers::Upstream;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

#[test]
fn every_mistake_is_told_at_once_and_nothing_is_bound() {
    // Occupied, so that an attempt to bind it would be told of as well.
    let occupied = TcpListener::bind((LOOPBACK, 0)).expect("a port");
    let address = occupied.local_addr().expect("bound").to_string();
    let outcome = run(&[
        &format!("--listen-addr={address}"),
        "--engine=warp",
        "-connect-timeout=soon",
        "--max-connections=0",
        "--drain-timeout",
        "-5s",
        "--endpoint-mode=maybe",
        "--log-format=xml",
        "--pod-ip=nowhere",
        "--bpffs=bpf",
        "--packet-max-rtt=0",
        "--admin-socket=admin.sock",
        "--tls-key-file=/nowhere.key",
        "--no-such-flag",
        "stray",
    ]);
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    for part in [
        "--engine",
        "--connect-timeout",
        "--max-connections",
        "--drain-timeout",
        "--endpoint-mode",
        "--log-format",
        "--pod-ip",
        "--bpffs",
        "--packet-max-rtt",
        "--admin-socket",
        "--tls-cert-file",
        "no-such-flag",
        "stray",
        "--upstream-addr",
    ] {
        assert!(outcome.stderr.contains(part), "{part} is not in:\n{}", outcome.stderr);
    }
    assert!(!outcome.stderr.contains(&address), "it tried to bind:\n{}", outcome.stderr);
    assert!(outcome.stdout.is_empty(), "{}", outcome.stdout);
}

#[test]
fn engines_to_come_are_refused_with_a_clear_word() {
    for engine in ["sockmap", "capture"] {
        let outcome = run(&["--upstream-addr=127.0.0.1:1", "--engine", engine]);
        assert_eq!(outcome.code, Some(2));
        assert!(outcome.stderr.contains(engine), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("not in this release"), "{}", outcome.stderr);
    }
}

#[test]
fn an_occupied_port_is_one_clear_error() {
    let occupied = TcpListener::bind((LOOPBACK, 0)).expect("a port");
    let address = occupied.local_addr().expect("bound").to_string();
    for [flag, other] in [["listen-addr", "admin-addr"], ["admin-addr", "listen-addr"]] {
        let outcome = run(&[
            "--upstream-addr=127.0.0.1:1",
            "--endpoint-mode=off",
            &format!("--{flag}={address}"),
            &format!("--{other}=127.0.0.1:0"),
        ]);
        assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
        let errors: Vec<_> = outcome.stderr.lines().filter(|l| l.contains("ERROR")).collect();
        assert_eq!(errors.len(), 1, "{}", outcome.stderr);
        assert!(errors[0].contains(&address), "{errors:?}");
        assert!(errors[0].to_lowercase().contains("in use"), "{errors:?}");
        assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    }
}

#[test]
fn help_lists_every_flag_and_says_what_it_does() {
    let outcome = run(&["--help"]);
    assert_eq!(outcome.code, Some(0));
    for flag in [
        "listen-addr",
        "upstream-addr",
        "engine",
        "connect-timeout",
        "idle-timeout",
        "drain-timeout",
        "max-connections",
        "endpoint-mode",
        "service-name",
        "service-port",
        "reconcile-interval",
        "kubeconfig",
        "pod-ip",
        "tls-cert-file",
        "tls-key-file",
        "upstream-sni",
        "upstream-insecure",
        "admin-addr",
        "admin-socket",
        "bpffs",
        "packet-max-rtt",
        "log-format",
        "v",
        "logtostderr",
    ] {
        let listed = outcome.stdout.lines().any(|line| {
            let words = || line.split([' ', ',', '=', '[']);
            words().any(|word| word.strip_prefix("--") == Some(flag))
        });
        assert!(listed, "--{flag} is not in:\n{}", outcome.stdout);
    }
    let engines = outcome.stdout.split_once("--engine").expect("listed").1;
    let engines = engines.split_once("--bpffs").expect("the next one").0;
    for engine in ["auto", "packet", "splice", "copy"] {
        let mut words = engines.split(|c: char| !c.is_ascii_alphanumeric());
        assert!(words.any(|word| word == engine), "{engine} is not in:\n{}", outcome.stdout);
    }
    for verb in ["check", "connections", "cleanup"] {
        assert!(outcome.stdout.contains(verb), "{verb} is not in:\n{}", outcome.stdout);
        let own = run(&[verb, "--help"]);
        assert!(own.code == Some(0) && own.stdout.contains("Usage"), "{verb}: {own:?}");
    }
    assert_eq!(run(&["-h"]).stdout, outcome.stdout);
}

#[test]
fn version_is_one_line() {
    for flag in ["--version", "-version"] {
        let outcome = run(&[flag]);
        assert_eq!(outcome.code, Some(0));
        let version = outcome.stdout.trim_end();
        assert!(version.starts_with("steward-tcp-proxy "), "{version:?}");
        assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version:?}");
        assert_eq!(version.lines().count(), 1, "{version:?}");
    }
}

#[test]
fn text_logs_are_for_people() {
    let outcome = run(&["--upstream-addr=a", "--listen-addr=192.0.2.1:1", "--admin-addr=off"]);
    assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("ERROR"), "{}", outcome.stderr);
    assert!(!outcome.stderr.contains('{'), "{}", outcome.stderr);
    assert!(!outcome.stderr.contains('\u{1b}'), "colours in a log: {:?}", outcome.stderr);
}

/// Without a Kubernetes configuration the reconciler lacks something; clients do not care.
#[test]
fn traffic_flows_without_a_kubernetes_configuration() {
    for mode in ["mirror", "cluster-ip"] {
        let upstream = Upstream::new(LOOPBACK);
        let proxy = Launch::new(upstream.address()).flag("endpoint-mode", mode).start();
        let client = Peer::connect(proxy.address());
        client.send(b"request");
        let server = upstream.accept();
        server.receive(b"request");
        proxy.log_line("a warning that names what is missing", |line| {
            let text = line.to_string().to_lowercase();
            let is_told = line["level"] == "WARN" || line["level"] == "ERROR";
            is_told && (text.contains("kubeconfig") || text.contains("kubernetes"))
        });
        server.send(b"response");
        client.receive(b"response");
        assert_eq!(proxy.get("/readyz").status, 200);
    }
}

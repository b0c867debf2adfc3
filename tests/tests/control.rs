//! The admin socket and the verb `connections` from the outside.

use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::Path;

use proxy_tests::peers::Peer;
use proxy_tests::proxy::{Launch, Outcome, Proxy, run};
use proxy_tests::servers::Upstream;
use proxy_tests::wait::until;
use tempfile::TempDir;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

fn start(upstream: &Upstream, socket: &Path) -> Proxy {
    Launch::new(upstream.address()).flag("admin-socket", socket.display()).start()
}

fn connections(socket: &Path, arguments: &[&str]) -> Outcome {
    let socket = format!("--admin-socket={}", socket.display());
    run(&[&["connections"], arguments, &[&socket]].concat())
}

#[test]
fn a_running_proxy_answers_and_takes_its_socket_away_at_the_end() {
    let folder = folder();
    let socket = folder.path().join("run/admin.sock");
    let upstream = Upstream::new(LOOPBACK);
    let mut proxy = start(&upstream, &socket);
    proxy.log_line("admin socket", |line| line["message"] == "admin socket listening");
    let file = std::fs::metadata(&socket).expect("there");
    assert!(file.file_type().is_socket());
    assert_eq!(file.permissions().mode() & 0o777, 0o600);

    let table = connections(&socket, &["list"]);
    assert_eq!(table.code, Some(0), "{table:?}");
    assert!(table.stdout.starts_with("ID ") && table.stderr.is_empty(), "{table:?}");
    let json = connections(&socket, &["list", "--output=json"]);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).expect("JSON");
    assert!(json["connections"].is_array(), "{json}");

    let unknown = connections(&socket, &["kill", "no-such-id"]);
    assert_eq!(unknown.code, Some(1), "{unknown:?}");
    assert_eq!(unknown.stderr.lines().count(), 1, "{unknown:?}");
    assert!(unknown.stderr.contains("no-such-id"), "{unknown:?}");
    assert_eq!(connections(&socket, &["kill", "--client=192.0.2.1"]).code, Some(1));
    assert_eq!(connections(&socket, &["kill", "--all"]).code, Some(0));

    proxy.sigterm();
    assert_eq!(proxy.exit_code(), Some(0));
    assert!(!socket.exists(), "the socket was left behind");
}

#[test]
fn where_nobody_answers_there_is_one_clear_error() {
    let folder = folder();
    let nothing = folder.path().join("nothing");
    let leftover = folder.path().join("leftover");
    drop(UnixListener::bind(&leftover).expect("binds"));
    for socket in [nothing, leftover] {
        for verb in [&["list"][..], &["kill", "1"]] {
            let outcome = connections(&socket, verb);
            assert_eq!(outcome.code, Some(1), "{outcome:?}");
            assert!(outcome.stdout.is_empty(), "{outcome:?}");
            assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
            assert!(outcome.stderr.contains("no proxy answers"), "{outcome:?}");
            assert!(outcome.stderr.contains(&socket.display().to_string()), "{outcome:?}");
        }
    }
}

#[test]
fn wrong_arguments_are_mistakes() {
    for arguments in [
        &["connections"][..],
        &["connections", "kill"],
        &["connections", "kill", "1", "--all"],
        &["connections", "kill", "--client=nobody"],
        &["connections", "list", "--output=xml"],
        &["cleanup", "stray"],
    ] {
        let outcome = run(arguments);
        assert_eq!(outcome.code, Some(2), "{arguments:?}: {outcome:?}");
        assert!(outcome.stdout.is_empty(), "{arguments:?}: {outcome:?}");
    }
}

#[test]
fn the_socket_of_one_that_was_killed_is_replaced() {
    let folder = folder();
    let socket = folder.path().join("admin.sock");
    let upstream = Upstream::new(LOOPBACK);
    // Dropping it is SIGKILL.
    drop(start(&upstream, &socket));
    assert!(socket.exists(), "it was not left behind: this test shows nothing");
    let _proxy = start(&upstream, &socket);
    assert_eq!(connections(&socket, &["list"]).code, Some(0));
}

/// Neither is a reason not to relay.
#[test]
fn a_socket_that_cannot_be_had_costs_a_line_and_no_client() {
    let folder = folder();
    let socket = folder.path().join("admin.sock");
    let upstream = Upstream::new(LOOPBACK);
    let first = start(&upstream, &socket);
    let nowhere = Path::new("/proc/nowhere/admin.sock");
    for (path, level) in [(&*socket, "WARN"), (nowhere, "INFO")] {
        let proxy = start(&upstream, path);
        let line = proxy.log_line("no admin socket", |line| line["message"] == "no admin socket");
        assert_eq!(line["level"], level, "{line}");
        assert_eq!(line["path"], path.display().to_string(), "{line}");
        let client = Peer::connect(proxy.address());
        client.send(b"request");
        upstream.accept().receive(b"request");
    }
    assert_eq!(connections(&socket, &["list"]).code, Some(0), "the first one lost its socket");
    drop(first);
}

/// An upgrade: the successor is there before its predecessor has gone.
#[test]
fn a_successor_takes_the_socket_when_its_predecessor_ends() {
    let folder = folder();
    let socket = folder.path().join("admin.sock");
    let upstream = Upstream::new(LOOPBACK);
    let mut first = start(&upstream, &socket);
    let mut second = start(&upstream, &socket);
    let mut third = start(&upstream, &socket);
    for waiting in [&second, &third] {
        let line = waiting.log_line("no admin socket", |line| line["message"] == "no admin socket");
        let error = line["error"].as_str().unwrap_or_default();
        assert!(error.starts_with("another process serves it"), "{line}");
    }
    let taken = |proxy: &Proxy| {
        let message = "admin socket listening: who served it has ended";
        proxy.count_lines(|line| line["message"] == message)
    };

    // In order, which takes the name away.
    first.sigterm();
    assert_eq!(first.exit_code(), Some(0));
    until("one of the two has the socket", || taken(&second) + taken(&third) > 0);
    assert_eq!(connections(&socket, &["list"]).code, Some(0));
    if taken(&third) > 0 {
        std::mem::swap(&mut second, &mut third);
    }
    assert_eq!((taken(&second), taken(&third)), (1, 0));
    // And by force, which leaves it behind.
    second.kill9();
    until("the last one has the socket", || taken(&third) > 0);
    assert_eq!(connections(&socket, &["list"]).code, Some(0));
    third.sigterm();
    assert_eq!(third.exit_code(), Some(0));
    assert!(!socket.exists(), "the socket was left behind");
}

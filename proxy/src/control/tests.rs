//! The protocol, spoken over a real socket.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream as Std;
use std::path::Path;
use std::sync::Mutex;

use serde_json::{Value, json};

use super::*;

/// Two connections until they are killed.
struct Two(Mutex<Vec<Row>>);

impl Two {
    fn new() -> Self {
        let row = |id: &str, client: &str| Row {
            id: id.into(),
            client: client.parse().expect("an address"),
            upstream: "198.51.100.1:6443".parse().expect("an address"),
            engine: "splice",
            age_seconds: 1.5,
            idle_seconds: 0.5,
            bytes_up: 1,
            bytes_down: 2,
        };
        Self(Mutex::new(vec![row("a", "[::ffff:192.0.2.1]:5"), row("b", "192.0.2.1:6")]))
    }
}

impl Connections for Two {
    fn list(&self) -> Vec<Row> {
        self.0.lock().expect("no panic").clone()
    }

    fn kill(&self, which: &Which) -> usize {
        let mut rows = self.0.lock().expect("no panic");
        let before = rows.len();
        rows.retain(|row| !which.covers(&row.id, row.client));
        before - rows.len()
    }
}

/// Serves two connections at a path of its own while `talk` runs beside.
fn with_server(talk: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("admin.sock");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let held = start(&path, Arc::new(Two::new()), runtime.handle());
    assert!(held.get().is_some(), "it was not bound");
    talk(&path);
}

fn ask(path: &Path, request: &str) -> Vec<Value> {
    let mut stream = Std::connect(path).expect("connects");
    stream.write_all(request.as_bytes()).expect("writes");
    stream.write_all(b"\n").expect("writes");
    let mut answer = Vec::new();
    for line in BufReader::new(stream).lines() {
        answer.push(serde_json::from_str(&line.expect("reads")).expect("JSON"));
        let last: &Value = answer.last().expect("just pushed");
        if last.get("count").is_some() || last.get("error").is_some() {
            return answer;
        }
    }
    panic!("the answer to {request} broke off: {answer:?}");
}

#[test]
fn connections_are_listed_and_killed() {
    with_server(|path| {
        let rows = ask(path, r#"{"verb":"list"}"#);
        assert_eq!(rows.len(), 3, "{rows:?}");
        assert_eq!(rows[2], json!({"count": 2}));
        assert_eq!(rows[1]["id"], "b");
        assert_eq!(rows[1]["client"], "192.0.2.1:6");
        assert_eq!(rows[1]["engine"], "splice");
        let killed = |request: &str| ask(path, request).remove(0)["count"].clone();
        assert_eq!(killed(r#"{"verb":"kill","ids":["c"]}"#), 0);
        assert_eq!(killed(r#"{"verb":"kill","client":"192.0.2.2"}"#), 0);
        assert_eq!(killed(r#"{"verb":"kill","all":false}"#), 0);
        assert_eq!(killed(r#"{"verb":"kill","client":"192.0.2.1:5"}"#), 1);
        assert_eq!(killed(r#"{"verb":"kill","ids":["a","b"]}"#), 1);
        assert_eq!(ask(path, r#"{"verb":"list"}"#), [json!({"count": 0})]);
    });
}

#[test]
fn whatever_is_not_understood_ends_nothing() {
    with_server(|path| {
        for wrong in [
            "",
            "list",
            "{}",
            r#"{"verb":"kill"}"#,
            r#"{"verb":"kill","ids":"a"}"#,
            r#"{"verb":"kill","client":"nowhere"}"#,
            r#"{"verb":"burn"}"#,
        ] {
            let answer = ask(path, wrong);
            assert!(answer[0]["error"].is_string(), "{wrong:?} gave {answer:?}");
        }
        assert_eq!(ask(path, r#"{"verb":"kill","all":true}"#), [json!({"count": 2})]);
    });
}

#[test]
fn one_connection_may_ask_several_times() {
    with_server(|path| {
        let mut stream = BufReader::new(Std::connect(path).expect("connects"));
        for _ in 0..3 {
            stream.get_mut().write_all(b"{\"verb\":\"kill\",\"ids\":[]}\n").expect("writes");
            let mut line = String::new();
            stream.read_line(&mut line).expect("reads");
            assert_eq!(line, "{\"count\":0}\n");
        }
    });
}

#[test]
fn a_request_without_end_is_cut_off() {
    with_server(|path| {
        let mut stream = Std::connect(path).expect("connects");
        // It may close before it has all of it.
        let _ = stream.write_all(&vec![b'x'; 2 * REQUEST as usize]);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.len() < 1000, "{answer:?}");
        assert_eq!(ask(path, r#"{"verb":"list"}"#).len(), 3, "others are served");
    });
}

#[test]
fn those_beyond_the_limit_are_closed_at_once() {
    with_server(|path| {
        let speak = |stream: &mut BufReader<Std>| {
            let mut line = String::new();
            let asked = stream.get_mut().write_all(b"{\"verb\":\"kill\",\"ids\":[]}\n");
            asked.and_then(|()| stream.read_line(&mut line)).is_ok_and(|read| read > 0)
        };
        let connect = || BufReader::new(Std::connect(path).expect("connects"));
        let mut served: Vec<_> = (0..CLIENTS).map(|_| connect()).collect();
        assert!(served.iter_mut().all(speak));
        assert!(!speak(&mut connect()), "one more than {CLIENTS} was served");
    });
}

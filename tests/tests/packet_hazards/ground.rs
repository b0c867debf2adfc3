//! A proxy with engine `packet` between hosts, and connections that it has switched.

use std::net::SocketAddr;
use std::sync::Arc;

use proxy_tests::facts::{self, State};
use proxy_tests::netns::Host;
use proxy_tests::peers::Peer;
use proxy_tests::proxy::{Launch, Outcome, Proxy, run};
use proxy_tests::row::{Family, Row};
use proxy_tests::servers::Upstream;
use proxy_tests::stream::Stream;
use proxy_tests::wait::{until, until_or};
use serde_json::Value;
use tempfile::TempDir;

/// Makes each of the tests once per family.
macro_rules! both_families {
    ($($test:ident),* $(,)?) => {
        mod v4 {
            $(#[test] fn $test() { super::$test(proxy_tests::row::Family::V4); })*
        }
        mod v6 {
            $(#[test] fn $test() { super::$test(proxy_tests::row::Family::V6); })*
        }
    };
}
pub(crate) use both_families;

/// The hosts, the proxy, and a server.
pub struct Ground {
    pub family: Family,
    pub row: Row,
    pub proxy: Proxy,
    pub upstream: Upstream,
    folder: TempDir,
}

/// A connection without any socket on the node.
pub struct Switched {
    pub client: Peer,
    pub server: Peer,
    /// Client and our address as it knows it.
    pub front: [SocketAddr; 2],
    /// Server and our address as it knows it.
    pub back: [SocketAddr; 2],
}

impl Ground {
    #[track_caller]
    pub fn new(family: Family) -> Self {
        Self::with(Row::new(), family, &[])
    }

    /// On these hosts, and with these flags (`name`, `value`).
    #[track_caller]
    pub fn with(row: Row, family: Family, flags: &[(&str, &str)]) -> Self {
        let ip = row.back(family);
        let upstream = row.server.run(move || Upstream::new(ip));
        Self::in_front_of(row, family, upstream, flags)
    }

    /// The server need not be next to the node.
    #[track_caller]
    pub fn in_front_of(
        row: Row,
        family: Family,
        upstream: Upstream,
        flags: &[(&str, &str)],
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut launch = Launch::new(upstream.address())
            .flag("engine", "packet")
            .flag("bpffs", "off")
            .flag("listen-addr", "[::]:0")
            // The machine may be busy with something else.
            .flag("packet-max-rtt", "10s")
            .flag("admin-socket", folder.path().join("admin.sock").display());
        for (name, value) in flags {
            launch = launch.flag(name, value);
        }
        let proxy = launch.on(&row.node).start();
        Self { family, row, proxy, upstream, folder }
    }

    /// Where clients reach the proxy.
    pub fn front(&self) -> SocketAddr {
        SocketAddr::new(self.row.front(self.family), self.proxy.address().port())
    }

    /// A connection, established at both ends, in whatever state at the proxy.
    #[track_caller]
    pub fn pair(&self) -> (Peer, Peer) {
        let front = self.front();
        let client = self.row.client.run(move || Peer::connect(front));
        (client, self.upstream.accept())
    }

    /// A connection that the kernel relays, the only one so far.
    #[track_caller]
    pub fn switched(&self) -> Switched {
        let (client, server) = self.pair();
        self.await_switched(1);
        let here = self.upstream.address();
        let sockets = facts::sockets(&self.row.server);
        let ours: Vec<_> = sockets
            .iter()
            .filter(|socket| socket.local == here && socket.state == State::Established)
            .collect();
        let [socket] = ours[..] else { panic!("one connection, not {ours:?}") };
        Switched {
            front: [client.address(), self.front()],
            back: [here, socket.remote],
            client,
            server,
        }
    }

    /// Waits until the kernel relays `count` connections, and no socket of any is left.
    #[track_caller]
    pub fn await_switched(&self, count: u32) {
        let relayed = || self.proxy.metric(RELAYING, &[("engine", "packet")]);
        // What it gives up with must say why.
        let reasons = || self.samples("packet_ineligible_total").join("; ");
        until_or(
            &format!("{count} connections are relayed by the kernel"),
            || relayed() == f64::from(count),
            || format!("but {:?}; those that stay: [{}]", relayed().abs(), reasons()),
        );
        until("the node has no sockets", || facts::connections(&self.row.node) == 0);
    }

    /// What counters of odd segments say.
    #[track_caller]
    pub fn odd_segments(&self, what: &str) -> f64 {
        self.proxy.metric("packet_segments_total", &[("what", what)])
    }

    /// The samples of a metric that are not zero, as they are served.
    #[track_caller]
    fn samples(&self, name: &str) -> Vec<String> {
        let all = self.proxy.get("/metrics").body;
        let lines = all.lines().filter(|line| line.contains(name) && !line.starts_with('#'));
        lines.filter(|line| !line.ends_with(" 0")).map(str::to_owned).collect()
    }

    /// Connections by the admin socket.
    #[track_caller]
    pub fn list(&self) -> Vec<Value> {
        let outcome = self.connections(&["list", "--output=json"]);
        let json: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
        json["connections"].as_array().expect("an array").clone()
    }

    /// The verb `connections`.
    #[track_caller]
    pub fn connections(&self, arguments: &[&str]) -> Outcome {
        let socket = format!("--admin-socket={}", self.folder.path().join("admin.sock").display());
        let outcome = run(&[&["connections"], arguments, &[&socket]].concat());
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        outcome
    }

    pub fn node(&self) -> &Arc<Host> {
        &self.row.node
    }
}

pub const RELAYING: &str = "connections_relaying";

/// Bytes both ways at once, as streams that go on from call to call.
pub struct Traffic {
    sent: [Stream; 2],
    received: [Stream; 2],
}

impl Traffic {
    pub fn new() -> Self {
        let streams = [Stream::new(1), Stream::new(2)];
        Self { sent: streams.clone(), received: streams }
    }

    /// Bytes each way so far.
    pub fn bytes(&self) -> u64 {
        self.received[0].position()
    }

    /// `len` more bytes each way.
    #[track_caller]
    pub fn pass(&mut self, connection: &Switched, len: u64) {
        let [up, down] = &mut self.sent;
        let [up_there, down_there] = &mut self.received;
        let (client, server) = (&connection.client, &connection.server);
        std::thread::scope(|threads| {
            threads.spawn(|| send(client, up, len));
            threads.spawn(|| send(server, down, len));
            threads.spawn(|| server.receive_next(up_there, len));
            threads.spawn(|| client.receive_next(down_there, len));
        });
    }
}

/// `len` more bytes of the stream.
pub fn send(peer: &Peer, stream: &mut Stream, len: u64) {
    let end = stream.position() + len;
    let mut buffer = [0; 32 * 1024];
    while stream.position() < end {
        let left = usize::try_from(end - stream.position()).unwrap_or(usize::MAX);
        let chunk = &mut buffer[..left.min(32 * 1024)];
        stream.fill(chunk);
        peer.send(chunk);
    }
}

impl Switched {
    /// Both directions end in order.
    #[track_caller]
    pub fn close(self) {
        self.client.finish();
        self.server.expect_eof();
        self.server.finish();
        self.client.expect_eof();
    }
}

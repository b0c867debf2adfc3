//! What a proxy and its node hold: sockets, entries of maps, of conntrack, ports.

use std::net::SocketAddr;
use std::time::Duration;

use proxy_tests::facts;
use proxy_tests::maps;
use proxy_tests::netns::Host;
use proxy_tests::proxy::{Launch, Proxy, binary};
use proxy_tests::row::Row;
use proxy_tests::wait::within;
use tempfile::TempDir;

pub const RELAYING: &str = "connections_relaying";

/// The hosts, and a proxy with engine `packet` on the middle one.
pub struct Node {
    pub row: Row,
    pub proxy: Proxy,
    folder: TempDir,
}

/// What connections leave behind, if anything does.
#[derive(Debug, PartialEq, Eq)]
pub struct Traces {
    /// Tuples that lead to connections.
    flows: usize,
    /// Records in use.
    records: usize,
    /// Entries of conntrack.
    tracked: usize,
    /// Sockets on the node.
    pub sockets: u64,
}

impl Traces {
    /// At the start there may be some that come and go with it.
    fn are_no_more_than(&self, start: &Self) -> bool {
        self.flows <= start.flows
            && self.records <= start.records
            && self.tracked <= start.tracked
            && self.sockets <= start.sockets
    }
}

impl Node {
    /// The proxy in front of `upstream`; its node has conntrack at work, which forgets what has
    /// ended at once.
    #[track_caller]
    pub fn new(row: Row, upstream: SocketAddr, max_connections: usize) -> Self {
        let chain = "{ type filter hook prerouting priority 0; }";
        for command in [
            "add table inet scale".to_owned(),
            format!("add chain inet scale arrive {chain}"),
            "add rule inet scale arrive ct state established accept".to_owned(),
        ] {
            row.node.output("nft", &[&command]);
        }
        for state in ["close", "close_wait", "fin_wait", "last_ack", "time_wait"] {
            row.node.sysctl(&format!("netfilter.nf_conntrack_tcp_timeout_{state}"), "1");
        }
        let folder = tempfile::tempdir().expect("a folder");
        let proxy = Launch::new(upstream)
            .flag("engine", "packet")
            .flag("listen-addr", "[::]:0")
            // The machine may be busy with something else, above all with this.
            .flag("packet-max-rtt", "5s")
            .flag("max-connections", max_connections)
            .flag("admin-socket", folder.path().join("admin.sock").display())
            .on(&row.node)
            .start();
        Self { row, proxy, folder }
    }

    pub fn host(&self) -> &Host {
        &self.row.node
    }

    /// Waits until the kernel relays `count` connections.
    #[track_caller]
    pub fn await_switched(&self, count: usize) {
        self.proxy.await_metric(RELAYING, &[("engine", "packet")], count as f64);
        self.proxy.await_metric(RELAYING, &[], count as f64);
    }

    /// The verb `connections`.
    #[track_caller]
    pub fn connections(&self, arguments: &[&str]) -> String {
        let socket = format!("--admin-socket={}", self.folder.path().join("admin.sock").display());
        let all = [&["connections", socket.as_str()], arguments].concat();
        self.host().output(&binary().display().to_string(), &all)
    }

    /// What there is now.
    #[track_caller]
    pub fn traces(&self) -> Traces {
        let process = self.proxy.process();
        // A record begins with its phase, which is zero as long as it is nobody's.
        let is_used = |record: &Vec<u8>| record[..4] != [0; 4];
        Traces {
            flows: maps::named(process, "FLOWS").values().len(),
            records: maps::named(process, "RECORDS").values().iter().filter(|r| is_used(r)).count(),
            tracked: facts::tracked(self.host()),
            sockets: facts::sockstat(self.host()).used,
        }
    }

    /// Waits until there is no more than at the `start`.
    #[track_caller]
    pub fn await_traces(&self, start: &Traces, bound: Duration) {
        let mut shown = String::new();
        within(bound, "all is as it was", || {
            let now = self.traces();
            let text = format!("{now:?}");
            if text != shown {
                println!("{text}");
                shown = text;
            }
            if now.are_no_more_than(start) {
                return Some(());
            }
            // Asking is work for the proxy's host, too.
            std::thread::sleep(Duration::from_millis(200));
            None
        });
    }

    /// Ports that nobody gets on the node by chance.
    pub fn reserved_ports(row: &Row) -> String {
        row.node.output("cat", &["/proc/sys/net/ipv4/ip_local_reserved_ports"]).trim().to_owned()
    }
}

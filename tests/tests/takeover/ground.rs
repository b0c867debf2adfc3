//! Three hosts, the middle one with a bpffs of its own, and proxies on it one after the other.

use std::net::SocketAddr;
use std::path::PathBuf;

use proxy_tests::facts;
use proxy_tests::peers::Peer;
use proxy_tests::proxy::{Launch, Proxy, binary};
use proxy_tests::row::{Family, Row};
use proxy_tests::servers::Upstream;
use serde_json::Value;
use tempfile::TempDir;

/// How the proxy attaches its programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Tcx,
    Clsact,
}

/// Where a test takes place.
#[derive(Debug)]
pub struct Ground {
    pub row: Row,
    pub family: Family,
    way: Way,
    pub upstream: Upstream,
    folder: TempDir,
    port: u16,
}

/// A connection's two ends.
#[derive(Debug)]
pub struct Pair {
    pub client: Peer,
    pub server: Peer,
}

impl Pair {
    /// A message each way.
    #[track_caller]
    pub fn talk(&self) {
        self.client.send(b"a question");
        self.server.receive(b"a question");
        self.server.send(b"an answer");
        self.client.receive(b"an answer");
    }

    /// Both ends say that this is all, the client first.
    #[track_caller]
    pub fn close(&self) {
        self.client.finish();
        self.server.expect_eof();
        self.server.finish();
        self.client.expect_eof();
    }

    /// Both ends were cut off.
    #[track_caller]
    pub fn expect_reset(&self) {
        self.client.expect_reset();
        self.server.expect_reset();
    }
}

/// Bytes of a [`Pair::talk`], up and down.
pub const TALK: (u64, u64) = (10, 9);

impl Ground {
    #[track_caller]
    pub fn new(family: Family, way: Way) -> Self {
        if way == Way::Tcx {
            // Where it is not there, the same with filters.
            let _ = facts::has_tcx();
        }
        let row = Row::new();
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("bpf")).expect("a folder in it");
        row.node.mount_own(&folder.path().join("bpf"));
        let back = row.back(family);
        let upstream = row.server.run(move || Upstream::new(back));
        // Not one that the kernel chooses: the next process needs the same.
        Self { row, family, way, upstream, folder, port: 6443 }
    }

    /// The proxy's `--bpffs`.
    pub fn bpffs(&self) -> PathBuf {
        self.folder.path().join("bpf/proxy")
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("admin.sock")
    }

    /// A proxy, not started yet.
    pub fn launch(&self) -> Launch {
        let way = match self.way {
            Way::Tcx => "best",
            Way::Clsact => "clsact",
        };
        Launch::new(self.upstream.address())
            .on(&self.row.node)
            .flag("engine", "packet")
            .flag("bpffs", self.bpffs().display())
            .flag("packet-attach", way)
            .flag("packet-max-rtt", "1s")
            .flag("listen-addr", format!(":{}", self.port))
            .flag("admin-socket", self.socket().display())
    }

    /// Where clients reach the proxy.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.row.front(self.family), self.port)
    }

    /// A connection through the proxy.
    #[track_caller]
    pub fn pair(&self) -> Pair {
        let to = self.address();
        let client = self.row.client.run(move || Peer::connect(to));
        Pair { client, server: self.upstream.accept() }
    }

    /// So many connections through the proxy, all of which the kernel relays; each has seen one
    /// [`Pair::talk`].
    #[track_caller]
    pub fn switched(&self, proxy: &Proxy, count: usize) -> Vec<Pair> {
        let before = relayed_by_kernel(proxy);
        let pairs: Vec<Pair> = (0..count).map(|_| self.pair()).collect();
        pairs.iter().for_each(Pair::talk);
        await_relayed_by_kernel(proxy, before + count as f64);
        pairs
    }

    /// `connections ARGUMENTS`, on the node.
    #[track_caller]
    pub fn connections(&self, arguments: &[&str]) -> String {
        let socket = format!("--admin-socket={}", self.socket().display());
        let all = [&["connections", socket.as_str()], arguments].concat();
        self.row.node.output(&binary().display().to_string(), &all)
    }

    /// Rows of `connections list`.
    #[track_caller]
    pub fn list(&self) -> Vec<Value> {
        let text = self.connections(&["list", "--output=json"]);
        let parsed: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
        let rows = parsed.as_array().or_else(|| parsed["connections"].as_array());
        rows.unwrap_or_else(|| panic!("no rows in {text}")).clone()
    }

    /// `cleanup`, on the node: exit status, stdout, stderr.
    #[track_caller]
    pub fn cleanup(&self) -> (Option<i32>, String, String) {
        let bpffs = format!("--bpffs={}", self.bpffs().display());
        let run = move || std::process::Command::new(binary()).args(["cleanup", &bpffs]).output();
        let output = self.row.node.run(run).expect("runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    /// All that the proxy may leave on the node, as text.
    #[track_caller]
    pub fn traces(&self) -> String {
        let bpffs = self.folder.path().join("bpf");
        let tcx = self.row.node.run(|| -> String {
            // More numbers than the node has devices.
            (1..64).map(|index| format!("{index}: {:?}\n", tcx_programs(index))).collect()
        });
        let shell = "tc qdisc show
             for device in $(ip -o link | cut -d: -f2 | cut -d@ -f1); do
                 tc filter show dev $device ingress 2>/dev/null
                 tc filter show dev $device egress 2>/dev/null
             done
             cat /proc/sys/net/ipv4/ip_local_reserved_ports
             ls -R \"$0\"; ls /run/steward-tcp-proxy 2>/dev/null; true";
        let shown = self.row.node.output("sh", &["-c", shell, &bpffs.display().to_string()]);
        format!("{tcx}{shown}")
    }
}

/// Programs on the TCX hooks of a device, by number: ingress, egress. (No command shows them.)
fn tcx_programs(index: u32) -> [Vec<u32>; 2] {
    const PROG_QUERY: i32 = 16;
    [46_u32, 47].map(|hook| {
        let mut ids = [0_u32; 64];
        // `query` in union bpf_attr: device, hook, two flags, then a pointer and its count.
        let mut query = [0_u64; 8];
        query[0] = u64::from(index) | u64::from(hook) << 32;
        query[2] = ids.as_mut_ptr() as u64;
        query[3] = ids.len() as u64;
        // SAFETY: the kernel writes at most as many numbers as there is room for, and reads and
        // writes no more of `query` than its size.
        let status = unsafe {
            libc::syscall(libc::SYS_bpf, PROG_QUERY, query.as_mut_ptr(), size_of_val(&query))
        };
        let count = if status == 0 { query[3] as u32 as usize } else { 0 };
        ids[..count.min(64)].to_vec()
    })
}

pub fn relayed_by_kernel(proxy: &Proxy) -> f64 {
    proxy.metric("connections_relaying", &[("engine", "packet")])
}

#[track_caller]
pub fn await_relayed_by_kernel(proxy: &Proxy, count: f64) {
    proxy.await_metric("connections_relaying", &[("engine", "packet")], count);
}

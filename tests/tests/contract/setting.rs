//! What a test of the contract starts from: an engine, a family, and the ground they are on.

use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use proxy_tests::netns::Host;
use proxy_tests::peers::{Peer, backlog_bound};
use proxy_tests::proxy::{Launch, Proxy};
use proxy_tests::row::{Family, Row};
use proxy_tests::servers::{Blackhole, ClosedPort, Upstream};

/// Makes each of the tests once per setting, such as
/// `splice_v4::one_byte_at_a_time_both_ways`.
macro_rules! contract {
    ({ $($name:ident: $setting:expr;)* } $tests:tt) => {
        $(contract!(@module $name, $setting, $tests);)*
    };
    (@module $name:ident, $setting:expr, { $($topic:ident::$test:ident,)* }) => {
        mod $name {
            #[allow(unused_imports, reason = "which of them depends on the setting")]
            use proxy_tests::row::Family::{V4, V6};
            use crate::setting::Setting;
            $(
                #[test]
                fn $test() {
                    crate::$topic::$test(&$setting);
                }
            )*
        }
    };
}

/// One engine, one family, and where the client, the proxy and the servers are.
#[derive(Debug, Clone)]
pub struct Setting {
    pub engine: &'static str,
    /// Flags for every proxy of this setting, such as `name=value`.
    flags: &'static [(&'static str, &'static str)],
    /// Where the proxy listens.
    listen: IpAddr,
    /// Where clients reach it.
    front: IpAddr,
    /// Where servers are.
    back: IpAddr,
    client: Place,
    node: Place,
    server: Place,
    // The hosts and wires between them, if they are not this one.
    row: Option<Arc<Row>>,
}

/// A host; none is the one that this test runs on.
type Place = Option<Arc<Host>>;

/// Runs `job` there.
#[track_caller]
fn at_place<T: Send + 'static>(place: &Place, job: impl FnOnce() -> T + Send + 'static) -> T {
    match place {
        Some(host) => host.run(job),
        None => job(),
    }
}

/// A proxy with one connection through it.
#[derive(Debug)]
pub struct Relayed {
    pub proxy: Proxy,
    pub upstream: Upstream,
    pub client: Peer,
    pub server: Peer,
}

impl Setting {
    /// Client, proxy and server on the loopback device of one host.
    #[allow(dead_code, reason = "the suite over wires does without")]
    pub fn on_loopback(engine: &'static str, family: Family) -> Self {
        let ip: IpAddr = match family {
            Family::V4 => [127, 0, 0, 1].into(),
            Family::V6 => std::net::Ipv6Addr::LOCALHOST.into(),
        };
        Self {
            engine,
            flags: &[],
            listen: ip,
            front: ip,
            back: ip,
            client: None,
            node: None,
            server: None,
            row: None,
        }
    }

    /// Client, proxy and server on hosts of their own; the proxy listens on every address.
    #[allow(dead_code, reason = "the suite over loopback does without")]
    pub fn over_wires(engine: &'static str, family: Family) -> Self {
        let row = Arc::new(Row::new());
        Self {
            engine,
            // However slow the machine: how far away peers are is no matter of the contract.
            flags: if engine == "packet" { &[("packet-max-rtt", "1s")] } else { &[] },
            listen: std::net::Ipv6Addr::UNSPECIFIED.into(),
            front: row.front(family),
            back: row.back(family),
            client: Some(Arc::clone(&row.client)),
            node: Some(Arc::clone(&row.node)),
            server: Some(Arc::clone(&row.server)),
            row: Some(row),
        }
    }

    /// Starts every proxy of this setting with these flags, too.
    #[allow(dead_code, reason = "no engine needs any so far")]
    pub fn with(mut self, flags: &'static [(&'static str, &'static str)]) -> Self {
        self.flags = flags;
        self
    }

    /// The same on hosts where a stalled connection holds well under 1 MiB of kernel memory: with
    /// the usual limits, hundreds of them would use up the TCP memory of the whole machine, and
    /// what then slows down is the kernel.
    pub fn frugal(&self) -> Self {
        let mut frugal = self.clone();
        if frugal.row.is_none() {
            let host = Some(Arc::new(Host::new("frugal")));
            (frugal.client, frugal.node, frugal.server) = (host.clone(), host.clone(), host);
        }
        for host in [&frugal.client, &frugal.node, &frugal.server].into_iter().flatten() {
            host.sysctl("ipv4.tcp_rmem", "4096 131072 196608");
            host.sysctl("ipv4.tcp_wmem", "4096 16384 196608");
        }
        frugal
    }

    /// [`backlog_bound`] where the proxy is.
    #[track_caller]
    pub fn backlog_bound(&self) -> u64 {
        at_place(&self.node, backlog_bound)
    }

    /// A proxy in front of `upstream`, not started yet.
    pub fn launch(&self, upstream: impl Display) -> Launch {
        let mut launch = Launch::new(upstream)
            .flag("engine", self.engine)
            .flag("listen-addr", SocketAddr::new(self.listen, 0));
        for (name, value) in self.flags {
            launch = launch.flag(name, value);
        }
        match &self.node {
            Some(host) => launch.on(host),
            None => launch,
        }
    }

    /// A server.
    #[track_caller]
    pub fn upstream(&self) -> Upstream {
        let ip = self.back;
        self.on_server(move || Upstream::new(ip))
    }

    /// A server's address at which nobody listens.
    #[track_caller]
    pub fn closed_port(&self) -> ClosedPort {
        let ip = self.back;
        self.on_server(move || ClosedPort::new(ip))
    }

    /// A server that answers nothing.
    #[track_caller]
    pub fn blackhole(&self) -> Blackhole {
        let ip = self.back;
        self.on_server(move || Blackhole::new(ip))
    }

    /// Stops `upstream`; its address stays taken.
    #[track_caller]
    pub fn close(&self, upstream: Upstream) -> ClosedPort {
        self.on_server(move || upstream.close())
    }

    #[track_caller]
    fn on_server<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        at_place(&self.server, job)
    }

    /// Where clients reach `proxy`.
    pub fn address(&self, proxy: &Proxy) -> SocketAddr {
        SocketAddr::new(self.front, proxy.address().port())
    }

    /// A client of `proxy`.
    #[track_caller]
    pub fn connect(&self, proxy: &Proxy) -> Peer {
        let to = self.address(proxy);
        at_place(&self.client, move || Peer::connect(to))
    }

    /// One more connection through `proxy`, established at both ends.
    #[track_caller]
    pub fn pair(&self, proxy: &Proxy, upstream: &Upstream) -> (Peer, Peer) {
        let client = self.connect(proxy);
        (client, upstream.accept())
    }

    /// A proxy in front of one server.
    #[track_caller]
    pub fn start(&self) -> (Proxy, Upstream) {
        let upstream = self.upstream();
        (self.launch(upstream.address()).start(), upstream)
    }

    /// A connection through a proxy of its own, established at both ends.
    #[track_caller]
    pub fn relayed(&self) -> Relayed {
        let (proxy, upstream) = self.start();
        let (client, server) = self.pair(&proxy, &upstream);
        Relayed { proxy, upstream, client, server }
    }
}

/// Which end a test lets misbehave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Client,
    Server,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::Client, Self::Server];

    /// The reason in log and metrics when this side sends RST.
    pub fn reset(self) -> &'static str {
        match self {
            Self::Client => "client_reset",
            Self::Server => "server_reset",
        }
    }

    /// The reason when both directions ended, this side's first.
    pub fn closed(self) -> &'static str {
        match self {
            Self::Client => "client_closed",
            Self::Server => "server_closed",
        }
    }
}

impl Relayed {
    /// The proxy, this side's peer, and the other one.
    pub fn seen_from(self, side: Side) -> (Proxy, Peer, Peer) {
        match side {
            Side::Client => (self.proxy, self.client, self.server),
            Side::Server => (self.proxy, self.server, self.client),
        }
    }
}

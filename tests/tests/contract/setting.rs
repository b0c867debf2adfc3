//! What a test of the contract starts from.

use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};

use proxy_tests::peers::Peer;
use proxy_tests::proxy::{Launch, Proxy};
use proxy_tests::servers::Upstream;

/// One engine, one family.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    pub engine: &'static str,
    pub ip: IpAddr,
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
    pub fn new(engine: &'static str, ip: &str) -> Self {
        Self { engine, ip: ip.parse().expect("an address") }
    }

    /// A proxy in front of `upstream`, not started yet.
    pub fn launch(self, upstream: impl Display) -> Launch {
        Launch::new(upstream)
            .flag("engine", self.engine)
            .flag("listen-addr", SocketAddr::new(self.ip, 0))
    }

    /// A proxy in front of one server.
    #[track_caller]
    pub fn start(self) -> (Proxy, Upstream) {
        let upstream = Upstream::new(self.ip);
        (self.launch(upstream.address()).start(), upstream)
    }

    /// A connection through a proxy of its own, established at both ends.
    #[track_caller]
    pub fn relayed(self) -> Relayed {
        let (proxy, upstream) = self.start();
        let (client, server) = connect(&proxy, &upstream);
        Relayed { proxy, upstream, client, server }
    }
}

/// One more connection through `proxy`, established at both ends.
#[track_caller]
pub fn connect(proxy: &Proxy, upstream: &Upstream) -> (Peer, Peer) {
    let client = Peer::connect(proxy.address());
    (client, upstream.accept())
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

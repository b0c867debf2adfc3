//! Client, node and server in a row: three hosts and the two wires between them.

use std::net::IpAddr;
use std::sync::Arc;

use crate::lossy::{BadWire, Faults};
use crate::netns::{Host, Wire};

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The address of end 1 or 2 of `wire`.
    #[must_use]
    pub fn of(self, wire: Wire, end: u8) -> IpAddr {
        match self {
            Self::V4 => wire.v4(end),
            Self::V6 => wire.v6(end),
        }
    }
}

/// Three hosts. Nothing routes between the outer two: what passes, passed through the proxy.
#[derive(Debug)]
pub struct Row {
    /// Where clients are.
    pub client: Arc<Host>,
    /// Where the proxy is.
    pub node: Arc<Host>,
    /// Where servers are.
    pub server: Arc<Host>,
    /// From client (end 1) to node (end 2).
    pub before: Wire,
    /// From node (end 1) to server (end 2).
    pub behind: Wire,
    /// What makes the wires bad, if they are.
    pub faults: Vec<BadWire>,
}

impl Row {
    /// Over wires without faults.
    ///
    /// # Panics
    /// No root, or no `ip` command.
    #[track_caller]
    #[must_use]
    pub fn new() -> Self {
        let [client, node, server] = hosts();
        let (before, behind) = (client.join(&node, 1), node.join(&server, 2));
        Self { client, node, server, before, behind, faults: Vec::new() }
    }

    /// Over two wires with these faults each; what they do follows from `seed`.
    ///
    /// # Panics
    /// No root, no `ip` command, or no TAP devices.
    #[track_caller]
    #[must_use]
    pub fn over_bad_wires(faults: Faults, seed: u64) -> Self {
        let [client, node, server] = hosts();
        let before = BadWire::join(&client, &node, 1, faults, seed);
        let behind = BadWire::join(&node, &server, 2, faults, !seed);
        let (one, two) = (before.wire(), behind.wire());
        Self { client, node, server, before: one, behind: two, faults: vec![before, behind] }
    }

    /// Where clients reach a proxy that listens on every address.
    #[must_use]
    pub fn front(&self, family: Family) -> IpAddr {
        family.of(self.before, 2)
    }

    /// Where servers are.
    #[must_use]
    pub fn back(&self, family: Family) -> IpAddr {
        family.of(self.behind, 2)
    }
}

impl Default for Row {
    fn default() -> Self {
        Self::new()
    }
}

fn hosts() -> [Arc<Host>; 3] {
    ["client", "node", "server"].map(|name| Arc::new(Host::new(name)))
}

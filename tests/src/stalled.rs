//! Readers that stall, on connections that the kernel relays: what is on its way lies at the two
//! ends, and the node between them has nothing, for as long as it lasts.

use std::sync::Arc;

use crate::facts::{self, Sockstat};
use crate::maps;
use crate::netns::Host;
use crate::peers::{Ending, Peer, backlog_bound, fill_all};
use crate::process::Watched;
use crate::row::Row;
use crate::wait::until;

/// What the process may take for all of them together.
const MOST: u64 = 4 << 20;

/// Connections whose clients read nothing, and whose servers have sent what fits.
#[derive(Debug)]
pub struct Stalled {
    node: Arc<Host>,
    process: Watched,
    before: Sockstat,
    memory: u64,
    maps: u64,
    available: u64,
    pairs: Vec<(Peer, Peer)>,
    sent: Vec<u64>,
}

/// Makes the buffers of both ends small, for connections that are made later.
///
/// # Panics
/// The kernel refuses.
#[track_caller]
pub fn small_buffers(row: &Row) {
    for host in [&row.client, &row.server] {
        host.sysctl("ipv4.tcp_rmem", "4096 131072 196608");
        host.sysctl("ipv4.tcp_wmem", "4096 16384 196608");
    }
}

impl Stalled {
    /// The servers send to the clients whatever fits. `pairs` (client, server) are made with
    /// [`small_buffers`], and the kernel of `node` relays them; `process` is the proxy there, and
    /// `before` what sockets the node had without them.
    ///
    /// # Panics
    /// There is more room than the ends' buffers have.
    #[track_caller]
    #[must_use]
    pub fn new(
        node: &Arc<Host>,
        process: Watched,
        before: Sockstat,
        pairs: Vec<(Peer, Peer)>,
    ) -> Self {
        let (memory, maps) = (process.anonymous_memory(), maps_memory(process));
        let available = facts::available_memory();
        let servers: Vec<_> = pairs.iter().map(|(_, server)| server).collect();
        let sent = fill_all(&servers, 1, node.run(backlog_bound));
        assert!(sent.iter().all(|bytes| *bytes > 0 && *bytes < 2 << 20), "{sent:?}");
        Self { node: Arc::clone(node), process, before, memory, maps, available, pairs, sent }
    }

    /// Each byte lies at the ends, and the node has no socket and no more memory than before.
    ///
    /// # Panics
    /// That is not so.
    #[track_caller]
    pub fn look(&self) {
        // The ends probe each other, so that what they know may be a segment behind for a moment.
        for ((client, server), sent) in self.pairs.iter().zip(&self.sent) {
            until("all that was sent lies at the ends", || {
                client.unread() + server.unacknowledged() == *sent
            });
        }
        let (stat, before) = (facts::sockstat(&self.node), &self.before);
        assert_eq!(facts::connections(&self.node), 0);
        assert!(stat.in_use == before.in_use && stat.used <= before.used, "{stat:?}, {before:?}");
        assert!(maps_memory(self.process) <= self.maps, "maps grow");
        // Not of the program's file, which is shared with processes of other tests while they last.
        let grown = self.process.anonymous_memory().saturating_sub(self.memory);
        assert!(grown < MOST, "the proxy took {grown} bytes for {} readers", self.pairs.len());
    }

    /// Who reads again gets everything. Tells how much less memory the machine has, which shows it
    /// only roughly, since others use it as well.
    ///
    /// # Panics
    /// A byte is wrong, or missing.
    #[track_caller]
    pub fn end(self) {
        let less = self.available.saturating_sub(facts::available_memory());
        let bytes: u64 = self.sent.iter().sum();
        println!("{bytes} bytes lie at the ends; the machine has {less} less");
        for ((client, server), sent) in self.pairs.iter().zip(self.sent) {
            server.finish();
            assert_eq!(client.receive_until_end(1), (sent, Ending::Eof));
        }
    }
}

fn maps_memory(process: Watched) -> u64 {
    maps::of(process).values().sum()
}

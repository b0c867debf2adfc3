//! The engine, once it is there. Its self-test and loading its programs take up to some seconds on
//! a busy machine, another process may have it until it ends, and clients need not wait for any of
//! that.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::{Packet, lock};

/// Empty until the engine has started, and for ever if it cannot or may not. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Eventually(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    engine: OnceLock<Option<Arc<Packet>>>,
    /// Told before it was there, perhaps.
    translated: Mutex<HashSet<SocketAddr>>,
    /// The listeners, which the engine will have something to say to.
    listeners: Mutex<Vec<OwnedFd>>,
    /// Held while the host is changed for an engine that is not there yet.
    starting: Mutex<()>,
}

/// See [`Eventually::begin`].
#[derive(Debug)]
pub struct Starting<'a>(#[expect(dead_code, reason = "held")] MutexGuard<'a, ()>);

impl Eventually {
    /// The engine, if it is there.
    #[must_use]
    pub fn get(&self) -> Option<&Arc<Packet>> {
        self.0.engine.get()?.as_ref()
    }

    /// Keeps copies of the listeners for the engine, as long as that may come.
    pub fn keep_listeners(&self, listeners: Vec<OwnedFd>) {
        *lock(&self.0.listeners) = listeners;
    }

    /// The copy; `None` if no engine is wanted any more.
    pub fn take_listeners(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut lock(&self.0.listeners))
    }

    /// Whether it may still come: neither is it there nor has nobody any use for it by now.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        self.0.engine.get().is_none()
    }

    /// From here on the host is changed, until the engine is there or has undone it; `None` if none is
    /// wanted any more.
    pub fn begin(&self) -> Option<Starting<'_>> {
        let starting = lock(&self.0.starting);
        self.is_awaited().then_some(Starting(starting))
    }

    /// Here it is. False if it comes too late: drop it then.
    #[must_use]
    pub fn fill(&self, packet: &Arc<Packet>) -> bool {
        let is_first = self.0.engine.set(Some(Arc::clone(packet))).is_ok();
        // After the engine can be found: what is told meanwhile reaches it twice rather than never.
        lock(&self.0.translated).iter().for_each(|address| packet.watch_translated(*address));
        is_first
    }

    /// Has the engine watch an address as [`Packet::watch_translated`] says, as soon as it is there.
    pub fn watch_translated(&self, address: SocketAddr) {
        lock(&self.0.translated).insert(address);
        if let Some(packet) = self.get() {
            packet.watch_translated(address);
        }
    }

    /// What is not there by now need not come any more.
    pub fn close(&self) -> Option<&Arc<Packet>> {
        let engine = self.0.engine.get_or_init(|| None).as_ref();
        // Or clients were still let in, and never accepted.
        drop(self.take_listeners());
        engine
    }

    /// Returns when nothing is under way that the end of the process must not cut short: to be
    /// called after [`Self::close`].
    pub fn settle(&self) {
        drop(lock(&self.0.starting));
    }
}

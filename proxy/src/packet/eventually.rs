//! The engine, once it is there. Its self-test and loading its programs take up to some seconds on
//! a busy machine, and clients need not wait for either.

use std::sync::{Arc, OnceLock};

use super::Packet;

/// Empty until the engine has started, and for ever if it cannot or may not. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Eventually(Arc<OnceLock<Option<Arc<Packet>>>>);

impl Eventually {
    /// The engine, if it is there.
    #[must_use]
    pub fn get(&self) -> Option<&Arc<Packet>> {
        self.0.get()?.as_ref()
    }

    /// Here it is. False if it comes too late: drop it then.
    #[must_use]
    pub fn fill(&self, packet: &Arc<Packet>) -> bool {
        self.0.set(Some(Arc::clone(packet))).is_ok()
    }

    /// What is not there by now need not come any more.
    pub fn close(&self) -> Option<&Arc<Packet>> {
        self.0.get_or_init(|| None).as_ref()
    }
}

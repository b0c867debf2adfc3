//! Whether a client that comes now would be served: the listener is up, nothing drains, and an
//! upstream address answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::drain::Watcher;
use crate::upstream::Upstream;

/// The answer of `/readyz`, and the reconciler's leave to publish us.
#[derive(Debug, Clone)]
pub struct Readiness {
    listening: Arc<AtomicBool>,
    drain: Watcher,
    upstream: Arc<Upstream>,
}

/// What is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// Draining has begun.
    #[error("draining: this process is about to end")]
    Draining,
    /// No listener is bound.
    #[error("the listener is not up")]
    NotListening,
    /// No upstream address answers.
    #[error("no upstream address can be reached")]
    UpstreamUnreachable,
}

impl Readiness {
    /// Not ready until [`Self::listening`] was called.
    #[must_use]
    pub fn new(drain: Watcher, upstream: Arc<Upstream>) -> Self {
        Self { listening: Arc::default(), drain, upstream }
    }

    /// The listener is up.
    pub fn listening(&self) {
        self.listening.store(true, Ordering::Release);
    }

    /// Asks now. Contacts the upstream only if no client did so lately, and then with a bare TCP
    /// connection: that costs the API server no TLS handshake.
    ///
    /// # Errors
    /// What is missing.
    pub async fn check(&self) -> Result<(), NotReady> {
        if self.drain.is_draining() {
            return Err(NotReady::Draining);
        }
        if !self.listening.load(Ordering::Acquire) {
            return Err(NotReady::NotListening);
        }
        if self.upstream.answers().await { Ok(()) } else { Err(NotReady::UpstreamUnreachable) }
    }
}

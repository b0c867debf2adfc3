//! Ending in order: one trigger, many watchers.
//!
//! Three phases, only ever forwards: *running*, *draining* (no new connections, live ones go on)
//! and *cut* (what still lives is reset).

use std::future::Future;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The trigger's side; whoever holds it decides when the phases change.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    watcher: Watcher,
}

/// The watching side, cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Watcher {
    draining: CancellationToken,
    cut: CancellationToken,
    sessions: TaskTracker,
}

impl Drain {
    /// A new watcher of this trigger.
    #[must_use]
    pub fn watcher(&self) -> Watcher {
        self.watcher.clone()
    }

    /// No new connections from here on.
    pub fn begin(&self) {
        self.watcher.draining.cancel();
        self.watcher.sessions.close();
    }

    /// Reset what still lives.
    pub fn cut(&self) {
        self.begin();
        self.watcher.cut.cancel();
    }

    /// Ends once draining has begun and the last session is gone.
    pub async fn drained(&self) {
        self.watcher.sessions.wait().await;
    }

    /// Sessions still alive.
    #[must_use]
    pub fn live(&self) -> usize {
        self.watcher.sessions.len()
    }
}

impl Watcher {
    /// Whether new connections are no longer wanted.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Ends when draining begins.
    pub async fn draining(&self) {
        self.draining.cancelled().await;
    }

    /// Ends when live connections are to be reset.
    pub fn cut(&self) -> impl Future<Output = ()> {
        self.cut.cancelled()
    }

    /// Counts `session` among those that [`Drain::drained`] waits for.
    pub fn track<F: Future>(&self, session: F) -> impl Future<Output = F::Output> + use<F> {
        self.sessions.track_future(session)
    }
}

//! Conntrack's entries of switched connections, whose segments it sees no more: kept from expiring
//! as long as the connections live, and removed with them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::conntrack::{Conntrack, Tuple};
use super::lock;

/// How often conntrack is told that switched connections live.
pub const PERIOD: Duration = Duration::from_secs(30 * 60);

/// For how long it then believes it at least. (The kernel's own time is days; some hosts have it
/// shorter.)
const TIME: Duration = Duration::from_secs(4 * 60 * 60);

/// What one connection may be known by: as the client's, and as ours to the server.
pub type Names = [Tuple; 2];

/// Looks after entries. Does nothing where there is no conntrack.
#[derive(Debug)]
pub struct Tracking {
    conntrack: Mutex<Option<Conntrack>>,
    period: Duration,
    /// Whether a task keeps entries.
    is_running: AtomicBool,
    runtime: Handle,
}

impl Tracking {
    /// For [`Self::keep`] every `period`.
    #[must_use]
    pub fn new(conntrack: Option<Conntrack>, period: Duration, runtime: Handle) -> Self {
        let conntrack = Mutex::new(conntrack);
        Self { conntrack, period, is_running: AtomicBool::new(false), runtime }
    }

    /// Has a connection's entries live for a while from now on.
    pub fn track(&self, names: Names) {
        self.track_for(names, time());
    }

    fn track_for(&self, names: Names, time: Duration) {
        if let Some(conntrack) = &mut *lock(&self.conntrack) {
            for tuple in names {
                // Few connections have entries.
                let _ = conntrack.refresh(tuple, time);
            }
        }
    }

    /// Removes a connection's entries.
    pub fn untrack(&self, names: Names) {
        if let Some(conntrack) = &mut *lock(&self.conntrack) {
            for tuple in names {
                let _ = conntrack.delete(tuple);
            }
        }
    }

    /// Tracks all that `living` tells of, at once and then again and again, until there is none or
    /// `end` comes. Does nothing if that goes on already.
    pub fn keep(
        self: &Arc<Self>,
        living: impl Fn() -> Vec<Names> + Send + Sync + 'static,
        end: CancellationToken,
    ) {
        if lock(&self.conntrack).is_none() || self.is_running.swap(true, Ordering::AcqRel) {
            return;
        }
        let (tracking, living) = (Arc::clone(self), Arc::new(living));
        self.runtime.spawn(async move {
            loop {
                let (keeper, list) = (Arc::clone(&tracking), Arc::clone(&living));
                let kept = tokio::task::spawn_blocking(move || {
                    let (all, time) = (list(), time());
                    all.iter().for_each(|names| keeper.track_for(*names, time));
                    !all.is_empty()
                });
                if !kept.await.unwrap_or(true) {
                    break;
                }
                tokio::select! {
                    () = tokio::time::sleep(tracking.period) => {}
                    () = end.cancelled() => return,
                }
            }
            // One that was switched just now, too late for the list, is told of by the next.
            tracking.is_running.store(false, Ordering::Release);
        });
    }
}

/// How long conntrack keeps connections that it sees, and at least [`TIME`].
fn time() -> Duration {
    let path = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";
    let usual = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
    usual.map_or(TIME, Duration::from_secs).max(TIME)
}

//! One DNS name of the upstream: resolved when needed, remembered for its TTL, and never forgotten
//! while no better answer is known.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hickory_resolver::Resolver;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::metrics::Metrics;

/// Bounds of how long an answer holds, whatever its TTL says: below, every connection would ask;
/// above, a changed record would go unnoticed while the old address still answers.
const HOLDS: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// How long a failure holds before a client makes us ask again.
const FAILURE_HOLDS: Duration = Duration::from_secs(1);

/// How long one question to one server may take, and how many there are. A resolver that answers
/// for one family and never for the other then still helps within --connect-timeout's default.
const QUESTIONS: (Duration, usize) = (Duration::from_secs(1), 2);

/// A name and what it resolved to.
#[derive(Debug)]
pub(super) struct Name {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    answer: Mutex<Answer>,
    /// Held while a question is under way, so that there is one at a time.
    asking: Arc<tokio::sync::Mutex<()>>,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default, Clone)]
struct Answer {
    addresses: Arc<[IpAddr]>,
    asked: Option<Instant>,
    holds_until: Option<Instant>,
}

impl Name {
    pub(super) fn new(name: String, metrics: Arc<Metrics>) -> Self {
        let inner = Inner { name, answer: Mutex::default(), asking: Default::default(), metrics };
        Self { inner: Arc::new(inner) }
    }

    /// The addresses as last known; `None` while none is. Those that have outlived their TTL are
    /// used while a new answer is fetched in the background.
    pub(super) fn known(&self) -> Option<Arc<[IpAddr]>> {
        let answer = self.inner.answer();
        let now = Instant::now();
        if answer.addresses.is_empty() {
            return None;
        }
        if answer.holds_until.is_none_or(|until| now >= until) {
            let inner = Arc::clone(&self.inner);
            tokio::spawn(async move { inner.refresh(now).await });
        }
        Some(answer.addresses)
    }

    /// No question gets an answer while the guard lives.
    #[cfg(test)]
    pub(super) async fn block_questions(&self) -> impl Drop + use<> {
        Arc::clone(&self.inner.asking).lock_owned().await
    }

    /// Asks anew, unless somebody has done so since `since`. The question outlives whoever
    /// waits here: an answer that comes too late for one client serves the next.
    pub(super) async fn refresh(&self, since: Instant) -> Arc<[IpAddr]> {
        let inner = Arc::clone(&self.inner);
        let question = tokio::spawn(async move { inner.refresh(since).await });
        question.await.unwrap_or_default()
    }
}

impl Inner {
    fn answer(&self) -> Answer {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn refresh(&self, since: Instant) -> Arc<[IpAddr]> {
        let _asking = self.asking.lock().await;
        let old = self.answer();
        let asked_since = old.asked.is_some_and(|asked| asked >= since);
        let failed_just_now =
            old.addresses.is_empty() && old.holds_until.is_some_and(|until| Instant::now() < until);
        if asked_since || failed_just_now {
            return old.addresses;
        }
        let asked = Some(Instant::now());
        let answer = match resolve(&self.name).await {
            Ok((addresses, holds_until)) => {
                self.metrics.resolutions.with_label_values(&["resolved"]).inc();
                if *addresses != *old.addresses {
                    info!(name = self.name, ?addresses, "upstream name resolved");
                }
                Answer { addresses, asked, holds_until: Some(holds_until) }
            }
            Err(error) => {
                self.metrics.resolutions.with_label_values(&["failed"]).inc();
                let kept = old.addresses.len();
                warn!(name = self.name, %error, kept, "upstream name does not resolve");
                Answer { asked, holds_until: Some(Instant::now() + FAILURE_HOLDS), ..old }
            }
        };
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = answer.clone();
        answer.addresses
    }
}

/// Asks the host's resolver, as /etc/hosts and /etc/resolv.conf name it *now*: both are read each
/// time, because nodes change them while we run and questions are rare.
async fn resolve(name: &str) -> Result<(Arc<[IpAddr]>, Instant), String> {
    let resolver = Resolver::builder_tokio()
        .and_then(|mut builder| {
            let options = builder.options_mut();
            (options.timeout, options.attempts) = QUESTIONS;
            builder.build()
        })
        .map_err(|error| format!("resolver configuration: {error}"))?;
    let found = resolver.lookup_ip(name).await.map_err(|error| error.to_string())?;
    let mut addresses: Vec<IpAddr> = Vec::new();
    for ip in found.iter().map(|ip| ip.to_canonical()) {
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    if addresses.is_empty() {
        return Err("no addresses".to_owned());
    }
    let ttl = found.valid_until().saturating_duration_since(std::time::Instant::now());
    Ok((addresses.into(), Instant::now() + ttl.clamp(HOLDS.0, HOLDS.1)))
}

//! Keeps `default/kubernetes` pointing at addresses that relay to the real API server.

use std::sync::Arc;

use crate::config::EndpointConfig;
use crate::drain::Watcher;
use crate::metrics::Metrics;
use crate::readiness::Readiness;

/// Runs until draining begins.
pub async fn run(
    _config: EndpointConfig,
    _readiness: Readiness,
    _metrics: Arc<Metrics>,
    drain: Watcher,
) {
    drain.draining().await;
}

//! Keeps `default/kubernetes` pointing at addresses that relay to the real API server.
//!
//! In the order of one pass: `observe` watches the cluster; `desired` says what should be
//! published and `plan` what to write for that, both without a side effect; `pace` decides
//! whether to write now, and `write` does. `reconciler` is the loop around them. Every
//! replica does the same and comes to the same content, so none of them leads.

mod address;
mod connect;
mod content;
mod desired;
mod observe;
mod outcome;
mod ownership;
mod pace;
mod plan;
mod reconciler;
mod report;
mod trouble;
mod write;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;

use self::reconciler::{Leave, Reconciler};
use crate::config::{EndpointConfig, EndpointMode};
use crate::drain::Watcher;
use crate::metrics::Metrics;
use crate::readiness::Readiness;

impl Leave for Readiness {
    async fn granted(&self) -> bool {
        self.check().await.is_ok()
    }
}

/// Told each address that clients ask for when they mean `default/kubernetes`: what kube-proxy
/// translates to ours on the way. May be told the same again.
pub type Asked = Box<dyn Fn(SocketAddr) + Send + Sync>;

/// Keeps the endpoints until draining begins; in mode `off` does nothing. Whatever goes wrong is
/// logged and counted, and tried again: traffic does not depend on it.
///
/// Nothing is withdrawn at the end. Other replicas do that once our Service no longer lists this
/// one as ready, and the last address is never taken away.
pub async fn run(
    config: EndpointConfig,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    drain: Watcher,
    asked: Asked,
) {
    if config.mode == EndpointMode::Off {
        return;
    }
    let keep = async {
        let client = connect::client(&config, &metrics).await;
        Reconciler::new(config, readiness, metrics, client, asked).run().await;
    };
    tokio::select! {
        () = drain.draining() => {}
        () = keep => {}
    }
}

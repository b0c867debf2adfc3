//! How a connection is told of once it has ended: one line of the access log, and one metric.

use std::net::SocketAddr;
use std::time::Duration;

use tracing::info;

use crate::metrics::Metrics;
use crate::relay::Engine;

/// A client that was refused before it had a session: the limit was reached.
pub fn refused(metrics: &Metrics, client: SocketAddr) {
    ended(metrics, client, None, "none", (0, 0), Duration::ZERO, "over_limit");
}

/// A connection that the kernel relayed to its end.
pub fn switched(
    metrics: &Metrics,
    client: SocketAddr,
    upstream: SocketAddr,
    bytes: (u64, u64),
    age: Duration,
    reason: &'static str,
) {
    let engine = Engine::Packet.as_label();
    ended(metrics, client, Some(upstream), engine, bytes, age, reason);
}

/// Any other.
pub fn ended(
    metrics: &Metrics,
    client: SocketAddr,
    upstream: Option<SocketAddr>,
    engine: &'static str,
    (bytes_up, bytes_down): (u64, u64),
    age: Duration,
    reason: &'static str,
) {
    metrics.ended.with_label_values(&[engine, reason]).inc();
    // Microseconds are as fine as it gets; of seconds, a multiplication would leave 17 digits.
    let duration_ms = age.as_micros() as f64 / 1000.0;
    let upstream = upstream.map_or_else(|| "-".to_owned(), |address| address.to_string());
    info!(
        target: "access",
        %client, upstream, engine, bytes_up, bytes_down, duration_ms, reason, "connection"
    );
}

//! Every metric's name, labels and help text, in one place.
//!
//! Label values come from `as_label()` functions of the types they describe, never from Debug
//! output, so that a renamed variant cannot break a dashboard.

use std::sync::OnceLock;

use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::relay::{Engine, Wish};

const PREFIX: &str = "steward_tcp_proxy";
const BUILD_INFO: &str = "build_info";

/// Seconds; from a loopback's 50 us to a dial that uses up its time-out.
const LATENCY_BUCKETS: &[f64] = &[
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0,
];

/// Handles to all metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Full names of all metrics; those with labels show no sample before they have a value.
    pub names: Vec<String>,
    /// Connections taken from the listeners' queues.
    pub accepted: IntCounter,
    /// Connections now dialling their upstream.
    pub dialling: IntGauge,
    /// Connections now relaying, by engine.
    pub relaying: IntGaugeVec,
    /// Ended connections, by engine ("none" if none began) and reason.
    pub ended: IntCounterVec,
    /// Bytes from clients to the upstream.
    pub bytes_up: IntCounter,
    /// Bytes from the upstream to clients.
    pub bytes_down: IntCounter,
    /// Attempts to connect to one upstream address, by result.
    pub dial: HistogramVec,
    /// From accept until bytes may flow.
    pub handshake: Histogram,
    /// Failed accepts, by cause.
    pub accept_errors: IntCounterVec,
    /// Pipes that splice holds, idle ones included.
    pub pipes: IntGauge,
    /// 1 while new connections can reach an upstream.
    pub upstream_reachable: IntGauge,
    /// Name resolutions, by result.
    pub resolutions: IntCounterVec,
    /// Passes of the reconciler, by result.
    pub reconciles: IntCounterVec,
    /// Writes to the API server, by object and result.
    pub endpoint_writes: IntCounterVec,
    /// Addresses that the reconciler publishes now, by family.
    pub endpoint_addresses: IntGaugeVec,
    /// 1 while another writer keeps undoing our endpoints.
    pub endpoint_rival: IntGauge,
    /// 1 while draining.
    pub draining: IntGauge,
    /// Time of a switch to the packet engine.
    pub packet_switch: Histogram,
    /// Attempts that left a connection in userspace, by reason.
    pub packet_ineligible: IntCounterVec,
    /// Devices that had lost the programs and got them again.
    pub packet_reattached: IntCounter,
    /// Segments of switched connections to which something unusual happened.
    pub packet_oddities: IntCounterVec,
    /// How many more connections can be switched.
    pub packet_room: IntGauge,
    /// Called before the metrics are read.
    pub refresh: OnceLock<Refresh>,
}

/// Reads what others count for us.
pub struct Refresh(pub Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Refresh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Refresh")
    }
}

#[derive(Default)]
struct Maker {
    registry: Registry,
    names: std::cell::RefCell<Vec<String>>,
}

impl Maker {
    fn opts(name: &str, help: &str) -> Opts {
        Opts::new(name, help).namespace(PREFIX)
    }

    fn add<C: prometheus::core::Collector + Clone + 'static>(
        &self,
        made: prometheus::Result<C>,
    ) -> prometheus::Result<C> {
        let made = made?;
        self.registry.register(Box::new(made.clone()))?;
        let names = made.desc().into_iter().map(|desc| desc.fq_name.clone());
        self.names.borrow_mut().extend(names);
        Ok(made)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.add(IntCounter::with_opts(Self::opts(name, help)))
    }

    fn counters(&self, name: &str, help: &str, by: &[&str]) -> prometheus::Result<IntCounterVec> {
        self.add(IntCounterVec::new(Self::opts(name, help), by))
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.add(IntGauge::with_opts(Self::opts(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, by: &[&str]) -> prometheus::Result<IntGaugeVec> {
        self.add(IntGaugeVec::new(Self::opts(name, help), by))
    }

    fn histogram(name: &str, help: &str) -> HistogramOpts {
        HistogramOpts::from(Self::opts(name, help)).buckets(LATENCY_BUCKETS.to_vec())
    }
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Errors
    /// Two metrics of one name, which a unit test rules out.
    pub fn new() -> prometheus::Result<Self> {
        let make = Maker::default();
        let bytes = make.counters(
            "bytes_total",
            "Bytes relayed; direction up is from clients to the upstream, down the other way.",
            &["direction"],
        )?;
        // The one that needs to know more than this function, see `describe_process`.
        make.names.borrow_mut().push(format!("{PREFIX}_{BUILD_INFO}"));
        Ok(Self {
            accepted: make.counter(
                "connections_accepted_total",
                "Connections taken from the listeners' queues, refused ones included.",
            )?,
            dialling: make.gauge(
                "connections_dialling",
                "Connections accepted whose upstream is not connected yet.",
            )?,
            relaying: make.gauges(
                "connections_relaying",
                "Connections relayed now, by engine.",
                &["engine"],
            )?,
            ended: make.counters(
                "connections_ended_total",
                "Connections ended, by engine (none: it never relayed) and reason.",
                &["engine", "reason"],
            )?,
            bytes_up: bytes.with_label_values(&["up"]),
            bytes_down: bytes.with_label_values(&["down"]),
            dial: make.add(HistogramVec::new(
                Maker::histogram(
                    "dial_duration_seconds",
                    "Time of one attempt to connect to one upstream address, by result.",
                ),
                &["result"],
            ))?,
            handshake: make.add(Histogram::with_opts(Maker::histogram(
                "handshake_duration_seconds",
                "Time from accepting a client until its upstream is connected and bytes may flow.",
            )))?,
            accept_errors: make.counters(
                "accept_errors_total",
                "Failed accepts, by cause; the listener pauses and goes on.",
                &["cause"],
            )?,
            pipes: make
                .gauge("splice_pipes", "Pipes that the splice engine holds, idle or not.")?,
            upstream_reachable: make.gauge(
                "upstream_reachable",
                "1 if the last contact with an upstream address succeeded, else 0.",
            )?,
            resolutions: make.counters(
                "upstream_resolutions_total",
                "Resolutions of upstream names, by result.",
                &["result"],
            )?,
            reconciles: make.counters(
                "reconciles_total",
                "Passes of the endpoint reconciler, by result.",
                &["result"],
            )?,
            endpoint_writes: make.counters(
                "endpoint_writes_total",
                "Writes of endpoints to the API server, by kind of object and result.",
                &["kind", "result"],
            )?,
            endpoint_addresses: make.gauges(
                "endpoint_addresses",
                "Addresses published for default/kubernetes, by family.",
                &["family"],
            )?,
            endpoint_rival: make.gauge(
                "endpoint_rival",
                "1 while another writer keeps undoing our endpoints, else 0.",
            )?,
            draining: make.gauge("draining", "1 from SIGTERM on, else 0.")?,
            packet_switch: make.add(Histogram::with_opts(Maker::histogram(
                "packet_switch_duration_seconds",
                "Time from the decision to hand a connection to the kernel until its sockets are closed.",
            )))?,
            packet_ineligible: make.counters(
                "packet_ineligible_total",
                "Attempts to hand a connection to the kernel that left it in userspace, by reason.",
                &["reason"],
            )?,
            packet_reattached: make.counter(
                "packet_reattachments_total",
                "Devices that had lost our kernel programs, or on which they were no longer first, and got them again.",
            )?,
            packet_oddities: make.counters(
                "packet_segments_total",
                "Segments of switched connections that were not simply passed on, by what happened.",
                &["what"],
            )?,
            packet_room: make.gauge(
                "packet_room",
                "Connections that can still be handed to the kernel.",
            )?,
            refresh: OnceLock::new(),
            names: make.names.into_inner(),
            registry: make.registry,
        })
    }

    /// Notes what this process is and which engine it was asked for and decided on.
    ///
    /// # Errors
    /// A metric of this name exists already, which means a second call.
    pub fn describe_process(&self, wish: Wish, default: Engine) -> prometheus::Result<()> {
        let info = IntGaugeVec::new(
            Maker::opts(BUILD_INFO, "Always 1; what this process is, in its labels."),
            &["version", "engine_wished", "engine_default"],
        )?;
        info.with_label_values(&[crate::VERSION, wish.as_label(), default.as_label()]).set(1);
        self.registry.register(Box::new(info))
    }

    /// All metrics in Prometheus's text format.
    ///
    /// # Errors
    /// A metric cannot be encoded (none of ours can fail to be).
    pub fn encode(&self) -> prometheus::Result<Vec<u8>> {
        if let Some(Refresh(refresh)) = self.refresh.get() {
            refresh();
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_share_one_prefix() {
        let metrics = Metrics::new().expect("registers");
        metrics.describe_process(Wish::Auto, Engine::Splice).expect("registers");
        let text = String::from_utf8(metrics.encode().expect("encodes")).expect("UTF-8");
        assert!(text.contains("steward_tcp_proxy_build_info{"), "{text}");
        let names = &metrics.names;
        assert!(names.iter().all(|n| n.starts_with("steward_tcp_proxy_")), "{names:?}");
    }
}

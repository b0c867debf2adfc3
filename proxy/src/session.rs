//! One connection's life: accepted, dialled, relayed, told of.

use std::future::Future;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::OwnedSemaphorePermit;
use tracing::debug;

use crate::access;
use crate::metrics::Metrics;
use crate::packet;
use crate::packet::eligible::Ineligible;
use crate::packet::eventually::Eventually;
use crate::packet::switch::{self, Attempt};
use crate::relay::{self, Counters, End, Engine, Limits, Moment, Moved, Outcome, Wish};
use crate::socket::{self, Downstream, Socket};
use crate::upstream::{DialError, Upstream};

/// What all sessions share.
#[derive(Debug)]
pub struct Shared {
    /// The engine asked for.
    pub wish: Wish,
    /// Takes over connections that fit, if it was asked for and works here.
    pub packet: Eventually,
    /// Where to connect to.
    pub upstream: Arc<Upstream>,
    /// Bounds of a relay.
    pub limits: Limits,
    /// Where bytes are counted.
    pub counters: Counters,
    /// All other counts.
    pub metrics: Arc<Metrics>,
}

/// Serves one client to the end. The permit is its place under `--max-connections`.
pub fn serve(
    shared: Arc<Shared>,
    client: OwnedFd,
    address: SocketAddr,
    permit: OwnedSemaphorePermit,
) -> impl Future<Output = ()> + Send {
    let mut record = Record::open(Arc::clone(&shared.metrics), address);
    async move {
        // Here and not where it was accepted, so that a reactor without room is told of as well.
        let client = match Socket::new(client) {
            Ok(socket) => Downstream(socket),
            Err(_) => return record.close(DialError::Local.as_label()),
        };
        // Boxed, so that its state takes no room while the connection lives on.
        let (server, upstream) = match Box::pin(dial(&shared, &client)).await {
            Ok(dialled) => dialled,
            // Both sockets still linger with time zero: dropping them sends RST.
            Err(why) => return record.close(why),
        };
        let engine = shared.wish.decide();
        record.relaying(engine, upstream);
        // What came before this run of the relay. Boxed, like all that most connections never need.
        let mut past: Option<Box<Past>> = None;
        let mut looks = shared.packet.get().is_some();
        loop {
            let Past { moved, attempts } = past.as_deref().copied().unwrap_or_default();
            let pause = looks.then(|| Box::new(next_look(attempts, moved)));
            let (limits, counters) = (&shared.limits, &shared.counters);
            let moved =
                match relay::run(engine, &client, &server, limits, counters, moved, pause).await {
                    Outcome::Ended(end) => return record.ended(end),
                    Outcome::Paused(moved) => moved,
                };
            // Boxed, like the dial.
            match Box::pin(switch(&shared, &client, &server, moved, &record)).await {
                switch::Outcome::Switched(_) => {
                    debug!(client = %record.client, after = ?record.accepted.elapsed(), "switched");
                    // The port stays taken until the connection ends.
                    server.1.map(|port| port.keep());
                    permit.forget();
                    return record.handed_over();
                }
                switch::Outcome::Stays(reason, moved) => {
                    let attempts = past.map_or(0, |past| past.attempts) + 1;
                    looks = reason.may_pass() && attempts < packet::LOOKS;
                    past = Some(Box::new(Past { moved, attempts }));
                }
                switch::Outcome::Ended(reason, Moved { up, down }) => {
                    return record.ended(End { reason, bytes_up: up, bytes_down: down });
                }
            }
        }
    }
}

/// What happened to a connection before its relay goes on.
#[derive(Debug, Clone, Copy, Default)]
struct Past {
    moved: Moved,
    /// To hand it to the kernel.
    attempts: u8,
}

fn next_look(attempts: u8, moved: Moved) -> Moment {
    match attempts {
        0 => packet::FIRST_LOOK,
        // A transfer that was busy a moment ago will be for a while.
        _ => Moment { after: packet::NEXT_LOOK, bytes: moved.up + moved.down + (64 << 20) },
    }
}

/// Tries to hand the connection to the kernel.
async fn switch(
    shared: &Shared,
    client: &Downstream,
    server: &socket::Upstream,
    moved: Moved,
    record: &Record,
) -> switch::Outcome {
    let Some(packet) = shared.packet.get() else {
        return switch::Outcome::Stays(Ineligible::Refused, moved);
    };
    let age = u64::try_from(record.accepted.elapsed().as_millis()).unwrap_or(0);
    let mut attempt = Attempt {
        packet,
        client,
        server,
        moved,
        counters: &shared.counters,
        accepted_ms: packet::now_ms().saturating_sub(age),
    };
    let outcome = tokio::select! {
        biased;
        outcome = attempt.run() => Some(outcome),
        () = shared.limits.drain.cut() => None,
    };
    // It has moved bytes as well.
    let cut = || switch::Outcome::Ended(relay::Reason::Cut, attempt.moved);
    let outcome = outcome.unwrap_or_else(cut);
    if let switch::Outcome::Stays(reason, _) = &outcome {
        packet.note_ineligible(*reason);
        debug!(client = %record.client, reason = reason.as_label(), "stays in userspace");
    }
    outcome
}

/// Connects to the upstream, unless the client is gone or the drain's deadline comes first.
async fn dial(
    shared: &Shared,
    client: &Downstream,
) -> Result<(socket::Upstream, SocketAddr), &'static str> {
    let segment = shared.packet.get().and_then(|packet| packet.segment_of(&client.0));
    tokio::select! {
        dialled = shared.upstream.connect(segment) => dialled.map_err(DialError::as_label),
        _error = client.0.failed() => Err("client_gone"),
        () = shared.limits.drain.cut() => Err(relay::Reason::Cut.as_label()),
    }
}

/// Writes metrics and the access-log line of one connection together, on drop: none ends silently,
/// not even one whose task is aborted.
struct Record {
    metrics: Arc<Metrics>,
    client: SocketAddr,
    accepted: Instant,
    relay: Option<(Engine, SocketAddr)>,
    bytes: (u64, u64),
    reason: &'static str,
    is_handed_over: bool,
}

impl Record {
    fn open(metrics: Arc<Metrics>, client: SocketAddr) -> Self {
        metrics.dialling.inc();
        let accepted = Instant::now();
        Self {
            metrics,
            client,
            accepted,
            relay: None,
            bytes: (0, 0),
            reason: "aborted",
            is_handed_over: false,
        }
    }

    fn relaying(&mut self, engine: Engine, upstream: SocketAddr) {
        self.metrics.dialling.dec();
        self.metrics.relaying.with_label_values(&[engine.as_label()]).inc();
        self.metrics.handshake.observe(self.accepted.elapsed().as_secs_f64());
        self.relay = Some((engine, upstream));
    }

    fn ended(mut self, end: End) {
        self.bytes = (end.bytes_up, end.bytes_down);
        self.reason = end.reason.as_label();
    }

    /// The kernel has the connection now, and another will tell of its end.
    fn handed_over(mut self) {
        if let Some((engine, _)) = self.relay {
            self.metrics.relaying.with_label_values(&[engine.as_label()]).dec();
        }
        self.is_handed_over = true;
    }

    fn close(mut self, reason: &'static str) {
        self.reason = reason;
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if self.is_handed_over {
            return;
        }
        let engine = self.relay.map_or("none", |(engine, _)| engine.as_label());
        match self.relay {
            Some(_) => self.metrics.relaying.with_label_values(&[engine]).dec(),
            None => self.metrics.dialling.dec(),
        }
        let upstream = self.relay.map(|(_, address)| address);
        let age = self.accepted.elapsed();
        access::ended(&self.metrics, self.client, upstream, engine, self.bytes, age, self.reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The size of what `make` would return, without making it.
    fn size_of_result<A, B, C, D, R>(_make: impl FnOnce(A, B, C, D) -> R) -> usize {
        size_of::<R>()
    }

    #[test]
    fn an_idle_session_is_small() {
        // Beside this, a session owns two registrations with the reactor, which tokio pads to 256
        // bytes each, and no buffer. `limits::` in the tests crate weighs the whole process.
        let size = size_of_result(serve);
        assert!(size <= 800, "a session's state takes {size} bytes");
    }
}

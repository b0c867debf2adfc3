//! The API server's addresses: which one is tried when, and whether any answers.
//!
//! Entries of `--upstream-addr` are preferred in their order; a name stands for all its addresses
//! in the order of the answer. An address that failed is tried last for 30 s, then in its
//! old place again, so that traffic fails over at once and fails back by itself. Nothing is ever
//! dropped from the set: with every address penalised, all are tried.

mod names;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use socket2::SockRef;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{debug, error, info, warn};

use crate::config::{Host, HostPort, UpstreamAddrs};
use crate::metrics::Metrics;
use crate::packet::eventually::Eventually;
use crate::packet::ports::Port;
use crate::packet::routes;
use crate::socket;

use names::Name;

/// How long an address that failed is tried last.
const PENALTY: Duration = Duration::from_secs(30);

/// How long one address may keep silent before the next is tried beside it (RFC 8305, section 5,
/// recommends 250 ms). A shorter --connect-timeout shortens it, so that every address gets a turn.
const STAGGER: Duration = Duration::from_millis(250);

/// How long the kernel's word holds that an address is, or is not, this host's own.
const OWN_HOLDS: Duration = Duration::from_secs(1);

/// How long one contact speaks for the upstream's health.
const CONTACT_HOLDS: Duration = Duration::from_secs(5);

/// The upstream as a whole.
#[derive(Debug)]
pub struct Upstream {
    entries: Vec<Entry>,
    connect_timeout: Duration,
    /// Where this proxy itself listens.
    listening: SocketAddr,
    /// Chooses the local port, if connections may be switched.
    packet: Eventually,
    health: Mutex<Health>,
    probing: tokio::sync::Mutex<()>,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct Entry {
    host: Source,
    port: u16,
}

#[derive(Debug)]
enum Source {
    Ip(IpAddr),
    Name(Name),
}

#[derive(Debug, Default)]
struct Health {
    /// Addresses that failed, and until when they are tried last.
    penalties: HashMap<SocketAddr, Instant>,
    /// Whether addresses that could be our own listener's are, and until when that holds.
    own: HashMap<SocketAddr, (bool, Instant)>,
    /// When the upstream was last contacted, and whether it answered.
    contact: Option<(Instant, bool)>,
}

/// Why no address was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum DialError {
    /// No name of the upstream resolves to an address.
    #[error("no address is known")]
    Unresolved,
    /// No route, or the network says that the host is not there.
    #[error("unreachable")]
    Unreachable,
    /// Nobody answered within --connect-timeout.
    #[error("timed out")]
    TimedOut,
    /// The host answered that nobody listens.
    #[error("refused")]
    Refused,
    /// The address leads back to this proxy.
    #[error("leads back to this proxy")]
    Loop,
    /// This host is out of descriptors, ports or memory.
    #[error("out of local resources")]
    Local,
}

impl DialError {
    /// The label in logs and metrics.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Unresolved => "upstream_unresolved",
            Self::Unreachable => "upstream_unreachable",
            Self::TimedOut => "upstream_timeout",
            Self::Refused => "upstream_refused",
            Self::Loop => "upstream_is_self",
            Self::Local => "local_resources",
        }
    }
}

/// The port that was chosen cannot be used for this address now.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EADDRINUSE))
}

impl From<&io::Error> for DialError {
    fn from(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ELOOP) => Self::Loop,
            // The latter two when it accepted and ended the connection before we looked.
            Some(libc::ECONNREFUSED | libc::ECONNRESET | libc::EPIPE) => Self::Refused,
            Some(libc::ETIMEDOUT) => Self::TimedOut,
            Some(
                libc::EMFILE
                | libc::ENFILE
                | libc::ENOMEM
                | libc::ENOBUFS
                | libc::EADDRNOTAVAIL
                | libc::EAGAIN
                | libc::ENOSPC,
            ) => Self::Local,
            _ => Self::Unreachable,
        }
    }
}

impl Upstream {
    /// Nothing is resolved or contacted before the first client, or the first question for
    /// readiness.
    #[must_use]
    pub fn new(
        addresses: &UpstreamAddrs,
        connect_timeout: Duration,
        listening: SocketAddr,
        packet: Eventually,
        metrics: Arc<Metrics>,
    ) -> Self {
        let entry = |HostPort { host, port }: &HostPort| Entry {
            port: *port,
            host: match host {
                Host::Ip(ip) => Source::Ip(*ip),
                Host::Name(name) => Source::Name(Name::new(name.clone(), Arc::clone(&metrics))),
            },
        };
        Self {
            entries: addresses.0.iter().map(entry).collect(),
            connect_timeout,
            listening,
            health: Mutex::default(),
            probing: tokio::sync::Mutex::default(),
            packet,
            metrics,
        }
    }

    /// Connects to the first address that answers. The packet engine needs to know what the
    /// client takes at once.
    ///
    /// # Errors
    /// None answered within --connect-timeout; the most telling of their errors.
    pub async fn connect(
        &self,
        segment: Option<u16>,
    ) -> Result<(socket::Upstream, SocketAddr), DialError> {
        let asked = Instant::now();
        let deadline = asked + self.connect_timeout;
        let result = match self.only_address() {
            Some(address) => self.connect_alone(address, segment, deadline).await,
            None => {
                let known = self.candidates(asked, deadline, false).await;
                self.connect_to(known, segment, asked, deadline).await
            }
        };
        // A shortage of this host says nothing about the upstream.
        if !matches!(result, Err(DialError::Local)) {
            self.note_contact(result.is_ok());
        }
        result
    }

    /// The one address that there is, without a name: nothing is to be chosen or raced.
    fn only_address(&self) -> Option<SocketAddr> {
        match &self.entries[..] {
            [Entry { host: Source::Ip(ip), port }] => Some(SocketAddr::new(*ip, *port)),
            _ => None,
        }
    }

    /// What [`Self::race`] does with one address, at less cost.
    async fn connect_alone(
        &self,
        address: SocketAddr,
        segment: Option<u16>,
        deadline: Instant,
    ) -> Result<(socket::Upstream, SocketAddr), DialError> {
        let begun = Instant::now();
        let Ok((_, result)) = timeout_at(deadline, self.attempt(address, segment)).await else {
            self.note_silence(address, begun);
            return Err(DialError::TimedOut);
        };
        self.note_attempt(address, Some(begun), result.as_ref().err());
        let socket = result.map_err(|error| DialError::from(&error))?;
        Ok((socket, address))
    }

    /// Whether the upstream answers: known from the last contact if that is fresh, else found out
    /// by a connection that carries no byte.
    pub async fn answers(&self) -> bool {
        if let Some(answer) = self.recent_contact() {
            return answer;
        }
        // One probe at a time, however many ask.
        let _probing = self.probing.lock().await;
        match self.recent_contact() {
            Some(answer) => answer,
            // The probe's socket lingers with time zero and goes as RST: no TIME_WAIT, and the
            // server spends nothing on it beyond its accept.
            None => self.connect(None).await.is_ok(),
        }
    }

    /// Tries `known`, and if all fail, what the names resolve to by then.
    async fn connect_to(
        &self,
        known: Vec<SocketAddr>,
        segment: Option<u16>,
        asked: Instant,
        deadline: Instant,
    ) -> Result<(socket::Upstream, SocketAddr), DialError> {
        let error = match self.race(&known, segment, deadline).await {
            Ok(winner) => return Ok(winner),
            Err(error) => error,
        };
        if error == DialError::Local || !self.has_names() {
            return Err(error);
        }
        let mut fresh = self.candidates(asked, deadline, true).await;
        fresh.retain(|address| !known.contains(address));
        if fresh.is_empty() { Err(error) } else { self.race(&fresh, segment, deadline).await }
    }

    /// Starts with the first address and adds the next whenever one fails or keeps silent for
    /// [`STAGGER`]; the first to answer wins.
    async fn race(
        &self,
        addresses: &[SocketAddr],
        segment: Option<u16>,
        deadline: Instant,
    ) -> Result<(socket::Upstream, SocketAddr), DialError> {
        let share = (deadline - Instant::now()) / u32::try_from(addresses.len() + 1).unwrap_or(1);
        let stagger = STAGGER.min(share);
        let mut waiting = addresses.iter().copied();
        let mut racing = FuturesUnordered::new();
        let mut running = Vec::new();
        let mut next_start = Instant::now();
        let mut worst = DialError::Unresolved;
        loop {
            if racing.is_empty() || Instant::now() >= next_start {
                if let Some(address) = waiting.next() {
                    running.push((address, Instant::now()));
                    racing.push(self.attempt(address, segment));
                    next_start = Instant::now() + stagger;
                } else if racing.is_empty() {
                    return Err(worst);
                }
            }
            let more = waiting.len() > 0;
            tokio::select! {
                biased;
                Some((address, result)) = racing.next() => {
                    let started = running.iter().position(|(a, _)| *a == address);
                    let since = started.map(|at| running.swap_remove(at).1);
                    self.note_attempt(address, since, result.as_ref().err());
                    match result {
                        Ok(socket) => {
                            // Whoever kept silent longer than the winner took is slow or dead.
                            running.into_iter().for_each(|(a, since)| self.note_silence(a, since));
                            return Ok((socket, address));
                        }
                        Err(error) => {
                            worst = worst.max(DialError::from(&error));
                            next_start = Instant::now();
                        }
                    }
                }
                () = sleep_until(next_start), if more => {}
                () = sleep_until(deadline) => {
                    running.into_iter().for_each(|(a, since)| self.note_silence(a, since));
                    return Err(worst.max(DialError::TimedOut));
                }
            }
        }
    }

    async fn attempt(
        &self,
        address: SocketAddr,
        segment: Option<u16>,
    ) -> (SocketAddr, io::Result<socket::Upstream>) {
        if self.leads_back(address) {
            return (address, Err(io::Error::from_raw_os_error(libc::ELOOP)));
        }
        let connected = self.connect_from_own_port(address, segment).await;
        let checked = connected.and_then(|(socket, port)| {
            Ok(socket::Upstream(self.unless_own(address, socket)?, port.map(Box::new)))
        });
        (address, checked)
    }

    /// Connects, for the packet engine from a port that nobody else uses.
    async fn connect_from_own_port(
        &self,
        address: SocketAddr,
        segment: Option<u16>,
    ) -> io::Result<(socket::Socket, Option<Port>)> {
        let Some(packet) = self.packet.get() else {
            return Ok((socket::Socket::connect(address, |_| ()).await?, None));
        };
        let mut port = None;
        let prepare =
            |socket: &SockRef<'_>| port = packet.prepare_upstream(socket, address, segment);
        match socket::Socket::connect(address, prepare).await {
            // Another connection of that port is in TIME_WAIT; the kernel finds a free one.
            Err(error) if port.is_some() && is_taken(&error) => {
                Ok((socket::Socket::connect(address, |_| ()).await?, None))
            }
            result => Ok((result?, port)),
        }
    }

    /// Whether a connection to `address` would come to our own listener: each client would become
    /// another client, until every descriptor of the host is a part of the circle. Known without
    /// such a connection, whose other end would dial again before this end knows.
    fn leads_back(&self, address: SocketAddr) -> bool {
        if !self.is_like_ours(address) {
            return false;
        }
        let now = Instant::now();
        let mut health = self.health();
        if let Some((is_own, until)) = health.own.get(&address)
            && *until > now
        {
            return *is_own;
        }
        // A sandbox may not tell; then `unless_own` does.
        let is_own = routes::is_own(address.ip()).unwrap_or(false);
        health.own.retain(|_, (_, until)| *until > now);
        health.own.insert(address, (is_own, now + OWN_HOLDS));
        is_own
    }

    /// Whether `address` is our listener's if it is one of this host at all.
    fn is_like_ours(&self, address: SocketAddr) -> bool {
        let listening = self.listening.ip().to_canonical();
        address.port() == self.listening.port()
            && (listening.is_unspecified() || listening == address.ip().to_canonical())
    }

    /// Refuses a connection to our own listener that could not be foreseen, and those that would
    /// follow it.
    fn unless_own(
        &self,
        address: SocketAddr,
        socket: socket::Socket,
    ) -> io::Result<socket::Socket> {
        // A connection whose two ends have one address never left this host.
        if self.is_like_ours(address) && socket.local_ip()? == address.ip().to_canonical() {
            self.health().own.insert(address, (true, Instant::now() + PENALTY));
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        Ok(socket)
    }

    /// All addresses, penalised ones last. `again` resolves names anew, unless that was done since
    /// `asked`. While an address is known, names that are not get no more than [`STAGGER`]; else
    /// they have until `deadline`. A question goes on in the background either way.
    async fn candidates(&self, asked: Instant, deadline: Instant, again: bool) -> Vec<SocketAddr> {
        let mut found: Vec<Arc<[IpAddr]>> = Vec::with_capacity(self.entries.len());
        let mut asking = FuturesUnordered::new();
        for (index, entry) in self.entries.iter().enumerate() {
            found.push(match &entry.host {
                Source::Ip(ip) => Arc::new([*ip]),
                Source::Name(name) => {
                    let known = if again { None } else { name.known() };
                    if known.is_none() {
                        asking.push(async move { (index, name.refresh(asked).await) });
                    }
                    known.unwrap_or_default()
                }
            });
        }
        let begun = Instant::now();
        loop {
            let is_any_known = found.iter().any(|addresses| !addresses.is_empty());
            let patience = if is_any_known { deadline.min(begun + STAGGER) } else { deadline };
            match timeout_at(patience, asking.next()).await {
                Ok(Some((index, addresses))) => found[index] = addresses,
                Ok(None) | Err(_) => break,
            }
        }
        let of_entry = |(entry, ips): (&Entry, &Arc<[IpAddr]>)| {
            let port = entry.port;
            ips.iter().map(|ip| SocketAddr::new(*ip, port)).collect::<Vec<_>>()
        };
        let mut all: Vec<SocketAddr> = self.entries.iter().zip(&found).flat_map(of_entry).collect();
        let now = Instant::now();
        let mut health = self.health();
        health.penalties.retain(|_, until| *until > now);
        // Stable: within both groups the order of preference stays.
        all.sort_by_key(|address| health.penalties.get(address).copied());
        all
    }

    fn has_names(&self) -> bool {
        self.entries.iter().any(|entry| matches!(entry.host, Source::Name(_)))
    }

    fn note_attempt(&self, address: SocketAddr, since: Option<Instant>, error: Option<&io::Error>) {
        let outcome = error.map(DialError::from);
        let label = outcome.map_or("connected", DialError::as_label);
        if let Some(since) = since {
            let took = since.elapsed().as_secs_f64();
            self.metrics.dial.with_label_values(&[label]).observe(took);
        }
        match (outcome, error) {
            (Some(DialError::Local), Some(error)) => warn!(%address, %error, "cannot dial"),
            (Some(DialError::Loop), _) => {
                if self.penalise(address) {
                    error!(%address, "--upstream-addr leads back to this proxy's own listener");
                }
            }
            (Some(_), Some(error)) => {
                debug!(%address, %error, "upstream address failed");
                self.penalise(address);
            }
            _ => {
                if self.health().penalties.remove(&address).is_some() {
                    info!(%address, "upstream address answers again");
                }
            }
        }
    }

    fn note_silence(&self, address: SocketAddr, since: Instant) {
        let label = DialError::TimedOut.as_label();
        self.metrics.dial.with_label_values(&[label]).observe(since.elapsed().as_secs_f64());
        self.penalise(address);
    }

    /// Tries `address` last for a while; true if that is news.
    fn penalise(&self, address: SocketAddr) -> bool {
        let until = Instant::now() + PENALTY;
        let is_news = self.health().penalties.insert(address, until).is_none();
        if is_news {
            warn!(%address, "upstream address failed; it is tried last for a while");
        }
        is_news
    }

    fn note_contact(&self, answered: bool) {
        self.metrics.upstream_reachable.set(i64::from(answered));
        self.health().contact = Some((Instant::now(), answered));
    }

    fn recent_contact(&self) -> Option<bool> {
        let (when, answered) = self.health().contact?;
        // Bad news is asked again soon, so that recovery shows at once.
        let holds = if answered { CONTACT_HOLDS } else { CONTACT_HOLDS / 10 };
        (when.elapsed() < holds).then_some(answered)
    }

    fn health(&self) -> std::sync::MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    fn upstream(addresses: &[SocketAddr]) -> Upstream {
        let hosts = addresses.iter().map(|a| HostPort { host: Host::Ip(a.ip()), port: a.port() });
        let metrics = Arc::new(Metrics::new().expect("registers"));
        let listening = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 1);
        let hosts = UpstreamAddrs(hosts.collect());
        Upstream::new(&hosts, Duration::from_secs(5), listening, Eventually::default(), metrics)
    }

    #[tokio::test]
    async fn an_upstream_that_is_this_proxy_is_not_even_dialled() {
        let (ours, address) = listener();
        ours.set_nonblocking(true).expect("a listener");
        for listening in [address, SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port())] {
            let mut upstream = upstream(&[address]);
            upstream.listening = listening;
            assert_eq!(upstream.connect(None).await.err(), Some(DialError::Loop));
            assert!(!upstream.answers().await);
        }
        let came = ours.accept().map_err(|error| error.kind());
        assert!(matches!(came, Err(io::ErrorKind::WouldBlock)), "{came:?}");
        let mut upstream = upstream(&[address]);
        upstream.listening = SocketAddr::new(Ipv4Addr::new(127, 0, 0, 2).into(), address.port());
        upstream.connect(None).await.expect("the same port of another address is fine");
    }

    #[tokio::test]
    async fn where_the_kernel_does_not_tell_one_connection_to_ourselves_is_enough() {
        let (ours, address) = listener();
        ours.set_nonblocking(true).expect("a listener");
        let mut upstream = upstream(&[address]);
        upstream.listening = address;
        let socket = socket::Socket::connect(address, |_| ()).await.expect("connects");
        ours.accept().expect("the connection");
        upstream.unless_own(address, socket).expect_err("our own");
        let (is_own, until) = upstream.health().own[&address];
        assert!(is_own && until > Instant::now() + OWN_HOLDS);
        assert_eq!(upstream.connect(None).await.err(), Some(DialError::Loop));
        let came = ours.accept().map_err(|error| error.kind());
        assert!(matches!(came, Err(io::ErrorKind::WouldBlock)), "{came:?}");
    }

    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("binds");
        let address = listener.local_addr().expect("bound");
        (listener, address)
    }

    /// An address where nobody listens.
    fn closed() -> SocketAddr {
        listener().1
    }

    #[tokio::test]
    async fn a_failed_address_is_tried_last_and_forgiven_when_it_answers() {
        let (_open, open) = listener();
        let dead = closed();
        let upstream = upstream(&[dead, open]);
        let (_, used) = upstream.connect(None).await.expect("the second answers");
        assert_eq!(used, open);
        let order = upstream.candidates(Instant::now(), Instant::now() + STAGGER, false).await;
        assert_eq!(order, [open, dead]);
        let _revived = TcpListener::bind(dead).expect("binds");
        upstream.note_attempt(dead, None, None);
        let order = upstream.candidates(Instant::now(), Instant::now() + STAGGER, false).await;
        assert_eq!(order, [dead, open]);
    }

    #[tokio::test]
    async fn with_every_address_penalised_all_are_tried() {
        let (_open, open) = listener();
        let upstream = upstream(&[open]);
        upstream.penalise(open);
        upstream.connect(None).await.expect("it answers");
        assert!(upstream.answers().await);
    }

    #[tokio::test]
    async fn a_name_without_an_answer_holds_nobody_up() {
        let (_open, open) = listener();
        let mut upstream = upstream(&[open]);
        let name = Name::new("never.invalid".to_owned(), Arc::clone(&upstream.metrics));
        // As if a question were under way that no server answers.
        let _asking = name.block_questions().await;
        upstream.entries.insert(0, Entry { host: Source::Name(name), port: open.port() });
        let (_, used) = upstream.connect(None).await.expect("the address answers");
        assert_eq!(used, open);
    }

    #[tokio::test]
    async fn a_shortage_of_this_host_says_nothing_about_the_upstream() {
        let (_open, open) = listener();
        let upstream = upstream(&[open]);
        upstream.connect(None).await.expect("it answers");
        let contact = upstream.recent_contact();
        let error = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
        upstream.note_attempt(open, None, Some(&error));
        assert_eq!(upstream.recent_contact(), contact);
        assert!(upstream.health().penalties.is_empty());
    }

    #[tokio::test]
    async fn the_most_telling_error_is_reported() {
        let upstream = upstream(&[closed(), closed()]);
        assert_eq!(upstream.connect(None).await.err(), Some(DialError::Refused));
        assert!(!upstream.answers().await);
    }
}

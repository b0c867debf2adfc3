//! Engine `packet`: established connections relayed by the kernel, segment by segment.
//!
//! A connection begins like any other: accepted, dialled, relayed through userspace. Once it has
//! lived for a moment, [`switch`] looks for an instant in which nothing is in our hands, and from
//! then on tc programs rewrite each segment and send it on: both ends have one TCP conversation
//! with each other, and no socket, thread or memory of this process has a part in it.
//!
//! - [`object`]: the programs and their maps; [`pins`]: where they outlive a process; [`table`]: the
//!   records of switched connections
//! - [`paths`]: devices that carry the programs ([`devices`], [`attach`]) and ways ([`routes`])
//! - [`eligible`]: whether two connections can be joined; [`switch`]: how it is done
//! - [`volume`]: how many bytes that is
//! - [`ends`]: what happens to a switched connection later, [`quiet`]: also if nothing does; [`inject`]: segments in its name
//! - [`selftest`]: two connections of our own, before anybody else's; [`eventually`]: until then
//! - [`segments`]: that neither end sends more at once than the other takes
//! - [`ports`], [`conntrack`], [`tracking`]: that nobody else gets what a switched connection uses

pub mod attach;
pub mod conntrack;
pub mod devices;
pub mod eligible;
pub mod ends;
pub mod eventually;
pub mod grace;
pub mod inject;
pub mod netlink;
pub mod object;
pub mod paths;
pub mod pins;
pub mod ports;
pub mod quiet;
mod record;
pub mod routes;
pub mod segments;
pub mod selftest;
pub mod switch;
pub mod table;
pub mod tcp;
pub mod tracking;
pub mod volume;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::maps::{MapData, PerCpuArray, RingBuf};
use proxy_common::{
    CLIENT, Counter, Half, PHASE_SETTLED, Record, SEEN_SYN_ACK, SERVER, Seen, TcpOptions, Tuple,
    WATCH_LOCAL, WATCH_REMOTE, names,
};
use rustix::io::Errno;
use socket2::{SockAddr, SockRef};
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedRwLockReadGuard, RwLock, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::config::PacketConfig;
use crate::control::{Connections, Row, Which};
use crate::metrics::Metrics;
use crate::relay::{Moment, Moved};
use crate::socket::Socket;
use conntrack::Conntrack;
use eligible::Ineligible;
use eventually::Eventually;
use grace::Grace;
use inject::{Injector, Segment};
use netlink::Watch;
use object::{Hold, Object, Watched};
use paths::Paths;
use pins::Pins;
use ports::{Port, PortPool};
use segments::Segments;
use table::{Slot, Table};
use tracking::Tracking;
use volume::Volume;

/// When a connection is looked at: short ones end before either. Connect-request-close takes well
/// under a millisecond on a fast network, and a `kubectl get` with its TLS handshake some ten.
pub const FIRST_LOOK: Moment = Moment { after: Duration::from_millis(20), bytes: 256 * 1024 };

/// How long after an attempt that may succeed later.
pub const NEXT_LOOK: Duration = Duration::from_millis(500);

/// Attempts for one connection. What is still busy after so many is left alone.
pub const LOOKS: u8 = 6;

/// Original destinations that clients may teach us to watch.
const LEARNED: usize = 256;

/// The engine.
pub struct Packet {
    table: Table,
    grace: Grace,
    ports: PortPool,
    injector: Injector,
    max_rtt: Duration,
    keepalive: Option<Duration>,
    seen: Mutex<aya::maps::HashMap<MapData, Tuple, Seen>>,
    watched: Mutex<(Watched, HashSet<SocketAddr>)>,
    machinery: Mutex<Machinery>,
    segments: Mutex<Segments>,
    /// See [`segments::is_probing`].
    is_probing: bool,
    tracking: Arc<Tracking>,
    /// Names that switched connections have only behind address translation.
    guards: Mutex<HashMap<u32, Tuple>>,
    counters: PerCpuArray<MapData, u64>,
    volume: Volume,
    metrics: Arc<Metrics>,
    places: Arc<Semaphore>,
    /// Connections taken over beyond `--max-connections`: so many of those that end free no place.
    owed: AtomicUsize,
    is_pinned: bool,
    /// Held until both are a successor's: see [`pins::be_the_one`].
    hold: Mutex<(Option<Pins>, Option<std::fs::File>)>,
    /// Read by whoever changes records; written once, when they are a successor's.
    turn: Arc<RwLock<()>>,
    leaving: CancellationToken,
}

struct Machinery {
    ebpf: Ebpf,
    paths: Paths,
    _hold: Hold,
}

/// Gives reserved ports back when it is dropped, if so.
struct GiveBack(bool);

impl Drop for GiveBack {
    fn drop(&mut self) {
        if self.0
            && let Err(error) = ports::release_reservation(None)
        {
            tracing::warn!(%error, "reserved ports stay reserved");
        }
    }
}

/// What [`ends::run`] waits on.
pub struct News {
    events: AsyncFd<RingBuf<MapData>>,
    watch: Watch,
}

impl std::fmt::Debug for Packet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packet").field("is_pinned", &self.is_pinned).finish_non_exhaustive()
    }
}

impl Packet {
    /// Loads and attaches everything, and takes over what an earlier process has switched. Must
    /// be called from within a runtime. `namespace` is the lock of [`pins::be_the_one`].
    ///
    /// # Errors
    /// What the kernel or missing privileges do not allow: the engine cannot work at all then.
    pub fn start(
        config: &PacketConfig,
        namespace: std::fs::File,
        listening: SocketAddr,
        max_connections: usize,
        places: Arc<Semaphore>,
        metrics: Arc<Metrics>,
    ) -> Result<(Arc<Self>, News)> {
        let grace = Grace::start().context("membarrier(2)")?;
        let injector = Injector::new().context("raw sockets (capability NET_RAW)")?;
        // Opened before devices and routes are looked at, so that no change falls in between.
        let watch = Watch::open().context("netlink")?;
        let connections = u32::try_from(max_connections).unwrap_or(u32::MAX).max(16);
        let pins = match config.bpffs.as_deref().map(Pins::open).transpose() {
            Ok(pins) => pins,
            Err(pins::Failure::Absent(reason)) => {
                tracing::warn!(
                    reason,
                    "no bpffs for pins: connections relayed by the kernel end with this process"
                );
                None
            }
            Err(failure) => return Err(failure.into()),
        };
        let directory = pins.as_ref().map(Pins::directory);
        pins::refuse_foreign(directory)?;
        let object = Object::load(directory, connections)?;
        let Object { mut ebpf, table, events, seen, watched, counters, hold } = object;
        // What outlives us must be found again; else it is enough to recognise it.
        let note = directory.and_then(|_| ports::make_note());
        let ports = PortPool::reserve(note.as_deref()).context("local ports")?;
        let mut unless_started = GiveBack(directory.is_none());
        if ports.has_reserved() && ports.left() < max_connections {
            tracing::warn!(
                ports = ports.left(),
                max_connections,
                "not every connection can have a local port that the kernel gives to nobody else: \
                 those without stay in userspace (net.ipv4.ip_local_port_range can be widened)"
            );
        }
        let paths = Paths::open(&mut ebpf, config.attach, directory);
        let paths = paths.context("attaching to devices")?;
        let runtime = tokio::runtime::Handle::current();
        let conntrack = Conntrack::open().unwrap_or_default();
        let tracking = Tracking::new(conntrack, tracking::PERIOD, runtime);
        let packet = Arc::new(Self {
            table,
            grace,
            ports,
            injector,
            max_rtt: config.max_rtt,
            keepalive: config.keepalive,
            seen: Mutex::new(seen),
            watched: Mutex::new((watched, HashSet::new())),
            segments: Mutex::default(),
            is_probing: segments::is_probing(),
            machinery: Mutex::new(Machinery { ebpf, paths, _hold: hold }),
            tracking: Arc::new(tracking),
            guards: Mutex::default(),
            counters,
            volume: Volume::default(),
            metrics,
            places,
            owed: AtomicUsize::new(0),
            is_pinned: pins.is_some(),
            hold: Mutex::new((pins, Some(namespace))),
            turn: Arc::default(),
            leaving: CancellationToken::new(),
        });
        packet.watch(listening, WATCH_LOCAL);
        let largest_mtu = lock(&packet.machinery).paths.largest_mtu();
        lock(&packet.segments).note_largest_mtu(largest_mtu);
        packet.take_over().context("taking over")?;
        unless_started.0 = false;
        Ok((packet, News { events, watch }))
    }

    /// Connections that an earlier process has switched are ours from here on; what it left half
    /// done is ended. ([`ends::run`] begins with those that have ended meanwhile.)
    fn take_over(self: &Arc<Self>) -> std::io::Result<()> {
        let mut guards = self.table.sweep_flows();
        let (mut adopted, mut left) = (0_u32, Vec::new());
        for slot in self.table.in_use() {
            match self.table.read(slot) {
                Some(record) if record.phase == PHASE_SETTLED => {
                    self.ports.claim(record.halves[SERVER].local.port);
                    self.note_guard(slot, guards.remove(&slot.index));
                    if record.halves[CLIENT].told == 0 {
                        self.volume.adopted(&record);
                        self.take_place();
                        self.count_live(1);
                    }
                    adopted += 1;
                }
                Some(record) => {
                    // Findable: the process ended in the middle of the switch, and what was in its
                    // hands is lost. Not findable: all was over but the last grace period.
                    if self.table.unlink(slot, guards.remove(&slot.index)) {
                        self.reset_both(&record);
                        self.tracking.untrack(tracked(&record));
                    }
                    left.push(slot);
                }
                None => {}
            }
        }
        if !left.is_empty() {
            grace::synchronize()?;
            self.table.reuse(left.iter().copied());
        }
        if adopted > 0 || !left.is_empty() {
            tracing::info!(adopted, reset = left.len(), "took over from an earlier process");
        }
        if adopted > 0 {
            self.keep_tracked();
        }
        Ok(())
    }

    fn take_place(&self) {
        match self.places.try_acquire() {
            Ok(place) => place.forget(),
            Err(_) => {
                self.owed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn free_place(&self) {
        let less = |owed: usize| owed.checked_sub(1);
        if self.owed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_err() {
            self.places.add_permits(1);
        }
    }

    /// Leaves the switched connections to a successor: from here on nothing is switched, and no
    /// record is changed any more. Ends when that is so; pins can be opened by another process
    /// then. Without pins there is no successor, and nothing happens
    /// but that the listeners may be closed.
    pub async fn hand_over(&self) {
        lock(&self.segments).let_go();
        if !self.is_pinned {
            return;
        }
        self.leaving.cancel();
        // Waits for what is under way. Never given back.
        std::mem::forget(Arc::clone(&self.turn).write_owned().await);
        *lock(&self.hold) = (None, None);
    }

    /// Ends when a successor may come.
    async fn left(&self) {
        self.leaving.cancelled().await;
    }

    /// Leave to change records; none once they are a successor's.
    fn turn(&self) -> Option<OwnedRwLockReadGuard<()>> {
        Arc::clone(&self.turn).try_read_owned().ok()
    }

    /// Whether switched connections outlive this process.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.is_pinned
    }

    /// Gives back what was taken from the host for as long as connections live without a socket;
    /// for the end of a process that leaves none.
    pub fn release_ports(&self) {
        drop(GiveBack(true));
    }

    /// Switched connections that have not ended.
    #[must_use]
    pub fn live(&self) -> usize {
        let slots = self.table.in_use().into_iter();
        let records = slots.filter_map(|slot| self.table.read(slot));
        records.filter(|record| record.halves[CLIENT].told == 0).count()
    }

    fn table(&self) -> &Table {
        &self.table
    }

    fn grace(&self) -> &Grace {
        &self.grace
    }

    fn keepalive(&self) -> Option<Duration> {
        self.keepalive
    }

    fn max_rtt(&self) -> Duration {
        self.max_rtt
    }

    /// The handshake of the connection that `from` opened.
    fn seen(&self, from: SocketAddr, to: SocketAddr) -> Option<Seen> {
        let tuple = Tuple { source: from.into(), destination: to.into() };
        lock(&self.seen).get(&tuple, 0).ok()
    }

    /// Has handshakes kept of clients that ask for `address`, which this node's netfilter translates
    /// to ours.
    pub fn watch_translated(&self, address: SocketAddr) {
        self.watch(address, WATCH_LOCAL);
    }

    /// Has the programs keep handshakes with `end`. Whether that is new.
    fn watch(&self, end: SocketAddr, role: u32) -> bool {
        let mut watched = lock(&self.watched);
        let (map, known) = &mut *watched;
        let is_new = known.len() < LEARNED && known.insert(end);
        if is_new {
            // A full map means that its connections are not switched; nothing else.
            let _ = map.add(end, role);
        }
        is_new
    }

    /// Has clients of these listeners told what the servers take.
    pub fn bound_segments_of(&self, listeners: Vec<OwnedFd>) {
        lock(&self.segments).tell(listeners);
    }

    /// Has handshakes with an upstream address kept, and finds out what the way there takes: the
    /// earlier, the fewer clients are told without it.
    pub fn expect_upstream(&self, address: SocketAddr) {
        if self.watch(address, WATCH_REMOTE) {
            let hop = lock(&self.machinery).paths.towards_server(address.ip());
            lock(&self.segments).note_way(address, hop);
        }
    }

    /// What a client says that it takes at once, if that is known; for [`Self::prepare_upstream`].
    #[must_use]
    pub fn segment_of(&self, client: &Socket) -> Option<u16> {
        if self.is_probing { None } else { segments::of_client(client) }
    }

    /// What a server says that it takes at once.
    fn note_server(&self, server: SocketAddr, seen: &Seen) {
        let options = seen.server.options;
        if seen.state == SEEN_SYN_ACK && options.has(TcpOptions::HAS_MSS) {
            lock(&self.segments).note_announced(server, options.mss);
        }
    }

    /// Has handshakes with an upstream address kept, and gives the socket that will be connected
    /// to it a port that nobody else uses while the connection lives on without a socket. The
    /// server is told to send no more at once than the client takes.
    pub fn prepare_upstream(
        &self,
        socket: &SockRef<'_>,
        address: SocketAddr,
        client: Option<u16>,
    ) -> Option<Port> {
        self.expect_upstream(address);
        let bound = client.and_then(|client| lock(&self.segments).bound(address, client));
        if let Some(bytes) = bound {
            // If it is refused the connection stays in userspace; nothing else.
            let _ = tcp::bound_segments(&**socket, bytes);
        }
        // Some ports are taken by others who asked for them by number.
        for _ in 0..4 {
            let port = self.ports.take()?;
            let any = match address {
                SocketAddr::V4(_) => SocketAddr::from(([0; 4], port.number())),
                SocketAddr::V6(_) => SocketAddr::from(([0; 16], port.number())),
            };
            // Without it a port whose last connection is in TIME_WAIT could not be bound.
            socket.set_reuse_address(true).ok()?;
            match socket.bind(&SockAddr::from(any)) {
                Ok(()) => return Some(port),
                Err(error) if error.raw_os_error() == Some(Errno::ADDRINUSE.raw_os_error()) => {}
                Err(_) => return None,
            }
        }
        None
    }

    /// One end as the record has it: where its segments arrive, and where those to it leave.
    fn half(&self, peer: SocketAddr, local: SocketAddr, seen: &Seen) -> Result<Half, Ineligible> {
        let mut machinery = lock(&self.machinery);
        let paths = &mut machinery.paths;
        if paths.has_ipsec() {
            return Err(Ineligible::Ipsec);
        }
        // Link-local addresses mean something else on each device.
        let is_link_local = match peer.ip() {
            std::net::IpAddr::V4(ip) => ip.is_link_local(),
            std::net::IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        if is_link_local || !paths.is_fit(seen.ifindex) {
            return Err(Ineligible::Device);
        }
        let hop = paths.towards(peer.ip(), local.ip()).ok_or(Ineligible::Device)?;
        Ok(Half {
            remote: peer.into(),
            local: local.into(),
            mtu: u16::try_from(hop.mtu).unwrap_or(0),
            in_ifindex: seen.ifindex,
            out_ifindex: hop.ifindex,
            ..Half::default()
        })
    }

    fn note_guard(&self, slot: Slot, guard: Option<Tuple>) {
        if let Some(tuple) = guard {
            lock(&self.guards).insert(slot.index, tuple);
        }
    }

    fn note_switched(self: &Arc<Self>, slot: Slot, took: Duration, moved: Moved) {
        self.metrics.packet_switch.observe(took.as_secs_f64());
        self.volume.begins(moved);
        self.count_live(1);
        if let Some(record) = self.table.read(slot) {
            self.tracking.track(tracked(&record));
        }
        self.keep_tracked();
    }

    /// Has conntrack's entries kept, as long as there are switched connections.
    fn keep_tracked(self: &Arc<Self>) {
        let packet = Arc::clone(self);
        let living = move || {
            let slots = packet.table.in_use().into_iter();
            slots.filter_map(|slot| packet.table.read(slot)).map(|r| tracked(&r)).collect()
        };
        self.tracking.keep(living, self.leaving.clone());
    }

    fn count_live(&self, change: i64) {
        self.metrics.relaying.with_label_values(&["packet"]).add(change);
    }

    /// Counts a connection that stays in userspace, by reason.
    pub fn note_ineligible(&self, reason: Ineligible) {
        self.metrics.packet_ineligible.with_label_values(&[reason.as_label()]).inc();
    }

    /// The switch failed after rewriting had begun: both ends are reset.
    fn abandon(self: &Arc<Self>, slot: Slot) {
        if let Some(record) = self.table.read(slot) {
            self.release(slot);
            self.reset_both(&record);
        }
    }

    /// The connection is over: its tuples and its slot are free for others, once no program can
    /// be at work on them any more. False if somebody else has seen to that: a slot that was given
    /// back twice would be two connections'.
    fn release(self: &Arc<Self>, slot: Slot) -> bool {
        let guard = lock(&self.guards).get(&slot.index).copied();
        let is_first = self.table.unlink(slot, guard);
        if is_first {
            lock(&self.guards).remove(&slot.index);
            self.recycle(slot);
        }
        is_first
    }

    /// Has a slot that leads nowhere any more used again, in due time.
    fn recycle(self: &Arc<Self>, slot: Slot) {
        // Without it the slot is left to the successor, who finds it unlinked.
        let Some(turn) = self.turn() else { return };
        let packet = Arc::clone(self);
        tokio::spawn(async move {
            let _turn = turn;
            if packet.grace.pass().await {
                packet.table.reuse([slot]);
            }
        });
    }

    /// Ends a settled connection's bookkeeping.
    fn retire(self: &Arc<Self>, slot: Slot, record: &Record) {
        if self.release(slot) {
            self.ports.give_back(record.halves[SERVER].local.port);
            self.tracking.untrack(tracked(record));
        }
    }

    /// RST to both ends, with the numbers that they expect. Where an end has moved on meanwhile, it
    /// asks back, and the stack, which knows the connection no more, answers with the right one.
    fn reset_both(&self, record: &Record) {
        reset_both(&self.injector, record);
    }

    /// Resets a connection.
    fn kill(self: &Arc<Self>, slot: Slot, reason: &'static str) -> bool {
        let Some(_turn) = self.turn() else { return false };
        let Some(record) = self.table.read(slot).filter(|record| record.phase == PHASE_SETTLED)
        else {
            return false;
        };
        // One that has ended by itself is told of already, and its tuples are kept for a while.
        let is_alive = self.tell_end(slot, &record, reason);
        self.retire(slot, &record);
        self.reset_both(&record);
        is_alive
    }

    /// Resets all switched connections.
    pub fn kill_all(self: &Arc<Self>, reason: &'static str) -> usize {
        self.table.in_use().into_iter().filter(|slot| self.kill(*slot, reason)).count()
    }

    /// Tells the access log, once, and gives the connection's place to another: what is kept of it
    /// from here on is only remembered. False if it was told.
    fn tell_end(&self, slot: Slot, record: &Record, reason: &'static str) -> bool {
        if !self.table.mark_told(slot) {
            return false;
        }
        self.volume.ended(record);
        self.count_live(-1);
        self.free_place();
        let [client, server] = &record.halves;
        crate::access::switched(
            &self.metrics,
            client.remote.into(),
            server.remote.into(),
            (client.bytes, server.bytes),
            Duration::from_millis(now_ms().saturating_sub(record.accepted_ms)),
            reason,
        );
        true
    }

    /// Looks at devices and routes again, and corrects the records of connections whose way has
    /// changed.
    fn refresh(&self) {
        let mut machinery = lock(&self.machinery);
        let Machinery { ebpf, paths, .. } = &mut *machinery;
        match paths.refresh(ebpf) {
            Ok(lost) => {
                self.metrics.packet_reattached.inc_by(lost as u64);
            }
            Err(error) => return tracing::warn!(%error, "devices cannot be listed"),
        }
        let mut segments = lock(&self.segments);
        segments.note_largest_mtu(paths.largest_mtu());
        for server in segments.servers() {
            let hop = paths.towards_server(server.ip());
            segments.note_way(server, hop);
        }
        drop(segments);
        for slot in self.table.in_use() {
            let Some(record) = self.table.read(slot) else { continue };
            for (side, half) in record.halves.iter().enumerate() {
                let (peer, local): (SocketAddr, SocketAddr) =
                    (half.remote.into(), half.local.into());
                if let Some(hop) = paths.towards(peer.ip(), local.ip()) {
                    let mtu = u16::try_from(hop.mtu).unwrap_or(0);
                    self.table.set_way(slot, side, hop.ifindex, mtu);
                }
            }
        }
    }

    /// Reads the programs' counters.
    fn count(&self, counter: Counter) -> u64 {
        self.counters.get(&(counter as u32), 0).map(|values| values.iter().sum()).unwrap_or(0)
    }

    /// Brings the metrics up to what the programs have counted. To be called before they are read.
    pub fn refresh_metrics(&self) {
        for (label, counter) in [
            ("guarded", Counter::Guarded),
            ("misplaced", Counter::Misplaced),
            ("unfit", Counter::Unfit),
            ("too_big", Counter::TooBig),
            ("event_lost", Counter::EventLost),
        ] {
            let metric = self.metrics.packet_oddities.with_label_values(&[label]);
            metric.inc_by(self.count(counter).saturating_sub(metric.get()));
        }
        let slots = self.table.in_use().into_iter();
        let living = slots.filter_map(|slot| self.table.read(slot));
        let is_counted =
            |record: &Record| record.phase == PHASE_SETTLED && record.halves[CLIENT].told == 0;
        let [up, down] = self.volume.news(living.filter(is_counted));
        self.metrics.bytes_up.inc_by(up);
        self.metrics.bytes_down.inc_by(down);
        let room = self.table.room().min(self.ports.left());
        self.metrics.packet_room.set(i64::try_from(room).unwrap_or(i64::MAX));
    }
}

/// The engine for those who ask about its connections.
#[derive(Debug, Clone)]
pub struct Handle(pub Eventually, pub tokio::runtime::Handle);

impl Connections for Handle {
    fn list(&self) -> Vec<Row> {
        let Some(packet) = self.0.get() else { return Vec::new() };
        let now_ns = tcp::monotonic_ns();
        let slots = packet.table.in_use().into_iter();
        let rows = slots.filter_map(|slot| {
            let record = packet.table.read(slot)?;
            let [client, server] = &record.halves;
            let seen = client.seen_ns.max(server.seen_ns);
            let age = now_ms().saturating_sub(record.accepted_ms) as f64 / 1e3;
            let is_alive = record.phase == PHASE_SETTLED && client.told == 0;
            is_alive.then(|| Row {
                id: slot.to_string(),
                client: client.remote.into(),
                upstream: server.remote.into(),
                engine: "packet",
                age_seconds: age,
                idle_seconds: match seen {
                    0 => age,
                    seen => now_ns.saturating_sub(seen) as f64 / 1e9,
                },
                bytes_up: client.bytes,
                bytes_down: server.bytes,
            })
        });
        rows.collect()
    }

    fn kill(&self, which: &Which) -> usize {
        let Some(packet) = self.0.get() else { return 0 };
        let _entered = self.1.enter();
        let rows = self.list().into_iter();
        let meant = rows.filter(|row| which.covers(&row.id, row.client));
        meant
            .filter_map(|row| row.id.parse().ok())
            .filter(|slot| packet.kill(*slot, "killed"))
            .count()
    }
}

fn reset_both(injector: &Injector, record: &Record) {
    for half in &record.halves {
        // An end that cannot be reached is told when it next sends something.
        let _ = injector.reset(&Segment {
            source: half.local.into(),
            destination: half.remote.into(),
            sequence: half.acked,
            acknowledgement: half.sent,
            window: 0,
            timestamps: None,
        });
    }
}

/// Resets every connection in the records that are pinned in `directory`, which no process uses,
/// and has conntrack forget them. How many there were.
///
/// # Errors
/// The pins are not what they should be, or the kernel refuses.
pub fn end_all_pinned(directory: &std::path::Path) -> Result<usize> {
    let open = |name: &str| {
        let path = directory.join(name);
        path.exists().then(|| MapData::from_pin(&path).with_context(|| name.to_owned())).transpose()
    };
    let maps = (open(names::RECORDS)?, open(names::FLOWS)?, open(names::OWN_PORTS)?);
    let (Some(records), Some(flows), Some(ports)) = maps else {
        return Ok(0);
    };
    let table = Table::new(records, flows, ports)?;
    let injector = Injector::new().context("raw sockets (capability NET_RAW)")?;
    let mut conntrack = Conntrack::open().unwrap_or_default();
    let mut guards = table.sweep_flows();
    let mut ended = 0;
    for slot in table.in_use() {
        let Some(record) = table.read(slot) else { continue };
        if !table.unlink(slot, guards.remove(&slot.index)) {
            continue;
        }
        // Those that have ended are only remembered for a while.
        if record.halves[CLIENT].told == 0 && !record::is_over(&record) {
            reset_both(&injector, &record);
            ended += 1;
        }
        for tuple in tracked(&record) {
            if let Some(conntrack) = &mut conntrack {
                let _ = conntrack.delete(tuple);
            }
        }
    }
    Ok(ended)
}

/// What conntrack may know the connection by.
fn tracked(record: &Record) -> tracking::Names {
    let [client, server] = &record.halves;
    [(client.remote, client.local), (server.local, server.remote)].map(|(source, destination)| {
        conntrack::Tuple { source: source.into(), destination: destination.into() }
    })
}

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

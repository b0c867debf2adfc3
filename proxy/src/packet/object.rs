//! The kernel programs of the engine: loaded, connected, pinned.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, ProgramArray, RingBuf, SockMap};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{ProgramError, SchedClassifier, SkLookup};
use aya::{Ebpf, EbpfLoader};
use proxy_common::{Endpoint, Event, HOOK_EGRESS, HOOK_INGRESS, Seen, Tuple, names, port_bit};
use tokio::io::unix::AsyncFd;

use super::table::Table;
use super::{pins, tcp};

/// The programs, as proxy/build.rs made them.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/steward-ebpf"));

/// Maps that a later process takes over.
const SHARED: [&str; 10] = [
    names::STAGES,
    names::FLOWS,
    names::OWN_PORTS,
    names::RECORDS,
    names::EVENTS,
    names::GUARD_SOCKETS,
    names::WATCHED,
    names::WATCHED_PORTS,
    names::SEEN,
    names::COUNTERS,
];

/// The loaded object, and all that it holds in the kernel.
pub struct Object {
    /// Programs for devices.
    pub ebpf: Ebpf,
    /// Switched connections.
    pub table: Table,
    /// What the programs tell.
    pub events: AsyncFd<RingBuf<MapData>>,
    /// Handshakes that went by.
    pub seen: HashMap<MapData, Tuple, Seen>,
    /// Which endpoints are watched.
    pub watched: Watched,
    /// What the programs count.
    pub counters: PerCpuArray<MapData, u64>,
    /// What keeps the programs at work: they are so as long as this is held (or its pins are there).
    pub hold: Hold,
}

/// See [`Object::hold`].
pub struct Hold {
    _guard: Guard,
    /// The kernel empties this array when its last descriptor and pin are gone.
    _stages: ProgramArray<MapData>,
}

impl Object {
    /// Loads and connects everything; nothing is attached to a device yet. With `pins`, maps that
    /// are pinned there are used as they are, also if `connections` was another number then. Must
    /// be called from within a runtime.
    ///
    /// # Errors
    /// What the kernel refuses, with the step.
    pub fn load(pins: Option<&Path>, connections: u32) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        loader
            .override_global(aya_log::LEVEL, &0u8, true)
            .map_max_entries(names::RECORDS, connections)
            .map_max_entries(names::FLOWS, connections.saturating_mul(2));
        if let Some(pins) = pins {
            for name in SHARED {
                loader.map_pin_path(name, pins.join(name));
            }
        }
        let mut ebpf = loader.load(OBJECT).context("loading the kernel programs' maps")?;
        let [records, flows, ports] = [names::RECORDS, names::FLOWS, names::OWN_PORTS];
        let table =
            Table::new(data(&mut ebpf, records)?, data(&mut ebpf, flows)?, data(&mut ebpf, ports)?)
                .context("mapping the records of switched connections")?;
        let events = RingBuf::try_from(Map::RingBuf(data(&mut ebpf, names::EVENTS)?))?;
        let seen = HashMap::try_from(Map::LruHashMap(data(&mut ebpf, names::SEEN)?))?;
        let watched = Watched::take(&mut ebpf)?;
        let counters = PerCpuArray::try_from(Map::PerCpuArray(data(&mut ebpf, names::COUNTERS)?))?;
        // The guard first: from the moment that segments are rewritten, strays must be caught.
        let guard = Guard::set_up(&mut ebpf, pins).context("the guard")?;
        let hold = Hold { _guard: guard, _stages: connect_stages(&mut ebpf)? };
        // SAFETY: the ring buffer owns its descriptor, always the same one, and the `AsyncFd` owns
        // the ring buffer until it is dropped; it is never taken out.
        let events = unsafe { AsyncFd::register(events) }?;
        Ok(Self { ebpf, table, events, seen, watched, counters, hold })
    }
}

/// Reads one event, if there is one.
pub fn next_event(events: &mut RingBuf<MapData>) -> Option<Event> {
    loop {
        let record = events.next()?;
        if let Some(event) = Event::from_record(&record) {
            return Some(event);
        }
    }
}

fn data(ebpf: &mut Ebpf, name: &'static str) -> Result<MapData> {
    let map = ebpf.take_map(name).with_context(|| format!("the object lacks map {name}"))?;
    Ok(match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::ProgramArray(data)
        | Map::RingBuf(data)
        | Map::SockMap(data) => data,
        _ => anyhow::bail!("map {name} is of another kind"),
    })
}

/// A program that the kernel does not load.
#[derive(Debug, thiserror::Error)]
#[error("loading program {name}")]
pub struct Refused {
    /// The program.
    pub name: &'static str,
    /// What the verifier says about it.
    pub log: String,
    #[source]
    error: io::Error,
}

impl Refused {
    /// Takes the verifier's log, many lines of it, out of the error's text.
    fn or_other(name: &'static str) -> impl FnOnce(ProgramError) -> anyhow::Error {
        move |error| match error {
            ProgramError::LoadError { io_error: error, verifier_log } => {
                Self { name, log: verifier_log.to_string(), error }.into()
            }
            other => anyhow::Error::new(other).context(format!("loading program {name}")),
        }
    }
}

/// Loads the programs, and puts the real ones behind the gates. A process before us had its own
/// there: from this moment on its gates lead to ours.
fn connect_stages(ebpf: &mut Ebpf) -> Result<ProgramArray<MapData>> {
    let mut stages = ProgramArray::try_from(Map::ProgramArray(data(ebpf, names::STAGES)?))?;
    let all =
        [names::PACKET_INGRESS, names::PACKET_EGRESS, names::GATE_INGRESS, names::GATE_EGRESS];
    for name in all {
        let program = ebpf.program_mut(name).with_context(|| format!("the object lacks {name}"))?;
        let program: &mut SchedClassifier = program.try_into()?;
        program.load().map_err(Refused::or_other(name))?;
    }
    for (hook, name) in [(HOOK_EGRESS, all[1]), (HOOK_INGRESS, all[0])] {
        let program: &SchedClassifier = ebpf.program(name).context("loaded above")?.try_into()?;
        stages.set(hook.into(), program.fd()?, 0)?;
    }
    Ok(stages)
}

/// Which endpoints' handshakes are kept.
pub struct Watched {
    ends: HashMap<MapData, Endpoint, u32>,
    ports: Array<MapData, u64>,
}

impl Watched {
    /// Takes its maps out of the object.
    ///
    /// # Errors
    /// They are not what they should be.
    pub fn take(ebpf: &mut Ebpf) -> Result<Self> {
        Ok(Self {
            ends: HashMap::try_from(Map::HashMap(data(ebpf, names::WATCHED)?))?,
            ports: Array::try_from(Map::Array(data(ebpf, names::WATCHED_PORTS)?))?,
        })
    }

    /// Has the programs keep handshakes with `end`, in this role.
    ///
    /// # Errors
    /// The map is full.
    pub fn add(&mut self, end: SocketAddr, role: u32) -> Result<(), aya::maps::MapError> {
        let (word, bit) = port_bit(end.port());
        let others = self.ports.get(&word, 0)?;
        if others & bit == 0 {
            self.ports.set(word, others | bit, 0)?;
        }
        self.ends.insert(Endpoint::from(end), role, 0)
    }
}

/// What swallows strays: a program of the socket lookup, and the listeners that it leads to.
pub struct Guard {
    _listeners: Vec<TcpListener>,
    _map: SockMap<MapData>,
    _link: Option<PinnedLink>,
}

impl Guard {
    fn set_up(ebpf: &mut Ebpf, pins: Option<&Path>) -> Result<Self> {
        let mut map = SockMap::try_from(Map::SockMap(data(ebpf, names::GUARD_SOCKETS)?))?;
        let mut listeners = Vec::new();
        let families =
            [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), (Ipv6Addr::LOCALHOST, 0).into()];
        for (index, address) in families.into_iter().enumerate() {
            let listener = match TcpListener::bind(address) {
                Ok(listener) => listener,
                // A host without IPv6 has no strays of it either.
                Err(_) if address.is_ipv6() => continue,
                Err(error) => return Err(error.into()),
            };
            tcp::drop_all(&listener)?;
            map.set(index as u32, &listener, 0)?;
            listeners.push(listener);
        }
        let program = ebpf.program_mut(names::GUARD).context("the object lacks the guard")?;
        let program: &mut SkLookup = program.try_into()?;
        program.load().map_err(Refused::or_other(names::GUARD))?;
        let namespace = std::fs::File::open("/proc/thread-self/ns/net")?;
        let link = program.attach(namespace)?;
        let link = match pins {
            // Unpinned, it is detached with its program.
            None => None,
            Some(directory) => {
                let link: FdLink = program.take_link(link)?.into();
                let (path, new) = (directory.join(pins::GUARD), directory.join(pins::NEW_GUARD));
                let _ = std::fs::remove_file(&new);
                let pinned = link.pin(&new)?;
                // Over the previous process's: its program is attached until ours is.
                std::fs::rename(&new, &path)?;
                Some(pinned)
            }
        };
        Ok(Self { _listeners: listeners, _map: map, _link: link })
    }
}

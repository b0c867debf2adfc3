//! The records of switched connections: one array that the kernel programs and we read and write
//! at the same time, and the map of tuples that leads to it.
//!
//! A slot's life: free, prepared (written, findable, not in use), live, settled, and free again
//! once a grace period has passed, after which no program can still be reading it.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use aya::maps::{Array, HashMap, MapData, MapError};
use proxy_common::{
    CLIENT, FlowRef, Half, PHASE_FREE, PHASE_LIVE, PHASE_PREPARED, PHASE_SETTLED, Record, SERVER,
    Tuple,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// All records.
pub struct Table {
    memory: Memory,
    flows: Mutex<Flows>,
    /// Where segments from servers lead. No two connections have one port.
    own_ports: Mutex<OwnPorts>,
    free: Mutex<Vec<u32>>,
    /// Programs that are loaded later refer to it by its descriptor.
    _records: MapData,
}

type Flows = HashMap<MapData, Tuple, FlowRef>;
type OwnPorts = Array<MapData, FlowRef>;

/// A slot's number and which of its uses is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot {
    /// Index of the record.
    pub index: u32,
    /// Its generation.
    pub generation: u32,
}

/// Why there is no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unprepared {
    /// No slot is free.
    Full,
    /// A tuple is taken, or the kernel is out of memory. The slot is not findable any more, and
    /// free again after a grace period and [`Table::reuse`].
    Refused(Slot),
}

impl std::fmt::Display for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.index, self.generation)
    }
}

impl std::str::FromStr for Slot {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (index, generation) = text.split_once('-').ok_or(())?;
        let number = |text: &str| text.parse().map_err(|_| ());
        Ok(Self { index: number(index)?, generation: number(generation)? })
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl Table {
    /// Maps the records into memory. Whoever had them before may have left some in use.
    ///
    /// # Errors
    /// mmap(2) refuses, or the map is of another kind.
    pub fn new(records: MapData, flows: MapData, own_ports: MapData) -> io::Result<Self> {
        let info = records.info().map_err(io::Error::other)?;
        let count = info.max_entries();
        let memory = Memory::of(&records, count)?;
        let flows = HashMap::try_from(aya::maps::Map::HashMap(flows)).map_err(io::Error::other)?;
        let flows = Mutex::new(flows);
        let ports = Array::try_from(aya::maps::Map::Array(own_ports)).map_err(io::Error::other)?;
        let own_ports = Mutex::new(ports);
        let table = Self { memory, flows, own_ports, free: Mutex::default(), _records: records };
        let free = (0..count).rev().filter(|&index| table.phase(index) == PHASE_FREE);
        *table.free() = free.collect();
        Ok(table)
    }

    /// How many more connections fit.
    pub fn room(&self) -> usize {
        self.free().len()
    }

    /// Slots in use, whoever took them.
    pub fn in_use(&self) -> Vec<Slot> {
        let slots = (0..self.memory.count).filter(|&index| self.phase(index) != PHASE_FREE);
        slots.map(|index| Slot { index, generation: self.generation(index) }).collect()
    }

    /// Writes a record and makes it findable under the tuples of both ends and, if there is one,
    /// the client's behind address translation; segments still go to the sockets.
    ///
    /// # Errors
    /// See [`Unprepared`].
    pub fn prepare(&self, record: Record, guard: Option<Tuple>) -> Result<Slot, Unprepared> {
        let index = self.free().pop().ok_or(Unprepared::Full)?;
        let generation = self.generation(index).wrapping_add(1);
        let slot = Slot { index, generation };
        let at = self.memory.at(index);
        // SAFETY: the slot is free and was so for a grace period: no program reads it, and no
        // other thread has it, since it was taken out of the list.
        unsafe { at.write(Record { phase: PHASE_PREPARED, generation, ..record }) };
        match self.insert(slot, &record, guard) {
            Ok(()) => Ok(slot),
            Err(_) => {
                self.unlink(slot, guard);
                Err(Unprepared::Refused(slot))
            }
        }
    }

    fn insert(&self, slot: Slot, record: &Record, guard: Option<Tuple>) -> Result<(), MapError> {
        const NO_REPLACE: u64 = 1; // BPF_NOEXIST
        let mut flows = self.flows();
        let [client, server] =
            [CLIENT, SERVER].map(|side| FlowRef::new(slot.index, slot.generation, side));
        flows.insert(tuple(&record.halves[CLIENT]), client, NO_REPLACE)?;
        // What may still be there is of a connection that has ended, or the port were not free.
        self.own_ports().set(port(record), server, 0)?;
        if let Some(tuple) = guard {
            let mut flow = FlowRef::new(slot.index, slot.generation, 0);
            flow.tag |= FlowRef::GUARD_ONLY;
            flows.insert(tuple, flow, NO_REPLACE)?;
        }
        Ok(())
    }

    /// Rewriting begins: both directions at once.
    pub fn go_live(&self, slot: Slot) {
        self.set_phase(slot, PHASE_LIVE);
    }

    /// The sockets are gone; from here on the connection outlives this process.
    pub fn settle(&self, slot: Slot) {
        self.set_phase(slot, PHASE_SETTLED);
    }

    /// The connection is over: its segments are nobody's from here on. The slot can be used again
    /// after [`Self::reuse`].
    ///
    /// Whether it was findable, so not unlinked before: of several who end a connection at once, this
    /// is true for one.
    pub fn unlink(&self, slot: Slot, guard: Option<Tuple>) -> bool {
        let mut flows = self.flows();
        let mut was_linked = false;
        let Some(record) = self.read(slot) else { return false };
        if record.phase != PHASE_PREPARED {
            self.set_phase(slot, PHASE_PREPARED);
        }
        // Only our own: after a failed insertion the tuple may be somebody else's.
        let is_ours = |flow: FlowRef| flow.slot == slot.index && flow.is_of(slot.generation);
        for tuple in [tuple(&record.halves[CLIENT])].into_iter().chain(guard) {
            if flows.get(&tuple, 0).is_ok_and(is_ours) {
                let _ = flows.remove(&tuple);
                was_linked = true;
            }
        }
        let mut ports = self.own_ports();
        let leads_here = |flow: FlowRef| flow.tag != 0 && is_ours(flow);
        if ports.get(&port(&record), 0).is_ok_and(leads_here) {
            let _ = ports.set(port(&record), FlowRef::default(), 0);
            was_linked = true;
        }
        was_linked
    }

    /// Removes tuples that lead to no connection: their process ended between two steps. (A port
    /// that does leads to a record with another one, which is as good as nowhere.) Returns
    /// the names that connections have only behind address translation, by slot. For the start,
    /// when nobody else changes anything.
    pub fn sweep_flows(&self) -> std::collections::HashMap<u32, Tuple> {
        let mut flows = self.flows();
        let all: Vec<(Tuple, FlowRef)> = flows.iter().filter_map(Result::ok).collect();
        let mut guards = std::collections::HashMap::new();
        for (tuple, flow) in all {
            let leads_somewhere = flow.slot < self.memory.count
                && self.phase(flow.slot) != PHASE_FREE
                && flow.is_of(self.generation(flow.slot));
            if !leads_somewhere {
                let _ = flows.remove(&tuple);
            } else if flow.tag & FlowRef::GUARD_ONLY != 0 {
                guards.insert(flow.slot, tuple);
            }
        }
        guards
    }

    /// Notes that the access log knows of the end. False if it knew already.
    pub fn mark_told(&self, slot: Slot) -> bool {
        let half = self.half(slot, CLIENT);
        // SAFETY: see `half`.
        unsafe { AtomicU8::from_ptr(&raw mut (*half).told) }.swap(1, Ordering::AcqRel) == 0
    }

    /// Gives back slots that were unlinked before the last grace period.
    pub fn reuse(&self, slots: impl IntoIterator<Item = Slot>) {
        for slot in slots {
            self.set_phase(slot, PHASE_FREE);
            self.free().push(slot.index);
        }
    }

    /// A copy of the record; `None` if the slot has another use by now.
    pub fn read(&self, slot: Slot) -> Option<Record> {
        let at = self.memory.at(slot.index);
        // SAFETY: inside the mapping. Programs may be writing some of the numbers meanwhile; each
        // is read whole, being aligned, and volatile keeps the compiler from assuming more.
        let record = unsafe { at.read_volatile() };
        (record.generation == slot.generation && record.phase != PHASE_FREE).then_some(record)
    }

    /// Our socket has taken all before this number from the end.
    pub fn set_own_next(&self, slot: Slot, side: usize, number: u32) {
        let half = self.half(slot, side);
        // SAFETY: see `half`.
        unsafe { AtomicU32::from_ptr(&raw mut (*half).own_next) }.store(number, Ordering::Release);
    }

    /// Our socket sends nothing to the end from this number on.
    pub fn set_own_end(&self, slot: Slot, side: usize, number: u32) {
        let half = self.half(slot, side);
        // SAFETY: see `half`.
        unsafe { AtomicU32::from_ptr(&raw mut (*half).own_end) }.store(number, Ordering::Release);
    }

    /// Segments to this end leave by another device from here on.
    pub fn set_way(&self, slot: Slot, side: usize, ifindex: u32, mtu: u16) {
        let half = self.half(slot, side);
        // SAFETY: see `half`.
        unsafe {
            AtomicU32::from_ptr(&raw mut (*half).out_ifindex).store(ifindex, Ordering::Release);
            AtomicU16::from_ptr(&raw mut (*half).mtu).store(mtu, Ordering::Release);
        }
    }

    /// Notes a FIN that reached our socket rather than the program, and the `bytes` before it.
    pub fn mark_fin(&self, slot: Slot, side: usize, number: u32, bytes: u64) {
        let half = self.half(slot, side);
        // SAFETY: see `half`.
        unsafe {
            AtomicU32::from_ptr(&raw mut (*half).fin).store(number, Ordering::Release);
            AtomicU32::from_ptr(&raw mut (*half).sent).store(number, Ordering::Release);
            // The program counted by sequence numbers, and this one stands for no byte.
            AtomicU64::from_ptr(&raw mut (*half).bytes).store(bytes, Ordering::Release);
            AtomicU8::from_ptr(&raw mut (*half).early_fin).store(1, Ordering::Release);
        }
    }

    /// Sets or clears a duty.
    pub fn set_duty(&self, slot: Slot, side: usize, duty: bool) {
        let half = self.half(slot, side);
        // SAFETY: see `half`.
        unsafe { AtomicU8::from_ptr(&raw mut (*half).duty) }.store(duty.into(), Ordering::Release);
    }

    fn set_phase(&self, slot: Slot, phase: u32) {
        let at = self.memory.at(slot.index);
        // SAFETY: inside the mapping, which lives as long as `self`, and aligned.
        unsafe { AtomicU32::from_ptr(&raw mut (*at).phase) }.store(phase, Ordering::Release);
    }

    /// One half of a record: inside the mapping, which lives as long as `self`, with every field
    /// aligned. Programs read and write it meanwhile, so never a reference to it or its fields but
    /// through atomics.
    fn half(&self, slot: Slot, side: usize) -> *mut Half {
        let at = self.memory.at(slot.index);
        // SAFETY: inside the mapping; only the address is taken.
        unsafe { &raw mut (*at).halves[side] }
    }

    fn phase(&self, index: u32) -> u32 {
        // SAFETY: inside the mapping.
        unsafe { (&raw const (*self.memory.at(index)).phase).read_volatile() }
    }

    fn generation(&self, index: u32) -> u32 {
        // SAFETY: inside the mapping.
        unsafe { (&raw const (*self.memory.at(index)).generation).read_volatile() }
    }

    fn flows(&self) -> std::sync::MutexGuard<'_, Flows> {
        self.flows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn own_ports(&self) -> std::sync::MutexGuard<'_, OwnPorts> {
        self.own_ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Vec<u32>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How segments from this end arrive.
pub fn tuple(half: &Half) -> Tuple {
    Tuple { source: half.remote, destination: half.local }
}

/// Our port towards the server.
fn port(record: &Record) -> u32 {
    record.halves[SERVER].local.port.into()
}

/// The records in our own memory.
#[derive(Debug)]
struct Memory {
    start: NonNull<Record>,
    count: u32,
}

// SAFETY: a shared mapping that nobody moves; all access goes through `Table`, whose methods say
// why theirs is sound.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn of(map: &MapData, count: u32) -> io::Result<Self> {
        let length = Self::length(count);
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start = unsafe {
            mmap(std::ptr::null_mut(), length, access, MapFlags::SHARED, map.fd().as_fd(), 0)?
        };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, count })
    }

    /// The kernel maps whole pages.
    fn length(count: u32) -> usize {
        (count as usize * size_of::<Record>()).next_multiple_of(4096)
    }

    fn at(&self, index: u32) -> *mut Record {
        assert!(index < self.count, "slot {index} of {}", self.count);
        // SAFETY: inside the mapping, as was just checked.
        unsafe { self.start.as_ptr().add(index as usize) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: this is what was mapped, and nobody has references into it any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), Self::length(self.count)) };
    }
}

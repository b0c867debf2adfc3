//! Which local ports upstream connections of this engine use.
//!
//! A switched connection lives on without a socket, so the kernel would hand its port out again.
//! Two kinds of ports are safe from that: those above `net.ipv4.ip_local_port_range`, and those
//! within it that `net.ipv4.ip_local_reserved_ports` names. Neither is ever chosen by the kernel,
//! and both can be bound by those who ask for them by number, as we do (Linux,
//! Documentation/networking/ip-sysctl.rst). Both settings hold for IPv6 as well.

mod reservation;

use std::fmt;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proxy_common::port_bit;

use reservation::PortSet;

/// Directory of the notes, on a file system that a restart of the host empties.
const NOTES: &str = "/run/steward-tcp-proxy";

/// Words of 64 bits with one bit for each port.
const WORDS: usize = 1024;

/// Ports that still rest and are passed over before it counts as none being there.
const TRIES: u32 = 8;

/// The ports, and which of them are taken. Cheap to clone; all clones share them.
#[derive(Debug, Clone)]
pub struct PortPool {
    shared: Arc<Shared>,
    reserved: bool,
}

struct Shared {
    /// A bit for each port of the pool.
    ours: PortSet,
    /// A bit for each port that cannot be taken: in use, or not of the pool.
    taken: Box<[AtomicU64; WORDS]>,
    /// When each was last given back: seconds since `begun`, and one; 0 for never.
    rests_since: Box<[AtomicU32]>,
    begun: Instant,
    /// How long a port rests before it is used again: its last connection may be in TIME_WAIT,
    /// where connecting from it fails.
    rest: Duration,
    /// Where to look next: round robin, so that the next one has rested longest.
    next: AtomicU16,
    left: AtomicUsize,
}

/// A port that is taken until this is dropped.
pub struct Port {
    number: u16,
    /// None once it is kept.
    shared: Option<Arc<Shared>>,
}

impl PortPool {
    /// The ports above the ephemeral range, and with them its upper half, which is reserved first:
    /// for this network namespace (the calling thread's), until [`release_reservation`]. Nothing
    /// happens to ports that others reserved: they are neither taken nor ever released.
    ///
    /// `note` is a file that remembers what was reserved by us, so that a later process finds
    /// the same ports again. Without it (or if a crash lost it) a reservation of exactly the
    /// upper half is recognised.
    ///
    /// Where the setting or the note cannot be written, the pool has only the ports above.
    ///
    /// # Errors
    /// /proc/sys/net cannot be read.
    pub fn reserve(note: Option<&Path>) -> io::Result<Self> {
        let reservation = reservation::reserve(note)?;
        Ok(Self { reserved: reservation.reserved, ..Self::of(reservation.ports, time_wait()) })
    }

    fn of(ours: PortSet, rest: Duration) -> Self {
        let left = AtomicUsize::new(ours.len());
        let taken = Box::new(ours.words().map(|word| AtomicU64::new(!word)));
        let rests_since = (0..=u16::MAX).map(|_| AtomicU32::new(0)).collect();
        // Where to begin does not matter.
        let (next, begun) = (AtomicU16::new(0), Instant::now());
        let shared = Shared { ours, taken, rests_since, begun, rest, next, left };
        Self { shared: Arc::new(shared), reserved: false }
    }

    /// Whether part of the ephemeral range is ours.
    #[must_use]
    pub fn has_reserved(&self) -> bool {
        self.reserved
    }

    /// How many ports can be taken.
    #[must_use]
    pub fn left(&self) -> usize {
        self.shared.left.load(Ordering::Relaxed)
    }

    /// The next free port; `None` if all are taken, or were so a moment ago. Binding it may still fail (EADDRINUSE): any
    /// process may ask for a port by its number. Then take another before dropping this one, or
    /// it comes up again only after a whole round.
    #[must_use]
    pub fn take(&self) -> Option<Port> {
        let number = self.shared.take()?;
        Some(Port { number, shared: Some(Arc::clone(&self.shared)) })
    }

    /// Marks a port as taken that a connection from before has; [`Self::give_back`] ends that.
    /// False if it was taken already, or is none of the pool.
    pub fn claim(&self, port: u16) -> bool {
        self.shared.mark(port)
    }

    /// Ends what [`Port::keep`] or [`Self::claim`] began. A port that is none of the pool, or free,
    /// is left as it is.
    pub fn give_back(&self, port: u16) {
        self.shared.give_back(port);
    }
}

/// The note's place, one for each network namespace; `None` if it cannot be written there. Makes
/// its directory, for root alone.
#[must_use]
pub fn make_note() -> Option<PathBuf> {
    let path = note()?;
    let directory = path.parent()?;
    let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    let is_writable = rustix::fs::access(directory, rustix::fs::Access::WRITE_OK).is_ok();
    (made.is_ok() && is_writable).then_some(path)
}

/// Where the note is, if there is one.
#[must_use]
pub fn note() -> Option<PathBuf> {
    let namespace = std::fs::metadata("/proc/thread-self/ns/net").ok()?.ino();
    Some(Path::new(NOTES).join(format!("ports-net-{namespace}")))
}

/// Undoes what [`PortPool::reserve`] did to the settings of this thread's network namespace, and
/// removes the note. False if there was nothing to undo.
///
/// # Errors
/// /proc/sys/net cannot be read or written; the note cannot be removed.
pub fn release_reservation(note: Option<&Path>) -> io::Result<bool> {
    reservation::release(note)
}

impl Port {
    /// Its number.
    #[must_use]
    pub fn number(&self) -> u16 {
        self.number
    }

    /// Leaves it taken until [`PortPool::give_back`].
    #[must_use]
    pub fn keep(mut self) -> u16 {
        let number = self.number;
        self.shared = None;
        number
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            let since = &shared.rests_since[usize::from(self.number)];
            since.store(shared.seconds(), Ordering::Relaxed);
            shared.give_back(self.number);
        }
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Port").field(&self.number).finish()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the words one by one.
        f.debug_struct("Shared").field("ours", &self.ours).field("left", &self.left).finish()
    }
}

impl Shared {
    fn take(&self) -> Option<u16> {
        let start = self.next.load(Ordering::Relaxed);
        let mut tried = 0;
        // One round, and the rest of the word in which it began.
        for step in 0..=WORDS {
            if self.left.load(Ordering::Relaxed) == 0 {
                return None;
            }
            let at = (usize::from(start) / 64 + step) % WORDS;
            let mut skip = 0;
            if step == 0 {
                skip = (1_u64 << (start % 64)) - 1;
            }
            while let Some(bit) = lowest_zero(self.taken[at].load(Ordering::Relaxed) | skip) {
                let port = (at * 64) as u16 + bit;
                if self.has_rested(port) {
                    if self.mark(port) {
                        self.next.store(port.wrapping_add(1), Ordering::Relaxed);
                        return Some(port);
                    }
                    continue;
                }
                // Most likely this one has rested longest. Not so if its connection was a long one,
                // so that some more are tried, and others the next time.
                self.next.store(port.wrapping_add(1), Ordering::Relaxed);
                tried += 1;
                if tried > TRIES {
                    return None;
                }
                skip |= 1_u64 << bit;
            }
        }
        None
    }

    fn has_rested(&self, port: u16) -> bool {
        match self.rests_since[usize::from(port)].load(Ordering::Relaxed) {
            0 => true,
            since => self.seconds().saturating_sub(since) >= self.rest.as_secs() as u32,
        }
    }

    /// Never 0.
    fn seconds(&self) -> u32 {
        u32::try_from(self.begun.elapsed().as_secs()).unwrap_or(u32::MAX - 1) + 1
    }

    /// True if it was free.
    fn mark(&self, port: u16) -> bool {
        let (word, bit) = port_bit(port);
        // Acquire: what the port's last user did happened before.
        let was = self.taken[word as usize].fetch_or(bit, Ordering::Acquire);
        let is_new = was & bit == 0;
        if is_new {
            self.left.fetch_sub(1, Ordering::Relaxed);
        }
        is_new
    }

    fn give_back(&self, port: u16) {
        let (word, bit) = port_bit(port);
        if !self.ours.contains(port) {
            return;
        }
        // Counted before it can be taken, so that the count never goes below zero.
        self.left.fetch_add(1, Ordering::Relaxed);
        let was = self.taken[word as usize].fetch_and(!bit, Ordering::AcqRel);
        if was & bit == 0 {
            self.left.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// How long the kernel keeps a connection that we have closed first (tcp.h: TCP_TIMEWAIT_LEN), or
/// what it is content with where it may use such a port again (tcp_tw_reuse_delay, which was
/// always a second before 6.14).
fn time_wait() -> Duration {
    let reuse = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_tw_reuse");
    // 2, the default, is for loopback alone.
    let may_reuse = reuse.is_ok_and(|value| value.trim() == "1");
    // Both a little longer: seconds are counted whole.
    if may_reuse { Duration::from_secs(2) } else { Duration::from_secs(61) }
}

fn lowest_zero(word: u64) -> Option<u16> {
    // At most 63.
    (word != u64::MAX).then(|| word.trailing_ones() as u16)
}

#[cfg(test)]
mod tests {
    use std::collections::{HashSet, VecDeque};

    use super::*;

    fn pool(ranges: &str) -> PortPool {
        resting(ranges, Duration::ZERO)
    }

    fn resting(ranges: &str, rest: Duration) -> PortPool {
        PortPool::of(ranges.parse().expect("ranges"), rest)
    }

    #[test]
    fn a_port_that_still_rests_is_not_taken_unless_it_was_kept() {
        let pool = resting("60001-60020", Duration::from_secs(3600));
        let kept: Vec<u16> = (0..10).map(|_| pool.take().expect("free").keep()).collect();
        drop((0..10).map(|_| pool.take().expect("free")).collect::<Vec<_>>());
        assert_eq!(pool.left(), 10);
        assert!((0..20).all(|_| pool.take().is_none()), "in TIME_WAIT, for all that is known");
        // A kept one comes back only after its connection's TIME_WAIT.
        kept.iter().for_each(|port| pool.give_back(*port));
        let again: Vec<u16> = (0..40).filter_map(|_| pool.take()).map(Port::keep).collect();
        assert_eq!(again.iter().collect::<HashSet<_>>(), kept.iter().collect::<HashSet<_>>());
    }

    #[test]
    fn every_port_is_taken_once_and_then_none() {
        let pool = pool("100,60000-60129,65535");
        assert_eq!(pool.left(), 132);
        let taken: Vec<Port> = std::iter::from_fn(|| pool.take()).collect();
        let numbers: Vec<u16> = taken.iter().map(Port::number).collect();
        let expected: Vec<u16> = [100].into_iter().chain(60000..=60129).chain([65535]).collect();
        assert_eq!(numbers, expected);
        assert_eq!(pool.left(), 0);
        drop(taken);
        assert_eq!(pool.left(), 132);
    }

    #[test]
    fn a_port_rests_for_a_round() {
        let pool = pool("60001-60200");
        let first: Vec<u16> = (0..200).map(|_| pool.take().expect("free").number()).collect();
        assert_eq!(first, (60001..=60200).collect::<Vec<_>>(), "each dropped at once");
        assert_eq!(pool.take().expect("free").number(), 60001);
    }

    #[test]
    fn the_only_free_port_is_found_wherever_the_round_stands() {
        let pool = pool("60000-60130");
        let all: Vec<u16> = std::iter::from_fn(|| pool.take()).map(Port::keep).collect();
        assert_eq!(pool.left(), 0);
        // Also the one right before the place where the round stands, in the same word.
        for port in all.iter().rev().chain(&all) {
            pool.give_back(*port);
            let taken = pool.take().expect("free");
            assert_eq!(taken.number(), *port);
            assert!(pool.take().is_none());
            let _ = taken.keep();
        }
    }

    #[test]
    fn what_is_kept_or_claimed_stays_until_given_back() {
        let pool = pool("60000-60002");
        let kept = pool.take().expect("free").keep();
        assert!(!pool.claim(kept));
        assert!(pool.claim(60002));
        assert!(!pool.claim(60002));
        assert!(!pool.claim(60003), "none of ours");
        assert_eq!(pool.left(), 1);
        pool.give_back(kept);
        pool.give_back(kept);
        pool.give_back(60003);
        assert_eq!(pool.left(), 2);
        pool.give_back(60002);
        assert_eq!(pool.left(), 3);
        let again: HashSet<u16> = std::iter::from_fn(|| pool.take()).map(Port::keep).collect();
        assert_eq!(again, HashSet::from([60000, 60001, 60002]));
        assert_eq!(Arc::strong_count(&pool.shared), 1, "kept ports hold no count of the pool");
    }

    #[test]
    fn no_port_is_taken_twice_by_threads_that_take_and_give_back() {
        let pool = pool("60000-60299");
        let owned: Vec<AtomicU64> = (0..300).map(|_| AtomicU64::new(0)).collect();
        std::thread::scope(|scope| {
            for seed in 0..4 {
                let (pool, owned) = (&pool, &owned);
                scope.spawn(move || {
                    let mut dice = fastrand::Rng::with_seed(seed);
                    let mut held = VecDeque::new();
                    for _ in 0..50_000 {
                        if dice.bool() {
                            let Some(port) = pool.take() else { continue };
                            let owner = &owned[usize::from(port.number() - 60000)];
                            assert_eq!(owner.swap(1, Ordering::SeqCst), 0, "{port:?} taken twice");
                            held.push_back(port);
                        } else if let Some(port) = held.pop_front() {
                            owned[usize::from(port.number() - 60000)].store(0, Ordering::SeqCst);
                            if dice.bool() {
                                pool.give_back(port.keep());
                            }
                        }
                    }
                    for port in held {
                        owned[usize::from(port.number() - 60000)].store(0, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(pool.left(), 300, "all came back");
        assert_eq!(std::iter::from_fn(|| pool.take()).map(Port::keep).count(), 300);
    }
}

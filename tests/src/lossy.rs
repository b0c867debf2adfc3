//! Bad wires: two hosts joined by TAP devices, with a thread in between that loses, doubles,
//! reorders and delays segments.
//!
//! A TAP device offers neither checksums nor segmentation to the hosts' stacks, so what passes
//! here are whole segments of at most one MTU with their checksums, on any kernel. Chance falls by
//! a seed; which segment meets which roll depends on timing, so a seed repeats the row of
//! misfortunes, not the run.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;

use crate::netns::{Host, Wire};
use crate::stream::Dice;

/// Bytes of the largest frame: an MTU of 1500, Ethernet's header and a VLAN tag.
const FRAME: usize = 1518;

/// Longest time that a segment is held back so that later ones overtake it. Above the few hundred
/// microseconds in which a window's segments follow each other, far below a retransmission's 200 ms.
const HOLD: Duration = Duration::from_millis(4);

/// Frames that wait at a device. A window of many connections fits, so that nothing is lost that
/// we did not lose.
const QUEUE: u32 = 20_000;

/// What befalls TCP segments, each way. Other packets (neighbour discovery) are delayed alike and
/// nothing else.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Of 1,000 segments, this many are lost.
    pub lost: u32,
    /// Of 1,000 segments, this many arrive twice.
    pub doubled: u32,
    /// Of 1,000 segments, this many are overtaken by later ones.
    pub reordered: u32,
    /// How long each packet takes.
    pub delay: Duration,
}

impl Faults {
    /// No harm but that every segment passes alone.
    pub const NONE: Self = Self::of_thousand(0);

    /// `n` of 1,000 segments lost, as many doubled, as many reordered.
    #[must_use]
    pub const fn of_thousand(n: u32) -> Self {
        Self { lost: n, doubled: n, reordered: n, delay: Duration::ZERO }
    }

    /// Everything takes `delay` longer.
    #[must_use]
    pub const fn delayed(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }
}

/// What has happened to TCP segments so far, both ways together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Harm {
    /// Those that came, lost ones included.
    pub segments: u64,
    /// Lost ones.
    pub lost: u64,
    /// Those that arrived twice.
    pub doubled: u64,
    /// Those held back.
    pub reordered: u64,
}

#[derive(Debug, Default)]
struct Counters {
    segments: AtomicU64,
    lost: AtomicU64,
    doubled: AtomicU64,
    reordered: AtomicU64,
}

/// A wire that harms what passes. Dropping it takes both hosts' devices away.
#[derive(Debug)]
pub struct BadWire {
    wire: Wire,
    harm: Arc<Counters>,
    stop: Arc<OwnedFd>,
    carriers: Vec<JoinHandle<()>>,
}

impl BadWire {
    /// Joins both hosts as [`Host::join`] does, with the same addresses and names.
    ///
    /// # Panics
    /// No TAP devices (`/dev/net/tun`), or the number is used already.
    #[track_caller]
    #[must_use]
    pub fn join(one: &Host, other: &Host, net: u8, faults: Faults, seed: u64) -> Self {
        println!("wire {net}, {} to {}: seed {seed}, {faults:?}", one.name(), other.name());
        let [left, right] = [(one, 1), (other, 2)].map(|(host, end)| {
            let tap = host.run(move || tap(&format!("wire{net}")));
            host.ip(&format!("link set wire{net} txqueuelen {QUEUE}"));
            host.plug(net, end);
            Arc::new(tap)
        });
        let wire = Wire::numbered(net);
        wire.settle(one, other);
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"));
        let harm = Arc::new(Counters::default());
        let carry = |from: &Arc<File>, to: &Arc<File>, seed| {
            let way = Way {
                from: Arc::clone(from),
                to: Arc::clone(to),
                stop: Arc::clone(&stop),
                faults,
                dice: Dice::new(seed),
                harm: Arc::clone(&harm),
                held: BinaryHeap::new(),
                serial: 0,
            };
            std::thread::spawn(move || way.carry())
        };
        let carriers =
            vec![carry(&left, &right, seed), carry(&right, &left, seed.rotate_left(32) ^ 1)];
        Self { wire, harm, stop, carriers }
    }

    /// Names and addresses.
    #[must_use]
    pub fn wire(&self) -> Wire {
        self.wire
    }

    /// What it has done so far.
    #[must_use]
    pub fn harm(&self) -> Harm {
        let Counters { segments, lost, doubled, reordered } = &*self.harm;
        let [segments, lost, doubled, reordered] =
            [segments, lost, doubled, reordered].map(|counter| counter.load(Relaxed));
        Harm { segments, lost, doubled, reordered }
    }
}

impl Drop for BadWire {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        for carrier in self.carriers.drain(..) {
            let _ = carrier.join();
        }
    }
}

/// A new TAP device in the network namespace of this thread; it goes with the descriptor.
#[track_caller]
fn tap(name: &str) -> File {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let opened = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/net/tun");
    let file = opened.unwrap_or_else(|e| panic!("/dev/net/tun (module tun): {e}"));
    // SAFETY: all-zero bytes are a valid ifreq: an array of characters and a union of integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives until the call returns; the
    // descriptor is open.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) };
    assert!(done == 0, "a TAP device {name}: {}", std::io::Error::last_os_error());
    file
}

/// A frame under way; the order of these is the order in which they arrive.
type Held = Reverse<(Instant, u64, Vec<u8>)>;

/// One direction.
struct Way {
    from: Arc<File>,
    to: Arc<File>,
    stop: Arc<OwnedFd>,
    faults: Faults,
    dice: Dice,
    harm: Arc<Counters>,
    held: BinaryHeap<Held>,
    serial: u64,
}

impl Way {
    fn carry(mut self) {
        let mut frame = vec![0; FRAME];
        loop {
            // A row of frames, and then those that are due: neither waits for ever.
            for _ in 0..64 {
                match (&*self.from).read(&mut frame) {
                    Ok(len) => self.meet(&frame[..len]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    // The device is down for the moment.
                    Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
                    Err(error) => panic!("reading from a TAP device: {error}"),
                }
            }
            self.let_go();
            if self.wait() {
                return;
            }
        }
    }

    /// Decides what happens to `frame`.
    fn meet(&mut self, frame: &[u8]) {
        let mut delay = self.faults.delay;
        let mut times = 1;
        if is_tcp(frame) {
            self.harm.segments.fetch_add(1, Relaxed);
            if self.happens(self.faults.lost) {
                self.harm.lost.fetch_add(1, Relaxed);
                return;
            }
            if self.happens(self.faults.doubled) {
                self.harm.doubled.fetch_add(1, Relaxed);
                times = 2;
            }
            if self.happens(self.faults.reordered) {
                self.harm.reordered.fetch_add(1, Relaxed);
                delay += Duration::from_nanos(self.dice.roll() % HOLD.as_nanos() as u64);
            }
        }
        for _ in 0..times {
            if delay.is_zero() {
                self.send(frame);
            } else {
                self.serial += 1;
                self.held.push(Reverse((Instant::now() + delay, self.serial, frame.to_vec())));
            }
        }
    }

    fn happens(&mut self, of_thousand: u32) -> bool {
        of_thousand > 0 && self.dice.roll() % 1_000 < u64::from(of_thousand)
    }

    /// Sends all frames that are due.
    fn let_go(&mut self) {
        while let Some(Reverse((due, ..))) = self.held.peek()
            && *due <= Instant::now()
            && let Some(Reverse((.., frame))) = self.held.pop()
        {
            self.send(&frame);
        }
    }

    /// A frame that the device does not take (it is down) is one more lost.
    fn send(&self, frame: &[u8]) {
        let _ = (&*self.to).write(frame);
    }

    /// Waits for a frame or until one is due; says whether this is the end.
    fn wait(&self) -> bool {
        let left = self.held.peek().map(|Reverse((due, ..))| {
            let left = due.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
        });
        let mut fds = [
            PollFd::new(&*self.from, PollFlags::IN),
            PollFd::from_borrowed_fd(rustix::fd::AsFd::as_fd(&*self.stop), PollFlags::IN),
        ];
        let _ = poll(&mut fds, left.as_ref());
        // A device that is down reports errors without end.
        if fds[0].revents().contains(PollFlags::ERR) {
            std::thread::sleep(Duration::from_millis(1));
        }
        fds[1].revents().contains(PollFlags::IN)
    }
}

fn is_tcp(frame: &[u8]) -> bool {
    const TCP: u8 = 6;
    match frame.get(12..14) {
        Some([0x08, 0x00]) => frame.get(23) == Some(&TCP),
        Some([0x86, 0xdd]) => frame.get(20) == Some(&TCP),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::{Peer, both};
    use crate::servers::Upstream;

    const BYTES: u64 = 3_000_000;

    fn transfer(faults: Faults) -> Harm {
        let (one, two) = (Host::new("one"), Host::new("two"));
        let bad = BadWire::join(&one, &two, 12, faults, 7);
        for ip in [bad.wire().v4(2), bad.wire().v6(2)] {
            let upstream = two.run(move || Upstream::new(ip));
            let to = upstream.address();
            let client = one.run(move || Peer::connect(to));
            let server = upstream.accept();
            both(|| client.send_stream(1, BYTES), || server.receive_stream(1, BYTES));
            both(|| server.send_stream(2, BYTES), || client.receive_stream(2, BYTES));
        }
        bad.harm()
    }

    #[test]
    fn a_bad_wire_does_harm_and_tcp_mends_it() {
        let harm = transfer(Faults::of_thousand(20));
        println!("{harm:?}");
        assert!(harm.lost > 0 && harm.doubled > 0 && harm.reordered > 0, "{harm:?}");
    }

    #[test]
    fn a_wire_without_faults_does_none() {
        let harm = transfer(Faults::NONE);
        assert!(harm.segments > 4 * BYTES / 1_500, "{harm:?}");
        assert_eq!((harm.lost, harm.doubled, harm.reordered), (0, 0, 0));
    }

    #[test]
    fn a_delay_is_there_each_way() {
        const DELAY: Duration = Duration::from_millis(25);
        let (one, two) = (Host::new("one"), Host::new("two"));
        let bad = BadWire::join(&one, &two, 12, Faults::NONE.delayed(DELAY), 7);
        let ip = bad.wire().v4(2);
        let upstream = two.run(move || Upstream::new(ip));
        let to = upstream.address();
        let begun = Instant::now();
        let client = one.run(move || Peer::connect(to));
        let server = upstream.accept();
        client.send(b"there");
        server.receive(b"there");
        server.send(b"and back");
        client.receive(b"and back");
        // A lower bound holds on any machine: neighbour and handshake and exchange.
        assert!(begun.elapsed() >= 6 * DELAY, "{:?}", begun.elapsed());
    }

    #[test]
    #[should_panic(expected = "timed out")]
    fn nothing_passes_a_wire_that_loses_all() {
        let (one, two) = (Host::new("one"), Host::new("two"));
        let bad = BadWire::join(&one, &two, 12, Faults::of_thousand(1_000), 7);
        let ip = bad.wire().v4(2);
        let upstream = two.run(move || Upstream::new(ip));
        let to = upstream.address();
        one.run(move || {
            let tried = std::net::TcpStream::connect_timeout(&to, Duration::from_millis(300));
            panic!("{}", tried.expect_err("nothing passes"));
        });
    }
}

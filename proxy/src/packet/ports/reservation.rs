//! Which part of the ephemeral range is ours, in this network namespace.
//!
//! The note tells what was reserved by us. It is written before the setting, so whatever the
//! setting holds of it is ours: a crash in between leaves a note about too much, never too little.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use proxy_common::port_bit;
use tracing::warn;

use super::WORDS;

/// Per network namespace: that of the thread which opens them.
const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Bytes of the longest list of ports there is: every other one.
const LONGEST: usize = WORDS * 32 * 6;

/// What the pool may use.
pub(super) struct Reservation {
    pub(super) ports: PortSet,
    /// Ports within the ephemeral range are among them.
    pub(super) reserved: bool,
}

/// See [`super::PortPool::reserve`].
pub(super) fn reserve(note: Option<&Path>) -> io::Result<Reservation> {
    let range = ephemeral()?;
    let present = reserved()?;
    let note = note.map(Note::at).transpose()?;
    let noted = note.as_ref().and_then(Note::read);
    let plan = Plan::new(&range, &present, noted);
    let outcome = (|| {
        if let Some(note) = &note {
            note.write(&plan.ours)?;
        }
        if plan.reserved == present { Ok(()) } else { set_reserved(&plan.reserved) }
    })();
    match outcome {
        Ok(()) => {
            let reserved = plan.ours.is_some();
            Ok(Reservation { ports: plan.ours.union(&plan.above), reserved })
        }
        Err(error) => {
            warn!(
                "no part of {RANGE} can be reserved ({error}): only the {} ports above it serve \
                 connections that are switched to packets",
                plan.above.len()
            );
            // A note about nothing would later claim what others reserve meanwhile.
            let is_void = plan.ours.without(&reserved()?) == plan.ours;
            if let Some(note) = note.filter(|_| is_void) {
                // It may be what could not be written.
                let _ = note.remove();
            }
            Ok(Reservation { ports: plan.above, reserved: false })
        }
    }
}

/// See [`super::release_reservation`].
pub(super) fn release(note: Option<&Path>) -> io::Result<bool> {
    let present = reserved()?;
    let note = note.map(Note::at).transpose()?;
    let noted = note.as_ref().and_then(Note::read);
    let ours = match noted {
        Some(ours) => ours,
        None => recognised(&ephemeral()?, &present),
    };
    let rest = present.without(&ours);
    let is_any = rest != present;
    if is_any {
        set_reserved(&rest)?;
    }
    // Last, so that a failure can be made up for.
    note.map_or(Ok(()), |note| note.remove())?;
    Ok(is_any)
}

/// What is to be done about the reservation.
struct Plan {
    /// In the ephemeral range, reserved by us.
    ours: PortSet,
    /// Above the ephemeral range, reserved by nobody.
    above: PortSet,
    /// What the setting is to be.
    reserved: PortSet,
}

impl Plan {
    fn new(range: &RangeInclusive<u16>, present: &PortSet, noted: Option<PortSet>) -> Self {
        let recognised = || Some(recognised(range, present)).filter(PortSet::is_some);
        let ours = noted.filter(PortSet::is_some).or_else(recognised);
        let ours = ours.unwrap_or_else(|| upper_half(range).without(present));
        let above = range.end().checked_add(1).map(|from| PortSet::from(from..=u16::MAX));
        let above = above.unwrap_or_default().without(present);
        Self { reserved: present.union(&ours), ours, above }
    }
}

/// Empty if the range has one port only.
fn upper_half(range: &RangeInclusive<u16>) -> PortSet {
    let (low, high) = (*range.start(), *range.end());
    let start = low + (high - low).div_ceil(2);
    if start == low { PortSet::default() } else { PortSet::from(start..=high) }
}

/// What an earlier process of ours reserved, without a note of it: the upper half of the range and
/// not a port more below it. A larger reservation is somebody else's.
fn recognised(range: &RangeInclusive<u16>, present: &PortSet) -> PortSet {
    let half = upper_half(range);
    let below = half.ranges().first().and_then(|first| first.start().checked_sub(1));
    let is_larger = below.is_some_and(|port| present.contains(port));
    if half.without(present).is_some() || is_larger { PortSet::default() } else { half }
}

fn ephemeral() -> io::Result<RangeInclusive<u16>> {
    let text = fs::read_to_string(RANGE)?;
    let mut words = text.split_whitespace().map(u16::from_str);
    match (words.next(), words.next()) {
        (Some(Ok(low)), Some(Ok(high))) if low <= high => Ok(low..=high),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{RANGE}: {text:?}"))),
    }
}

/// With one read: a second one gets nothing, however much is left (`proc_do_large_bitmap`).
fn reserved() -> io::Result<PortSet> {
    let mut buffer = vec![0; LONGEST];
    let length = File::open(RESERVED)?.read(&mut buffer)?;
    let text = String::from_utf8_lossy(&buffer[..length]);
    text.parse().map_err(|error: Malformed| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{RESERVED}: {error}"))
    })
}

/// Of more than a page, the kernel takes a page at a time and adds it to what it took before.
fn set_reserved(ports: &PortSet) -> io::Result<()> {
    // An empty write changes nothing; an empty line clears the list.
    fs::write(RESERVED, format!("{ports}\n"))?;
    // Another writer may have come between.
    if ports.without(&reserved()?).is_some() {
        return Err(io::Error::other(format!("{RESERVED} is being changed by others")));
    }
    Ok(())
}

/// The file that remembers what was reserved by us.
struct Note {
    path: PathBuf,
    /// A note of another boot or another network namespace tells nothing about this one.
    place: String,
}

impl Note {
    fn at(path: &Path) -> io::Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let namespace = fs::metadata("/proc/thread-self/ns/net")?.ino();
        Ok(Self { path: path.to_owned(), place: format!("{} net:{namespace}", boot.trim()) })
    }

    fn read(&self) -> Option<PortSet> {
        let text = fs::read_to_string(&self.path).ok()?;
        let (place, ports) = text.split_once('\n')?;
        if place == self.place { ports.parse().ok() } else { None }
    }

    /// As a whole or not at all.
    fn write(&self, ports: &PortSet) -> io::Result<()> {
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder)?;
        }
        let draft = self.path.with_extension("new");
        fs::write(&draft, format!("{}\n{ports}\n", self.place))?;
        fs::rename(draft, &self.path)
    }

    fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// A set of ports; as text what the kernel writes: `1,5-7`.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct PortSet(Box<[u64; WORDS]>);

impl PortSet {
    pub(super) fn words(&self) -> [u64; WORDS] {
        *self.0
    }

    pub(super) fn contains(&self, port: u16) -> bool {
        let (word, bit) = port_bit(port);
        self.0[word as usize] & bit != 0
    }

    pub(super) fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    fn is_some(&self) -> bool {
        self.len() > 0
    }

    fn union(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a | b)
    }

    fn without(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a & !b)
    }

    fn combine(&self, other: &Self, with: impl Fn(u64, u64) -> u64) -> Self {
        let mut result = self.clone();
        for (mine, theirs) in result.0.iter_mut().zip(other.0.iter()) {
            *mine = with(*mine, *theirs);
        }
        result
    }

    fn insert(&mut self, ports: RangeInclusive<u16>) {
        for port in ports {
            let (word, bit) = port_bit(port);
            self.0[word as usize] |= bit;
        }
    }

    fn ranges(&self) -> Vec<RangeInclusive<u16>> {
        let mut ranges: Vec<RangeInclusive<u16>> = Vec::new();
        for port in (0..=u16::MAX).filter(|port| self.contains(*port)) {
            match ranges.last_mut() {
                Some(last) if last.end().checked_add(1) == Some(port) => {
                    *last = *last.start()..=port;
                }
                _ => ranges.push(port..=port),
            }
        }
        ranges
    }
}

impl Default for PortSet {
    fn default() -> Self {
        Self(Box::new([0; WORDS]))
    }
}

impl From<RangeInclusive<u16>> for PortSet {
    fn from(ports: RangeInclusive<u16>) -> Self {
        let mut set = Self::default();
        set.insert(ports);
        set
    }
}

impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, range) in self.ranges().iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            let (first, last) = (range.start(), range.end());
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is no list of ports.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no port and no range of ports")]
pub(super) struct Malformed(String);

impl FromStr for PortSet {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let mut set = Self::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            match (first.parse(), last.parse()) {
                (Ok(first), Ok(last)) if first <= last => set.insert(first..=last),
                _ => return Err(Malformed(part.to_owned())),
            }
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: RangeInclusive<u16> = 32768..=60999;
    const HALF: &str = "46884-60999";

    fn set(text: &str) -> PortSet {
        text.parse().expect("ports")
    }

    fn plan(present: &str, noted: Option<&str>) -> Plan {
        Plan::new(&RANGE, &set(present), noted.map(set))
    }

    #[test]
    fn the_kernels_format_is_read_and_written() {
        for text in ["", "0", "65535", "0-65535", "1,5-7,9", "100-101,103"] {
            assert_eq!(set(text).to_string(), text);
        }
        assert_eq!(set(" 5-7,6-8,9,1\n").to_string(), "1,5-9");
        assert_eq!(set("0-65535").len(), 65536);
        for text in ["a", "1-", "7-5", "65536", "1 2", "-3", "1-2-3"] {
            assert!(text.parse::<PortSet>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_longest_list_has_room() {
        let odd: PortSet =
            set(&(1..=u16::MAX).step_by(2).map(|p| format!("{p},")).collect::<String>());
        assert_eq!(odd.len(), 32768);
        assert!(odd.to_string().len() < LONGEST);
    }

    #[test]
    fn the_upper_half_is_half_of_any_range() {
        let half = |range| upper_half(&range).to_string();
        assert_eq!(half(RANGE), HALF);
        assert_eq!(half(1..=65535), "32768-65535");
        assert_eq!(half(10..=11), "11");
        assert_eq!(half(10..=10), "");
        assert_eq!(half(65535..=65535), "");
    }

    #[test]
    fn a_fresh_reservation_is_the_upper_half_beside_that_of_others() {
        let plan = plan("8080,50000-50009,61000", None);
        assert_eq!(plan.ours.to_string(), "46884-49999,50010-60999");
        assert_eq!(plan.above.to_string(), "61001-65535");
        assert_eq!(plan.reserved.to_string(), "8080,46884-61000");
    }

    #[test]
    fn what_an_earlier_process_reserved_is_ours_again() {
        let noted = plan("8080,46884-61000", Some("46884-49999,50010-60999"));
        assert_eq!(noted.ours.to_string(), "46884-49999,50010-60999");
        assert_eq!(noted.reserved.to_string(), "8080,46884-61000");
        let without_note = plan(&format!("8080,{HALF}"), None);
        assert_eq!(without_note.ours.to_string(), HALF);
        assert_eq!(without_note.reserved.to_string(), format!("8080,{HALF}"));
    }

    #[test]
    fn a_reservation_that_somebody_took_away_is_made_again() {
        let plan = plan("8080", Some("46884-49999"));
        assert_eq!(plan.ours.to_string(), "46884-49999");
        assert_eq!(plan.reserved.to_string(), "8080,46884-49999");
    }

    #[test]
    fn somebody_elses_larger_reservation_is_not_taken_for_ours() {
        let plan = plan("32768-65000", None);
        assert_eq!(plan.ours.to_string(), "");
        assert_eq!(plan.above.to_string(), "65001-65535");
        assert_eq!(plan.reserved.to_string(), "32768-65000");
    }

    #[test]
    fn nothing_is_above_a_range_that_ends_with_the_last_port() {
        let plan = Plan::new(&(1024..=65535), &PortSet::default(), None);
        assert_eq!(plan.above.to_string(), "");
        assert_eq!(plan.ours.to_string(), "33280-65535");
    }

    #[test]
    fn a_note_of_another_place_tells_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("deep/note");
        let note = Note::at(&path).expect("a place");
        assert_eq!(note.read(), None);
        note.write(&set("1,5-7")).expect("writes");
        assert_eq!(note.read(), Some(set("1,5-7")));
        let elsewhere = Note { path, place: "another boot".to_owned() };
        assert_eq!(elsewhere.read(), None);
        note.remove().expect("removes");
        note.remove().expect("is gone already");
    }
}

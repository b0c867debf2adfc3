//! A switched connection as the programs and the loader share it.
//!
//! *Ends* are the two peers, client and server. A segment that arrives from one end is rewritten
//! with the numbers of its [`Half`] and leaves from our address towards the other end. Both sides
//! of the kernel boundary read and write a [`Record`] at the same time, so each field says who
//! writes it; all are naturally aligned, so no reader sees half a number.

use core::mem::{offset_of, size_of};

use crate::handshake::Endpoint;

/// Part of the directory's name under bpffs. Raised whenever a type in a pinned map changes: old
/// and new programs then live side by side, each with its own maps.
pub const LAYOUT: &str = "v2";

/// [`Record::phase`]: nobody's.
pub const PHASE_FREE: u32 = 0;
/// [`Record::phase`]: being written. Segments still go to the sockets.
pub const PHASE_PREPARED: u32 = 1;
/// [`Record::phase`]: segments are rewritten, but the sockets are not closed yet. Ends with RST
/// if the process ends now.
pub const PHASE_LIVE: u32 = 2;
/// [`Record::phase`]: the sockets are gone; the two ends have one TCP conversation.
pub const PHASE_SETTLED: u32 = 3;

/// Index of the client's [`Half`].
pub const CLIENT: usize = 0;
/// Index of the server's [`Half`].
pub const SERVER: usize = 1;

/// [`Half::marks`]: this end's FIN was seen; [`Half::fin`] holds.
pub const MARK_FIN: u8 = 1 << 0;
/// [`Half::marks`]: this end's FIN came before the other's.
pub const MARK_FIRST: u8 = 1 << 3;
/// [`Half::marks`]: this end has begun a new connection with the same addresses, which is the
/// stack's.
pub const MARK_LEFT: u8 = 1 << 4;

/// [`Half::ts_fixed`]: the end's clock is known.
pub const CLOCK_FIXED: u8 = 1;
/// [`Half::ts_fixed`]: a segment has come whose numbers only the end itself can know.
pub const CLOCK_READY: u8 = 2;

/// Where a tuple leads: value of the map of flows.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FlowRef {
    /// Index of the [`Record`].
    pub slot: u32,
    /// The record's generation in the upper bits, below it [`FlowRef::GUARD_ONLY`] and the index
    /// of the half whose segments arrive with this tuple.
    pub tag: u32,
}

impl FlowRef {
    /// Bit of [`Self::tag`]: a name that the connection has only behind address translation. No
    /// segment arrives with it; strays that reach the stack under it are swallowed.
    pub const GUARD_ONLY: u32 = 1 << 1;
    const SHIFT: u32 = 2;

    /// A reference to one half of a record.
    #[must_use]
    pub const fn new(slot: u32, generation: u32, side: usize) -> Self {
        Self { slot, tag: generation << Self::SHIFT | (side as u32 & 1) }
    }

    /// The half.
    #[inline(always)]
    #[must_use]
    pub const fn side(self) -> usize {
        (self.tag & 1) as usize
    }

    /// Whether the record is still the one that was meant.
    #[inline(always)]
    #[must_use]
    pub const fn is_of(self, generation: u32) -> bool {
        self.tag >> Self::SHIFT == generation & (u32::MAX >> Self::SHIFT)
    }
}

/// What is known of one end and done to its segments.
///
/// "Its space" are the sequence numbers that this end chose; "our space" are those that our socket
/// towards it chose.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Half {
    /// The end's address. (Loader.)
    pub remote: Endpoint,
    /// Our address as this end knows it. (Loader.)
    pub local: Endpoint,
    /// Largest packet for the device towards this end, in bytes from the IP header on; 0 for no
    /// limit. (Loader, also later.)
    pub mtu: u16,
    /// Not 0: this end has acknowledged the other one's FIN. (Program. A byte of its own, like
    /// [`Self::reset`]: segments of one end may be in the hands of two CPUs at once, and of two
    /// bits in one byte one could get lost.)
    pub acked_fin: u8,
    /// Of the client's half. Not 0: the access log knows of the connection's end. (Loader.)
    pub told: u8,
    /// Added to its sequence numbers; taken from acknowledgements that go to it. (Loader.)
    pub seq_add: u32,
    /// Added to its timestamps; taken from the echoes that go to it. (Program, with the first
    /// segment.)
    pub ts_add: u32,
    /// Added to milliseconds of CLOCK_MONOTONIC gives what our socket towards this end would say
    /// as its timestamp. (Loader.)
    pub ts_clock: u32,
    /// In our space: after the last byte that our own socket sends to this end. (Loader.)
    pub own_end: u32,
    /// In its space: after the last byte that our own socket took from it. (Loader.)
    pub own_next: u32,
    /// Device on which its segments arrived in the handshake. (Loader.)
    pub in_ifindex: u32,
    /// Device towards it; its segments may arrive there as well. (Loader, also later.)
    pub out_ifindex: u32,
    /// Shifts of windows: see [`Half::shift`] and [`Half::our_shift`]. (Loader.)
    pub shifts: u8,
    /// Not 0: this end sent a RST that the other one must accept. (Program.)
    pub reset: u8,
    /// Not 0: our socket still has bytes on their way to it, so it must see what is acknowledged.
    /// (Loader.)
    pub duty: u8,
    /// The `MARK_` constants, none of which is set with another in two segments. (Program.)
    pub marks: u8,
    /// In its space: after the last byte that it has sent. (Program.)
    pub sent: u32,
    /// In our space: the last acknowledgement that it has sent. (Program.)
    pub acked: u32,
    /// In its space: after its FIN. (Program; the loader with [`Self::early_fin`].)
    pub fin: u32,
    /// The last window that it announced, unscaled. (Program.)
    pub window: u16,
    /// [`CLOCK_FIXED`]: [`Self::ts_add`] is final. [`CLOCK_READY`]: the next segment may fix it. (Program.)
    pub ts_fixed: u8,
    /// Not 0: its FIN came to our socket, during the switch; [`Self::fin`] holds. (Loader.)
    pub early_fin: u8,
    /// In its space: the first byte of its stream. (Loader.)
    pub first: u32,
    /// What rewriting its addresses adds to the sum of a packet: see [`Half::address_change`].
    /// (Loader.)
    pub pseudo: u32,
    /// When its last segment came: nanoseconds of CLOCK_MONOTONIC. (Program.)
    pub seen_ns: u64,
    /// Bytes of its stream since the beginning, each counted once. (Loader, then program.)
    pub bytes: u64,
    /// Packets that came from it since the switch. (Program.)
    pub packets: u64,
}

impl Half {
    /// Both shifts as they are kept; none is above 14 (RFC 7323).
    #[must_use]
    pub const fn shifts(theirs: u8, ours: u8) -> u8 {
        theirs & 15 | ours << 4
    }

    /// Shift of the windows that this end announces.
    #[inline(always)]
    #[must_use]
    pub const fn shift(&self) -> u8 {
        self.shifts & 15
    }

    /// Shift of the windows that our socket announced to it.
    #[inline(always)]
    #[must_use]
    pub const fn our_shift(&self) -> u8 {
        self.shifts >> 4
    }

    /// By how much the sum over a segment of this end changes when its addresses become those
    /// towards `other`: a sum of words in the machine's own order (RFC 1071), carries added once.
    #[must_use]
    pub fn address_change(&self, other: &Self) -> u32 {
        let sum = |end: &Endpoint, invert: u16| {
            let words = end.address.chunks_exact(2);
            words.map(|two| u64::from(u16::from_ne_bytes([two[0], two[1]]) ^ invert)).sum::<u64>()
        };
        let total = sum(&self.remote, u16::MAX)
            + sum(&self.local, u16::MAX)
            + sum(&other.local, 0)
            + sum(&other.remote, 0);
        // Below 2^32 by far: 32 words of 16 bits.
        total as u32
    }
}

/// One switched connection.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Record {
    /// One of the `PHASE_` constants. (Loader.)
    pub phase: u32,
    /// Raised each time the slot is used anew. (Loader.)
    pub generation: u32,
    /// When the client was accepted: milliseconds since 1970. (Loader.)
    pub accepted_ms: u64,
    /// [`CLIENT`] and [`SERVER`].
    pub halves: [Half; 2],
}

/// [`Event::kind`]: this end has acknowledged the other one's FIN.
pub const EVENT_CLOSED: u8 = 1;
/// [`Event::kind`]: a RST passed that its receiver must accept.
pub const EVENT_RESET: u8 = 2;
/// [`Event::kind`]: a segment was too large, for our device or for a router further on.
pub const EVENT_TOO_BIG: u8 = 3;
/// [`Event::kind`]: after its end, the client begins a new connection with the same addresses.
pub const EVENT_LEFT: u8 = 4;
/// [`Event::kind`]: a segment reached the stack: a device may have lost the programs. At most one
/// in a while.
pub const EVENT_STRAY: u8 = 5;

/// Something that the loader should know of a switched connection.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Event {
    /// Index of the record.
    pub slot: u32,
    /// Its generation.
    pub generation: u32,
    /// Sequence number of the segment that was too large, as its sender wrote it.
    pub sequence: u32,
    /// What would have fitted, in bytes from the IP header on.
    pub mtu: u32,
    /// One of the `EVENT_` constants.
    pub kind: u8,
    /// The half of the end that closed first, sent the RST or the segment that was too large.
    pub side: u8,
    /// Named, so that every byte is written.
    pub padding: [u8; 2],
}

impl Event {
    /// Reads a record of the ring buffer; `None` if it has another size, so another layout.
    #[must_use]
    pub fn from_record(record: &[u8]) -> Option<Self> {
        if record.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: the record has the size of this type, all of whose bit patterns are valid
        // (integers only); read_unaligned asks nothing of the pointer's alignment.
        Some(unsafe { record.as_ptr().cast::<Self>().read_unaligned() })
    }
}

const _: () = {
    assert!(size_of::<FlowRef>() == 8);
    assert!(offset_of!(Half, mtu) == 36);
    assert!(offset_of!(Half, seen_ns) == 96);
    assert!(size_of::<Half>() == 120);
    assert!(offset_of!(Record, halves) == 16);
    assert!(size_of::<Record>() == 256);
    assert!(size_of::<Event>() == 20);
};

#[cfg(feature = "user")]
mod pod {
    use super::FlowRef;

    // SAFETY: repr(C), only integers, and no padding: see the size assertions above.
    unsafe impl aya::Pod for FlowRef {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_knows_its_half_and_its_generation() {
        for generation in [0, 1, 77, u32::MAX >> 2, u32::MAX] {
            for side in [CLIENT, SERVER] {
                let flow = FlowRef::new(9, generation, side);
                assert_eq!(flow.side(), side);
                assert!(flow.is_of(generation));
                assert!(!flow.is_of(generation.wrapping_add(1)));
            }
        }
    }

    #[test]
    fn an_event_of_another_size_is_refused() {
        assert!(Event::from_record(&[0; size_of::<Event>() + 1]).is_none());
        assert!(Event::from_record(&[1; size_of::<Event>()]).is_some());
    }
}

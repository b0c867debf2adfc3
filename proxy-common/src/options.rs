//! TCP options, parsed by one function on both sides of the kernel boundary.

/// A TCP header has room for no more bytes of options.
pub const MAX_OPTIONS: usize = 40;

/// Options in a buffer of the next power of two, the rest of it zero. An index into it can be
/// masked instead of compared: a mask is the one bound that no optimiser moves away from the
/// access, where the verifier looks for it.
pub type OptionsBuffer = [u8; 64];

const END: u8 = 0;
const NOP: u8 = 1;
const MSS: u8 = 2;
const WINDOW_SCALE: u8 = 3;
const SACK_PERMITTED: u8 = 4;
const TIMESTAMPS: u8 = 8;
const MD5_SIGNATURE: u8 = 19;
const AUTHENTICATION: u8 = 29;
const MULTIPATH: u8 = 30;

/// The options that decide whether two connections can be joined, and with which offsets.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TcpOptions {
    /// The sender's clock.
    pub tsval: u32,
    /// The receiver's clock as the sender last saw it.
    pub tsecr: u32,
    /// Largest segment that the sender takes, in bytes.
    pub mss: u16,
    /// Shift of the sender's windows, at most 14.
    pub window_scale: u8,
    /// Which of the options were there; see the constants of this type.
    pub present: u8,
    /// Bytes that were understood: all, or those before the end-of-options mark or the first
    /// malformed option.
    pub parsed: u32,
}

impl TcpOptions {
    /// Bit of [`Self::present`]: [`Self::mss`] was given.
    pub const HAS_MSS: u8 = 1 << 0;
    /// Bit of [`Self::present`]: [`Self::window_scale`] was given.
    pub const HAS_WINDOW_SCALE: u8 = 1 << 1;
    /// Bit of [`Self::present`]: the sender understands selective acknowledgements.
    pub const SACK_PERMITTED: u8 = 1 << 2;
    /// Bit of [`Self::present`]: [`Self::tsval`] and [`Self::tsecr`] were given.
    pub const HAS_TIMESTAMPS: u8 = 1 << 3;
    /// Bit of [`Self::present`]: authentication (MD5, AO) or MPTCP, which tie segments to one
    /// connection.
    pub const FOREIGN: u8 = 1 << 6;
    /// Bit of [`Self::present`]: an option's length was impossible, and what follows it is unknown; or
    /// there are options in the IP header as well.
    pub const MALFORMED: u8 = 1 << 7;

    /// Whether all of `bits` are set in [`Self::present`].
    #[must_use]
    pub const fn has(&self, bits: u8) -> bool {
        self.present & bits == bits
    }

    /// Parses the first `length` of `bytes`. An option of a known kind but of a wrong length is
    /// malformed, as for the kernel; unknown kinds are skipped.
    #[must_use]
    pub fn parse(bytes: &OptionsBuffer, length: u32) -> Self {
        let mut found = Self::default();
        found.parse_in_place(bytes, length);
        found
    }

    /// The same for a value that begins as the default and, in a kernel program, lies in a ring
    /// buffer's record.
    ///
    /// Written for the verifier: a loop with a fixed bound, masked indices, and a cursor that is
    /// read anew from memory which the verifier does not follow. In a register it would be one of
    /// forty numbers after every option, and the verifier would walk through all their sequences.
    #[inline(always)]
    pub fn parse_in_place(&mut self, bytes: &OptionsBuffer, length: u32) {
        for _ in 0..MAX_OPTIONS {
            // SAFETY: a plain read through a reference; volatile only to keep it in memory.
            let at = unsafe { core::ptr::read_volatile(&raw const self.parsed) } as usize;
            if at >= length as usize {
                break;
            }
            let kind = byte(bytes, at);
            if kind == END {
                break;
            }
            let size = if kind == NOP { 1 } else { byte(bytes, at + 1) as usize };
            if kind != NOP
                && (size < 2
                    || at + size > length as usize
                    || !self.take(kind, size, bytes, at + 2))
            {
                self.present |= Self::MALFORMED;
                break;
            }
            // SAFETY: a plain write through a reference.
            unsafe { core::ptr::write_volatile(&raw mut self.parsed, (at + size) as u32) };
        }
    }

    /// Notes one option whose value begins `at`; false if its size does not fit its kind.
    #[inline(always)]
    fn take(&mut self, kind: u8, size: usize, bytes: &OptionsBuffer, at: usize) -> bool {
        match kind {
            MSS if size == 4 => {
                self.mss = u16::from_be_bytes([byte(bytes, at), byte(bytes, at + 1)]);
                self.present |= Self::HAS_MSS;
            }
            WINDOW_SCALE if size == 3 => {
                // RFC 7323: a greater shift is to be taken as 14.
                let shift = byte(bytes, at);
                self.window_scale = if shift > 14 { 14 } else { shift };
                self.present |= Self::HAS_WINDOW_SCALE;
            }
            SACK_PERMITTED if size == 2 => self.present |= Self::SACK_PERMITTED,
            TIMESTAMPS if size == 10 => {
                self.tsval = word(bytes, at);
                self.tsecr = word(bytes, at + 4);
                self.present |= Self::HAS_TIMESTAMPS;
            }
            MSS | WINDOW_SCALE | SACK_PERMITTED | TIMESTAMPS => return false,
            MD5_SIGNATURE | AUTHENTICATION | MULTIPATH => self.present |= Self::FOREIGN,
            _ => {}
        }
        true
    }
}

/// The byte there. An index past the end, which only a wrong length could bring about, wraps: no
/// panic, which a kernel program could not contain.
#[inline(always)]
fn byte(bytes: &OptionsBuffer, at: usize) -> u8 {
    bytes[at & (size_of::<OptionsBuffer>() - 1)]
}

#[inline(always)]
fn word(bytes: &OptionsBuffer, at: usize) -> u32 {
    u32::from_be_bytes([
        byte(bytes, at),
        byte(bytes, at + 1),
        byte(bytes, at + 2),
        byte(bytes, at + 3),
    ])
}

const _: () = assert!(size_of::<TcpOptions>() == 16);

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[u8]) -> TcpOptions {
        let mut bytes = [0; size_of::<OptionsBuffer>()];
        bytes[..options.len()].copy_from_slice(options);
        TcpOptions::parse(&bytes, options.len() as u32)
    }

    /// What Linux sends on a SYN.
    const LINUX_SYN: [u8; 20] =
        [2, 4, 0x05, 0xb4, 4, 2, 8, 10, 0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0, 1, 3, 3, 7];

    #[test]
    fn a_linux_syn_is_read_whole() {
        let found = parse(&LINUX_SYN);
        let expected = TcpOptions {
            tsval: 0x1234_5678,
            tsecr: 0,
            mss: 1460,
            window_scale: 7,
            present: TcpOptions::HAS_MSS
                | TcpOptions::HAS_WINDOW_SCALE
                | TcpOptions::SACK_PERMITTED
                | TcpOptions::HAS_TIMESTAMPS,
            parsed: 20,
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn no_options_is_nothing_found() {
        assert_eq!(parse(&[]), TcpOptions::default());
    }

    #[test]
    fn forty_nops_end_the_loop() {
        let expected = TcpOptions { parsed: MAX_OPTIONS as u32, ..TcpOptions::default() };
        assert_eq!(parse(&[NOP; MAX_OPTIONS]), expected);
    }

    #[test]
    fn nothing_is_read_after_the_end_of_options() {
        assert_eq!(parse(&[END, 2, 4, 5, 180]), TcpOptions::default());
    }

    #[test]
    fn unknown_kinds_are_skipped_and_later_ones_found() {
        let found = parse(&[30, 4, 0, 0, 254, 2, 2, 4, 1, 0]);
        assert!(found.has(TcpOptions::HAS_MSS) && !found.has(TcpOptions::MALFORMED));
        assert_eq!(found.mss, 256);
    }

    #[test]
    fn a_window_scale_above_14_counts_as_14() {
        assert_eq!(parse(&[3, 3, 255]).window_scale, 14);
    }

    #[test]
    fn impossible_lengths_are_malformed_and_what_came_before_is_kept() {
        for tail in [&[2u8, 0][..], &[2, 1], &[2, 4, 5], &[2, 3, 5], &[8, 9, 0, 0, 0, 0, 0, 0, 0]] {
            let mut options = [0; 16];
            options[..2].copy_from_slice(&[4, 2]);
            options[2..2 + tail.len()].copy_from_slice(tail);
            let found = parse(&options[..2 + tail.len()]);
            assert!(found.has(TcpOptions::SACK_PERMITTED | TcpOptions::MALFORMED), "{tail:?}");
            assert!(!found.has(TcpOptions::HAS_MSS), "{tail:?}");
        }
    }

    #[test]
    fn a_kind_without_its_length_byte_is_malformed() {
        assert!(parse(&[NOP, 2]).has(TcpOptions::MALFORMED));
        let mut full = [NOP; MAX_OPTIONS];
        full[MAX_OPTIONS - 1] = 8;
        assert!(parse(&full).has(TcpOptions::MALFORMED));
    }

    #[test]
    fn no_input_makes_it_panic() {
        // A multiplicative generator is enough to reach every branch with odd neighbours.
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..20_000 {
            let mut bytes = [0; size_of::<OptionsBuffer>()];
            for byte in &mut bytes {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (state >> 60) as u8;
            }
            let _ = TcpOptions::parse(&bytes, (state >> 33) as u32 % 100);
        }
    }
}

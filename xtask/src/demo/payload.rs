//! The bytes of bulk transfers: a known sequence that either end can tell at any offset, so every
//! byte is compared, at a cost far below a digest's.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};

use anyhow::{Result, ensure};
use hyper::body::{Body, Bytes, Frame, SizeHint};

/// The sequence repeats after this many bytes. Odd, so that a lost or doubled buffer, whose size
/// is a power of two, never lands on equal bytes.
const PERIOD: usize = 256_271;

/// Bytes handed to the connection at a time.
const PIECE: usize = 64 * 1024;

static SEQUENCE: LazyLock<Bytes> = LazyLock::new(|| {
    let mut state = 0x9e37_79b9_u32;
    let next = |_| {
        // A linear congruential generator; its high bits are the good ones.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..PERIOD).map(next).collect()
});

/// A body of the first `bytes` of the sequence; 0 makes an empty one.
#[derive(Debug)]
pub struct Payload {
    offset: usize,
    left: u64,
}

impl Payload {
    /// The first `bytes` of the sequence.
    pub fn new(bytes: u64) -> Self {
        Self { offset: 0, left: bytes }
    }
}

impl Body for Payload {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        let length = left.min(PIECE).min(PERIOD - self.offset);
        if length == 0 {
            return Poll::Ready(None);
        }
        let piece = SEQUENCE.slice(self.offset..self.offset + length);
        self.offset = (self.offset + length) % PERIOD;
        self.left -= length as u64;
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// Compares what arrives with the sequence.
#[derive(Debug, Default)]
pub struct Check {
    /// Bytes that arrived so far, all of them right.
    pub bytes: u64,
    offset: usize,
}

impl Check {
    /// The next bytes.
    ///
    /// # Errors
    /// They differ from the sequence.
    pub fn take(&mut self, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            let length = data.len().min(PERIOD - self.offset);
            let (now, rest) = data.split_at(length);
            let wanted = &SEQUENCE[self.offset..self.offset + length];
            ensure!(now == wanted, "damaged within {length} bytes from byte {} on", self.bytes);
            self.offset = (self.offset + length) % PERIOD;
            self.bytes += length as u64;
            data = rest;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(bytes: usize) -> Vec<u8> {
        SEQUENCE.iter().copied().cycle().take(bytes).collect()
    }

    #[test]
    fn the_sequence_passes_in_pieces_of_any_size() {
        let bytes = sequence(3 * PERIOD);
        let mut check = Check::default();
        for piece in bytes.chunks(4099) {
            check.take(piece).expect("it is the sequence");
        }
        assert_eq!(check.bytes, bytes.len() as u64);
    }

    #[test]
    fn a_flipped_bit_and_a_lost_buffer_show() {
        let mut bytes = sequence(2 * PERIOD);
        bytes[PERIOD + 7] ^= 1;
        assert!(Check::default().take(&bytes).is_err());
        let mut bytes = sequence(2 * PERIOD);
        bytes.drain(4096..4096 + PIECE);
        assert!(Check::default().take(&bytes).is_err());
    }
}

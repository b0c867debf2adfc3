//! Streams of known bytes, made up as they are needed, so that 200 MB take no memory and every
//! received byte can be compared with the one that belongs at its place.
//!
//! Comparing beats a digest: it says where a stream went wrong, and what came instead. A stream
//! is a row of blocks. Each begins with a mark of its seed and number, so that blocks lost,
//! doubled, swapped or delivered to the wrong connection are noticed; the rest is cut from a
//! table of random bytes at a place that depends on the same two.

use std::sync::OnceLock;

const BLOCK: usize = 16 * 1024;
const MARK: usize = 8;
const TABLE: usize = BLOCK * 5;

/// A position in the stream of one seed.
#[derive(Debug, Clone)]
pub struct Stream {
    seed: u64,
    position: u64,
}

impl Stream {
    /// The stream of `seed` from its first byte on.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { seed, position: 0 }
    }

    /// Bytes before this position.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Fills `buffer` with the bytes at this position, which stays where it is.
    pub fn peek(&self, buffer: &mut [u8]) {
        self.clone().fill(buffer);
    }

    /// Goes on by `bytes`.
    pub fn advance(&mut self, bytes: usize) {
        self.position += bytes as u64;
    }

    /// Fills `buffer` with the next bytes.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        let mut rest = buffer;
        while !rest.is_empty() {
            let taken = self.with_piece(rest.len(), |piece| {
                rest[..piece.len()].copy_from_slice(piece);
                piece.len()
            });
            rest = &mut rest[taken..];
            self.advance(taken);
        }
    }

    /// Compares `got` with the next bytes.
    ///
    /// # Errors
    /// Which byte of the stream differs, and how.
    pub fn check(&mut self, got: &[u8]) -> Result<(), String> {
        let mut rest = got;
        while !rest.is_empty() {
            let seed = self.seed;
            let position = self.position;
            let taken = self.with_piece(rest.len(), |piece| {
                let got = &rest[..piece.len()];
                if got == piece {
                    return Ok(piece.len());
                }
                let at = got.iter().zip(piece).position(|(a, b)| a != b).unwrap_or(0);
                Err(format!(
                    "byte {} of stream {seed} is {:#04x}, not {:#04x}",
                    position + at as u64,
                    got[at],
                    piece[at]
                ))
            })?;
            rest = &rest[taken..];
            self.advance(taken);
        }
        Ok(())
    }

    /// Hands `use_piece` up to `most` of the next bytes (never none).
    fn with_piece<T>(&self, most: usize, use_piece: impl FnOnce(&[u8]) -> T) -> T {
        let number = self.position / BLOCK as u64;
        let offset = (self.position % BLOCK as u64) as usize;
        let mark = mix(self.seed.rotate_left(32) ^ number);
        if offset < MARK {
            let end = MARK.min(offset + most);
            return use_piece(&mark.to_le_bytes()[offset..end]);
        }
        let start = (mark % (TABLE - BLOCK) as u64) as usize + offset;
        let end = start + most.min(BLOCK - offset);
        use_piece(&table()[start..end])
    }
}

fn table() -> &'static [u8; TABLE] {
    static BYTES: OnceLock<Box<[u8; TABLE]>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let mut bytes = Box::new([0; TABLE]);
        let mut dice = Dice::new(0);
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&dice.roll().to_le_bytes());
        }
        bytes
    })
}

/// Steele, Lea and Flood's SplitMix64, whose output function is a bijection.
fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Chance that falls the same way in every run.
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// A row of numbers that depends on `seed` alone.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(mix(!seed))
    }

    /// The next number.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A size from 1 to `most` bytes; small ones are as frequent as large ones.
    pub fn size(&mut self, most: usize) -> usize {
        let bits = 1 + self.roll() % u64::from(usize::BITS - most.leading_zeros());
        (1 + self.roll() % (1 << bits)).min(most as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(seed: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        Stream::new(seed).fill(&mut bytes);
        bytes
    }

    #[test]
    fn pieces_of_any_size_give_the_same_stream() {
        let whole = bytes(7, 100_000);
        let mut stream = Stream::new(7);
        let mut dice = Dice::new(1);
        let mut pieces = Vec::new();
        while pieces.len() < whole.len() {
            let mut piece = vec![0; dice.size(20_000).min(whole.len() - pieces.len())];
            stream.fill(&mut piece);
            pieces.extend(piece);
        }
        assert!(pieces == whole);
        assert!(Stream::new(7).check(&whole).is_ok());
    }

    #[test]
    fn a_wrong_byte_is_found_where_it_is() {
        let mut got = bytes(7, 50_000);
        got[40_000] ^= 1;
        let error = Stream::new(7).check(&got).expect_err("a byte is wrong");
        assert!(error.starts_with("byte 40000 of stream 7"), "{error}");
    }

    #[test]
    fn lost_swapped_and_foreign_blocks_are_noticed() {
        let whole = bytes(7, BLOCK * 8);
        assert!(Stream::new(7).check(&whole[BLOCK..]).is_err());
        let mut swapped = whole[BLOCK * 4..].to_vec();
        swapped.extend(&whole[..BLOCK * 4]);
        assert!(Stream::new(7).check(&swapped).is_err());
        for seed in 8..500 {
            assert!(Stream::new(seed).check(&whole[..MARK]).is_err(), "seed {seed}");
        }
    }

    #[test]
    fn sizes_cover_their_range() {
        let mut dice = Dice::new(3);
        let sizes: Vec<_> = (0..10_000).map(|_| dice.size(65_536)).collect();
        assert!(sizes.iter().all(|s| (1..=65_536).contains(s)));
        assert!(sizes.iter().any(|s| *s < 4) && sizes.iter().any(|s| *s > 60_000));
    }
}

//! Keys for the counter-based generator: every random draw of a run is a function of its seed and of where it is used. And
//! a hash made of the same parts.

use rayon::prelude::*;

/// A key that depends on both arguments (SplitMix64's finaliser over their combination).
pub(crate) fn mix(key: u64, place: u64) -> u64 {
    let mut z = key
        .wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A hash of some bytes that any flipped bit changes: fast, and no protection against intent.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    const PIECE: usize = 1 << 20;
    let pieces: Vec<u64> = bytes.par_chunks(PIECE).map(hash_piece).collect();
    pieces.into_iter().fold(bytes.len() as u64, mix)
}

/// Four sums side by side, so that the processor need not wait for one before it begins the next. Every step is a bijection of the
/// sum and of the word, so no flipped bit is lost.
fn hash_piece(piece: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut sums = [1u64, 2, 3, 4];
    let step = |sum: u64, word: u64| (sum ^ word).wrapping_mul(ODD).rotate_left(29);
    for words in piece.chunks(32) {
        for (sum, bytes) in sums.iter_mut().zip(words.chunks(8)) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            *sum = step(*sum, u64::from_le_bytes(word));
        }
    }
    sums.into_iter().fold(piece.len() as u64, mix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_changes_the_hash() {
        let mut bytes: Vec<u8> = (0..(1u32 << 20) + 77)
            .map(|n| ((n * 7) >> 3) as u8)
            .collect();
        let before = hash(&bytes);
        for place in [0, 1, 7, 8, 31, 32, 1000, 1 << 20, bytes.len() - 1] {
            for bit in [1, 128] {
                bytes[place] ^= bit;
                assert_ne!(hash(&bytes), before, "bit {bit} of byte {place}");
                bytes[place] ^= bit;
            }
        }
        assert_eq!(hash(&bytes), before);
        assert_ne!(hash(&bytes[1..]), before);
        assert_ne!(hash(&[0; 8]), hash(&[0; 16]));
    }
}

//! Random numbers from a key and a counter (Philox 4×32, ten rounds; Salmon et al., "Parallel
//! random numbers: as easy as 1, 2, 3", 2011).
//!
//! There is no state: the number at a position is a function of the key and the position, so it is
//! the same whoever computes it, in whatever order, now or after a resume.

use rayon::prelude::*;

use crate::cpu::parallel::ForEachPart;
use crate::cpu::simd;
use crate::view::ViewMut;

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Four random words for a counter under a key.
fn philox(key: u64, counter: [u32; 4]) -> [u32; 4] {
    let mut key = [key as u32, (key >> 32) as u32];
    let mut c = counter;
    for _ in 0..ROUNDS {
        let first = u64::from(MULTIPLIERS[0]) * u64::from(c[0]);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(c[2]);
        c = [
            (second >> 32) as u32 ^ c[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ c[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    c
}

fn philox_at(key: u64, block: u64) -> [u32; 4] {
    philox(key, [block as u32, (block >> 32) as u32, 0, 0])
}

/// A stream of random numbers for host code: shuffling, sampling.
///
/// The pair of fields is the whole state, so storing it is enough to go on later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CounterRng {
    /// Which stream.
    pub key: u64,
    /// How many 32-bit numbers have been drawn.
    pub counter: u64,
}

impl CounterRng {
    /// The stream of a key, from its start.
    pub fn new(key: u64) -> Self {
        Self { key, counter: 0 }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        let words = philox_at(self.key, self.counter / 4);
        let word = words[(self.counter % 4) as usize];
        self.counter = self.counter.wrapping_add(1);
        word
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let low = u64::from(self.next_u32());
        low | u64::from(self.next_u32()) << 32
    }

    /// A number in [0, 1) with 53 random bits.
    pub fn next_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A number below `n`, each as likely as the others.
    ///
    /// # Panics
    /// If `n` is zero.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "there is no number below zero");
        // Words under 2⁶⁴ mod n would favour the small results, so they are drawn again.
        let reject = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            if product as u64 >= reject {
                return (product >> 64) as u64;
            }
        }
    }
}

/// Numbers that a task of a fill makes; a multiple of four.
const BLOCK: usize = 4096;

/// Overwrites with draws from the normal distribution of mean 0 and this standard deviation.
pub fn fill_normal(y: ViewMut<'_>, std: f32, key: u64) {
    fill(y, key, |words| {
        let [a, b] = box_muller(words[0], words[1]);
        let [c, d] = box_muller(words[2], words[3]);
        [a, b, c, d].map(|x| (f64::from(std) * x) as f32)
    });
}

/// Overwrites with draws from the uniform distribution over [low, high).
pub fn fill_uniform(y: ViewMut<'_>, low: f32, high: f32, key: u64) {
    fill(y, key, |words| {
        words.map(|word| {
            let x = unit(word) * f64::from(high - low) + f64::from(low);
            // Rounding to f32 may reach `high`, which is not part of the range.
            (x as f32).min(high.next_down()).max(low)
        })
    });
}

fn fill(y: ViewMut<'_>, key: u64, draw: impl Fn([u32; 4]) -> [f32; 4] + Sync) {
    y.into_f32s()
        .par_chunks_mut(BLOCK)
        .enumerate()
        .for_each_part(|(block, chunk)| {
            let first = (block * BLOCK / 4) as u64;
            for (i, four) in chunk.chunks_mut(4).enumerate() {
                let values = draw(philox_at(key, first + i as u64));
                four.copy_from_slice(&values[..four.len()]);
            }
        });
}

/// A number in [0, 1) from 32 bits.
fn unit(word: u32) -> f64 {
    f64::from(word) / 4_294_967_296.0
}

/// Two independent standard normal draws from two uniform ones.
fn box_muller(first: u32, second: u32) -> [f64; 2] {
    // 1 - u lies in (0, 1], so the logarithm is finite.
    let radius = (-2.0 * (1.0 - unit(first)).ln()).sqrt();
    let (sin, cos) = (std::f64::consts::TAU * unit(second)).sin_cos();
    [radius * cos, radius * sin]
}

/// Columns whose mask is computed at once.
const MASK: usize = 64;
/// Blocks of random words that run side by side, one in each lane of a vector.
const LANES: usize = 8;

/// Copies `x`, which are the columns from `first` on of row `row`, to `y`, with elements dropped
/// with probability `p` (in steps of 2⁻¹⁶) and the kept ones multiplied by `1 / (1 - p)`.
///
/// Whether an element is kept depends on the key, its row and its column alone.
pub(crate) fn drop_out(y: &mut [f32], x: &[f32], p: f32, key: u64, row: usize, first: usize) {
    let keep = 1.0 / (1.0 - p);
    let threshold = (f64::from(p) * 65_536.0).round() as u32;
    simd::vectorize(
        #[inline(always)]
        || {
            let (mut y, mut x, mut column) = (y, x, first);
            while !y.is_empty() {
                let factors = mask(threshold, keep, key, row as u64, (column / MASK) as u32);
                let start = column % MASK;
                let count = (MASK - start).min(y.len());
                let (y_now, y_later) = y.split_at_mut(count);
                let (x_now, x_later) = x.split_at(count);
                for ((y, x), factor) in y_now.iter_mut().zip(x_now).zip(&factors[start..]) {
                    // Not a product: a dropped infinity is zero.
                    *y = if *factor == 0.0 { 0.0 } else { x * factor };
                }
                (y, x, column) = (y_later, x_later, column + count);
            }
        },
    );
}

/// The factors of 64 columns of a row.
#[inline(always)]
fn mask(threshold: u32, keep: f32, key: u64, row: u64, group: u32) -> [f32; MASK] {
    // Block `lane` of the group gives four words, and each word 16 bits for each of two columns;
    // neighbouring columns are in neighbouring lanes.
    let words = philox_lanes(key, group, [row as u32, (row >> 32) as u32, 1]);
    let mut factors = [0.0; MASK];
    for (i, eight) in factors.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        for (lane, factor) in eight.iter_mut().enumerate() {
            let bits = words[i / 2][lane] >> (16 * (i % 2) as u32) & 0xFFFF;
            *factor = if bits < threshold { 0.0 } else { keep };
        }
    }
    factors
}

/// [`philox`] of the counters `8·group + lane`, followed by `rest`: word by word, then lane by lane.
#[inline(always)]
fn philox_lanes(key: u64, group: u32, rest: [u32; 3]) -> [[u32; LANES]; 4] {
    let first = group.wrapping_mul(LANES as u32);
    let mut c = [[0; LANES]; 4];
    for lane in 0..LANES {
        c[0][lane] = first.wrapping_add(lane as u32);
    }
    for (word, value) in c[1..].iter_mut().zip(rest) {
        *word = [value; LANES];
    }
    let mut key = [key as u32, (key >> 32) as u32];
    for _ in 0..ROUNDS {
        let mut next = [[0; LANES]; 4];
        for lane in 0..LANES {
            let first = u64::from(MULTIPLIERS[0]) * u64::from(c[0][lane]);
            let second = u64::from(MULTIPLIERS[1]) * u64::from(c[2][lane]);
            next[0][lane] = (second >> 32) as u32 ^ c[1][lane] ^ key[0];
            next[1][lane] = second as u32;
            next[2][lane] = (first >> 32) as u32 ^ c[3][lane] ^ key[1];
            next[3][lane] = first as u32;
        }
        c = next;
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_answers() {
        // The known answers that come with the authors' library.
        assert_eq!(
            philox(0, [0; 4]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox(u64::MAX, [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(
                0x299f_31d0_a409_3822,
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_stream_goes_on_from_its_two_numbers() {
        let mut rng = CounterRng::new(7);
        let first: Vec<u32> = (0..11).map(|_| rng.next_u32()).collect();
        let mut later = CounterRng { key: 7, counter: 5 };
        let rest: Vec<u32> = (0..6).map(|_| later.next_u32()).collect();
        assert_eq!(first[5..], rest);
        assert_eq!(rng, later);
        assert_ne!(CounterRng::new(8).next_u32(), first[0]);
    }

    #[test]
    fn numbers_below_are_even() {
        let mut rng = CounterRng::new(3);
        let mut counts = [0_u32; 6];
        for _ in 0..60_000 {
            counts[rng.below(6) as usize] += 1;
        }
        // Five standard deviations are 456.
        assert!(
            counts.iter().all(|&n| n.abs_diff(10_000) < 456),
            "{counts:?}"
        );
        assert_eq!(rng.below(1), 0);
        let x = rng.next_f64();
        assert!((0.0..1.0).contains(&x));
    }

    #[test]
    fn lanes_are_the_same_function() {
        let (key, group, rest) = (0x0123_4567_89ab_cdef, 5, [7, 8, 9]);
        let lanes = philox_lanes(key, group, rest);
        for lane in 0..LANES {
            let counter = [8 * group + lane as u32, rest[0], rest[1], rest[2]];
            let words = lanes.map(|word| word[lane]);
            assert_eq!(words, philox(key, counter));
        }
    }

    #[test]
    fn a_mask_does_not_depend_on_where_a_piece_starts() {
        let x = vec![1.0; 150];
        let mut whole = vec![0.0; 150];
        drop_out(&mut whole, &x, 0.5, 9, 3, 0);
        for start in [1, 3, 63, 64, 65, 130] {
            let mut piece = vec![0.0; 150 - start];
            drop_out(&mut piece, &x[start..], 0.5, 9, 3, start);
            assert_eq!(whole[start..], piece);
        }
    }
}

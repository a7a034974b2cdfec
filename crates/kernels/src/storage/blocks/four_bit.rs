//! NF4 and FP4, the two types of four bits that bitsandbytes has: each number is one of 16 values, times the largest magnitude of its block.
//!
//! bitsandbytes keeps these magnitudes apart from the numbers. Here a block has its own, so that a row can be read, copied and moved like any
//! other row of blocks; [`FourBit`](crate::FourBit) brings them together.

use bytemuck::{Pod, Zeroable};

use super::quantize::{Quantize, largest};
use super::vectors::Vectors;
use super::{Block, GROUP, RUN, Widen, sixteen};

/// Numbers of a block.
pub(crate) const LEN: usize = 64;

/// NF4's values: quantiles of the normal distribution, from -1 to 1 (QLoRA, <https://arxiv.org/abs/2305.14314>, appendix E).
pub(crate) const NF4_VALUES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// FP4's values: a sign, two bits of exponent and one of mantissa, divided by the largest, 12.
pub(crate) const FP4_VALUES: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    6.0 / 12.0,
    2.0 / 12.0,
    3.0 / 12.0,
    -0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -6.0 / 12.0,
    -2.0 / 12.0,
    -3.0 / 12.0,
];

/// The places of the values in ascending order. Of FP4's two zeros that of the lower place is first.
const NF4_ORDER: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

/// The means of neighbouring values, where numbers are rounded to the next one.
const fn bounds(values: &[f32; 16], order: &[u8; 16]) -> [f32; 15] {
    let (mut bounds, mut i) = ([0.0; 15], 0);
    while i < 15 {
        bounds[i] = f32::midpoint(values[order[i] as usize], values[order[i + 1] as usize]);
        i += 1;
    }
    bounds
}

/// The places of the values that are nearest to 64 numbers divided by the largest of them, and the largest.
///
/// As bitsandbytes does it on CPUs (`quantize_4bit` in `backends/default/ops.py`): a number is multiplied with the inverse of the largest, and
/// one in the middle of two values becomes the lower.
fn places(numbers: &[f32], bounds: &[f32; 15], order: &[u8; 16]) -> (f32, [u8; LEN]) {
    let largest = largest(numbers).abs();
    let factor = 1.0 / largest.max(1e-38);
    let mut places = [0; LEN];
    for (place, x) in places.iter_mut().zip(numbers) {
        let x = (x * factor).clamp(-1.0, 1.0);
        let below: u8 = bounds.iter().map(|bound| u8::from(x > *bound)).sum();
        *place = order[usize::from(below)];
    }
    (largest, places)
}

/// The places of 64 numbers, two a byte: of each group the first 16 in the low halves, the others in the high ones.
fn packed(places: &[u8; LEN]) -> [u8; LEN / 2] {
    std::array::from_fn(|i| {
        let at = i / RUN * 2 * RUN + i % RUN;
        places[at] | places[at + RUN] << 4
    })
}

macro_rules! four_bit {
    ($type:ident, $name:literal, $values:ident, $order:ident) => {
        #[derive(Clone, Copy, Pod, Zeroable)]
        #[repr(C)]
        pub(super) struct $type {
            d: [u8; 4],
            qs: [u8; LEN / 2],
        }

        impl Block for $type {
            const NAME: &'static str = $name;
            const LEN: usize = LEN;
        }

        impl Widen for $type {
            #[inline(always)]
            fn widen(&self, to: &mut [[f32; GROUP]], first: usize, vectors: impl Vectors) {
                let d = f32::from_le_bytes(self.d);
                for (i, to) in to.iter_mut().enumerate() {
                    let places = vectors.halves(sixteen(&self.qs, first + i));
                    vectors.widen_at(to, &$values, places, d);
                }
            }
        }

        impl Quantize for $type {
            fn quantized(numbers: &[f32]) -> Option<Self> {
                const BOUNDS: [f32; 15] = bounds(&$values, &$order);
                let (largest, places) = places(numbers, &BOUNDS, &$order);
                let (d, qs) = (largest.to_le_bytes(), packed(&places));
                Some(Self { d, qs })
            }
        }
    };
}

four_bit!(Nf4, "NF4", NF4_VALUES, NF4_ORDER);
four_bit!(Fp4, "FP4", FP4_VALUES, FP4_ORDER);

/// Bytes of a block.
pub(crate) const BYTES: usize = size_of::<Nf4>();

/// Puts a block in its bytes: its scale, and 64 places of values that bitsandbytes has packed, the first of two numbers in the high half of
/// a byte.
pub(crate) fn put(to: &mut [u8; BYTES], scale: f32, from: &[u8; LEN / 2]) {
    let places = std::array::from_fn(|i| from[i / 2] >> (4 * (1 - i % 2)) & 15);
    let (d, qs) = to.split_at_mut(size_of::<f32>());
    d.copy_from_slice(&scale.to_le_bytes());
    qs.copy_from_slice(&packed(&places));
}

/// A block's scale, and its places as bitsandbytes packs them.
pub(crate) fn take(from: &[u8; BYTES]) -> (f32, [u8; LEN / 2]) {
    let (d, qs) = from.split_at(size_of::<f32>());
    let place = |i: usize| qs[i / (2 * RUN) * RUN + i % RUN] >> (4 * (i / RUN % 2)) & 15;
    let packed = std::array::from_fn(|i| place(2 * i) << 4 | place(2 * i + 1));
    let scale = d.try_into().map_or(0.0, f32::from_le_bytes);
    (scale, packed)
}

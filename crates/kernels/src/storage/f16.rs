//! IEEE half precision, which is read and stored, and never computed with.

use half::f16;

use crate::cpu::simd::dispatch;

/// Widens numbers.
pub(super) fn widen(to: &mut [f32], from: &[f16]) {
    dispatch(
        #[inline(always)]
        || {
            for (to, from) in to.iter_mut().zip(from) {
                *to = wide(from.to_bits());
            }
        },
    );
}

/// The nearest number, ties to even, if it is finite.
pub(super) fn rounded(x: f32) -> Option<[u8; 2]> {
    let rounded = f16::from_f32(x);
    rounded.is_finite().then(|| rounded.to_le_bytes())
}

/// The number of these bits: what `f16::to_f32` gives, in operations that loops of vectors have.
#[inline(always)]
pub(super) fn wide(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff);
    // The exponents of an f16 begin 112 lower; the product is exact, also of numbers below the smallest normal one.
    let scaled = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
    let special = f32::from_bits(magnitude << 13 | 0xff << 23);
    let number = if magnitude < 0x7c00 { scaled } else { special };
    f32::from_bits(number.to_bits() | u32::from(bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_what_it_is() {
        let numbers: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let mut found = vec![0.0; numbers.len()];
        widen(&mut found, &numbers);
        for (number, found) in numbers.iter().zip(found) {
            let expected = number.to_f32();
            assert!(
                expected.to_bits() == found.to_bits() || expected.is_nan() && found.is_nan(),
                "{number:?} {found:?}"
            );
        }
    }
}

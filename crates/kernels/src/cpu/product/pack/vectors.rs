//! Panels packed with what vectors there are.

use super::Panels;
use crate::cpu::product::layout::NR;
use crate::cpu::simd::vectorize;
use crate::storage::Number;

/// Inner indices that are turned at once: as many as a vector of NEON has numbers.
pub(super) const STEP: usize = 4;

/// The first `whole` panels of b as it lies: its rows start `stride` apart.
///
/// # Panics
/// If a size does not fit.
pub(super) fn pack_straight<N: Number>(
    to: &mut Panels<'_>,
    from: &[N],
    stride: usize,
    whole: usize,
) {
    vectorize(
        #[inline(always)]
        || {
            for (p, row) in to.part.clone().enumerate() {
                let from = &from[p * stride..][..whole * NR];
                for (panel, from) in from.as_chunks::<NR>().0.iter().enumerate() {
                    let to = &mut to.numbers[(panel * to.inner + row) * NR..][..NR];
                    for (to, from) in to.iter_mut().zip(from) {
                        *to = from.wide();
                    }
                }
            }
        },
    );
}

/// The first `inner` rows of a panel from 16 rows of `from`, which become columns; they start `stride` apart.
///
/// # Panics
/// If `inner` is not a multiple of [`STEP`], or a size does not fit.
pub(super) fn pack_turned<N: Number>(to: &mut [f32], from: &[N], stride: usize, inner: usize) {
    assert!(inner.is_multiple_of(STEP));
    let rows: [&[[N; STEP]]; NR] =
        std::array::from_fn(|j| from[j * stride..][..inner].as_chunks().0);
    let to = to[..inner * NR].as_chunks_mut::<{ STEP * NR }>().0;
    vectorize(
        #[inline(always)]
        || {
            for (step, to) in to.iter_mut().enumerate() {
                for j in (0..NR).step_by(STEP) {
                    let mut block = [[0.0; STEP]; STEP];
                    for (block, row) in block.iter_mut().zip(&rows[j..]) {
                        for (to, from) in block.iter_mut().zip(&row[step]) {
                            *to = from.wide();
                        }
                    }
                    let columns = transpose(block);
                    for (to, column) in to.chunks_exact_mut(NR).zip(columns) {
                        to[j..j + STEP].copy_from_slice(&column);
                    }
                }
            }
        },
    );
}

/// Four rows of four numbers become four columns.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn transpose(rows: [[f32; STEP]; STEP]) -> [[f32; STEP]; STEP] {
    use std::arch::aarch64::{
        float32x4_t, vreinterpretq_f32_f64, vreinterpretq_f64_f32, vtrn1q_f32, vtrn1q_f64,
        vtrn2q_f32, vtrn2q_f64,
    };
    #[expect(
        unsafe_code,
        reason = "vector code that the compiler does not find by itself"
    )]
    // SAFETY: every 64-bit Arm processor has NEON, and a vector of it is four numbers.
    unsafe {
        let [a, b, c, d] = std::mem::transmute::<[[f32; STEP]; STEP], [float32x4_t; STEP]>(rows);
        // Of two rows, numbers 0 and 2 in turn, and numbers 1 and 3.
        let turn = |a, b| [vtrn1q_f32(a, b), vtrn2q_f32(a, b)].map(|x| vreinterpretq_f64_f32(x));
        let ([even, odd], [even_below, odd_below]) = (turn(a, b), turn(c, d));
        let columns = [
            vtrn1q_f64(even, even_below),
            vtrn1q_f64(odd, odd_below),
            vtrn2q_f64(even, even_below),
            vtrn2q_f64(odd, odd_below),
        ];
        let columns = columns.map(|x| vreinterpretq_f32_f64(x));
        std::mem::transmute::<[float32x4_t; STEP], [[f32; STEP]; STEP]>(columns)
    }
}

/// Four rows of four numbers become four columns.
#[cfg(not(target_arch = "aarch64"))]
#[inline(always)]
fn transpose(rows: [[f32; STEP]; STEP]) -> [[f32; STEP]; STEP] {
    std::array::from_fn(|i| rows.map(|row| row[i]))
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn check<N: Number>(narrow: impl Fn(f32) -> N) {
        let (inner, depth, first, stride) = (12, 17, 3, 41);
        let numbers: Vec<f32> = (0..2 * NR * stride).map(|i| i as f32 - 500.0).collect();
        let from: Vec<N> = numbers.iter().map(|&x| narrow(x)).collect();
        let wide = |at: usize| from[at].wide();
        let mut to = vec![7.0; 2 * NR * depth];
        let mut panels = Panels {
            numbers: &mut to,
            inner: depth,
            part: first..first + inner,
        };
        pack_straight(&mut panels, &from, stride, 2);
        let mut column = vec![8.0; NR * (inner + 1)];
        pack_turned(&mut column, &from, stride, inner);
        for p in 0..inner {
            for j in 0..2 * NR {
                let at = (j / NR * depth + first + p) * NR + j % NR;
                assert_eq!(to[at], wide(p * stride + j));
            }
            for j in 0..NR {
                assert_eq!(column[p * NR + j], wide(j * stride + p));
            }
        }
        // The rows before and behind belong to other parts.
        assert!(to[..first * NR].iter().all(|x| *x == 7.0));
        assert!(
            to[(first + inner) * NR..depth * NR]
                .iter()
                .all(|x| *x == 7.0)
        );
        assert!(column[inner * NR..].iter().all(|x| *x == 8.0));
    }

    #[test]
    fn numbers_are_widened_and_put_in_order() {
        check(|x| x);
        check(bf16::from_f32);
    }
}

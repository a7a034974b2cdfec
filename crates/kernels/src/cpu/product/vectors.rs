//! Blocks of sums with whatever vectors there are: 6 × 16 of them are in 24 of NEON's 32 registers.
//!
//! For x86-64 processors with AVX2 or AVX-512 there is code of their own. Every element is summed in the same order as there, and a
//! product and its addition are rounded once, so the bits are the same.

use pulp::{Simd, WithSimd};

use crate::cpu::product::layout::{Block, Left, MR, NR};
use crate::cpu::product::mat::MatMut;
use crate::cpu::simd::dispatch;

/// Calls a method for the vectors of `S` that 16 numbers take, and for a number of rows.
macro_rules! for_shape {
    ($simd:ident: $S:ident, $height:expr, $self:ident.$method:ident) => {
        match $S::F32_LANES {
            4 => for_shape!($height, $self.$method::<$S, 4>($simd)),
            8 => for_shape!($height, $self.$method::<$S, 2>($simd)),
            16 => for_shape!($height, $self.$method::<$S, 1>($simd)),
            _ => for_shape!($height, $self.$method::<$S, 16>($simd)),
        }
    };
    ($height:expr, $self:ident.$method:ident::<$S:ident, $V:literal>($simd:ident)) => {
        match $height {
            1 => $self.$method::<$S, $V, 1>($simd),
            2 => $self.$method::<$S, $V, 2>($simd),
            3 => $self.$method::<$S, $V, 3>($simd),
            4 => $self.$method::<$S, $V, 4>($simd),
            5 => $self.$method::<$S, $V, 5>($simd),
            height => {
                assert_eq!(height, MR, "rows of a block");
                $self.$method::<$S, $V, 6>($simd)
            }
        }
    };
}

#[cfg(any(test, not(target_arch = "x86_64")))]
pub(crate) mod thin;

/// As many rows of out, from `block.row` and `block.col` on, (+)= Σ lefts · b, a panel of 16 columns.
///
/// # Panics
/// If a left factor or the output is too small, or the panel too short.
pub(crate) fn block<const COL: usize>(
    out: &mut MatMut<'_>,
    block: Block,
    lefts: &[Left<'_>],
    b: &[f32],
) {
    dispatch(Panel::<COL> {
        out,
        block,
        lefts,
        b,
    });
}

/// What [`block`] computes.
struct Panel<'a, 'o, const COL: usize> {
    out: &'a mut MatMut<'o>,
    block: Block,
    lefts: &'a [Left<'a>],
    b: &'a [f32],
}

impl<const COL: usize> WithSimd for Panel<'_, '_, COL> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for_shape!(simd: S, self.block.height, self.sum);
    }
}

impl<const COL: usize> Panel<'_, '_, COL> {
    /// For `M` rows and `V` vectors of each.
    #[inline(always)]
    fn sum<S: Simd, const V: usize, const M: usize>(self, simd: S) {
        let Block {
            row,
            col,
            first,
            add,
            ..
        } = self.block;
        assert!(first.is_multiple_of(MR), "rows that lie side by side");
        let mut sums = [[simd.splat_f32s(0.0); V]; M];
        let mut panel = self.b.as_chunks::<NR>().0;
        for left in self.lefts {
            let (own, rest) = panel.split_at(left.inner);
            panel = rest;
            if COL == 1 {
                let rows: [&[f32]; M] = std::array::from_fn(
                    #[inline(always)]
                    |i| &left.data[(first + i) * left.row_stride..],
                );
                // Else compilers go from row to row by adding, with loads that take more registers than there are.
                let rows = std::hint::black_box(rows).map(
                    #[inline(always)]
                    |row| &row[..left.inner],
                );
                for (p, b) in own.iter().enumerate() {
                    let a: [f32; M] = std::array::from_fn(
                        #[inline(always)]
                        |i| rows[i][p],
                    );
                    add_product(simd, &mut sums, a, b);
                }
            } else {
                let rows = left.data[first * left.row_stride..].as_chunks::<MR>().0;
                for (a, b) in rows[..left.inner].iter().zip(own) {
                    let a: [f32; M] = std::array::from_fn(
                        #[inline(always)]
                        |i| a[i],
                    );
                    add_product(simd, &mut sums, a, b);
                }
            }
        }
        let out = self.out.window(row..row + M, col..col + NR);
        store(simd, sums, out, add);
    }
}

/// sums += the product of a column and a row.
#[inline(always)]
fn add_product<S: Simd, const V: usize, const M: usize>(
    simd: S,
    sums: &mut [[S::f32s; V]; M],
    a: [f32; M],
    b: &[f32; NR],
) {
    let b = S::as_simd_f32s(b).0;
    let b: [S::f32s; V] = std::array::from_fn(
        #[inline(always)]
        |v| b[v],
    );
    for (sums, a) in sums.iter_mut().zip(a) {
        let a = simd.splat_f32s(a);
        for (sum, &b) in sums.iter_mut().zip(&b) {
            *sum = simd.mul_add_f32s(a, b, *sum);
        }
    }
}

/// out (+)= sums.
#[inline(always)]
fn store<S: Simd, const V: usize, const M: usize>(
    simd: S,
    sums: [[S::f32s; V]; M],
    mut out: MatMut<'_>,
    add: bool,
) {
    for (i, sums) in sums.into_iter().enumerate() {
        let out = S::as_mut_simd_f32s(out.row(i)).0;
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if add { simd.add_f32s(*out, sum) } else { sum };
        }
    }
}

#[cfg(test)]
mod tests {
    use pulp::Scalar;

    use super::*;

    pub(super) fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * seed) as f32).sin()).collect()
    }

    /// Runs an operation with the vectors of this processor, with none, and with others that it has.
    pub(super) fn for_all<Op: WithSimd>(op: impl Fn() -> Op, mut see: impl FnMut(Op::Output)) {
        see(dispatch(op()));
        see(op().with_simd(Scalar));
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            see(Simd::vectorize(simd, op()));
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V4::try_new() {
            see(Simd::vectorize(simd, op()));
        }
    }

    /// A block computed with some vectors, and what was there before.
    struct Run<'a, const COL: usize> {
        block: Block,
        lefts: &'a [Left<'a>],
        b: &'a [f32],
        before: &'a [f32],
    }

    impl<const COL: usize> WithSimd for Run<'_, COL> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let mut data = self.before.to_vec();
            let panel = Panel::<COL> {
                out: &mut MatMut::strided(&mut data, 8, 20, 23),
                block: self.block,
                lefts: self.lefts,
                b: self.b,
            };
            panel.with_simd(simd);
            data
        }
    }

    /// Element (i, p) of a left factor, as [`Left`] says.
    fn element<const COL: usize>(left: &Left<'_>, i: usize, p: usize) -> f32 {
        if COL == 1 {
            left.data[i * left.row_stride + p]
        } else {
            left.data[i / MR * MR * left.row_stride + p * MR + i % MR]
        }
    }

    fn check<const COL: usize>(block: Block, lefts: &[Left<'_>], b: &[f32]) {
        let before = numbers(8 * 23, 3);
        let mut expected = before.clone();
        for i in 0..block.height {
            for j in 0..NR {
                let mut sum = 0.0_f32;
                let mut row = b.chunks(NR);
                for left in lefts {
                    for (p, b) in row.by_ref().take(left.inner).enumerate() {
                        sum = element::<COL>(left, block.first + i, p).mul_add(b[j], sum);
                    }
                }
                let out = &mut expected[(block.row + i) * 23 + block.col + j];
                *out = if block.add { *out + sum } else { sum };
            }
        }
        let run = || Run::<COL> {
            block,
            lefts,
            b,
            before: &before,
        };
        for_all(run, |found| assert_eq!(found, expected));
    }

    /// Every height, with both ways that rows lie, of two left factors one after the other.
    #[test]
    fn a_block_has_the_same_bits_with_any_vectors() {
        let (a, b) = (numbers(2 * MR * 24, 5), numbers(20 * NR, 7));
        let left = |start, inner| Left {
            data: &a[start..],
            row_stride: 22,
            inner,
        };
        for height in 1..=MR {
            for (first, add) in [(0, false), (0, true), (MR, true)] {
                let block = Block {
                    row: 2,
                    height,
                    col: 3,
                    first,
                    add,
                };
                check::<1>(block, &[left(0, 11), left(11, 9)], &b);
                check::<MR>(block, &[left(0, 11), left(11 * MR, 9)], &b);
            }
        }
    }
}

//! Products of rows for few tokens: y = x·wᵀ, where the time goes into reading w.
//!
//! A row of w meets up to eight tokens at a time, with its numbers widened in registers, and the
//! rows are read one after the other: a single stream of addresses is what processors fetch ahead
//! best. Nothing of w is copied; the tokens are, once, side by side and in the order in which w's
//! numbers come out of a register.
//!
//! A sum's order depends on how many tokens are taken together and on the kind of processor.

use std::ops::Range;

use half::bf16;
use pulp::{Arch, Simd, WithSimd};

use crate::scratch::with_scratch;
use crate::simd::{LANES, fetch, vectorize};

/// Packed rows whose sums stay in registers while a row goes by.
const TOGETHER: usize = 8;
/// Packed numbers that stay in the L1 cache while the rows go by: 24 KiB. A smaller part of longer
/// rows breaks the stream into shorter pieces, which costs more than the room gains.
const NEAR: usize = 6 * 1024;
/// Bytes that come from memory at once.
const CACHE_LINE: usize = 64;
/// How many bytes ahead of what is read memory is asked for; measured.
const AHEAD: usize = 1024;

/// A number format that products read.
pub(crate) trait Element: Copy + Sync {
    /// Zero.
    const ZERO: Self;
    /// Whether [`Self::each_vector`] gives the numbers at even places first, then those at odd ones.
    const EVEN_FIRST: bool;

    /// Calls `work` with each vector of a chunk, widened.
    fn each_vector<S: Simd>(simd: S, from: &[Self; LANES], work: impl FnMut(usize, S::f32s));
}

impl Element for f32 {
    const ZERO: Self = 0.0;
    const EVEN_FIRST: bool = false;

    #[inline(always)]
    fn each_vector<S: Simd>(_: S, from: &[Self; LANES], mut work: impl FnMut(usize, S::f32s)) {
        for (i, &vector) in S::as_simd_f32s(from).0.iter().enumerate() {
            work(i, vector);
        }
    }
}

impl Element for bf16 {
    const ZERO: Self = Self::ZERO;
    const EVEN_FIRST: bool = true;

    #[inline(always)]
    fn each_vector<S: Simd>(simd: S, from: &[Self; LANES], mut work: impl FnMut(usize, S::f32s)) {
        // Two numbers lie in 32 bits, and the upper half of an f32 is a bf16: one operation widens
        // those at even places, and one those at odd places, without moving any between lanes.
        let pairs: [u32; LANES / 2] = bytemuck::cast(*from);
        let (pairs, _) = S::as_simd_u32s(&pairs);
        let (half, high) = (simd.splat_u32s(16), simd.splat_u32s(0xffff_0000));
        for (i, &pair) in pairs.iter().enumerate() {
            let even = simd.wrapping_dyn_shl_u32s(pair, half);
            work(i, simd.transmute_f32s_u32s(even));
            let odd = simd.and_u32s(pair, high);
            work(pairs.len() + i, simd.transmute_f32s_u32s(odd));
        }
    }
}

/// Rows side by side: in groups of [`TOGETHER`], a chunk of each row of the group, then the next
/// chunk of each. The last chunk is filled up with zeros.
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
}

/// Calls `work` with rows of `cols` numbers packed for products with an `E`.
pub(crate) fn with_packed<E: Element, R>(
    from: &[f32],
    cols: usize,
    work: impl FnOnce(Packed<'_>) -> R,
) -> R {
    let rows = from.len().checked_div(cols).unwrap_or(0);
    with_scratch(rows * cols.next_multiple_of(LANES), |data| {
        vectorize(
            #[inline(always)]
            || pack(data, from, cols, E::EVEN_FIRST),
        );
        work(Packed { data, rows, cols })
    })
}

#[inline(always)]
fn pack(to: &mut [f32], from: &[f32], cols: usize, even_first: bool) {
    if cols == 0 {
        return;
    }
    let groups = to.chunks_mut(TOGETHER * cols.next_multiple_of(LANES));
    for (to, from) in groups.zip(from.chunks(TOGETHER * cols)) {
        let rows = from.len() / cols;
        let (to, _) = to.as_chunks_mut::<LANES>();
        for (i, from) in from.chunks_exact(cols).enumerate() {
            let (whole, rest) = from.as_chunks::<LANES>();
            let mut to = to[i..].iter_mut().step_by(rows);
            for (from, to) in whole.iter().zip(&mut to) {
                *to = ordered(from, even_first);
            }
            if let Some(to) = to.next() {
                let mut last = [0.0; LANES];
                last[..rest.len()].copy_from_slice(rest);
                *to = ordered(&last, even_first);
            }
        }
    }
}

#[inline(always)]
fn ordered(from: &[f32; LANES], even_first: bool) -> [f32; LANES] {
    if even_first {
        std::array::from_fn(
            #[inline(always)]
            |i| from[2 * i % LANES + 2 * i / LANES],
        )
    } else {
        *from
    }
}

/// Calls `write(i, j, sums, more)` with the products of the packed rows from i on and row j of `w`, on
/// one thread. Sums of long rows come in parts; with `more` a part is to be added to those before.
///
/// The rows of w start `stride` apart and are as long as the packed ones, which were packed for `E`.
pub(crate) fn products_of_rows<E: Element>(
    packed: Packed<'_>,
    w: &[E],
    stride: usize,
    mut write: impl FnMut(usize, usize, &[f32], bool),
) {
    let Packed { data, rows, cols } = packed;
    if cols == 0 {
        return;
    }
    let size = cols.next_multiple_of(LANES);
    for first in (0..rows).step_by(TOGETHER) {
        let count = (rows - first).min(TOGETHER);
        let group = &data[first * size..(first + count) * size];
        let parts = group.len().div_ceil(NEAR);
        let depth = cols.div_ceil(parts).next_multiple_of(LANES);
        for start in (0..cols).step_by(depth) {
            let end = (start + depth).min(size);
            let run = Part {
                x: &group[start * count..end * count],
                w,
                stride,
                columns: start..(start + depth).min(cols),
                first,
                more: start > 0,
                write: &mut write,
            };
            // As many sums for each row as hide the latency of an addition.
            match count {
                1 => run.with::<1, 4>(),
                2 => run.with::<2, 4>(),
                3 => run.with::<3, 2>(),
                4 => run.with::<4, 2>(),
                5 => run.with::<5, 1>(),
                6 => run.with::<6, 1>(),
                7 => run.with::<7, 1>(),
                _ => run.with::<8, 1>(),
            }
        }
    }
}

/// Some columns of one group and of all rows of w.
struct Part<'a, E, F> {
    x: &'a [f32],
    w: &'a [E],
    stride: usize,
    columns: Range<usize>,
    first: usize,
    more: bool,
    write: &'a mut F,
}

impl<E: Element, F: FnMut(usize, usize, &[f32], bool)> Part<'_, E, F> {
    /// For a group of `I` rows, with `A` sums for each.
    fn with<const I: usize, const A: usize>(self) {
        Arch::new().dispatch(Run::<E, F, I, A>(self));
    }
}

struct Run<'a, E, F, const I: usize, const A: usize>(Part<'a, E, F>);

impl<E: Element, F: FnMut(usize, usize, &[f32], bool), const I: usize, const A: usize> WithSimd
    for Run<'_, E, F, I, A>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Part {
            x,
            w,
            stride,
            columns,
            first,
            more,
            write,
        } = self.0;
        let (x, _) = x.as_chunks::<LANES>();
        let (x, _) = x.as_chunks::<I>();
        let ahead = if columns.len() == stride {
            AHEAD / size_of::<E>()
        } else {
            AHEAD.div_ceil(columns.len() * size_of::<E>()) * stride
        };
        for (j, row) in w.chunks(stride).enumerate() {
            let sums = sums::<S, E, I, A>(simd, x, &row[columns.clone()], ahead);
            write(first, j, &sums, more);
        }
    }
}

/// Products of one row with `I` others, and `ahead` numbers further on a hint to fetch what comes.
#[inline(always)]
fn sums<S: Simd, E: Element, const I: usize, const A: usize>(
    simd: S,
    x: &[[[f32; LANES]; I]],
    row: &[E],
    ahead: usize,
) -> [f32; I] {
    let (row, rest) = row.as_chunks::<LANES>();
    let (x, x_rest) = x.split_at(row.len());
    let (pairs, last) = row.as_chunks::<2>();
    let (x_pairs, x_last) = x.as_chunks::<2>();
    let mut sums = [[simd.splat_f32s(0.0); A]; I];
    for ([x0, x1], [w0, w1]) in x_pairs.iter().zip(pairs) {
        fetch(w0.as_ptr().wrapping_add(ahead));
        if size_of_val(w0) >= CACHE_LINE {
            fetch(w1.as_ptr().wrapping_add(ahead));
        }
        add_chunk(simd, &mut sums, x0, w0, 0);
        add_chunk(simd, &mut sums, x1, w1, 2);
    }
    for (x, w) in x_last.iter().zip(last) {
        add_chunk(simd, &mut sums, x, w, 0);
    }
    for x in x_rest {
        let mut w = [E::ZERO; LANES];
        w[..rest.len()].copy_from_slice(rest);
        add_chunk(simd, &mut sums, x, &w, 2);
    }
    let mut out = [0.0; I];
    for (out, sums) in out.iter_mut().zip(sums) {
        let mut sum = sums[0];
        for &more in &sums[1..] {
            sum = simd.add_f32s(sum, more);
        }
        *out = simd.reduce_sum_f32s(sum);
    }
    out
}

/// Adds the products of one chunk; its first vector goes to the sums number `lane`, and so on round.
#[inline(always)]
fn add_chunk<S: Simd, E: Element, const I: usize, const A: usize>(
    simd: S,
    sums: &mut [[S::f32s; A]; I],
    x: &[[f32; LANES]; I],
    w: &[E; LANES],
    lane: usize,
) {
    E::each_vector(
        simd,
        w,
        #[inline(always)]
        |vector, w| {
            for (x, sums) in x.iter().zip(&mut *sums) {
                let x = S::as_simd_f32s(x).0[vector];
                let sum = &mut sums[(lane + vector) % A];
                *sum = simd.mul_add_e_f32s(x, w, *sum);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| (i * seed % 13) as f32 - 6.0).collect()
    }

    /// Sums of small integers are exact, whatever their order.
    fn check<E: Element>(rows: usize, outs: usize, cols: usize, narrow: impl Fn(f32) -> E) {
        let (x, w) = (numbers(rows * cols, 5), numbers(outs * cols, 7));
        let narrow: Vec<E> = w.iter().map(|&w| narrow(w)).collect();
        let mut found = vec![if cols == 0 { 0.0 } else { f32::NAN }; rows * outs];
        with_packed::<E, _>(&x, cols, |packed| {
            products_of_rows(packed, &narrow, cols, |first, j, sums, more| {
                for (i, sum) in (first..).zip(sums) {
                    let y = &mut found[i * outs + j];
                    *y = if more { *y + sum } else { *sum };
                }
            });
        });
        for i in 0..rows {
            for j in 0..outs {
                let terms = (0..cols).map(|k| x[i * cols + k] * w[j * cols + k]);
                assert_eq!(
                    found[i * outs + j],
                    terms.sum::<f32>(),
                    "{rows} {outs} {cols}"
                );
            }
        }
    }

    #[test]
    fn products_are_exact_for_any_number_of_rows() {
        for rows in 0..=17 {
            for cols in [0, 1, 15, 16, 17, 31, 32, 33, 48, 100] {
                check(rows, 5, cols, |w| w);
                check(rows, 5, cols, bf16::from_f32);
            }
        }
    }

    #[test]
    fn long_rows_are_summed_in_parts() {
        for (rows, cols) in [(1, 6200), (3, 2100), (8, 800), (8, 1536), (11, 1537)] {
            check(rows, 3, cols, |w| w);
            check(rows, 3, cols, bf16::from_f32);
        }
    }

    #[test]
    fn rows_may_have_gaps() {
        let (x, w) = (numbers(3 * 20, 5), numbers(4 * 50 - 30, 7));
        let mut found = [[0.0; 4]; 3];
        with_packed::<f32, _>(&x, 20, |packed| {
            products_of_rows(packed, &w, 50, |first, j, sums, _| {
                for (i, sum) in (first..).zip(sums) {
                    found[i][j] = *sum;
                }
            });
        });
        for (i, found) in found.iter().enumerate() {
            for (j, found) in found.iter().enumerate() {
                let terms = (0..20).map(|k| x[i * 20 + k] * w[j * 50 + k]);
                assert_eq!(*found, terms.sum::<f32>());
            }
        }
    }
}

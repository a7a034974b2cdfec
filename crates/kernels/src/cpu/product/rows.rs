//! Products of rows for few tokens: y = x·wᵀ, where the time goes into reading w.
//!
//! A row of w meets up to eight tokens at a time, with its numbers widened in registers. The fewer the tokens, the more
//! rows of w are read side by side, so that there are enough sums to hide the latency of an addition; they are four at
//! most, since few streams of addresses are what processors fetch ahead best. Nothing of w is copied; the tokens
//! are, once, side by side and in the order in which w's numbers come out of a register.
//!
//! A sum's order depends on how long a row is and on the kind of processor, and not on what is computed beside it: each sum is one vector,
//! to which the chunks of a part of the row are added in order; its lanes are added up where the part ends, and the parts in order.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m512, _mm256_add_ps, _mm256_castpd_ps, _mm256_castps_pd, _mm256_permute2f128_ps,
    _mm256_unpackhi_pd, _mm256_unpackhi_ps, _mm256_unpacklo_pd, _mm256_unpacklo_ps, _mm512_add_ps,
    _mm512_castpd_ps, _mm512_castps_pd, _mm512_shuffle_f32x4, _mm512_unpackhi_pd,
    _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

#[cfg(target_arch = "x86_64")]
use pulp::x86::{V3, V4};
use pulp::{Simd, WithSimd};

#[cfg(target_arch = "x86_64")]
use crate::cpu::engine::{Engine, engine};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{dispatch, fetch, vectorize};
use crate::storage::{CHUNK, Number};

/// Packed rows whose sums stay in registers while a row goes by.
pub(crate) const TOGETHER: usize = 8;
/// Packed numbers that stay in the L1 cache while the rows go by: 24 KiB. A smaller part of longer
/// rows breaks the stream into shorter pieces, which costs more than the room gains.
const NEAR: usize = 6 * 1024;
/// Columns of a part of a row, at most: those of as many rows as are taken together are near.
const DEPTH: usize = NEAR / TOGETHER;
/// Bytes that come from memory at once.
pub(crate) const CACHE_LINE: usize = 64;
/// How many bytes ahead of what is read memory is asked for, for each of the rows that are read side by side. Measured: with less than
/// 3 KiB numbers come too late, and farther ahead lies too often in another page.
pub(crate) const AHEAD: usize = 4096;

/// Rows side by side: in groups of [`TOGETHER`], a chunk of each row of the group, then the next
/// chunk of each. The last chunk is filled up with zeros.
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
}

impl<'a> Packed<'a> {
    /// What [`pack_rows_for`] has packed.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), packed_len(rows, cols), "numbers of packed rows");
        Self { data, rows, cols }
    }
}

/// Room that rows of `cols` numbers take when they are packed. Rows in groups of [`TOGETHER`] may be packed one group after the other.
pub(crate) fn packed_len(rows: usize, cols: usize) -> usize {
    rows * cols.next_multiple_of(CHUNK)
}

/// Whether rows lie as [`pack_rows_for`] would pack them: a single one does, unless it is to be filled up or put in another order.
pub(crate) fn lies_packed(rows: usize, cols: usize, even_first: bool) -> bool {
    rows == 1 && !even_first && cols.is_multiple_of(CHUNK)
}

/// Packs rows of `cols` numbers for products with numbers whose [`Number::EVEN_FIRST`] this is.
pub(crate) fn pack_rows_for(to: &mut [f32], from: &[f32], cols: usize, even_first: bool) {
    vectorize(
        #[inline(always)]
        || pack(to, from, cols, even_first),
    );
}

/// Calls `work` with rows of `cols` numbers packed for products with an `E`.
pub(crate) fn with_packed<E: Number, R>(
    from: &[f32],
    cols: usize,
    work: impl FnOnce(Packed<'_>) -> R,
) -> R {
    let rows = from.len().checked_div(cols).unwrap_or(0);
    with_scratch(packed_len(rows, cols), |data| {
        pack_rows_for(data, from, cols, E::EVEN_FIRST);
        work(Packed { data, rows, cols })
    })
}

#[inline(always)]
fn pack(to: &mut [f32], from: &[f32], cols: usize, even_first: bool) {
    if cols == 0 {
        return;
    }
    let groups = to.chunks_mut(TOGETHER * cols.next_multiple_of(CHUNK));
    for (to, from) in groups.zip(from.chunks(TOGETHER * cols)) {
        let rows = from.len() / cols;
        let (to, _) = to.as_chunks_mut::<CHUNK>();
        for (i, from) in from.chunks_exact(cols).enumerate() {
            let (whole, rest) = from.as_chunks::<CHUNK>();
            let mut to = to[i..].iter_mut().step_by(rows);
            for (from, to) in whole.iter().zip(&mut to) {
                *to = ordered(from, even_first);
            }
            if let Some(to) = to.next() {
                let mut last = [0.0; CHUNK];
                last[..rest.len()].copy_from_slice(rest);
                *to = ordered(&last, even_first);
            }
        }
    }
}

#[inline(always)]
fn ordered(from: &[f32; CHUNK], even_first: bool) -> [f32; CHUNK] {
    if even_first {
        std::array::from_fn(
            #[inline(always)]
            |i| from[2 * i % CHUNK + 2 * i / CHUNK],
        )
    } else {
        *from
    }
}

/// Calls `write(i, j, sums, more)` with the products of the packed rows from i on and row j of `w`, on
/// one thread. Sums of long rows come in parts; with `more` a part is to be added to those before.
///
/// The rows of w start `stride` apart and are as long as the packed ones, which were packed for `E`.
pub(crate) fn products_of_rows<E: Number>(
    packed: Packed<'_>,
    w: &[E],
    stride: usize,
    write: impl FnMut(usize, usize, &[f32], bool),
) {
    products_at(Level::best(), packed, w, stride, write);
}

fn products_at<E: Number>(
    level: Level,
    packed: Packed<'_>,
    w: &[E],
    stride: usize,
    mut write: impl FnMut(usize, usize, &[f32], bool),
) {
    let Packed { data, rows, cols } = packed;
    if cols == 0 {
        return;
    }
    let size = cols.next_multiple_of(CHUNK);
    // Parts of about one size.
    let depth = cols.div_ceil(cols.div_ceil(DEPTH)).next_multiple_of(CHUNK);
    // Of few tokens several parts are near, and a row of w is read on through all of them.
    let parts = (NEAR / (rows.clamp(1, TOGETHER) * depth)).max(1);
    let span = parts * depth;
    for start in (0..cols).step_by(span) {
        for first in (0..rows).step_by(TOGETHER) {
            let count = (rows - first).min(TOGETHER);
            let group = &data[first * size..(first + count) * size];
            let end = (start + span).min(size);
            let span = Span {
                x: &group[start * count..end * count],
                w,
                stride,
                columns: start..end.min(cols),
                depth,
                first,
                count,
                groups: rows.div_ceil(TOGETHER),
                write: &mut write,
            };
            level.run(span);
        }
    }
}

/// Which vectors products are compiled for.
#[derive(Clone, Copy, Debug)]
enum Level {
    /// AVX-512: twice as many products at once, and they are what eight tokens take their time for.
    #[cfg(target_arch = "x86_64")]
    Avx512(V4),
    /// AVX2 with FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2(V3),
    /// What all other loops use.
    Usual,
}

impl Level {
    #[inline(always)]
    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = V4::try_new().filter(|_| engine() >= Engine::Avx512) {
            return Self::Avx512(simd);
        } else if let Some(simd) = V3::try_new().filter(|_| engine() >= Engine::Avx2) {
            return Self::Avx2(simd);
        }
        Self::Usual
    }

    #[inline(always)]
    fn run<E: Number, F: FnMut(usize, usize, &[f32], bool)>(self, span: Span<'_, E, F>) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => Simd::vectorize(simd, Known { simd, span }),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => Simd::vectorize(simd, Known { simd, span }),
            Self::Usual => dispatch(span),
        }
    }
}

/// A span for vectors whose lanes are added up for many of them together.
#[cfg(target_arch = "x86_64")]
struct Known<'a, V, E, F> {
    simd: V,
    span: Span<'a, E, F>,
}

#[cfg(target_arch = "x86_64")]
impl<V, E, F> WithSimd for Known<'_, V, E, F>
where
    V: Simd,
    Together: LaneSums<V>,
    E: Number,
    F: FnMut(usize, usize, &[f32], bool),
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.span.run::<V, Together>(self.simd);
    }
}

/// Some columns of one group and of all rows of w: one part of them or several.
struct Span<'a, E, F> {
    x: &'a [f32],
    w: &'a [E],
    stride: usize,
    columns: Range<usize>,
    /// Columns of a part.
    depth: usize,
    first: usize,
    count: usize,
    /// Of how many groups this is one.
    groups: usize,
    write: &'a mut F,
}

impl<E: Number, F: FnMut(usize, usize, &[f32], bool)> WithSimd for Span<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.run::<S, Each>(simd);
    }
}

impl<E: Number, F: FnMut(usize, usize, &[f32], bool)> Span<'_, E, F> {
    #[inline(always)]
    fn run<S: Simd, L: LaneSums<S>>(self, simd: S) {
        let many_registers = S::REGISTER_COUNT >= 32;
        // Up to four tokens, memory sets the pace, and a row at a time is what processors fetch ahead best. More take their time in
        // products; where there are many registers, two rows at a time read what is packed half as often.
        match (self.count, many_registers) {
            (1, _) => self.with::<S, L, 1, 1>(simd),
            (2, _) => self.with::<S, L, 1, 2>(simd),
            (3, _) => self.with::<S, L, 1, 3>(simd),
            (4, _) => self.with::<S, L, 1, 4>(simd),
            (5, false) => self.with::<S, L, 1, 5>(simd),
            (5, true) => self.with::<S, L, 2, 5>(simd),
            (6, false) => self.with::<S, L, 1, 6>(simd),
            (6, true) => self.with::<S, L, 2, 6>(simd),
            (7, false) => self.with::<S, L, 1, 7>(simd),
            (7, true) => self.with::<S, L, 2, 7>(simd),
            (_, false) => self.with::<S, L, 1, 8>(simd),
            (_, true) => self.with::<S, L, 2, 8>(simd),
        }
    }

    /// For a group of `I` rows and `R` rows of w at a time.
    #[inline(always)]
    fn with<S: Simd, L: LaneSums<S>, const R: usize, const I: usize>(self, simd: S) {
        let Span {
            x,
            w,
            stride,
            columns,
            depth,
            first,
            groups,
            write,
            ..
        } = self;
        let (x, _) = x.as_chunks::<CHUNK>();
        let (x, _) = x.as_chunks::<I>();
        let rows = w.len().div_ceil(stride);
        let row = |j: usize| &w[j * stride..][columns.clone()];
        let together = rows - rows % R;
        let near = ahead::<E>(columns.len(), stride, R);
        let turn = first / TOGETHER;
        for j in (0..together).step_by(R) {
            let rows: [&[E]; R] = std::array::from_fn(
                #[inline(always)]
                |r| row(j + r),
            );
            // While several groups go over these rows, each asks for its share of those that come after them.
            let ahead = if groups > 1 && j / R % groups == turn {
                w.len()
            } else {
                near
            };
            for (part, x) in x.chunks(depth / CHUNK).enumerate() {
                let sums = sums::<S, E, R, I>(simd, x, rows, part * depth, ahead);
                let sums = L::lane_sums(simd, sums);
                for (r, sums) in sums.iter().enumerate() {
                    write(first, j + r, sums, columns.start + part * depth > 0);
                }
            }
        }
        // A row's sums are the same, alone or not.
        for j in together..rows {
            for (part, x) in x.chunks(depth / CHUNK).enumerate() {
                let sums = sums::<S, E, 1, I>(simd, x, [row(j)], part * depth, near);
                let [sums] = L::lane_sums(simd, sums);
                write(first, j, &sums, columns.start + part * depth > 0);
            }
        }
    }
}

/// How far behind a number of w lies what will be read some time after it, for `together` rows of `columns` numbers, `stride` apart, that
/// are read side by side. While several groups go over the same rows, these are near.
#[inline(always)]
fn ahead<E>(columns: usize, stride: usize, together: usize) -> usize {
    let ahead = together * AHEAD / size_of::<E>();
    if columns >= stride.min(ahead) {
        // What comes after a row, or after most of its numbers, is what comes after it in memory.
        return ahead;
    }
    // The same columns of a later row.
    ahead.div_ceil(columns * together) * together * stride
}

/// Products of `R` rows with `I` others, in a part of their columns that begins at `start`.
#[inline(always)]
fn sums<S: Simd, E: Number, const R: usize, const I: usize>(
    simd: S,
    x: &[[[f32; CHUNK]; I]],
    w: [&[E]; R],
    start: usize,
    ahead: usize,
) -> [[S::f32s; I]; R] {
    let w = w.map(
        #[inline(always)]
        |row| {
            let end = (start + x.len() * CHUNK).min(row.len());
            row[start..end].as_chunks::<CHUNK>()
        },
    );
    let whole = w[0].0.len();
    let w_whole = w.map(
        #[inline(always)]
        |(chunks, _)| &chunks[..whole],
    );
    let (x, x_rest) = x.split_at(whole);
    let mut sums = [[simd.splat_f32s(0.0); I]; R];
    for (k, x) in x.iter().enumerate() {
        let w: [&[E; CHUNK]; R] = std::array::from_fn(
            #[inline(always)]
            |r| &w_whole[r][k],
        );
        for w in w {
            for line in w.chunks(CACHE_LINE / size_of::<E>()) {
                fetch(line.as_ptr().wrapping_add(ahead));
            }
        }
        add_chunk(simd, &mut sums, x, w);
    }
    for x in x_rest {
        let mut last = [[E::zeroed(); CHUNK]; R];
        for (last, (_, rest)) in last.iter_mut().zip(w) {
            last[..rest.len()].copy_from_slice(rest);
        }
        add_chunk(simd, &mut sums, x, last.each_ref());
    }
    sums
}

/// Adds the products of one chunk of each row.
#[inline(always)]
fn add_chunk<S: Simd, E: Number, const R: usize, const I: usize>(
    simd: S,
    sums: &mut [[S::f32s; I]; R],
    x: &[[f32; CHUNK]; I],
    w: [&[E; CHUNK]; R],
) {
    let half = CHUNK / S::F32_LANES / 2;
    for v in 0..half {
        let mut wide = [[simd.splat_f32s(0.0); 2]; R];
        for (wide, w) in wide.iter_mut().zip(w) {
            *wide = E::widened(simd, w, v);
        }
        for (second, vector) in [v, half + v].into_iter().enumerate() {
            for (i, x) in x.iter().enumerate() {
                let x = S::as_simd_f32s(x).0[vector];
                for (sums, w) in sums.iter_mut().zip(&wide) {
                    sums[i] = simd.mul_add_e_f32s(x, w[second], sums[i]);
                }
            }
        }
    }
}

/// How the lanes of vectors are added up.
trait LaneSums<S: Simd> {
    /// The sum of each vector's lanes, in the order of [`Simd::reduce_sum_f32s`].
    fn lane_sums<const R: usize, const I: usize>(
        simd: S,
        vectors: [[S::f32s; I]; R],
    ) -> [[f32; I]; R];
}

/// One vector after the other.
struct Each;

impl<S: Simd> LaneSums<S> for Each {
    #[inline(always)]
    fn lane_sums<const R: usize, const I: usize>(
        simd: S,
        vectors: [[S::f32s; I]; R],
    ) -> [[f32; I]; R] {
        // By value, or the sums would lie in memory all the time.
        let mut out = [[0.0; I]; R];
        for (out, vectors) in out.iter_mut().zip(vectors) {
            for (out, vector) in out.iter_mut().zip(vectors) {
                *out = simd.reduce_sum_f32s(vector);
            }
        }
        out
    }
}

/// As many vectors together as each has lanes, with a third of the operations.
#[cfg(target_arch = "x86_64")]
struct Together;

/// Vectors from which this pays.
#[cfg(target_arch = "x86_64")]
const WORTHWHILE: usize = 5;

#[cfg(target_arch = "x86_64")]
impl LaneSums<V4> for Together {
    #[inline(always)]
    fn lane_sums<const R: usize, const I: usize>(
        simd: V4,
        vectors: [[<V4 as Simd>::f32s; I]; R],
    ) -> [[f32; I]; R] {
        if R * I < WORTHWHILE || R * I > 16 {
            return Each::lane_sums(simd, vectors);
        }
        let mut all = [pulp::cast(simd.splat_f32s(0.0)); 16];
        for (r, vectors) in vectors.into_iter().enumerate() {
            for (i, vector) in vectors.into_iter().enumerate() {
                all[r * I + i] = pulp::cast(vector);
            }
        }
        #[expect(unsafe_code, reason = "code for one kind of processor")]
        // SAFETY: only processors with AVX-512 have a `V4`.
        let sums = unsafe { avx512_lane_sums(&all) };
        let mut out = [[0.0; I]; R];
        for (r, out) in out.iter_mut().enumerate() {
            out.copy_from_slice(&sums[r * I..(r + 1) * I]);
        }
        out
    }
}

#[cfg(target_arch = "x86_64")]
impl LaneSums<V3> for Together {
    #[inline(always)]
    fn lane_sums<const R: usize, const I: usize>(
        simd: V3,
        vectors: [[<V3 as Simd>::f32s; I]; R],
    ) -> [[f32; I]; R] {
        if R * I < WORTHWHILE || R * I > 8 {
            return Each::lane_sums(simd, vectors);
        }
        let mut all = [pulp::cast(simd.splat_f32s(0.0)); 8];
        for (r, vectors) in vectors.into_iter().enumerate() {
            for (i, vector) in vectors.into_iter().enumerate() {
                all[r * I + i] = pulp::cast(vector);
            }
        }
        #[expect(unsafe_code, reason = "code for one kind of processor")]
        // SAFETY: only processors with AVX2 have a `V3`.
        let sums = unsafe { avx2_lane_sums(&all) };
        let mut out = [[0.0; I]; R];
        for (r, out) in out.iter_mut().enumerate() {
            out.copy_from_slice(&sums[r * I..(r + 1) * I]);
        }
        out
    }
}

// Closures have the target features of the function that they are in; pulp's functions for single instructions were called, not inlined,
// from closures of other functions.

/// The sums of the lanes of 16 vectors: halves of two vectors side by side are added, then quarters of four, and so on.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
fn avx512_lane_sums(vectors: &[__m512; 16]) -> [f32; 16] {
    let halves = |a, b| {
        let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
        _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
    };
    let quarters = |a, b| {
        let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
        _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
    };
    let pairs = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let singles = |a, b| {
        let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
        let first = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        _mm512_add_ps(first, _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
    };
    // The sums of four neighbours come out in one quarter.
    let quarter = |i: usize| {
        let [a, b] = [i, i + 8].map(|i| halves(vectors[i], vectors[i + 4]));
        // Vectors i, i + 4, i + 8 and i + 12, one a quarter.
        quarters(a, b)
    };
    pulp::cast(singles(
        pairs(quarter(0), quarter(1)),
        pairs(quarter(2), quarter(3)),
    ))
}

/// The same of 8 vectors.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx")]
fn avx2_lane_sums(vectors: &[__m256; 8]) -> [f32; 8] {
    let pairs = |a, b| _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let singles = |a, b| {
        let (a, b) = (_mm256_castps_pd(a), _mm256_castps_pd(b));
        let first = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
        _mm256_add_ps(first, _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)))
    };
    // Vectors i and i + 4, one a half.
    let halves = |i: usize| {
        let (a, b) = (vectors[i], vectors[i + 4]);
        let low = _mm256_permute2f128_ps::<0x20>(a, b);
        _mm256_add_ps(low, _mm256_permute2f128_ps::<0x31>(a, b))
    };
    pulp::cast(singles(
        pairs(halves(0), halves(1)),
        pairs(halves(2), halves(3)),
    ))
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| (i * seed % 13) as f32 - 6.0).collect()
    }

    /// What this processor can run: what other ones run must be right, too.
    fn levels() -> Vec<Level> {
        let usual = [Level::best(), Level::Usual];
        #[cfg(target_arch = "x86_64")]
        let usual = usual.into_iter().chain(V3::try_new().map(Level::Avx2));
        usual.into_iter().collect()
    }

    /// Sums of small integers are exact, whatever their order.
    fn check<E: Number>(rows: usize, outs: usize, cols: usize, narrow: impl Fn(f32) -> E) {
        let (x, w) = (numbers(rows * cols, 5), numbers(outs * cols, 7));
        let narrow: Vec<E> = w.iter().map(|&w| narrow(w)).collect();
        for level in levels() {
            let mut found = vec![if cols == 0 { 0.0 } else { f32::NAN }; rows * outs];
            with_packed::<E, _>(&x, cols, |packed| {
                products_at(level, packed, &narrow, cols, |first, j, sums, more| {
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
                        "{level:?}: {rows} {outs} {cols}"
                    );
                }
            }
        }
    }

    /// Bit for bit, in their order, and of any number of vectors.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn lanes_are_added_up_together_as_one_by_one() {
        struct Compare<V>(V);
        impl<V: Simd> WithSimd for Compare<V>
        where
            Together: LaneSums<V>,
        {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) {
                fn compare<V: Simd, const R: usize, const I: usize>(simd: V)
                where
                    Together: LaneSums<V>,
                {
                    let vectors: [[V::f32s; I]; R] = std::array::from_fn(|r| {
                        std::array::from_fn(|i| {
                            let number = |lane: usize| (((r * I + i) * 64 + lane) as f32).sin();
                            let lanes: Vec<f32> = (0..V::F32_LANES).map(number).collect();
                            V::as_simd_f32s(&lanes).0[0]
                        })
                    });
                    let bits = |sums: [[f32; I]; R]| sums.map(|sums| sums.map(f32::to_bits));
                    let together = Together::lane_sums(simd, vectors);
                    assert_eq!(bits(together), bits(Each::lane_sums(simd, vectors)));
                }
                let simd = self.0;
                compare::<V, 1, 1>(simd);
                compare::<V, 1, 5>(simd);
                compare::<V, 2, 3>(simd);
                compare::<V, 1, 8>(simd);
                if V::F32_LANES == 16 {
                    compare::<V, 4, 3>(simd);
                    compare::<V, 2, 8>(simd);
                }
            }
        }
        if let Some(simd) = V3::try_new() {
            Simd::vectorize(simd, Compare(simd));
        }
        if let Some(simd) = V4::try_new() {
            Simd::vectorize(simd, Compare(simd));
        }
    }

    #[test]
    fn a_single_row_may_lie_packed() {
        for (cols, even_first) in [(3 * CHUNK, false), (3 * CHUNK, true), (CHUNK + 1, false)] {
            let row: Vec<f32> = (0..cols).map(|i| i as f32).collect();
            let mut packed = vec![7.0; packed_len(1, cols)];
            pack_rows_for(&mut packed, &row, cols, even_first);
            assert_eq!(lies_packed(1, cols, even_first), packed == row);
        }
        assert!(!lies_packed(2, CHUNK, false));
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

    /// Whatever rows are taken together with it, and however many rows of w there are.
    #[test]
    fn a_row_has_the_bits_that_it_has_alone() {
        fn run<E: Number>(level: Level, x: &[f32], w: &[E], cols: usize) -> Vec<Vec<u32>> {
            let outs = w.len() / cols;
            let mut found = vec![vec![0.0; outs]; x.len() / cols];
            with_packed::<E, _>(x, cols, |packed| {
                products_at(level, packed, w, cols, |first, j, sums, more| {
                    for (found, sum) in found[first..].iter_mut().zip(sums) {
                        found[j] = if more { found[j] + sum } else { *sum };
                    }
                });
            });
            let bits = |row: Vec<f32>| row.into_iter().map(f32::to_bits).collect();
            found.into_iter().map(bits).collect()
        }
        fn check<E: Number>(narrow: impl Fn(f32) -> E) {
            for cols in [1, 40, 96, 700, 769, 1600, 6200] {
                let number = |i: usize| ((i * 7919) as f32).sin();
                let x: Vec<f32> = (0..19 * cols).map(number).collect();
                let w: Vec<E> = (0..11 * cols).map(|i| narrow(number(i + 5))).collect();
                for level in levels() {
                    let all = run(level, &x, &w, cols);
                    for (i, row) in x.chunks(cols).enumerate() {
                        let [alone] = &run(level, row, &w, cols)[..] else {
                            panic!("one row");
                        };
                        assert_eq!(*alone, all[i], "{level:?}: row {i} of {cols}");
                        for j in [0, 10] {
                            let one = run(level, row, &w[j * cols..(j + 1) * cols], cols);
                            assert_eq!(one[0][0], alone[j], "{level:?}: output {j} of {cols}");
                        }
                    }
                }
            }
        }
        check(|w| w);
        check(bf16::from_f32);
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

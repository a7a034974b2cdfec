//! Products of bf16 numbers, on processors that multiply these faster than f32 ones.
//!
//! There are two kinds: tile registers (Intel's AMX, server processors since 2023; [`tiles`]) and dot products of pairs in the registers
//! of AVX-512 ([`dots`]). Both sum in f32. A frozen weight often is bf16; activations are f32, and [`ComputeDType`] says how they are read.
//! With [`ComputeDType::F32`] they are taken apart into three bf16 numbers that add up to them exactly, so that nothing is rounded that
//! other code keeps; with [`ComputeDType::Bf16x2`] there are two numbers, and the third is lost; with [`ComputeDType::Bf16`] they are
//! rounded. By Intel's figures three products of 16 × 32 by 32 × 16 numbers take a core 48 cycles with tiles, and vectors of AVX-512 256.
//! Dot products are twice as fast as f32 vectors, so that they are used for rounded factors alone.
//! A task takes some rows of the left factor apart, and puts panels of up to 64 columns of the right one in order, one after the other.
//!
//! Every element is summed over the terms, and within a term over the inner index, in order, whatever piece it lies in.

mod ahead;
mod dots;
pub(crate) mod layout;
mod limits;
pub(crate) mod pack;
mod parts;
pub(crate) mod rounded;
mod tiles;

use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
use std::ops::Range;

use self::ahead::Ahead;
use self::layout::{Parts, Run, SIDE, TILE, TILE_ROW};
pub(crate) use self::limits::costs;
use self::limits::{DOTS, Limits, MOST_TOGETHER, TILES};
use self::pack::{Right, copy_rows, pack_narrow, pack_wide, split_rows};
use self::parts::{Block, Part, groups};
use self::tiles::{Tiles, with_tiles};
use crate::cpu::product::mat::MatMut;
use crate::cpu::product::term::{Left, Term};
use crate::cpu::scratch::with_scratch;
use crate::storage::{NumberFormat, Window};
use crate::types::compute::ComputeDType;

/// Narrower outputs and shorter sums stay with vectors; from where on these products pay was not measured closely.
const COLUMNS: usize = 32;
const INNER: usize = 128;
/// With tiles: of the inner indices, how many times as many must take up to three products as take six. With six alone vectors are
/// faster.
const NARROW: usize = 3;

/// Whether these terms, which are as wide as their output, are computed here: their columns, inner sizes and formats say so, and
/// not their rows.
pub(crate) fn is_worthwhile(terms: &[Term<'_>]) -> bool {
    let inner = |six: bool| -> usize {
        let terms = (terms.iter()).filter(|term| (parts(term) == Parts::ThreeByThree) == six);
        terms.map(|term| term.a.cols()).sum()
    };
    let is_fast = || {
        tiles::supported()
            || dots::supported() && (terms.iter()).all(|term| parts(term) == Parts::OneByOne)
    };
    (terms.iter()).all(|term| term.b.cols() >= COLUMNS)
        && inner(false) >= INNER.max(NARROW * inner(true))
        && terms.iter().all(is_readable)
        && terms.iter().all(|term| is_wide(term) || term.scale == 1.0)
        && is_fast()
}

/// Whether the left factor lies as these products read it; one that is rounded already must not be read otherwise.
fn is_readable(term: &Term<'_>) -> bool {
    match term.a {
        Left::Wide(a) => a.lies_in_lines(),
        Left::Narrow(_) => parts(term) == Parts::OneByOne,
    }
}

/// Whether the right factor is rounded or taken apart, too.
fn is_wide(term: &Term<'_>) -> bool {
    term.b.view.format() != NumberFormat::Bf16
}

fn parts(term: &Term<'_>) -> Parts {
    match (term.compute, is_wide(term)) {
        (ComputeDType::F32, false) => Parts::ThreeByOne,
        (ComputeDType::F32, true) => Parts::ThreeByThree,
        (ComputeDType::Bf16x2, false) => Parts::TwoByOne,
        (ComputeDType::Bf16x2, true) => Parts::TwoByTwo,
        (ComputeDType::Bf16, _) => Parts::OneByOne,
    }
}

/// What multiplies.
#[derive(Clone, Copy)]
pub(crate) enum Unit<'a> {
    /// Tile registers.
    Tiles(&'a Tiles),
    /// Dot products.
    Dots,
}

impl Unit<'_> {
    fn limits(self) -> &'static Limits {
        match self {
            Self::Tiles(_) => &TILES,
            Self::Dots => &DOTS,
        }
    }
}

/// out (+)= Σ terms, each of the size of `out`, on one thread. With `accumulate` they are added to what is there.
///
/// # Panics
/// If the shapes do not match, neither rows nor columns of a left factor lie in one piece, a product with a factor in bf16 is scaled, or the
/// processor has not what the terms need.
pub(crate) fn multiply(out: MatMut<'_>, accumulate: bool, terms: &[Term<'_>]) {
    for term in terms {
        assert_eq!(term.a.rows(), out.rows(), "rows of a product");
        assert_eq!(term.b.cols(), out.cols(), "columns of a product");
        assert_eq!(term.a.cols(), term.b.rows(), "inner size of a product");
        assert!(is_wide(term) || term.scale == 1.0, "a scaled bf16 product");
    }
    with_unit(|unit| multiply_with(unit, out, accumulate, terms));
}

/// Whether factors that are rounded to bf16 are multiplied faster here.
pub(crate) fn supported() -> bool {
    dots::supported()
}

/// Calls `work` with this processor's unit, on this thread.
///
/// # Panics
/// If there is none.
pub(crate) fn with_unit(work: impl FnOnce(Unit<'_>)) {
    if tiles::supported() {
        with_tiles(|tiles| work(Unit::Tiles(tiles)));
    } else {
        work(Unit::Dots);
    }
}

fn multiply_with(unit: Unit<'_>, mut out: MatMut<'_>, accumulate: bool, terms: &[Term<'_>]) {
    let (rows, cols) = (out.rows(), out.cols());
    let limits = unit.limits();
    let groups = groups(terms, limits);
    if groups.is_empty() && !accumulate {
        out.fill_zero();
    }
    let blocks = (0..rows).step_by(limits.rows);
    let blocks = blocks.map(|first| first..(first + limits.rows).min(rows));
    let blocks: Vec<Block<'_>> = blocks
        .flat_map(|rows| {
            groups.iter().map(move |group| Block {
                rows: rows.clone(),
                group,
            })
        })
        .collect();
    for (i, block) in blocks.iter().enumerate() {
        let window = out.window(block.rows.clone(), 0..cols);
        let add = accumulate || !i.is_multiple_of(groups.len());
        multiply_group(unit, window, add, block, blocks.get(i + 1));
    }
}

/// out (+)= Σ over the block's group; the block `next` follows.
fn multiply_group(
    unit: Unit<'_>,
    mut out: MatMut<'_>,
    add: bool,
    block: &Block<'_>,
    next: Option<&Block<'_>>,
) {
    let (rows, group) = (&block.rows, block.group);
    let left_len: usize = group.iter().map(Part::left_len).sum();
    let down = rows.len().div_ceil(SIDE);
    with_u16s(down * left_len, |lefts| {
        for (i, mut to) in lefts.chunks_exact_mut(left_len).enumerate() {
            let start = rows.start + i * SIDE;
            for part in group {
                let (own, rest) = to.split_at_mut(part.left_len());
                to = rest;
                let rows = start..(start + SIDE).min(rows.end);
                if part.rows_in_place(unit, &rows).is_some() {
                    continue;
                }
                match part.term.a.block(rows, part.inner.clone()) {
                    Left::Wide(a) => split_rows(own, a, part.parts().left()),
                    Left::Narrow(a) => copy_rows(own, a),
                }
            }
        }
        let column: usize = group
            .iter()
            .map(|part| part.steps() * part.right_step())
            .sum();
        let together = unit.limits().together;
        with_u16s(together * column, |right| {
            let cols = out.cols();
            let (mut runs, mut ahead) = (Vec::with_capacity(group.len()), Ahead::default());
            let panels = panels(cols.div_ceil(SIDE), together);
            let panels: Vec<Range<usize>> = panels
                .map(|panel| panel.start * SIDE..(panel.end * SIDE).min(cols))
                .collect();
            for (i, cols) in panels.iter().enumerate() {
                pack_panel(right, group, cols.clone());
                // What is packed after this panel.
                match (panels.get(i + 1), next) {
                    (Some(cols), _) => ahead.set(group, cols),
                    (None, Some(next)) => ahead.set(next.group, &panels[0]),
                    (None, None) => ahead = Ahead::default(),
                }
                multiply_panel(
                    unit,
                    &mut out,
                    add,
                    block,
                    (&*lefts, &*right, cols.clone()),
                    (next, i, panels.len()),
                    &mut ahead,
                    &mut runs,
                );
            }
        });
    });
}

fn with_u16s<R>(len: usize, work: impl FnOnce(&mut [u16]) -> R) -> R {
    let len = len * size_of::<u16>() / size_of::<f32>(); // a tile is a multiple of either
    with_scratch(len, |scratch| work(bytemuck::cast_slice_mut(scratch)))
}

/// Tiles of columns that are summed together: few of them leave the multiplier waiting for the last product, so all are about as many.
fn panels(tiles: usize, together: usize) -> impl Iterator<Item = Range<usize>> {
    let count = tiles.div_ceil(together);
    (0..count).map(move |i| tiles * i / count..tiles * (i + 1) / count)
}

/// The right factors of a group for up to 64 columns: for each part [steps][columns / 16][parts] tiles.
fn pack_panel(mut to: &mut [u16], group: &[Part<'_>], cols: Range<usize>) {
    let across = cols.len().div_ceil(SIDE);
    for part in group {
        let (own, rest) = to.split_at_mut(part.steps() * across * part.right_step());
        to = rest;
        let b = part.term.b;
        let window = b.window(part.inner.clone(), cols.clone());
        let numbers = b.view.numbers();
        if let Some(numbers) = numbers.bf16s() {
            let numbers = &numbers[window.first()..];
            pack_narrow(own, right(&window, b.transposed, numbers, window.stride));
            continue;
        }
        window.read_f32s(numbers, |numbers, stride| {
            let right = right(&window, b.transposed, numbers, stride);
            pack_wide(own, right, part.term.scale, part.parts().right());
        });
    }
}

/// The numbers of a window whose rows start `stride` apart.
fn right<'a, N>(window: &Window, turned: bool, data: &'a [N], stride: usize) -> Right<'a, N> {
    let (rows, cols) = (window.rows.len(), window.cols.len());
    let (inner, cols) = if turned { (cols, rows) } else { (rows, cols) };
    Right {
        data,
        stride,
        turned,
        inner,
        cols,
    }
}

/// All rows of an output in some columns, from the rows of a group's left factors and the columns of its right ones. It is panel `panel` of
/// `count`, while which the block `next` is fetched. `runs` is room.
fn multiply_panel(
    unit: Unit<'_>,
    out: &mut MatMut<'_>,
    add: bool,
    block: &Block<'_>,
    (lefts, right, cols): (&[u16], &[u16], Range<usize>),
    (next, panel, count): (Option<&Block<'_>>, usize, usize),
    ahead: &mut Ahead,
    runs: &mut Vec<Run>,
) {
    let across = cols.len().div_ceil(SIDE);
    let group = block.group;
    let left_len: usize = group.iter().map(Part::left_len).sum();
    let strips = lefts.len() / left_len;
    let steps: usize = group.iter().map(Part::steps).sum();
    ahead.share(2 * strips * steps);
    for (i, mut left) in lefts.chunks_exact(left_len).enumerate() {
        if let Some(next) = next {
            next.fetch((panel * strips + i, count * strips));
        }
        let mut right = right;
        let start = block.rows.start + i * SIDE;
        let rows = start..(start + SIDE).min(block.rows.end);
        runs.clear();
        for part in group {
            let (a, b);
            (a, left) = left.split_at(part.left_len());
            (b, right) = right.split_at(part.steps() * across * part.right_step());
            let (a, a_row, a_step) = match part.rows_in_place(unit, &rows) {
                Some(mat) => (
                    mat.data().as_ptr().cast(),
                    mat.row_stride() * size_of::<u16>(),
                    TILE_ROW,
                ),
                None => (a.as_ptr(), TILE_ROW, TILE * size_of::<u16>()),
            };
            runs.push(Run {
                a,
                b: b.as_ptr(),
                steps: part.steps(),
                parts: part.parts(),
                pairs: part.inner.len().div_ceil(2),
                b_step: across * part.right_step() * size_of::<u16>(),
                a_row,
                a_step,
            });
        }
        let next = (i + 1) * SIDE..((i + 2) * SIDE).min(out.rows());
        for row in next {
            fetch_to_write(&out.row(row)[cols.clone()]);
        }
        let rows = i * SIDE..((i + 1) * SIDE).min(out.rows());
        let mut window = out.window(rows, cols.clone());
        sum_window(unit, &mut window, add, runs, across, ahead);
    }
}

/// Asks for cache lines that will be written soon.
#[expect(unsafe_code, reason = "a hint to the processor")]
fn fetch_to_write(numbers: &[f32]) {
    for line in numbers.chunks(64 / size_of::<f32>()) {
        // SAFETY: a prefetch reads nothing, and has no effect on memory.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(line.as_ptr().cast()) };
    }
}

/// A window of up to 16 rows and 64 columns; `runs` are for `across` tiles of columns.
#[expect(unsafe_code, reason = "kernels take pointers")]
fn sum_window(
    unit: Unit<'_>,
    window: &mut MatMut<'_>,
    add: bool,
    runs: &[Run],
    across: usize,
    ahead: &mut Ahead,
) {
    let (height, width) = (window.rows(), window.cols());
    // SAFETY: whoever calls this made the runs of slices of their sizes; below, c has 16 rows of `across` times 16 numbers.
    let mut multiply = |c: *mut f32, stride: usize| unsafe {
        match unit {
            Unit::Tiles(shown) => {
                tiles::multiply(shown, runs, across, c, stride * size_of::<f32>(), add);
            }
            Unit::Dots => dots::multiply(runs, across, height, c, stride, add, ahead),
        }
    };
    if height == SIDE && width == across * SIDE {
        let (c, stride) = window.pointer(0, 0);
        return multiply(c, stride);
    }
    let mut whole = [0.0_f32; SIDE * SIDE * MOST_TOGETHER];
    let stride = across * SIDE;
    if add {
        for (row, to) in whole.chunks_exact_mut(stride).enumerate().take(height) {
            to[..width].copy_from_slice(window.row(row));
        }
    }
    multiply(whole.as_mut_ptr(), stride);
    for (row, from) in whole.chunks_exact(stride).enumerate().take(height) {
        window.row(row).copy_from_slice(&from[..width]);
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::layout::STEP;
    use super::*;
    use crate::cpu::engine::{Engine, engines, with_engine};
    use crate::cpu::product::multiply as strips;
    use crate::cpu::product::term::{Factor, Job, Start};
    use crate::random::fill_normal;
    use crate::storage::DType;
    use crate::tensor::Tensor;

    fn random(rows: usize, cols: usize, dtype: DType, key: u64) -> Tensor {
        let mut numbers = Tensor::zeros(rows, cols);
        fill_normal(numbers.view_mut(), 1.0, key);
        Tensor::from_f32_as(rows, cols, &numbers.to_vec(), dtype)
    }

    /// out + scale·a·b in f64, with factors rounded as these products round them.
    fn add_reference(out: &mut [f64], term: &Term<'_>) {
        let Term {
            a,
            b,
            scale,
            compute,
            ..
        } = *term;
        let a = a.wide();
        let read = |x: f32| match compute {
            ComputeDType::Bf16 => bf16::from_f32(x).to_f64(),
            ComputeDType::F32 | ComputeDType::Bf16x2 => f64::from(x),
        };
        let numbers = b.view.to_vec();
        let number = |p: usize, j: usize| {
            let (row, col) = if b.transposed { (j, p) } else { (p, j) };
            read(scale * numbers[(b.first_row + row) * b.view.cols() + b.first_col + col])
        };
        for (i, out) in out.chunks_exact_mut(b.cols()).enumerate() {
            for p in 0..b.rows() {
                let x = read(a.data()[i * a.row_stride() + p * a.col_stride()]);
                for (j, out) in out.iter_mut().enumerate() {
                    *out += x * number(p, j);
                }
            }
        }
    }

    /// ‖y - expected‖ / ‖expected‖.
    fn error(y: &Tensor, expected: &[f64]) -> f64 {
        let off = y
            .to_vec()
            .iter()
            .zip(expected)
            .map(|(y, e)| (f64::from(*y) - e).powi(2))
            .sum::<f64>();
        (off / expected.iter().map(|e| e * e).sum::<f64>()).sqrt()
    }

    /// Calls `work` for each kind of unit that this processor has, with what it computes.
    fn for_units(work: impl Fn(ComputeDType)) {
        let all = [ComputeDType::F32, ComputeDType::Bf16x2, ComputeDType::Bf16];
        for (engine, computes) in [(Engine::Avx512Bf16, &all[2..]), (Engine::Amx, &all[..])] {
            if !engines().contains(&engine) {
                eprintln!("skipped: this processor is not {engine:?}, or the system keeps it");
                continue;
            }
            with_engine(engine, || {
                for compute in computes {
                    work(*compute);
                }
            });
        }
    }

    /// How far a product may be off.
    fn tolerance(compute: ComputeDType) -> f64 {
        match compute {
            ComputeDType::F32 => 1e-6,
            ComputeDType::Bf16x2 => 4e-5,
            // Of the rounded factors.
            ComputeDType::Bf16 => 1e-5,
        }
    }

    /// y (+)= Σ terms, with tiles whether they are worthwhile or not.
    fn run(y: &mut Tensor, accumulate: bool, terms: &[Term<'_>]) {
        let (rows, cols) = (y.rows(), y.cols());
        let out = MatMut::new(y.view_mut().into_f32s(), rows, cols);
        multiply(out, accumulate, terms);
    }

    /// Computes an output in pieces as linears do, and makes sure that tiles do it.
    fn compute_pieces(y: &mut Tensor, start: Start<'_>, terms: &[Term<'_>]) {
        let whole = terms.iter().take_while(|term| term.at == (0, 0));
        assert!(is_worthwhile(&terms[..whole.count()]));
        strips::multiply(vec![Job {
            y: y.view_mut(),
            start,
            terms,
        }]);
    }

    fn factor(b: &Tensor, turned: bool) -> Factor<'_> {
        if turned {
            Factor::turned(b.view())
        } else {
            Factor::straight(b.view())
        }
    }

    #[test]
    fn a_left_factor_may_be_rounded_before() {
        for_units(|compute| {
            if compute != ComputeDType::Bf16 {
                return;
            }
            // In place, with rows or inner indices left over, and in several blocks.
            for (rows, inner, cols) in
                [(32, 128, 48), (21, 160, 32), (24, 131, 83), (1040, 900, 64)]
            {
                let (a, c) = (
                    random(rows, inner, DType::F32, 1),
                    random(rows, 64, DType::F32, 2),
                );
                let (b, d) = (
                    random(cols, inner, DType::Bf16, 3),
                    random(64, cols, DType::F32, 4),
                );
                let sum = |a: &Tensor, c: &Tensor| {
                    let terms = [
                        Term::new(a.view().as_left(), factor(&b, true)).with(compute),
                        Term::new(c.view().as_left(), factor(&d, false)).with(compute),
                    ];
                    let mut y = random(rows, cols, DType::F32, 5);
                    compute_pieces(&mut y, Start::Sum, &terms);
                    y.to_vec()
                };
                let narrow =
                    |x: &Tensor| Tensor::from_f32_as(x.rows(), x.cols(), &x.to_vec(), DType::Bf16);
                let expected = sum(&a, &c);
                assert_eq!(sum(&narrow(&a), &c), expected, "{rows}x{inner}x{cols}");
                assert_eq!(sum(&narrow(&a), &narrow(&c)), expected);
            }
        });
    }

    /// All orders, formats, precisions and edges, both formats in one sum.
    #[test]
    fn products_are_those_of_what_is_read() {
        for_units(|compute| {
            for (rows, inner, cols) in
                [(33, 128, 32), (48, 160, 64), (61, 150, 83), (100, 1700, 90)]
            {
                for case in 0..16 {
                    let [turned, narrow, sum, left_turned] =
                        [1, 2, 4, 8].map(|bit| case & bit != 0);
                    let dtype = if narrow { DType::Bf16 } else { DType::F32 };
                    let (a, a_turned) = (
                        random(rows, inner, DType::F32, 1),
                        random(inner, rows, DType::F32, 6),
                    );
                    let a = if left_turned {
                        a_turned.view().as_mat().t()
                    } else {
                        a.view().as_mat()
                    };
                    let b = if turned {
                        random(cols, inner, dtype, 2)
                    } else {
                        random(inner, cols, dtype, 2)
                    };
                    let (u, v) = (
                        random(rows, 5, DType::F32, 3),
                        random(cols, 5, DType::F32, 4),
                    );
                    let wide = Tensor::from_f32_as(b.rows(), b.cols(), &b.to_vec(), DType::F32);
                    let terms = [
                        Term::new(a, factor(&b, turned)).with(compute),
                        Term {
                            scale: 0.3,
                            ..Term::new(u.view().as_mat(), Factor::turned(v.view())).with(compute)
                        },
                        Term {
                            scale: -1.5,
                            ..Term::new(a, factor(&wide, turned)).with(compute)
                        },
                    ];
                    let mut y = random(rows, cols, DType::F32, 5);
                    let mut expected = vec![0.0; rows * cols];
                    if sum {
                        expected = y.to_vec().iter().map(|x| f64::from(*x)).collect();
                    }
                    for term in &terms {
                        add_reference(&mut expected, term);
                    }
                    run(&mut y, sum, &terms);
                    let off = error(&y, &expected);
                    // Two parts do lose something.
                    let least = if compute == ComputeDType::Bf16x2 {
                        1e-6
                    } else {
                        0.0
                    };
                    assert!(
                        (least..tolerance(compute)).contains(&off),
                        "{rows}x{inner}x{cols}, case {case}, {compute:?}: {off:e}"
                    );
                }
            }
        });
    }

    /// More rows, and more inner indices, than are taken apart at once.
    #[test]
    fn blocks_add_up() {
        for_units(|compute| {
            for (rows, inner, cols) in [(700, 1000, 32), (260, 5000, 100)] {
                let (a, b) = (
                    random(rows, inner, DType::F32, 1),
                    random(inner, cols, DType::Bf16, 2),
                );
                let term = Term::new(a.view().as_mat(), Factor::straight(b.view()));
                let terms = [term.with(compute)];
                let (mut once, mut all) = (Tensor::zeros(rows, cols), vec![0.0; rows * cols]);
                let bias = vec![2.0; cols];
                compute_pieces(&mut once, Start::Row(&bias), &terms);
                all.fill(2.0);
                add_reference(&mut all, &terms[0]);
                let off = error(&once, &all);
                assert!(off < tolerance(compute), "{compute:?}: {off:e}");
            }
        });
    }

    /// The bits are the same in any piece, and wherever in a tile.
    #[test]
    fn a_row_is_the_same_in_any_batch() {
        for_units(|compute| {
            let (x, w) = (
                random(90, 200, DType::F32, 1),
                random(70, 200, DType::Bf16, 2),
            );
            let x = x.view().as_mat();
            let terms = [Term::new(x, Factor::turned(w.view())).with(compute)];
            let few = x.block(13..61, 0..200);
            let few = [Term::new(few, Factor::turned(w.view())).with(compute)];
            let (mut all, mut some) = (Tensor::zeros(90, 70), Tensor::zeros(48, 70));
            compute_pieces(&mut all, Start::Zero, &terms);
            compute_pieces(&mut some, Start::Zero, &few);
            assert_eq!(all.to_vec()[13 * 70..61 * 70], some.to_vec());
        });
    }

    /// What is not of the size of the output is added by others.
    #[test]
    fn windows_are_left_to_others() {
        for_units(|compute| {
            let (x, w) = (
                random(40, 160, DType::F32, 1),
                random(48, 160, DType::Bf16, 2),
            );
            let (u, v) = (random(7, 4, DType::F32, 3), random(48, 4, DType::F32, 4));
            let window = Term {
                at: (20, 0),
                ..Term::new(u.view().as_mat(), Factor::turned(v.view()))
            };
            let terms = [
                Term::new(x.view().as_mat(), Factor::turned(w.view())).with(compute),
                window,
            ];
            let mut y = Tensor::zeros(40, 48);
            let mut expected = vec![0.0; 40 * 48];
            add_reference(&mut expected, &terms[0]);
            add_reference(&mut expected[20 * 48..27 * 48], &window);
            compute_pieces(&mut y, Start::Zero, &terms);
            assert!(error(&y, &expected) < tolerance(compute));
        });
    }

    /// Numbers near the smallest and largest there are, and what is no number.
    #[test]
    fn extreme_numbers_stay_what_they_are() {
        for_units(|compute| {
            let product = |x: f32, w: f32| {
                let a = Tensor::from_f32_as(48, 128, &vec![x; 48 * 128], DType::F32);
                let b = Tensor::from_f32_as(128, 32, &vec![w; 128 * 32], DType::F32);
                let term = Term::new(a.view().as_mat(), Factor::straight(b.view()));
                let mut y = Tensor::zeros(48, 32);
                run(&mut y, false, &[term.with(compute)]);
                y.to_vec()[0]
            };
            let off = match compute {
                ComputeDType::F32 => 1e-6,
                ComputeDType::Bf16x2 => 4e-5,
                ComputeDType::Bf16 => 1e-2,
            };
            let is = |found: f32, expected: f32, off: f32| {
                assert!(
                    (found / expected - 1.0).abs() < off,
                    "{found:e} {expected:e}"
                );
            };
            is(product(1.234_567e-30, 1.0), 128.0 * 1.234_567e-30, off);
            // Of so small a number the last bits are below the smallest normal one.
            is(
                product(1.234_567e-36, 1.0),
                128.0 * 1.234_567e-36,
                off.max(1e-3),
            );
            is(product(1.234_567e30, 1e-3), 128e-3 * 1.234_567e30, off);
            for x in [
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::NAN,
                f32::from_bits(0x7f80_0001),
                f32::from_bits(0x7fff_ffff),
                f32::from_bits(0xffff_ffff),
            ] {
                assert!(!product(x, 1.0).is_finite());
                assert!(!product(1.0, x).is_finite());
            }
        });
    }

    /// Three bf16 numbers hold all bits of an f32 one, two are off by 2⁻¹⁷ at most, and one by 2⁻⁸.
    #[test]
    fn parts_add_up() {
        if !dots::supported() {
            eprintln!("skipped: this processor has no instructions for bf16");
            return;
        }
        for (parts, turned) in [1, 2, 3]
            .into_iter()
            .flat_map(|parts| [(parts, false), (parts, true)])
        {
            let x = if turned {
                random(70, 5, DType::F32, 1)
            } else {
                random(5, 70, DType::F32, 1)
            };
            let numbers = x.to_vec();
            let x = x.view().as_mat();
            let mut tiles = vec![7; 3 * parts * TILE];
            split_rows(&mut tiles, if turned { x.t() } else { x }, parts);
            for row in 0..SIDE {
                for p in 0..3 * STEP {
                    let part = |part| {
                        let tile = (p / STEP * parts + part) * TILE;
                        bf16::from_bits(tiles[tile + row * STEP + p % STEP]).to_f32()
                    };
                    let expected = match (row < 5 && p < 70, turned) {
                        (false, _) => 0.0,
                        (true, false) => numbers[row * 70 + p],
                        (true, true) => numbers[p * 5 + row],
                    };
                    let sum: f32 = (0..parts).map(part).sum();
                    let allowed = [2.0_f32.powi(-8), 2.0_f32.powi(-17), 0.0][parts - 1];
                    assert!((sum - expected).abs() <= allowed * expected.abs());
                }
            }
        }
    }
}

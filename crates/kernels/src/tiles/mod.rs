//! Products on processors with tile registers (Intel's AMX, server processors since 2023), several times as fast as vectors are.
//!
//! The registers multiply bf16 and sum in f32. A frozen weight often is bf16; activations are f32 and are taken apart into three
//! bf16 numbers that add up to them exactly. So nothing is rounded that other code keeps: 48 products of a tile
//! take the time that vectors have for 9. A left factor is taken apart once for all threads and all outputs that read it; a task
//! puts a strip of the right one in order, as for [`panels`](crate::panels).
//!
//! Every element is summed over the terms, and within a term over the inner index, in order, whatever piece it lies in.

mod kernel;
mod pack;

use std::ops::Range;

use rayon::prelude::*;

use self::kernel::{PARTS, Run, SIDE, STEP, TILE, TOGETHER, Tiles, with_tiles};
use self::pack::{Right, pack_narrow, pack_wide, split_rows};
use crate::few::FEW_TOKENS;
use crate::matmul::{Mat, MatMut, Shared};
use crate::parallel::{ForEachPart, for_each_piece};
use crate::scratch::{with_scratch, with_shared_scratch};
use crate::strips::{Costs, Factor, Job, Piece, Start, Term, cut};
use crate::view::Data;

pub(crate) use self::kernel::supported;

/// Numbers of left factors that are taken apart at the same time: 12 MiB, which stay in the caches.
const LEFTS: usize = 2 * 1024 * 1024;
/// Rows that are not cut further for that, since each cut means that the right factors are put in order again.
const ROWS: usize = 256;
/// Steps of the right factors that a task puts in order at once, at most: 96 KiB for 64 columns in bf16.
const DEPTH: usize = 48;
/// Smaller products are not worth the order.
const COLUMNS: usize = 32;
const INNER: usize = 128;

/// In the time of a step of 16 columns and a row: putting a step in order, and reading a row.
const COSTS: Costs = Costs {
    pack: 2.0,
    read: 0.6,
};

/// A whole term of a job.
#[derive(Clone, Copy)]
struct Product<'a> {
    a: Mat<'a>,
    b: Factor<'a>,
    scale: f32,
}

impl<'a> Product<'a> {
    fn inner(&self) -> usize {
        self.a.cols()
    }

    /// Some of the inner indices.
    fn part(&self, range: Range<usize>) -> Self {
        Self {
            a: self.a.block(0..self.a.rows(), range.clone()),
            b: self.b.block(range, 0..self.b.cols()),
            ..*self
        }
    }
}

/// Whether a term is of the size of the whole output.
fn is_whole(term: &Term<'_>, (rows, cols): (usize, usize)) -> bool {
    term.at == (0, 0) && (term.a.rows(), term.b.cols()) == (rows, cols)
}

/// Computes the terms of these jobs that are of the size of their outputs, if that is faster here, and gives the others.
///
/// `None` if nothing was done. Otherwise the others have to be added to the outputs.
pub(crate) fn multiply<'a>(jobs: &mut [Job<'a>]) -> Option<Vec<Vec<Term<'a>>>> {
    if !supported() || !jobs.iter().all(is_worthwhile) {
        return None;
    }
    let rows = jobs.first()?.y.rows();
    if jobs.iter().any(|job| job.y.rows() != rows) {
        return None;
    }
    let mut others = Vec::new();
    let mut products: Vec<Vec<Product<'_>>> = Vec::new();
    for job in jobs.iter() {
        let size = (job.y.rows(), job.y.cols());
        let (whole, other): (Vec<Term<'_>>, _) =
            job.terms.iter().partition(|term| is_whole(term, size));
        others.push(other);
        let whole = whole.iter().filter(|term| term.a.cols() > 0);
        products.push(
            whole
                .map(|&Term { a, b, scale, .. }| Product { a, b, scale })
                .collect(),
        );
    }
    let lefts = distinct_lefts(&products);
    let depth: usize = lefts.iter().map(Mat::cols).sum();
    let block = rows_of_a_pass(rows, depth);
    if depth * block <= LEFTS {
        let outputs = jobs
            .iter_mut()
            .map(|job| (job.y.reborrow().into(), job.start));
        multiply_in_passes(&outputs.collect::<Vec<_>>(), &products, rows, block);
        return Some(others);
    }
    // Too deep even for few rows: one output after the other, and some inner indices of it after the others.
    let depth = (LEFTS / block / STEP).max(1) * STEP;
    for (job, products) in jobs.iter_mut().zip(&products) {
        let output: Shared<'_> = job.y.reborrow().into();
        let mut outputs = [(output, job.start)];
        for products in in_depths(products, depth) {
            multiply_in_passes(&outputs, &[products], rows, block);
            outputs[0].1 = Start::Sum;
        }
    }
    Some(others)
}

fn is_worthwhile(job: &Job<'_>) -> bool {
    let size = (job.y.rows(), job.y.cols());
    let whole = || job.terms.iter().filter(|term| is_whole(term, size));
    let inner: usize = whole().map(|term| term.a.cols()).sum();
    size.0 > FEW_TOKENS
        && size.1 >= COLUMNS
        && inner >= INNER
        && whole().all(|term| term.a.col_stride() == 1 || term.a.row_stride() == 1)
}

/// Rows whose left factors, with so many numbers in a row, are taken apart at once: blocks of about one size.
fn rows_of_a_pass(rows: usize, depth: usize) -> usize {
    let most = (LEFTS / depth.max(1)).max(ROWS);
    rows.div_ceil(rows.div_ceil(most)).next_multiple_of(SIDE)
}

/// Cuts products into groups with at most so many inner indices in all.
fn in_depths<'a>(products: &[Product<'a>], depth: usize) -> Vec<Vec<Product<'a>>> {
    let (mut groups, mut room) = (Vec::<Vec<_>>::new(), 0);
    for product in products {
        let mut start = 0;
        while start < product.inner() {
            if room < STEP {
                groups.push(Vec::new());
                room = depth;
            }
            let end = product.inner().min(start + room / STEP * STEP);
            if let Some(group) = groups.last_mut() {
                group.push(product.part(start..end));
            }
            room -= (end - start).next_multiple_of(STEP).min(room);
            start = end;
        }
    }
    groups
}

/// The left factors, each once.
fn distinct_lefts<'a>(products: &[Vec<Product<'a>>]) -> Vec<Mat<'a>> {
    let mut lefts: Vec<Mat<'_>> = Vec::new();
    for product in products.iter().flatten() {
        if !lefts.iter().any(|left| left.is(product.a)) {
            lefts.push(product.a);
        }
    }
    lefts
}

/// The outputs, which begin with what is given for each, from their products, some rows after the others.
fn multiply_in_passes(
    outputs: &[(Shared<'_>, Start<'_>)],
    products: &[Vec<Product<'_>>],
    rows: usize,
    block: usize,
) {
    let lefts = distinct_lefts(products);
    for first in (0..rows).step_by(block.max(1)) {
        let rows = first..(first + block).min(rows);
        with_split(&lefts, rows.clone(), |lefts| {
            multiply_pass(outputs, products, &rows, lefts);
        });
    }
}

/// A left factor in tiles: [rows / 16][steps][PARTS].
#[derive(Clone, Copy)]
struct Split<'a> {
    of: Mat<'a>,
    tiles: &'a [u16],
}

impl Split<'_> {
    fn steps(&self) -> usize {
        self.of.cols().div_ceil(STEP)
    }
}

/// Calls `work` with some rows of left factors in tiles.
fn with_split(lefts: &[Mat<'_>], rows: Range<usize>, work: impl FnOnce(&[Split<'_>])) {
    let down = rows.len().div_ceil(SIDE);
    let of_row = |left: &Mat<'_>| left.cols().div_ceil(STEP) * PARTS * TILE;
    let numbers = lefts.iter().map(|left| down * of_row(left)).sum();
    with_shared_scratch(numbers, |scratch: &mut [u16]| {
        let (mut tasks, mut rest) = (Vec::new(), &mut *scratch);
        for left in lefts {
            let (own, others) = rest.split_at_mut(down * of_row(left));
            rest = others;
            let rows = rows
                .clone()
                .step_by(SIDE)
                .map(|row| row..(row + SIDE).min(rows.end));
            tasks.extend(
                own.chunks_exact_mut(of_row(left))
                    .zip(rows)
                    .map(|task| (left, task)),
            );
        }
        (tasks.into_par_iter()).for_each_part(|(left, (to, rows))| {
            split_rows(to, left.block(rows, 0..left.cols()));
        });
        let mut rest = &*scratch;
        let splits = lefts.iter().map(|&of| {
            let (tiles, others) = rest.split_at(down * of_row(&of));
            rest = others;
            Split { of, tiles }
        });
        work(&splits.collect::<Vec<_>>());
    });
}

/// Some rows of all outputs.
fn multiply_pass(
    outputs: &[(Shared<'_>, Start<'_>)],
    products: &[Vec<Product<'_>>],
    rows: &Range<usize>,
    lefts: &[Split<'_>],
) {
    let sizes: Vec<(usize, usize)> = outputs
        .iter()
        .map(|(y, _)| (rows.len(), y.cols()))
        .collect();
    let pieces = cut(&sizes, rayon::current_num_threads(), COSTS);
    let parts: Vec<Vec<Part<'_>>> = products
        .iter()
        .map(|products| parts(products, lefts))
        .collect();
    for_each_piece(pieces.len(), |i| {
        let Piece {
            job,
            rows: down,
            cols,
        } = &pieces[i];
        let (y, start) = &outputs[*job];
        let place = rows.start + down.start..rows.start + down.end;
        #[expect(unsafe_code, reason = "threads write disjoint blocks of one matrix")]
        // SAFETY: no two pieces share an element of an output.
        let mut tile = unsafe { y.block(place, cols.clone()) };
        let holds = start.prepare(&mut tile, cols);
        multiply_piece(tile, holds, &parts[*job], (down, cols));
    });
}

/// A product whose left factor is in tiles.
struct Part<'a> {
    left: Split<'a>,
    b: Factor<'a>,
    scale: f32,
}

impl Part<'_> {
    /// Whether the right factor is taken apart, too.
    fn is_wide(&self) -> bool {
        matches!(self.b.view.data(), Data::F32(_)) || self.scale != 1.0
    }
}

fn parts<'a>(products: &[Product<'a>], lefts: &[Split<'a>]) -> Vec<Part<'a>> {
    let parts = products.iter().filter_map(|&Product { a, b, scale }| {
        let left = *lefts.iter().find(|left| left.of.is(a))?;
        Some(Part { left, b, scale })
    });
    parts.collect()
}

/// A piece of an output, on one thread; `rows` are those of the pass.
fn multiply_piece(
    mut out: MatMut<'_>,
    add: bool,
    parts: &[Part<'_>],
    (rows, cols): (&Range<usize>, &Range<usize>),
) {
    let mut add = add;
    for group in groups(parts) {
        multiply_group(&mut out, add, &group, (rows, cols));
        add = true;
    }
    if !add {
        out.fill_zero();
    }
}

/// Some steps of a part.
struct Slice<'a> {
    part: &'a Part<'a>,
    steps: Range<usize>,
}

/// Cuts parts into groups whose right factors are in order at the same time.
fn groups<'a>(parts: &'a [Part<'a>]) -> Vec<Vec<Slice<'a>>> {
    /// Steps more that a group may have, so that a low-rank branch goes with its linear.
    const SLACK: usize = 4;
    let (mut groups, mut room) = (Vec::<Vec<_>>::new(), 0);
    for part in parts {
        let all = part.left.steps();
        let each = all.div_ceil(all.div_ceil(DEPTH).max(1));
        for start in (0..all).step_by(each.max(1)) {
            let steps = start..(start + each).min(all);
            if steps.len() > room {
                groups.push(Vec::new());
                room = DEPTH + SLACK;
            }
            room -= steps.len();
            if let Some(group) = groups.last_mut() {
                group.push(Slice { part, steps });
            }
        }
    }
    groups
}

/// out (+)= Σ over a group, on one thread.
fn multiply_group(
    out: &mut MatMut<'_>,
    add: bool,
    group: &[Slice<'_>],
    (rows, cols): (&Range<usize>, &Range<usize>),
) {
    // A column of tiles of all steps of the group.
    let column: usize = group
        .iter()
        .map(|slice| slice.steps.len() * slice.tiles() * TILE)
        .sum();
    let across = cols.len().div_ceil(SIDE);
    with_scratch(
        across * column * size_of::<u16>() / size_of::<f32>(),
        |scratch| {
            let packed: &mut [u16] = bytemuck::cast_slice_mut(scratch);
            for (panel, to) in packed.chunks_mut(TOGETHER * column).enumerate() {
                let first = panel * TOGETHER * SIDE;
                let width = (TOGETHER * SIDE).min(cols.len() - first);
                pack_panel(to, group, cols.start + first..cols.start + first + width);
            }
            with_tiles(|tiles| multiply_rows(tiles, out, add, group, (rows, column, packed)));
        },
    );
}

impl Slice<'_> {
    /// Tiles of the right factor for a step and 16 columns.
    fn tiles(&self) -> usize {
        if self.part.is_wide() { PARTS } else { 1 }
    }
}

/// The right factors of a group for up to 64 columns: for each slice [steps][columns / 16][tiles].
fn pack_panel(mut to: &mut [u16], group: &[Slice<'_>], cols: Range<usize>) {
    let across = cols.len().div_ceil(SIDE);
    for slice in group {
        let Part { left, b, scale } = slice.part;
        let inner = slice.steps.start * STEP..(slice.steps.end * STEP).min(left.of.cols());
        let tiles = slice.tiles() * TILE;
        let between = across * tiles;
        let (own, rest) = to.split_at_mut(slice.steps.len() * between);
        to = rest;
        for column in 0..across {
            let first = cols.start + column * SIDE;
            let b = b.block(inner.clone(), first..(first + SIDE).min(cols.end));
            let to = &mut own[column * tiles..];
            match b.view.data() {
                Data::Bf16(data) if !slice.part.is_wide() => {
                    pack_narrow(to, right(b, data), between)
                }
                Data::F32(data) => pack_wide(to, right(b, data), *scale, between),
                Data::Bf16(data) => pack_widened(to, right(b, data), *scale, between),
            }
        }
    }
}

fn right<'a, N>(b: Factor<'_>, data: &'a [N]) -> Right<'a, N> {
    let stride = b.view.cols();
    let start = if b.transposed {
        b.first_col * stride + b.first_row
    } else {
        b.first_row * stride + b.first_col
    };
    Right {
        data: &data[start..],
        stride,
        turned: b.transposed,
        inner: b.rows(),
        cols: b.cols(),
    }
}

/// A right factor in bf16 that is scaled, which rounds to f32: rare.
fn pack_widened(to: &mut [u16], from: Right<'_, half::bf16>, scale: f32, between: usize) {
    let Right {
        data,
        stride,
        turned,
        inner,
        cols,
    } = from;
    let (rows, width) = if turned { (cols, inner) } else { (inner, cols) };
    with_scratch(rows * width, |scratch| {
        crate::simd::widen_rows(scratch, width, data, stride);
        let from = Right {
            data: &*scratch,
            stride: width,
            turned,
            inner,
            cols,
        };
        pack_wide(to, from, scale, between);
    });
}

/// All rows of a piece by all of its columns.
fn multiply_rows(
    tiles: &Tiles,
    out: &mut MatMut<'_>,
    add: bool,
    group: &[Slice<'_>],
    (rows, column, packed): (&Range<usize>, usize, &[u16]),
) {
    debug_assert!(rows.start.is_multiple_of(SIDE), "pieces begin with a tile");
    let mut runs = Vec::with_capacity(group.len());
    for first in (0..rows.len()).step_by(SIDE) {
        let height = SIDE.min(rows.len() - first);
        for (panel, mut right) in packed.chunks(TOGETHER * column).enumerate() {
            let across = right.len() / column;
            runs.clear();
            for slice in group {
                let of_row = slice.part.left.steps() * PARTS * TILE;
                let left = &slice.part.left.tiles[(rows.start + first) / SIDE * of_row..][..of_row];
                let left = &left[slice.steps.start * PARTS * TILE..slice.steps.end * PARTS * TILE];
                let (own, rest) = right.split_at(slice.steps.len() * across * slice.tiles() * TILE);
                right = rest;
                runs.push(Run {
                    a: left.as_ptr(),
                    b: own.as_ptr(),
                    steps: slice.steps.len(),
                    wide: usize::from(slice.part.is_wide()),
                });
            }
            let col = panel * TOGETHER * SIDE;
            let width = (across * SIDE).min(out.cols() - col);
            let mut window = out.window(first..first + height, col..col + width);
            sum_window(tiles, &mut window, add, &runs, across);
        }
    }
}

/// A window of up to 16 rows and 64 columns; `runs` are for `across` tiles of columns.
#[expect(unsafe_code, reason = "kernels take pointers")]
fn sum_window(tiles: &Tiles, window: &mut MatMut<'_>, add: bool, runs: &[Run], across: usize) {
    let (height, width) = (window.rows(), window.cols());
    if height == SIDE && width == across * SIDE {
        let (c, stride) = window.pointer(0, 0);
        // SAFETY: `multiply_rows` made the runs of slices of that size, and the window has 16 rows of `across` times 16 numbers.
        return unsafe { kernel::multiply(tiles, runs, across, c, stride * size_of::<f32>(), add) };
    }
    let mut whole = [0.0_f32; SIDE * SIDE * TOGETHER];
    let stride = across * SIDE;
    if add {
        for (row, to) in whole.chunks_exact_mut(stride).enumerate().take(height) {
            to[..width].copy_from_slice(window.row(row));
        }
    }
    // SAFETY: as above, with 16 rows of `across` times 16 numbers on the stack.
    unsafe {
        kernel::multiply(
            tiles,
            runs,
            across,
            whole.as_mut_ptr(),
            stride * size_of::<f32>(),
            add,
        )
    };
    for (row, from) in whole.chunks_exact(stride).enumerate().take(height) {
        window.row(row).copy_from_slice(&from[..width]);
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::measure::{first_non_finite, frobenius_norm};
    use crate::random::fill_normal;
    use crate::strips;
    use crate::tensor::{DType, Tensor};

    fn random(rows: usize, cols: usize, dtype: DType, key: u64) -> Tensor {
        let mut numbers = Tensor::zeros(rows, cols);
        fill_normal(numbers.view_mut(), 1.0, key);
        Tensor::from_f32_as(rows, cols, &numbers.to_vec(), dtype)
    }

    /// out + scale·a·b in f64.
    fn add_reference(out: &mut [f64], a: Mat<'_>, b: Factor<'_>, scale: f32) {
        let numbers = b.view.to_vec();
        let number = |p: usize, j: usize| {
            let (row, col) = if b.transposed { (j, p) } else { (p, j) };
            f64::from(numbers[(b.first_row + row) * b.view.cols() + b.first_col + col])
        };
        for (i, out) in out.chunks_exact_mut(b.cols()).enumerate() {
            for p in 0..b.rows() {
                let x = a.data()[i * a.row_stride() + p * a.col_stride()];
                let x = f64::from(scale) * f64::from(x);
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

    fn skipped() -> bool {
        if !supported() {
            eprintln!("skipped: this processor has no tiles of bf16, or the system keeps them");
        }
        !supported()
    }

    fn factor(b: &Tensor, turned: bool) -> Factor<'_> {
        if turned {
            Factor::turned(b.view())
        } else {
            Factor::straight(b.view())
        }
    }

    fn either(rows: usize, cols: usize, turned: bool, dtype: DType, key: u64) -> Tensor {
        if turned {
            random(cols, rows, dtype, key)
        } else {
            random(rows, cols, dtype, key)
        }
    }

    /// All orders, formats and edges, with a narrow term beside; and it was these tiles that computed it.
    #[test]
    fn products_are_those_of_f32() {
        if skipped() {
            return;
        }
        for (rows, inner, cols) in [(33, 128, 32), (48, 160, 64), (61, 150, 83), (100, 1700, 90)] {
            for case in 0..16 {
                let [turned_a, turned_b, bf16, sum] = [1, 2, 4, 8].map(|bit| case & bit != 0);
                let dtype = if bf16 { DType::Bf16 } else { DType::F32 };
                let a = either(rows, inner, turned_a, DType::F32, 1);
                let a = if turned_a {
                    a.view().as_mat().t()
                } else {
                    a.view().as_mat()
                };
                let b = either(inner, cols, turned_b, dtype, 2);
                let (u, v) = (
                    random(rows, 5, DType::F32, 3),
                    random(cols, 5, DType::F32, 4),
                );
                let terms = [
                    Term::new(a, factor(&b, turned_b)),
                    Term {
                        scale: 0.3,
                        ..Term::new(u.view().as_mat(), Factor::turned(v.view()))
                    },
                    Term {
                        scale: -1.5,
                        ..Term::new(a, factor(&b, turned_b))
                    },
                ];
                let mut y = random(rows, cols, DType::F32, 5);
                let mut expected = vec![0.0; rows * cols];
                if sum {
                    expected = y.to_vec().iter().map(|x| f64::from(*x)).collect();
                }
                for term in &terms {
                    add_reference(&mut expected, term.a, term.b, term.scale);
                }
                let start = if sum { Start::Sum } else { Start::Zero };
                let mut jobs = [Job {
                    y: y.view_mut(),
                    start,
                    terms: &terms,
                }];
                let others = multiply(&mut jobs).expect("large enough");
                assert!(others[0].is_empty());
                let off = error(&y, &expected);
                assert!(off < 1e-6, "{rows}x{inner}x{cols}, case {case}: {off:e}");
            }
        }
    }

    /// Left factors that are too many numbers for one pass: by rows, and by inner indices.
    #[test]
    fn passes_add_up() {
        if skipped() {
            return;
        }
        for (rows, inner, cols) in [(700, 4000, 32), (260, 17_000, 32)] {
            let (a, b) = (
                random(rows, inner, DType::F32, 1),
                random(inner, cols, DType::Bf16, 2),
            );
            let terms = [Term::new(a.view().as_mat(), Factor::straight(b.view()))];
            let (mut once, mut all) = (Tensor::zeros(rows, cols), vec![0.0; rows * cols]);
            let bias = vec![2.0; cols];
            let job = Job {
                y: once.view_mut(),
                start: Start::Row(&bias),
                terms: &terms,
            };
            multiply(&mut [job]).expect("large enough");
            all.fill(2.0);
            add_reference(&mut all, terms[0].a, terms[0].b, 1.0);
            let off = error(&once, &all);
            assert!(off < 1e-6, "{off:e}");
        }
    }

    /// The bits are the same in any pass, piece or window, and beside other outputs.
    #[test]
    fn a_row_is_the_same_in_any_batch() {
        if skipped() {
            return;
        }
        let (x, w) = (
            random(90, 200, DType::F32, 1),
            random(70, 200, DType::Bf16, 2),
        );
        let terms = [Term::new(x.view().as_mat(), Factor::turned(w.view()))];
        let few = [Term::new(
            x.view().as_mat().block(16..64, 0..200),
            Factor::turned(w.view()),
        )];
        let (mut all, mut some) = (Tensor::zeros(90, 70), Tensor::zeros(48, 70));
        let mut jobs = [Job {
            y: all.view_mut(),
            start: Start::Zero,
            terms: &terms,
        }];
        multiply(&mut jobs).expect("large enough");
        let mut jobs = [Job {
            y: some.view_mut(),
            start: Start::Zero,
            terms: &few,
        }];
        multiply(&mut jobs).expect("large enough");
        assert_eq!(all.to_vec()[16 * 70..64 * 70], some.to_vec());
    }

    /// What is not of the size of the output is added by others, as [`strips::multiply`] arranges.
    #[test]
    fn windows_are_left_to_others() {
        if skipped() {
            return;
        }
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
            Term::new(x.view().as_mat(), Factor::turned(w.view())),
            window,
        ];
        let mut y = Tensor::zeros(40, 48);
        let mut expected = vec![0.0; 40 * 48];
        add_reference(&mut expected, terms[0].a, terms[0].b, 1.0);
        add_reference(&mut expected[20 * 48..27 * 48], window.a, window.b, 1.0);
        strips::multiply(vec![Job {
            y: y.view_mut(),
            start: Start::Zero,
            terms: &terms,
        }]);
        assert!(error(&y, &expected) < 1e-6);
    }

    /// Numbers near the smallest and largest there are, and what is no number.
    #[test]
    fn extreme_numbers_stay_what_they_are() {
        if skipped() {
            return;
        }
        let product = |x: f32, w: f32| {
            let a = Tensor::from_f32_as(48, 128, &[x; 48 * 128], DType::F32);
            let b = Tensor::from_f32_as(128, 32, &[w; 128 * 32], DType::F32);
            let terms = [Term::new(a.view().as_mat(), Factor::straight(b.view()))];
            let mut y = Tensor::zeros(48, 32);
            multiply(&mut [Job {
                y: y.view_mut(),
                start: Start::Zero,
                terms: &terms,
            }])
            .expect("large enough");
            y.to_vec()[0]
        };
        let is = |found: f32, expected: f32| {
            assert!(
                (found / expected - 1.0).abs() < 1e-6,
                "{found:e} {expected:e}"
            )
        };
        is(product(1.234_567e-30, 1.0), 128.0 * 1.234_567e-30);
        // Of so small a number the last bits are below the smallest normal one.
        let tiny = product(1.234_567e-36, 1.0);
        assert!(
            (tiny / (128.0 * 1.234_567e-36) - 1.0).abs() < 1e-3,
            "{tiny:e}"
        );
        is(product(1.234_567e30, 1e-3), 128e-3 * 1.234_567e30);
        for x in [
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::from_bits(0x7f80_0001),
        ] {
            assert!(!product(x, 1.0).is_finite());
            assert!(!product(1.0, x).is_finite());
        }
    }

    /// Three bf16 numbers hold all bits of an f32 one.
    #[test]
    fn parts_add_up_exactly() {
        if skipped() {
            return;
        }
        let x = random(5, 70, DType::F32, 1);
        let numbers = x.to_vec();
        let mut tiles = vec![7; 3 * PARTS * TILE];
        for turned in [false, true] {
            let x = if turned {
                either(70, 5, false, DType::F32, 1)
            } else {
                x.clone()
            };
            let a = if turned {
                x.view().as_mat().t()
            } else {
                x.view().as_mat()
            };
            split_rows(&mut tiles, a);
            for row in 0..SIDE {
                for p in 0..3 * STEP {
                    let part = |part| {
                        let tile = (p / STEP * PARTS + part) * TILE;
                        bf16::from_bits(tiles[tile + row * STEP + p % STEP]).to_f32()
                    };
                    let inside = row < 5 && p < 70;
                    let expected = match (inside, turned) {
                        (false, _) => 0.0,
                        (true, false) => numbers[row * 70 + p],
                        (true, true) => x.to_vec()[p * 5 + row],
                    };
                    assert_eq!(part(0) + part(1) + part(2), expected);
                }
            }
        }
        assert!(first_non_finite(x.view()).is_none() && frobenius_norm(x.view()) > 0.0);
    }
}

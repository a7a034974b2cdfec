//! Products with a weight in f32 or bf16, a strip of it at a time.
//!
//! A bf16 weight is never widened as a whole. A task takes a strip of columns of the output, widens
//! the part of the weight that it needs into scratch memory of its thread, and multiplies a block of
//! tokens with it; for generated rows see [`few`](crate::cpu::product::few), and for processors that multiply bf16 itself `tiles`.
//!
//! Several outputs can be computed at once, so that threads meet once and not after each of them, and
//! an output can be a sum of products, so that it is written once.
//!
//! How many rows there are decides how an output is cut, and never what computes it or in which order an element is summed.

use std::ops::Range;

use crate::cpu::parallel::for_each_piece;
use crate::cpu::product::mat::{Mat, MatMut, Shared, product_in_blocks};
#[cfg(target_arch = "x86_64")]
use crate::cpu::product::{amx, avx2};
use crate::storage::{Storage, UnitVisitor, Window};
use crate::view::{View, ViewMut};

/// Rows of a block are a multiple of this, except in the last one.
const ROW_STEP: usize = 48;
/// Terms of a sum that `gemm-f32` gets widened at once.
const DEPTH: usize = 512;
/// Rows and columns of a piece for `gemm-f32`, which chooses the order of a sum by the size of a product: they are fixed.
const FIXED_PIECE: (usize, usize) = (96, 192);

/// The right factor of a product, [K, N]: a window of a weight, or of its transpose.
#[derive(Clone, Copy)]
pub(crate) struct Factor<'a> {
    pub(crate) view: View<'a>,
    /// Whether the factor is the transpose of the view.
    pub(crate) transposed: bool,
    /// Where the window begins.
    pub(crate) first_row: usize,
    pub(crate) first_col: usize,
    rows: usize,
    cols: usize,
}

impl<'a> Factor<'a> {
    /// The matrix as it is.
    pub(crate) fn straight(view: View<'a>) -> Self {
        Self {
            view,
            transposed: false,
            first_row: 0,
            first_col: 0,
            rows: view.rows(),
            cols: view.cols(),
        }
    }

    /// The transpose of a matrix.
    pub(crate) fn turned(view: View<'a>) -> Self {
        Self {
            transposed: true,
            rows: view.cols(),
            cols: view.rows(),
            ..Self::straight(view)
        }
    }

    /// K, the inner size.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// N, the columns of the output.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Where some of its rows and columns lie in the view.
    pub(crate) fn window(&self, rows: Range<usize>, cols: Range<usize>) -> Window {
        assert!(rows.end <= self.rows && cols.end <= self.cols);
        let down = self.first_row + rows.start..self.first_row + rows.end;
        let across = self.first_col + cols.start..self.first_col + cols.end;
        let (rows, cols) = if self.transposed {
            (across, down)
        } else {
            (down, across)
        };
        Window {
            stride: self.view.cols(),
            rows,
            cols,
        }
    }

    /// Some of the rows and columns.
    pub(crate) fn block(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && cols.end <= self.cols);
        Self {
            first_row: self.first_row + rows.start,
            first_col: self.first_col + cols.start,
            rows: rows.len(),
            cols: cols.len(),
            ..self
        }
    }
}

/// How exactly the factors of a product are read; sums are in f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// As they are.
    #[default]
    F32,
    /// An f32 number may be read as the sum of two bf16 numbers, off by 2⁻¹⁷ of itself at most, where the processor is faster with these.
    /// oneMKL calls it `float_to_bf16x2`.
    Bf16x2,
}

/// A product of a sum: scale times a [T, K] times b [K, N], added to a window of the output.
#[derive(Clone, Copy)]
pub(crate) struct Term<'a> {
    pub(crate) a: Mat<'a>,
    pub(crate) b: Factor<'a>,
    pub(crate) scale: f32,
    pub(crate) precision: Precision,
    /// Row and column of the output where the window begins.
    pub(crate) at: (usize, usize),
    /// Whether it is summed by itself and then added, even if it and its neighbours write the whole output. A row's bits must not
    /// depend on which other rows a term is for.
    pub(crate) apart: bool,
}

impl<'a> Term<'a> {
    /// The product itself, of the whole output.
    pub(crate) fn new(a: Mat<'a>, b: Factor<'a>) -> Self {
        Self {
            a,
            b,
            scale: 1.0,
            precision: Precision::F32,
            at: (0, 0),
            apart: false,
        }
    }

    /// The same, with its factors read so exactly.
    pub(crate) fn with(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }
}

/// An output, what it begins with, and the products that it is the sum of.
pub(crate) struct Job<'a> {
    /// [T, N].
    pub(crate) y: ViewMut<'a>,
    pub(crate) start: Start<'a>,
    pub(crate) terms: &'a [Term<'a>],
}

/// Computes all of these outputs.
pub(crate) fn multiply(jobs: Vec<Job<'_>>) {
    let sizes: Vec<(usize, usize)> = jobs
        .iter()
        .map(|job| (job.y.rows(), job.y.cols()))
        .collect();
    let pieces = if sums_in_order() {
        cut(&sizes, rayon::current_num_threads(), costs(&jobs))
    } else {
        pieces_of(&sizes, FIXED_PIECE)
    };
    let jobs: Vec<(Shared<'_>, Start<'_>, &[Term<'_>])> = jobs
        .into_iter()
        .map(|job| (Shared::from(job.y), job.start, job.terms))
        .collect();
    for_each_piece(pieces.len(), |i| {
        let Piece { job, rows, cols } = &pieces[i];
        let (y, start, terms) = &jobs[*job];
        #[expect(unsafe_code, reason = "threads write disjoint blocks of one matrix")]
        // SAFETY: no two pieces share an element of an output.
        let tile = unsafe { y.block(rows.clone(), cols.clone()) };
        multiply_piece(tile, sizes[*job], (rows, cols), *start, terms);
    });
}

/// Whether an element is summed in one order whatever piece it lies in. `gemm-f32` takes its own view of a piece's size.
fn sums_in_order() -> bool {
    #[cfg(target_arch = "x86_64")]
    return avx2::supported();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// One piece of an output of this size, on one thread.
fn multiply_piece(
    mut tile: MatMut<'_>,
    size: (usize, usize),
    (rows, cols): (&Range<usize>, &Range<usize>),
    start: Start<'_>,
    terms: &[Term<'_>],
) {
    let mut holds = start.prepare(&mut tile, cols);
    let mut rest = terms;
    while let Some(term) = rest.first() {
        // Neighbours that write the whole output are one sum. That they do does not depend on the piece, and so the order
        // of additions does not.
        let together = whole_terms(rest, size);
        if together > 0 {
            let parts = rest[..together].iter().map(|term| Term {
                a: term.a.block(rows.clone(), 0..term.a.cols()),
                b: term.b.block(0..term.b.rows(), cols.clone()),
                ..*term
            });
            let parts: Vec<Term<'_>> = parts.collect();
            multiply_group(tile.reborrow(), holds, &rest[..together], &parts);
            holds = true;
            rest = &rest[together..];
            continue;
        }
        rest = &rest[1..];
        let (row, col) = term.at;
        let down = overlap(rows, &(row..row + term.a.rows()));
        let across = overlap(cols, &(col..col + term.b.cols()));
        if down.is_empty() || across.is_empty() {
            continue;
        }
        if !holds {
            tile.fill_zero();
            holds = true;
        }
        let window = tile.window(
            down.start - rows.start..down.end - rows.start,
            across.start - cols.start..across.end - cols.start,
        );
        let part = Term {
            a: term
                .a
                .block(down.start - row..down.end - row, 0..term.a.cols()),
            b: term
                .b
                .block(0..term.b.rows(), across.start - col..across.end - col),
            ..*term
        };
        multiply_group(window, true, std::slice::from_ref(term), &[part]);
    }
    if !holds {
        tile.fill_zero();
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    a.start.max(b.start)..a.end.min(b.end)
}

/// A block of an output that one task computes.
struct Piece {
    job: usize,
    rows: Range<usize>,
    cols: Range<usize>,
}

/// How many of the first terms are of the size of the whole output and summed together.
fn whole_terms(terms: &[Term<'_>], size: (usize, usize)) -> usize {
    let whole = |term: &Term<'_>| term.at == (0, 0) && (term.a.rows(), term.b.cols()) == size;
    let together = |(i, term): &(usize, &Term<'_>)| whole(term) && (*i == 0 || !term.apart);
    terms.iter().enumerate().take_while(together).count()
}

/// out (+)= Σ parts, which are of the size of `out` and cut from `terms`. What computes them depends on the terms alone.
fn multiply_group(out: MatMut<'_>, accumulate: bool, terms: &[Term<'_>], parts: &[Term<'_>]) {
    #[cfg(target_arch = "x86_64")]
    if amx::is_worthwhile(terms) {
        return amx::multiply(out, accumulate, parts);
    }
    multiply_terms(out, accumulate, parts);
}

/// What decides how outputs are cut: times of a piece for each inner index, in that of a row of a product of 16 columns.
#[derive(Clone, Copy)]
pub(crate) struct Costs {
    /// Of a column of the right factor, which is put in order.
    pub(crate) pack: f64,
    /// Of a row of the left one, which is read.
    pub(crate) read: f64,
    /// Widths that a strip of columns can have.
    pub(crate) strips: &'static [usize],
}

/// Those of whatever computes these jobs, roughly.
fn costs(jobs: &[Job<'_>]) -> Costs {
    /// Bytes of a left factor from which reading it again comes from memory and not from a cache.
    const CACHED_BYTES: usize = 8 * 1024 * 1024;
    let size = |job: &Job<'_>| (job.y.rows(), job.y.cols());
    #[cfg(target_arch = "x86_64")]
    if (jobs.iter()).any(|job| amx::is_worthwhile(&job.terms[..whole_terms(job.terms, size(job))]))
    {
        return amx::COSTS;
    }
    let numbers = jobs.iter().map(|job| {
        let inner = job.terms.iter().map(|term| term.b.rows());
        size(job).0 * inner.sum::<usize>()
    });
    let bytes = numbers.max().unwrap_or(0) * size_of::<f32>();
    Costs {
        pack: 0.5,
        read: if bytes > CACHED_BYTES { 1.0 } else { 0.25 },
        strips: &[288, 192, 144, 128, 96, 64, 48, 32, 16],
    }
}

/// Cuts outputs into pieces for so many threads.
fn cut(sizes: &[(usize, usize)], threads: usize, costs: Costs) -> Vec<Piece> {
    let rows = sizes.iter().map(|size| size.0).max().unwrap_or(0);
    let mut best = (f64::INFINITY, costs.strips[0], rows.max(1));
    for &strip in costs.strips {
        for chunks in 1..=threads {
            let block = rows.div_ceil(chunks).next_multiple_of(ROW_STEP).max(1);
            let cost = |down: usize, across: usize| {
                let (down, across) = (down as f64, across as f64);
                down * across / 16.0 + across * costs.pack + down * costs.read
            };
            let (mut all, mut largest, mut count) = (0.0, 0.0, 0_usize);
            for &(rows, cols) in sizes {
                let tasks = rows.div_ceil(block) * cols.div_ceil(strip);
                let task = cost(block.min(rows), strip.min(cols));
                all += task * tasks as f64;
                if task > largest {
                    (largest, count) = (task, 0);
                }
                if task == largest {
                    count += tasks;
                }
            }
            // The last task of another thread is waited for.
            let waves = (count.div_ceil(threads) as f64 * largest).max(all / threads as f64);
            let time = waves + 0.1 * largest;
            if time < best.0 {
                best = (time, strip, block);
            }
        }
    }
    let (_, strip, block) = best;
    pieces_of(sizes, (block, strip))
}

/// Cuts outputs into pieces of so many rows and columns.
fn pieces_of(sizes: &[(usize, usize)], (block, strip): (usize, usize)) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (job, &(rows, cols)) in sizes.iter().enumerate() {
        for col in (0..cols).step_by(strip) {
            for row in (0..rows).step_by(block) {
                pieces.push(Piece {
                    job,
                    rows: row..(row + block).min(rows),
                    cols: col..(col + strip).min(cols),
                });
            }
        }
    }
    pieces
}

/// out (+)= Σ terms, each of the size of `out`, on one thread.
fn multiply_terms(mut out: MatMut<'_>, accumulate: bool, terms: &[Term<'_>]) {
    #[cfg(target_arch = "x86_64")]
    if avx2::supported() {
        return avx2::multiply(out, accumulate, terms);
    }
    for (i, term) in terms.iter().enumerate() {
        multiply_term_anywhere(out.reborrow(), accumulate || i > 0, term);
    }
}

/// [`multiply_terms`] of one with `gemm-f32`, for processors that [`panels`] has no code for.
fn multiply_term_anywhere(mut out: MatMut<'_>, accumulate: bool, term: &Term<'_>) {
    let Term { a, b, scale, .. } = *term;
    let rows = out.rows();
    if b.rows() == 0 && !accumulate {
        out.fill_zero();
    }
    // Summing a part of the inputs at a time, in order, keeps the strip within the cache.
    for start in (0..b.rows()).step_by(DEPTH) {
        let part = start..(start + DEPTH).min(b.rows());
        let a = a.block(0..rows, part.clone());
        with_widened(b.block(part, 0..b.cols()), |b| {
            product_in_blocks(&mut out, accumulate || start > 0, scale, a, b);
        });
    }
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Nothing: the output is overwritten.
    Zero,
    /// What the output holds.
    Sum,
    /// A bias, the same for each row.
    Row(&'a [f32]),
}

impl Start<'_> {
    /// Puts into a tile what the product is added to; whether there is anything.
    pub(crate) fn prepare(self, tile: &mut MatMut<'_>, columns: &Range<usize>) -> bool {
        match self {
            Self::Zero => false,
            Self::Sum => true,
            Self::Row(bias) => {
                for row in 0..tile.rows() {
                    tile.row(row).copy_from_slice(&bias[columns.clone()]);
                }
                true
            }
        }
    }
}

/// Calls `work` with a factor in f32: in place if it is f32, else widened into scratch.
fn with_widened(b: Factor<'_>, work: impl FnOnce(Mat<'_>)) {
    struct Widened<W>(Window, bool, W);
    impl<W: FnOnce(Mat<'_>)> UnitVisitor for Widened<W> {
        type Output = ();
        fn visit<S: Storage>(self, units: &[S]) {
            let Self(window, turned, work) = self;
            window.read_f32s(units, |numbers, stride| {
                let (rows, cols) = (window.rows.len(), window.cols.len());
                work(turned_if(Mat::strided(numbers, rows, cols, stride), turned));
            });
        }
    }
    let window = b.window(0..b.rows(), 0..b.cols());
    b.view.numbers().visit(Widened(window, b.transposed, work));
}

fn turned_if(mat: Mat<'_>, turned: bool) -> Mat<'_> {
    if turned { mat.t() } else { mat }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::fill_uniform;
    use crate::storage::DType;
    use crate::tensor::Tensor;

    fn random(rows: usize, cols: usize, key: u64) -> Tensor {
        let mut tensor = Tensor::zeros(rows, cols);
        fill_uniform(tensor.view_mut(), -1.0, 1.0, key);
        tensor
    }

    /// What other processors run must be right, too, though the tests' own seldom runs it.
    #[test]
    fn a_term_is_the_same_on_any_processor() {
        for (rows, inner, cols) in [(1, 1, 1), (7, 30, 17), (50, 600, 33), (97, 1100, 16)] {
            let a = random(rows, inner, 1);
            for turned in [false, true] {
                for dtype in [DType::F32, DType::Bf16] {
                    let shape = if turned { (cols, inner) } else { (inner, cols) };
                    let b = random(shape.0, shape.1, 2).to_vec();
                    let b = Tensor::from_f32_as(shape.0, shape.1, &b, dtype);
                    let factor = if turned {
                        Factor::turned(b.view())
                    } else {
                        Factor::straight(b.view())
                    };
                    let term = Term {
                        scale: 1.5,
                        ..Term::new(a.view().as_mat(), factor)
                    };
                    for accumulate in [false, true] {
                        let (mut here, mut anywhere) =
                            (random(rows, cols, 3), random(rows, cols, 3));
                        let tile = |y: &mut Tensor, work: &dyn Fn(MatMut<'_>)| {
                            work(MatMut::new(y.view_mut().into_f32s(), rows, cols));
                        };
                        tile(&mut here, &|out| {
                            multiply_terms(out, accumulate, std::slice::from_ref(&term));
                        });
                        tile(&mut anywhere, &|out| {
                            multiply_term_anywhere(out, accumulate, &term);
                        });
                        let off = crate::ops::measure::max_abs_diff(here.view(), anywhere.view());
                        assert!(off < 1e-4, "{rows}x{inner}x{cols}: {off}");
                    }
                }
            }
        }
    }

    #[test]
    fn pieces_cover_each_output_once() {
        for threads in [1, 2, 3, 16, 64] {
            for sizes in [
                vec![(472, 576), (472, 192)],
                vec![(33, 49_152)],
                vec![(5, 7), (1, 1)],
            ] {
                let mut seen: Vec<Vec<bool>> =
                    sizes.iter().map(|s| vec![false; s.0 * s.1]).collect();
                for piece in cut(&sizes, threads, costs(&[])) {
                    for row in piece.rows {
                        for col in piece.cols.clone() {
                            let place = &mut seen[piece.job][row * sizes[piece.job].1 + col];
                            assert!(!*place, "twice");
                            *place = true;
                        }
                    }
                }
                assert!(
                    seen.iter().flatten().all(|seen| *seen),
                    "{sizes:?} on {threads}"
                );
            }
        }
    }
}

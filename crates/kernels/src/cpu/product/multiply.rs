//! Products with a weight in f32 or bf16, a strip of it at a time.
//!
//! A bf16 weight is never widened as a whole. A task takes a strip of columns of the output, widens
//! the part of the weight that it needs into scratch memory of its thread, and multiplies a block of
//! tokens with it; for generated rows see [`few`](crate::cpu::product::few), and for processors that multiply bf16 itself `bf16`.
//!
//! Several outputs can be computed at once, so that threads meet once and not after each of them, and
//! an output can be a sum of products, so that it is written once.
//!
//! How many rows there are decides how an output is cut, and never what computes it or in which order an element is summed.

use std::ops::Range;

use crate::cpu::engine::{Engine, engine};
use crate::cpu::parallel::for_each_piece;
#[cfg(target_arch = "x86_64")]
use crate::cpu::product::bf16;
use crate::cpu::product::cut::{Costs, Piece, cut, pieces_of};
use crate::cpu::product::mat::{Mat, MatMut, Shared};
#[cfg(target_arch = "aarch64")]
use crate::cpu::product::neon_bf16;
use crate::cpu::product::term::{Job, Left, Start, Term};
use crate::cpu::product::{fallback, panels};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd;

/// Rows and columns of a piece for `gemm-f32`, which chooses the order of a sum by the size of a product: they are fixed.
const FIXED_PIECE: (usize, usize) = (96, 192);

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
    engine() != Engine::Portable
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

/// How many of the first terms are of the size of the whole output and summed together.
fn whole_terms(terms: &[Term<'_>], size: (usize, usize)) -> usize {
    let whole = |term: &Term<'_>| term.at == (0, 0) && (term.a.rows(), term.b.cols()) == size;
    let together = |(i, term): &(usize, &Term<'_>)| whole(term) && (*i == 0 || !term.apart);
    terms.iter().enumerate().take_while(together).count()
}

/// out (+)= Σ parts, which are of the size of `out` and cut from `terms`. What computes them depends on the terms alone.
fn multiply_group(out: MatMut<'_>, accumulate: bool, terms: &[Term<'_>], parts: &[Term<'_>]) {
    #[cfg(target_arch = "x86_64")]
    if bf16::is_worthwhile(terms) {
        return bf16::multiply(out, accumulate, parts);
    }
    #[cfg(target_arch = "aarch64")]
    if neon_bf16::is_worthwhile(terms) {
        return neon_bf16::multiply(out, accumulate, parts);
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = terms;
    with_wide(parts, |parts| multiply_terms(out, accumulate, parts));
}

/// Calls `work` with terms whose left factors are f32.
fn with_wide(terms: &[Term<'_>], work: impl FnOnce(&[Term<'_>])) {
    let numbers = |mat: Mat<'_, half::bf16>| mat.rows() * mat.cols();
    let narrow = terms.iter().filter_map(|term| term.a.narrow());
    let len: usize = narrow.map(numbers).sum();
    if len == 0 {
        return work(terms);
    }
    with_scratch(len, |mut scratch| {
        let terms = terms.iter().map(|term| {
            let Some(mat) = term.a.narrow() else {
                return *term;
            };
            let (wide, rest) = std::mem::take(&mut scratch).split_at_mut(numbers(mat));
            scratch = rest;
            let (rows, cols) = (mat.rows(), mat.cols());
            for (row, wide) in wide.chunks_exact_mut(cols.max(1)).enumerate() {
                simd::widen(wide, &mat.data()[row * mat.row_stride()..][..cols]);
            }
            Term {
                a: Left::Wide(Mat::new(wide, rows, cols)),
                ..*term
            }
        });
        let terms: Vec<Term<'_>> = terms.collect();
        work(&terms);
    });
}

/// Those of whatever computes these jobs, roughly.
fn costs(jobs: &[Job<'_>]) -> Costs {
    /// Bytes of a left factor from which reading it again comes from memory and not from a cache.
    const CACHED_BYTES: usize = 8 * 1024 * 1024;
    let size = |job: &Job<'_>| (job.y.rows(), job.y.cols());
    #[cfg(target_arch = "x86_64")]
    if (jobs.iter()).any(|job| bf16::is_worthwhile(&job.terms[..whole_terms(job.terms, size(job))]))
    {
        return bf16::costs();
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

/// `out = alpha·a·b`, or `out += alpha·a·b` if `accumulate`; out [m, n], a [m, k], b [k, n], on one thread.
pub(crate) fn product(out: MatMut<'_>, accumulate: bool, alpha: f32, a: Mat<'_>, b: Mat<'_>) {
    if panels::supported() {
        return panels::multiply_mats(out, accumulate, alpha, a, b);
    }
    fallback::product(out, accumulate, alpha, a, b);
}

/// out (+)= Σ terms, each of the size of `out`, on one thread.
fn multiply_terms(mut out: MatMut<'_>, accumulate: bool, terms: &[Term<'_>]) {
    if panels::supported() {
        return panels::multiply(out, accumulate, terms);
    }
    for (i, term) in terms.iter().enumerate() {
        fallback::multiply_term(out.reborrow(), accumulate || i > 0, term);
    }
}

/// out (+)= a·b on one thread, where `a` has few rows and `b` is read once, where it lies.
pub(crate) fn thin_product(out: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, accumulate: bool) {
    if panels::supported() {
        return panels::multiply_thin(out, accumulate, a, b);
    }
    product(out, accumulate, 1.0, a, b);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::product::term::Factor;
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
                            fallback::multiply_term(out, accumulate, &term);
                        });
                        let off = crate::ops::max_abs_diff(here.view(), anywhere.view());
                        assert!(off < 1e-4, "{rows}x{inner}x{cols}: {off}");
                    }
                }
            }
        }
    }
}

//! Products for processors that [`panels`](crate::cpu::product) has no code for: the one place that calls `gemm-f32`.
//!
//! It chooses the order of a sum by the size of a product, so that has to be fixed where a row must not depend on the others.

use gemm_common::Parallelism;

use crate::cpu::product::mat::{Mat, MatMut};
use crate::cpu::product::term::{Factor, Term};
use crate::cpu::scratch::with_scratch;

/// Terms of a sum that `gemm-f32` gets widened at once.
const DEPTH: usize = 512;

/// out (+)= a term of the size of `out`, in an order that does not depend on its rows.
pub(crate) fn multiply_term(mut out: MatMut<'_>, accumulate: bool, term: &Term<'_>) {
    let Term { a, b, scale, .. } = *term;
    let a = a.wide();
    let rows = out.rows();
    if b.rows() == 0 && !accumulate {
        out.fill_zero();
    }
    // Summing a part of the inputs at a time, in order, keeps the strip within the cache.
    for start in (0..b.rows()).step_by(DEPTH) {
        let part = start..(start + DEPTH).min(b.rows());
        let a = a.block(0..rows, part.clone());
        with_widened(b.block(part, 0..b.cols()), |b| {
            in_blocks(&mut out, accumulate || start > 0, scale, a, b);
        });
    }
}

/// Calls `work` with a factor in f32: in place if it is f32, else widened into scratch.
fn with_widened(b: Factor<'_>, work: impl FnOnce(Mat<'_>)) {
    let window = b.window(0..b.rows(), 0..b.cols());
    window.read_f32s(b.view.numbers(), |numbers, stride| {
        let (rows, cols) = (window.rows.len(), window.cols.len());
        work(turned_if(
            Mat::strided(numbers, rows, cols, stride),
            b.transposed,
        ));
    });
}

fn turned_if(mat: Mat<'_>, turned: bool) -> Mat<'_> {
    if turned { mat.t() } else { mat }
}

/// Rows that `gemm-f32` multiplies at once: it chooses the order of a sum by the size of a product.
const HEIGHT: usize = 48;

/// out (+)= alpha·a·b, in an order that does not depend on how many rows there are, or on which of them a row is.
fn in_blocks(out: &mut MatMut<'_>, accumulate: bool, alpha: f32, a: Mat<'_>, b: Mat<'_>) {
    let (rows, cols, inner) = (out.rows(), out.cols(), a.cols());
    assert_eq!(a.rows(), rows, "rows of a product");
    for start in (0..rows).step_by(HEIGHT) {
        let block = start..(start + HEIGHT).min(rows);
        let count = block.len();
        let a = a.block(block.clone(), 0..inner);
        let mut out = out.window(block, 0..cols);
        if count == HEIGHT {
            product(out, accumulate, alpha, a, b);
            continue;
        }
        // Rows of zeros fill it up.
        with_scratch(HEIGHT * (inner + cols), |scratch| {
            let (left, sums) = scratch.split_at_mut(HEIGHT * inner);
            left[count * inner..].fill(0.0);
            for (i, to) in left.chunks_exact_mut(inner.max(1)).take(count).enumerate() {
                for (p, to) in to.iter_mut().enumerate() {
                    *to = a.data()[i * a.row_stride() + p * a.col_stride()];
                }
            }
            sums[count * cols..].fill(0.0);
            for (i, to) in sums.chunks_exact_mut(cols.max(1)).take(count).enumerate() {
                to.copy_from_slice(out.row(i));
            }
            let left = Mat::new(left, HEIGHT, inner);
            product(MatMut::new(sums, HEIGHT, cols), accumulate, alpha, left, b);
            for (i, from) in sums.chunks_exact(cols.max(1)).take(count).enumerate() {
                out.row(i).copy_from_slice(from);
            }
        });
    }
}

/// `out = alpha·a·b`, or `out += alpha·a·b` if `accumulate`; out [m, n], a [m, k], b [k, n].
#[expect(unsafe_code, reason = "gemm takes pointers and strides")]
pub(crate) fn product(mut out: MatMut<'_>, accumulate: bool, alpha: f32, a: Mat<'_>, b: Mat<'_>) {
    assert_eq!(a.rows(), out.rows(), "rows of a product");
    assert_eq!(b.cols(), out.cols(), "columns of a product");
    assert_eq!(a.cols(), b.rows(), "inner size of a product");
    if out.rows() == 0 || out.cols() == 0 {
        return;
    }
    let (start, row_stride) = out.pointer(0, 0);
    // The kernels write columns of `out` with unit stride, so they are given outᵀ = bᵀ·aᵀ.
    // SAFETY: `Mat` and `MatMut` have checked that each of their elements lies within the data they
    // borrow, and the sizes match by the assertions above. `out` is borrowed mutably, so that it
    // overlaps neither `a` nor `b`.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            out.cols(),
            out.rows(),
            a.cols(),
            start,
            row_stride as isize,
            1,
            accumulate,
            b.data().as_ptr(),
            b.row_stride() as isize,
            b.col_stride() as isize,
            a.data().as_ptr(),
            a.row_stride() as isize,
            a.col_stride() as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

//! A part of the weight as the first values of A and B: `PiSSA`'s and `OLoRA`'s.
//!
//! - `PiSSA` (Meng et al., 2024; PEFT's `pissa_init`): W = U S Vᵀ, and of the r largest singular values A₀ = √(S/s) Vᵀ, B₀ = U √(S/s), so
//!   that s·B₀·A₀ is the part of rank r that is nearest to W.
//! - `OLoRA` (Büyükakyüz, 2024; PEFT's `olora_init`): W = Q R, and of it B₀ = Q[:, :r], A₀ = R[:r]. What is taken off is s·B₀·A₀, and so
//!   the paper's Q R where s is 1.
//!
//! Singular vectors have no sign, and neither have the columns of Q: here the largest element of each column of B₀ is positive. It
//! changes no step of a training but for rounding, since a column of B and its row of A have their signs together.

use lowrank_kernels::Tensor;

use super::{Beginning, InitLoraWeights};
use crate::svd::{Decomposition, Matrix, most_accurate, orthogonal_part, sketched};

/// A₀ and B₀ of a weight [out, in], r at most its shorter side.
pub(super) fn beginning(
    weight: &Tensor,
    init: InitLoraWeights,
    r: usize,
    scale: f64,
    seed: u64,
) -> Beginning {
    let begins = match init {
        InitLoraWeights::Olora => {
            let (b, a) = orthogonal_part(weight, r);
            Beginning { b, a }
        }
        InitLoraWeights::PissaNiter(iterations) => {
            split(&sketched(weight, r, iterations, seed), scale)
        }
        _ => split(&most_accurate(weight, r), scale),
    };
    with_signs(begins)
}

/// B = U √(S/s) and A = √(S/s) Vᵀ.
pub(super) fn split(of: &Decomposition, scale: f64) -> Beginning {
    let roots = of.values.iter().map(|value| (value / scale).sqrt());
    let roots = Matrix::from_diagonal(&roots.collect::<Vec<f64>>().into());
    Beginning {
        b: &of.left * &roots,
        a: roots * of.right.transpose(),
    }
}

/// The same with the largest element of each column of B positive.
pub(super) fn with_signs(mut begins: Beginning) -> Beginning {
    for k in 0..begins.b.ncols() {
        let column = begins.b.column(k);
        let largest = column.iter().fold(0.0_f64, |most, value| {
            if value.abs() > most.abs() {
                *value
            } else {
                most
            }
        });
        if largest < 0.0 {
            begins.b.column_mut(k).neg_mut();
            begins.a.row_mut(k).neg_mut();
        }
    }
    begins
}

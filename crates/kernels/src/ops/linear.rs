//! A linear layer: y = x·Wᵀ + b.
//!
//! `linear_forward` overwrites y; `linear_backward_input` overwrites or accumulates as asked;
//! `linear_backward_weight` and `bias_backward` accumulate.

use crate::cpu;
use crate::cpu::product::term::Left;
use crate::ops::low_rank;
use crate::profile::op;
use crate::types::classes::RowClasses;
use crate::types::compute::ComputeDType;
use crate::types::linear::{
    BranchGradient, BranchOutput, Layout, LinearGradient, LinearOutput, Weight,
};
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

/// y = x·Wᵀ + b, plus s·u·Bᵀ with u = drop(x)·Aᵀ for each branch; for several linears at once. x [T, in].
///
/// A row's bits are those that it has alone, among rows of its class. The workspace is for devices that need temporaries here; this
/// one does not.
///
/// # Panics
/// If the shapes do not match, or a branch of generated rows drops some of their numbers.
pub fn linears_forward(
    x: View<'_>,
    outputs: Vec<LinearOutput<'_>>,
    classes: RowClasses,
    compute: ComputeDType,
    _ws: &Workspace,
) {
    forward(x, outputs, classes, compute);
}

/// y = x·Wᵀ + b; y [T, out] is overwritten, x [T, in], b [1, out].
///
/// # Panics
/// If the shapes do not match.
pub fn linear_forward(
    y: ViewMut<'_>,
    x: View<'_>,
    w: Weight<'_>,
    bias: Option<View<'_>>,
    classes: RowClasses,
) {
    linear_forward_as(y, x, w, bias, classes, ComputeDType::F32);
}

/// [`linear_forward`] whose factors are read as `compute` says.
pub(crate) fn linear_forward_as(
    y: ViewMut<'_>,
    x: View<'_>,
    w: Weight<'_>,
    bias: Option<View<'_>>,
    classes: RowClasses,
    compute: ComputeDType,
) {
    let output = LinearOutput {
        y,
        w,
        bias,
        branches: Vec::new(),
    };
    forward(x, vec![output], classes, compute);
}

fn forward(
    x: View<'_>,
    outputs: Vec<LinearOutput<'_>>,
    classes: RowClasses,
    compute: ComputeDType,
) {
    for output in &outputs {
        check(x, output, classes);
    }
    let outputs = outputs.into_iter();
    let outputs = outputs.map(|output| cpu::linear::Rest::new(output, classes));
    let (mut ys, mut rest): (Vec<_>, Vec<_>) = outputs.unzip();
    for BranchOutput { u, rows, branch } in rest.iter_mut().flat_map(|r| &mut r.prompt) {
        let _op = op("low-rank forward", || {
            2.0 * (rows.len() * branch.a.len()) as f64
        });
        cpu::low_rank::down_prompts(u.reborrow(), x, rows.clone(), branch);
    }
    let linears = op("linear forward", || {
        let products = rest.iter().map(|output| {
            let branches = output.prompt.iter();
            let branches = branches.map(|b| b.rows.len() * b.branch.b.len());
            x.rows() * output.w.view.len() + branches.sum::<usize>()
        });
        2.0 * products.sum::<usize>() as f64
    });
    cpu::linear::in_panels(x, &mut ys, &rest, classes, compute);
    cpu::linear::generated(x, &mut ys, &mut rest, classes);
    drop(linears);
    if rest.iter().any(|output| !output.generated.is_empty()) {
        let _op = op("low-rank forward", || {
            let branches = rest.iter().flat_map(|output| &output.generated);
            let products = branches.map(|b| b.rows.len() * b.branch.b.len());
            2.0 * products.sum::<usize>() as f64
        });
        cpu::linear::generated_branches(ys, &rest, x.rows(), classes);
    }
}

fn check(x: View<'_>, output: &LinearOutput<'_>, classes: RowClasses) {
    let LinearOutput {
        y,
        w,
        bias,
        branches,
    } = output;
    x.assert_shape("the input of a linear", y.rows(), w.inputs());
    y.assert_shape("the output of a linear", x.rows(), w.outputs());
    if let Some(bias) = bias {
        bias.assert_shape("the bias of a linear", 1, w.outputs());
    }
    for BranchOutput { u, rows, branch } in branches {
        low_rank::check(branch, y.cols(), x, (u.rows(), u.cols()), rows, classes);
    }
}

/// dx = Σ over linears of dy·W + Σ over their branches of du·A; dx [T, in] is overwritten.
///
/// # Panics
/// If the shapes do not match.
pub fn linears_backward_input(
    dx: ViewMut<'_>,
    gradients: &[LinearGradient<'_>],
    compute: ComputeDType,
) {
    let _op = op("linear backward, input", || {
        let products = gradients.iter().map(|linear| {
            let branches = linear.branches.iter().map(|b| b.rows.len() * b.a.len());
            linear.dy.rows() * linear.w.view.len() + branches.sum::<usize>()
        });
        2.0 * products.sum::<usize>() as f64
    });
    for LinearGradient { dy, w, branches } in gradients {
        dx.assert_shape("the input gradient of a linear", dy.rows(), w.inputs());
        dy.assert_shape("the output gradient of a linear", dx.rows(), w.outputs());
        for BranchGradient { du, rows, a } in branches {
            a.assert_shape("A", du.cols(), dx.cols());
            assert!(rows.len() == du.rows() && rows.end <= dx.rows());
        }
    }
    cpu::linear::linears_backward_input(dx, gradients, compute);
}

/// dx = dy·W, or dx += dy·W if `accumulate`; dx [T, in], dy [T, out].
///
/// # Panics
/// If the shapes do not match.
pub fn linear_backward_input(
    dx: ViewMut<'_>,
    dy: View<'_>,
    w: Weight<'_>,
    accumulate: bool,
    compute: ComputeDType,
) {
    linear_backward_left(dx, dy.as_left(), w, accumulate, compute);
}

/// [`linear_backward_input`] of a gradient that lies as products read it.
pub(crate) fn linear_backward_left(
    dx: ViewMut<'_>,
    dy: Left<'_>,
    w: Weight<'_>,
    accumulate: bool,
    compute: ComputeDType,
) {
    let _op = op("linear backward, input", || {
        2.0 * (dy.rows() * w.view.len()) as f64
    });
    dx.assert_shape("the input gradient of a linear", dy.rows(), w.inputs());
    assert_eq!(dy.cols(), w.outputs(), "the output gradient of a linear");
    cpu::linear::linear_backward_input(dx, dy, w, accumulate, compute);
}

/// dW += dyᵀ·x in the weight's own layout; dy [T, out], x [T, in].
///
/// # Panics
/// If the shapes do not match.
pub fn linear_backward_weight(
    dw: ViewMut<'_>,
    dy: View<'_>,
    x: View<'_>,
    layout: Layout,
    compute: ComputeDType,
) {
    let _op = op("linear backward, weight", || {
        2.0 * (dy.rows() * dw.len()) as f64
    });
    assert_eq!(dy.rows(), x.rows(), "tokens of a weight gradient");
    let (rows, cols) = match layout {
        Layout::OutIn => (dy.cols(), x.cols()),
        Layout::InOut => (x.cols(), dy.cols()),
    };
    dw.assert_shape("the weight gradient of a linear", rows, cols);
    cpu::linear::linear_backward_weight(dw, dy, x, layout, compute);
}

/// db += Σ over tokens of dy; db [1, out], dy [T, out].
///
/// # Panics
/// If the shapes do not match.
pub fn bias_backward(db: ViewMut<'_>, dy: View<'_>) {
    let _op = op("bias backward", || 0.0);
    db.assert_shape("the bias gradient of a linear", 1, dy.cols());
    cpu::linear::bias_backward(db, dy);
}

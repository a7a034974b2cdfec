//! Layer norm (Ba, Kiros and Hinton, 2016): y = (x - mean) · rstd · w + b, where
//! rstd = 1 / √(var(x) + ε).
//!
//! mean and rstd are [T, 1]. The forward overwrites; dx overwrites or accumulates as asked; the
//! gradients of weight and bias accumulate. What the forward read may be bf16 once it is kept.

use crate::cpu;
use crate::ops::linear::bias_backward;
use crate::profile::op;
use crate::view::{OutputMut, View, ViewMut};

/// y = (x - mean) · rstd · w + b; y, x [T, C], mean and rstd [T, 1] saved, weight and bias [1, C].
///
/// # Panics
/// If the shapes do not match.
pub fn layer_norm_forward<'y>(
    y: impl Into<OutputMut<'y>>,
    mean: ViewMut<'_>,
    rstd: ViewMut<'_>,
    x: View<'_>,
    weight: View<'_>,
    bias: Option<View<'_>>,
    eps: f32,
) {
    let _op = op("norm forward", || 0.0);
    let y = y.into();
    let cols = check(x, weight, bias);
    y.assert_shape("the output of a norm", x.rows(), cols);
    mean.assert_shape("mean", x.rows(), 1);
    rstd.assert_shape("rstd", x.rows(), 1);
    cpu::norm::layer::layer_norm_forward(y, mean, rstd, x, weight, bias, eps);
}

/// y from the mean and rstd that the forward saved; shapes as there.
///
/// # Panics
/// If the shapes do not match.
pub fn layer_norm_apply<'y>(
    y: impl Into<OutputMut<'y>>,
    x: View<'_>,
    mean: View<'_>,
    rstd: View<'_>,
    weight: View<'_>,
    bias: Option<View<'_>>,
) {
    let _op = op("norm again", || 0.0);
    let y = y.into();
    let cols = check(x, weight, bias);
    y.assert_shape("the output of a norm", x.rows(), cols);
    mean.assert_shape("mean", x.rows(), 1);
    rstd.assert_shape("rstd", x.rows(), 1);
    cpu::norm::layer::layer_norm_apply(y, x, mean, rstd, weight, bias);
}

/// dx (overwritten, or added to if `accumulate`), dweight and dbias (added to).
///
/// dx, dy, x [T, C], mean and rstd [T, 1], weight, dweight and dbias [1, C].
///
/// # Panics
/// If the shapes do not match.
pub fn layer_norm_backward(
    dx: ViewMut<'_>,
    dweight: Option<ViewMut<'_>>,
    dbias: Option<ViewMut<'_>>,
    dy: View<'_>,
    x: View<'_>,
    mean: View<'_>,
    rstd: View<'_>,
    weight: View<'_>,
    accumulate: bool,
) {
    let _op = op("norm backward", || 0.0);
    let cols = check(x, weight, None);
    dx.assert_shape("the input gradient of a norm", x.rows(), cols);
    dy.assert_shape("the output gradient of a norm", x.rows(), cols);
    mean.assert_shape("mean", x.rows(), 1);
    rstd.assert_shape("rstd", x.rows(), 1);
    if let Some(dweight) = &dweight {
        dweight.assert_shape("the weight gradient of a norm", 1, cols);
    }
    if let Some(dbias) = dbias {
        // y = (x - mean) · rstd · w + b, so db += Σ over tokens of dy
        bias_backward(dbias, dy);
    }
    cpu::norm::layer::layer_norm_backward(dx, dweight, dy, x, mean, rstd, weight, accumulate);
}

fn check(x: View<'_>, weight: View<'_>, bias: Option<View<'_>>) -> usize {
    assert!(x.cols() > 0, "a norm needs at least one column");
    weight.assert_shape("the weight of a norm", 1, x.cols());
    if let Some(bias) = bias {
        bias.assert_shape("the bias of a norm", 1, x.cols());
    }
    x.cols()
}

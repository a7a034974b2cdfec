//! Root-mean-square norm (Zhang and Sennrich, 2019): y = x · rstd · (offset + w), where
//! rstd = 1 / √(mean(x²) + ε). The offset is 0 for most models and 1 for Gemma's.
//!
//! A row of C numbers is normalised in `groups` pieces of n = C / groups, each with the same weight
//! [1, n]; that is the norm of each head's query or key. rstd is [T, groups]. The forward
//! overwrites; dx overwrites or accumulates as asked; the weight's gradient accumulates. What the forward read may be bf16 once it is kept.

use crate::cpu;
use crate::profile::op;
use crate::view::{OutputMut, View, ViewMut};

/// y = x · rstd · (offset + w); y, x [T, C], rstd [T, groups] saved for the backward, weight [1, C / groups].
///
/// # Panics
/// If the shapes do not match.
pub fn rms_norm_forward<'y>(
    y: impl Into<OutputMut<'y>>,
    rstd: ViewMut<'_>,
    x: View<'_>,
    weight: View<'_>,
    offset: f32,
    eps: f32,
    groups: usize,
) {
    let _op = op("norm forward", || 0.0);
    let y = y.into();
    check(x, weight, groups);
    y.assert_shape("the output of a norm", x.rows(), x.cols());
    rstd.assert_shape("rstd", x.rows(), groups);
    cpu::norm::rms::rms_norm_forward(y, rstd, x, weight, offset, eps, groups);
}

/// y from the rstd that the forward saved; shapes as there.
///
/// # Panics
/// If the shapes do not match.
pub fn rms_norm_apply<'y>(
    y: impl Into<OutputMut<'y>>,
    x: View<'_>,
    rstd: View<'_>,
    weight: View<'_>,
    offset: f32,
    groups: usize,
) {
    let _op = op("norm again", || 0.0);
    let y = y.into();
    check(x, weight, groups);
    y.assert_shape("the output of a norm", x.rows(), x.cols());
    rstd.assert_shape("rstd", x.rows(), groups);
    cpu::norm::rms::rms_norm_apply(y, x, rstd, weight, offset, groups);
}

/// dx (overwritten, or added to if `accumulate`) and dweight (added to).
///
/// dx, dy, x [T, C], rstd [T, groups], weight and dweight [1, C / groups].
///
/// # Panics
/// If the shapes do not match.
pub fn rms_norm_backward(
    dx: ViewMut<'_>,
    dweight: Option<ViewMut<'_>>,
    dy: View<'_>,
    x: View<'_>,
    rstd: View<'_>,
    weight: View<'_>,
    offset: f32,
    groups: usize,
    accumulate: bool,
) {
    let _op = op("norm backward", || 0.0);
    check(x, weight, groups);
    if let Some(dweight) = &dweight {
        dweight.assert_shape("the weight gradient of a norm", 1, x.cols() / groups);
    }
    dx.assert_shape("the input gradient of a norm", x.rows(), x.cols());
    dy.assert_shape("the output gradient of a norm", x.rows(), x.cols());
    rstd.assert_shape("rstd", x.rows(), groups);
    cpu::norm::rms::rms_norm_backward(dx, dweight, dy, x, rstd, weight, offset, groups, accumulate);
}

fn check(x: View<'_>, weight: View<'_>, groups: usize) {
    assert!(
        groups > 0 && x.cols() > 0 && x.cols().is_multiple_of(groups),
        "{} columns cannot be normalised in {groups} groups",
        x.cols()
    );
    weight.assert_shape("the weight of a norm", 1, x.cols() / groups);
}

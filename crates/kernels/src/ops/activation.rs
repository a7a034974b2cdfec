//! Element-wise activations, plain and gated.
//!
//! Everything here overwrites. What the forward of a linear saved, the inputs of these functions, may
//! be bf16; so may what the next products read, their outputs.

use crate::cpu;
use crate::profile::op;
use crate::types::activation::Activation;
use crate::view::{OutputMut, View};

/// h = act(x); both [T, C].
///
/// # Panics
/// If the shapes differ.
pub fn activation_forward<'h>(h: impl Into<OutputMut<'h>>, x: View<'_>, act: Activation) {
    let h = h.into();
    let _op = op("activation forward", || 0.0);
    h.assert_shape("the output of an activation", x.rows(), x.cols());
    cpu::activation::activation_forward(h, x, act);
}

/// dx = dh · act'(x), overwritten; all [T, C].
///
/// # Panics
/// If the shapes differ.
pub fn activation_backward<'d>(
    dx: impl Into<OutputMut<'d>>,
    dh: View<'_>,
    x: View<'_>,
    act: Activation,
) {
    let dx = dx.into();
    let _op = op("activation backward", || 0.0);
    dx.assert_shape("the input gradient of an activation", x.rows(), x.cols());
    dh.assert_shape("the output gradient of an activation", x.rows(), x.cols());
    cpu::activation::activation_backward(dx, dh, x, act);
}

/// h = act(gate) · up; all [T, C].
///
/// # Panics
/// If the shapes differ.
pub fn gated_forward<'h>(
    h: impl Into<OutputMut<'h>>,
    gate: View<'_>,
    up: View<'_>,
    act: Activation,
) {
    let h = h.into();
    let _op = op("gated forward", || 0.0);
    h.assert_shape("the output of a gate", gate.rows(), gate.cols());
    up.assert_shape("the gated input", gate.rows(), gate.cols());
    cpu::activation::gated_forward(h, gate, up, act);
}

/// dgate = dh · up · act'(gate) and dup = dh · act(gate), overwritten; all [T, C].
///
/// # Panics
/// If the shapes differ.
pub fn gated_backward<'d>(
    dgate: impl Into<OutputMut<'d>>,
    dup: impl Into<OutputMut<'d>>,
    dh: View<'_>,
    gate: View<'_>,
    up: View<'_>,
    act: Activation,
) {
    let _op = op("gated backward", || 0.0);
    let (dgate, dup) = (dgate.into(), dup.into());
    let (rows, cols) = (gate.rows(), gate.cols());
    dgate.assert_shape("the gradient of a gate", rows, cols);
    dup.assert_shape("the gradient of the gated input", rows, cols);
    dh.assert_shape("the output gradient of a gate", rows, cols);
    up.assert_shape("the gated input", rows, cols);
    cpu::activation::gated_backward(dgate, dup, dh, gate, up, act);
}

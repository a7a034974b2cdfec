//! AdamW (Loshchilov and Hutter, 2019) in the order that PyTorch computes it.

use crate::cpu;
use crate::profile::op;
use crate::types::optimizer::AdamW;
use crate::view::{View, ViewMut};

/// One step: values and both moments are updated; all of one shape.
///
/// # Panics
/// If the shapes differ or the step is zero.
pub fn adamw_step(
    values: ViewMut<'_>,
    grads: View<'_>,
    m: ViewMut<'_>,
    v: ViewMut<'_>,
    settings: &AdamW,
) {
    let _op = op("AdamW", || 0.0);
    let (rows, cols) = (values.rows(), values.cols());
    grads.assert_shape("the gradients", rows, cols);
    m.assert_shape("the first moment", rows, cols);
    v.assert_shape("the second moment", rows, cols);
    assert!(settings.step > 0, "steps are counted from one");
    cpu::optimizer::adamw_step(values, grads, m, v, settings);
}

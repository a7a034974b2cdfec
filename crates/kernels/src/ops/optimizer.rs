//! AdamW (Loshchilov and Hutter, 2019) in the order that PyTorch computes it.

use rayon::prelude::*;

use crate::cpu::parallel::ForEachPart;
use crate::cpu::simd::vectorize;
use crate::profile::op;
use crate::view::{View, ViewMut};

/// Settings of one AdamW step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay: values are multiplied by 1 - lr·weight_decay.
    pub weight_decay: f32,
    /// Number of this step, from 1.
    pub step: u64,
    /// What gradients are multiplied by first.
    pub grad_scale: f32,
}

/// Numbers that a task takes.
const BLOCK: usize = 16 * 1024;

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
    let AdamW {
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        grad_scale,
    } = *settings;
    let correction = |beta: f32| 1.0 - f64::from(beta).powf(step as f64);
    let decay = (1.0 - f64::from(lr) * f64::from(weight_decay)) as f32;
    let rate = (f64::from(lr) / correction(beta1)) as f32;
    let root = correction(beta2).sqrt() as f32;
    values
        .into_f32s()
        .par_chunks_mut(BLOCK)
        .zip(grads.f32s().par_chunks(BLOCK))
        .zip(m.into_f32s().par_chunks_mut(BLOCK))
        .zip(v.into_f32s().par_chunks_mut(BLOCK))
        .for_each_part(|(((values, grads), m), v)| {
            vectorize(
                #[inline(always)]
                || {
                    let moments = m.iter_mut().zip(v);
                    for ((value, &grad), (m, v)) in values.iter_mut().zip(grads).zip(moments) {
                        let grad = grad_scale * grad;
                        *m += (1.0 - beta1) * (grad - *m);
                        *v = beta2 * *v + (1.0 - beta2) * grad * grad;
                        *value = *value * decay - rate * *m / (v.sqrt() / root + eps);
                    }
                },
            );
        });
}

//! The loop of an optimizer step.

use rayon::prelude::*;

use crate::cpu::parallel::ForEachPart;
use crate::cpu::simd::vectorize;
use crate::types::optimizer::AdamW;
use crate::view::{View, ViewMut};

/// Numbers that a task takes.
const BLOCK: usize = 16 * 1024;

pub(crate) fn adamw_step(
    values: ViewMut<'_>,
    grads: View<'_>,
    m: ViewMut<'_>,
    v: ViewMut<'_>,
    settings: &AdamW,
) {
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

//! Settings of optimizers.

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

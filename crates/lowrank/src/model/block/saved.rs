//! What a block keeps from its forward for its backward.
//!
//! The norms' outputs and the MLP's hidden activation are computed again, and more where [`Recompute`] says so. Matrices may be
//! kept as bf16. q, k and v are where attention reads them so anyway
//! ([`ComputeDType::rounds_here`](lowrank_kernels::ComputeDType::rounds_here)), and only there: the gradients of scores are
//! small differences of large numbers, and rounding what they are computed from costs several times as much precision as rounding
//! everything else.

use lowrank_kernels::{DType, Tensor};

use super::attention::{AttentionValues, HeadsSaved, RawHeads};
use super::mlp::{MlpInputs, MlpValues};
#[cfg(test)]
use crate::model::linear::LinearSaved;
use crate::model::pass::Pass;
use crate::model::saving::{Recompute, Saving};

/// What one block saves for its backward.
pub(crate) enum BlockSaved {
    /// Everything that is not cheap.
    Values(Box<(AttentionValues, MlpValues)>),
    /// The input [T, C] alone, in f32.
    Input(Tensor),
}

impl BlockSaved {
    /// Bytes of what linears saved.
    #[cfg(test)]
    pub(crate) fn bytes_of_linears(&self) -> usize {
        let Self::Values(values) = self else { return 0 };
        let (attention, mlp) = &**values;
        let linears = attention.linears.iter().chain(&mlp.input_linears);
        let others = [&mlp.output_linear, &mlp.last_linear];
        linears.chain(others).map(LinearSaved::bytes).sum()
    }

    /// Gives everything back.
    pub(crate) fn give(self, pass: &Pass) {
        match self {
            Self::Input(x) => pass.give([x]),
            Self::Values(values) => {
                values.0.give(pass);
                values.1.give(pass);
            }
        }
    }
}

impl AttentionValues {
    /// What is kept of them.
    pub(super) fn keep(self, pass: &Pass, dtype: DType) -> Self {
        let keep = |tensor| pass.keep(tensor, dtype);
        let HeadsSaved { q, k, v, raw } = self.heads;
        let raw = raw.map(|raw| RawHeads {
            q: keep(raw.q),
            k: keep(raw.k),
            ..raw
        });
        let rounds = self.relative.is_none() && pass.compute_dtype.rounds_here();
        let [q, k, v] = [q, k, v].map(|head| if rounds { keep(head) } else { head });
        let linears = self.linears.into_iter();
        Self {
            x: keep(self.x),
            heads: HeadsSaved { q, k, v, raw },
            linears: linears.map(|of| pass.keep_linear(of, dtype)).collect(),
            ..self
        }
    }

    /// Gives back everything but the block's input.
    pub(super) fn give_all_but_input(self, pass: &Pass) -> Tensor {
        let HeadsSaved { q, k, v, raw } = self.heads;
        pass.give([self.lse, q, k, v]);
        if let Some(raw) = raw {
            pass.give([raw.q, raw.q_rstd, raw.k, raw.k_rstd]);
        }
        pass.give_linears(self.linears);
        if let Some(norm) = self.norm {
            pass.give_norm(norm);
        }
        if let Some(relative) = self.relative {
            relative.give(pass);
        }
        self.x
    }

    /// Gives everything back.
    pub(super) fn give(self, pass: &Pass) {
        let x = self.give_all_but_input(pass);
        pass.give([x]);
    }
}

impl MlpInputs {
    /// Gives both back.
    pub(super) fn give(self, pass: &Pass) {
        pass.give(self.gate);
        pass.give([self.up]);
    }
}

impl MlpValues {
    /// What is kept of them.
    pub(super) fn keep(self, pass: &Pass, saving: Saving) -> Self {
        let keep = |tensor| pass.keep(tensor, saving.dtype);
        let again = saving.recompute == Recompute::Selective;
        let inputs = self.inputs.and_then(|inputs| {
            if again {
                inputs.give(pass);
                return None;
            }
            Some(MlpInputs {
                gate: inputs.gate.map(keep),
                up: keep(inputs.up),
            })
        });
        // What gate and up are computed from again stays as it is.
        let x_mid = if again { self.x_mid } else { keep(self.x_mid) };
        let linear = |saved| pass.keep_linear(saved, saving.dtype);
        let input_linears = if again {
            pass.give_linears(self.input_linears);
            Vec::new()
        } else {
            self.input_linears.into_iter().map(linear).collect()
        };
        let bottlenecks = |saved| pass.keep_bottlenecks(saved, saving.dtype);
        Self {
            o: self.o.map(keep),
            x_mid,
            inputs,
            output_linear: linear(self.output_linear),
            input_linears,
            last_linear: linear(self.last_linear),
            attention_bottlenecks: bottlenecks(self.attention_bottlenecks),
            mlp_bottlenecks: bottlenecks(self.mlp_bottlenecks),
            last_sum: self.last_sum.map(|(sum, norm)| (keep(sum), norm)),
            attention_output: self.attention_output.map(|(x, norm)| (keep(x), norm)),
            mlp_output: self.mlp_output.map(|(x, norm)| (keep(x), norm)),
            ..self
        }
    }

    /// Gives everything back.
    pub(super) fn give(self, pass: &Pass) {
        pass.give(self.o);
        pass.give([self.x_mid]);
        if let Some(norm) = self.norm {
            pass.give_norm(norm);
        }
        if let Some(inputs) = self.inputs {
            inputs.give(pass);
        }
        pass.give_bottlenecks(self.attention_bottlenecks);
        pass.give_bottlenecks(self.mlp_bottlenecks);
        let normed = [self.last_sum, self.attention_output, self.mlp_output];
        for (read, norm) in normed.into_iter().flatten() {
            pass.give([read]);
            pass.give_norm(norm);
        }
        pass.give_linears([self.output_linear, self.last_linear]);
        pass.give_linears(self.input_linears);
    }
}

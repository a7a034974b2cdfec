//! The tensors of a model: where each comes from, and what llama.cpp's converter did to it.

use std::collections::HashSet;

use super::architecture::{AttentionBias, Fused, HeadNorms, Rotary};
use super::{Model, rope};
use crate::FormatError;
use crate::gguf::{GgmlType, GgufTensor};

/// Where one Hugging Face tensor comes from.
#[derive(Clone, Debug)]
pub struct GgufWeight {
    /// Its name in a Hugging Face folder.
    pub name: String,
    /// What the file has, of the same shape.
    pub tensor: GgufTensor,
    /// What is to be undone.
    pub change: Change,
}

/// What llama.cpp's converter did to a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// Interleaved the two halves of each of so many heads, for its own rotary embedding: its row `2j + i` of a head of D rows is
    /// Hugging Face's row `i·D/2 + j`. A bias, which is one row, is interleaved value by value.
    Interleaved(usize),
    /// Added one: the norm multiplies with 1 + w.
    PlusOne,
}

impl Change {
    /// The row, or of a bias the value, of the file that is Hugging Face's number `index` of `count`.
    pub fn source(self, index: usize, count: usize) -> usize {
        match self {
            Self::Interleaved(heads) => interleaved(index, count / heads),
            Self::None | Self::PlusOne => index,
        }
    }
}

impl Model<'_> {
    /// Every tensor of the model, with its source; every problem at once.
    pub(super) fn weights(&self) -> Result<Vec<GgufWeight>, FormatError> {
        let mut planner = Planner {
            model: self,
            weights: Vec::new(),
            problems: Vec::new(),
        };
        let table = [self.vocabulary, self.hidden];
        planner.add(
            "model.embed_tokens.weight",
            "token_embd.weight",
            &table,
            Change::None,
        );
        planner.norm("model.norm", "output_norm", self.hidden);
        if !self.tied {
            planner.add("lm_head.weight", "output.weight", &table, Change::None);
        }
        for layer in 0..self.layers {
            planner.layer(layer);
            // A file that claims a billion layers is wrong in the first already.
            if planner.problems.len() > 20 {
                break;
            }
        }
        planner.unused();
        let Planner {
            weights, problems, ..
        } = planner;
        if problems.is_empty() {
            return Ok(weights);
        }
        Err(FormatError::Problems {
            path: self.gguf.path().to_path_buf(),
            problems,
        })
    }
}

struct Planner<'p, 'a> {
    model: &'p Model<'a>,
    weights: Vec<GgufWeight>,
    problems: Vec<String>,
}

impl Planner<'_, '_> {
    fn layer(&mut self, layer: usize) {
        let model = self.model;
        let architecture = model.architecture;
        let (hidden, wide) = (model.hidden, model.intermediate);
        let query = model.heads * model.head_dim;
        let key = model.key_value_heads * model.head_dim;
        let to = |name: &str| format!("model.layers.{layer}.{name}");
        let from = |name: &str| format!("blk.{layer}.{name}");
        let (qkv_bias, o_bias) = match architecture.attention_bias {
            AttentionBias::Never => (false, false),
            AttentionBias::Qkv => (true, false),
            AttentionBias::Switch { o } => (model.attention_bias, model.attention_bias && o),
        };
        let order = |heads| {
            if architecture.interleaved {
                Change::Interleaved(heads)
            } else {
                Change::None
            }
        };
        let mut linear = |name: &str, gguf: &str, rows, columns, change, bias| {
            let (name, gguf) = (to(name), from(gguf));
            self.add(
                &format!("{name}.weight"),
                &format!("{gguf}.weight"),
                &[rows, columns],
                change,
            );
            if bias {
                self.add(
                    &format!("{name}.bias"),
                    &format!("{gguf}.bias"),
                    &[rows],
                    change,
                );
            }
        };
        let plain = Change::None;
        if architecture.fused == Fused::QkvAndGateUp {
            linear(
                "self_attn.qkv_proj",
                "attn_qkv",
                query + 2 * key,
                hidden,
                plain,
                qkv_bias,
            );
        } else {
            let (q, k) = (order(model.heads), order(model.key_value_heads));
            linear("self_attn.q_proj", "attn_q", query, hidden, q, qkv_bias);
            linear("self_attn.k_proj", "attn_k", key, hidden, k, qkv_bias);
            linear("self_attn.v_proj", "attn_v", key, hidden, plain, qkv_bias);
        }
        linear(
            "self_attn.o_proj",
            "attn_output",
            hidden,
            query,
            plain,
            o_bias,
        );
        let mlp_bias = architecture.mlp_bias && model.mlp_bias;
        if architecture.fused == Fused::Nothing {
            linear("mlp.gate_proj", "ffn_gate", wide, hidden, plain, mlp_bias);
            linear("mlp.up_proj", "ffn_up", wide, hidden, plain, mlp_bias);
        } else {
            linear(
                "mlp.gate_up_proj",
                "ffn_up",
                2 * wide,
                hidden,
                plain,
                mlp_bias,
            );
        }
        linear("mlp.down_proj", "ffn_down", hidden, wide, plain, mlp_bias);
        for (name, gguf) in architecture.norms {
            self.norm(&to(name), &from(gguf), hidden);
        }
        let (q, k) = match architecture.head_norms {
            HeadNorms::None => return,
            HeadNorms::Each => (model.head_dim, model.head_dim),
            HeadNorms::Whole => (query, key),
        };
        self.norm(&to("self_attn.q_norm"), &from("attn_q_norm"), q);
        self.norm(&to("self_attn.k_norm"), &from("attn_k_norm"), k);
    }

    fn norm(&mut self, name: &str, from: &str, size: usize) {
        let change = if self.model.architecture.norm_plus_one {
            Change::PlusOne
        } else {
            Change::None
        };
        self.add(
            &format!("{name}.weight"),
            &format!("{from}.weight"),
            &[size],
            change,
        );
    }

    fn add(&mut self, name: &str, from: &str, shape: &[usize], change: Change) {
        let Some(tensor) = self.model.gguf.tensor(from) else {
            self.problems.push(format!("tensor `{from}` is missing"));
            return;
        };
        if tensor.shape != shape {
            self.problems.push(format!(
                "tensor `{from}` has shape {:?}; the metadata demand {shape:?}",
                tensor.shape
            ));
        }
        if !tensor.kind.is_readable() {
            self.problems.push(format!(
                "tensor `{from}` is stored as {}; types that can be read: {}",
                tensor.kind,
                GgmlType::readable()
            ));
        }
        self.weights.push(GgufWeight {
            name: name.to_owned(),
            tensor: tensor.clone(),
            change,
        });
    }

    /// A tensor that nothing consumes is a part of the model that would be lost.
    fn unused(&mut self) {
        let architecture = self.model.architecture;
        let used: HashSet<&str> = self
            .weights
            .iter()
            .map(|weight| weight.tensor.name.as_str())
            .collect();
        for tensor in self.model.gguf.tensors() {
            let name = tensor.name.as_str();
            // The rotary factors are in config.json; each layer of old files repeats plain ones.
            let is_rope = name == rope::FACTORS
                || architecture.rotary == Rotary::PartAndLong
                    && rope::LONGROPE_FACTORS.contains(&name)
                || name.ends_with(".attn_rot_embd");
            if !used.contains(name) && !is_rope && self.problems.len() <= 20 {
                let class = architecture.class;
                self.problems
                    .push(format!("tensor `{name}` has no place in {class}"));
            }
        }
    }
}

/// The row of llama.cpp's q or k that holds Hugging Face's row `row`, for heads of `d` rows.
fn interleaved(row: usize, d: usize) -> usize {
    let (head, within) = (row / d, row % d);
    let (i, j) = (within / (d / 2), within % (d / 2));
    head * d + 2 * j + i
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaving_is_undone() {
        // Two heads of six rows: llama.cpp keeps 0 3 1 4 2 5 of each.
        let stored = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11];
        let restored: Vec<_> = (0..12).map(|row| stored[interleaved(row, 6)]).collect();
        assert_eq!(restored, (0..12).collect::<Vec<_>>());
    }
}

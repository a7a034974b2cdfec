//! The tensors of a model: where each comes from, and its values.

use std::collections::HashSet;
use std::io::{self, Write};

use half::{bf16, f16};

use super::architecture::{AttentionBias, Fused, HeadNorms, Rotary};
use super::{Model, rope};
use crate::FormatError;
use crate::checkpoint::StoredDType;
use crate::gguf::{GgmlType, Gguf, GgufTensor};
use crate::safetensors_writer::TensorSpec;

/// Where one Hugging Face tensor comes from.
pub(super) struct Source<'a> {
    pub(super) spec: TensorSpec,
    tensor: &'a GgufTensor,
    change: Change,
}

/// What llama.cpp's converter did to a tensor.
#[derive(Clone, Copy)]
enum Change {
    None,
    /// Interleaved the two halves of each of so many heads, for its own rotary embedding: its row `2j + i` of a head of D rows is
    /// Hugging Face's row `i·D/2 + j`.
    Interleaved(usize),
    /// Added one: the norm multiplies with 1 + w.
    PlusOne,
}

/// Row by row from blocks to the target's type. A bias, which is one row, is put in order value by value.
pub(super) fn copy(gguf: &Gguf, source: &Source<'_>, out: &mut dyn Write) -> io::Result<()> {
    let tensor = source.tensor;
    let is_matrix = tensor.shape.len() > 1;
    let mut values = vec![0.0f32; tensor.columns()];
    let mut bytes: Vec<u8> = Vec::with_capacity(values.len() * 4);
    for row in 0..tensor.rows() {
        let from = match source.change {
            Change::Interleaved(heads) if is_matrix => interleaved(row, tensor.rows() / heads),
            _ => row,
        };
        gguf.dequantize_rows(tensor, from..from + 1, &mut values)
            .map_err(io::Error::other)?;
        match source.change {
            Change::Interleaved(heads) if !is_matrix => {
                let d = values.len() / heads;
                values = (0..values.len())
                    .map(|i| values[interleaved(i, d)])
                    .collect();
            }
            Change::PlusOne => values.iter_mut().for_each(|value| *value -= 1.0),
            _ => {}
        }
        bytes.clear();
        encode(&values, &source.spec, &mut bytes)?;
        out.write_all(&bytes)?;
    }
    tensor.bytes.release();
    Ok(())
}

impl<'a> Model<'a> {
    /// Every tensor of the model, with its source; every problem at once.
    pub(super) fn plan(&self, dtype: StoredDType) -> Result<Vec<Source<'a>>, FormatError> {
        let mut planner = Planner {
            model: self,
            dtype,
            sources: Vec::new(),
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
            sources, problems, ..
        } = planner;
        if problems.is_empty() {
            return Ok(sources);
        }
        Err(FormatError::Problems {
            path: self.gguf.path().to_path_buf(),
            problems,
        })
    }
}

struct Planner<'p, 'a> {
    model: &'p Model<'a>,
    dtype: StoredDType,
    sources: Vec<Source<'a>>,
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
        let spec = TensorSpec {
            name: name.to_owned(),
            dtype: self.dtype,
            shape: shape.to_vec(),
        };
        self.sources.push(Source {
            spec,
            tensor,
            change,
        });
    }

    /// A tensor that nothing consumes is a part of the model that would be lost.
    fn unused(&mut self) {
        let architecture = self.model.architecture;
        let used: HashSet<&str> = self
            .sources
            .iter()
            .map(|source| source.tensor.name.as_str())
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

fn encode(values: &[f32], spec: &TensorSpec, bytes: &mut Vec<u8>) -> io::Result<()> {
    // Half precision ends at 65504; infinity is not the weight that was asked for.
    let (fits, mend): (fn(f32) -> bool, _) = match spec.dtype {
        StoredDType::F16 => (
            |value| f16::from_f32(value).is_finite(),
            "float16; import as bfloat16 or float32",
        ),
        StoredDType::BF16 => (
            |value| bf16::from_f32(value).is_finite(),
            "bfloat16; import as float32",
        ),
        _ => (f32::is_finite, "float32"),
    };
    if let Some(value) = values.iter().copied().find(|value| !fits(*value)) {
        let why = if value.is_finite() {
            format!("{value} does not fit in {mend}")
        } else {
            format!(
                "holds {value}; the file is damaged, or was made of damaged weights, so take another"
            )
        };
        return Err(io::Error::other(format!("tensor `{}`: {why}", spec.name)));
    }
    match spec.dtype {
        StoredDType::F16 => {
            bytes.extend(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()));
        }
        StoredDType::BF16 => {
            bytes.extend(values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()));
        }
        // Others have no size, and the writer has refused them.
        _ => bytes.extend(values.iter().flat_map(|v| v.to_le_bytes())),
    }
    Ok(())
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

    #[test]
    fn values_that_cannot_be_stored_are_refused() {
        for (dtype, value, expected) in [
            (
                StoredDType::F32,
                f32::NAN,
                "tensor `w`: holds NaN; the file is damaged",
            ),
            (
                StoredDType::BF16,
                f32::INFINITY,
                "tensor `w`: holds inf; the file is damaged",
            ),
            (
                StoredDType::BF16,
                f32::MAX,
                "does not fit in bfloat16; import as float32",
            ),
            (
                StoredDType::F16,
                70_000.0,
                "tensor `w`: 70000 does not fit in float16",
            ),
        ] {
            let spec = TensorSpec {
                name: "w".into(),
                dtype,
                shape: vec![2],
            };
            assert!(encode(&[1.0, -2.0], &spec, &mut Vec::new()).is_ok());
            let error = encode(&[1.0, value], &spec, &mut Vec::new()).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}

//! From a GGUF file of the llama architecture to a Hugging Face model folder: `config.json` and `model.safetensors`.
//!
//! llama.cpp renames the tensors and, for its own rotary embedding, interleaves the two halves of every head in the rows
//! of q and k: its row `2j + i` of a head is Hugging Face's row `i·D/2 + j`. Here names and rows are put back. Quantized
//! tensors become the values they stand for.

use std::io::{self, Write};
use std::path::Path;

use half::{bf16, f16};
use serde_json::{Map, Value, json};

use crate::checkpoint::StoredDType;
use crate::gguf::{Gguf, GgufTensor};
use crate::safetensors_writer::{TensorSpec, write_safetensors};
use crate::{FormatError, atomic, hf_config};

mod rope;

/// The name of the weights in a model's folder.
pub const MODEL_WEIGHTS: &str = "model.safetensors";

/// What `import` reads from the metadata.
struct Llama<'a> {
    gguf: &'a Gguf,
    layers: usize,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    key_value_heads: usize,
    head_dim: usize,
    vocabulary: usize,
    tied: bool,
    attention_bias: bool,
    mlp_bias: bool,
}

/// Where one Hugging Face tensor comes from.
struct Source<'a> {
    spec: TensorSpec,
    tensor: &'a GgufTensor,
    /// Heads whose halves have to be put apart again; 0: rows stay as they are.
    interleaved_heads: usize,
}

/// The model's `config.json`, readable by transformers 4 and 5. `dtype` is that of the weights beside it.
///
/// # Errors
/// The architecture is not llama, a key is missing or impossible, or the model uses something that LlamaForCausalLM
/// does not have (experts, partial rotary embedding, …). The message names the key.
pub fn hf_config_json(gguf: &Gguf, dtype: StoredDType) -> Result<Value, FormatError> {
    let llama = Llama::read(gguf)?;
    let metadata = gguf.metadata();
    let context = llama.size("context_length")?;
    let eps = decimal(llama.real("attention.layer_norm_rms_epsilon")?);
    let rope = rope::parameters(&llama, context)?;

    let mut config = Map::new();
    let mut set = |key: &str, value: Value| config.insert(key.to_string(), value);
    set("architectures", json!(["LlamaForCausalLM"]));
    set("attention_bias", json!(llama.attention_bias));
    set("attention_dropout", json!(0.0));
    let token = |name: &str| metadata.get_u32(&format!("tokenizer.ggml.{name}_token_id"));
    set("bos_token_id", json!(token("bos")));
    set("dtype", json!(torch_name(dtype)));
    set("eos_token_id", json!(token("eos")));
    set("head_dim", json!(llama.head_dim));
    set("hidden_act", json!("silu"));
    set("hidden_size", json!(llama.hidden));
    set("initializer_range", json!(0.02));
    set("intermediate_size", json!(llama.intermediate));
    set("max_position_embeddings", json!(context));
    set("mlp_bias", json!(llama.mlp_bias));
    set("model_type", json!("llama"));
    set("num_attention_heads", json!(llama.heads));
    set("num_hidden_layers", json!(llama.layers));
    set("num_key_value_heads", json!(llama.key_value_heads));
    set("pad_token_id", json!(token("padding")));
    set("rms_norm_eps", json!(eps));
    // transformers 5 reads `rope_parameters`; 4 reads `rope_theta` and `rope_scaling`. 5 takes the latter, too, and
    // finds the same values.
    set("rope_parameters", rope.v5());
    set("rope_scaling", rope.scaling());
    set("rope_theta", json!(rope.theta()));
    set("tie_word_embeddings", json!(llama.tied));
    // What transformers called `dtype` before 4.56.
    set("torch_dtype", json!(torch_name(dtype)));
    set("use_cache", json!(true));
    set("vocab_size", json!(llama.vocabulary));
    Ok(Value::Object(config))
}

/// The model's `generation_config.json`: the special tokens.
pub fn generation_config_json(gguf: &Gguf) -> Value {
    let metadata = gguf.metadata();
    let token = |name: &str| metadata.get_u32(&format!("tokenizer.ggml.{name}_token_id"));
    // Where a chat turn ends with another token than the text does, a generation must stop at both.
    let mut ends: Vec<u32> = Vec::new();
    for id in [token("eos"), token("eot"), token("eom")]
        .into_iter()
        .flatten()
    {
        if !ends.contains(&id) {
            ends.push(id);
        }
    }
    let ends = match ends.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    };
    let mut config = Map::new();
    config.insert("bos_token_id".into(), json!(token("bos")));
    config.insert("eos_token_id".into(), ends);
    config.insert("pad_token_id".into(), json!(token("padding")));
    config.retain(|_, value| !value.is_null());
    Value::Object(config)
}

/// Writes `config.json`, `generation_config.json` and `model.safetensors` into `folder`, which exists. The weights are
/// F32, BF16 or F16, as `dtype` says, and stream through a buffer: memory does not grow with the model.
///
/// # Errors
/// As of [`hf_config_json`]; or a tensor is missing, unexpected, of the wrong shape or of a type that cannot be read; or a
/// file cannot be written.
pub fn import_weights(gguf: &Gguf, folder: &Path, dtype: StoredDType) -> Result<(), FormatError> {
    let config = hf_config_json(gguf, dtype)?;
    let llama = Llama::read(gguf)?;
    let sources = llama.plan(dtype)?;
    let specs: Vec<TensorSpec> = sources.iter().map(|source| source.spec.clone()).collect();
    // The configuration last: a folder without one is not taken for a model.
    let weights = folder.join(MODEL_WEIGHTS);
    write_safetensors(&weights, &specs, &[].into(), |i, out| {
        copy(gguf, &sources[i], out)
    })?;
    write_json(
        &folder.join(hf_config::GENERATION_CONFIG),
        &generation_config_json(gguf),
    )?;
    write_json(&folder.join(hf_config::MODEL_CONFIG), &config)
}

fn write_json(path: &Path, value: &Value) -> Result<(), FormatError> {
    atomic::write_file(path, |out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        out.write_all(b"\n")
    })
}

/// Row by row from blocks to the target's type. A bias, which is one row, is put in order value by value.
fn copy(gguf: &Gguf, source: &Source<'_>, out: &mut dyn Write) -> io::Result<()> {
    let tensor = source.tensor;
    let heads = source.interleaved_heads;
    let mut values = vec![0.0f32; tensor.columns()];
    let mut bytes: Vec<u8> = Vec::with_capacity(values.len() * 4);
    for row in 0..tensor.rows() {
        let is_matrix = tensor.shape.len() > 1;
        let from = if heads > 0 && is_matrix {
            interleaved(row, tensor.rows() / heads)
        } else {
            row
        };
        gguf.dequantize_rows(tensor, from..from + 1, &mut values)
            .map_err(io::Error::other)?;
        if heads > 0 && !is_matrix {
            let d = values.len() / heads;
            values = (0..values.len())
                .map(|i| values[interleaved(i, d)])
                .collect();
        }
        bytes.clear();
        encode(&values, &source.spec, &mut bytes)?;
        out.write_all(&bytes)?;
    }
    tensor.bytes.release();
    Ok(())
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

impl<'a> Llama<'a> {
    fn read(gguf: &'a Gguf) -> Result<Llama<'a>, FormatError> {
        let architecture = gguf.metadata().get_str("general.architecture");
        if architecture != Some("llama") {
            return Err(field(gguf, "general.architecture", "\"llama\""));
        }
        if gguf
            .metadata()
            .get_str("general.type")
            .is_some_and(|kind| kind != "model")
        {
            return Err(field(gguf, "general.type", "\"model\""));
        }
        if gguf
            .metadata()
            .get_u64("split.count")
            .is_some_and(|parts| parts > 1)
        {
            let mend = "1: join the parts first, with `llama-gguf-split --merge`";
            return Err(field(gguf, "split.count", mend));
        }
        let mut llama = Llama {
            gguf,
            layers: 0,
            hidden: 0,
            intermediate: 0,
            heads: 0,
            key_value_heads: 0,
            head_dim: 0,
            vocabulary: 0,
            tied: gguf.tensor("output.weight").is_none(),
            attention_bias: gguf.tensor("blk.0.attn_q.bias").is_some(),
            mlp_bias: gguf.tensor("blk.0.ffn_up.bias").is_some(),
        };
        llama.layers = llama.size("block_count")?;
        llama.hidden = llama.size("embedding_length")?;
        llama.intermediate = llama.size("feed_forward_length")?;
        llama.heads = llama.size("attention.head_count")?;
        llama.key_value_heads = if llama.has("attention.head_count_kv") {
            llama.size("attention.head_count_kv")?
        } else {
            llama.heads
        };
        if !llama.heads.is_multiple_of(llama.key_value_heads) {
            return Err(llama.refused(
                "attention.head_count_kv",
                "a divisor of attention.head_count",
            ));
        }
        llama.head_dim = llama.read_head_dim()?;
        llama.refuse_other_models()?;
        llama.vocabulary = match gguf.tensor("token_embd.weight").map(|t| t.shape.as_slice()) {
            Some(&[rows, columns]) if columns == llama.hidden => rows,
            Some(other) => {
                let problem = format!(
                    "has shape {other:?}; accepted: [vocabulary, {}]",
                    llama.hidden
                );
                return Err(FormatError::tensor(
                    gguf.path(),
                    "token_embd.weight",
                    problem,
                ));
            }
            None => {
                return Err(FormatError::tensor(
                    gguf.path(),
                    "token_embd.weight",
                    "is missing",
                ));
            }
        };
        Ok(llama)
    }

    fn read_head_dim(&self) -> Result<usize, FormatError> {
        let head_dim = if self.has("attention.key_length") {
            self.size("attention.key_length")?
        } else if self.hidden.is_multiple_of(self.heads) {
            self.hidden / self.heads
        } else {
            return Err(self.refused("attention.head_count", "a divisor of embedding_length"));
        };
        if !head_dim.is_multiple_of(2) {
            return Err(self.refused("attention.key_length", "an even number"));
        }
        for name in ["attention.value_length", "rope.dimension_count"] {
            if self.has(name) && self.size(name)? != head_dim {
                return Err(self.refused(name, &format!("{head_dim}, the size of a head")));
            }
        }
        Ok(head_dim)
    }

    /// Relatives of llama that llama.cpp files under the same name.
    fn refuse_other_models(&self) -> Result<(), FormatError> {
        let metadata = self.gguf.metadata();
        for name in ["expert_count", "expert_used_count"] {
            if metadata.get_f64(&key(name)).is_some_and(|n| n != 0.0) {
                return Err(self.refused(name, "0: mixtures of experts cannot be imported"));
            }
        }
        for name in [
            "logit_scale",
            "embedding_scale",
            "residual_scale",
            "attention.scale",
        ] {
            if metadata.get_f64(&key(name)).is_some_and(|n| n != 0.0) {
                return Err(self.refused(name, "nothing: LlamaForCausalLM has no such scale"));
            }
        }
        if metadata.get_bool(&key("attention.causal")) == Some(false) {
            return Err(self.refused("attention.causal", "true"));
        }
        Ok(())
    }

    fn has(&self, name: &str) -> bool {
        self.gguf.metadata().get(&key(name)).is_some()
    }

    fn refused(&self, name: &str, accepted: &str) -> FormatError {
        field(self.gguf, &key(name), accepted)
    }

    /// A size of at least one, small enough that products of two cannot overflow.
    fn size(&self, name: &str) -> Result<usize, FormatError> {
        const MOST: u64 = i32::MAX as u64;
        match self.gguf.metadata().get_u64(&key(name)) {
            Some(n) if (1..=MOST).contains(&n) => Ok(n as usize),
            _ => Err(self.refused(name, &format!("an integer from 1 to {MOST}"))),
        }
    }

    fn real(&self, name: &str) -> Result<f64, FormatError> {
        match self.gguf.metadata().get_f64(&key(name)) {
            Some(x) if x > 0.0 && (x as f32).is_finite() => Ok(x),
            _ => Err(self.refused(name, "a finite number above zero")),
        }
    }

    /// Every tensor of the model, with its source; every problem at once.
    fn plan(&self, dtype: StoredDType) -> Result<Vec<Source<'a>>, FormatError> {
        let mut planner = Planner {
            llama: self,
            dtype,
            sources: Vec::new(),
            problems: Vec::new(),
        };
        planner.global(
            "model.embed_tokens.weight",
            "token_embd.weight",
            &[self.vocabulary, self.hidden],
        );
        planner.global("model.norm.weight", "output_norm.weight", &[self.hidden]);
        if !self.tied {
            planner.global(
                "lm_head.weight",
                "output.weight",
                &[self.vocabulary, self.hidden],
            );
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
    llama: &'p Llama<'a>,
    dtype: StoredDType,
    sources: Vec<Source<'a>>,
    problems: Vec<String>,
}

impl Planner<'_, '_> {
    fn global(&mut self, name: &str, from: &str, shape: &[usize]) {
        self.add(name.into(), from, shape, 0);
    }

    fn layer(&mut self, layer: usize) {
        let llama = self.llama;
        let (hidden, wide) = (llama.hidden, llama.intermediate);
        let query = llama.heads * llama.head_dim;
        let key = llama.key_value_heads * llama.head_dim;
        for (name, from, rows, columns, heads, bias) in [
            (
                "self_attn.q_proj",
                "attn_q",
                query,
                hidden,
                llama.heads,
                llama.attention_bias,
            ),
            (
                "self_attn.k_proj",
                "attn_k",
                key,
                hidden,
                llama.key_value_heads,
                llama.attention_bias,
            ),
            (
                "self_attn.v_proj",
                "attn_v",
                key,
                hidden,
                0,
                llama.attention_bias,
            ),
            (
                "self_attn.o_proj",
                "attn_output",
                hidden,
                query,
                0,
                llama.attention_bias,
            ),
            ("mlp.gate_proj", "ffn_gate", wide, hidden, 0, llama.mlp_bias),
            ("mlp.up_proj", "ffn_up", wide, hidden, 0, llama.mlp_bias),
            ("mlp.down_proj", "ffn_down", hidden, wide, 0, llama.mlp_bias),
        ] {
            let name = format!("model.layers.{layer}.{name}");
            let from = format!("blk.{layer}.{from}");
            self.add(
                format!("{name}.weight"),
                &format!("{from}.weight"),
                &[rows, columns],
                heads,
            );
            if bias {
                self.add(
                    format!("{name}.bias"),
                    &format!("{from}.bias"),
                    &[rows],
                    heads,
                );
            }
        }
        for (name, from) in [
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ] {
            let name = format!("model.layers.{layer}.{name}.weight");
            self.add(name, &format!("blk.{layer}.{from}.weight"), &[hidden], 0);
        }
    }

    fn add(&mut self, name: String, from: &str, shape: &[usize], interleaved_heads: usize) {
        let Some(tensor) = self.llama.gguf.tensor(from) else {
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
                crate::gguf::GgmlType::readable()
            ));
        }
        let spec = TensorSpec {
            name,
            dtype: self.dtype,
            shape: shape.to_vec(),
        };
        self.sources.push(Source {
            spec,
            tensor,
            interleaved_heads,
        });
    }

    /// A tensor that nothing consumes is a part of the model that would be lost.
    fn unused(&mut self) {
        let used: std::collections::HashSet<&str> = self
            .sources
            .iter()
            .map(|source| source.tensor.name.as_str())
            .collect();
        for tensor in self.llama.gguf.tensors() {
            let name = tensor.name.as_str();
            // The rotary factors are in config.json; each layer of old files repeats plain ones.
            let is_rope = name == rope::FACTORS || name.ends_with(".attn_rot_embd");
            if !used.contains(name) && !is_rope && self.problems.len() <= 20 {
                self.problems
                    .push(format!("tensor `{name}` has no place in LlamaForCausalLM"));
            }
        }
    }
}

fn key(name: &str) -> String {
    format!("llama.{name}")
}

fn field(gguf: &Gguf, key: &str, accepted: &str) -> FormatError {
    let found = gguf
        .metadata()
        .get(key)
        .map_or("is missing".into(), |value| format!("is {value}"));
    FormatError::Field {
        path: gguf.path().to_path_buf(),
        field: key.into(),
        found,
        accepted: accepted.into(),
    }
}

/// GGUF stores 1e-5 as f32; this is 0.00001 again, not 0.000009999999747378752. Both round to the same f32.
fn decimal(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

fn torch_name(dtype: StoredDType) -> &'static str {
    match dtype {
        StoredDType::F16 => "float16",
        StoredDType::BF16 => "bfloat16",
        _ => "float32",
    }
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

    #[test]
    fn decimals_are_those_that_were_written() {
        assert_eq!(decimal(f64::from(1e-5f32)), 1e-5);
        assert_eq!(decimal(f64::from(500_000.0f32)), 500_000.0);
        assert_eq!(decimal(f64::from(1e-6f32)), 1e-6);
    }
}

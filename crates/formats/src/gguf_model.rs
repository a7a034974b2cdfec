//! A GGUF file as a Hugging Face model folder would have it: `config.json`, `generation_config.json` and the tensors.
//!
//! llama.cpp renames tensors, and of some architectures it also rearranges or shifts them; `architecture` is the table of what it does
//! to each, after its `convert_hf_to_gguf.py`. Here names are put back, and it is said which rows and values are to be.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::FormatError;
use crate::checkpoint::StoredDType;
use crate::gguf::{Gguf, GgufArray, GgufValue};

mod architecture;
mod gpt2;
mod keys;
mod layers;
mod rope;
mod shapes;
mod tensors;

use architecture::{AttentionBias, Rotary};
pub use keys::ModelKeys;
pub use shapes::{Change, Place, Shapes};
pub use tensors::GgufWeight;

/// What `import` reads from the metadata.
struct Model<'a> {
    gguf: &'a Gguf,
    shapes: Shapes,
    /// How many numbers of a head are rotated.
    rotary_dim: usize,
    /// The keys of the architecture that were asked for. A key that nobody asked for is one that is not understood.
    asked: RefCell<BTreeSet<String>>,
}

/// Keys of an architecture that say nothing that config.json would have to repeat.
const IDLE_KEYS: [&str; 5] = [
    "vocab_size",
    "tensor_data_layout",
    "pooling_type",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
];

/// The model's `config.json`, readable by transformers 4 and 5. `dtype` is that of the weights beside it.
///
/// # Errors
/// The architecture is not known, a key is missing, impossible or not understood, or the model uses something that transformers' class
/// does not have (experts, …). The message names the key.
pub fn hf_config_json(gguf: &Gguf, dtype: StoredDType) -> Result<Value, FormatError> {
    let model = Model::read(gguf)?;
    let config = model.config(dtype)?;
    model.refuse_unknown_keys()?;
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

/// The tensors that a Hugging Face folder of the model would have, in a fixed order.
///
/// # Errors
/// An architecture that is not known, sizes that are missing or impossible; a tensor is missing, unexpected, of the wrong shape or of a type that cannot be read.
pub fn weights(gguf: &Gguf) -> Result<Vec<GgufWeight>, FormatError> {
    Model::read(gguf)?.weights()
}

impl<'a> Model<'a> {
    fn read(gguf: &'a Gguf) -> Result<Model<'a>, FormatError> {
        let metadata = gguf.metadata();
        let name = metadata.get_str("general.architecture");
        let Some(architecture) = name.and_then(architecture::named) else {
            return Err(field(
                gguf,
                "general.architecture",
                &architecture::all_names(),
            ));
        };
        if metadata
            .get_str("general.type")
            .is_some_and(|kind| kind != "model")
        {
            return Err(field(gguf, "general.type", "\"model\""));
        }
        let mut model = Model {
            gguf,
            shapes: Shapes {
                architecture,
                layers: 0,
                hidden: 0,
                intermediate: 0,
                heads: 0,
                key_value_heads: 0,
                head_dim: 0,
                vocabulary: 0,
                positions: 0,
                tied: gguf.tensor("output.weight").is_none(),
                attention_bias: gguf.tensor("blk.0.attn_q.bias").is_some(),
                mlp_bias: gguf.tensor("blk.0.ffn_up.bias").is_some(),
            },
            rotary_dim: 0,
            asked: RefCell::default(),
        };
        model.shapes.layers = model.size("block_count")?;
        model.shapes.hidden = model.size("embedding_length")?;
        model.shapes.intermediate = model.size("feed_forward_length")?;
        model.shapes.heads = model.size("attention.head_count")?;
        model.shapes.key_value_heads = if model.has("attention.head_count_kv") {
            model.size("attention.head_count_kv")?
        } else {
            model.shapes.heads
        };
        if !model
            .shapes
            .heads
            .is_multiple_of(model.shapes.key_value_heads)
        {
            return Err(model.refused(
                "attention.head_count_kv",
                "a divisor of attention.head_count",
            ));
        }
        model.shapes.head_dim = model.read_head_dim()?;
        model.rotary_dim = model.read_rotary_dim()?;
        model.shapes.vocabulary = model.read_vocabulary()?;
        model.shapes.positions = model.size("context_length")?;
        Ok(model)
    }

    fn read_head_dim(&self) -> Result<usize, FormatError> {
        let head_dim = if self.has("attention.key_length") {
            self.size("attention.key_length")?
        } else if self.shapes.hidden.is_multiple_of(self.shapes.heads) {
            self.shapes.hidden / self.shapes.heads
        } else {
            return Err(self.refused("attention.head_count", "a divisor of embedding_length"));
        };
        if !head_dim.is_multiple_of(2) {
            return Err(self.refused("attention.key_length", "an even number"));
        }
        let name = "attention.value_length";
        if self.has(name) && self.size(name)? != head_dim {
            return Err(self.refused(name, &format!("{head_dim}, the size of a head")));
        }
        Ok(head_dim)
    }

    fn read_rotary_dim(&self) -> Result<usize, FormatError> {
        let name = "rope.dimension_count";
        if !self.has(name) {
            return Ok(self.shapes.head_dim);
        }
        let size = self.size(name)?;
        if self.shapes.architecture.rotary != Rotary::Whole {
            if size > self.shapes.head_dim || !size.is_multiple_of(2) {
                let accepted = format!(
                    "an even number up to {}, the size of a head",
                    self.shapes.head_dim
                );
                return Err(self.refused(name, &accepted));
            }
        } else if size != self.shapes.head_dim {
            return Err(self.refused(
                name,
                &format!("{}, the size of a head", self.shapes.head_dim),
            ));
        }
        Ok(size)
    }

    fn read_vocabulary(&self) -> Result<usize, FormatError> {
        const NAME: &str = "token_embd.weight";
        let wrong = |problem: String| FormatError::tensor(self.gguf.path(), NAME, problem);
        match self.gguf.tensor(NAME).map(|t| t.shape.as_slice()) {
            Some(&[rows, columns]) if columns == self.shapes.hidden => Ok(rows),
            Some(other) => Err(wrong(format!(
                "has shape {other:?}; accepted: [vocabulary, {}]",
                self.shapes.hidden
            ))),
            None => Err(wrong("is missing".into())),
        }
    }

    fn config(&self, dtype: StoredDType) -> Result<Map<String, Value>, FormatError> {
        if self.value("attention.causal") == Some(&GgufValue::Bool(false)) {
            return Err(self.refused("attention.causal", "true"));
        }
        if self.shapes.architecture.name == gpt2::NAME {
            return gpt2::config(self, dtype);
        }
        let context = self.shapes.positions;
        let eps = decimal(self.real("attention.layer_norm_rms_epsilon")?);
        let rope = rope::parameters(self, context)?;

        let mut config = Map::new();
        let mut set = |key: &str, value: Value| config.insert(key.to_string(), value);
        set("architectures", json!([self.shapes.architecture.class]));
        if matches!(
            self.shapes.architecture.attention_bias,
            AttentionBias::Switch { .. }
        ) {
            set("attention_bias", json!(self.shapes.attention_bias));
        }
        set("attention_dropout", json!(0.0));
        let token =
            |name: &str| (self.gguf.metadata()).get_u32(&format!("tokenizer.ggml.{name}_token_id"));
        set("bos_token_id", json!(token("bos")));
        set("dtype", json!(torch_name(dtype)));
        set("eos_token_id", json!(token("eos")));
        set("head_dim", json!(self.shapes.head_dim));
        set(
            self.shapes.architecture.activation.0,
            json!(self.shapes.architecture.activation.1),
        );
        set("hidden_size", json!(self.shapes.hidden));
        set("initializer_range", json!(0.02));
        set("intermediate_size", json!(self.shapes.intermediate));
        set("max_position_embeddings", json!(context));
        if self.shapes.architecture.mlp_bias {
            set("mlp_bias", json!(self.shapes.mlp_bias));
        }
        set("model_type", json!(self.shapes.architecture.model_type));
        set("num_attention_heads", json!(self.shapes.heads));
        set("num_hidden_layers", json!(self.shapes.layers));
        set("num_key_value_heads", json!(self.shapes.key_value_heads));
        set("pad_token_id", json!(token("padding")));
        set("rms_norm_eps", json!(eps));
        // transformers 5 reads `rope_parameters`; 4 reads `rope_theta` and `rope_scaling`. 5 takes the latter, too, and
        // finds the same values.
        set("rope_parameters", rope.v5());
        set("rope_scaling", rope.v4());
        set("rope_theta", json!(rope.theta));
        if let Some(partial) = rope.partial {
            set("partial_rotary_factor", json!(partial));
        }
        set("tie_word_embeddings", json!(self.shapes.tied));
        // What transformers called `dtype` before 4.56.
        set("torch_dtype", json!(torch_name(dtype)));
        set("use_cache", json!(true));
        set("vocab_size", json!(self.shapes.vocabulary));
        (self.shapes.architecture.own_keys)(self, &rope, &mut config)?;
        Ok(config)
    }

    /// Every key of the architecture that was not asked for and is not off.
    fn refuse_unknown_keys(&self) -> Result<(), FormatError> {
        let prefix = format!("{}.", self.shapes.architecture.name);
        let asked = self.asked.borrow();
        let problems: Vec<String> = (self.gguf.metadata().iter())
            .filter_map(|(key, value)| {
                let name = key.strip_prefix(&prefix)?;
                // One that ends with a dot stands for all that begin so.
                let is =
                    |idle: &&str| *idle == name || idle.ends_with('.') && name.starts_with(*idle);
                let mut idle = IDLE_KEYS.iter().chain(self.shapes.architecture.idle_keys);
                let known = asked.contains(name) || idle.any(is) || is_off(value);
                (!known).then(|| {
                    let class = self.shapes.architecture.class;
                    format!("`{key}` is {value}, and what that means for {class} is not known here")
                })
            })
            .take(20)
            .collect();
        if problems.is_empty() {
            return Ok(());
        }
        Err(FormatError::Problems {
            path: self.gguf.path().to_path_buf(),
            problems,
        })
    }

    /// The value of a key of the architecture.
    fn value(&self, name: &str) -> Option<&'a GgufValue> {
        self.asked.borrow_mut().insert(name.to_owned());
        self.gguf.metadata().get(&self.key(name))
    }

    fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.shapes.architecture.name)
    }

    fn refused(&self, name: &str, accepted: &str) -> FormatError {
        field(self.gguf, &self.key(name), accepted)
    }

    /// A size of at least one, small enough that products of two cannot overflow.
    fn size(&self, name: &str) -> Result<usize, FormatError> {
        const MOST: u64 = i32::MAX as u64;
        let size = match self.value(name) {
            // One a layer, and the same in all of them.
            Some(GgufValue::Array(GgufArray::Unsigned(list))) => same(list),
            Some(GgufValue::Array(GgufArray::Signed(list))) => {
                same(list).and_then(|n| n.try_into().ok())
            }
            _ => self.gguf.metadata().get_u64(&self.key(name)),
        };
        match size {
            Some(n) if (1..=MOST).contains(&n) => Ok(n as usize),
            _ => Err(self.refused(name, &format!("an integer from 1 to {MOST}"))),
        }
    }

    fn real(&self, name: &str) -> Result<f64, FormatError> {
        self.value(name);
        match self.gguf.metadata().get_f64(&self.key(name)) {
            Some(x) if x > 0.0 && (x as f32).is_finite() => Ok(x),
            _ => Err(self.refused(name, "a finite number above zero")),
        }
    }

    /// A number that is there and not zero, as it was before it was stored as f32.
    fn optional(&self, name: &str) -> Result<Option<f64>, FormatError> {
        match self.value(name) {
            None => Ok(None),
            Some(value) if is_off(value) => Ok(None),
            Some(_) => Ok(Some(decimal(self.real(name)?))),
        }
    }
}

/// The number that is all there is in a list.
fn same<T: Copy + PartialEq>(list: &[T]) -> Option<T> {
    let first = *list.first()?;
    list.iter().all(|n| *n == first).then_some(first)
}

/// Zero and false, or a list of nothing else: what a key says of something that a model does not have.
fn is_off(value: &GgufValue) -> bool {
    match value {
        GgufValue::Unsigned(n) => *n == 0,
        GgufValue::Signed(n) => *n == 0,
        GgufValue::Float(x) => *x == 0.0,
        GgufValue::Bool(on) => !on,
        GgufValue::String(_) => false,
        GgufValue::Array(array) => match array {
            GgufArray::Unsigned(list) => list.iter().all(|n| *n == 0),
            GgufArray::Signed(list) => list.iter().all(|n| *n == 0),
            GgufArray::Float(list) => list.iter().all(|x| *x == 0.0),
            GgufArray::Bool(list) => list.iter().all(|on| !on),
            GgufArray::String(list) => list.is_empty(),
        },
    }
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
    fn decimals_are_those_that_were_written() {
        assert_eq!(decimal(f64::from(1e-5f32)), 1e-5);
        assert_eq!(decimal(f64::from(500_000.0f32)), 500_000.0);
        assert_eq!(decimal(f64::from(1e-6f32)), 1e-6);
    }
}

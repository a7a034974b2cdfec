//! What a model of one of llama.cpp's architectures has: sizes, biases, and a name in both worlds for every tensor.

use super::architecture::{self, Architecture, AttentionBias, Fused, HeadNorms};
use super::gpt2;
use crate::FormatError;
use crate::hf_config::HfConfig;

/// Sizes of a model, and which tensors it has.
#[derive(Clone, Debug)]
pub struct Shapes {
    pub(super) architecture: &'static Architecture,
    pub(super) layers: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) heads: usize,
    pub(super) key_value_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocabulary: usize,
    /// Tokens that the model was made for.
    pub(super) positions: usize,
    pub(super) tied: bool,
    pub(super) attention_bias: bool,
    pub(super) mlp_bias: bool,
}

/// A tensor in both worlds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its name in a Hugging Face folder.
    pub name: String,
    /// llama.cpp's name.
    pub gguf: String,
    /// Its dimensions in llama.cpp's file, outermost first. A folder has the same, the other way round where it is turned.
    pub shape: Vec<usize>,
    /// What llama.cpp's converter does to it.
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
    /// Turned it: Hugging Face has [in, out].
    Turned,
}

impl Change {
    /// The row, or of a bias the value, of the file that is Hugging Face's number `index` of `count`; of a turned matrix, the row itself.
    pub fn source(self, index: usize, count: usize) -> usize {
        match self {
            Self::Interleaved(heads) => interleaved(index, count / heads),
            Self::None | Self::PlusOne | Self::Turned => index,
        }
    }
}

impl Shapes {
    /// Reads config.json.
    ///
    /// # Errors
    /// A model that llama.cpp's architectures here do not cover, or sizes that are missing or impossible.
    pub fn of_config(config: &HfConfig) -> Result<Self, FormatError> {
        let kind = config.str("model_type")?;
        let Some(architecture) = architecture::of_model_type(kind) else {
            return Err(config.unsupported("model_type", architecture::all_model_types()));
        };
        if architecture.name == gpt2::NAME {
            return gpt2::shapes(architecture, config);
        }
        let heads = config.usize("num_attention_heads")?;
        let hidden = config.usize("hidden_size")?;
        let key_value_heads = config.opt_usize("num_key_value_heads")?.unwrap_or(heads);
        if heads == 0 || key_value_heads == 0 || !heads.is_multiple_of(key_value_heads) {
            return Err(
                config.unsupported("num_key_value_heads", "a divisor of num_attention_heads")
            );
        }
        let switch = |key: &str| Ok::<_, FormatError>(config.opt_bool(key)?.unwrap_or(false));
        Ok(Self {
            architecture,
            layers: config.usize("num_hidden_layers")?,
            hidden,
            intermediate: config.usize("intermediate_size")?,
            heads,
            key_value_heads,
            head_dim: config.opt_usize("head_dim")?.unwrap_or(hidden / heads),
            vocabulary: config.usize("vocab_size")?,
            positions: config.usize("max_position_embeddings")?,
            tied: config
                .opt_bool("tie_word_embeddings")?
                .unwrap_or(architecture.norm_plus_one),
            attention_bias: switch("attention_bias")?,
            mlp_bias: switch("mlp_bias")?,
        })
    }

    /// The same with a vocabulary and a head as the tensors have them, which count where config.json says otherwise.
    #[must_use]
    pub fn with_head(self, vocabulary: usize, tied: bool) -> Self {
        Self {
            vocabulary,
            tied,
            ..self
        }
    }

    /// Whether the embedding is also the output projection.
    pub fn is_tied(&self) -> bool {
        self.tied
    }

    /// llama.cpp's name of the architecture, `general.architecture`.
    pub fn architecture(&self) -> &'static str {
        self.architecture.name
    }

    /// Number of blocks.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Every tensor.
    pub fn places(&self) -> Vec<Place> {
        let mut places = self.outside();
        places.extend((0..self.layers).flat_map(|layer| self.layer(layer)));
        places
    }

    /// The tensors of no layer.
    pub(super) fn outside(&self) -> Vec<Place> {
        if self.architecture.name == gpt2::NAME {
            return gpt2::outside(self);
        }
        let table = vec![self.vocabulary, self.hidden];
        let plain = |name: &str, gguf: &str| Place {
            name: name.to_owned(),
            gguf: gguf.to_owned(),
            shape: table.clone(),
            change: Change::None,
        };
        let mut places = vec![
            plain("model.embed_tokens.weight", "token_embd.weight"),
            self.norm("model.norm", "output_norm", self.hidden),
        ];
        if !self.tied {
            places.push(plain("lm_head.weight", "output.weight"));
        }
        places
    }

    /// The tensors of one layer.
    pub(super) fn layer(&self, layer: usize) -> Vec<Place> {
        if self.architecture.name == gpt2::NAME {
            return gpt2::layer(self, layer);
        }
        let mut places = self.linears(layer);
        let to = |name: &str| format!("model.layers.{layer}.{name}");
        let from = |name: &str| format!("blk.{layer}.{name}");
        for (name, gguf) in self.architecture.norms {
            places.push(self.norm(&to(name), &from(gguf), self.hidden));
        }
        let (q, k) = match self.architecture.head_norms {
            HeadNorms::None => return places,
            HeadNorms::Each => (self.head_dim, self.head_dim),
            HeadNorms::Whole => (
                self.heads * self.head_dim,
                self.key_value_heads * self.head_dim,
            ),
        };
        places.push(self.norm(&to("self_attn.q_norm"), &from("attn_q_norm"), q));
        places.push(self.norm(&to("self_attn.k_norm"), &from("attn_k_norm"), k));
        places
    }

    fn linears(&self, layer: usize) -> Vec<Place> {
        let architecture = self.architecture;
        let (hidden, wide) = (self.hidden, self.intermediate);
        let query = self.heads * self.head_dim;
        let key = self.key_value_heads * self.head_dim;
        let (qkv_bias, o_bias) = match architecture.attention_bias {
            AttentionBias::Never => (false, false),
            AttentionBias::Qkv => (true, false),
            AttentionBias::Switch { o } => (self.attention_bias, self.attention_bias && o),
        };
        let order = |heads| {
            if architecture.interleaved {
                Change::Interleaved(heads)
            } else {
                Change::None
            }
        };
        let mut places = Vec::new();
        let mut linear = |name: &str, gguf: &str, shape: [usize; 2], change, bias| {
            let mut add = |kind: &str, shape: &[usize]| {
                places.push(Place {
                    name: format!("model.layers.{layer}.{name}.{kind}"),
                    gguf: format!("blk.{layer}.{gguf}.{kind}"),
                    shape: shape.to_vec(),
                    change,
                });
            };
            add("weight", &shape);
            if bias {
                add("bias", &shape[..1]);
            }
        };
        let plain = Change::None;
        if architecture.fused == Fused::QkvAndGateUp {
            let shape = [query + 2 * key, hidden];
            linear("self_attn.qkv_proj", "attn_qkv", shape, plain, qkv_bias);
        } else {
            let (q, k) = (order(self.heads), order(self.key_value_heads));
            linear("self_attn.q_proj", "attn_q", [query, hidden], q, qkv_bias);
            linear("self_attn.k_proj", "attn_k", [key, hidden], k, qkv_bias);
            linear("self_attn.v_proj", "attn_v", [key, hidden], plain, qkv_bias);
        }
        linear(
            "self_attn.o_proj",
            "attn_output",
            [hidden, query],
            plain,
            o_bias,
        );
        let mlp_bias = architecture.mlp_bias && self.mlp_bias;
        if architecture.fused == Fused::Nothing {
            linear("mlp.gate_proj", "ffn_gate", [wide, hidden], plain, mlp_bias);
            linear("mlp.up_proj", "ffn_up", [wide, hidden], plain, mlp_bias);
        } else {
            linear(
                "mlp.gate_up_proj",
                "ffn_up",
                [2 * wide, hidden],
                plain,
                mlp_bias,
            );
        }
        linear("mlp.down_proj", "ffn_down", [hidden, wide], plain, mlp_bias);
        places
    }

    fn norm(&self, name: &str, gguf: &str, size: usize) -> Place {
        Place {
            name: format!("{name}.weight"),
            gguf: format!("{gguf}.weight"),
            shape: vec![size],
            change: if self.architecture.norm_plus_one {
                Change::PlusOne
            } else {
                Change::None
            },
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

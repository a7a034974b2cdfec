//! What the one decoder block needs to know about a model: its shapes and its choices.
//!
//! A family (`families/`) translates a `config.json` into this; nothing else in the crate looks at
//! `config.json`. Where two architectures differ, the difference is an enum here and a `match` in the
//! block, never a second block.

use lowrank_kernels::{Activation, DType, Layout};

/// A supported architecture, as named by `model_type` in `config.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, SmolLM and everything else that calls itself `llama`.
    Llama,
    /// Mistral: Llama's shape with an optional sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMS norms on the heads of q and k, a head size of its own.
    Qwen3,
    /// GPT-2: LayerNorm, learned positions, GELU, fused and transposed q, k, v.
    Gpt2,
}

impl Family {
    /// The value of `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gpt2 => "gpt2",
        }
    }
}

/// How a residual stream is normalised before attention, before the MLP and before the head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) · weight`
    Rms,
    /// `(x − mean) / sqrt(var + eps) · weight + bias`
    Layer,
}

/// How a token's place in its sequence enters the model.
#[derive(Clone, Debug, PartialEq)]
pub enum Position {
    /// Rotary embedding of q and k.
    Rope(Rope),
    /// A learned table of [`ModelConfig::max_position_embeddings`] rows, added to the token embedding.
    Learned,
}

/// Rotary position embedding: the base and how its frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// `rope_theta`.
    pub theta: f64,
    /// `rope_scaling` / `rope_parameters`.
    pub scaling: RopeScaling,
}

/// The supported kinds of rope scaling (`rope_type`).
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// `default`
    None,
    /// `linear`: every frequency divided by `factor`.
    Linear {
        /// How many times longer the context becomes.
        factor: f64,
    },
    /// `llama3`: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context length of pretraining.
        original_max_position_embeddings: f64,
    },
}

/// The feed-forward part of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    /// `down(act(gate(x)) ∘ up(x))`
    Gated,
    /// `down(act(up(x)))`
    Plain,
}

/// Which linears carry a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// q, k and v (or the fused qkv).
    pub qkv: bool,
    /// The attention's output projection.
    pub o: bool,
    /// The MLP's linears.
    pub mlp: bool,
}

/// Everything that the decoder needs to know, in the words of `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The architecture, for names.
    pub family: Family,
    /// V
    pub vocab_size: usize,
    /// C
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// L
    pub num_hidden_layers: usize,
    /// H
    pub num_attention_heads: usize,
    /// KV
    pub num_key_value_heads: usize,
    /// D
    pub head_size: usize,
    /// The longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// The kind of norm.
    pub norm: NormKind,
    /// The norms' epsilon.
    pub norm_eps: f32,
    /// How positions enter.
    pub position: Position,
    /// The kind of MLP.
    pub mlp: MlpKind,
    /// The MLP's activation.
    pub activation: Activation,
    /// Which linears carry a bias.
    pub biases: Biases,
    /// RMS norms on the heads of q and k.
    pub qk_norm: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// q, k and v are one linear.
    pub fused_qkv: bool,
    /// How the block's linears are stored.
    pub layout: Layout,
    /// Keys further back than this are not seen.
    pub sliding_window: Option<usize>,
}

/// A linear of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LinearKind {
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// q, k and v in one (GPT-2's `c_attn`).
    Qkv,
    /// Attention output projection.
    O,
    /// The MLP's gate.
    Gate,
    /// The MLP's first linear.
    Up,
    /// The MLP's second linear.
    Down,
}

/// Where a linear stands: layer and kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinearId {
    /// Index of the block, from 0.
    pub layer: usize,
    /// Which of its linears.
    pub kind: LinearKind,
}

/// Which tensor of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// `.weight`
    Weight,
    /// `.bias`
    Bias,
}

/// A norm of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockNorm {
    /// Before attention.
    Attention,
    /// Before the MLP.
    Mlp,
    /// On the heads of q.
    Q,
    /// On the heads of k.
    K,
}

/// Where in a block a bottleneck stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Sublayer {
    /// Behind the attention's output projection.
    Attention,
    /// Behind the MLP's second linear.
    Mlp,
}

/// A tensor of the base model. Ordered as the forward pass meets them, the head last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WeightId {
    /// The token embedding, [V, C].
    Embedding,
    /// The position table, [max_position_embeddings, C].
    Positions,
    /// A linear of a block.
    Linear(LinearId, Part),
    /// A norm of a block: layer, which, part.
    Norm(usize, BlockNorm, Part),
    /// The norm before the head.
    FinalNorm(Part),
    /// The output projection where it is not the embedding, [V, C].
    Head,
}

impl WeightId {
    /// Whether it is a vector: a norm's weight or a bias.
    pub fn is_vector(self) -> bool {
        matches!(
            self,
            Self::Norm(..) | Self::FinalNorm(_) | Self::Linear(_, Part::Bias)
        )
    }
}

impl ModelConfig {
    /// Columns of q: H·D.
    pub fn q_size(&self) -> usize {
        self.num_attention_heads * self.head_size
    }

    /// Columns of k and of v: KV·D.
    pub fn kv_size(&self) -> usize {
        self.num_key_value_heads * self.head_size
    }

    /// The linears of one block, in the order of the forward pass.
    pub fn linear_kinds(&self) -> &'static [LinearKind] {
        use LinearKind::{Down, Gate, K, O, Q, Qkv, Up, V};
        match (self.fused_qkv, self.mlp) {
            (false, MlpKind::Gated) => &[Q, K, V, O, Gate, Up, Down],
            (false, MlpKind::Plain) => &[Q, K, V, O, Up, Down],
            (true, MlpKind::Gated) => &[Qkv, O, Gate, Up, Down],
            (true, MlpKind::Plain) => &[Qkv, O, Up, Down],
        }
    }

    /// (in, out) features of a linear.
    pub fn linear_shape(&self, kind: LinearKind) -> (usize, usize) {
        let (c, f) = (self.hidden_size, self.intermediate_size);
        match kind {
            LinearKind::Q => (c, self.q_size()),
            LinearKind::K | LinearKind::V => (c, self.kv_size()),
            LinearKind::Qkv => (c, self.q_size() + 2 * self.kv_size()),
            LinearKind::O => (self.q_size(), c),
            LinearKind::Gate | LinearKind::Up => (c, f),
            LinearKind::Down => (f, c),
        }
    }

    /// Whether a linear carries a bias.
    pub fn linear_bias(&self, kind: LinearKind) -> bool {
        match kind {
            LinearKind::Q | LinearKind::K | LinearKind::V | LinearKind::Qkv => self.biases.qkv,
            LinearKind::O => self.biases.o,
            LinearKind::Gate | LinearKind::Up | LinearKind::Down => self.biases.mlp,
        }
    }

    /// The columns of a fused qkv that are `kind`'s (Q, K or V).
    pub fn fused_columns(&self, kind: LinearKind) -> std::ops::Range<usize> {
        let (q, kv) = (self.q_size(), self.kv_size());
        match kind {
            LinearKind::Q => 0..q,
            LinearKind::K => q..q + kv,
            LinearKind::V => q + kv..q + 2 * kv,
            _ => 0..q + 2 * kv,
        }
    }

    /// Every linear of every block.
    pub fn linears(&self) -> impl Iterator<Item = LinearId> + '_ {
        (0..self.num_hidden_layers).flat_map(|layer| {
            self.linear_kinds()
                .iter()
                .map(move |&kind| LinearId { layer, kind })
        })
    }

    /// Every tensor of the model with its shape (rows, cols); a vector is one row.
    pub fn weights(&self) -> Vec<(WeightId, (usize, usize))> {
        let c = self.hidden_size;
        let parts: &[Part] = if self.norm == NormKind::Layer {
            &[Part::Weight, Part::Bias]
        } else {
            &[Part::Weight]
        };
        let mut all = vec![(WeightId::Embedding, (self.vocab_size, c))];
        if self.position == Position::Learned {
            all.push((WeightId::Positions, (self.max_position_embeddings, c)));
        }
        for layer in 0..self.num_hidden_layers {
            all.extend(
                parts
                    .iter()
                    .map(|&p| (WeightId::Norm(layer, BlockNorm::Attention, p), (1, c))),
            );
            for &kind in self.linear_kinds() {
                if kind == LinearKind::O && self.qk_norm {
                    for norm in [BlockNorm::Q, BlockNorm::K] {
                        all.push((
                            WeightId::Norm(layer, norm, Part::Weight),
                            (1, self.head_size),
                        ));
                    }
                }
                let id = LinearId { layer, kind };
                let (input, output) = self.linear_shape(kind);
                let shape = match self.layout {
                    Layout::OutIn => (output, input),
                    Layout::InOut => (input, output),
                };
                all.push((WeightId::Linear(id, Part::Weight), shape));
                if self.linear_bias(kind) {
                    all.push((WeightId::Linear(id, Part::Bias), (1, output)));
                }
                if kind == LinearKind::O {
                    all.extend(
                        parts
                            .iter()
                            .map(|&p| (WeightId::Norm(layer, BlockNorm::Mlp, p), (1, c))),
                    );
                }
            }
        }
        all.extend(parts.iter().map(|&p| (WeightId::FinalNorm(p), (1, c))));
        if !self.tie_word_embeddings {
            all.push((WeightId::Head, (self.vocab_size, c)));
        }
        all
    }

    /// Parameters of the model; a tied head is counted once.
    pub fn parameters(&self) -> usize {
        self.weights()
            .iter()
            .map(|(_, (rows, cols))| rows * cols)
            .sum()
    }

    /// Bytes of the weights: matrices as `dtype`, vectors as f32.
    pub fn weight_bytes(&self, dtype: DType) -> u64 {
        let bytes = |(rows, cols): (usize, usize)| {
            let dtype = if rows == 1 { DType::F32 } else { dtype };
            dtype.bytes_for(rows * cols) as u64
        };
        self.weights().iter().map(|(_, shape)| bytes(*shape)).sum()
    }
}

impl Rope {
    /// The D/2 inverse frequencies, as transformers' `ROPE_INIT_FUNCTIONS` computes them.
    pub fn inverse_frequencies(&self, head_size: usize) -> Vec<f32> {
        (0..head_size / 2)
            .map(|i| {
                let plain = self.theta.powf(-((2 * i) as f64) / head_size as f64);
                self.scale(plain) as f32
            })
            .collect()
    }

    fn scale(&self, frequency: f64) -> f64 {
        match self.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength > original_max_position_embeddings / low_freq_factor {
                    frequency / factor
                } else if wavelength < original_max_position_embeddings / high_freq_factor {
                    frequency
                } else {
                    let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

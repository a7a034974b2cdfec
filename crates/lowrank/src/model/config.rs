//! What the one block needs to know about a model: its shapes and its choices.
//!
//! A family (`families/`) translates a `config.json` into this; nothing else in the crate looks at
//! `config.json`. Where two architectures differ, the difference is an enum here and a `match` in the
//! block, never a second block.

use std::collections::BTreeMap;

use lowrank_kernels::{Activation, Layout, LogitScaling, NumberFormat};

use super::load_in::LoadIn;
pub use super::rope::{QueryScale, Rope, RopeScaling};

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
    /// Gemma 3, and the text half of a Gemma 3 that reads pictures: RMS norms of `1 + w` before and behind the sublayers and on the heads of
    /// q and k, layers that see a window between those that see everything.
    Gemma3,
    /// Gemma 2: Gemma 3 with one rotary embedding and without norms on heads; scores and logits are capped.
    Gemma2,
    /// SmolLM3: Llama's shape; every fourth layer's queries and keys do not know their positions.
    SmolLm3,
    /// Granite: Llama's shape with factors of the embeddings, the scores, what is added to the residual stream, and the logits.
    Granite,
    /// OLMo 2: norms behind the sublayers alone, and on the whole of q and k.
    Olmo2,
    /// OLMo 3: OLMo 2 with layers that see a window.
    Olmo3,
    /// Phi-3 and Phi-4: Llama's shape with fused linears; a part of a head may be rotated.
    Phi3,
    /// Ministral 3: Mistral with YaRN, and queries that grow with the position.
    Ministral3,
    /// GLM-4: norms before and behind the sublayers; neighbours are rotated, in the first half of a head.
    Glm4,
    /// GPT-2: LayerNorm, learned positions, GELU, fused and transposed q, k, v.
    Gpt2,
    /// BERT, and what has its shape, such as MiniLM.
    Bert,
    /// RoBERTa: BERT's shape, positions that begin behind the padding's.
    Roberta,
    /// XLM-RoBERTa: RoBERTa with another vocabulary.
    XlmRoberta,
    /// DistilBERT: BERT's shape without token types.
    DistilBert,
    /// ModernBERT: norms before the sublayers, rotary positions, layers that see a window.
    ModernBert,
    /// DeBERTa-v2 and v3: BERT's shape; scores have terms of how far a key is from a query.
    DebertaV2,
}

impl Family {
    /// The value of `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3_text",
            Self::Gemma2 => "gemma2",
            Self::SmolLm3 => "smollm3",
            Self::Granite => "granite",
            Self::Olmo2 => "olmo2",
            Self::Olmo3 => "olmo3",
            Self::Phi3 => "phi3",
            Self::Ministral3 => "ministral3",
            Self::Glm4 => "glm4",
            Self::Gpt2 => "gpt2",
            Self::Bert => "bert",
            Self::Roberta => "roberta",
            Self::XlmRoberta => "xlm-roberta",
            Self::DistilBert => "distilbert",
            Self::ModernBert => "modernbert",
            Self::DebertaV2 => "deberta-v2",
        }
    }
}

/// What a model is used for, and so what stands on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To say the next token.
    LanguageModel,
    /// To classify whole texts.
    SequenceClassifier {
        /// Outputs of the classifier.
        labels: usize,
    },
    /// To classify single tokens.
    TokenClassifier {
        /// Outputs of the classifier.
        labels: usize,
    },
    /// To give its hidden rows.
    Features,
}

/// What stands on the hidden rows of the last block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HeadKind {
    /// The output projection of a language model.
    LanguageModel,
    /// A classifier.
    Classifier(Classifier),
    /// Nothing: the hidden rows are the result.
    None,
}

/// Which rows of a sequence a classifier reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The first.
    First,
    /// The last.
    Last,
    /// The mean of all.
    Mean,
    /// Each by itself.
    Each,
}

/// `out(norm(act(dense(rows))))`, or `out(rows)` without the dense linear.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Classifier {
    /// Outputs.
    pub labels: usize,
    /// Which rows it reads.
    pub pooling: Pooling,
    /// Its first linear.
    pub dense: Option<ClassifierDense>,
    /// Whether its last linear has a bias.
    pub bias: bool,
}

/// The first linear [C, C] of a classifier, and what follows it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClassifierDense {
    /// The nonlinearity.
    pub activation: Activation,
    /// Whether it has a bias.
    pub bias: bool,
    /// Whether a norm stands behind the nonlinearity.
    pub norm: bool,
    /// Whether it is trained and saved with a classifier (`modules_to_save`), as PEFT has it or because the base lacks it; otherwise it
    /// is the base's, frozen.
    pub saved: bool,
}

/// How a residual stream is normalised before attention, before the MLP and before the head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) · weight`
    Rms,
    /// `x / sqrt(mean(x²) + eps) · (1 + weight)`
    RmsOnePlus,
    /// `(x − mean) / sqrt(var + eps) · weight + bias`
    Layer,
    /// The same without a bias.
    LayerWithoutBias,
}

impl NormKind {
    /// The tensors of a norm.
    pub fn parts(self) -> &'static [Part] {
        match self {
            Self::Layer => &[Part::Weight, Part::Bias],
            Self::Rms | Self::RmsOnePlus | Self::LayerWithoutBias => &[Part::Weight],
        }
    }

    /// What is added to a norm's weight where it is used.
    pub fn weight_offset(self) -> f32 {
        if self == Self::RmsOnePlus { 1.0 } else { 0.0 }
    }

    /// The numbers of a row that are kept to compute the norm again.
    pub(crate) fn statistics(self) -> usize {
        match self {
            Self::Rms | Self::RmsOnePlus => 1,
            Self::Layer | Self::LayerWithoutBias => 2,
        }
    }
}

/// Where the norms of a sublayer stand: `x = sum(x + output(sublayer(input(x))))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before the sublayer.
    Input,
    /// Behind the sum of its output and the residual stream.
    Sum,
    /// Behind the sublayer's output, before the sum.
    Output,
    /// Before the sublayer, and behind its output before the sum.
    InputAndOutput,
}

impl NormPlacement {
    /// Whether a norm stands before each sublayer.
    pub(crate) fn has_input(self) -> bool {
        matches!(self, Self::Input | Self::InputAndOutput)
    }

    /// Whether a norm stands behind each sublayer's output, before the sum.
    pub(crate) fn has_output(self) -> bool {
        matches!(self, Self::Output | Self::InputAndOutput)
    }
}

/// A factor of the embeddings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum EmbeddingScale {
    /// Of the rows of the table, rounded to the weights' number format.
    Table(f32),
    /// Of all rows, those of virtual tokens too.
    All(f32),
}

/// RMS norms on q and k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Of each head, with one weight `[D]` for all.
    Heads,
    /// Of all heads together.
    Projections,
}

/// How a token's place in its sequence enters the model.
#[derive(Clone, Debug, PartialEq)]
pub enum Position {
    /// Rotary embeddings of q and k; [`LayerConfig::rope`] says which of them a block has.
    Rope(Vec<Rope>),
    /// A learned table, added to the token embedding.
    Learned {
        /// The row of the first position. The table has so many rows more than [`ModelConfig::max_position_embeddings`].
        first: usize,
    },
    /// Not at all, but for [`ModelConfig::relative`].
    None,
}

/// Terms that attention's scores have beside q·k, of how far a key is from a query: disentangled attention (He et al., "DeBERTa", 2020).
///
/// ```text
/// s(i, j) = scale · (q_i·k_j + q_i·key(r) + k_j·query(r)),   r = row of the distance i - j of a table of 2·span rows
/// ```
/// A block's own linears of q and k make queries and keys of the table's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelativeAttention {
    /// Half of the table's rows (`position_buckets`, or else `max_distance`).
    pub span: usize,
    /// Distances beyond half of these share rows, the more the farther they are (`position_buckets`); `None`: each has its own.
    pub buckets: Option<usize>,
    /// Distances from which on all share the last row (`max_relative_positions`).
    pub max_distance: usize,
    /// Whether queries meet positions as keys (`c2p` of `pos_att_type`).
    pub keys: bool,
    /// Whether keys meet positions as queries (`p2c`).
    pub queries: bool,
    /// Whether the table's rows go through a norm (`norm_rel_ebd`).
    pub norm: bool,
}

/// What the attention of one block has for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerConfig {
    /// How many keys back a query sees, its own included; in an encoder as many forward. `None`: all.
    pub window: Option<usize>,
    /// Which of the [rotary embeddings](Position::Rope) it has; `None`: its queries and keys do not know their positions.
    pub rope: Option<usize>,
}

/// The feed-forward part of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    /// `down(act(gate(x)) ∘ up(x))`
    Gated,
    /// The same, gate and up being one linear.
    GatedFused,
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
#[expect(
    clippy::struct_excessive_bools,
    reason = "what architectures have or have not is independent"
)]
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
    /// Where the blocks' norms stand.
    pub norm_placement: NormPlacement,
    /// Whether the first block has a norm before its attention.
    pub first_norm: bool,
    /// Whether a norm stands behind the last block.
    pub final_norm: bool,
    /// The norms' epsilon.
    pub norm_eps: f32,
    /// Rows of the table of token types (`type_vocab_size`), which is added to the token embedding; 0: none.
    pub token_types: usize,
    /// Factor of the embeddings.
    pub embedding_scale: Option<EmbeddingScale>,
    /// Whether a norm stands behind the sum of the embeddings.
    pub embedding_norm: bool,
    /// How positions enter.
    pub position: Position,
    /// Terms of the scores that know how far a key is from a query.
    pub relative: Option<RelativeAttention>,
    /// The kind of MLP.
    pub mlp: MlpKind,
    /// The MLP's activation.
    pub activation: Activation,
    /// Which linears carry a bias.
    pub biases: Biases,
    /// RMS norms on q and k.
    pub qk_norm: QkNorm,
    /// Scores s become c · tanh(s / c).
    pub attention_softcap: Option<f32>,
    /// Factor of what a sublayer adds to the residual stream.
    pub residual_scale: f32,
    /// What becomes of logits.
    pub logit_scaling: LogitScaling,
    /// Factor of attention's scores; `None`: 1/√D.
    pub attention_scale: Option<f32>,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// q, k and v are one linear.
    pub fused_qkv: bool,
    /// How the block's linears are held: as a folder has them, or [out, in] where they are in blocks.
    pub layout: Layout,
    /// Whether a row sees only itself and what is before it.
    pub causal: bool,
    /// The blocks' own choices, one a block.
    pub layers: Vec<LayerConfig>,
    /// What stands on top.
    pub head: HeadKind,
    /// The spread of new values (`initializer_range`).
    pub initializer_range: f32,
    /// Matrices that the files have in a format of 16 bits or fewer that is not bf16. They stay in it beside a base in bf16.
    pub formats: BTreeMap<WeightId, NumberFormat>,
    /// What made these formats, if not the files: they are then kept beside a base in any type.
    pub load_in: Option<LoadIn>,
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
    /// The MLP's gate and first linear in one.
    GateUp,
    /// The MLP's second linear.
    Down,
    /// The first linear of a classifier.
    Dense,
    /// The last linear of a classifier.
    Out,
}

/// Where a linear stands: layer and kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinearId {
    /// Index of the block, from 0; the linears of a classifier have the number of blocks.
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
    /// Of attention: before it, or behind the sum, as [`NormPlacement`] says.
    Attention,
    /// Of the MLP.
    Mlp,
    /// Of attention's output, before it is added to the residual stream.
    AttentionOutput,
    /// Of the MLP's output, likewise.
    MlpOutput,
    /// On q.
    Q,
    /// On k.
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
    /// The position table, [positions, C].
    Positions,
    /// The table of token types, [token_types, C].
    TokenTypes,
    /// The norm behind the embeddings.
    EmbeddingNorm(Part),
    /// The table of relative positions, [2·span, C].
    Relative,
    /// The norm of its rows.
    RelativeNorm(Part),
    /// A linear of a block.
    Linear(LinearId, Part),
    /// A norm of a block: layer, which, part.
    Norm(usize, BlockNorm, Part),
    /// The norm before the head.
    FinalNorm(Part),
    /// The output projection where it is not the embedding, [V, C].
    Head,
    /// The norm of a classifier.
    ClassifierNorm(Part),
}

impl WeightId {
    /// Whether it is a vector: a norm's weight or a bias.
    pub fn is_vector(self) -> bool {
        matches!(
            self,
            Self::Norm(..)
                | Self::EmbeddingNorm(_)
                | Self::RelativeNorm(_)
                | Self::FinalNorm(_)
                | Self::ClassifierNorm(_)
                | Self::Linear(_, Part::Bias)
        )
    }
}

impl ModelConfig {
    /// Factor of attention's scores.
    pub(crate) fn attention_scale(&self) -> f32 {
        let usual = || 1.0 / (self.head_size as f32).sqrt();
        self.attention_scale.unwrap_or_else(usual)
    }

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
        use LinearKind::{Down, Gate, GateUp, K, O, Q, Qkv, Up, V};
        match (self.fused_qkv, self.mlp) {
            (false, MlpKind::GatedFused) => &[Q, K, V, O, GateUp, Down],
            (true, MlpKind::GatedFused) => &[Qkv, O, GateUp, Down],
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
            LinearKind::GateUp => (c, 2 * f),
            LinearKind::Down => (f, c),
            LinearKind::Dense => (c, c),
            LinearKind::Out => (c, self.classifier().map_or(0, |head| head.labels)),
        }
    }

    /// Whether a linear carries a bias.
    pub fn linear_bias(&self, kind: LinearKind) -> bool {
        match kind {
            LinearKind::Q | LinearKind::K | LinearKind::V | LinearKind::Qkv => self.biases.qkv,
            LinearKind::O => self.biases.o,
            LinearKind::Gate | LinearKind::Up | LinearKind::GateUp | LinearKind::Down => {
                self.biases.mlp
            }
            LinearKind::Dense => self.classifier_dense().is_some_and(|dense| dense.bias),
            LinearKind::Out => self.classifier().is_some_and(|head| head.bias),
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

    /// How a linear is stored.
    pub fn linear_layout(&self, kind: LinearKind) -> Layout {
        match kind {
            LinearKind::Dense | LinearKind::Out => Layout::OutIn,
            _ => self.layout,
        }
    }

    /// The windows of the blocks' attention.
    pub fn windows(&self) -> Vec<Option<usize>> {
        self.layers.iter().map(|layer| layer.window).collect()
    }

    /// Tokens that a sequence may have: as many as the model was made for, unless nothing in it counts them.
    pub fn longest_sequence(&self) -> usize {
        match self.position {
            Position::None => usize::MAX,
            Position::Rope(_) | Position::Learned { .. } => self.max_position_embeddings,
        }
    }

    /// The same model with a classifier for another number of labels; a model without one as it is.
    pub(crate) fn with_labels(&self, labels: usize) -> Self {
        let mut config = self.clone();
        if let HeadKind::Classifier(classifier) = &mut config.head {
            classifier.labels = labels;
        }
        config
    }

    /// The same model with a classifier whose first linear, if it has one, is trained and saved with the last one.
    pub(crate) fn with_saved_dense(mut self) -> Self {
        if let HeadKind::Classifier(Classifier {
            dense: Some(dense), ..
        }) = &mut self.head
        {
            dense.saved = true;
        }
        self
    }

    /// The classifier, if there is one.
    pub fn classifier(&self) -> Option<&Classifier> {
        match &self.head {
            HeadKind::Classifier(classifier) => Some(classifier),
            HeadKind::LanguageModel | HeadKind::None => None,
        }
    }

    /// The first linear of the classifier.
    pub(crate) fn classifier_dense(&self) -> Option<&ClassifierDense> {
        self.classifier()?.dense.as_ref()
    }

    /// A linear of the classifier.
    pub(crate) fn classifier_linear(&self, kind: LinearKind) -> LinearId {
        LinearId {
            layer: self.num_hidden_layers,
            kind,
        }
    }

    /// Every linear that an adapter can stand beside: those of the blocks, and of a classifier those that are not trained as a whole.
    pub fn linears(&self) -> impl Iterator<Item = LinearId> + '_ {
        let dense = self.classifier_dense().filter(|dense| !dense.saved);
        (0..self.num_hidden_layers)
            .flat_map(|layer| {
                let kinds = self.linear_kinds().iter();
                kinds.map(move |&kind| LinearId { layer, kind })
            })
            .chain(dense.map(|_| self.classifier_linear(LinearKind::Dense)))
    }

    /// Every tensor of the model with its shape (rows, cols); a vector is one row.
    pub fn weights(&self) -> Vec<(WeightId, (usize, usize))> {
        let c = self.hidden_size;
        let mut all = vec![(WeightId::Embedding, (self.vocab_size, c))];
        if let Position::Learned { first } = self.position {
            let rows = first + self.max_position_embeddings;
            all.push((WeightId::Positions, (rows, c)));
        }
        if self.token_types > 0 {
            all.push((WeightId::TokenTypes, (self.token_types, c)));
        }
        if self.embedding_norm {
            all.extend(self.norm_weights(WeightId::EmbeddingNorm));
        }
        if let Some(relative) = &self.relative {
            all.push((WeightId::Relative, (2 * relative.span, c)));
            if relative.norm {
                all.extend(self.norm_weights(WeightId::RelativeNorm));
            }
        }
        for layer in 0..self.num_hidden_layers {
            self.add_block(layer, &mut all);
        }
        if self.final_norm {
            all.extend(self.norm_weights(WeightId::FinalNorm));
        }
        match &self.head {
            HeadKind::LanguageModel if !self.tie_word_embeddings => {
                all.push((WeightId::Head, (self.vocab_size, c)));
            }
            HeadKind::LanguageModel | HeadKind::None => {}
            HeadKind::Classifier(classifier) => {
                if let Some(dense) = &classifier.dense {
                    self.add_linear(self.classifier_linear(LinearKind::Dense), &mut all);
                    if dense.norm {
                        all.extend(self.norm_weights(WeightId::ClassifierNorm));
                    }
                }
                self.add_linear(self.classifier_linear(LinearKind::Out), &mut all);
            }
        }
        all
    }

    /// The tensors of one block, as the forward pass meets them.
    fn add_block(&self, layer: usize, all: &mut Vec<(WeightId, (usize, usize))>) {
        let norm = |norm| self.norm_weights(move |part| WeightId::Norm(layer, norm, part));
        if self.has_attention_norm(layer) && self.norm_placement.has_input() {
            all.extend(norm(BlockNorm::Attention));
        }
        for &kind in self.linear_kinds() {
            let sizes = match self.qk_norm {
                QkNorm::None => None,
                QkNorm::Heads => Some((self.head_size, self.head_size)),
                QkNorm::Projections => Some((self.q_size(), self.kv_size())),
            };
            if kind == LinearKind::O
                && let Some((q, k)) = sizes
            {
                for (norm, size) in [(BlockNorm::Q, q), (BlockNorm::K, k)] {
                    let id = WeightId::Norm(layer, norm, Part::Weight);
                    all.push((id, (1, size)));
                }
            }
            self.add_linear(LinearId { layer, kind }, all);
            let sums = self.norm_placement == NormPlacement::Sum;
            let (has_input, has_output) = (
                self.norm_placement.has_input(),
                self.norm_placement.has_output(),
            );
            let behind: &[(BlockNorm, bool)] = match kind {
                LinearKind::O => &[
                    (BlockNorm::Attention, sums),
                    (BlockNorm::AttentionOutput, has_output),
                    (BlockNorm::Mlp, has_input),
                ],
                LinearKind::Down => &[(BlockNorm::Mlp, sums), (BlockNorm::MlpOutput, has_output)],
                _ => &[],
            };
            let here = behind.iter().filter(|(_, here)| *here);
            here.for_each(|(behind, _)| all.extend(norm(*behind)));
        }
    }

    fn add_linear(&self, id: LinearId, all: &mut Vec<(WeightId, (usize, usize))>) {
        let (input, output) = self.linear_shape(id.kind);
        let shape = match self.linear_layout(id.kind) {
            Layout::OutIn => (output, input),
            Layout::InOut => (input, output),
        };
        all.push((WeightId::Linear(id, Part::Weight), shape));
        if self.linear_bias(id.kind) {
            all.push((WeightId::Linear(id, Part::Bias), (1, output)));
        }
    }

    /// The tensors of a norm of the residual stream.
    fn norm_weights(
        &self,
        id: impl Fn(Part) -> WeightId,
    ) -> impl Iterator<Item = (WeightId, (usize, usize))> {
        let parts = self.norm.parts().iter();
        parts.map(move |&part| (id(part), (1, self.hidden_size)))
    }

    /// Whether a block has a norm for its attention.
    pub(crate) fn has_attention_norm(&self, layer: usize) -> bool {
        layer > 0 || self.first_norm
    }

    /// Whether a tensor belongs to a classifier: a model that was made for something else may lack it, and it then begins anew.
    pub(crate) fn is_of_classifier(&self, id: WeightId) -> bool {
        match id {
            WeightId::Linear(linear, _) => linear.layer == self.num_hidden_layers,
            WeightId::ClassifierNorm(_) => true,
            _ => false,
        }
    }

    /// Parameters of the model; a tied head is counted once.
    pub fn parameters(&self) -> usize {
        self.weights()
            .iter()
            .map(|(_, (rows, cols))| rows * cols)
            .sum()
    }

    /// Whether the output projection is the embedding.
    pub fn ties_head(&self) -> bool {
        self.tie_word_embeddings && self.head == HeadKind::LanguageModel
    }
}

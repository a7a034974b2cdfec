//! ModernBERT: norms before the sublayers, rotary positions, a gated MLP, and layers that see a window between those that see
//! everything. q, k and v are one linear, as are the two inputs of the MLP.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;

use super::super::config::{
    Biases, BlockNorm, ClassifierDense, Family, LayerConfig, LinearKind, MlpKind, ModelConfig,
    NormKind, Pooling, Position, Rope,
};
use super::Names;
use super::rope::Rules;

pub(super) fn config(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    let hidden_size = raw.opt_usize("hidden_size")?.unwrap_or(768);
    let heads = raw.opt_usize("num_attention_heads")?.unwrap_or(12);
    let layers = raw.opt_usize("num_hidden_layers")?.unwrap_or(22);
    let bias = |field| Ok::<_, FormatError>(raw.opt_bool(field)?.unwrap_or(false));
    let (attention_bias, mlp_bias) = (bias("attention_bias")?, bias("mlp_bias")?);
    let head_size = super::head_size(raw, hidden_size, heads, raw.opt_usize("head_dim")?)?;
    Ok(ModelConfig {
        vocab_size: raw.opt_usize("vocab_size")?.unwrap_or(50_368),
        hidden_size,
        intermediate_size: raw.opt_usize("intermediate_size")?.unwrap_or(1152),
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_size,
        max_position_embeddings: raw.opt_usize("max_position_embeddings")?.unwrap_or(8192),
        norm: if bias("norm_bias")? {
            NormKind::Layer
        } else {
            NormKind::LayerWithoutBias
        },
        first_norm: false,
        embedding_norm: true,
        norm_eps: raw.opt_f64("norm_eps")?.unwrap_or(1e-5) as f32,
        position: Position::Rope(vec![
            rope(
                raw,
                head_size,
                "full_attention",
                "global_rope_theta",
                160_000.0,
            )?,
            rope(
                raw,
                head_size,
                "sliding_attention",
                "local_rope_theta",
                10_000.0,
            )?,
        ]),
        layers: kinds(raw, layers)?,
        fused_qkv: true,
        mlp: MlpKind::GatedFused,
        activation: super::activation(raw, "hidden_activation", "gelu")?,
        biases: Biases {
            qkv: attention_bias,
            o: attention_bias,
            mlp: mlp_bias,
        },
        tie_word_embeddings: true,
        ..super::encoder(raw, Family::ModernBert)?
    })
}

/// The rotary embedding of one kind of layers.
fn rope(
    raw: &HfConfig,
    head_size: usize,
    kind: &str,
    older: &str,
    absent: f64,
) -> Result<Rope, FormatError> {
    if raw
        .opt_object("rope_scaling")?
        .is_some_and(|scaling| !scaling.map().is_empty())
    {
        return Err(raw.unsupported("rope_scaling", "null"));
    }
    let older = raw.opt_f64(older)?.unwrap_or(absent);
    let nested = match raw.opt_object("rope_parameters")? {
        Some(kinds) => kinds.opt_object(kind)?,
        None => None,
    };
    Rules::new(older, 0, head_size).read_one(raw, nested)
}

/// Every third layer sees everything, the others so many tokens to each side.
fn kinds(raw: &HfConfig, layers: usize) -> Result<Vec<LayerConfig>, FormatError> {
    const EVERY: &str = "global_attn_every_n_layers";
    let window = raw.opt_usize("local_attention")?.unwrap_or(128) / 2 + 1;
    let every = raw.opt_usize(EVERY)?.unwrap_or(3);
    if every == 0 {
        return Err(raw.unsupported(EVERY, "a whole number of at least 1"));
    }
    super::mixed_layers(raw, layers, Some(window), |layer| {
        !layer.is_multiple_of(every)
    })
}

/// The first linear of a classifier, of whole texts and of tokens.
pub(super) fn dense(raw: &HfConfig) -> Result<ClassifierDense, FormatError> {
    Ok(ClassifierDense {
        activation: super::activation(raw, "classifier_activation", "gelu")?,
        bias: raw.opt_bool("classifier_bias")?.unwrap_or(false),
        norm: true,
        saved: false,
    })
}

/// Which rows a classifier of whole texts reads.
pub(super) fn pooling(raw: &HfConfig) -> Result<Pooling, FormatError> {
    const FIELD: &str = "classifier_pooling";
    match raw.opt_str(FIELD)?.unwrap_or("cls") {
        "cls" => Ok(Pooling::First),
        "mean" => Ok(Pooling::Mean),
        _ => Err(raw.unsupported(FIELD, "cls, mean")),
    }
}

pub(super) const NAMES: Names = Names {
    prefix: "model.",
    blocks: "layers",
    embedding: "embeddings.tok_embeddings",
    embedding_norm: "embeddings.norm",
    final_norm: "final_norm",
    linear,
    norm,
    ..Names::NONE
};

fn linear(kind: LinearKind) -> &'static str {
    match kind {
        LinearKind::O => "attn.Wo",
        LinearKind::GateUp => "mlp.Wi",
        LinearKind::Down => "mlp.Wo",
        _ => "attn.Wqkv",
    }
}

fn norm(norm: BlockNorm) -> &'static str {
    match norm {
        BlockNorm::Mlp => "mlp_norm",
        _ => "attn_norm",
    }
}

//! DeBERTa-v2 and v3: BERT's blocks, whose scores know how far a key is from a query. The table of relative positions is one for all
//! blocks, and each sends it through its own linears of q and k.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;

use super::super::config::{
    Biases, ClassifierDense, Family, LinearKind, MlpKind, ModelConfig, NormKind, NormPlacement,
    Position, RelativeAttention,
};
use super::Names;

pub(super) fn config(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    let hidden_size = raw.opt_usize("hidden_size")?.unwrap_or(1536);
    let heads = raw.opt_usize("num_attention_heads")?.unwrap_or(24);
    let layers = raw.opt_usize("num_hidden_layers")?.unwrap_or(24);
    let head_size = super::head_size(raw, hidden_size, heads, None)?;
    refuse_others(raw, hidden_size, head_size)?;
    let positions = raw.opt_usize("max_position_embeddings")?.unwrap_or(512);
    let terms = terms(raw)?;
    let biased = raw.opt_bool("position_biased_input")?.unwrap_or(true);
    let eps = raw.opt_f64("layer_norm_eps")?.unwrap_or(1e-7);
    // The terms are counted whether they are there or not.
    let summed = 1 + usize::from(terms.0) + usize::from(terms.1);
    Ok(ModelConfig {
        vocab_size: raw.opt_usize("vocab_size")?.unwrap_or(128_100),
        hidden_size,
        intermediate_size: raw.opt_usize("intermediate_size")?.unwrap_or(6144),
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_size,
        max_position_embeddings: positions,
        norm: NormKind::Layer,
        norm_placement: NormPlacement::Sum,
        final_norm: false,
        embedding_norm: true,
        norm_eps: eps as f32,
        position: if biased {
            Position::Learned { first: 0 }
        } else {
            Position::None
        },
        relative: relative(raw, positions, terms)?,
        attention_scale: Some(1.0 / ((head_size * summed) as f32).sqrt()),
        token_types: token_types(raw)?,
        mlp: MlpKind::Plain,
        activation: super::activation(raw, "hidden_act", "gelu")?,
        biases: Biases {
            qkv: true,
            o: true,
            mlp: true,
        },
        tie_word_embeddings: true,
        layers: super::same_layers(layers, None),
        ..super::encoder(raw, Family::DebertaV2)?
    })
}

/// Keys that make another model of it.
fn refuse_others(raw: &HfConfig, hidden_size: usize, head_size: usize) -> Result<(), FormatError> {
    const CONVOLUTION: &str = "conv_kernel_size";
    if raw.opt_usize(CONVOLUTION)?.unwrap_or(0) > 0 {
        let accepted =
            "0 or absent: the convolution of deberta-v2-xlarge and xxlarge is not computed";
        return Err(raw.unsupported(CONVOLUTION, accepted));
    }
    for (field, size) in [
        ("embedding_size", hidden_size),
        ("pooler_hidden_size", hidden_size),
        ("attention_head_size", head_size),
    ] {
        if raw.opt_usize(field)?.is_some_and(|found| found != size) {
            let accepted = format!("{size}, which follows from hidden_size");
            return Err(raw.unsupported(field, accepted));
        }
    }
    Ok(())
}

/// Rows of the table of token types. The tokenizer numbers two texts 0 and 1.
fn token_types(raw: &HfConfig) -> Result<usize, FormatError> {
    const FIELD: &str = "type_vocab_size";
    match raw.opt_usize(FIELD)?.unwrap_or(0) {
        1 => Err(raw.unsupported(
            FIELD,
            "0, or 2 and more: the second of two texts has number 1",
        )),
        types => Ok(types),
    }
}

/// Whether scores are to have terms of positions as keys and as queries: a list, or names with bars between them.
fn terms(raw: &HfConfig) -> Result<(bool, bool), FormatError> {
    const FIELD: &str = "pos_att_type";
    let joined = raw.get(FIELD).and_then(serde_json::Value::as_str);
    let names: Vec<String> = if let Some(joined) = joined {
        let names = joined.split('|').map(|name| name.trim().to_lowercase());
        names.filter(|name| !name.is_empty()).collect()
    } else {
        let names = raw.opt_strs(FIELD)?.unwrap_or_default();
        names.into_iter().map(str::to_owned).collect()
    };
    if names.iter().any(|name| name != "c2p" && name != "p2c") {
        return Err(raw.unsupported(FIELD, "c2p, p2c"));
    }
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    Ok((has("c2p"), has("p2c")))
}

/// What the scores' terms of relative positions are.
fn relative(
    raw: &HfConfig,
    positions: usize,
    (keys, queries): (bool, bool),
) -> Result<Option<RelativeAttention>, FormatError> {
    const NORM: &str = "norm_rel_ebd";
    let norm = raw.opt_str(NORM)?.unwrap_or("none").to_lowercase();
    let norm = norm.split('|').any(|name| name.trim() == "layer_norm");
    if !raw.opt_bool("relative_attention")?.unwrap_or(false) {
        if norm {
            let accepted = "none: relative_attention is false, so nothing would read this norm";
            return Err(raw.unsupported(NORM, accepted));
        }
        return Ok(None);
    }
    if !(keys || queries) {
        let accepted = "c2p, p2c or both, since relative_attention is true";
        return Err(raw.unsupported("pos_att_type", accepted));
    }
    if !raw.opt_bool("share_att_key")?.unwrap_or(false) {
        let accepted = "true: linears of their own for relative positions are not computed";
        return Err(raw.unsupported("share_att_key", accepted));
    }
    let max_distance = positive(raw, "max_relative_positions")?.unwrap_or(positions);
    let buckets = positive(raw, "position_buckets")?;
    // The logarithm runs from half of the buckets to the largest distance.
    if buckets.is_some_and(|buckets| buckets < 2 || buckets / 2 + 1 >= max_distance) {
        let accepted = format!(
            "2 or more, and less than twice the largest distance, which is {max_distance} (max_relative_positions)"
        );
        return Err(raw.unsupported("position_buckets", accepted));
    }
    Ok(Some(RelativeAttention {
        span: buckets.unwrap_or(max_distance),
        buckets,
        max_distance,
        keys,
        queries,
        norm,
    }))
}

/// A number of which everything below 1 stands for none.
fn positive(raw: &HfConfig, field: &str) -> Result<Option<usize>, FormatError> {
    let is_negative = raw
        .get(field)
        .and_then(serde_json::Value::as_i64)
        .is_some_and(|value| value < 0);
    if is_negative {
        return Ok(None);
    }
    Ok(raw.opt_usize(field)?.filter(|value| *value > 0))
}

/// The first linear of a sequence classifier.
pub(super) fn dense(raw: &HfConfig) -> Result<ClassifierDense, FormatError> {
    Ok(ClassifierDense {
        activation: super::activation(raw, "pooler_hidden_act", "gelu")?,
        bias: true,
        norm: false,
        saved: false,
    })
}

/// The table of absolute positions.
pub(super) const POSITIONS: &str = "embeddings.position_embeddings.weight";

pub(super) const NAMES: Names = Names {
    prefix: "deberta.",
    blocks: "encoder.layer",
    embedding: "embeddings.word_embeddings",
    positions: "embeddings.position_embeddings",
    token_types: "embeddings.token_type_embeddings",
    embedding_norm: "embeddings.LayerNorm",
    relative: "encoder.rel_embeddings",
    relative_norm: "encoder.LayerNorm",
    linear,
    norm: super::bert::norm,
    ..Names::NONE
};

fn linear(kind: LinearKind) -> &'static str {
    match kind {
        LinearKind::Q => "attention.self.query_proj",
        LinearKind::K => "attention.self.key_proj",
        LinearKind::V => "attention.self.value_proj",
        kind => super::bert::linear(kind),
    }
}

//! BERT and MiniLM, RoBERTa, XLM-RoBERTa, DistilBERT: bidirectional attention, norms behind the sums, learned positions, exact GELU.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;
use lowrank_kernels::Activation;

use super::super::config::{
    Biases, BlockNorm, ClassifierDense, Family, LinearKind, MlpKind, ModelConfig, NormKind,
    NormPlacement, Position,
};
use super::Names;

pub(super) fn config(raw: &HfConfig, family: Family) -> Result<ModelConfig, FormatError> {
    refuse_others(raw)?;
    let hidden_size = raw.opt_usize("hidden_size")?.unwrap_or(768);
    let heads = raw.opt_usize("num_attention_heads")?.unwrap_or(12);
    let layers = raw.opt_usize("num_hidden_layers")?.unwrap_or(12);
    let (vocab_size, first) = match family {
        Family::Bert => (30_522, 0),
        // Positions are counted from behind the padding token's id.
        _ => (50_265, raw.opt_usize("pad_token_id")?.unwrap_or(1) + 1),
    };
    let eps = raw.opt_f64("layer_norm_eps")?.unwrap_or(1e-12);
    Ok(ModelConfig {
        vocab_size: raw.opt_usize("vocab_size")?.unwrap_or(vocab_size),
        hidden_size,
        intermediate_size: raw.opt_usize("intermediate_size")?.unwrap_or(3072),
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_size: super::head_size(raw, hidden_size, heads, None)?,
        max_position_embeddings: positions(raw, first)?,
        norm_eps: eps as f32,
        position: Position::Learned { first },
        token_types: raw.opt_usize("type_vocab_size")?.unwrap_or(2),
        activation: super::activation(raw, "hidden_act", "gelu")?,
        layers: super::same_layers(layers, None),
        ..encoder(raw, family)?
    })
}

/// DistilBERT, whose keys have names of their own.
pub(super) fn distilbert(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    refuse_others(raw)?;
    let named = |own: &'static str, common: &'static str, absent: usize| {
        let name = if raw.get(common).is_some() {
            common
        } else {
            own
        };
        Ok::<_, FormatError>(raw.opt_usize(name)?.unwrap_or(absent))
    };
    let hidden_size = named("dim", "hidden_size", 768)?;
    let heads = named("n_heads", "num_attention_heads", 12)?;
    let layers = named("n_layers", "num_hidden_layers", 6)?;
    Ok(ModelConfig {
        vocab_size: raw.opt_usize("vocab_size")?.unwrap_or(30_522),
        hidden_size,
        intermediate_size: raw.opt_usize("hidden_dim")?.unwrap_or(3072),
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_size: super::head_size(raw, hidden_size, heads, None)?,
        max_position_embeddings: positions(raw, 0)?,
        // Fixed in its code.
        norm_eps: 1e-12,
        position: Position::Learned { first: 0 },
        activation: super::activation(raw, "activation", "gelu")?,
        layers: super::same_layers(layers, None),
        ..encoder(raw, Family::DistilBert)?
    })
}

/// What they have in common.
fn encoder(raw: &HfConfig, family: Family) -> Result<ModelConfig, FormatError> {
    Ok(ModelConfig {
        norm: NormKind::Layer,
        norm_placement: NormPlacement::Sum,
        final_norm: false,
        embedding_norm: true,
        mlp: MlpKind::Plain,
        biases: Biases {
            qkv: true,
            o: true,
            mlp: true,
        },
        tie_word_embeddings: true,
        ..super::encoder(raw, family)?
    })
}

/// Keys that make another model of it.
fn refuse_others(raw: &HfConfig) -> Result<(), FormatError> {
    for field in ["is_decoder", "add_cross_attention"] {
        if raw.opt_bool(field)?.unwrap_or(false) {
            return Err(raw.unsupported(field, "false"));
        }
    }
    let kind = raw.opt_str("position_embedding_type")?;
    if kind.is_some_and(|kind| kind != "absolute") {
        return Err(raw.unsupported("position_embedding_type", "absolute"));
    }
    Ok(())
}

/// Positions that a sequence can have.
fn positions(raw: &HfConfig, first: usize) -> Result<usize, FormatError> {
    const FIELD: &str = "max_position_embeddings";
    let rows = raw.opt_usize(FIELD)?.unwrap_or(512);
    if rows <= first {
        let accepted =
            format!("more than {first}: the first {first} rows of the table are no positions");
        return Err(raw.unsupported(FIELD, accepted));
    }
    Ok(rows - first)
}

/// The first linear of a sequence classifier.
pub(super) fn dense(family: Family) -> ClassifierDense {
    ClassifierDense {
        activation: if family == Family::DistilBert {
            Activation::Relu
        } else {
            Activation::Tanh
        },
        bias: true,
        norm: false,
        saved: family != Family::Bert,
    }
}

pub(super) const BERT: Names = Names {
    prefix: "bert.",
    blocks: "encoder.layer",
    embedding: "embeddings.word_embeddings",
    positions: "embeddings.position_embeddings",
    token_types: "embeddings.token_type_embeddings",
    embedding_norm: "embeddings.LayerNorm",
    linear,
    norm,
    ..Names::NONE
};

pub(super) const ROBERTA: Names = Names {
    prefix: "roberta.",
    ..BERT
};

pub(super) const DISTILBERT: Names = Names {
    prefix: "distilbert.",
    blocks: "transformer.layer",
    token_types: "",
    linear: distilbert_linear,
    norm: distilbert_norm,
    ..BERT
};

pub(super) fn linear(kind: LinearKind) -> &'static str {
    match kind {
        LinearKind::Q => "attention.self.query",
        LinearKind::K => "attention.self.key",
        LinearKind::V => "attention.self.value",
        LinearKind::O => "attention.output.dense",
        LinearKind::Up => "intermediate.dense",
        LinearKind::Down => "output.dense",
        _ => "",
    }
}

pub(super) fn norm(norm: BlockNorm) -> &'static str {
    match norm {
        BlockNorm::Mlp => "output.LayerNorm",
        _ => "attention.output.LayerNorm",
    }
}

fn distilbert_linear(kind: LinearKind) -> &'static str {
    match kind {
        LinearKind::Q => "attention.q_lin",
        LinearKind::K => "attention.k_lin",
        LinearKind::V => "attention.v_lin",
        LinearKind::O => "attention.out_lin",
        LinearKind::Up => "ffn.lin1",
        LinearKind::Down => "ffn.lin2",
        _ => "",
    }
}

fn distilbert_norm(norm: BlockNorm) -> &'static str {
    match norm {
        BlockNorm::Mlp => "output_layer_norm",
        _ => "sa_layer_norm",
    }
}

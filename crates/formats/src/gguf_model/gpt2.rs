//! GPT-2, whose folders have names and keys of their own, and matrices [in, out] that llama.cpp's converter turns.

use serde_json::{Map, Value, json};

use super::architecture::Architecture;
use super::shapes::{Change, Place, Shapes};
use super::{Model, decimal, torch_name};
use crate::FormatError;
use crate::checkpoint::StoredDType;
use crate::hf_config::HfConfig;

/// `general.architecture`.
pub(super) const NAME: &str = "gpt2";

/// Linears of a layer: transformers' name and llama.cpp's.
const LINEARS: [(&str, &str); 4] = [
    ("attn.c_attn", "attn_qkv"),
    ("attn.c_proj", "attn_output"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
];

/// Norms of a layer, likewise.
const NORMS: [(&str, &str); 2] = [("ln_1", "attn_norm"), ("ln_2", "ffn_norm")];

/// What config.json says of a file.
pub(super) fn config(
    model: &Model<'_>,
    dtype: StoredDType,
) -> Result<Map<String, Value>, FormatError> {
    let token =
        |name: &str| (model.gguf.metadata()).get_u32(&format!("tokenizer.ggml.{name}_token_id"));
    let shapes = &model.shapes;
    let eps = decimal(model.real("attention.layer_norm_epsilon")?);
    let Value::Object(config) = json!({
        "architectures": [shapes.architecture.class],
        // Other programs compute with the approximation by tanh, whatever the file was made of.
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "bos_token_id": token("bos"),
        "dtype": torch_name(dtype),
        "embd_pdrop": 0.0,
        "eos_token_id": token("eos"),
        "initializer_range": 0.02,
        "layer_norm_epsilon": eps,
        "model_type": shapes.architecture.model_type,
        "n_embd": shapes.hidden,
        "n_head": shapes.heads,
        "n_inner": shapes.intermediate,
        "n_layer": shapes.layers,
        "n_positions": shapes.positions,
        "pad_token_id": token("padding"),
        "resid_pdrop": 0.0,
        "tie_word_embeddings": shapes.tied,
        "torch_dtype": torch_name(dtype),
        "use_cache": true,
        "vocab_size": shapes.vocabulary,
    }) else {
        return Ok(Map::new());
    };
    Ok(config)
}

/// Sizes as config.json has them.
pub(super) fn shapes(
    architecture: &'static Architecture,
    config: &HfConfig,
) -> Result<Shapes, FormatError> {
    let size = |common: &str, own: &str| {
        let name = if config.get(common).is_some() {
            common
        } else {
            own
        };
        config.usize(name)
    };
    let hidden = size("hidden_size", "n_embd")?;
    let heads = size("num_attention_heads", "n_head")?;
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(config.unsupported("n_head", "a divisor of n_embd"));
    }
    Ok(Shapes {
        architecture,
        layers: size("num_hidden_layers", "n_layer")?,
        hidden,
        intermediate: config.opt_usize("n_inner")?.unwrap_or(4 * hidden),
        heads,
        key_value_heads: heads,
        head_dim: hidden / heads,
        vocabulary: config.usize("vocab_size")?,
        positions: size("max_position_embeddings", "n_positions")?,
        tied: config.opt_bool("tie_word_embeddings")?.unwrap_or(true),
        attention_bias: true,
        mlp_bias: true,
    })
}

/// The tensors of no layer.
pub(super) fn outside(shapes: &Shapes) -> Vec<Place> {
    let table = |name: &str, gguf: &str, rows: usize| {
        place(name, gguf, &[rows, shapes.hidden], Change::None)
    };
    let mut places = vec![
        table(
            "transformer.wte.weight",
            "token_embd.weight",
            shapes.vocabulary,
        ),
        table(
            "transformer.wpe.weight",
            "position_embd.weight",
            shapes.positions,
        ),
    ];
    places.extend(norm("transformer.ln_f", "output_norm", shapes.hidden));
    if !shapes.tied {
        places.push(table("lm_head.weight", "output.weight", shapes.vocabulary));
    }
    places
}

/// The tensors of one layer.
pub(super) fn layer(shapes: &Shapes, layer: usize) -> Vec<Place> {
    let (hidden, wide) = (shapes.hidden, shapes.intermediate);
    let sizes = [
        [3 * hidden, hidden],
        [hidden, hidden],
        [wide, hidden],
        [hidden, wide],
    ];
    let to = |name: &str| format!("transformer.h.{layer}.{name}");
    let from = |name: &str| format!("blk.{layer}.{name}");
    let linears = LINEARS.iter().zip(sizes).flat_map(|((name, gguf), shape)| {
        let (name, gguf) = (to(name), from(gguf));
        [
            ("weight", &shape[..], Change::Turned),
            ("bias", &shape[..1], Change::None),
        ]
        .map(|(part, shape, change)| {
            place(
                &format!("{name}.{part}"),
                &format!("{gguf}.{part}"),
                shape,
                change,
            )
        })
    });
    let norms = NORMS
        .iter()
        .flat_map(|(name, gguf)| norm(&to(name), &from(gguf), hidden));
    linears.chain(norms).collect()
}

fn norm(name: &str, gguf: &str, size: usize) -> [Place; 2] {
    ["weight", "bias"].map(|part| {
        place(
            &format!("{name}.{part}"),
            &format!("{gguf}.{part}"),
            &[size],
            Change::None,
        )
    })
}

fn place(name: &str, gguf: &str, shape: &[usize], change: Change) -> Place {
    Place {
        name: name.to_owned(),
        gguf: gguf.to_owned(),
        shape: shape.to_vec(),
        change,
    }
}

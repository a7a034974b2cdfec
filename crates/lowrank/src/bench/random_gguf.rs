//! A GGUF file of random blocks in the shapes of a model, to measure and test with: what it computes means nothing.

use std::path::Path;

use half::f16;
use lowrank_formats::gguf::{GgmlType, GgufSpec, KeyValue, write_gguf};

use crate::Error;
use crate::model::{Family, ModelConfig};
use crate::random::mix;

/// The scales of a format's block: where an f16 lies, and its value. With them numbers are about as large as weights are.
const SCALES: [(&str, &[(usize, f32)]); 12] = [
    ("Q4_0", &[(0, 0.004)]),
    ("Q4_1", &[(0, 0.004), (2, -0.03)]),
    ("Q5_0", &[(0, 0.002)]),
    ("Q5_1", &[(0, 0.002), (2, -0.03)]),
    ("Q8_0", &[(0, 0.0003)]),
    ("Q2_K", &[(80, 0.0015), (82, 0.002)]),
    ("Q3_K", &[(108, 0.0004)]),
    ("Q4_K", &[(0, 0.0001), (2, 0.0008)]),
    ("Q5_K", &[(0, 0.00005), (2, 0.0008)]),
    ("Q6_K", &[(208, 0.000_01)]),
    ("IQ4_NL", &[(0, 0.0004)]),
    ("IQ4_XS", &[(0, 0.000_02)]),
];

/// Rows that are made, and then written over and over: to make all of them takes longer than to write them.
const ROWS: usize = 61;

/// Writes a llama model of these shapes whose matrices are stored as `kind` says, by the layer and the name of the tensor
/// (`attn_q`, `token_embd`, …).
///
/// # Errors
/// A model of another family, rows that are not whole blocks, a file that cannot be written.
pub fn write_random_gguf<'k>(
    path: &Path,
    config: &ModelConfig,
    kind: &dyn Fn(Option<usize>, &str) -> &'k str,
) -> Result<(), Error> {
    if config.family != Family::Llama {
        return Err(Error::Settings(
            "a model of random blocks has the shapes of a llama; give such a preset".to_owned(),
        ));
    }
    let (c, wide) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.q_size(), config.kv_size());
    let mut specs = Vec::new();
    let mut add = |layer: Option<usize>, name: &str, shape: &[usize]| {
        let kind = if shape.len() == 1 {
            "F32"
        } else {
            kind(layer, name)
        };
        let before = layer
            .map(|layer| format!("blk.{layer}."))
            .unwrap_or_default();
        let kind = GgmlType::named(kind)
            .filter(|kind| kind.is_readable())
            .ok_or_else(|| {
                let readable = GgmlType::readable();
                Error::Settings(format!("{kind} is not a type that is read: {readable}"))
            })?;
        specs.push(GgufSpec {
            name: format!("{before}{name}.weight"),
            kind,
            shape: shape.to_vec(),
        });
        Ok::<_, Error>(())
    };
    add(None, "token_embd", &[config.vocab_size, c])?;
    for layer in 0..config.num_hidden_layers {
        for (name, shape) in [
            ("attn_norm", &[c][..]),
            ("attn_q", &[q, c]),
            ("attn_k", &[kv, c]),
            ("attn_v", &[kv, c]),
            ("attn_output", &[c, q]),
            ("ffn_norm", &[c]),
            ("ffn_gate", &[wide, c]),
            ("ffn_up", &[wide, c]),
            ("ffn_down", &[c, wide]),
        ] {
            add(Some(layer), name, shape)?;
        }
    }
    add(None, "output_norm", &[c])?;
    if !config.tie_word_embeddings {
        add(None, "output", &[config.vocab_size, c])?;
    }
    let keys = keys(config);
    write_gguf(path, &keys, &specs, |index, out| {
        let spec = &specs[index];
        let row_len = spec.shape.last().copied().unwrap_or(1);
        if spec.shape.len() == 1 {
            return out.write_all(&1.0_f32.to_le_bytes().repeat(row_len));
        }
        let blocks = ROWS * row_len / spec.kind.block_len();
        let rows = random_blocks(spec.kind, blocks, index as u64);
        let row = rows.len() / ROWS;
        let count: usize = spec.shape[..spec.shape.len() - 1].iter().product();
        for first in (0..count).step_by(ROWS) {
            out.write_all(&rows[..row * ROWS.min(count - first)])?;
        }
        Ok(())
    })?;
    Ok(())
}

fn random_blocks(kind: GgmlType, count: usize, seed: u64) -> Vec<u8> {
    let size = kind.block_bytes();
    let mut bytes = Vec::with_capacity(count * size + 8);
    let mut state = mix(seed, 1);
    while bytes.len() < count * size {
        state = mix(state, bytes.len() as u64);
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(count * size);
    let scales = SCALES.iter().find(|(name, _)| *name == kind.name());
    for block in bytes.chunks_exact_mut(size) {
        match (scales, kind.name()) {
            (Some((_, scales)), _) => {
                for (at, scale) in *scales {
                    let scale = f16::from_f32(*scale).to_le_bytes();
                    block[*at..*at + 2].copy_from_slice(&scale);
                }
            }
            // Floats below 1/32.
            (None, "F16") => block[1] &= 0xa7,
            (None, _) => {
                let last = block.len() - 1;
                block[last] = block[last] & 0x80 | 0x3c;
            }
        }
    }
    bytes
}

fn keys(config: &ModelConfig) -> Vec<(String, KeyValue)> {
    let size = |name: &str, value: usize| (format!("llama.{name}"), KeyValue::U32(value as u32));
    vec![
        (
            "general.architecture".to_owned(),
            KeyValue::String("llama".to_owned()),
        ),
        size("block_count", config.num_hidden_layers),
        size("context_length", config.max_position_embeddings),
        size("embedding_length", config.hidden_size),
        size("feed_forward_length", config.intermediate_size),
        size("attention.head_count", config.num_attention_heads),
        size("attention.head_count_kv", config.num_key_value_heads),
        size("rope.dimension_count", config.head_size),
        (
            "llama.attention.layer_norm_rms_epsilon".to_owned(),
            KeyValue::F32(config.norm_eps),
        ),
        ("llama.rope.freq_base".to_owned(), KeyValue::F32(10_000.0)),
    ]
}

/// How llama.cpp's Q4_K_M stores the tensors of a model with so many layers and an output of its own: attn_v and ffn_down of half of the layers, and the
/// output, in six bits, all else in four.
pub fn q4_k_m(layers: usize, layer: Option<usize>, name: &str) -> &'static str {
    let name = match layer {
        Some(layer) => format!("blk.{layer}.{name}.weight"),
        None => format!("{name}.weight"),
    };
    crate::export::q4_k_m(&name, name == "output.weight", layers)
}

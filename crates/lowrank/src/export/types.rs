//! How the tensors of a file are stored: llama.cpp's names of mixtures of types.

use lowrank_formats::gguf_model::{Place, Shapes};
use serde::{Deserialize, Serialize};

/// A type of file, as `llama-quantize` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum FileType {
    /// 32 bits
    #[cfg_attr(feature = "clap", value(name = "F32"))]
    F32,
    /// 16 bits, IEEE's
    #[cfg_attr(feature = "clap", value(name = "F16"))]
    F16,
    /// 16 bits, with f32's range
    #[cfg_attr(feature = "clap", value(name = "BF16"))]
    Bf16,
    /// 8.5 bits
    #[cfg_attr(feature = "clap", value(name = "Q8_0"))]
    #[serde(rename = "Q8_0")]
    Q8_0,
    /// 6.6 bits
    #[cfg_attr(feature = "clap", value(name = "Q6_K"))]
    #[serde(rename = "Q6_K")]
    Q6K,
    /// 5.5 bits, and 6.6 for half of attn_v and ffn_down and for the output
    #[cfg_attr(feature = "clap", value(name = "Q5_K_M", alias = "Q5_K"))]
    #[serde(rename = "Q5_K_M")]
    Q5KM,
    /// 5.5 bits, and 6.6 for the output
    #[cfg_attr(feature = "clap", value(name = "Q5_K_S"))]
    #[serde(rename = "Q5_K_S")]
    Q5KS,
    /// 6 bits in plain blocks, and 6.6 for the output
    #[cfg_attr(feature = "clap", value(name = "Q5_1"))]
    #[serde(rename = "Q5_1")]
    Q5_1,
    /// 4.5 bits, and 6.6 for half of attn_v and ffn_down and for the output
    #[cfg_attr(feature = "clap", value(name = "Q4_K_M", alias = "Q4_K"))]
    #[serde(rename = "Q4_K_M")]
    Q4KM,
    /// 5 bits in plain blocks, and 6.6 for the output
    #[cfg_attr(feature = "clap", value(name = "Q4_1"))]
    #[serde(rename = "Q4_1")]
    Q4_1,
    /// 4.5 bits in plain blocks, and 6.6 for the output
    #[cfg_attr(feature = "clap", value(name = "Q4_0"))]
    #[serde(rename = "Q4_0")]
    Q4_0,
}

impl FileType {
    /// Its number in a file (`llama_ftype`).
    pub(super) fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Q5_1 => 9,
            Self::Q4KM => 15,
            Self::Q5KS => 16,
            Self::Q5KM => 17,
            Self::Q6K => 18,
            Self::Bf16 => 32,
        }
    }

    /// Whether its numbers are in blocks.
    pub fn is_quantized(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// ggml's type of one tensor, as `llama-quantize` chooses it without an importance matrix, and whether its columns made it another one than it
    /// should be.
    pub(super) fn of(self, place: &Place, shapes: &Shapes) -> (&'static str, bool) {
        let [_, columns] = place.shape.as_slice() else {
            return ("F32", false);
        };
        let name = place.gguf.as_str();
        if name == "position_embd.weight" {
            return ("F32", false);
        }
        let is_output = name == "output.weight" || shapes.is_tied() && name == "token_embd.weight";
        let wanted = match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q6K => "Q6_K",
            Self::Q4_0 | Self::Q4_1 | Self::Q5_1 | Self::Q5KS if is_output => "Q6_K",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_1 => "Q5_1",
            Self::Q5KS => "Q5_K",
            Self::Q4KM => q4_k_m(name, is_output, shapes.layers()),
            Self::Q5KM => mixed(name, is_output, shapes.layers(), ["Q5_K", "Q6_K"]),
        };
        // Blocks of 256 do not fill such rows; neither do those of 32 that then stand in for them.
        let instead = match wanted {
            "Q6_K" if !columns.is_multiple_of(256) => "Q8_0",
            "Q5_K" if !columns.is_multiple_of(256) => "Q5_1",
            "Q4_K" if !columns.is_multiple_of(256) => "Q5_0",
            wanted => wanted,
        };
        let instead = if self.is_quantized() && !columns.is_multiple_of(32) {
            "F16"
        } else {
            instead
        };
        (instead, instead != wanted)
    }
}

/// ggml's type of a tensor in a file of the type Q4_K_M.
pub(crate) fn q4_k_m(name: &str, is_output: bool, layers: usize) -> &'static str {
    mixed(name, is_output, layers, ["Q4_K", "Q5_K"])
}

/// The same in a file of one of the types that end in M: `most` is what most tensors have, `fused` q, k and v in one.
fn mixed(
    name: &str,
    is_output: bool,
    layers: usize,
    [most, fused]: [&'static str; 2],
) -> &'static str {
    if is_output {
        return "Q6_K";
    }
    let mut parts = name.split('.').skip(1);
    let layer = parts.next().and_then(|part| part.parse().ok());
    match (layer, parts.next()) {
        (Some(layer), Some("attn_v" | "ffn_down")) if is_wide(layer, layers) => "Q6_K",
        (Some(_), Some("attn_qkv")) => fused,
        _ => most,
    }
}

/// The layers whose attn_v and ffn_down have more bits: the first and the last eighth, and every third between.
fn is_wide(layer: usize, layers: usize) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}

//! LoRA (Hu et al., 2021): W0 + (alpha/r)·B·A, in PEFT's files and words.
//!
//! GPT-2's fused `c_attn` can be adapted whole, as PEFT does, or in its parts as in the paper: the targets `c_attn.q`,
//! `c_attn.k` and `c_attn.v` each get their own A and B, which write that part's columns alone.

mod branches;
pub(super) mod inject;
pub(super) mod load;
mod method;
mod save;
mod tokens;

pub use lowrank_formats::peft::{LoraConfig, TargetModules, TokenIndices};
use serde::{Deserialize, Deserializer, Serialize};

pub use branches::{Branch, Branches, branches};
pub use inject::{Coverage, inject, parameters};
pub use load::{Loaded, load};
pub(crate) use method::NO_DROPOUT;
pub(super) use method::Spec;
pub use method::{Config, Settings};
pub use save::save;
pub(crate) use tokens::of_new_tokens;

use crate::Error;
use crate::model::{Adapter, LinearId, LinearKind, ModelConfig, families};

/// The branches of a config and its rows of tokens, all zero.
pub(super) fn lay_out(model: &ModelConfig, lora: &LoraConfig) -> Result<Adapter, Error> {
    LoraConfig::from_json(&lora.to_json())
        .map_err(|problems| Error::Settings(problems.join("\n")))?;
    let mut adapter = inject::lay_out(model, lora, &inject::choose(model, lora)?);
    tokens::add(&mut adapter, model, lora.trainable_token_indices.as_ref())
        .map_err(|problems| Error::Settings(problems.join("\n")))?;
    Ok(adapter)
}

impl InitLoraWeights {
    /// The value that `adapter_config.json` records.
    pub fn to_json(self) -> serde_json::Value {
        match self {
            Self::Gaussian => "gaussian".into(),
            Self::KaimingUniform => true.into(),
            Self::Random => false.into(),
        }
    }
}

/// How A and B begin (`init_lora_weights`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum InitLoraWeights {
    /// A ~ N(0, 1/r²), B = 0.
    #[default]
    #[serde(rename = "gaussian")]
    Gaussian,
    /// A ~ Kaiming uniform, B = 0.
    ///
    /// With a = √5.
    #[serde(rename = "true")]
    #[cfg_attr(feature = "clap", value(name = "true"))]
    KaimingUniform,
    /// Both at random, so that the adapter changes the model from the start.
    ///
    /// Each is drawn as `true` draws A. For tests.
    #[serde(rename = "false")]
    #[cfg_attr(feature = "clap", value(name = "false"))]
    Random,
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    /// A word, or a boolean as in YAML's `init_lora_weights: true`.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected gaussian, true or false")]
        enum Raw {
            Bool(bool),
            Text(String),
        }
        let text = match Raw::deserialize(deserializer)? {
            Raw::Bool(value) => value.to_string(),
            Raw::Text(text) => text,
        };
        match text.as_str() {
            "gaussian" => Ok(Self::Gaussian),
            "true" => Ok(Self::KaimingUniform),
            "false" => Ok(Self::Random),
            _ => Err(serde::de::Error::custom(format!(
                "got \"{text}\", expected gaussian, true or false"
            ))),
        }
    }
}

/// A place where LoRA can act: a linear, or a part of a fused one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// The module's name, with `.q`, `.k` or `.v` behind it for a part.
    pub(crate) name: String,
    /// The module's name in the transformers model.
    pub(crate) module: String,
    pub(crate) id: LinearId,
    pub(crate) part: Option<LinearKind>,
}

/// Every linear of the blocks, each fused one followed by its parts.
pub(crate) fn candidates(config: &ModelConfig) -> Vec<Candidate> {
    let mut all = Vec::new();
    for id in config.linears() {
        let module = families::linear_module(config, id);
        all.push(Candidate {
            name: module.clone(),
            module: module.clone(),
            id,
            part: None,
        });
        if id.kind == LinearKind::Qkv {
            for part in [LinearKind::Q, LinearKind::K, LinearKind::V] {
                if let Some(suffix) = families::fused_part(part) {
                    let name = format!("{module}.{suffix}");
                    all.push(Candidate {
                        name,
                        module: module.clone(),
                        id,
                        part: Some(part),
                    });
                }
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_is_a_word_or_a_boolean() {
        let read = |text: &str| {
            serde_json::from_str::<InitLoraWeights>(text).map_err(|error| error.to_string())
        };
        assert_eq!(read("true"), Ok(InitLoraWeights::KaimingUniform));
        assert_eq!(read("\"false\""), Ok(InitLoraWeights::Random));
        assert_eq!(read("\"gaussian\""), Ok(InitLoraWeights::Gaussian));
        assert!(
            read("\"pissa\"")
                .unwrap_err()
                .contains("expected gaussian, true or false")
        );
    }
}

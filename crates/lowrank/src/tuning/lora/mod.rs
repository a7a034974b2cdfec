//! LoRA (Hu et al., 2021): W0 + (alpha/r)·B·A, in PEFT's files and words.
//!
//! GPT-2's fused `c_attn` can be adapted whole, as PEFT does, or in its parts as in the paper: the targets `c_attn.q`,
//! `c_attn.k` and `c_attn.v` each get their own A and B, which write that part's columns alone.

mod branches;
mod initial;
pub(super) mod inject;
pub(super) mod load;
mod method;
mod save;
mod tokens;

pub use lowrank_formats::peft::{LoraConfig, TargetModules, TokenIndices};

pub use branches::{Branch, Branches, branches};
pub use initial::{InitLoraWeights, Loftq, loftq};
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

//! LoRA (Hu et al., 2021): W0 + (alpha/r)·B·A, in PEFT's files and words.
//!
//! GPT-2's fused `c_attn` can be adapted whole, as PEFT does, or in its parts as in the paper: the targets `c_attn.q`,
//! `c_attn.k` and `c_attn.v` each get their own A and B, which write that part's columns alone.

mod branches;
mod inject;
mod load;
mod save;

use lowrank_formats::peft::{LoraConfig, ModuleNames, TargetModules};
use serde::{Deserialize, Serialize};

pub use branches::{Branch, Branches, branches};
pub use inject::{Coverage, inject, parameters};
pub use load::{Loaded, load};
pub use save::save;

use crate::Error;
use crate::model::Adapter;
use crate::model::{LinearId, LinearKind, ModelConfig, families};

/// The branches of a config, all zero.
pub(super) fn lay_out(model: &ModelConfig, lora: &LoraConfig) -> Result<Adapter, Error> {
    LoraConfig::from_json(&lora.to_json())
        .map_err(|problems| Error::Settings(problems.join("\n")))?;
    Ok(inject::lay_out(model, lora, &inject::choose(model, lora)?))
}

/// Which modules a list of targets names (`target_modules`, `exclude_modules`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Targets {
    /// `"all-linear"`, or a regular expression that matches a whole module name.
    Pattern(String),
    /// Names: a module matches an entry that it equals or ends in, after a dot.
    Names(Vec<String>),
}

impl Targets {
    /// As PEFT's `target_modules`.
    pub fn to_target_modules(&self) -> TargetModules {
        match self {
            Self::Pattern(text) if text == "all-linear" => TargetModules::AllLinear,
            Self::Pattern(text) => TargetModules::Regex(text.clone()),
            Self::Names(names) => TargetModules::List(names.clone()),
        }
    }

    /// As PEFT's `exclude_modules`.
    pub fn to_module_names(&self) -> ModuleNames {
        match self {
            Self::Pattern(text) => ModuleNames::Regex(text.clone()),
            Self::Names(names) => ModuleNames::List(names.clone()),
        }
    }
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum InitLoraWeights {
    /// A ~ N(0, 1/r²), B = 0.
    #[default]
    #[serde(rename = "gaussian")]
    Gaussian,
    /// A ~ Kaiming uniform with a = √5, B = 0.
    #[serde(rename = "true")]
    KaimingUniform,
    /// Both as `true` draws A: the branch does something from the first step, for tests.
    #[serde(rename = "false")]
    Random,
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

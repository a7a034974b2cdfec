//! What is trained: the method, and the options that decide which values those are.
//!
//! `lowrank train`, `lowrank plan` and `lowrank bench train` have these settings in common.

use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Args};
use lowrank::train::TrainConfig;
use lowrank::tuning::lora::Targets;
use lowrank::tuning::{Method, adapter, prefix};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::values::{parse_pattern, pattern_map};
use super::{flag, object};
use crate::failure::Misuse;

/// Heading of LoRA's flags.
pub const LORA: &str = "LoRA";
/// Heading of the other methods' flags.
pub const OTHERS: &str = "Other methods";

/// A method with its options.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct MethodSettings {
    /// What is trained
    #[arg(long, value_name = "METHOD", default_value = "lora")]
    pub method: Method,

    /// Rank of the matrices A and B
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = LORA)]
    pub r: usize,

    /// Modules to adapt: names (q_proj,v_proj), a regular expression for the whole name, or all-linear; GPT-2's fused
    /// c_attn also goes in parts (c_attn.q,c_attn.v) [default: the family's q and v]
    #[arg(long, value_name = "MODULES", help_heading = LORA)]
    pub target_modules: Option<Targets>,

    /// Modules to leave out: names, or a regular expression
    #[arg(long, value_name = "MODULES", help_heading = LORA)]
    pub exclude_modules: Option<Targets>,

    /// Another r for modules that match a pattern; may be repeated
    #[arg(long, value_name = "PATTERN=N", value_parser = parse_pattern::<usize>, help_heading = LORA)]
    #[serde(with = "pattern_map")]
    pub rank_pattern: Vec<(String, usize)>,

    /// Train so many of the last blocks, and the final norm [default: 2]
    #[arg(long, value_name = "N", help_heading = OTHERS)]
    pub top_layers: Option<usize>,

    /// Train the output projection alone; a tied one is untied (method top)
    #[arg(long, value_name = "BOOL", help_heading = OTHERS, action = ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value_t = false, hide_default_value = true,
        hide_possible_values = true)]
    pub head_only: bool,

    /// Where adapter layers stand
    #[arg(long, value_name = "KIND", default_value = "houlsby", help_heading = OTHERS)]
    pub adapter_kind: adapter::Kind,

    /// Width of adapter layers
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = OTHERS)]
    pub bottleneck: usize,

    /// What virtual tokens are (method prefix)
    #[arg(long, value_name = "KIND", default_value = "layer", help_heading = OTHERS)]
    pub prefix_kind: prefix::Kind,

    /// Virtual tokens before every sequence
    #[arg(long, value_name = "N", default_value_t = 20, help_heading = OTHERS)]
    pub num_virtual_tokens: usize,

    /// Virtual tokens between prompt and completion, with the kind embedding
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = OTHERS)]
    pub infix_tokens: usize,
}

impl MethodSettings {
    /// A run's settings with these, and all others as they are by default.
    ///
    /// # Errors
    /// When a flag of one method stands beside another, which would do nothing.
    pub fn train_config(&self, model: &str, matches: &ArgMatches) -> anyhow::Result<TrainConfig> {
        let method = self.method;
        let mut problems = Misuse::default();
        for id in matches.ids() {
            let typed = matches.value_source(id.as_str()) == Some(ValueSource::CommandLine);
            problems.require(!typed || method.reads(id.as_str()), || {
                format!(
                    "{} does nothing with the method {}; leave it out",
                    flag(id.as_str()),
                    method.title()
                )
            });
        }
        problems.or(())?;
        let defaults = TrainConfig::new(method, model, "", "");
        let mut values = object(&defaults).map_err(anyhow::Error::msg)?;
        values.extend(object(self).map_err(anyhow::Error::msg)?);
        Ok(serde_json::from_value(Value::Object(values))?)
    }
}

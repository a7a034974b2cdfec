//! From the settings of a run to what its method trains.

use lowrank_formats::peft::{LoraConfig, TargetModules};
use lowrank_kernels::Layout;

use super::config::TrainConfig;
use crate::Error;
use crate::model::Adapter;
use crate::model::{ModelConfig, families};
use crate::tuning::lora::Targets;
use crate::tuning::{self, AdapterConfig, Method};

impl TrainConfig {
    /// What a run with these settings trains, as shapes without values: nothing is loaded or allocated.
    ///
    /// # Errors
    /// Options that do not fit the model; an adapter to start from that cannot be used.
    pub fn lay_out(&self, model: &ModelConfig) -> Result<Adapter, Error> {
        if let Some(folder) = &self.init_adapter {
            return Ok(tuning::load(folder, model)?.adapter);
        }
        let options = match self.method {
            Method::Full => None,
            Method::Lora => Some(AdapterConfig::Lora(Box::new(self.lora_config(model)))),
            Method::Top => Some(AdapterConfig::Top(self.top_options())),
            Method::Bitfit => Some(AdapterConfig::Bitfit),
            Method::Adapter => Some(AdapterConfig::Adapter(self.adapter_options())),
            Method::Prefix => Some(AdapterConfig::Prefix(self.prefix_options())),
        };
        tuning::lay_out(model, options.as_ref())
    }

    /// PEFT's config for the settings of a run.
    pub(super) fn lora_config(&self, model: &ModelConfig) -> LoraConfig {
        let family = model.family;
        let defaults = || {
            families::default_targets(family)
                .iter()
                .map(ToString::to_string)
                .collect()
        };
        LoraConfig {
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            target_modules: self.target_modules.as_ref().map_or_else(
                || TargetModules::List(defaults()),
                Targets::to_target_modules,
            ),
            exclude_modules: self.exclude_modules.as_ref().map(Targets::to_module_names),
            fan_in_fan_out: model.layout == Layout::InOut,
            use_rslora: self.use_rslora,
            init_lora_weights: self.init_lora_weights.to_json(),
            rank_pattern: self
                .rank_pattern
                .iter()
                .map(|(key, r)| (key.clone(), *r))
                .collect(),
            alpha_pattern: self
                .alpha_pattern
                .iter()
                .map(|(key, alpha)| (key.clone(), *alpha))
                .collect(),
            base_model_name_or_path: Some(self.model.clone()),
            task_type: Some("CAUSAL_LM".to_owned()),
            ..LoraConfig::default()
        }
    }
}

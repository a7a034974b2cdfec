//! Biases alone (Ben Zaken, Ravfogel and Goldberg, 2022).
//!
//! A model that has biases trains its own, those of layer norms among them. One that has none, as Llama, gets a bias at
//! zero on every linear of its blocks.

use std::path::Path;

use lowrank_formats::hf_config::HfConfig;
use serde_json::Value;

use super::files::{check_keys, finish, write_both};
use super::{
    AdapterConfig, BaseMark, Loaded, MethodConfig, MethodOptions, MethodSpec, Started, Starting,
};
use crate::Error;
use crate::fields::{Field, fields};
use crate::model::{Adapter, ModelConfig, Part, WeightId, Weights};

/// `peft_type` in adapter_config.json.
const PEFT_TYPE: &str = "LOWRANK_BITFIT";

fields! {
    /// It has no options: every bias is trained.
    pub struct Settings {}
}

/// Its files say nothing but their type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config;

/// BitFit in the table of methods.
pub(super) struct Spec;

impl MethodSpec for Spec {
    fn title(&self) -> &'static str {
        "BitFit"
    }

    fn help(&self) -> &'static str {
        "Biases alone; zeros are added where the model has none"
    }

    fn learning_rate(&self) -> f64 {
        1e-3
    }

    fn fields(&self) -> Vec<Field> {
        Vec::new()
    }

    fn label(&self, _: &MethodOptions) -> String {
        "BitFit".to_owned()
    }

    fn lay_out(&self, _: &MethodOptions, model: &ModelConfig) -> Result<Adapter, Error> {
        Ok(lay_out(model))
    }

    fn start(&self, _: &MethodOptions, with: &Starting) -> Result<Started, Error> {
        Ok(Started {
            adapter: inject(with.decoder.weights()),
            coverage: Some(coverage(with.decoder.config())),
            config: Some(AdapterConfig::Bitfit(Config)),
        })
    }

    fn peft_types(&self) -> &'static [&'static str] {
        &[PEFT_TYPE]
    }

    fn load(&self, folder: &Path, raw: &HfConfig, model: &ModelConfig) -> Result<Loaded, Error> {
        check_keys(raw, &[])?;
        let config = AdapterConfig::Bitfit(Config);
        finish(folder, model, lay_out(model), config, coverage(model))
    }
}

impl MethodConfig for Config {
    fn save(
        &self,
        folder: &Path,
        model: &ModelConfig,
        adapter: &Adapter,
        base: BaseMark,
    ) -> Result<(), Error> {
        write_both(folder, PEFT_TYPE, self.options(), (model, adapter), base)
    }

    fn options(&self) -> Vec<(&'static str, Value)> {
        Vec::new()
    }
}

/// The base's biases, or zeros where it has none.
pub fn inject(weights: &Weights) -> Adapter {
    let mut adapter = lay_out(weights.config());
    adapter.copy_base(weights);
    adapter
}

/// Number of trained values.
pub fn parameters(config: &ModelConfig) -> usize {
    biases(config).iter().map(|(_, (_, cols))| cols).sum()
}

fn lay_out(config: &ModelConfig) -> Adapter {
    Adapter::replacing(config, &biases(config))
}

/// What is trained, in words.
fn coverage(config: &ModelConfig) -> String {
    let biases = biases(config);
    let whose = if has_own(config) {
        "of the model's own"
    } else {
        "added"
    };
    format!(
        "{} biases {whose}, {} trainable parameters",
        biases.len(),
        parameters(config)
    )
}

fn is_bias(id: WeightId) -> bool {
    matches!(
        id,
        WeightId::Linear(_, Part::Bias)
            | WeightId::Norm(_, _, Part::Bias)
            | WeightId::EmbeddingNorm(Part::Bias)
            | WeightId::RelativeNorm(Part::Bias)
            | WeightId::FinalNorm(Part::Bias)
    )
}

/// Whether the model has biases of its own. That of a classifier is none: it is trained in any case.
fn has_own(config: &ModelConfig) -> bool {
    let weights = config.weights();
    let mut ids = weights.iter().map(|(id, _)| *id);
    ids.any(|id| is_bias(id) && !config.is_of_classifier(id))
}

fn biases(config: &ModelConfig) -> Vec<(WeightId, (usize, usize))> {
    if has_own(config) {
        let all = config.weights().into_iter();
        return all.filter(|(id, _)| is_bias(*id)).collect();
    }
    config
        .linears()
        .map(|id| {
            let (_, output) = config.linear_shape(id.kind);
            (WeightId::Linear(id, Part::Bias), (1, output))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Purpose;
    use crate::plan::presets;

    #[test]
    fn the_bias_of_a_classifier_is_not_the_models_own() {
        let purpose = Purpose::TokenClassifier { labels: 5 };
        for preset in ["smollm2-135m", "modernbert-base"] {
            let config = presets::config_for(preset, purpose).unwrap();
            assert_eq!(biases(&config).len(), config.linears().count(), "{preset}");
        }
        let bert = presets::config_for("bert-base", purpose).unwrap();
        assert!(biases(&bert).len() > bert.linears().count());
    }
}

//! The last blocks with the final norm, or the output projection alone: what was tuned where not all could be.
//!
//! Tied embeddings are untied for the head: it begins as the embedding, which stays as it is.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;
use serde_json::Value;

use super::files::check_keys;
use crate::Error;
use crate::model::Adapter;
use crate::model::{ModelConfig, WeightId, Weights};

/// `peft_type` in adapter_config.json.
pub(super) const PEFT_TYPE: &str = "LOWRANK_TOP";

/// Blocks that are trained where nothing is said.
pub const DEFAULT_LAYERS: usize = 2;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Options {
    /// So many of the last blocks, and the final norm (`top_layers`).
    Layers(usize),
    /// The output projection (`head_only`).
    Head,
}

impl Options {
    /// Keys of adapter_config.json.
    pub(super) fn to_json(self) -> Vec<(&'static str, Value)> {
        match self {
            Self::Layers(layers) => vec![("top_layers", layers.into())],
            Self::Head => vec![("head_only", true.into())],
        }
    }
}

pub(super) fn read(raw: &HfConfig, model: &ModelConfig) -> Result<Options, FormatError> {
    check_keys(raw, &["head_only", "top_layers"])?;
    let head = raw.opt_bool("head_only")?.unwrap_or(false);
    match (head, raw.opt_usize("top_layers")?) {
        (true, None) => Ok(Options::Head),
        (true, Some(_)) => Err(raw.unsupported("top_layers", "nothing beside head_only")),
        (false, Some(layers)) if (1..=model.num_hidden_layers).contains(&layers) => {
            Ok(Options::Layers(layers))
        }
        (false, _) => {
            let most = model.num_hidden_layers;
            Err(raw.unsupported("top_layers", format!("a number of blocks from 1 to {most}")))
        }
    }
}

/// The base's values of what is trained.
///
/// # Errors
/// More blocks than the model has.
pub fn inject(weights: &Weights, options: Options) -> Result<Adapter, Error> {
    let mut adapter = lay_out(weights.config(), options)?;
    adapter.copy_base(weights);
    Ok(adapter)
}

/// Number of trained values.
pub fn parameters(config: &ModelConfig, options: &Options) -> usize {
    let sizes = chosen(config, *options).into_iter();
    sizes.map(|(_, (rows, cols))| rows * cols).sum()
}

pub(super) fn lay_out(config: &ModelConfig, options: Options) -> Result<Adapter, Error> {
    if let Options::Layers(layers) = options
        && !(1..=config.num_hidden_layers).contains(&layers)
    {
        return Err(Error::Settings(format!(
            "top_layers is {layers}, and the model has {} blocks; give a number from 1 to that, or train everything with the method full",
            config.num_hidden_layers
        )));
    }
    Ok(Adapter::replacing(config, &chosen(config, options)))
}

/// What is trained, in words.
pub(crate) fn coverage(config: &ModelConfig, options: Options) -> String {
    let parameters = parameters(config, &options);
    match options {
        Options::Layers(layers) => format!(
            "the last {layers} of {} blocks and the final norm, {parameters} trainable parameters",
            config.num_hidden_layers
        ),
        Options::Head => format!("the output projection, {parameters} trainable parameters"),
    }
}

fn chosen(config: &ModelConfig, options: Options) -> Vec<(WeightId, (usize, usize))> {
    match options {
        Options::Head => vec![(WeightId::Head, (config.vocab_size, config.hidden_size))],
        Options::Layers(layers) => {
            let from = config.num_hidden_layers.saturating_sub(layers);
            let is_trained = |id: &WeightId| match id {
                WeightId::Linear(linear, _) => linear.layer >= from,
                WeightId::Norm(layer, ..) => *layer >= from,
                WeightId::FinalNorm(_) => true,
                WeightId::Embedding | WeightId::Positions | WeightId::Head => false,
            };
            let all = config.weights().into_iter();
            all.filter(|(id, _)| is_trained(id)).collect()
        }
    }
}

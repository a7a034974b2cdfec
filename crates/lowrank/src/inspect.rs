//! What a model or an adapter is made of: `model inspect` and `adapter inspect`.

use std::collections::BTreeMap;
use std::path::Path;

use lowrank_formats::checkpoint::Checkpoint;
use lowrank_kernels::frobenius_norm;
use serde::Serialize;

use crate::Error;
use crate::base::Source;
use crate::merge;
use crate::model::{Decoder, Part, Position, RopeScaling, WeightId, families};
use crate::tuning::Adapter;

/// A model, as its files say.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelSummary {
    /// `model_type`.
    pub family: String,
    /// Parameters; a tied head is counted once.
    pub parameters: usize,
    /// Bytes of the stored weights.
    pub bytes: u64,
    /// Number of tensors of each stored type.
    pub dtypes: BTreeMap<String, usize>,
    /// The config's shapes and choices, named as in config.json.
    pub config: Vec<(&'static str, String)>,
    /// Every tensor: name, type, shape.
    pub tensors: Vec<TensorSummary>,
}

/// A stored tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TensorSummary {
    /// Its name in the file.
    pub name: String,
    /// Its stored type.
    pub dtype: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

/// Reads what a model is made of, without loading its weights.
///
/// # Errors
/// Files that are missing or damaged, an architecture that is not supported.
pub fn model(source: &Source) -> Result<ModelSummary, Error> {
    let config = families::read_config(&source.config()?)?;
    let checkpoint = source.checkpoint()?;
    let tensors = tensors(&checkpoint);
    let mut dtypes = BTreeMap::new();
    for tensor in &tensors {
        *dtypes.entry(tensor.dtype.clone()).or_insert(0) += 1;
    }
    let position = match &config.position {
        Position::Learned => "learned".to_owned(),
        Position::Rope(rope) => {
            let scaling = match rope.scaling {
                RopeScaling::None => "default",
                RopeScaling::Linear { .. } => "linear",
                RopeScaling::Llama3 { .. } => "llama3",
            };
            format!("rope, theta {}, {scaling}", rope.theta)
        }
    };
    let number = |n: usize| n.to_string();
    let window = config.sliding_window.map_or_else(|| "none".to_owned(), |w| w.to_string());
    Ok(ModelSummary {
        family: config.family.model_type().to_owned(),
        parameters: config.parameters(),
        bytes: checkpoint.total_bytes(),
        dtypes,
        config: vec![
            ("vocab_size", number(config.vocab_size)),
            ("hidden_size", number(config.hidden_size)),
            ("intermediate_size", number(config.intermediate_size)),
            ("num_hidden_layers", number(config.num_hidden_layers)),
            ("num_attention_heads", number(config.num_attention_heads)),
            ("num_key_value_heads", number(config.num_key_value_heads)),
            ("head_dim", number(config.head_size)),
            ("max_position_embeddings", number(config.max_position_embeddings)),
            ("position", position),
            ("sliding_window", window),
            ("tie_word_embeddings", config.tie_word_embeddings.to_string()),
        ],
        tensors,
    })
}

fn tensors(checkpoint: &Checkpoint) -> Vec<TensorSummary> {
    checkpoint
        .names()
        .filter_map(|name| checkpoint.get(name))
        .map(|entry| TensorSummary { dtype: entry.dtype.to_string(), name: entry.name, shape: entry.shape })
        .collect()
}

/// What an adapter does to one linear.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModuleChange {
    /// The module's name.
    pub module: String,
    /// Rank of the change (of all parts of a fused linear together).
    pub r: usize,
    /// The factor of B·A.
    pub scale: f32,
    /// ‖ΔW‖_F
    pub delta_norm: f64,
    /// ‖ΔW‖_F / ‖W‖_F
    pub relative_norm: f64,
    /// Trained values.
    pub parameters: usize,
}

/// What an adapter does to each linear of its base, in the model's order.
pub fn adapter(model: &Decoder, adapter: &Adapter) -> Vec<ModuleChange> {
    let config = model.config();
    config
        .linears()
        .filter_map(|id| {
            let sites = adapter.low_rank.get(&id)?;
            let delta_norm = frobenius_norm(merge::delta(model, adapter, id).view());
            let weight_norm = frobenius_norm(model.weights().view(WeightId::Linear(id, Part::Weight)));
            let size = |slot: usize| {
                let (rows, cols) = adapter.params.shape(slot);
                rows * cols
            };
            Some(ModuleChange {
                module: families::linear_module(config, id),
                r: sites.iter().map(|site| adapter.params.shape(site.a).0).sum(),
                scale: sites[0].scale,
                delta_norm,
                relative_norm: delta_norm / weight_norm,
                parameters: sites.iter().map(|site| size(site.a) + size(site.b)).sum(),
            })
        })
        .collect()
}

/// Bytes of the files of a folder, not of its folders.
pub fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries.flatten().filter_map(|entry| entry.metadata().ok()).filter(std::fs::Metadata::is_file).map(|m| m.len()).sum()
}

//! What a model and an adapter are made of, as plain data.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lowrank_kernels::{Tensor, View, add_assign, embedding_forward, frobenius_norm, scale};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::Error;
use crate::base::{Network, Source};
use crate::merge::{delta, merged_weight};
use crate::model::{Adapter, Decoder, HeadKind, LinearId, Part, WeightId, families};
use crate::tuning::{Loaded, Method};

/// A model without its values: only headers are read.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelReport {
    /// The folder, or the name of the built-in model.
    pub model: String,
    /// `model_type` of config.json.
    pub family: &'static str,
    /// Values of all tensors; a tied head is counted once.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bytes by element type.
    pub dtypes: BTreeMap<String, u64>,
    /// What config.json says of the shapes, under its own names.
    pub shapes: Vec<(&'static str, usize)>,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Tokens that the tokenizer knows; `None` where the folder has none.
    pub tokenizer_tokens: Option<usize>,
    /// Whether conversations can be written.
    pub chat_template: bool,
    /// Modules that LoRA adapts where nothing is said.
    pub default_targets: Vec<&'static str>,
    /// Every tensor, sorted by name.
    pub tensors: Vec<TensorReport>,
}

/// A tensor of a model's file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorReport {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its element type.
    pub dtype: String,
}

/// Reads what there is to know about a model without loading it.
///
/// # Errors
/// Files that are missing or damaged, and an architecture that is not supported.
pub fn model(source: &Source) -> Result<ModelReport, Error> {
    let config = source.model_config()?;
    let stored = source.tensors()?;
    let mut dtypes = BTreeMap::new();
    let mut tensors = Vec::new();
    for name in stored.names() {
        let Ok(Some(tensor)) = stored.find(name) else {
            continue;
        };
        let dtype = tensor.type_name().to_owned();
        *dtypes.entry(dtype.clone()).or_insert(0) += tensor.bytes().as_ref().len() as u64;
        tensors.push(TensorReport {
            name: name.to_owned(),
            shape: tensor.shape().to_vec(),
            dtype,
        });
    }
    // An encoder is listed with whatever its files have on it: a pooler, a classifier, what it was pretrained with.
    let parameters = if config.head == HeadKind::None {
        let tensors = tensors.iter();
        let own = tensors.filter(|tensor| !families::is_derived(&tensor.name));
        own.map(|tensor| tensor.shape.iter().product::<usize>())
            .sum()
    } else {
        config.parameters()
    };
    // A folder without a tokenizer can still be looked at.
    let tokenizer = source.tokenizer().ok();
    Ok(ModelReport {
        model: source.to_string(),
        family: config.family.model_type(),
        parameters: parameters as u64,
        bytes: stored.total_bytes(),
        dtypes,
        shapes: vec![
            ("num_hidden_layers", config.num_hidden_layers),
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_attention_heads", config.num_attention_heads),
            ("num_key_value_heads", config.num_key_value_heads),
            ("head_dim", config.head_size),
            ("vocab_size", config.vocab_size),
            ("max_position_embeddings", config.max_position_embeddings),
        ],
        tie_word_embeddings: config.tie_word_embeddings,
        tokenizer_tokens: tokenizer.as_ref().map(crate::data::Tokenizer::vocab_size),
        chat_template: tokenizer
            .as_ref()
            .is_some_and(crate::data::Tokenizer::has_chat_template),
        default_targets: families::default_targets(config.family).to_vec(),
        tensors,
    })
}

/// What an adapter changes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdapterReport {
    /// The folder.
    pub adapter: String,
    /// The model that it was laid beside here.
    pub model: String,
    /// What trained it.
    pub method: Method,
    /// The method's options, under the names of adapter_config.json.
    #[serde(flatten)]
    pub options: Map<String, Value>,
    /// What the outputs of its classifier mean, where it has one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// Values of the adapter.
    pub parameters: u64,
    /// Bytes of the folder's adapter files.
    pub bytes: u64,
    /// Whether the model is the one that the adapter was trained on; `None` where the adapter does not say.
    pub base_matches: Option<bool>,
    /// The modules that it changes, in the model's order.
    pub modules: Vec<ModuleReport>,
}

/// What an adapter does at one place.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModuleReport {
    /// The module's or the tensor's name.
    pub module: String,
    /// Its rank, or the width of an adapter layer; of a fused linear whose parts are adapted, the sum of theirs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r: Option<usize>,
    /// What B·A is multiplied with; of several parts, the largest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f32>,
    /// Values of the adapter here.
    pub parameters: u64,
    /// ‖ΔW‖_F / ‖W‖_F; `None` where the base has nothing.
    pub relative_change: Option<f64>,
}

/// Measures an adapter that was loaded from `folder` against its base.
///
/// # Errors
/// When the folder's files cannot be looked at.
pub fn adapter(folder: &Path, loaded: &Loaded, base: &Network) -> Result<AdapterReport, Error> {
    let model = &base.decoder;
    let mut bytes = 0;
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let path = folder.join(name);
        bytes += std::fs::metadata(&path).map_err(Error::io(&path))?.len();
    }
    let recorded = loaded.base_fingerprint.as_ref();
    Ok(AdapterReport {
        adapter: folder.display().to_string(),
        model: base.source.to_string(),
        method: loaded.config.method(),
        options: loaded.config.options(),
        labels: base
            .labels
            .as_ref()
            .map_or_else(Vec::new, |labels| labels.names.clone()),
        parameters: loaded.adapter.parameters() as u64,
        bytes,
        base_matches: recorded.map(|recorded| *recorded == model.weights().fingerprint()),
        modules: modules(model, &loaded.adapter),
    })
}

/// Every place that the adapter acts at, in the model's order.
fn modules(model: &Decoder, adapter: &Adapter) -> Vec<ModuleReport> {
    let params = &adapter.params;
    let size = |slot: usize| {
        let (rows, columns) = params.shape(slot);
        (rows * columns) as u64
    };
    let relative = |change: f64, stored: View| {
        let mut weight = Tensor::zeros(stored.rows(), stored.cols());
        weight.view_mut().copy_from(stored);
        let norm = frobenius_norm(weight.view());
        (norm > 0.0).then_some(change / norm)
    };
    let changed = adapter.low_rank.keys().chain(adapter.scaled.keys());
    let changed: BTreeSet<LinearId> = changed.copied().collect();
    let linears = changed.into_iter().map(|id| {
        let stored = model.weights().view(WeightId::Linear(id, Part::Weight));
        let branches = adapter.low_rank.get(&id).map_or(&[][..], Vec::as_slice);
        let factors = adapter.scaled.get(&id);
        let change = if factors.is_some() {
            let mut change = merged_weight(model, adapter, id);
            let mut base = Tensor::zeros(stored.rows(), stored.cols());
            base.view_mut().copy_from(stored);
            scale(base.view_mut(), -1.0);
            add_assign(change.view_mut(), base.view());
            change
        } else {
            delta(model, adapter, id)
        };
        let has_branches = !branches.is_empty();
        let ranks = branches.iter().map(|site| params.shape(site.a).0).sum();
        let scales = branches.iter().map(|site| site.scale).fold(0.0, f32::max);
        let of_branches = branches.iter().flat_map(|site| [site.a, site.b]);
        let of_factors = factors.into_iter().flat_map(|at| [at.input, at.output]);
        ModuleReport {
            module: families::linear_module(model.config(), id),
            r: has_branches.then_some(ranks),
            scale: has_branches.then_some(scales),
            parameters: of_branches
                .chain(of_factors.flatten())
                .chain(adapter.magnitudes.get(&id).copied())
                .map(size)
                .sum(),
            relative_change: relative(frobenius_norm(change.view()), stored),
        }
    });
    let mut replaced: Vec<_> = adapter.replaced.iter().collect();
    replaced.sort_unstable_by_key(|(_, slot)| **slot);
    let replaced = replaced.into_iter().map(|(&id, &slot)| {
        let tied = id == WeightId::Head && model.config().tie_word_embeddings;
        let base = if tied { WeightId::Embedding } else { id };
        ModuleReport {
            module: families::tensor_name(model.config(), id),
            r: None,
            scale: None,
            parameters: size(slot),
            relative_change: model.weights().stored(base).and_then(|stored| {
                let mut change = Tensor::zeros(stored.rows(), stored.cols());
                change.view_mut().copy_from(stored);
                scale(change.view_mut(), -1.0);
                add_assign(change.view_mut(), params.view(slot));
                relative(frobenius_norm(change.view()), stored)
            }),
        }
    });
    let mut bottlenecks: Vec<_> = adapter.bottleneck.iter().collect();
    bottlenecks.sort_unstable_by_key(|(place, _)| **place);
    let bottlenecks = bottlenecks
        .into_iter()
        .map(|(&(layer, place), site)| ModuleReport {
            module: families::bottleneck_module(model.config(), layer, place),
            r: Some(params.shape(site.down.0).0),
            scale: None,
            parameters: site.slots().map(size).sum(),
            relative_change: None,
        });
    let sites = &adapter.virtual_tokens;
    let keys = sites.key_values.iter().flat_map(|(k, v)| [*k, *v]);
    let virtual_tokens = keys.chain(sites.prefix).chain(sites.infix);
    let virtual_tokens = virtual_tokens.map(|slot| ModuleReport {
        module: adapter.names[slot].clone(),
        r: None,
        scale: None,
        parameters: size(slot),
        relative_change: None,
    });
    linears
        .chain(replaced)
        .chain(token_rows(model, adapter))
        .chain(bottlenecks)
        .chain(virtual_tokens)
        .collect()
}

/// Rows of tokens, a table each, with their change beside the model's own rows.
fn token_rows(model: &Decoder, adapter: &Adapter) -> Vec<ModuleReport> {
    let params = &adapter.params;
    let reports = adapter.token_rows.tables().map(|(id, rows)| {
        let tied = id == WeightId::Head && model.config().tie_word_embeddings;
        let table = model.weights();
        let table = table.view(if tied { WeightId::Embedding } else { id });
        let mut base = Tensor::zeros(rows.ids().len(), table.cols());
        embedding_forward(base.view_mut(), rows.ids(), table, false);
        let norm = frobenius_norm(base.view());
        scale(base.view_mut(), -1.0);
        add_assign(base.view_mut(), params.view(rows.slot()));
        ModuleReport {
            module: adapter.names[rows.slot()].clone(),
            r: None,
            scale: None,
            parameters: params.view(rows.slot()).len() as u64,
            relative_change: (norm > 0.0).then(|| frobenius_norm(base.view()) / norm),
        }
    });
    reports.collect()
}

//! What a model and an adapter are made of, as plain data.

use std::collections::BTreeMap;
use std::path::Path;

use lowrank_formats::peft::LoraConfig;
use lowrank_kernels::{Tensor, frobenius_norm};
use serde::Serialize;

use crate::Error;
use crate::base::{Base, Source};
use crate::merge::delta;
use crate::model::{LinearId, Part, WeightId, families};
use crate::tuning::lora::Loaded;

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
    let config = families::read_config(&source.config()?)?;
    let checkpoint = source.checkpoint()?;
    let mut dtypes = BTreeMap::new();
    let mut tensors = Vec::with_capacity(checkpoint.len());
    for entry in checkpoint.names().filter_map(|name| checkpoint.get(name)) {
        *dtypes.entry(entry.dtype.name().to_owned()).or_insert(0) +=
            entry.bytes.as_ref().len() as u64;
        tensors.push(TensorReport {
            dtype: entry.dtype.name().to_owned(),
            name: entry.name,
            shape: entry.shape,
        });
    }
    // A folder without a tokenizer can still be looked at.
    let tokenizer = source.tokenizer().ok();
    Ok(ModelReport {
        model: source.to_string(),
        family: config.family.model_type(),
        parameters: config.parameters() as u64,
        bytes: checkpoint.total_bytes(),
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
    /// `r` of adapter_config.json.
    pub r: usize,
    /// `lora_alpha` of adapter_config.json.
    pub lora_alpha: f64,
    /// `target_modules` of adapter_config.json.
    pub target_modules: String,
    /// Whether it scales by lora_alpha / √r.
    pub use_rslora: bool,
    /// Values of the adapter.
    pub parameters: u64,
    /// Bytes of the folder's adapter files.
    pub bytes: u64,
    /// Whether the model is the one that the adapter was trained on; `None` where the adapter does not say.
    pub base_matches: Option<bool>,
    /// The modules that it changes, in the model's order.
    pub modules: Vec<ModuleReport>,
}

/// What an adapter does to one linear.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModuleReport {
    /// The module's name.
    pub module: String,
    /// Its rank; of a fused linear whose parts are adapted, the sum of theirs.
    pub r: usize,
    /// What B·A is multiplied with; of several parts, the largest.
    pub scale: f32,
    /// Values of A and B.
    pub parameters: u64,
    /// ‖ΔW‖_F / ‖W‖_F.
    pub relative_change: f64,
}

/// The base model that an adapter's config names, if it names one.
///
/// # Errors
/// A config that is missing, damaged, or of an adapter that is not supported.
pub fn base_of(adapter: &Path) -> Result<Option<String>, Error> {
    Ok(LoraConfig::read(adapter)?.base_model_name_or_path)
}

/// Measures an adapter that was loaded from `folder` against its base.
///
/// # Errors
/// When the folder's files cannot be looked at.
pub fn adapter(folder: &Path, loaded: &Loaded, base: &Base) -> Result<AdapterReport, Error> {
    let model = &base.decoder;
    let mut linears: Vec<LinearId> = loaded.adapter.low_rank.keys().copied().collect();
    linears.sort_unstable();
    let modules = linears.into_iter().map(|id| {
        let sites = &loaded.adapter.low_rank[&id];
        let params = &loaded.adapter.params;
        let size = |slot: usize| {
            let (rows, columns) = params.shape(slot);
            (rows * columns) as u64
        };
        let stored = model.weights().view(WeightId::Linear(id, Part::Weight));
        let mut weight = Tensor::zeros(stored.rows(), stored.cols());
        weight.view_mut().copy_from(stored);
        ModuleReport {
            module: families::linear_module(model.config(), id),
            r: sites.iter().map(|site| params.shape(site.a).0).sum(),
            scale: sites.iter().map(|site| site.scale).fold(0.0, f32::max),
            parameters: sites.iter().map(|site| size(site.a) + size(site.b)).sum(),
            relative_change: frobenius_norm(delta(model, &loaded.adapter, id).view())
                / frobenius_norm(weight.view()),
        }
    });
    let modules = modules.collect();
    let mut bytes = 0;
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let path = folder.join(name);
        bytes += std::fs::metadata(&path).map_err(Error::io(&path))?.len();
    }
    let recorded = loaded.base_fingerprint.as_ref();
    Ok(AdapterReport {
        adapter: folder.display().to_string(),
        model: base.source.to_string(),
        r: loaded.config.r,
        lora_alpha: loaded.config.lora_alpha,
        target_modules: loaded.config.target_modules.to_string(),
        use_rslora: loaded.config.use_rslora,
        parameters: loaded.adapter.parameters() as u64,
        bytes,
        base_matches: recorded.map(|recorded| *recorded == model.weights().fingerprint()),
        modules,
    })
}

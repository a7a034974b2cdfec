//! Folding an adapter into its base: W0 + scale·B·A in f32, rounded once, proved on text before it is kept.
//!
//! The proof compares logits of the merged model as it would be loaded with those of the unmerged model in f32. In f32 the
//! difference must stay under [`F32_LIMIT`]; in 16 bit it must stay under [`ROUNDING_FACTOR`] times the drift that
//! rounding the base alone causes, since no merged model can be closer than its storage allows.

pub mod gguf;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use lowrank_formats::{FormatError, atomic};
use lowrank_kernels::{
    DType, Layout, Tensor, View, Workspace, add_assign, low_rank_delta, max_abs_diff, scale,
    scale_columns,
};

use crate::Error;
use crate::base::{MODEL_FILES, SIDE_FILES, SIDE_FOLDERS, Source, classifier_keys};
use crate::data::{Labels, Prompt, Tokenizer};
use crate::model::weights::write_model;
use crate::model::{
    Adapter, AdapterSet, Batch, Biases, Decoder, HeadKind, LinearId, LowRankSite, ModelConfig,
    Part, Pooling, Purpose, Scored, TokenRows, WeightId, Weights, families,
};
use crate::names::{named, valued};

/// Largest logit difference of a merge stored in f32.
pub const F32_LIMIT: f32 = 1e-3;
/// A merge stored in 16 bit may drift so many times as far as rounding the base alone.
pub const ROUNDING_FACTOR: f32 = 4.0;

/// Text that a merge is proved on where the caller gives none.
pub const PASSAGES: &[&str] = &[
    "The lighthouse keeper wrote down the weather every evening. On most days there was little to say: wind from the west, some rain, two ships far out.",
    "fn main() {\n    let total: u32 = (1..=10).filter(|n| n % 2 == 0).sum();\n    println!(\"{total}\");\n}",
    "Question: Which is heavier, a kilogram of iron or a kilogram of wool?\nAnswer: They weigh the same.",
    "In 1903 the line was extended by 14 km; it cost £2,300 and carried 51,000 passengers in its first year.",
];

/// What a merge came to.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct MergeReport {
    /// Linears with branches folded in, and tensors that were replaced or added.
    pub modules: usize,
    /// Tokens that the logits were compared on.
    pub tokens: usize,
    /// Largest difference between a logit of the merged model and of the unmerged one in f32.
    pub max_logit_difference: f32,
    /// The same for the base alone, rounded to the output's dtype; only where that is 16 bit.
    pub rounding_difference: Option<f32>,
    /// What `max_logit_difference` must not exceed.
    pub limit: f32,
    /// Bytes of the written weights.
    pub bytes: u64,
}

impl MergeReport {
    /// Whether the merged model is as close as its storage allows.
    pub fn is_faithful(&self) -> bool {
        self.max_logit_difference <= self.limit
    }
}

/// What is merged, and where to.
#[derive(Clone, Copy)]
pub struct MergeOptions<'a> {
    /// The model.
    pub source: &'a Source,
    /// What it is for with this adapter.
    pub purpose: Purpose,
    /// What the outputs of a classifier mean, which config.json then says.
    pub labels: Option<&'a Labels>,
    /// The adapter.
    pub adapter: &'a Adapter,
    /// Token ids to prove the merge on, a text each.
    pub passages: &'a [Vec<u32>],
    /// The folder of the merged model.
    pub output: &'a Path,
    /// How its weights are stored.
    pub dtype: DType,
    /// Whether a model in the folder is replaced.
    pub overwrite: bool,
    /// Whether a merge is kept that drifts too far.
    pub force: bool,
}

impl<'a> MergeOptions<'a> {
    /// A language model and its adapter, stored as f32 in a new folder: `MergeOptions { dtype, ..MergeOptions::new(…) }`
    /// for anything else. [`passages`] gives the text to prove the merge on, where there is none that says more.
    pub fn new(
        source: &'a Source,
        adapter: &'a Adapter,
        passages: &'a [Vec<u32>],
        output: &'a Path,
    ) -> Self {
        Self {
            source,
            purpose: Purpose::LanguageModel,
            labels: None,
            adapter,
            passages,
            output,
            dtype: DType::F32,
            overwrite: false,
            force: false,
        }
    }
}

/// The [`PASSAGES`] as tokens.
///
/// # Errors
/// A tokenizer that cannot encode them.
pub fn passages(tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, Error> {
    let ids = |text: &&str| Ok(Prompt::from_text(tokenizer, text)?.ids);
    PASSAGES.iter().map(ids).collect()
}

/// Writes the merged model as a standalone folder: a language model, a whole classifier, or an encoder by itself.
///
/// # Errors
/// No text to prove it on, an output that exists (without `overwrite`) or holds other files than a model's, a merge that drifts too far (without `force`; nothing is then left
/// behind), a classifier that nobody trained, files that can't be read or written.
pub fn merge(options: &MergeOptions) -> Result<MergeReport, Error> {
    let MergeOptions {
        source,
        adapter,
        output,
        dtype,
        ..
    } = *options;
    let config = source.model_config_for(options.purpose)?;
    let merged = MergedConfig::of(&config, adapter)?;
    let limit = config.longest_sequence();
    let passages: Vec<Vec<u32>> = options
        .passages
        .iter()
        .filter(|ids| !ids.is_empty())
        .map(|ids| ids[..ids.len().min(limit)].to_vec())
        .collect();
    if passages.is_empty() {
        return Err(Error::Settings(
            "there is no text to prove the merge on".to_owned(),
        ));
    }
    check_output(source, output, options.overwrite)?;
    let base = source.weights_for(DType::F32, options.purpose)?;
    if let Some(name) = base.untrained(Some(adapter)) {
        return Err(Error::Settings(format!(
            "neither {source} nor the adapter has a trained classifier ({name} is missing), so there is none to write"
        )));
    }
    let base = Decoder::new(base);
    let of_classifier = classifier_keys(&merged.config, options.labels);
    let changes = [merged.changes, of_classifier].concat();
    atomic::write_folder(output, options.overwrite, |folder| {
        write_merged(&base, adapter, &merged.config, folder, dtype)?;
        source.write_changed_side_files(folder, dtype, &changes)?;
        let report = prove(options, &base, &passages, folder)?;
        if report.is_faithful() || options.force {
            Ok(report)
        } else {
            Err(Error::Training(format!(
                "the merged model's logits differ by up to {:.3e} from the unmerged model's, over the limit of {:.3e}; nothing was written. \
                 Merge with {dtype}, or give {force} to accept the difference",
                report.max_logit_difference,
                report.limit,
                dtype = valued("dtype", "f32"),
                force = named("force")
            )))
        }
    })
}

/// The config of the merged model.
struct MergedConfig {
    config: ModelConfig,
    /// Keys of config.json that say otherwise than the base's.
    changes: Vec<(&'static str, serde_json::Value)>,
}

impl MergedConfig {
    /// # Errors
    /// What the architecture has no place for.
    fn of(base: &ModelConfig, adapter: &Adapter) -> Result<Self, Error> {
        let refuse = |text: &str| Err(Error::Settings(text.to_owned()));
        if !adapter.bottleneck.is_empty() {
            return refuse(
                "adapter layers cannot be merged: no model's architecture has a place for them; use the adapter beside its model, or train LoRA, which merges",
            );
        }
        if adapter.virtual_tokens().total() > 0 {
            return refuse(
                "virtual tokens cannot be merged: they stand before the text and not in a weight; use the adapter beside its model, or train LoRA, which merges",
            );
        }
        let changes = [
            adapter.low_rank.len(),
            adapter.scaled.len(),
            adapter.replaced.len(),
            adapter.token_rows.tables().count(),
        ];
        if changes.iter().sum::<usize>() == 0 {
            return refuse("this adapter changes no weight, so there is nothing to merge");
        }
        let (mut config, mut changes) = (base.clone(), Vec::new());
        let has_head = adapter.replaced.contains_key(&WeightId::Head);
        if (base.tie_word_embeddings && has_head) || adapter.token_rows.untie(base) {
            config.tie_word_embeddings = false;
            changes.push(("tie_word_embeddings", false.into()));
        }
        let adds_bias = |id: &WeightId| match id {
            WeightId::Linear(linear, Part::Bias) => !base.linear_bias(linear.kind),
            _ => false,
        };
        if adapter.replaced.keys().any(adds_bias) {
            let Some(keys) = families::bias_switches(base.family) else {
                return refuse(&format!(
                    "the added biases cannot be merged: a {} model has no place for them; use the adapter beside its model",
                    base.family.model_type(),
                ));
            };
            config.biases = Biases {
                qkv: true,
                o: true,
                mlp: true,
            };
            changes.extend(keys.iter().map(|key| (*key, true.into())));
        }
        Ok(Self { config, changes })
    }
}

/// A merge replaces a model folder, never one that holds anything else and never the base itself.
fn check_output(source: &Source, output: &Path, overwrite: bool) -> Result<(), Error> {
    let known = [MODEL_FILES, SIDE_FILES, SIDE_FOLDERS];
    crate::output::check_folder(output, source.folder(), overwrite, &known)
}

/// The weight of one linear with all that an adapter does to it, f32, in the base's layout: W0 + Σ scale·B·A, with rows and columns
/// multiplied with the adapter's factors, and rows given its magnitudes.
pub fn merged_weight(model: &Decoder, adapter: &Adapter, id: LinearId) -> Tensor {
    let base = model.weights().view(WeightId::Linear(id, Part::Weight));
    let mut weight = Tensor::zeros(base.rows(), base.cols());
    weight.view_mut().copy_from(base);
    add_branches(
        &mut weight,
        model,
        adapter,
        adapter.low_rank.get(&id).map_or(&[], Vec::as_slice),
    );
    if let Some(factors) = adapter.magnitude_factors(model.weights(), id) {
        match model.config().layout {
            Layout::OutIn => scale_rows(&mut weight, factors.view()),
            Layout::InOut => scale_columns(weight.view_mut(), factors.view()),
        }
    }
    if let Some(site) = adapter.scaled.get(&id) {
        // Inputs are the columns of a weight [out, in], and the rows of one that is [in, out].
        let (rows, columns) = match model.config().layout {
            Layout::OutIn => (site.output, site.input),
            Layout::InOut => (site.input, site.output),
        };
        if let Some(columns) = columns {
            scale_columns(weight.view_mut(), adapter.params.view(columns));
        }
        if let Some(rows) = rows {
            scale_rows(&mut weight, adapter.params.view(rows));
        }
    }
    weight
}

/// Multiplies each row with its factor.
fn scale_rows(weight: &mut Tensor, factors: View) {
    for row in 0..weight.rows() {
        let factor = factors.get(0, row);
        scale(weight.view_mut().slice_rows(row..row + 1), factor);
    }
}

/// The bias of one linear, multiplied with the adapter's factors of its output, f32.
fn merged_bias(model: &Decoder, adapter: &Adapter, id: LinearId) -> Tensor {
    let base = model.weights().view(WeightId::Linear(id, Part::Bias));
    let mut bias = Tensor::zeros(base.rows(), base.cols());
    bias.view_mut().copy_from(base);
    if let Some(slot) = adapter.scaled.get(&id).and_then(|site| site.output) {
        scale_columns(bias.view_mut(), adapter.params.view(slot));
    }
    bias
}

/// What an adapter adds to one linear, f32, in the base's layout: Σ scale·B·A, and with magnitudes what that and they change.
pub fn delta(model: &Decoder, adapter: &Adapter, id: LinearId) -> Tensor {
    let base = model.weights().view(WeightId::Linear(id, Part::Weight));
    if adapter.magnitudes.contains_key(&id) {
        let mut delta = merged_weight(model, adapter, id);
        let mut negative = Tensor::zeros(base.rows(), base.cols());
        negative.view_mut().copy_from(base);
        scale(negative.view_mut(), -1.0);
        add_assign(delta.view_mut(), negative.view());
        return delta;
    }
    let mut delta = Tensor::zeros(base.rows(), base.cols());
    add_branches(
        &mut delta,
        model,
        adapter,
        adapter.low_rank.get(&id).map_or(&[], Vec::as_slice),
    );
    delta
}

fn add_branches(weight: &mut Tensor, model: &Decoder, adapter: &Adapter, sites: &[LowRankSite]) {
    for site in sites {
        let branch = (adapter.params.view(site.a), adapter.params.view(site.b));
        let initial = adapter.initial_of(site);
        let all = [
            Some((branch, site.scale)),
            initial.map(|initial| (initial, -site.scale)),
        ];
        for ((a, b), scale) in all.into_iter().flatten() {
            low_rank_delta(
                weight.view_mut(),
                a,
                b,
                scale,
                model.config().layout,
                site.out_offset,
            );
        }
    }
}

/// A table of tokens with the rows that are the adapter's, in bytes of `dtype`. A head that is taken apart from the embedding begins as
/// that.
fn merged_table(model: &Decoder, adapter: &Adapter, id: WeightId, dtype: DType) -> Vec<u8> {
    let weights = model.weights();
    let tied = id == WeightId::Head && weights.get(id).is_none();
    let base = weights.view(if tied { WeightId::Embedding } else { id });
    let sites = &adapter.token_rows;
    let rows = match id {
        WeightId::Head => sites.head.as_ref(),
        _ => sites.embedding.as_ref(),
    };
    let mut bytes = base.to_le_bytes(dtype).into_owned();
    let width = dtype.bytes_for(base.cols());
    for (place, id) in rows.iter().flat_map(|rows| rows.ids().iter().enumerate()) {
        let row = adapter.params.view(rows.map_or(0, TokenRows::slot));
        let row = row.slice_rows(place..place + 1).to_le_bytes(dtype);
        bytes[*id as usize * width..][..width].copy_from_slice(&row);
    }
    bytes
}

fn write_merged(
    model: &Decoder,
    adapter: &Adapter,
    config: &ModelConfig,
    folder: &Path,
    dtype: DType,
) -> Result<(), Error> {
    write_model(config, folder, dtype, |_, id, out| match id {
        id if adapter.replaced.contains_key(&id) => {
            let slot = adapter.replaced[&id];
            out.write_all(&adapter.params.view(slot).to_le_bytes(dtype))
        }
        WeightId::Linear(id, Part::Weight)
            if adapter.low_rank.contains_key(&id) || adapter.scaled.contains_key(&id) =>
        {
            out.write_all(&merged_weight(model, adapter, id).view().to_le_bytes(dtype))
        }
        WeightId::Linear(linear, Part::Bias) if adapter.scaled.contains_key(&linear) => {
            let merged = merged_bias(model, adapter, linear);
            out.write_all(&merged.view().to_le_bytes(dtype))
        }
        WeightId::Embedding | WeightId::Head => {
            out.write_all(&merged_table(model, adapter, id, dtype))
        }
        id => out.write_all(&model.weights().view(id).to_le_bytes(dtype)),
    })
}

fn prove(
    options: &MergeOptions,
    base: &Arc<Decoder>,
    passages: &[Vec<u32>],
    folder: &Path,
) -> Result<MergeReport, Error> {
    let (adapter, dtype) = (options.adapter, options.dtype);
    let weights = Weights::load_for(folder, dtype, options.purpose).map_err(|error| match error {
        // The file's name is one that is gone once the merge has failed.
        Error::Format(FormatError::Malformed { problem, .. }) => Error::Training(format!(
            "nothing was written, since the merged model would not be finite: {problem}"
        )),
        other => other,
    });
    let merged = Decoder::new(weights?);
    let set = [adapter];
    let with_adapter = AdapterSet::new(&set);
    let max_logit_difference = difference(
        passages,
        (base, with_adapter),
        (&merged, AdapterSet::none()),
    );
    let (limit, rounding_difference) = match dtype {
        DType::F32 => (F32_LIMIT, None),
        DType::Bf16 => {
            let drift = rounding_drift(options, base, passages)?;
            (ROUNDING_FACTOR * drift, Some(drift))
        }
    };
    Ok(MergeReport {
        modules: adapter.low_rank.len()
            + adapter.scaled.len()
            + adapter.replaced.len()
            + adapter.token_rows.tables().count(),
        tokens: passages.iter().map(Vec::len).sum(),
        max_logit_difference,
        rounding_difference,
        limit,
        bytes: merged.weights().bytes() as u64,
    })
}

/// How far rounding the base to 16 bit moves its logits. A base that is stored in 16 bit already has nothing to round, so
/// it is scaled by 1.001 first: the values then lie as far from 16-bit numbers as any merged ones.
fn rounding_drift(
    options: &MergeOptions,
    base: &Arc<Decoder>,
    passages: &[Vec<u32>],
) -> Result<f32, Error> {
    let (config, adapter) = (base.config(), options.adapter);
    // Without the adapter's values a base may have a classifier of zeros, which nothing moves.
    let classifier = adapter.with_replaced_alone(|id| config.is_of_classifier(id));
    let set = [&classifier];
    let with = match config.classifier() {
        Some(_) => AdapterSet::new(&set),
        None => AdapterSet::none(),
    };
    let rounded = options.source.weights_for(DType::Bf16, options.purpose)?;
    let rounded = Decoder::new(rounded);
    // Logits alone don't tell: sums over f32 and bf16 weights may be taken in another order.
    let is_rounded = config.weights().iter().all(|&(id, _)| {
        let (stored, rounded) = (base.weights().view(id), rounded.weights().view(id));
        max_abs_diff(stored, rounded) == 0.0
    });
    if !is_rounded {
        return Ok(difference(passages, (base, with), (&rounded, with)));
    }
    let nudged = |dtype: DType| -> Result<Arc<Decoder>, Error> {
        let tensors: HashMap<WeightId, Tensor> = config
            .weights()
            .into_iter()
            .map(|(id, (rows, cols))| {
                let mut tensor = Tensor::zeros(rows, cols);
                tensor.view_mut().copy_from(base.weights().view(id));
                if matches!(id, WeightId::Linear(_, Part::Weight)) {
                    scale(tensor.view_mut(), 1.001);
                    tensor = Tensor::from_f32_as(rows, cols, &tensor.to_vec(), dtype);
                }
                (id, tensor)
            })
            .collect();
        Ok(Decoder::new(Weights::from_tensors(
            config.clone(),
            tensors,
            dtype,
        )?))
    };
    Ok(difference(
        passages,
        (&*nudged(DType::F32)?, with),
        (&*nudged(DType::Bf16)?, with),
    ))
}

/// The largest difference between two models' outputs on the passages: logits of any token, of a classifier those of each passage, and
/// of an encoder by itself the hidden states.
pub fn difference(
    passages: &[Vec<u32>],
    a: (&Decoder, AdapterSet),
    b: (&Decoder, AdapterSet),
) -> f32 {
    let ws = Workspace::new();
    let logits =
        |(model, adapters): (&Decoder, AdapterSet), ids: &[u32]| outputs(model, adapters, ids, &ws);
    passages
        .iter()
        .filter(|ids| !ids.is_empty())
        .map(|ids| {
            let (x, y) = (logits(a, ids), logits(b, ids));
            let largest = max_abs_diff(x.view(), y.view());
            ws.give(x);
            ws.give(y);
            largest
        })
        // `f32::max` would drop a NaN, the largest difference of all.
        .fold(0.0, |largest: f32, x| {
            if x > largest || x.is_nan() {
                x
            } else {
                largest
            }
        })
}

/// What a model gives for one text.
fn outputs(model: &Decoder, adapters: AdapterSet, ids: &[u32], ws: &Workspace) -> Tensor {
    let config = model.config();
    let mut batch = Batch::default();
    let every: Vec<u32> = (0..ids.len() as u32).collect();
    match config.classifier().map(|classifier| classifier.pooling) {
        None if config.causal => batch.push(ids, &[]),
        None | Some(Pooling::Each) => {
            batch.push_scored(ids, &[], Scored::Tokens(&every), config.causal);
        }
        Some(Pooling::First) => batch.push_scored(ids, &[], Scored::First, config.causal),
        Some(Pooling::Last) => batch.push_scored(ids, &[], Scored::Last, config.causal),
        Some(Pooling::Mean) => batch.push_scored(ids, &[], Scored::Mean, config.causal),
    }
    if !adapters.is_empty() {
        batch = batch.with_adapter(0);
    }
    match config.head {
        HeadKind::LanguageModel => model.logits(&batch, adapters, &every, None, ws),
        HeadKind::Classifier(_) => model.classify(&batch, adapters, ws),
        HeadKind::None => model.pooled(&batch, adapters, ws),
    }
}

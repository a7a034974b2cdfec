//! Folding an adapter into a GGUF file. Rounding to blocks can undo a small change, so what is left of the adapter is measured before the file is kept.
//!
//! What the adapter did is judged on its own rows: how much of its gain in loss is lost again, and how often the merged model would have gone on otherwise along its
//! greedy texts. Beside these stand the drift of logits, and for each module the part of ΔW that is left: the projection of what really changed in the
//! weight, ΔW', on ΔW, ⟨ΔW', ΔW⟩ / ‖ΔW‖².

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};

use lowrank_kernels::{Tensor, Workspace, max_abs_diff};
use serde::Serialize;

use super::{MergedConfig, delta, merged_bias, merged_table, merged_weight};
use crate::Error;
use crate::base::Source;
use crate::data::Example;
use crate::export::{ExportReport, FileType, write_model};
use crate::generate::{GenerateOptions, PromptIds, generate};
use crate::model::{
    Adapter, AdapterSet, Batch, Decoder, LinearId, ModelConfig, Part, Purpose, WeightId, families,
};
use crate::names::named;
use lowrank_kernels::DType;

/// The share of the adapter's gain in loss that a merge may lose, and the share of greedy tokens that may become others.
pub const LOST_LIMIT: f64 = 0.1;
/// Rows whose prompts are continued, and tokens of each.
const GREEDY_ROWS: usize = 16;
const GREEDY_TOKENS: usize = 32;

/// What is merged, and where to.
#[derive(Clone, Copy)]
pub struct GgufMergeOptions<'a> {
    /// The model.
    pub source: &'a Source,
    /// The adapter.
    pub adapter: &'a Adapter,
    /// Rows to judge it on, best the adapter's own.
    pub rows: &'a [Example],
    /// Tokens that end an answer.
    pub ends: &'a [u32],
    /// The file to write.
    pub output: &'a Path,
    /// How its weights are stored.
    pub file_type: FileType,
    /// Whether an earlier file is replaced.
    pub overwrite: bool,
    /// Whether a merge is kept that lost the tune.
    pub force: bool,
}

/// What a merge into a GGUF file came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GgufMergeReport {
    /// What is in the file.
    pub file: ExportReport,
    /// For each module the part of ΔW that is left.
    pub modules: Vec<Survival>,
    /// The same of all modules together, weighted by ‖ΔW‖².
    pub survived: f64,
    /// Largest difference between a logit of the merged model and of the base with the adapter beside it.
    pub max_logit_difference: f32,
    /// Root of the mean squared difference of logits.
    pub rms_logit_difference: f64,
    /// Mean loss of the base on the rows.
    pub base_loss: f64,
    /// The same with the adapter beside it.
    pub adapter_loss: f64,
    /// The same of the merged model.
    pub merged_loss: f64,
    /// The share of the adapter's gain that is lost; `None` where it gained nothing.
    pub lost_gain: Option<f64>,
    /// Greedy tokens of the base with the adapter that the merged model would also have chosen, and all of them.
    pub greedy: [usize; 2],
}

/// What is left of one module's change.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Survival {
    /// The module's name.
    pub module: String,
    /// ⟨ΔW', ΔW⟩ / ‖ΔW‖².
    pub survived: f64,
    /// ‖ΔW‖
    pub norm: f64,
}

impl GgufMergeReport {
    /// What says that the tune is lost; nothing where it is not.
    pub fn loss_of_tune(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        if let Some(lost) = self.lost_gain.filter(|lost| *lost > LOST_LIMIT) {
            reasons.push(format!(
                "{} of the adapter's gain in loss is lost (limit {})",
                percent(lost),
                percent(LOST_LIMIT)
            ));
        }
        let [same, all] = self.greedy;
        let other = 1.0 - same as f64 / all.max(1) as f64;
        if all > 0 && other > LOST_LIMIT {
            reasons.push(format!(
                "{} of the greedy tokens become others (limit {})",
                percent(other),
                percent(LOST_LIMIT)
            ));
        }
        reasons
    }
}

/// Writes the merged model as a GGUF file.
///
/// # Errors
/// What [`write_model`] and the adapter's kind refuse; no rows; a tune that is lost (without `force`; nothing is then left behind).
pub fn merge_gguf(options: &GgufMergeOptions<'_>) -> Result<GgufMergeReport, Error> {
    let GgufMergeOptions {
        source,
        adapter,
        output,
        ..
    } = *options;
    crate::lora_files::check_file(output, options.overwrite)?;
    if options.rows.iter().all(|row| row.supervised_tokens() == 0) {
        return Err(Error::Settings(
            "there are no rows to judge the merge on".to_owned(),
        ));
    }
    let base = source.weights_for(source.exact_dtype()?, Purpose::LanguageModel)?;
    let merged = MergedConfig::of(base.config(), adapter)?;
    let base = Decoder::new(base);
    let (name, folder) = (output.file_name().unwrap_or_default(), output.parent());
    let aside = Aside(
        folder
            .unwrap_or(Path::new(""))
            .join(format!(".{}.tmp", name.to_string_lossy())),
    );
    let file = write(options, &base, &merged.config, &aside.0)?;
    let report = judge(options, &base, file, &aside.0)?;
    let reasons = report.loss_of_tune();
    if !reasons.is_empty() && !options.force {
        return Err(Error::Training(format!(
            "the tune does not survive this type: {}; {:.0} % of ΔW is left. Nothing was written. Take a type of more bits, keep the adapter beside its model, \
             or give {} to keep the result",
            reasons.join(", and "),
            100.0 * report.survived,
            named("force")
        )));
    }
    fs::rename(&aside.0, output).map_err(Error::io(output))?;
    Ok(report)
}

/// A file that is gone unless it was renamed.
struct Aside(PathBuf);

impl Drop for Aside {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn write(
    options: &GgufMergeOptions<'_>,
    base: &Decoder,
    config: &ModelConfig,
    path: &Path,
) -> Result<ExportReport, Error> {
    let adapter = options.adapter;
    let touched = |id: WeightId| match id {
        id if adapter.replaced.contains_key(&id) => true,
        WeightId::Linear(linear, Part::Weight) => {
            adapter.low_rank.contains_key(&linear) || adapter.scaled.contains_key(&linear)
        }
        WeightId::Linear(linear, Part::Bias) => adapter.scaled.contains_key(&linear),
        WeightId::Embedding | WeightId::Head => adapter.token_rows.tables().count() > 0,
        _ => false,
    };
    // A tensor is asked for in parts, and made once.
    let last: RefCell<Option<(WeightId, Tensor)>> = RefCell::new(None);
    let make = |id: WeightId| match id {
        id if adapter.replaced.contains_key(&id) => {
            let view = adapter.params.view(adapter.replaced[&id]);
            Tensor::from_f32(view.rows(), view.cols(), view.to_vec())
        }
        WeightId::Linear(linear, Part::Weight) => merged_weight(base, adapter, linear),
        WeightId::Linear(linear, Part::Bias) => merged_bias(base, adapter, linear),
        id => table(base, adapter, id),
    };
    let mut rows = |id: WeightId, rows: std::ops::Range<usize>| {
        if !touched(id) {
            return base.weights().view(id).slice_rows(rows).to_vec();
        }
        let mut last = last.borrow_mut();
        if last.as_ref().is_none_or(|(known, _)| *known != id) {
            *last = Some((id, make(id)));
        }
        last.as_ref()
            .map(|(_, tensor)| tensor.view().slice_rows(rows).to_vec())
            .unwrap_or_default()
    };
    write_model(
        options.source,
        config,
        path,
        options.file_type,
        true,
        &|id| !touched(id),
        &mut rows,
    )
}

/// A table of tokens with the adapter's rows, f32.
fn table(base: &Decoder, adapter: &Adapter, id: WeightId) -> Tensor {
    let bytes = merged_table(base, adapter, id, DType::F32);
    let values: Vec<f32> = bytes
        .as_chunks()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect();
    let columns = base.config().hidden_size;
    Tensor::from_f32(values.len() / columns, columns, values)
}

fn judge(
    options: &GgufMergeOptions<'_>,
    base: &std::sync::Arc<Decoder>,
    file: ExportReport,
    path: &Path,
) -> Result<GgufMergeReport, Error> {
    let adapter = options.adapter;
    let shown = path.to_string_lossy();
    let merged = Source::find(&shown)?;
    let merged = Decoder::new(merged.weights_for(merged.exact_dtype()?, Purpose::LanguageModel)?);
    let set = [adapter];
    let with = AdapterSet::new(&set);
    let ws = Workspace::new();
    let (mut loss, mut labels) = ([0.0; 3], 0_usize);
    let (mut largest, mut squares, mut values) = (0.0_f32, 0.0_f64, 0_usize);
    for row in options.rows {
        let none = || AdapterSet::none();
        let own = logits(base, with, row, &ws);
        let models = [
            logits(base, none(), row, &ws),
            own,
            logits(&merged, none(), row, &ws),
        ];
        for (sum, logits) in loss.iter_mut().zip(&models) {
            *sum += loss_of(logits, row);
        }
        labels += row.supervised_tokens();
        let [_, here, there] = models;
        let most = max_abs_diff(here.view(), there.view());
        // `f32::max` would drop a NaN.
        largest = if most > largest || most.is_nan() {
            most
        } else {
            largest
        };
        for (x, y) in here.to_vec().into_iter().zip(there.to_vec()) {
            squares += f64::from(x - y).powi(2);
            values += 1;
        }
    }
    let [base_loss, adapter_loss, merged_loss] = loss.map(|sum| sum / labels.max(1) as f64);
    let modules = survivals(base, &merged, adapter);
    let weight = |module: &Survival| module.norm.powi(2);
    let all: f64 = modules.iter().map(weight).sum();
    let left: f64 = modules
        .iter()
        .map(|module| module.survived * weight(module))
        .sum();
    let gain = base_loss - adapter_loss;
    Ok(GgufMergeReport {
        file,
        survived: if all > 0.0 { left / all } else { 1.0 },
        modules,
        max_logit_difference: largest,
        rms_logit_difference: (squares / values.max(1) as f64).sqrt(),
        base_loss,
        adapter_loss,
        merged_loss,
        lost_gain: (gain > 0.0).then(|| (merged_loss - adapter_loss) / gain),
        greedy: greedy(options, (base, with), &merged, &ws),
    })
}

/// The logits of every token of a row.
fn logits(model: &Decoder, adapters: AdapterSet, row: &Example, ws: &Workspace) -> Tensor {
    of_ids(model, adapters, &row.ids, ws)
}

fn of_ids(model: &Decoder, adapters: AdapterSet, ids: &[u32], ws: &Workspace) -> Tensor {
    let mut batch = Batch::default();
    batch.push(ids, &[]);
    if !adapters.is_empty() {
        batch = batch.with_adapter(0);
    }
    let every: Vec<u32> = (0..ids.len() as u32).collect();
    model.logits(&batch, adapters, &every, None, ws)
}

/// The sum of a row's losses.
fn loss_of(logits: &Tensor, row: &Example) -> f64 {
    let mut sum = 0.0;
    for (at, _) in row.supervised.iter().enumerate().filter(|(_, is)| **is) {
        let values = logits.view().slice_rows(at - 1..at).to_vec();
        let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f64 = values.iter().map(|x| f64::from(x - most).exp()).sum();
        let own = values.get(row.ids[at] as usize).copied().unwrap_or(most);
        sum += total.ln() - f64::from(own - most);
    }
    sum
}

/// Continues the rows' prompts with the adapter, and counts the tokens that the merged model would also have chosen.
fn greedy(
    options: &GgufMergeOptions<'_>,
    (base, with): (&std::sync::Arc<Decoder>, AdapterSet),
    merged: &Decoder,
    ws: &Workspace,
) -> [usize; 2] {
    let prompts: Vec<PromptIds> = options
        .rows
        .iter()
        .take(GREEDY_ROWS)
        .filter(|row| row.prompt_len > 0)
        .map(|row| PromptIds::new(row.ids[..row.prompt_len].to_vec(), Some(0)))
        .collect();
    let settings = GenerateOptions::greedy(GREEDY_TOKENS, options.ends);
    let made = generate(base, with, &prompts, &settings, ws, |_, _| true);
    let (mut same, mut all) = (0, 0);
    for (prompt, made) in prompts.iter().zip(made) {
        let ids = [prompt.ids.as_slice(), &made.ids].concat();
        if made.ids.is_empty() {
            continue;
        }
        let rows = of_ids(merged, AdapterSet::none(), &ids, ws);
        for (at, id) in made.ids.iter().enumerate() {
            let row = prompt.ids.len() + at - 1;
            let values = rows.view().slice_rows(row..row + 1).to_vec();
            let best = (0..values.len()).max_by(|a, b| values[*a].total_cmp(&values[*b]));
            same += usize::from(best == Some(*id as usize));
            all += 1;
        }
    }
    [same, all]
}

/// What is left of each module's change.
fn survivals(base: &Decoder, merged: &Decoder, adapter: &Adapter) -> Vec<Survival> {
    let mut ids: Vec<LinearId> = adapter.low_rank.keys().copied().collect();
    ids.sort_unstable();
    let config = base.config();
    ids.into_iter()
        .map(|id| {
            let weight = WeightId::Linear(id, Part::Weight);
            let (was, is) = (base.weights().view(weight), merged.weights().view(weight));
            let delta = delta(base, adapter, id);
            let (mut product, mut norm) = (0.0, 0.0);
            for row in 0..delta.rows() {
                let rows = row..row + 1;
                let (was, is) = (
                    was.slice_rows(rows.clone()).to_vec(),
                    is.slice_rows(rows.clone()).to_vec(),
                );
                let delta = delta.view().slice_rows(rows).to_vec();
                for ((was, is), delta) in was.into_iter().zip(is).zip(delta) {
                    product += f64::from(is - was) * f64::from(delta);
                    norm += f64::from(delta) * f64::from(delta);
                }
            }
            let name = families::tensor_name(config, weight);
            Survival {
                module: name.trim_end_matches(".weight").to_owned(),
                survived: if norm > 0.0 { product / norm } else { 1.0 },
                norm: norm.sqrt(),
            }
        })
        .collect()
}

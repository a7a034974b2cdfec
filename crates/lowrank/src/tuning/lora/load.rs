//! A PEFT folder as an adapter of a model: every tensor is checked and consumed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lowrank_formats::checkpoint::Checkpoint;
use lowrank_formats::peft::{ADAPTER_WEIGHTS, LoraConfig, LoraPart, TargetModules, lora_key};

use super::inject::{choose, coverage, lay_out};
use super::save::{BASE_FINGERPRINT, FUSED_PARTS};
use super::{Candidate, Coverage, candidates};
use crate::Error;
use crate::model::{ModelConfig, families};
use crate::tuning::Adapter;

/// A loaded adapter and what its files say.
pub struct Loaded {
    /// The branches with their values.
    pub adapter: Adapter,
    /// `adapter_config.json`; where the file fuses parts that were trained apart, the config of the parts.
    pub config: LoraConfig,
    /// What the targets matched.
    pub coverage: Coverage,
    /// Fingerprint of the base that the adapter was trained on, where this program wrote it.
    pub base_fingerprint: Option<String>,
}

/// Reads a PEFT LoRA folder for a model of this config.
///
/// # Errors
/// Files that are missing or damaged, a feature that is not supported, tensors that are missing, left over, or of another
/// shape (an adapter for another model). Every problem is named.
pub fn load(folder: &Path, model: &ModelConfig) -> Result<Loaded, Error> {
    let mut config = LoraConfig::read(folder)?;
    let file = folder.join(ADAPTER_WEIGHTS);
    let weights = Checkpoint::open(&file)?;
    let parts = fused_parts(&weights)?;
    let chosen = match &config.target_modules {
        // PEFT accepts entries that match nothing beside ones that match; what counts is that the tensors fit.
        TargetModules::List(_) | TargetModules::Regex(_) | TargetModules::AllLinear => {
            matched(model, &config)
        }
    };
    if chosen.is_empty() {
        choose(model, &config).map_err(|error| Error::Tensors {
            path: folder.to_path_buf(),
            problems: vec![format!("the adapter is for another model: {error}")],
        })?;
    }
    let mut problems = Vec::new();
    let mut used = BTreeSet::new();
    let mut adapter = lay_out(model, &config, &chosen);
    for (slot, name) in adapter.names.clone().iter().enumerate() {
        let (rows, cols) = adapter.params.shape(slot);
        match weights.get(name) {
            None => problems.push(format!("{name}: missing (expected [{rows}, {cols}])")),
            Some(entry) if entry.shape != [rows, cols] => {
                problems.push(format!(
                    "{name}: shape {:?}, the model needs [{rows}, {cols}]",
                    entry.shape
                ));
            }
            Some(entry) => {
                let values = lowrank_kernels::Tensor::from_f32(rows, cols, entry.to_f32()?);
                adapter.params.view_mut(slot).copy_from(values.view());
            }
        }
        used.insert(name.clone());
    }
    problems.extend(
        weights
            .names()
            .filter(|n| !used.contains(*n))
            .map(|n| format!("{n}: no adapted module of this model reads it")),
    );
    if !problems.is_empty() {
        problems.push("is this adapter for another model?".to_owned());
        return Err(Error::Tensors {
            path: file,
            problems,
        });
    }
    if !parts.is_empty() {
        (adapter, config) = split(model, &config, &adapter, &chosen, &parts)?;
    }
    let coverage = coverage(&config, &chosen, adapter.parameters());
    Ok(Loaded {
        adapter,
        config,
        coverage,
        base_fingerprint: weights.metadata().get(BASE_FINGERPRINT).cloned(),
    })
}

fn matched(model: &ModelConfig, config: &LoraConfig) -> Vec<Candidate> {
    candidates(model)
        .into_iter()
        .filter(|place| place.part.is_none() && config.matches(&place.name))
        .collect()
}

type Parts = BTreeMap<String, Vec<(String, usize)>>;

fn fused_parts(weights: &Checkpoint) -> Result<Parts, Error> {
    let Some(text) = weights.metadata().get(FUSED_PARTS) else {
        return Ok(Parts::new());
    };
    serde_json::from_str(text).map_err(|error| Error::Tensors {
        path: weights.path().to_path_buf(),
        problems: vec![format!("metadata `{FUSED_PARTS}` is not what this program writes ({error}); remove it to use the adapter whole")],
    })
}

/// Takes a stacked LoRA of fused linears apart again.
fn split(
    model: &ModelConfig,
    config: &LoraConfig,
    whole: &Adapter,
    chosen: &[Candidate],
    parts: &Parts,
) -> Result<(Adapter, LoraConfig), Error> {
    let mut places = Vec::new();
    let mut part_config = LoraConfig {
        rank_pattern: Vec::new(),
        alpha_pattern: Vec::new(),
        ..config.clone()
    };
    let mut values = Vec::new();
    let mut names = Vec::new();
    for (index, place) in chosen.iter().enumerate() {
        let (a, b) = (
            whole.params.view(2 * index).to_vec(),
            whole.params.view(2 * index + 1).to_vec(),
        );
        let (rank, input) = whole.params.shape(2 * index);
        let scale = config.scale_of(&place.name);
        let whole_part = vec![(String::new(), rank)];
        let pieces = parts.get(&place.module).unwrap_or(&whole_part);
        let mut first = 0;
        for (suffix, r) in pieces {
            let kinds = candidates(model);
            let name = if suffix.is_empty() {
                place.name.clone()
            } else {
                format!("{}.{suffix}", place.module)
            };
            let found = kinds.into_iter().find(|candidate| candidate.name == name);
            let (Some(found), true) = (found, first + r <= rank) else {
                let problem = format!("metadata `{FUSED_PARTS}` does not fit {}", place.module);
                return Err(Error::Tensors {
                    path: "adapter_model.safetensors".into(),
                    problems: vec![problem],
                });
            };
            let columns = found
                .part
                .map_or(0..model.linear_shape(found.id.kind).1, |part| {
                    model.fused_columns(part)
                });
            values.push(a[first * input..(first + r) * input].to_vec());
            values.push(
                columns
                    .flat_map(|row| b[row * rank + first..row * rank + first + r].to_vec())
                    .collect(),
            );
            let key = found.name.replace('.', "\\.");
            let alpha = scale
                * if config.use_rslora {
                    (*r as f64).sqrt()
                } else {
                    *r as f64
                };
            part_config.rank_pattern.push((key.clone(), *r));
            part_config.alpha_pattern.push((key, alpha));
            let tail = found
                .part
                .and_then(families::fused_part)
                .map_or_else(|| name.clone(), |part| format!("{}.{part}", place.module));
            names.push(tail);
            places.push(found);
            first += r;
        }
    }
    part_config.target_modules = TargetModules::List(names);
    let mut adapter = lay_out(model, &part_config, &places);
    for (slot, values) in values.into_iter().enumerate() {
        let (rows, cols) = adapter.params.shape(slot);
        let values = lowrank_kernels::Tensor::from_f32(rows, cols, values);
        adapter.params.view_mut(slot).copy_from(values.view());
    }
    debug_assert!(
        adapter
            .names
            .iter()
            .step_by(2)
            .zip(&places)
            .all(|(name, place)| *name == lora_key(&place.name, LoraPart::A))
    );
    Ok((adapter, part_config))
}

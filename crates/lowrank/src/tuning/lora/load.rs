//! A PEFT folder as an adapter of a model: every tensor is checked and consumed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use lowrank_formats::checkpoint::Checkpoint;
use lowrank_formats::peft::{
    ADAPTER_CONFIG, BASE_FINGERPRINT, FUSED_PARTS, LoraConfig, TargetModules, open_adapter_weights,
};

use super::inject::{choose, coverage, lay_out};
use super::method::SAVED_PREFIX;
use super::{Candidate, Coverage, candidates, tokens};
use crate::Error;
use crate::model::{Adapter, ModelConfig};
use crate::tuning::files::read_values;
use crate::tuning::saved::add_of_folder;

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
    let weights = open_adapter_weights(folder)?;
    let parts = fused_parts(&weights)?;
    // PEFT accepts entries that match nothing beside ones that match; what counts is that the tensors fit.
    let mut chosen = matched(model, &config);
    if chosen.is_empty() {
        let reason = match choose(model, &config) {
            Err(error) => error.to_string(),
            Ok(_) => format!(
                "target_modules: {} names parts of a fused linear, and PEFT's files hold it whole",
                config.target_modules
            ),
        };
        return Err(Error::Tensors {
            path: folder.to_path_buf(),
            problems: vec![format!("the adapter is for another model: {reason}")],
        });
    }
    let tokens = |adapter: &mut Adapter| {
        let indices = config.trainable_token_indices.as_ref();
        tokens::add(adapter, model, indices).map_err(|problems| Error::Tensors {
            path: folder.join(ADAPTER_CONFIG),
            problems,
        })
    };
    let mut adapter = lay_out(model, &config, &chosen);
    tokens(&mut adapter)?;
    add_of_folder(&mut adapter, model, folder, SAVED_PREFIX)?;
    read_values(&weights, &mut adapter)?;
    if !parts.is_empty() {
        let (whole, branches) = (adapter, 2 * chosen.len());
        let part_config;
        (adapter, part_config, chosen) =
            split(model, &config, &whole, &chosen, &parts).map_err(|problems| Error::Tensors {
                path: weights.path().to_path_buf(),
                problems,
            })?;
        tokens(&mut adapter)?;
        add_of_folder(&mut adapter, model, folder, SAVED_PREFIX)?;
        config = part_config;
        let slots = (2 * chosen.len()..adapter.params.slots()).zip(branches..whole.params.slots());
        for (to, from) in slots {
            adapter
                .params
                .view_mut(to)
                .copy_from(whole.params.view(from));
        }
    }
    let coverage = coverage(&config, &chosen, adapter.parameters());
    Ok(Loaded {
        adapter,
        config,
        coverage,
        base_fingerprint: weights.metadata().get(BASE_FINGERPRINT).cloned(),
    })
}

/// The modules that PEFT would adapt; entries that match nothing are left alone.
pub(in crate::tuning) fn matched(model: &ModelConfig, config: &LoraConfig) -> Vec<Candidate> {
    candidates(model)
        .into_iter()
        .filter(|place| place.part.is_none() && config.matches(&place.name))
        .collect()
}

/// What to do about metadata that can't be right.
pub(super) const WHOLE: &str = "remove the metadata to use the adapter whole";

pub(super) type Parts = BTreeMap<String, Vec<(String, usize)>>;

pub(super) fn fused_parts(weights: &Checkpoint) -> Result<Parts, Error> {
    let Some(text) = weights.metadata().get(FUSED_PARTS) else {
        return Ok(Parts::new());
    };
    serde_json::from_str(text).map_err(|error| Error::Tensors {
        path: weights.path().to_path_buf(),
        problems: vec![format!(
            "metadata `{FUSED_PARTS}` is not what this program writes ({error}); {WHOLE}"
        )],
    })
}

/// Takes a stacked LoRA of fused linears apart again: the adapter of the parts, its config, and its places.
fn split(
    model: &ModelConfig,
    config: &LoraConfig,
    whole: &Adapter,
    chosen: &[Candidate],
    parts: &Parts,
) -> Result<(Adapter, LoraConfig, Vec<Candidate>), Vec<String>> {
    let all = candidates(model);
    let unknown: Vec<String> = parts
        .keys()
        .filter(|module| !chosen.iter().any(|place| place.module == **module))
        .map(|module| format!("metadata `{FUSED_PARTS}` names {module}, which is not adapted"))
        .collect();
    if !unknown.is_empty() {
        return Err(unknown);
    }
    let mut part_config = LoraConfig {
        rank_pattern: Vec::new(),
        alpha_pattern: Vec::new(),
        ..config.clone()
    };
    let (mut places, mut values) = (Vec::new(), Vec::new());
    for (index, place) in chosen.iter().enumerate() {
        let stacked = Stacked {
            a: whole.params.view(2 * index).to_vec(),
            b: whole.params.view(2 * index + 1).to_vec(),
            rank: whole.params.shape(2 * index).0,
        };
        let pieces = match parts.get(&place.module) {
            None => vec![(place.clone(), stacked.rank)],
            Some(pieces) => resolve(&all, place, pieces, stacked.rank)?,
        };
        let scale = config.scale_of(&place.name);
        let (mut first, mut covered) = (0, 0);
        for (found, r) in pieces {
            let columns = found
                .part
                .map_or(0..model.linear_shape(found.id.kind).1, |part| {
                    model.fused_columns(part)
                });
            let (a, b) = stacked.piece(first..first + r, columns);
            covered += b.iter().filter(|value| **value != 0.0).count();
            values.extend([a, b]);
            let denominator = if config.use_rslora {
                (r as f64).sqrt()
            } else {
                r as f64
            };
            let key = found.name.replace('.', "\\.");
            part_config.rank_pattern.push((key.clone(), r));
            part_config.alpha_pattern.push((key, scale * denominator));
            places.push(found);
            first += r;
        }
        if covered != stacked.b.iter().filter(|value| **value != 0.0).count() {
            return Err(vec![format!(
                "{}: lora_B has values outside the parts that metadata `{FUSED_PARTS}` names; {WHOLE}",
                place.module
            )]);
        }
    }
    let names = places.iter().map(|place| place.name.clone()).collect();
    part_config.target_modules = TargetModules::List(names);
    let mut adapter = lay_out(model, &part_config, &places);
    for (slot, values) in values.into_iter().enumerate() {
        let (rows, cols) = adapter.params.shape(slot);
        let values = lowrank_kernels::Tensor::from_f32(rows, cols, values);
        adapter.params.view_mut(slot).copy_from(values.view());
    }
    Ok((adapter, part_config, places))
}

/// A [rank, in] and B [out, rank] of a fused linear.
pub(super) struct Stacked {
    pub(super) a: Vec<f32>,
    pub(super) b: Vec<f32>,
    pub(super) rank: usize,
}

impl Stacked {
    /// Some rows of A, and the entries of B that belong to them in some rows of the output.
    pub(super) fn piece(&self, ranks: Range<usize>, output: Range<usize>) -> (Vec<f32>, Vec<f32>) {
        let input = self.a.len() / self.rank;
        let a = self.a[ranks.start * input..ranks.end * input].to_vec();
        let b = output
            .flat_map(|row| &self.b[row * self.rank..][ranks.clone()])
            .copied()
            .collect();
        (a, b)
    }
}

/// The places that the metadata's parts of one module mean. Their ranks must be all of the module's.
fn resolve(
    all: &[Candidate],
    place: &Candidate,
    pieces: &[(String, usize)],
    rank: usize,
) -> Result<Vec<(Candidate, usize)>, Vec<String>> {
    let found: Option<Vec<_>> = pieces
        .iter()
        .map(|(suffix, r)| {
            let name = format!("{}.{suffix}", place.module);
            let place = all.iter().find(|candidate| candidate.name == name)?;
            (*r > 0).then(|| (place.clone(), *r))
        })
        .collect();
    let sum = pieces
        .iter()
        .try_fold(0_usize, |sum, (_, r)| sum.checked_add(*r));
    found.filter(|_| sum == Some(rank)).ok_or_else(|| {
        vec![format!(
            "{}: metadata `{FUSED_PARTS}` says {pieces:?}, which does not fit r {rank}; {WHOLE}",
            place.module
        )]
    })
}

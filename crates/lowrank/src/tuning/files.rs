//! The folder of any adapter: `adapter_config.json`, whose `peft_type` says which method wrote it, and
//! `adapter_model.safetensors`.
//!
//! A method's module says which types are its own (`MethodSpec::peft_types`). The types that begin with `LOWRANK_` are methods that PEFT does not have; their tensors are
//! named as in model.safetensors where they stand in for a model's own.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;
use std::path::Path;

use lowrank_formats::FormatError;
use lowrank_formats::checkpoint::{Checkpoint, StoredDType, check_finite};
use lowrank_formats::hf_config::HfConfig;
use lowrank_formats::peft::{
    ADAPTER_WEIGHTS, BASE_FINGERPRINT, LABELS, is_inactive, open_adapter_weights,
    read_adapter_config, write_adapter_config,
};
use lowrank_formats::safetensors_writer::{TensorSpec, write_safetensors};
use lowrank_kernels::{DType, Tensor};
use serde_json::{Map, Value};

use super::saved::{self, add_of_folder};
use super::{AdapterConfig, Method};
use crate::Error;
use crate::model::{Adapter, HeadKind, ModelConfig, Pooling};

/// Keys of every method's config that say nothing about the values.
const COMMON_KEYS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
];

/// PEFT's name of what a model does (`task_type`).
pub(super) fn task_type(model: &ModelConfig) -> &'static str {
    match &model.head {
        HeadKind::LanguageModel => "CAUSAL_LM",
        HeadKind::Classifier(classifier) if classifier.pooling == Pooling::Each => "TOKEN_CLS",
        HeadKind::Classifier(_) => "SEQ_CLS",
        HeadKind::None => "FEATURE_EXTRACTION",
    }
}

/// The base that an adapter belongs to.
#[derive(Clone, Copy, Debug, Default)]
pub struct BaseMark<'a> {
    /// `base_model_name_or_path`.
    pub name: &'a str,
    /// [`Weights::fingerprint`](crate::model::Weights::fingerprint).
    pub fingerprint: &'a str,
    /// What the outputs of a classifier mean, as JSON.
    pub labels: Option<&'a str>,
}

impl BaseMark<'_> {
    /// What the file of values says beside them.
    pub(super) fn metadata(&self) -> BTreeMap<String, String> {
        let entries = [
            (BASE_FINGERPRINT, Some(self.fingerprint)),
            (LABELS, self.labels),
        ];
        let said = entries.into_iter();
        said.filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned())))
            .collect()
    }
}

/// A loaded adapter and what its files say.
pub struct Loaded {
    /// The values and where they act.
    pub adapter: Adapter,
    /// Its method and options.
    pub config: AdapterConfig,
    /// What is adapted, in words.
    pub coverage: String,
    /// Fingerprint of the base that the adapter was trained on, where this program wrote it.
    pub base_fingerprint: Option<String>,
}

/// What an adapter's folder says that its model is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// `task_type`; a language model's where there is none.
    pub task_type: String,
    /// Outputs of the classifier that is saved with it.
    pub outputs: Option<usize>,
    /// What they mean, as JSON, where this program wrote it.
    pub labels: Option<String>,
}

/// Reads what an adapter's folder says that its model is for, before there is a model.
///
/// # Errors
/// Files that are missing or damaged.
pub fn task_of(folder: &Path) -> Result<Task, Error> {
    let raw = read_adapter_config(folder)?;
    let task_type = raw.opt_str("task_type")?.unwrap_or("CAUSAL_LM").to_owned();
    let weights = open_adapter_weights(folder)?;
    let last = [
        "classifier.weight",
        "classifier.out_proj.weight",
        "score.weight",
    ];
    let is_last = |name: &&str| {
        let own = last.iter().find(|last| name.ends_with(**last));
        own.is_some_and(|own| {
            name.len() == own.len() || name[..name.len() - own.len()].ends_with('.')
        })
    };
    let outputs = weights
        .names()
        .find(is_last)
        .and_then(|name| weights.get(name));
    Ok(Task {
        task_type,
        outputs: outputs.and_then(|entry| entry.shape.first().copied()),
        labels: weights.metadata().get(LABELS).cloned(),
    })
}

/// Reads an adapter's folder, of whatever method, for a model of this config.
///
/// # Errors
/// Files that are missing or damaged, a method or feature that is not supported, tensors that are missing, left over, or of
/// another shape (an adapter for another model).
pub fn load(folder: &Path, model: &ModelConfig) -> Result<Loaded, Error> {
    let raw = read_adapter_config(folder)?;
    let name = raw.str("peft_type")?;
    let mut methods = Method::ALL.into_iter();
    let Some(method) = methods.find(|method| method.spec().peft_types().contains(&name)) else {
        let all = Method::ALL.map(|method| method.spec().peft_types());
        return Err(raw.unsupported("peft_type", all.concat().join(", ")).into());
    };
    check_task(&raw, model)?;
    method.spec().load(folder, &raw, model)
}

/// Refuses an adapter of a classifier for a model without one, and the other way round.
fn check_task(raw: &HfConfig, model: &ModelConfig) -> Result<(), FormatError> {
    const CLASSIFIERS: [&str; 2] = ["SEQ_CLS", "TOKEN_CLS"];
    let expected = task_type(model);
    match raw.opt_str("task_type")? {
        Some(found)
            if found != expected
                && (CLASSIFIERS.contains(&found) || CLASSIFIERS.contains(&expected)) =>
        {
            let use_it = if CLASSIFIERS.contains(&found) {
                "an adapter that classifies is for eval and classify"
            } else {
                "the model is loaded with a classifier"
            };
            Err(raw.unsupported("task_type", format!("{expected:?} or null: {use_it}")))
        }
        _ => Ok(()),
    }
}

/// Reads the values of an adapter that is laid out, each from the tensor of its name.
pub(super) fn finish(
    folder: &Path,
    model: &ModelConfig,
    mut adapter: Adapter,
    config: AdapterConfig,
    coverage: String,
) -> Result<Loaded, Error> {
    let weights = open_adapter_weights(folder)?;
    let prefix = config.method().spec().saved_prefix();
    add_of_folder(&mut adapter, model, folder, prefix)?;
    read_values(&weights, &mut adapter)?;
    let coverage = match saved::coverage(&adapter) {
        Some(saved) => format!("{coverage}, and {saved}"),
        None => coverage,
    };
    Ok(Loaded {
        adapter,
        config,
        coverage,
        base_fingerprint: fingerprint(&weights),
    })
}

/// The fingerprint of the base, where the file's metadata has it.
pub(super) fn fingerprint(weights: &Checkpoint) -> Option<String> {
    weights.metadata().get(BASE_FINGERPRINT).cloned()
}

/// Writes an adapter's two files into `folder`.
///
/// # Errors
/// A file can't be written.
pub fn save(
    folder: &Path,
    model: &ModelConfig,
    config: &AdapterConfig,
    adapter: &Adapter,
    base: BaseMark,
) -> Result<(), Error> {
    config.inner().save(folder, model, adapter, base)
}

/// Writes an adapter's two files: its values under their names, and the keys of every method with a method's own.
pub(super) fn write_both(
    folder: &Path,
    peft_type: &str,
    options: Vec<(&'static str, Value)>,
    (model, adapter): (&ModelConfig, &Adapter),
    base: BaseMark,
) -> Result<(), Error> {
    write_values(folder, adapter, base)?;
    write_config(folder, peft_type, base.name, (model, adapter), options)
}

/// The base model that an adapter's config names, if it names one.
///
/// # Errors
/// A config that is missing or damaged.
pub fn base_of(folder: &Path) -> Result<Option<String>, Error> {
    let raw = read_adapter_config(folder)?;
    Ok(raw.opt_str("base_model_name_or_path")?.map(str::to_owned))
}

/// Writes `adapter_config.json` with the keys of every method and a method's own.
pub(super) fn write_config(
    folder: &Path,
    peft_type: &str,
    base: &str,
    (model, adapter): (&ModelConfig, &Adapter),
    options: Vec<(&str, Value)>,
) -> Result<(), Error> {
    let common = [
        ("base_model_name_or_path", base.into()),
        ("inference_mode", true.into()),
        ("peft_type", peft_type.into()),
        ("task_type", task_type(model).into()),
    ];
    let names = &adapter.saved.names;
    let saved = (!names.is_empty()).then(|| ("modules_to_save", names.clone().into()));
    let all = common.into_iter().chain(options).chain(saved);
    let sorted: BTreeMap<&str, Value> = all.collect();
    let map: Map<String, Value> = sorted
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
    Ok(write_adapter_config(folder, &map)?)
}

/// Refuses keys that a method's config does not have; one that is null, false or empty asks for nothing.
pub(super) fn check_keys(raw: &HfConfig, own: &[&str]) -> Result<(), FormatError> {
    let known = |key: &str| COMMON_KEYS.contains(&key) || own.contains(&key);
    match raw
        .map()
        .iter()
        .find(|(key, value)| !known(key) && !is_inactive(value))
    {
        None => Ok(()),
        Some((key, _)) => {
            let keys: Vec<&str> = own.iter().chain(COMMON_KEYS).copied().collect();
            Err(raw.unsupported(key, format!("only the keys {}", keys.join(", "))))
        }
    }
}

/// The shape of each slot in a file: a vector has one dimension, and factors of a linear's output are a column.
fn stored_shapes(adapter: &Adapter) -> Vec<Vec<usize>> {
    let vectors = adapter.vectors();
    let outputs: HashSet<usize> = adapter
        .scaled
        .values()
        .filter_map(|site| site.output)
        .collect();
    let shape = |slot: usize| {
        let (rows, cols) = adapter.params.shape(slot);
        if vectors.contains(&slot) {
            vec![cols]
        } else if outputs.contains(&slot) {
            vec![cols, rows]
        } else {
            vec![rows, cols]
        }
    };
    (0..adapter.params.slots()).map(shape).collect()
}

/// The tensors of modules that are saved as a whole, in the order of their slots.
pub(super) fn saved_specs(adapter: &Adapter) -> impl Iterator<Item = TensorSpec> {
    let shapes = stored_shapes(adapter);
    let slots = adapter.saved.slots.clone();
    slots.map(move |slot| TensorSpec {
        name: adapter.names[slot].clone(),
        dtype: StoredDType::F32,
        shape: shapes[slot].clone(),
    })
}

/// Writes every slot under its name, f32.
pub(super) fn write_values(folder: &Path, adapter: &Adapter, base: BaseMark) -> Result<(), Error> {
    let specs: Vec<TensorSpec> = adapter
        .names
        .iter()
        .zip(stored_shapes(adapter))
        .map(|(name, shape)| TensorSpec {
            name: name.clone(),
            dtype: StoredDType::F32,
            shape,
        })
        .collect();
    write_safetensors(
        &folder.join(ADAPTER_WEIGHTS),
        &specs,
        &base.metadata(),
        |slot, out| out.write_all(&adapter.params.view(slot).to_le_bytes(DType::F32)),
    )?;
    Ok(())
}

/// Fills every slot from the tensor of its name.
///
/// # Errors
/// Tensors that are missing, of another shape, or left over, and values that are not finite; all are named.
pub(super) fn read_values(weights: &Checkpoint, adapter: &mut Adapter) -> Result<(), Error> {
    read_slots(weights, adapter, 0..adapter.params.slots(), &[])
}

/// [`read_values`] of some slots; tensors of the names `others` are read elsewhere.
pub(super) fn read_slots(
    weights: &Checkpoint,
    adapter: &mut Adapter,
    slots: Range<usize>,
    others: &[&str],
) -> Result<(), Error> {
    let shapes = stored_shapes(adapter);
    let (mut problems, mut entries) = (Vec::new(), Vec::new());
    for slot in slots.clone() {
        let (name, shape) = (&adapter.names[slot], shapes[slot].clone());
        let (rows, cols) = adapter.params.shape(slot);
        match weights.get(name) {
            None => problems.push(format!("{name}: missing (expected {shape:?})")),
            Some(entry) if entry.shape != shape => {
                problems.push(format!(
                    "{name}: shape {:?}, the model needs {shape:?}",
                    entry.shape
                ));
            }
            Some(entry) => {
                let values = Tensor::from_f32(rows, cols, entry.to_f32()?);
                adapter.params.view_mut(slot).copy_from(values.view());
                entries.push(entry);
            }
        }
    }
    let own = adapter.names[slots].iter().map(String::as_str);
    let used: BTreeSet<&str> = own.chain(others.iter().copied()).collect();
    problems.extend(
        weights
            .names()
            .filter(|name| !used.contains(name))
            .map(|name| format!("{name}: no adapted module of this model reads it")),
    );
    if problems.is_empty() {
        return Ok(check_finite(&entries)?);
    }
    let missing = |name: &&String| weights.get(name).is_none();
    let renamed: Vec<(&str, &str)> = weights
        .names()
        .filter(|name| !used.contains(name))
        .filter_map(|found| {
            let mut wanted = adapter.names.iter().filter(missing);
            let expected = wanted.find(|name| parts(name) == parts(found))?;
            Some((found, expected.as_str()))
        })
        .collect();
    if let Some((found, expected)) = renamed.first() {
        // One cause for all of them is told once, in place of two lines for each.
        problems.retain(|problem| {
            let name = problem.split(": ").next().unwrap_or_default();
            !renamed.iter().any(|(a, b)| name == *a || name == *b)
        });
        problems.push(format!(
            "{} tensors have other names than PEFT's save_pretrained writes: there is {found}, and {expected} is read; \
             rename them, or save the adapter again with save_pretrained",
            renamed.len()
        ));
    } else {
        problems.push("is this adapter for another model?".to_owned());
    }
    Err(Error::Tensors {
        path: weights.path().to_path_buf(),
        problems,
    })
}

/// A tensor's name without what wrappers put into it: an adapter's name, and the parts that PEFT, torch.compile and
/// distributed training add.
fn parts(name: &str) -> Vec<&str> {
    const WRAPPERS: &[&str] = &[
        "_fsdp_wrapped_module",
        "_orig_mod",
        "base_layer",
        "base_model",
        "model",
        "module",
        "weight",
    ];
    let all: Vec<&str> = name.split('.').collect();
    // What stands between lora_A and weight is the name that the adapter had in the program.
    let branch = all.iter().position(|part| part.starts_with("lora_"));
    let end = branch.map_or(all.len(), |at| at + 1);
    all[..end]
        .iter()
        .copied()
        .filter(|part| !WRAPPERS.contains(part))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::parts;

    #[test]
    fn wrapped_names_mean_the_same_tensor() {
        let expected = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
        for found in [
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
            "module.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "model.layers.0.self_attn.q_proj.base_layer.lora_A.weight",
            "base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.mine.weight",
        ] {
            assert_eq!(parts(found), parts(expected), "{found}");
        }
        for other in [
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight",
            "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",
        ] {
            assert_ne!(parts(other), parts(expected), "{other}");
        }
    }
}

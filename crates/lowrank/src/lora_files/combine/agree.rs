//! What several adapters must agree on to become one, and what the one says: config, metadata, and tensors that are not combined.

use std::collections::BTreeMap;
use std::path::Path;

use lowrank_formats::checkpoint::TensorEntry;
use lowrank_formats::peft::{
    BASE_FINGERPRINT, FUSED_PARTS, LABELS, LoraConfig, TOKEN_ROWS, TargetModules,
};

use super::super::LoraFile;
use crate::Error;
use crate::names::named;

/// An adapter and where it was read from.
pub(super) type Named<'a> = (&'a Path, &'a LoraFile);

/// What is made of all but the linears.
pub(super) struct Agreed {
    /// With the targets of all; ranks and alphas are nobody's yet.
    pub(super) config: LoraConfig,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) others: Vec<TensorEntry>,
}

/// # Errors
/// Everything that the adapters do not agree on, at once; with `force`, only what no single adapter can be.
pub(super) fn agree(adapters: &[Named], force: bool) -> Result<Agreed, Error> {
    let mut problems = Vec::new();
    shapes(adapters, &mut problems);
    let others = others(adapters, &mut problems);
    one_of(adapters, "trainable_token_indices", &mut problems, |file| {
        let indices = file.config.trainable_token_indices.as_ref();
        indices.map(|indices| indices.to_json().to_string())
    });
    one_of(
        adapters,
        "the labels in the metadata",
        &mut problems,
        |file| file.metadata.get(LABELS).cloned(),
    );
    if !force {
        let is_possible = problems.is_empty();
        bases(adapters, &mut problems);
        if is_possible && !problems.is_empty() {
            problems.push(format!("{} combines them all the same", named("force")));
        }
    }
    if !problems.is_empty() {
        return Err(Error::Settings(format!(
            "these adapters cannot be combined:\n  {}",
            problems.join("\n  ")
        )));
    }
    Ok(Agreed {
        config: config(adapters),
        metadata: metadata(adapters),
        others,
    })
}

/// Requires that all that say something say the same; returns it.
fn one_of(
    adapters: &[Named],
    what: &str,
    problems: &mut Vec<String>,
    says: impl Fn(&LoraFile) -> Option<String>,
) -> Option<String> {
    let mut known: Option<(&Path, String)> = None;
    for (folder, file) in adapters {
        let Some(said) = says(file) else {
            continue;
        };
        match &known {
            None => known = Some((folder, said)),
            Some((_, same)) if *same == said => {}
            Some((first, other)) => {
                problems.push(format!(
                    "{what}: {other} in {}, {said} in {}",
                    first.display(),
                    folder.display()
                ));
                break;
            }
        }
    }
    known.map(|(_, said)| said)
}

/// That all are beside one model, and for one purpose.
fn bases(adapters: &[Named], problems: &mut Vec<String>) {
    let fingerprint = |file: &LoraFile| file.metadata.get(BASE_FINGERPRINT).cloned();
    let before = problems.len();
    one_of(
        adapters,
        "the fingerprint of the base",
        problems,
        fingerprint,
    );
    let known_to_be_one =
        problems.len() == before && adapters.iter().all(|(_, file)| fingerprint(file).is_some());
    if !known_to_be_one {
        // A fingerprint says more than a name, which is another one where a model was moved.
        one_of(adapters, "base_model_name_or_path", problems, |file| {
            file.config.base_model_name_or_path.clone()
        });
        one_of(adapters, "revision", problems, |file| {
            file.config.revision.clone()
        });
    }
    one_of(adapters, "task_type", problems, |file| {
        file.config.task_type.clone()
    });
}

fn shapes(adapters: &[Named], problems: &mut Vec<String>) {
    let mut known: BTreeMap<&str, (&Path, [usize; 2])> = BTreeMap::new();
    for (folder, file) in adapters {
        for module in &file.modules {
            let shape = [module.b.rows(), module.a.cols()];
            let (first, other) = known.entry(&module.name).or_insert((folder, shape));
            if *other != shape {
                problems.push(format!(
                    "{}: the weight is {other:?} in {}, {shape:?} in {}; are they adapters of different models?",
                    module.name,
                    first.display(),
                    folder.display()
                ));
            }
        }
    }
}

/// Tensors that belong to no linear: each of one adapter, or with the same values in all that have it.
fn others(adapters: &[Named], problems: &mut Vec<String>) -> Vec<TensorEntry> {
    let mut found: BTreeMap<&str, (&Path, &TensorEntry)> = BTreeMap::new();
    for (folder, file) in adapters {
        for entry in &file.others {
            let (first, known) = found.entry(&entry.name).or_insert((folder, entry));
            let same = known.shape == entry.shape
                && known
                    .to_f32()
                    .ok()
                    .is_some_and(|values| entry.to_f32().ok() == Some(values));
            if !same {
                problems.push(format!(
                    "{}: {} and {} have other values for it, and what replaces a part of the model is not combined; \
                     leave one of the two out, or train them without modules_to_save and rows of tokens",
                    entry.name,
                    first.display(),
                    folder.display()
                ));
            }
        }
    }
    for (name, (folder, _)) in &found {
        // Rows of a table, and the table as a whole.
        let Some(table) = name.strip_suffix(TOKEN_ROWS) else {
            continue;
        };
        if let Some((other, _)) = found.get(format!("{table}weight").as_str()) {
            problems.push(format!(
                "{name}: {} has rows of this table, and {} all of it; one adapter has one of the two",
                folder.display(),
                other.display()
            ));
        }
    }
    for (folder, file) in adapters {
        for whole in &file.config.modules_to_save {
            for (other, with_linears) in adapters {
                let is_it = |name: &str| {
                    let rest = name.strip_suffix(whole.as_str());
                    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
                };
                if let Some(module) = with_linears.modules.iter().find(|m| is_it(&m.name)) {
                    problems.push(format!(
                        "{}: {} replaces it, and {} has a LoRA of it; one adapter has one of the two",
                        module.name,
                        folder.display(),
                        other.display()
                    ));
                }
            }
        }
    }
    found
        .into_values()
        .map(|(_, entry)| entry.clone())
        .collect()
}

fn metadata(adapters: &[Named]) -> BTreeMap<String, String> {
    let Some(((_, first), rest)) = adapters.split_first() else {
        return BTreeMap::new();
    };
    let mut metadata = first.metadata.clone();
    metadata.retain(|key, value| {
        key != FUSED_PARTS
            && rest
                .iter()
                .all(|(_, file)| file.metadata.get(key) == Some(value))
    });
    // A classifier's labels go with its values, which one adapter may have alone.
    let mut labels = adapters
        .iter()
        .filter_map(|(_, file)| file.metadata.get(LABELS));
    if let Some(labels) = labels.next() {
        metadata.insert(LABELS.to_owned(), labels.clone());
    }
    metadata
}

fn config(adapters: &[Named]) -> LoraConfig {
    let Some(((_, first), rest)) = adapters.split_first() else {
        return LoraConfig::default();
    };
    let mut config = first.config.clone();
    config.use_rslora = false;
    config.init_lora_weights = true.into();
    config.rank_pattern.clear();
    config.alpha_pattern.clear();
    for (_, LoraFile { config: other, .. }) in rest {
        for name in &other.modules_to_save {
            if !config.modules_to_save.contains(name) {
                config.modules_to_save.push(name.clone());
            }
        }
        config.task_type = config.task_type.or_else(|| other.task_type.clone());
        if config.base_model_name_or_path.is_none() {
            config
                .base_model_name_or_path
                .clone_from(&other.base_model_name_or_path);
            config.revision.clone_from(&other.revision);
        }
        config.fan_in_fan_out |= other.fan_in_fan_out;
        if config.auto_mapping != other.auto_mapping {
            config.auto_mapping = None;
        }
        if config.lora_dropout != other.lora_dropout {
            config.lora_dropout = 0.0;
        }
        if config.trainable_token_indices.is_none() {
            config
                .trainable_token_indices
                .clone_from(&other.trainable_token_indices);
        }
        targets(&mut config, other);
    }
    config
}

/// Targets that mean the modules of both, or none where that takes more than a list of names; [`LoraFile::config_of_modules`] then
/// names every module.
fn targets(config: &mut LoraConfig, other: &LoraConfig) {
    let same = config.target_modules == other.target_modules
        && config.exclude_modules == other.exclude_modules
        && config.layers_to_transform == other.layers_to_transform
        && config.layers_pattern == other.layers_pattern;
    if same {
        return;
    }
    let is_plain = |config: &LoraConfig| {
        config.exclude_modules.is_none()
            && config
                .layers_to_transform
                .as_deref()
                .is_none_or(<[usize]>::is_empty)
    };
    let (plain, other_plain) = (is_plain(config), is_plain(other));
    match (&mut config.target_modules, &other.target_modules) {
        (TargetModules::List(names), TargetModules::List(more)) if plain && other_plain => {
            let new: Vec<String> = more
                .iter()
                .filter(|name| !names.contains(name))
                .cloned()
                .collect();
            names.extend(new);
        }
        (targets, _) => *targets = TargetModules::List(Vec::new()),
    }
}

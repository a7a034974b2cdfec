//! Modules that are trained and saved as a whole beside what a method adapts (PEFT's `modules_to_save`): any linear, norm or
//! embedding, and always the classifier of a model that has one.

use std::path::Path;

use lowrank_formats::checkpoint::Checkpoint;
use lowrank_formats::hf_config::HfConfig;
use lowrank_formats::peft::{ADAPTER_CONFIG, read_adapter_config};

use super::files::read_slots;
use super::targets::Targets;
use crate::Error;
use crate::fields::fields;
use crate::model::{Adapter, HeadKind, LinearKind, ModelConfig, WeightId, families};

fields! {
    /// Modules beside what a method adapts.
    pub struct Settings {
        /// Modules to train and save as a whole: names as lm_head or embed_tokens; a classifier's head is always among them
        #[arg(value_name = "MODULES", help_heading = "LoRA")]
        #[fixes(Shape)]
        pub modules_to_save: Option<Targets>,
    }
}

impl Settings {
    /// The names that are given.
    fn names(&self) -> Result<Vec<String>, Error> {
        match &self.modules_to_save {
            None => Ok(Vec::new()),
            Some(Targets::Names(names)) => Ok(names.clone()),
            Some(Targets::Pattern(pattern)) => Err(Error::Settings(format!(
                "modules_to_save is {pattern:?}; give names of modules, such as lm_head"
            ))),
        }
    }
}

/// The names that PEFT adds for a classifier, whichever of them it has.
const OF_CLASSIFIERS: [&str; 2] = ["classifier", "score"];

/// A tensor and its shape.
type Shaped = (WeightId, (usize, usize));

/// What a run's settings add to a method's own values.
///
/// # Errors
/// Names that match no module.
pub(super) fn add(
    adapter: &mut Adapter,
    model: &ModelConfig,
    settings: &Settings,
    prefix: &str,
) -> Result<(), Error> {
    let mut names = settings.names()?;
    if model.classifier().is_some() {
        let missing = OF_CLASSIFIERS
            .iter()
            .filter(|name| !names.iter().any(|n| n == *name));
        names.extend(missing.map(ToString::to_string).collect::<Vec<_>>());
        names.extend(holder_of_dense(model, &names));
    }
    append(adapter, model, names, prefix).map_err(|problems| Error::Settings(problems.join("\n")))
}

/// The same of an adapter's folder.
///
/// # Errors
/// Names that match no module.
pub(super) fn add_of_folder(
    adapter: &mut Adapter,
    model: &ModelConfig,
    folder: &Path,
    prefix: &str,
) -> Result<(), Error> {
    let raw = read_adapter_config(folder)?;
    let names = names_of(&raw)?;
    append(adapter, model, names, prefix).map_err(|problems| Error::Tensors {
        path: folder.join(ADAPTER_CONFIG),
        problems,
    })
}

/// The same with the values, which stand in `weights` beside a method's own tensors.
///
/// # Errors
/// As [`add_of_folder`]; tensors that are missing, left over, or of another shape.
pub(super) fn read_of_folder(
    weights: &Checkpoint,
    folder: &Path,
    model: &ModelConfig,
    adapter: &mut Adapter,
    prefix: &str,
    others: &[&str],
) -> Result<(), Error> {
    add_of_folder(adapter, model, folder, prefix)?;
    read_slots(weights, adapter, adapter.saved.slots.clone(), others)
}

/// What holds the first linear of a classifier, where that is saved and none of the names means it.
fn holder_of_dense(model: &ModelConfig, names: &[String]) -> Option<String> {
    model.classifier_dense().filter(|dense| dense.saved)?;
    let dense = model.classifier_linear(LinearKind::Dense);
    let module = families::linear_module(model, dense);
    if names.iter().any(|name| means(name, &module)) {
        return None;
    }
    let holder = module.rsplit('.').nth(1);
    Some(holder.unwrap_or(&module).to_owned())
}

fn names_of(raw: &HfConfig) -> Result<Vec<String>, Error> {
    let names = raw.opt_strs("modules_to_save")?.unwrap_or_default();
    Ok(names.into_iter().map(str::to_owned).collect())
}

fn append(
    adapter: &mut Adapter,
    model: &ModelConfig,
    names: Vec<String>,
    prefix: &str,
) -> Result<(), Vec<String>> {
    let modules = modules(model);
    let is_meant = |module: &String| names.iter().any(|name| means(name, module));
    let unmatched = names.iter().filter(|name| {
        let matches = modules.iter().any(|(module, _)| means(name, module));
        !matches && !OF_CLASSIFIERS.contains(&name.as_str())
    });
    let mut problems: Vec<String> = unmatched
        .map(|name| format!("modules_to_save: `{name}` matches no module with weights"))
        .collect();
    let chosen: Vec<Shaped> = modules
        .iter()
        .filter(|(module, _)| is_meant(module))
        .flat_map(|(_, weights)| weights)
        .filter(|(id, _)| !adapter.replaced.contains_key(id))
        .copied()
        .collect();
    let has = |wanted| chosen.iter().any(|(id, _)| *id == wanted);
    let tied = model.head == HeadKind::LanguageModel && model.tie_word_embeddings;
    if tied && has(WeightId::Embedding) && !has(WeightId::Head) {
        problems.push(
            "modules_to_save: the embedding is the output projection too; name lm_head beside it, and the two are untied"
                .to_owned(),
        );
    }
    let sites = &adapter.token_rows;
    let by_rows = |id: &WeightId| match id {
        WeightId::Embedding => sites.embedding.is_some(),
        WeightId::Head => sites.head.is_some(),
        _ => false,
    };
    for (id, _) in chosen.iter().filter(|(id, _)| by_rows(id)) {
        problems.push(format!(
            "modules_to_save: {} is trained as a whole, and trainable_token_indices names rows of it; give one of the two",
            families::tensor_name(model, *id)
        ));
    }
    let adapted = |id: &WeightId| match id {
        WeightId::Linear(linear, _) => {
            adapter.low_rank.contains_key(linear) || adapter.scaled.contains_key(linear)
        }
        _ => false,
    };
    for (id, _) in chosen.iter().filter(|(id, _)| adapted(id)) {
        let name = families::tensor_name(model, *id);
        problems.push(format!(
            "modules_to_save: {name} is of a module that is adapted; exclude it with exclude_modules"
        ));
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let named = chosen.into_iter().map(|(id, shape)| {
        let name = format!("{prefix}{}", families::tensor_name(model, id));
        (name, id, shape)
    });
    adapter.replace_also(named.collect());
    adapter.saved.names = names;
    Ok(())
}

/// Whether a name means a module, or one that holds it. PEFT matches by the end alone, so that `classifier` means `pre_classifier` too.
fn means(name: &str, module: &str) -> bool {
    let dots = module.match_indices('.').map(|(at, _)| at);
    let mut prefixes = dots.chain([module.len()]).map(|end| &module[..end]);
    prefixes.any(|prefix| prefix.ends_with(name))
}

/// Every module that has weights, with them. A tied head is one, which can be untied.
fn modules(model: &ModelConfig) -> Vec<(String, Vec<Shaped>)> {
    let mut weights = model.weights();
    if model.head == HeadKind::LanguageModel && model.tie_word_embeddings {
        weights.push((WeightId::Head, (model.vocab_size, model.hidden_size)));
    }
    let mut modules: Vec<(String, Vec<Shaped>)> = Vec::new();
    for (id, shape) in weights {
        let name = families::tensor_name(model, id);
        let module = name
            .rsplit_once('.')
            .map_or(name.as_str(), |(module, _)| module);
        match modules.last_mut() {
            Some((last, weights)) if last == module => weights.push((id, shape)),
            _ => modules.push((module.to_owned(), vec![(id, shape)])),
        }
    }
    modules
}

/// What is saved so, in words, where anything is.
pub(super) fn coverage(adapter: &Adapter) -> Option<String> {
    let saved = adapter.saved.slots.clone();
    let values: usize = saved
        .clone()
        .map(|slot| {
            let (rows, cols) = adapter.params.shape(slot);
            rows * cols
        })
        .sum();
    let names: Vec<&str> = saved
        .map(|slot| adapter.names[slot].trim_start_matches("base_model.model."))
        .collect();
    (!names.is_empty()).then(|| format!("as a whole {} ({values} values)", names.join(", ")))
}

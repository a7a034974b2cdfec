//! A classifier as a user names it: a model, and an adapter that was trained to classify with it.

use std::path::Path;

use anyhow::Context;
use lowrank::base::{Network, Source};
use lowrank::data::{Labels, ProblemType, TaskType, Tokenizer};
use lowrank::model::{Adapter, Purpose};
use lowrank::tuning::{self, Loaded};

use super::common::{BaseArgs, check_is_adapter, warn_of_other_base};
use crate::failure::Misuse;

/// What a model does with an adapter, known before either is loaded.
pub struct Plan {
    /// Where the model is.
    pub source: Source,
    /// What it is for.
    pub purpose: Purpose,
    /// What the outputs of its classifier mean.
    pub labels: Option<Labels>,
}

/// A classifier that is ready to be used.
pub struct Classifier {
    /// The model.
    pub network: Network,
    /// Its adapter.
    pub adapter: Option<Loaded>,
    /// The longest row that it can read.
    pub max_length: usize,
}

/// What `--model` and `--adapter` are for.
///
/// # Errors
/// Files that cannot be used.
pub fn plan(base: &BaseArgs, adapter: Option<&Path>) -> anyhow::Result<Plan> {
    let source = Source::find(&base.model)?;
    let Some(folder) = adapter else {
        let (purpose, labels) = source.purpose()?;
        return Ok(Plan {
            source,
            purpose,
            labels,
        });
    };
    check_is_adapter(folder)?;
    let task = tuning::task_of(folder)?;
    let outputs = || {
        task.outputs.with_context(|| {
            format!(
                "{}: its task_type is {}, and it holds no classifier (classifier.weight or score.weight)",
                folder.display(),
                task.task_type
            )
        })
    };
    let purpose = match task.task_type.as_str() {
        "SEQ_CLS" => Purpose::SequenceClassifier { labels: outputs()? },
        "TOKEN_CLS" => Purpose::TokenClassifier { labels: outputs()? },
        "FEATURE_EXTRACTION" => Purpose::Features,
        _ => Purpose::LanguageModel,
    };
    let labels = match purpose {
        Purpose::SequenceClassifier { labels } | Purpose::TokenClassifier { labels } => {
            Some(labels_of(&task, labels, &source, folder)?)
        }
        Purpose::LanguageModel | Purpose::Features => None,
    };
    Ok(Plan {
        source,
        purpose,
        labels,
    })
}

/// What the adapter's file says of its outputs, or what the model's config.json does, or numbers.
fn labels_of(
    task: &tuning::Task,
    outputs: usize,
    source: &Source,
    folder: &Path,
) -> anyhow::Result<Labels> {
    if let Some(text) = &task.labels {
        return serde_json::from_str(text).with_context(|| {
            format!(
                "{}: the labels in its metadata are damaged",
                folder.display()
            )
        });
    }
    let (_, of_model) = source.purpose()?;
    if let Some(labels) = of_model.filter(|labels| labels.names.len() == outputs) {
        return Ok(labels);
    }
    Ok(Labels {
        names: (0..outputs).map(|n| format!("LABEL_{n}")).collect(),
        problem_type: if outputs == 1 && task.task_type == "SEQ_CLS" {
            ProblemType::Regression
        } else {
            ProblemType::SingleLabelClassification
        },
    })
}

impl Plan {
    /// The task of a classifier; `None` of a model that is none.
    pub fn task(&self) -> Option<TaskType> {
        match self.purpose {
            Purpose::SequenceClassifier { .. } => Some(TaskType::SeqCls),
            Purpose::TokenClassifier { .. } => Some(TaskType::TokenCls),
            Purpose::LanguageModel | Purpose::Features => None,
        }
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// Files that cannot be used.
    pub fn tokenizer(&self) -> anyhow::Result<Tokenizer> {
        Ok(self.source.tokenizer()?)
    }

    /// Loads model and adapter.
    ///
    /// # Errors
    /// Files that cannot be used; a classifier whose last linear nobody trained.
    pub fn load(self, base: &BaseArgs, adapter: Option<&Path>) -> anyhow::Result<Classifier> {
        let Self {
            source,
            purpose,
            labels,
        } = self;
        let network = source.load_for(base.base_dtype.into(), purpose, labels, 0)?;
        let weights = network.decoder.weights();
        let adapter = adapter
            .map(|folder| {
                let loaded = tuning::load(folder, network.decoder.config())?;
                tracing::info!("{}: {}", folder.display(), loaded.coverage);
                warn_of_other_base(folder, &loaded, weights, &network.source);
                Ok::<_, anyhow::Error>(loaded)
            })
            .transpose()?;
        let trained = adapter.as_ref().map(|loaded| &loaded.adapter);
        let replaced = |name: &String| {
            trained.is_some_and(|adapter| adapter.names.iter().any(|own| own.ends_with(name)))
        };
        let new = weights.new_names();
        if let Some(name) = new.iter().find(|name| !replaced(name)) {
            return Err(Misuse::new(format!(
                "{} has no trained classifier ({name} is missing); give --adapter, or a model that was trained to classify",
                network.source
            ))
            .into());
        }
        let virtual_tokens = trained.map_or(0, |adapter| adapter.virtual_tokens().total());
        let positions = network.decoder.config().max_position_embeddings;
        Ok(Classifier {
            max_length: positions.saturating_sub(virtual_tokens),
            network,
            adapter,
        })
    }
}

impl Classifier {
    /// What was trained.
    pub fn trained(&self) -> Option<&Adapter> {
        self.adapter.as_ref().map(|loaded| &loaded.adapter)
    }
}

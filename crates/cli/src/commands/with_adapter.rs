//! A model as a user names it, of any purpose, and the adapter beside it.

use std::path::Path;

use lowrank::base::{Network, Source};
use lowrank::data::{Labels, TaskType, Tokenizer};
use lowrank::model::{Adapter, Purpose};
use lowrank::train::BaseDtype;
use lowrank::tuning::{self, Loaded};

use super::common::{check_is_adapter, warn_of_other_base};
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

/// A model that is ready to be used.
pub struct WithAdapter {
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
pub fn plan(model: &str, adapter: Option<&Path>) -> anyhow::Result<Plan> {
    plan_of(Source::find(model)?, adapter)
}

/// The same for a model that was found.
///
/// # Errors
/// Files that cannot be used.
pub fn plan_of(mut source: Source, adapter: Option<&Path>) -> anyhow::Result<Plan> {
    if let Some(folder) = adapter {
        check_is_adapter(folder)?;
        source = source.with_tokens_of(&[folder])?;
    }
    let (purpose, labels) = lowrank::train::purpose_with(&source, adapter)?;
    Ok(Plan {
        source,
        purpose,
        labels,
    })
}

impl Plan {
    /// Why a model that is no classifier cannot classify.
    pub fn no_classifier(&self) -> Misuse {
        Misuse::new(format!(
            "{} is no classifier; give an --adapter that was trained to classify, or a model that was",
            self.source
        ))
    }

    /// Whether the model is a bare encoder.
    pub fn is_bare_encoder(&self) -> bool {
        self.purpose == Purpose::Features
    }

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
    pub fn load(self, dtype: BaseDtype, adapter: Option<&Path>) -> anyhow::Result<WithAdapter> {
        let Self {
            source,
            purpose,
            labels,
        } = self;
        let network = source.load_for(dtype.into(), purpose, labels, 0)?;
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
        if let (Some(outputs), None, Some(labels)) =
            (weights.other_labels(), trained, &network.labels)
        {
            return Err(Misuse::new(format!(
                "{}: its classifier has {outputs} outputs, and config.json names {} labels (id2label); give it as many as there are \
                 outputs",
                network.source,
                labels.names.len()
            ))
            .into());
        }
        if let Some(name) = weights.untrained(trained) {
            return Err(Misuse::new(format!(
                "{} has no trained classifier ({name} is missing); give --adapter, or a model that was trained to classify",
                network.source
            ))
            .into());
        }
        let virtual_tokens = trained.map_or(0, |adapter| adapter.virtual_tokens().total());
        let positions = network.decoder.config().longest_sequence();
        Ok(WithAdapter {
            max_length: positions.saturating_sub(virtual_tokens),
            network,
            adapter,
        })
    }
}

impl WithAdapter {
    /// What was trained.
    pub fn trained(&self) -> Option<&Adapter> {
        self.adapter.as_ref().map(|loaded| &loaded.adapter)
    }
}

//! The run: from settings to a folder that PEFT loads.

use std::sync::atomic::AtomicBool;

use super::checkpoint;
use super::events::{Event, Observer};
use super::folder;
use super::memory::check_room;
use super::outcome::Outcome;
use super::prepare::prepare;
use super::resume;
use super::trainer::{Rows, Trainer};
use crate::Error;
use crate::base::{Base, Source};
use crate::data::{DataOptions, Dataset, Split, TaskType, split_file};
use crate::lock::FolderLock;
use crate::settings::TrainConfig;

/// How a run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// In a new folder, or in place of an earlier run's.
    Fresh {
        /// Whether an earlier run's folder is replaced.
        overwrite: bool,
    },
    /// From the newest checkpoint of the run in the output folder.
    Resume,
}

/// Runs a training from its settings and writes its folder, in which no other run may be at work. `stop` ends it after
/// the step under way.
///
/// # Errors
/// Settings, files or data that can't be used; a loss that is not finite; a file that can't be written.
pub fn train(
    config: &TrainConfig,
    start: Start,
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Outcome, Error> {
    config.check()?;
    let find_base = || Source::find(&config.model);
    if start != Start::Resume {
        find_base()?;
    }
    FolderLock::refuse_busy(&config.output)?;
    let config = &TrainConfig {
        began: folder::check(config, start)?,
        ..config.clone()
    };
    if start == Start::Resume
        && let Some(outcome) = resume::finished(config)
    {
        observer.event(&Event::Note(resume::finished_note(config, &outcome)));
        return Ok(outcome);
    }
    let source = find_base()?;
    // The same but for where an adapter to start from is found.
    let begins = &adapter_in_checkpoint(config, start).unwrap_or_else(|| config.clone());
    let model = source.model_config()?;
    let loading = source.loading_bytes(&model, config.base_dtype.into());
    check_room(begins, &model, loading)?;
    let (_lock, warning) = FolderLock::take(&config.output)?;
    if let Some(warning) = warning {
        observer.event(&Event::Note(warning));
    }
    let mut base = source.load(config.base_dtype.into())?;
    if let Some(began) = &config.began {
        base.tokenizer.set_date(began.time);
    }
    let options = DataOptions {
        max_seq_length: config.max_seq_length,
        train_on_prompt: config.train_on_prompt,
        on_bad_row: config.on_bad_row,
        completion_boundary: config.completion_boundary,
        task: Some(TaskType::CausalLm),
        labels: None,
        columns: None,
    };
    let data = Dataset::load(&config.data, Split::Train, &base.tokenizer, &options)?;
    observer.event(&Event::Note(data.report.to_string()));
    let valid = load_valid(config, &base, &options)?;
    if let Some(valid) = &valid {
        observer.event(&Event::Note(valid.report.to_string()));
    }
    let network = base.into_network();
    if start == Start::Resume {
        resume::check_base(config, &network)?;
    }
    let trained = prepare(begins, &network, &data.examples, observer)?;
    let valid = valid.map(|valid| valid.examples).unwrap_or_default();
    let rows = Rows {
        train: &data.examples,
        valid: &valid,
    };
    let trainer = match start {
        Start::Resume => Trainer::go_on(config, &network, trained, rows, observer),
        Start::Fresh { overwrite } => {
            Trainer::begin(config, &network, trained, rows, overwrite, observer)
        }
    };
    trainer?.run(stop)
}

/// The settings of a resumed run whose `init_adapter` is gone: the newest checkpoint has its options, and the values are
/// read from there in any case.
fn adapter_in_checkpoint(config: &TrainConfig, start: Start) -> Option<TrainConfig> {
    let folder = config.init_adapter.as_ref()?;
    if start != Start::Resume || folder.exists() {
        return None;
    }
    let steps = checkpoint::steps(&config.output).into_iter().rev();
    let found = steps
        .map(|step| checkpoint::step_folder(&config.output, step))
        .find(|folder| checkpoint::has_adapter(folder))?;
    Some(TrainConfig {
        init_adapter: Some(found),
        ..config.clone()
    })
}

fn load_valid(
    config: &TrainConfig,
    base: &Base,
    options: &DataOptions,
) -> Result<Option<Dataset>, Error> {
    if let Some(path) = &config.valid_data {
        let split = if path.is_dir() {
            Split::Valid
        } else {
            Split::File
        };
        return Ok(Some(Dataset::load(path, split, &base.tokenizer, options)?));
    }
    match split_file(&config.data, Split::Valid)? {
        Some(_) => Ok(Some(Dataset::load(
            &config.data,
            Split::Valid,
            &base.tokenizer,
            options,
        )?)),
        None => Ok(None),
    }
}

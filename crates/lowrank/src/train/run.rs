//! The run: from settings to a folder that PEFT loads.

use std::sync::atomic::AtomicBool;

use lowrank_kernels::release_freed_memory;

use super::checkpoint;
use super::events::{Event, Observer, Silent};
use super::folder;
use super::memory::check_room;
use super::outcome::Outcome;
use super::prepare::prepare_on;
use super::purpose::{purpose_of, purpose_with};
use super::resume;
use super::trainer::{Rows, Trainer};
use crate::Error;
use crate::base::{Network, Source, purpose_for};
use crate::data::{
    DataOptions, Dataset, Example, Labels, ProblemType, Split, Tokenizer, is_read_once, split_file,
};
use crate::lock::FolderLock;
use crate::model::weights::{TensorMarks, fingerprint_of, hash_of};
use crate::model::{ModelConfig, Purpose, Stage, split};
use crate::names::{named, valued};
use crate::random::mix;
use crate::ranks::Ranks;
use crate::settings::{Began, TrainConfig};
use crate::tuning::lora::of_new_tokens;
use crate::tuning::task_of;

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

/// As [`train`], watched by nobody and never stopped.
///
/// # Errors
/// As [`train`].
pub fn run(config: &TrainConfig, start: Start) -> Result<Outcome, Error> {
    train(config, start, &mut Silent, &AtomicBool::new(false))
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
    train_on(Ranks::alone(), config, start, observer, stop)
}

/// A rank's part of [`train`]. All ranks call it with the same settings; rank 0 alone writes, and the outcome is whole there.
///
/// # Errors
/// As [`train`], on all ranks: the message of rank 0 names a rank that failed. An error of one rank alone, such as a file that only
/// rank 0 writes, is not known to the others, who wait: whoever gets it ends the job ([`Communicator::abort`](crate::comm::Communicator::abort)).
pub fn train_on(
    ranks: Ranks<'_>,
    config: &TrainConfig,
    start: Start,
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Outcome, Error> {
    let began = ranks.agree(may_begin(&ranks, config, start))?;
    let began = ranks.from_first(ranks.is_first().then_some(began))?;
    let config = &TrainConfig {
        began,
        ..config.clone()
    };
    if start == Start::Resume {
        let finished = ranks.is_first().then(|| resume::finished(config));
        let is_finished = finished.as_ref().map(Option::is_some);
        if ranks.from_first(is_finished)? {
            let outcome = finished.flatten().unwrap_or_default();
            if ranks.is_first() {
                observer.event(&Event::Note(resume::finished_note(config, &outcome)));
            }
            return Ok(outcome);
        }
    }
    let loaded = ranks.agree(load(&ranks, config, start, observer))?;
    let Loaded {
        network,
        train: data,
        valid,
        begins,
        lock: _lock,
    } = loaded;
    know_the_whole(&ranks, &network)?;
    if start == Start::Resume {
        ranks.agree(resume::check_base(config, &network))?;
    }
    // A checkpoint that cannot be read ends the run later.
    let has_checkpoint = || start == Start::Resume && !checkpoint::steps(&config.output).is_empty();
    let is_resumed = ranks.from_first(ranks.is_first().then(has_checkpoint))?;
    let trained = prepare_on(ranks, &begins, &network, &data, is_resumed, observer);
    let trained = ranks.agree(trained)?;
    let rows = Rows {
        train: &data,
        valid: &valid,
    };
    let trainer = match start {
        Start::Resume => Trainer::go_on(ranks, config, &network, trained, rows, observer),
        Start::Fresh { overwrite } => {
            Trainer::begin(ranks, config, &network, trained, rows, overwrite, observer)
        }
    };
    trainer?.run(stop)
}

/// Whether a run may begin or go on, before anything is read; and when and where it began.
fn may_begin(
    ranks: &Ranks<'_>,
    config: &TrainConfig,
    start: Start,
) -> Result<Option<Began>, Error> {
    config.check()?;
    if start != Start::Resume {
        Source::find(&config.model)?.load_in(config.load_in)?;
    }
    if ranks.are_several() && is_read_once(&config.data) {
        return Err(Error::Settings(format!(
            "the rows come from a pipe ({}), which one rank alone can read; write them to a file that all ranks see, and give it as {data}",
            config.data.display(),
            data = named("data")
        )));
    }
    // What is in the folder matters to rank 0, which writes it.
    if !ranks.is_first() {
        return Ok(None);
    }
    FolderLock::refuse_busy(&config.output)?;
    folder::check(config, start)
}

/// What a run has read before it begins.
struct Loaded {
    network: Network,
    train: Vec<Example>,
    valid: Vec<Example>,
    /// The settings that the trained values begin with.
    begins: TrainConfig,
    lock: Option<FolderLock>,
}

/// Reads the rows and this rank's stage of the model.
fn load(
    ranks: &Ranks<'_>,
    config: &TrainConfig,
    start: Start,
    observer: &mut dyn Observer,
) -> Result<Loaded, Error> {
    // The same but for where an adapter to start from is found, and which rows new tokens have.
    let begins = adapter_in_checkpoint(config, start).unwrap_or_else(|| config.clone());
    let (source, notes) = with_tokens(
        Source::find(&config.model)?.load_in(config.load_in)?,
        &begins,
        start,
    )?;
    let model = source.model_config_for(likely_purpose(&source, &begins)?)?;
    let begins = with_rows(begins, &source, &model);
    if ranks.stages() == 1 {
        let loading = source.loading_bytes(&model, config.base_dtype.into());
        check_room(ranks, &begins, &model, loading)?;
    }
    let mut lock = None;
    if ranks.is_first() {
        let (taken, warning) = FolderLock::take(&config.output)?;
        lock = Some(taken);
        if let Some(warning) = warning {
            observer.event(&Event::Note(warning));
        }
    }
    for note in notes {
        observer.event(&Event::Note(note));
    }
    let mut tokenizer = source.tokenizer()?;
    if let Some(began) = &config.began {
        tokenizer.set_date(began.time);
    }
    let known = known_labels(&source, &begins)?;
    let options = DataOptions {
        order: known.clone(),
        ..data_options(config, &model)
    };
    let data = Dataset::load(&config.data, Split::Train, &tokenizer, &options)?;
    observer.event(&Event::Note(data.report.to_string()));
    // Held-out rows are of the same task, and have the same labels.
    let options = DataOptions {
        task: Some(data.kind.task()),
        labels: data.labels.clone(),
        ..options
    };
    let valid = load_valid(config, &tokenizer, &options)?;
    if let Some(valid) = &valid {
        observer.event(&Event::Note(valid.report.to_string()));
    }
    drop(tokenizer);
    release_freed_memory();
    let purpose = purpose_of(data.kind.task(), data.labels.as_ref());
    let (dtype, labels) = (config.base_dtype.into(), data.labels);
    let begin = (mix(config.seed, 3), config.new_classifier);
    // Tokens that are added to the model are there once it is loaded.
    let rows = model.vocab_size;
    let network = source.load_network(dtype, purpose, labels, begin, &|model| {
        let vocab_size = model.vocab_size.max(rows);
        let grown = ModelConfig {
            vocab_size,
            ..model.clone()
        };
        stage_of(ranks, &begins, &grown)
    })?;
    check_labels(config, &network)?;
    // config.json may name the labels of a classifier that the files lack.
    let goes_on =
        config.init_adapter.is_some() || network.decoder.weights().new_last_names().is_empty();
    if let (true, Some(known), Some(labels)) = (goes_on, &known, &network.labels) {
        check_names(config, &network.source, known, labels)?;
    }
    note_new_classifier(config, start, &network, observer);
    let begins = with_rows(begins, &network.source, network.decoder.config());
    Ok(Loaded {
        network,
        train: data.examples,
        valid: valid.map(|valid| valid.examples).unwrap_or_default(),
        begins,
        lock,
    })
}

/// The stage of the model that a rank of a pipeline has.
fn stage_of(
    ranks: &Ranks<'_>,
    config: &TrainConfig,
    model: &ModelConfig,
) -> Result<Option<Stage>, Error> {
    if ranks.stages() == 1 {
        return Ok(None);
    }
    let adapter = config.lay_out(model)?;
    let stages = split(model, &adapter, ranks.stages()).map_err(|layers| {
        Error::Settings(format!(
            "the model has {layers} blocks, too few for {} pipeline stages; give {} at most",
            ranks.stages(),
            valued("pipeline_stages", layers)
        ))
    })?;
    Ok(stages.into_iter().nth(ranks.stage()))
}

/// Lets each stage of a pipeline know the marks of the whole base, by which checkpoints and adapters know it again; and refuses ranks that have
/// another base.
fn know_the_whole(ranks: &Ranks<'_>, network: &Network) -> Result<(), Error> {
    let weights = network.decoder.weights();
    let Some(of_checkpoint) = weights.checkpoint_fingerprint() else {
        return Ok(());
    };
    ranks.same(&[(
        "samples of the weights".to_owned(),
        of_checkpoint.to_owned(),
    )])?;
    weights.set_fingerprint(fingerprint_of(&all_marks(ranks, &weights.samples())?.0));
    let own = weights.hashes();
    let (whole, is_same) = all_marks(ranks, &own)?;
    ranks.agree(if is_same {
        Ok(())
    } else {
        Err(Error::Settings(format!(
            "the weights of {} are not those of the first rank with the same stage; let all ranks have the same model",
            network.source
        )))
    })?;
    network.decoder.set_weights_hash(hash_of(&whole));
    Ok(())
}

/// The marks of all tensors from those that each rank has; and whether this rank's are those of the first rank that has them.
fn all_marks(ranks: &Ranks<'_>, own: &TensorMarks) -> Result<(TensorMarks, bool), Error> {
    let mut whole = TensorMarks::new();
    for told in ranks.gather_all(own)? {
        whole.resize(whole.len().max(told.len()), None);
        for (mark, told) in whole.iter_mut().zip(told) {
            if mark.is_none() {
                *mark = told;
            }
        }
    }
    let is_same = own
        .iter()
        .zip(&whole)
        .all(|(own, whole)| own.is_none() || own == whole);
    Ok((whole, is_same))
}

/// Says which parts of a classifier begin at random.
fn note_new_classifier(
    config: &TrainConfig,
    start: Start,
    network: &Network,
    observer: &mut dyn Observer,
) {
    let weights = network.decoder.weights();
    let new = match (start, &config.init_adapter) {
        (Start::Resume, _) => Vec::new(),
        (_, Some(_)) if !config.new_classifier => Vec::new(),
        (_, Some(_)) => weights.new_last_names(),
        (_, None) => weights.new_names(),
    };
    if !new.is_empty() {
        observer.event(&Event::Note(format!(
            "there is no classifier for these rows yet, so these begin at random and are trained: {}",
            new.join(", ")
        )));
    }
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

/// The model with the tokens that are added to it, and what is to be said of them. A run that goes on has them in its folder.
fn with_tokens(
    source: Source,
    config: &TrainConfig,
    start: Start,
) -> Result<(Source, Vec<String>), Error> {
    if let Some(folder) = &config.init_adapter {
        return Ok((source.with_tokens_of(&[folder])?, Vec::new()));
    }
    let Some(file) = config.new_tokens() else {
        return Ok((source, Vec::new()));
    };
    let written = config.output.join("tokenizer.json");
    if start == Start::Resume && written.is_file() {
        return Ok((source.with_tokens_listed_in(&written)?, Vec::new()));
    }
    source.with_new_tokens(file)
}

/// The settings with the rows of a model's new tokens as those that are trained.
fn with_rows(mut config: TrainConfig, source: &Source, model: &ModelConfig) -> TrainConfig {
    let ids = source.new_ids();
    if config.init_adapter.is_none() && !ids.is_empty() {
        let lora = &mut config.options.lora;
        lora.add_tokens = None;
        lora.trainable_token_indices = Some(of_new_tokens(model, ids));
    }
    config
}

/// What the model will be for, as far as that is known before the rows are read.
fn likely_purpose(source: &Source, config: &TrainConfig) -> Result<Purpose, Error> {
    let from = config.init_adapter.as_deref().map(task_of).transpose()?;
    let outputs = from.and_then(|task| task.outputs);
    purpose_for(&source.config()?, config.task_type, outputs)
}

/// The labels of the classifier that the run goes on with: that of the adapter to start from, or the model's own.
fn known_labels(source: &Source, config: &TrainConfig) -> Result<Option<Labels>, Error> {
    if config.new_classifier {
        return Ok(None);
    }
    let adapter = config.init_adapter.as_deref();
    Ok(purpose_with(source, adapter)?.1)
}

/// Refuses rows with other labels than the classifier has that they go on with. Another number of labels is refused where the
/// classifier is read, which knows that there is one.
fn check_names(
    config: &TrainConfig,
    source: &Source,
    known: &Labels,
    found: &Labels,
) -> Result<(), Error> {
    let is_same = known == found || known.are_unnamed() || found.are_unnamed();
    if is_same || known.names.len() != found.names.len() {
        return Ok(());
    }
    let whose = match &config.init_adapter {
        Some(folder) => format!("init_adapter {}", folder.display()),
        None => source.to_string(),
    };
    let shown = |labels: &Labels| match labels.problem_type {
        ProblemType::SingleLabelClassification => labels.names.join(", "),
        ProblemType::MultiLabelClassification => format!("lists of {}", labels.names.join(", ")),
        ProblemType::Regression => "numbers".to_owned(),
    };
    Err(Error::Settings(format!(
        "{whose}: its classifier's labels are {}, and those of the rows are {}; train on rows with its labels, or begin a new classifier \
         with {new_classifier}",
        shown(known),
        shown(found),
        new_classifier = named("new_classifier")
    )))
}

/// Refuses a model whose classifier has another number of labels than the rows, unless a new one may take its place.
fn check_labels(config: &TrainConfig, network: &Network) -> Result<(), Error> {
    let found = network.decoder.weights().other_labels();
    let (Some(found), Some(classifier)) = (found, network.decoder.config().classifier()) else {
        return Ok(());
    };
    if config.new_classifier {
        return Ok(());
    }
    Err(Error::Settings(format!(
        "{}: its classifier has {found} labels, and the rows have {}; train on rows with its labels, or begin a new classifier with \
         {new_classifier}",
        network.source,
        classifier.labels,
        new_classifier = named("new_classifier")
    )))
}

/// How a run reads its rows.
fn data_options(config: &TrainConfig, model: &ModelConfig) -> DataOptions {
    let columns = config.columns.as_ref();
    DataOptions {
        max_seq_length: config.row_length(model),
        train_on_prompt: config.train_on_prompt,
        on_bad_row: config.on_bad_row,
        completion_boundary: config.completion_boundary,
        task: config.task_type,
        labels: None,
        order: None,
        columns: columns.map(|names| split_columns(names)),
    }
}

/// Names of columns between commas.
pub fn split_columns(names: &str) -> Vec<String> {
    let names = names.split(',');
    names.map(|name| name.trim().to_owned()).collect()
}

fn load_valid(
    config: &TrainConfig,
    tokenizer: &Tokenizer,
    options: &DataOptions,
) -> Result<Option<Dataset>, Error> {
    if let Some(path) = &config.valid_data {
        let split = if path.is_dir() {
            Split::Valid
        } else {
            Split::File
        };
        return Ok(Some(Dataset::load(path, split, tokenizer, options)?));
    }
    match split_file(&config.data, Split::Valid)? {
        Some(_) => Ok(Some(Dataset::load(
            &config.data,
            Split::Valid,
            tokenizer,
            options,
        )?)),
        None => Ok(None),
    }
}

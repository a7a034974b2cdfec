//! What a run begins with: a method's first values, or an adapter of an earlier run.

use std::path::Path;

use lowrank_kernels::NumberFormat;

use super::events::{Event, Observer};
use crate::Error;
use crate::base::Network;
use crate::data::Example;
use crate::model::{Adapter, Decoder};
use crate::names::named;
use crate::random::mix;
use crate::ranks::Ranks;
use crate::settings::TrainConfig;
use crate::tuning::{self, AdapterConfig, FirstText, Starting};
use crate::units;

/// A method's trainable values with what its files need.
pub struct Trained {
    /// The values.
    pub adapter: Adapter,
    /// What the adapter's files say; `None` for full training, which writes a whole model.
    pub config: Option<AdapterConfig>,
}

/// The trainable values that a run begins with, and what their files need.
///
/// # Errors
/// Targets that match nothing; an adapter to start from that can't be used.
pub fn prepare(
    config: &TrainConfig,
    base: &Network,
    examples: &[Example],
    observer: &mut dyn Observer,
) -> Result<Trained, Error> {
    prepare_on(Ranks::alone(), config, base, examples, false, observer)
}

/// The same on a rank: what its stage of the model has of the values is right, unless a checkpoint's take their place.
///
/// # Errors
/// As [`prepare`].
pub(super) fn prepare_on(
    ranks: Ranks<'_>,
    config: &TrainConfig,
    base: &Network,
    examples: &[Example],
    is_resumed: bool,
    observer: &mut dyn Observer,
) -> Result<Trained, Error> {
    if let Some(folder) = &config.init_adapter {
        return start_from(config, folder, base, observer);
    }
    let started = config.method.start(
        &config.options,
        &Starting {
            decoder: &base.decoder,
            base: &config.model,
            seed: mix(config.seed, 1),
            text: &|needed| first_text(examples, needed),
            is_resumed,
            unquantized: &|| base.source.unquantized(),
            ranks,
        },
    )?;
    if let Some(coverage) = started.coverage {
        observer.event(&Event::Note(coverage));
    }
    if let Some(note) = unquantized(&started.adapter, &base.decoder) {
        observer.event(&Event::Note(note));
    }
    Ok(Trained {
        adapter: started.adapter,
        config: started.config,
    })
}

/// What is to be said of weights that are trained and that the base has in blocks.
fn unquantized(adapter: &Adapter, base: &Decoder) -> Option<String> {
    /// The value, its gradient and two moments, all f32.
    const OF_VALUE: u64 = 16;
    let config = base.config();
    let in_blocks = |id| {
        let format: Option<&NumberFormat> = config.formats.get(id);
        format.is_some_and(|format| format.block_len() > 1)
    };
    let slots = adapter.replaced.iter().filter(|(id, _)| in_blocks(id));
    let sizes = slots.map(|(_, slot)| {
        let (rows, cols) = adapter.params.shape(*slot);
        (rows * cols) as u64
    });
    let sizes: Vec<u64> = sizes.collect();
    (!sizes.is_empty()).then(|| {
        format!(
            "{} matrices that are quantized in the base are trained as f32 numbers, which take {} with gradients and moments; they are \
             written as such",
            sizes.len(),
            units::bytes(OF_VALUE * sizes.iter().sum::<u64>())
        )
    })
}

/// The first tokens of the prompts; where there are no prompts, of the rows.
fn first_text(examples: &[Example], needed: usize) -> FirstText {
    let rows = |prompts: bool| {
        let mut text = Vec::new();
        for row in examples {
            if text.len() >= needed {
                break;
            }
            text.extend_from_slice(if prompts { row.prompt() } else { &row.ids });
        }
        text
    };
    let prompts = rows(true);
    if prompts.is_empty() {
        return FirstText {
            ids: rows(false),
            source: "rows",
        };
    }
    FirstText {
        ids: prompts,
        source: "prompts",
    }
}

/// An adapter of an earlier run, whose options are its own.
fn start_from(
    config: &TrainConfig,
    folder: &Path,
    base: &Network,
    observer: &mut dyn Observer,
) -> Result<Trained, Error> {
    if config.method.writes_model() {
        return Err(Error::Settings("init_adapter goes with every method but full; merge the adapter into the model first (lowrank merge) and train the result in full".to_owned()));
    }
    let mut loaded = load_for(config, folder, base)?;
    if loaded.config.method() != config.method {
        return Err(Error::Settings(format!(
            "init_adapter {} was trained with {}, and the method of this run is {}; give the same method",
            folder.display(),
            loaded.config.method().title(),
            config.method.title()
        )));
    }
    note_fingerprint(&loaded, base, observer);
    observer.event(&Event::Note(loaded.coverage.clone()));
    config
        .method
        .go_on(&mut loaded, &config.options, &config.model);
    Ok(Trained {
        adapter: loaded.adapter,
        config: Some(loaded.config),
    })
}

/// Loads the adapter, whose classifier may be for another number of labels.
fn load_for(config: &TrainConfig, folder: &Path, base: &Network) -> Result<tuning::Loaded, Error> {
    let model = base.decoder.config();
    let found = tuning::task_of(folder)?.outputs;
    let (Some(found), Some(classifier)) = (found, model.classifier()) else {
        return tuning::load(folder, model);
    };
    if found == classifier.labels && !config.new_classifier {
        return tuning::load(folder, model);
    }
    if !config.new_classifier {
        return Err(Error::Settings(format!(
            "init_adapter {}: its classifier has {found} labels, and the rows have {}; train on rows with its labels, or begin a new classifier with \
             {new_classifier}",
            folder.display(),
            classifier.labels,
            new_classifier = named("new_classifier")
        )));
    }
    let mut loaded = tuning::load(folder, &model.with_labels(found))?;
    loaded.adapter.renew_classifier(base.decoder.weights());
    Ok(loaded)
}

fn note_fingerprint(loaded: &tuning::Loaded, base: &Network, observer: &mut dyn Observer) {
    if let Some(recorded) = &loaded.base_fingerprint
        && *recorded != base.decoder.weights().fingerprint()
    {
        observer.event(&Event::Note(format!(
            "warning: this adapter was trained on another base than {} (fingerprints {recorded} and {}); its results may be poor",
            base.source,
            base.decoder.weights().fingerprint()
        )));
    }
}

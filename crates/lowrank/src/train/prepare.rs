//! What a run begins with: a method's first values, or an adapter of an earlier run.

use std::path::Path;

use super::config::TrainConfig;
use super::events::{Event, Observer};
use crate::Error;
use crate::base::Network;
use crate::data::Example;
use crate::model::Adapter;
use crate::random::mix;
use crate::tuning::{self, AdapterConfig, Method, adapter, bitfit, full, lora, prefix, top};

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
    if let Some(folder) = &config.init_adapter {
        return start_from(config, folder, base, observer);
    }
    let (model, weights) = (base.decoder.config(), base.decoder.weights());
    let seed = mix(config.seed, 1);
    let (adapter, coverage, trained) = match config.method {
        Method::Full => {
            let adapter = full::inject(weights);
            weights.release_pages();
            return Ok(Trained {
                adapter,
                config: None,
            });
        }
        Method::Lora => {
            let lora = config.lora_config(model);
            let (adapter, coverage) = lora::inject(model, &lora, config.init_lora_weights, seed)?;
            let trained = AdapterConfig::Lora(Box::new(lora));
            (adapter, coverage.to_string(), trained)
        }
        Method::Top => {
            let options = config.top_options();
            let adapter = top::inject(weights, options)?;
            let coverage = top::coverage(model, options);
            (adapter, coverage, AdapterConfig::Top(options))
        }
        Method::Bitfit => {
            let adapter = bitfit::inject(weights);
            (adapter, bitfit::coverage(model), AdapterConfig::Bitfit)
        }
        Method::Adapter => {
            let options = config.adapter_options();
            let adapter = adapter::inject(model, options, seed)?;
            let coverage = adapter::coverage(model, options);
            (adapter, coverage, AdapterConfig::Adapter(options))
        }
        Method::Prefix => {
            let options = config.prefix_options();
            let (text, note) = first_text(config, examples);
            let adapter = prefix::inject(&base.decoder, options, config.prefix_init, &text, seed)?;
            let coverage = format!("{}, {note}", prefix::coverage(model, options));
            (adapter, coverage, AdapterConfig::Prefix(options))
        }
    };
    observer.event(&Event::Note(coverage));
    Ok(Trained {
        adapter,
        config: Some(trained),
    })
}

/// The tokens that virtual ones may begin as, those of the first prompts, and in words what they do begin as.
fn first_text(config: &TrainConfig, examples: &[Example]) -> (Vec<u32>, String) {
    let options = config.prefix_options();
    let needed = options.prefix.saturating_add(options.infix);
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
    let mut text = rows(true);
    let mut source = "prompts";
    if text.is_empty() {
        (text, source) = (rows(false), "rows");
    }
    let found = text.len().min(needed);
    let note = match config.prefix_init {
        prefix::Init::Text => format!("which begin as the first {found} tokens of the {source}"),
        prefix::Init::Vocab => "which begin as tokens drawn from the vocabulary".to_owned(),
        prefix::Init::Random => "which begin at random".to_owned(),
        prefix::Init::Zero => "which begin at zero".to_owned(),
    };
    (text, note)
}

/// An adapter of an earlier run, whose options are its own.
fn start_from(
    config: &TrainConfig,
    folder: &Path,
    base: &Network,
    observer: &mut dyn Observer,
) -> Result<Trained, Error> {
    if config.method == Method::Full {
        return Err(Error::Settings("init_adapter goes with every method but full; merge the adapter into the model first (lowrank merge) and train the result in full".to_owned()));
    }
    let loaded = tuning::load(folder, base.decoder.config())?;
    if loaded.config.method() != config.method {
        return Err(Error::Settings(format!(
            "init_adapter {} was trained with {}, and the method of this run is {}; give the same method",
            folder.display(),
            loaded.config.method().title(),
            config.method.title()
        )));
    }
    note_fingerprint(&loaded, base, observer);
    observer.event(&Event::Note(loaded.coverage));
    let (mut adapter, mut trained) = (loaded.adapter, loaded.config);
    if let AdapterConfig::Lora(lora) = &mut trained {
        lora.lora_dropout = config.lora_dropout;
        lora.base_model_name_or_path = Some(config.model.clone());
        for site in adapter.low_rank.values_mut().flatten() {
            site.dropout = config.lora_dropout as f32;
        }
    }
    Ok(Trained {
        adapter,
        config: Some(trained),
    })
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

//! The last blocks with the final norm, or the output projection alone: what was tuned where not all could be.
//!
//! Tied embeddings are untied for the head: it begins as the embedding, which stays as it is.

use std::path::Path;

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;
use serde_json::Value;

use super::files::{check_keys, finish, write_both};
use super::{
    AdapterConfig, BaseMark, Loaded, MethodConfig, MethodOptions, MethodSpec, Started, Starting,
};
use crate::Error;
use crate::fields::{Field, Fields, Names, fields};
use crate::model::{Adapter, HeadKind, ModelConfig, WeightId, Weights, families};

/// `peft_type` in adapter_config.json.
const PEFT_TYPE: &str = "LOWRANK_TOP";

/// Blocks that are trained where nothing is said.
const DEFAULT_LAYERS: usize = 2;

fields! {
    /// The options of top-layer fine-tuning.
    pub struct Settings {
        /// Train so many of the last blocks, and the norm behind them [default: 2]
        #[arg(value_name = "N", help_heading = "Other methods")]
        #[range(COUNT)]
        #[fixes(Shape)]
        pub top_layers: Option<usize>,

        /// Train the output projection alone; a tied one is untied (method top)
        #[switch(help_heading = "Other methods")]
        #[fixes(Shape)]
        #[absent(false)]
        pub head_only: bool = false,
    }
}

impl Settings {
    fn options(&self) -> Options {
        if self.head_only {
            Options::Head
        } else {
            Options::Layers(self.top_layers.unwrap_or(DEFAULT_LAYERS))
        }
    }
}

/// What its files say.
pub type Config = Options;

/// Top-layer fine-tuning in the table of methods.
pub(super) struct Spec;

impl MethodSpec for Spec {
    fn title(&self) -> &'static str {
        "top-layer fine-tuning"
    }

    fn help(&self) -> &'static str {
        "The last blocks, or the output projection alone"
    }

    fn learning_rate(&self) -> f64 {
        5e-5
    }

    fn fields(&self) -> Vec<Field> {
        Settings::fields()
    }

    fn check(&self, options: &MethodOptions, names: &dyn Names, problems: &mut Vec<String>) {
        if options.top.head_only && options.top.top_layers.is_some() {
            problems.push(format!(
                "{} trains the output projection alone, so leave {} out",
                names.given("head_only"),
                names.given("top_layers")
            ));
        }
    }

    fn label(&self, options: &MethodOptions) -> String {
        match options.top.options() {
            Options::Head => "head only".to_owned(),
            Options::Layers(layers) => format!("top {layers}"),
        }
    }

    fn lay_out(&self, options: &MethodOptions, model: &ModelConfig) -> Result<Adapter, Error> {
        lay_out(model, options.top.options())
    }

    fn start(&self, options: &MethodOptions, with: &Starting) -> Result<Started, Error> {
        let options = options.top.options();
        Ok(Started {
            adapter: inject(with.decoder.weights(), options)?,
            coverage: Some(coverage(with.decoder.config(), options)),
            config: Some(AdapterConfig::Top(options)),
        })
    }

    fn peft_types(&self) -> &'static [&'static str] {
        &[PEFT_TYPE]
    }

    fn load(&self, folder: &Path, raw: &HfConfig, model: &ModelConfig) -> Result<Loaded, Error> {
        let options = read(raw, model)?;
        let adapter = lay_out(model, options)?;
        let coverage = coverage(model, options);
        finish(
            folder,
            model,
            adapter,
            AdapterConfig::Top(options),
            coverage,
        )
    }
}

impl MethodConfig for Config {
    fn save(
        &self,
        folder: &Path,
        model: &ModelConfig,
        adapter: &Adapter,
        base: BaseMark,
    ) -> Result<(), Error> {
        write_both(folder, PEFT_TYPE, self.options(), (model, adapter), base)
    }

    /// Keys of adapter_config.json.
    fn options(&self) -> Vec<(&'static str, Value)> {
        match *self {
            Self::Layers(layers) => vec![("top_layers", layers.into())],
            Self::Head => vec![("head_only", true.into())],
        }
    }
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Options {
    /// So many of the last blocks, and the final norm (`top_layers`).
    Layers(usize),
    /// The output projection, or the classifier (`head_only`).
    Head,
}

fn read(raw: &HfConfig, model: &ModelConfig) -> Result<Options, FormatError> {
    check_keys(raw, &["head_only", "top_layers"])?;
    let head = raw.opt_bool("head_only")?.unwrap_or(false);
    match (head, raw.opt_usize("top_layers")?) {
        (true, None) => Ok(Options::Head),
        (true, Some(_)) => Err(raw.unsupported("top_layers", "nothing beside head_only")),
        (false, Some(layers)) if (1..=model.num_hidden_layers).contains(&layers) => {
            Ok(Options::Layers(layers))
        }
        (false, _) => {
            let most = model.num_hidden_layers;
            Err(raw.unsupported("top_layers", format!("a number of blocks from 1 to {most}")))
        }
    }
}

/// The base's values of what is trained.
///
/// # Errors
/// More blocks than the model has.
pub fn inject(weights: &Weights, options: Options) -> Result<Adapter, Error> {
    let mut adapter = lay_out(weights.config(), options)?;
    adapter.copy_base(weights);
    Ok(adapter)
}

/// Number of trained values.
pub fn parameters(config: &ModelConfig, options: &Options) -> usize {
    let sizes = chosen(config, *options).into_iter();
    sizes.map(|(_, (rows, cols))| rows * cols).sum()
}

fn lay_out(config: &ModelConfig, options: Options) -> Result<Adapter, Error> {
    if let Options::Layers(layers) = options
        && !(1..=config.num_hidden_layers).contains(&layers)
    {
        return Err(Error::Settings(format!(
            "top_layers is {layers}, and the model has {} blocks; give a number from 1 to that, or train everything with the method full",
            config.num_hidden_layers
        )));
    }
    if matches!(options, Options::Layers(_)) && config.layout != families::layout(config.family) {
        return Err(Error::Settings(format!(
            "the method top saves matrices as a folder has them, and those of a quantized {} lie the other way; train another method, or top beside the model as \
             it was before",
            config.family.model_type()
        )));
    }
    Ok(Adapter::replacing(config, &chosen(config, options)))
}

/// What is trained, in words.
fn coverage(config: &ModelConfig, options: Options) -> String {
    let parameters = parameters(config, &options);
    match options {
        Options::Layers(layers) => {
            let norm = config.final_norm.then_some(", the final norm");
            // Its last linear is named apart: every method trains it.
            let dense = config.classifier_dense().filter(|dense| !dense.saved);
            let dense = dense.map(|_| ", the classifier's first linear");
            format!(
                "the last {layers} of {} blocks{}{}: {parameters} trainable parameters",
                config.num_hidden_layers,
                norm.unwrap_or_default(),
                dense.unwrap_or_default()
            )
        }
        Options::Head if parameters == 0 => "the classifier alone".to_owned(),
        Options::Head => format!("the output projection, {parameters} trainable parameters"),
    }
}

fn chosen(config: &ModelConfig, options: Options) -> Vec<(WeightId, (usize, usize))> {
    match options {
        // A classifier is trained with every method, so nothing is added to it.
        Options::Head if config.head != HeadKind::LanguageModel => Vec::new(),
        Options::Head => vec![(WeightId::Head, (config.vocab_size, config.hidden_size))],
        Options::Layers(layers) => {
            let from = config.num_hidden_layers.saturating_sub(layers);
            let is_trained = |id: &WeightId| match id {
                WeightId::Linear(linear, _) => linear.layer >= from,
                WeightId::Norm(layer, ..) => *layer >= from,
                WeightId::FinalNorm(_) | WeightId::ClassifierNorm(_) => true,
                WeightId::Embedding
                | WeightId::Positions
                | WeightId::TokenTypes
                | WeightId::EmbeddingNorm(_)
                | WeightId::Relative
                | WeightId::RelativeNorm(_)
                | WeightId::Head => false,
            };
            let all = config.weights().into_iter();
            all.filter(|(id, _)| is_trained(id)).collect()
        }
    }
}

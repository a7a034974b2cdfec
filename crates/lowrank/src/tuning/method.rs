//! What the program asks of a method, and where it asks.

use std::path::Path;

use lowrank_formats::hf_config::HfConfig;
use serde_json::{Map, Value};

use super::{AdapterConfig, BaseMark, Loaded, Method, MethodOptions, saved};
use crate::Error;
use crate::fields::{Field, Fields, Fixes, Names};
use crate::model::stored::Unquantized;
use crate::model::{Adapter, Decoder, ModelConfig, families};
use crate::ranks::Ranks;

/// A method. Its module has a unit struct that implements this, and the table finds it.
pub trait MethodSpec: Sync {
    /// Its name in a sentence: "trained with …".
    fn title(&self) -> &'static str;

    /// What it trains, in a line of help.
    fn help(&self) -> &'static str;

    /// The learning rate where none is given: the fewer values a method has and the further they are from the model's own
    /// weights, the larger it is.
    fn learning_rate(&self) -> f64;

    /// The settings that mean something to this method alone.
    fn fields(&self) -> Vec<Field>;

    /// Settings that mean something to several methods, and this is one of them.
    fn shared_fields(&self) -> Vec<Field> {
        saved::Settings::fields()
    }

    /// What stands before the names of tensors of modules that are saved as a whole.
    fn saved_prefix(&self) -> &'static str {
        ""
    }

    /// Adds what does not go together in its options to `problems`.
    fn check(&self, options: &MethodOptions, names: &dyn Names, problems: &mut Vec<String>) {
        let _ = (options, names, problems);
    }

    /// A short name of a run with these options, for a comparison.
    fn label(&self, options: &MethodOptions) -> String;

    /// The tag that the Hub has for its adapters.
    fn hub_tag(&self) -> Option<&'static str> {
        None
    }

    /// Whether it trains every weight and writes a whole model in place of an adapter.
    fn writes_model(&self) -> bool {
        false
    }

    /// Whether what it trains can be folded into the model's weights.
    fn merges(&self) -> bool {
        true
    }

    /// The option that its number of trained values grows with, if there is one.
    fn size(&self) -> Option<Size> {
        None
    }

    /// Positions of the context that its virtual tokens take.
    fn positions(&self, options: &MethodOptions) -> usize {
        let _ = options;
        0
    }

    /// How many values the LoRA paper counts, where it counts otherwise than what is trained.
    fn paper_parameters(&self, options: &MethodOptions, model: &ModelConfig) -> Option<usize> {
        let _ = (options, model);
        None
    }

    /// What is trained, all zero. Nothing is allocated until a value is asked for.
    ///
    /// # Errors
    /// Options that do not fit the model.
    fn lay_out(&self, options: &MethodOptions, model: &ModelConfig) -> Result<Adapter, Error>;

    /// The first values.
    ///
    /// # Errors
    /// Options that do not fit the model or the data.
    fn start(&self, options: &MethodOptions, with: &Starting) -> Result<Started, Error>;

    /// The `peft_type`s of its files.
    fn peft_types(&self) -> &'static [&'static str];

    /// Reads an adapter's folder, whose config is `raw`.
    ///
    /// # Errors
    /// Files that are damaged or of another model.
    fn load(&self, folder: &Path, raw: &HfConfig, model: &ModelConfig) -> Result<Loaded, Error>;

    /// Puts into an adapter's config what its files say in another way than with a setting's key.
    fn complete(&self, config: &mut Map<String, Value>) {
        let _ = config;
    }

    /// Applies those options to a loaded adapter that are a training's and not the adapter's.
    fn go_on(&self, loaded: &mut Loaded, options: &MethodOptions, base: &str) {
        let _ = (loaded, options, base);
    }
}

/// What the files of a method's adapters say of it.
pub trait MethodConfig {
    /// Writes the adapter's two files into `folder`.
    ///
    /// # Errors
    /// A file can't be written.
    fn save(
        &self,
        folder: &Path,
        model: &ModelConfig,
        adapter: &Adapter,
        base: BaseMark,
    ) -> Result<(), Error>;

    /// The method's options, under the names of adapter_config.json.
    fn options(&self) -> Vec<(&'static str, Value)>;

    /// Whether PEFT loads the files beside a model that transformers has.
    fn is_pefts(&self, _model: &ModelConfig) -> bool {
        false
    }
}

/// What first values are made of.
pub struct Starting<'a> {
    /// The model.
    pub decoder: &'a Decoder,
    /// What the model is called (`base_model_name_or_path`).
    pub base: &'a str,
    /// Every random value is a function of it.
    pub seed: u64,
    /// The first tokens of the training data, at least so many where there are as many.
    pub text: &'a dyn Fn(usize) -> FirstText,
    /// Whether a checkpoint's values take the place of these, so that they need not be made.
    pub is_resumed: bool,
    /// Opens the model as it was before it was quantized while it was loaded; `None` where it was not.
    pub unquantized: &'a dyn Fn() -> Result<Option<Unquantized>, Error>,
    /// The ranks of the run: first values that a pass computes go through all stages of a pipeline.
    pub ranks: Ranks<'a>,
}

/// Tokens that training data begins with.
pub struct FirstText {
    /// Their ids.
    pub ids: Vec<u32>,
    /// What they are the tokens of: "prompts".
    pub source: &'static str,
}

/// What a method begins with.
pub struct Started {
    /// The values.
    pub adapter: Adapter,
    /// What is trained, in words, where that is not everything.
    pub coverage: Option<String>,
    /// What the adapter's files say; `None` where a whole model is written.
    pub config: Option<AdapterConfig>,
}

/// The option that decides how many values a method trains.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Its key.
    pub key: &'static str,
    /// A key that grows with it where it is not given, and by which factor.
    pub follower: Option<(&'static str, f64)>,
    pub(super) set: fn(&mut MethodOptions, usize),
    pub(super) most: fn(&ModelConfig) -> usize,
}

impl Size {
    /// Sets the option.
    pub fn set(&self, options: &mut MethodOptions, value: usize) {
        (self.set)(options, value);
    }

    /// The largest that makes sense for a model.
    pub fn most(&self, model: &ModelConfig) -> usize {
        (self.most)(model)
    }
}

impl Method {
    /// Its name in a sentence: "trained with …".
    pub fn title(self) -> &'static str {
        self.spec().title()
    }

    /// The learning rate where none is given.
    pub fn learning_rate(self) -> f64 {
        self.spec().learning_rate()
    }

    /// Whether a key of the training settings means anything to this method.
    pub fn reads(self, key: &str) -> bool {
        let has = |fields: Vec<Field>| fields.iter().any(|field| field.key == key);
        let reads = |method: Self| {
            let spec = method.spec();
            has(spec.fields()) || has(spec.shared_fields())
        };
        // A whole model has no place for them, and nothing to add to.
        if ["init_adapter", "modules_to_save"].contains(&key) {
            return !self.writes_model();
        }
        reads(self) || !Self::ALL.into_iter().any(reads)
    }

    /// The keys that an adapter to start from decides.
    pub fn fixed_keys(self) -> Vec<&'static str> {
        let fields = self.spec().fields().into_iter();
        fields
            .chain(self.spec().shared_fields())
            .filter(|field| field.fixes.is_some())
            .map(|field| field.key)
            .collect()
    }

    /// The keys of all methods that decide which values are trained.
    pub fn shape_keys() -> Vec<&'static str> {
        let fields = |method: Self| {
            let spec = method.spec();
            spec.shared_fields().into_iter().chain(spec.fields())
        };
        let mut keys = Vec::new();
        for field in Self::ALL.into_iter().flat_map(fields) {
            if field.fixes == Some(Fixes::Shape) && !keys.contains(&field.key) {
                keys.push(field.key);
            }
        }
        keys
    }

    /// A short name of a run with these options, for a comparison.
    pub fn label(self, options: &MethodOptions) -> String {
        self.spec().label(options)
    }

    /// The tag that the Hub has for its adapters.
    pub fn hub_tag(self) -> Option<&'static str> {
        self.spec().hub_tag()
    }

    /// Whether it trains every weight and writes a whole model in place of an adapter.
    pub fn writes_model(self) -> bool {
        self.spec().writes_model()
    }

    /// Whether what it trains can be folded into the model's weights.
    pub fn merges(self) -> bool {
        self.spec().merges()
    }

    /// The option that its number of trained values grows with; `None` where nothing decides it.
    pub fn size(self) -> Option<Size> {
        self.spec().size()
    }

    /// Positions of the context that its virtual tokens take.
    pub fn positions(self, options: &MethodOptions) -> usize {
        self.spec().positions(options)
    }

    /// How many values the LoRA paper counts, where it counts otherwise than what is trained.
    pub fn paper_parameters(self, options: &MethodOptions, model: &ModelConfig) -> Option<usize> {
        self.spec().paper_parameters(options, model)
    }

    /// What is trained, all zero. Nothing is allocated until a value is asked for.
    ///
    /// # Errors
    /// Options that do not fit the model.
    pub fn lay_out(self, options: &MethodOptions, model: &ModelConfig) -> Result<Adapter, Error> {
        let mut adapter = self.spec().lay_out(options, model)?;
        if !self.writes_model() {
            let prefix = self.spec().saved_prefix();
            saved::add(&mut adapter, model, &options.saved, prefix)?;
        }
        Ok(adapter)
    }

    /// The first values.
    ///
    /// # Errors
    /// Options that do not fit the model or the data.
    pub fn start(self, options: &MethodOptions, with: &Starting) -> Result<Started, Error> {
        let mut started = self.spec().start(options, with)?;
        if !self.writes_model() {
            let (weights, prefix) = (with.decoder.weights(), self.spec().saved_prefix());
            let adapter = &mut started.adapter;
            saved::add(adapter, weights.config(), &options.saved, prefix)?;
            adapter.copy_base_to(adapter.saved.slots.clone(), weights);
            if let Some((coverage, saved)) = started.coverage.as_mut().zip(saved::coverage(adapter))
            {
                *coverage = format!("{coverage}, and {saved}");
            }
        }
        Ok(started)
    }

    /// Puts into an adapter's config what its files say in another way than with a setting's key.
    pub fn complete(self, config: &mut Map<String, Value>) {
        self.spec().complete(config);
    }

    /// Applies those options to a loaded adapter that are a training's and not the adapter's; `base` is the model's name.
    pub fn go_on(self, loaded: &mut Loaded, options: &MethodOptions, base: &str) {
        self.spec().go_on(loaded, options, base);
    }
}

#[cfg(feature = "clap")]
impl clap::ValueEnum for Method {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        Some(clap::builder::PossibleValue::new(self.name()).help(self.spec().help()))
    }
}

impl AdapterConfig {
    /// Whether PEFT loads the files beside this model.
    pub fn is_pefts(&self, model: &ModelConfig) -> bool {
        self.inner().is_pefts(model) && families::is_in_transformers(model)
    }

    /// The method's options, under the names of adapter_config.json.
    pub fn options(&self) -> Map<String, Value> {
        let options = self.inner().options().into_iter();
        options
            .map(|(key, value)| (key.to_owned(), value))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_means_something_to_whom_it_belongs() {
        for key in ["learning_rate", "batch_size", "model"] {
            assert!(Method::ALL.into_iter().all(|method| method.reads(key)));
        }
        assert!(Method::Lora.reads("r") && !Method::Top.reads("r"));
        assert!(Method::Lora.reads("target_modules") && !Method::Bitfit.reads("target_modules"));
        assert!(Method::Prefix.reads("prefix_init") && !Method::Lora.reads("prefix_init"));
        assert!(Method::Bitfit.reads("init_adapter") && !Method::Full.reads("init_adapter"));
    }

    #[test]
    fn a_method_is_called_by_its_module() {
        for method in Method::ALL {
            assert_eq!(serde_json::to_value(method).unwrap(), method.name());
        }
    }

    #[test]
    fn every_type_of_file_has_one_method() {
        let types = Method::ALL.into_iter().flat_map(|m| m.spec().peft_types());
        let all: Vec<&str> = types.copied().collect();
        let distinct: std::collections::BTreeSet<&str> = all.iter().copied().collect();
        assert_eq!(all.len(), distinct.len(), "{all:?}");
    }
}

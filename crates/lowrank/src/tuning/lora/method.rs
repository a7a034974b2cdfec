//! LoRA among the methods: its options, and what they come to.

use std::path::{Path, PathBuf};

use lowrank_formats::hf_config::HfConfig;
use lowrank_formats::peft::{LoraConfig, TokenIndices};
use lowrank_kernels::Layout;
use serde_json::Value;

use super::{Coverage, InitLoraWeights, initial, inject, lay_out, load, save, tokens};
use crate::Error;
use crate::fields::{Field, Fields, Names, fields};
#[cfg(feature = "clap")]
use crate::fields::{finite, finite_pattern, parse_pattern};
use crate::model::{Adapter, ModelConfig, families};
use crate::tuning::files::task_type;
use crate::tuning::{
    AdapterConfig, BaseMark, Loaded, MethodConfig, MethodOptions, MethodSpec, Size, Started,
    Starting, saved, targets,
};

fields! {
    /// LoRA's options.
    pub struct Settings {
        /// Rank of the matrices A and B
        // It is the first of LoRA's flags, before the modules that LoRA shares with other methods.
        #[arg(value_name = "N", display_order = 0, help_heading = "LoRA")]
        #[range(RANK)]
        #[fixes(Shape)]
        pub r: usize = 8,

        /// Another r for modules that match a pattern; may be repeated
        #[arg(value_name = "PATTERN=N", value_parser = parse_pattern::<usize>, help_heading = "LoRA")]
        #[range(RANK)]
        #[fixes(Shape)]
        #[written(AsMap)]
        pub rank_pattern: Vec<(String, usize)>,

        /// The change of a weight is scaled by lora_alpha / r
        #[arg(value_parser = finite::<f64>, value_name = "X", help_heading = "LoRA")]
        #[range(POSITIVE)]
        #[fixes(Action)]
        pub lora_alpha: f64 = 16.0,

        /// Dropout on what goes into A
        #[arg(value_parser = finite::<f64>, value_name = "P", help_heading = "LoRA")]
        #[range(BELOW_ONE)]
        pub lora_dropout: f64 = 0.0,

        /// Another lora_alpha for modules that match a pattern; may be repeated
        #[arg(value_name = "PATTERN=X", value_parser = finite_pattern, help_heading = "LoRA")]
        #[range(POSITIVE)]
        #[fixes(Action)]
        #[written(AsMap)]
        pub alpha_pattern: Vec<(String, f64)>,

        /// How A and B begin
        #[arg(value_name = "HOW", help_heading = "LoRA")]
        pub init_lora_weights: InitLoraWeights = InitLoraWeights::Gaussian,

        /// The model before it was quantized, a folder with safetensors, for init_lora_weights loftq [default: the model itself, where load_in quantizes it]
        #[arg(value_name = "FOLDER", help_heading = "LoRA")]
        pub loftq_weights: Option<PathBuf>,

        /// Tokens to train the embedding's rows of: ids, as 5,17; in a file also lists by module
        #[arg(value_name = "IDS", help_heading = "LoRA")]
        #[fixes(Shape)]
        pub trainable_token_indices: Option<TokenIndices>,

        /// Tokens to add to the tokenizer and to train the rows of: a file with one a line, or with a JSON list
        #[arg(value_name = "FILE", help_heading = "LoRA")]
        #[fixes(Shape)]
        pub add_tokens: Option<PathBuf>,

        /// Scale by lora_alpha / √r instead
        #[switch(help_heading = "LoRA")]
        #[fixes(Action)]
        pub use_rslora: bool = false,

        /// Train the magnitude of each output as well (DoRA)
        #[switch(help_heading = "LoRA")]
        #[fixes(Shape)]
        pub use_dora: bool = false,

        /// The learning rate of B over that of A (LoRA+); magnitudes and biases have B's
        #[arg(value_parser = finite::<f64>, value_name = "X", help_heading = "LoRA")]
        #[range(POSITIVE)]
        pub loraplus_lr_ratio: Option<f64>,
    }
}

/// PEFT's `adapter_config.json`.
pub type Config = Box<LoraConfig>;

/// Before the names of tensors of modules that are saved as a whole.
pub(super) const SAVED_PREFIX: &str = "base_model.model.";

/// Why DoRA has no dropout.
pub(crate) const NO_DROPOUT: &str = "DoRA multiplies the frozen weight with the dropped input, too, which would be a second product of every weight";

/// LoRA in the table of methods.
pub(in crate::tuning) struct Spec;

/// PEFT's config for these options; `base` is what the model is called.
fn config(options: &MethodOptions, model: &ModelConfig, base: &str) -> LoraConfig {
    let (lora, targets) = (&options.lora, &options.targets);
    LoraConfig {
        r: lora.r,
        lora_alpha: lora.lora_alpha,
        lora_dropout: lora.lora_dropout,
        target_modules: targets.target_modules(model.family),
        exclude_modules: targets.exclude_modules(),
        fan_in_fan_out: families::layout(model.family) == Layout::InOut,
        use_rslora: lora.use_rslora,
        use_dora: lora.use_dora,
        init_lora_weights: lora.init_lora_weights.to_json(),
        rank_pattern: lora.rank_pattern.clone(),
        trainable_token_indices: lora.trainable_token_indices.clone(),
        alpha_pattern: lora.alpha_pattern.clone(),
        base_model_name_or_path: Some(base.to_owned()),
        task_type: Some(task_type(model).to_owned()),
        ..LoraConfig::default()
    }
}

/// Refuses tokens that nobody has added yet.
fn check_tokens(options: &MethodOptions) -> Result<(), Error> {
    match &options.lora.add_tokens {
        None => Ok(()),
        Some(file) => Err(Error::Settings(format!(
            "add_tokens ({}) is for train alone, which adds the tokens to the model first; give trainable_token_indices, which trains as \
             many rows",
            file.display()
        ))),
    }
}

/// What is trained.
fn words(coverage: &Coverage, adapter: &Adapter) -> String {
    match tokens::coverage(adapter) {
        None => coverage.to_string(),
        Some(rows) => format!("{coverage}, {rows} among them"),
    }
}

impl MethodSpec for Spec {
    fn title(&self) -> &'static str {
        "LoRA"
    }

    fn help(&self) -> &'static str {
        "Low-rank matrices beside frozen weights"
    }

    fn learning_rate(&self) -> f64 {
        2e-4
    }

    fn fields(&self) -> Vec<Field> {
        Settings::fields()
    }

    fn shared_fields(&self) -> Vec<Field> {
        let shared = targets::Settings::fields().into_iter();
        shared.chain(saved::Settings::fields()).collect()
    }

    fn saved_prefix(&self) -> &'static str {
        SAVED_PREFIX
    }

    fn label(&self, options: &MethodOptions) -> String {
        let lora = &options.lora;
        format!(
            "{} r {}",
            if lora.use_dora { "DoRA" } else { "LoRA" },
            lora.r
        )
    }

    fn hub_tag(&self) -> Option<&'static str> {
        Some("lora")
    }

    fn size(&self) -> Option<Size> {
        Some(Size {
            key: "r",
            follower: Some(("lora_alpha", 2.0)),
            set: |options, r| options.lora.r = r,
            most: |model| model.hidden_size,
        })
    }

    fn check(&self, options: &MethodOptions, names: &dyn Names, problems: &mut Vec<String>) {
        let lora = &options.lora;
        if lora.use_dora && lora.lora_dropout > 0.0 {
            problems.push(format!(
                "{} cannot be given beside {}: {NO_DROPOUT}",
                names.given("lora_dropout"),
                names.given("use_dora")
            ));
        }
        if lora.add_tokens.is_some() && lora.trainable_token_indices.is_some() {
            problems.push(format!(
                "{} trains the rows of the new tokens alone, so {} cannot be given beside it",
                names.given("add_tokens"),
                names.given("trainable_token_indices")
            ));
        }
        initial::check(lora, names, problems);
    }

    fn lay_out(&self, options: &MethodOptions, model: &ModelConfig) -> Result<Adapter, Error> {
        check_tokens(options)?;
        let mut adapter = lay_out(model, &config(options, model, ""))?;
        initial::lay_out(&mut adapter, options.lora.init_lora_weights);
        Ok(adapter)
    }

    fn start(&self, options: &MethodOptions, with: &Starting) -> Result<Started, Error> {
        check_tokens(options)?;
        let model = with.decoder.config();
        let config = config(options, model, with.base);
        let init = options.lora.init_lora_weights;
        let (mut adapter, coverage) = inject(model, &config, init, with.seed)?;
        let note = initial::begin(&mut adapter, &options.lora, &config, with)?;
        adapter.copy_token_rows(with.decoder.weights());
        adapter.begin_magnitudes(with.decoder.weights());
        Ok(Started {
            coverage: Some(words(&coverage, &adapter) + &note),
            adapter,
            config: Some(AdapterConfig::Lora(Box::new(config))),
        })
    }

    fn peft_types(&self) -> &'static [&'static str] {
        &["LORA"]
    }

    fn load(&self, folder: &Path, _: &HfConfig, model: &ModelConfig) -> Result<Loaded, Error> {
        let loaded = load(folder, model)?;
        Ok(Loaded {
            coverage: words(&loaded.coverage, &loaded.adapter),
            adapter: loaded.adapter,
            config: AdapterConfig::Lora(Box::new(loaded.config)),
            base_fingerprint: loaded.base_fingerprint,
        })
    }

    fn go_on(&self, loaded: &mut Loaded, options: &MethodOptions, base: &str) {
        let AdapterConfig::Lora(config) = &mut loaded.config else {
            return;
        };
        let dropout = options.lora.lora_dropout;
        config.lora_dropout = dropout;
        config.base_model_name_or_path = Some(base.to_owned());
        for site in loaded.adapter.low_rank.values_mut().flatten() {
            site.dropout = dropout as f32;
        }
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
        save(folder, model, self, adapter, base)
    }

    fn options(&self) -> Vec<(&'static str, Value)> {
        let mut options = vec![
            ("r", self.r.into()),
            ("lora_alpha", self.lora_alpha.into()),
            ("target_modules", self.target_modules.to_string().into()),
            ("use_rslora", self.use_rslora.into()),
            ("use_dora", self.use_dora.into()),
        ];
        if let Some(indices) = &self.trainable_token_indices {
            options.push(("trainable_token_indices", indices.to_json()));
        }
        options
    }

    fn is_pefts(&self, _model: &ModelConfig) -> bool {
        true
    }
}

//! Trained virtual tokens: keys and values before every sequence in each block (Li and Liang, 2021), or embeddings before
//! the prompt and between prompt and completion, which the blocks read as if they were tokens'.
//!
//! Keys and values are PEFT's `PREFIX_TUNING` without projection, embeddings before the prompt its `PROMPT_TUNING`, and
//! their files are PEFT's. With an infix they are a type of our own. Sequences are longer by the virtual tokens, so nothing
//! of this can be merged into weights.

use std::path::Path;

use lowrank_formats::checkpoint::{Checkpoint, StoredDType, check_finite};
use lowrank_formats::hf_config::HfConfig;
use lowrank_formats::peft::{
    ADAPTER_WEIGHTS, PROMPT_EMBEDDINGS, PromptConfig, PromptKind, join_prefix,
    open_adapter_weights, split_prefix,
};
use lowrank_formats::safetensors_writer::{TensorSpec, write_safetensors};
use lowrank_kernels::{Tensor, Workspace, embedding_forward, fill_normal, scale};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::files::{check_keys, fingerprint, finish, saved_specs, task_type, write_config};
use super::saved;
use super::{
    AdapterConfig, BaseMark, Loaded, MethodConfig, MethodOptions, MethodSpec, Size, Started,
    Starting,
};
use crate::Error;
use crate::fields::{Field, Fields, Names, fields};
use crate::model::{Adapter, Batch, Decoder, KvCache, ModelConfig, VirtualTokens, WeightId};
use crate::random::mix;
use crate::ranks::Ranks;

/// `peft_type` of embeddings with an infix.
const PEFT_TYPE: &str = "LOWRANK_PREFIX_INFIX";

/// The tensor of the infix.
const INFIX_EMBEDDINGS: &str = "infix_embeddings";

fields! {
    /// The options of prefix tuning.
    pub struct Settings {
        /// What virtual tokens are (method prefix)
        #[arg(value_name = "KIND", value_enum, help_heading = "Other methods")]
        #[fixes(Shape)]
        #[absent(Kind::Layer)]
        pub prefix_kind: Kind = Kind::Layer,

        /// Virtual tokens before every sequence
        #[arg(value_name = "N", help_heading = "Other methods")]
        #[fixes(Shape)]
        #[absent(20)]
        pub num_virtual_tokens: usize = 20,

        /// Virtual tokens between prompt and completion, with the kind embedding
        #[arg(value_name = "N", help_heading = "Other methods")]
        #[fixes(Shape)]
        #[absent(0)]
        pub infix_tokens: usize = 0,

        /// What virtual tokens begin as
        #[arg(value_name = "INIT", value_enum, help_heading = "Other methods")]
        #[absent(Init::Text)]
        pub prefix_init: Init = Init::Text,
    }
}

impl Settings {
    fn options(&self) -> Options {
        Options {
            kind: self.prefix_kind,
            prefix: self.num_virtual_tokens,
            infix: self.infix_tokens,
        }
    }
}

/// What its files say.
pub type Config = Options;

/// Prefix tuning in the table of methods.
pub(super) struct Spec;

impl MethodSpec for Spec {
    fn title(&self) -> &'static str {
        "prefix tuning"
    }

    fn help(&self) -> &'static str {
        "Virtual tokens before every sequence"
    }

    fn learning_rate(&self) -> f64 {
        1e-2
    }

    fn fields(&self) -> Vec<Field> {
        Settings::fields()
    }

    fn check(&self, options: &MethodOptions, names: &dyn Names, problems: &mut Vec<String>) {
        let options = options.prefix.options();
        if options.kind == Kind::Layer && options.infix > 0 {
            problems.push(format!(
                "{} goes with {} embedding",
                names.given("infix_tokens"),
                names.given("prefix_kind")
            ));
        }
        if options.prefix == 0 && options.infix == 0 {
            problems.push(format!(
                "{} must be 1 or greater",
                names.given("num_virtual_tokens")
            ));
        }
    }

    fn label(&self, options: &MethodOptions) -> String {
        let Options { kind, prefix, .. } = options.prefix.options();
        format!("prefix {} {prefix}", kind.name())
    }

    fn merges(&self) -> bool {
        false
    }

    fn size(&self) -> Option<Size> {
        Some(Size {
            key: "num_virtual_tokens",
            follower: None,
            set: |options, count| options.prefix.num_virtual_tokens = count,
            most: |model| model.max_position_embeddings / 2,
        })
    }

    fn positions(&self, options: &MethodOptions) -> usize {
        let options = options.prefix.options();
        options.prefix.saturating_add(options.infix)
    }

    fn paper_parameters(&self, options: &MethodOptions, model: &ModelConfig) -> Option<usize> {
        Some(paper_parameters(model, &options.prefix.options()))
    }

    fn lay_out(&self, options: &MethodOptions, model: &ModelConfig) -> Result<Adapter, Error> {
        check_infix(model, options.prefix.options())?;
        lay_out(model, options.prefix.options())
    }

    fn start(&self, options: &MethodOptions, with: &Starting) -> Result<Started, Error> {
        check_infix(with.decoder.config(), options.prefix.options())?;
        let init = options.prefix.prefix_init;
        let options = options.prefix.options();
        let needed = options.prefix.saturating_add(options.infix);
        let text = (with.text)(needed);
        let (model, ranks) = (with.decoder, &with.ranks);
        let adapter = inject_on(ranks, model, options, init, &text.ids, with.seed)?;
        let begin = match init {
            Init::Text => {
                let found = text.ids.len().min(needed);
                format!("as the first {found} tokens of the {}", text.source)
            }
            Init::Vocab => "as tokens drawn from the vocabulary".to_owned(),
            Init::Random => "at random".to_owned(),
            Init::Zero => "at zero".to_owned(),
        };
        let coverage = coverage(with.decoder.config(), options);
        Ok(Started {
            adapter,
            coverage: Some(format!("{coverage}, which begin {begin}")),
            config: Some(AdapterConfig::Prefix(options)),
        })
    }

    fn peft_types(&self) -> &'static [&'static str] {
        &["PREFIX_TUNING", "PROMPT_TUNING", PEFT_TYPE]
    }

    fn load(&self, folder: &Path, raw: &HfConfig, model: &ModelConfig) -> Result<Loaded, Error> {
        let options = read(raw, model)?;
        let mut adapter = lay_out(model, options)?;
        let (config, coverage) = (AdapterConfig::Prefix(options), coverage(model, options));
        if options.kind == Kind::Embedding {
            return finish(folder, model, adapter, config, coverage);
        }
        let weights = open_adapter_weights(folder)?;
        read_layers(&weights, &mut adapter)?;
        let prefix = self.saved_prefix();
        let own = &[PROMPT_EMBEDDINGS];
        saved::read_of_folder(&weights, folder, model, &mut adapter, prefix, own)?;
        Ok(Loaded {
            adapter,
            config,
            coverage,
            base_fingerprint: fingerprint(&weights),
        })
    }

    fn saved_prefix(&self) -> &'static str {
        "base_model."
    }

    /// PEFT's files say the kind with their type.
    fn complete(&self, config: &mut Map<String, Value>) {
        let kind = match config.get("peft_type").and_then(Value::as_str) {
            Some("PREFIX_TUNING") => Kind::Layer,
            Some("PROMPT_TUNING") => Kind::Embedding,
            _ => return,
        };
        config.insert("prefix_kind".to_owned(), kind.name().into());
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
        save(folder, model, *self, adapter, base)
    }

    fn options(&self) -> Vec<(&'static str, Value)> {
        let mut keys = vec![
            ("prefix_kind", self.kind.name().into()),
            ("num_virtual_tokens", self.prefix.into()),
        ];
        if self.infix > 0 {
            keys.push(("infix_tokens", self.infix.into()));
        }
        keys
    }

    fn is_pefts(&self, model: &ModelConfig) -> bool {
        // PEFT hands keys and values over as a cache of earlier tokens, which an encoder of transformers does not take.
        self.has_peft_type() && (self.kind == Kind::Embedding || model.causal)
    }
}

/// What is trained (`prefix_kind`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Kind {
    /// Keys and values in every block: PEFT's prefix tuning.
    #[default]
    Layer,
    /// Token embeddings: PEFT's prompt tuning.
    Embedding,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Layer => "layer",
            Self::Embedding => "embedding",
        }
    }
}

/// What the trained values begin as (`prefix_init`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Init {
    /// The tokens of the first prompts.
    ///
    /// That is what the base computes for them: their embeddings, or their keys and values.
    #[default]
    Text,
    /// Tokens drawn from the vocabulary.
    Vocab,
    /// Normal with standard deviation 1.
    ///
    /// PEFT draws so.
    Random,
    /// Zeros.
    Zero,
}

/// What is trained, and how many virtual tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Embeddings, or keys and values.
    pub kind: Kind,
    /// `num_virtual_tokens`: before every sequence.
    pub prefix: usize,
    /// `infix_tokens`: between prompt and completion; embeddings alone have it.
    pub infix: usize,
}

impl Options {
    /// What is wrong with them, in words.
    ///
    /// # Errors
    /// Nothing to train, an infix of keys and values, or no room in the context.
    pub fn check(&self, config: &ModelConfig) -> Result<(), String> {
        if self.prefix == 0 && (self.infix == 0 || self.kind == Kind::Layer) {
            return Err("num_virtual_tokens must be at least 1".to_owned());
        }
        if self.kind == Kind::Layer && self.infix > 0 {
            return Err("infix_tokens goes with prefix_kind embedding: keys and values stand before a sequence alone".to_owned());
        }
        if self.kind == Kind::Layer && config.relative.is_some() {
            return Err(format!(
                "prefix_kind layer puts keys before a sequence that are no rows of it, and the scores of {} need the distance of every key; \
                 use prefix_kind embedding",
                config.family.model_type()
            ));
        }
        let limit = config.longest_sequence();
        if self.prefix.saturating_add(self.infix) >= limit {
            return Err(format!(
                "num_virtual_tokens {} and infix_tokens {} leave no room for text: the model was made for {limit} tokens",
                self.prefix, self.infix
            ));
        }
        Ok(())
    }

    /// The places in a sequence that it takes.
    pub fn virtual_tokens(&self) -> VirtualTokens {
        match self.kind {
            Kind::Layer => VirtualTokens {
                keys: self.prefix,
                ..VirtualTokens::default()
            },
            Kind::Embedding => VirtualTokens {
                keys: 0,
                prefix: self.prefix,
                infix: self.infix,
            },
        }
    }

    /// Whether PEFT has files for it.
    pub fn has_peft_type(&self) -> bool {
        self.infix == 0
    }
}

/// Number of trained values: C·(l_p + l_i), or 2·L·KV·D·n.
pub fn parameters(config: &ModelConfig, options: &Options) -> usize {
    let count = options.prefix + options.infix;
    match options.kind {
        Kind::Embedding => config.hidden_size * count,
        Kind::Layer => 2 * config.num_hidden_layers * config.kv_size() * count,
    }
}

/// The count of the LoRA paper's section 5.1: d·(l_p + l_i), or L·d·(l_p + l_i). There a prefix in every layer is an
/// activation of d values a token and layer, which the layer's own projections turn into a key and a value.
pub fn paper_parameters(config: &ModelConfig, options: &Options) -> usize {
    let count = options.prefix + options.infix;
    match options.kind {
        Kind::Embedding => config.hidden_size * count,
        Kind::Layer => config.num_hidden_layers * config.hidden_size * count,
    }
}

/// What is trained, in words.
fn coverage(config: &ModelConfig, options: Options) -> String {
    let parameters = parameters(config, &options);
    let n = options.prefix;
    match options.kind {
        Kind::Layer => format!(
            "keys and values of {n} virtual tokens in {} blocks, {parameters} trainable parameters",
            config.num_hidden_layers
        ),
        Kind::Embedding if options.infix == 0 => {
            format!("embeddings of {n} virtual tokens, {parameters} trainable parameters")
        }
        Kind::Embedding => format!(
            "embeddings of {n} virtual tokens before and {} behind every prompt, {parameters} trainable parameters",
            options.infix
        ),
    }
}

/// The slots, all zero, and where they act.
///
/// # Errors
/// Options that do not fit the model.
fn lay_out(config: &ModelConfig, options: Options) -> Result<Adapter, Error> {
    options.check(config).map_err(Error::Settings)?;
    let mut slots = Vec::new();
    if options.kind == Kind::Layer {
        for layer in 0..config.num_hidden_layers {
            for part in ["key", "value"] {
                let name = format!("{PROMPT_EMBEDDINGS}.{layer}.{part}");
                slots.push((name, (options.prefix, config.kv_size())));
            }
        }
        let mut adapter = Adapter::new(slots);
        let layers = 0..config.num_hidden_layers;
        adapter.virtual_tokens.key_values = layers.map(|l| (2 * l, 2 * l + 1)).collect();
        return Ok(adapter);
    }
    let parts = [
        (PROMPT_EMBEDDINGS, options.prefix),
        (INFIX_EMBEDDINGS, options.infix),
    ];
    for (name, count) in parts.into_iter().filter(|(_, count)| *count > 0) {
        slots.push((name.to_owned(), (count, config.hidden_size)));
    }
    let mut adapter = Adapter::new(slots);
    adapter.virtual_tokens.prefix = adapter.slot(PROMPT_EMBEDDINGS);
    adapter.virtual_tokens.infix = adapter.slot(INFIX_EMBEDDINGS);
    Ok(adapter)
}

/// The first values. `text` are the tokens that [`Init::Text`] takes, from the first on, again and again where there are
/// too few.
///
/// # Errors
/// Options that do not fit the model; no text to begin with.
pub fn inject(
    model: &Decoder,
    options: Options,
    init: Init,
    text: &[u32],
    seed: u64,
) -> Result<Adapter, Error> {
    inject_on(&Ranks::alone(), model, options, init, text, seed)
}

/// The same for a rank's stage of the model, whose values are then right.
fn inject_on(
    ranks: &Ranks<'_>,
    model: &Decoder,
    options: Options,
    init: Init,
    text: &[u32],
    seed: u64,
) -> Result<Adapter, Error> {
    let mut adapter = lay_out(model.config(), options)?;
    let count = options.prefix + options.infix;
    let ids: Vec<u32> = match init {
        Init::Zero => return Ok(adapter),
        Init::Random => {
            for slot in 0..adapter.params.slots() {
                let values = adapter.params.view_mut(slot);
                fill_normal(values, 1.0, mix(seed, slot as u64));
            }
            return Ok(adapter);
        }
        Init::Text if text.is_empty() => {
            return Err(Error::Settings(
                "prefix_init text needs a row with tokens; give prefix_init vocab".to_owned(),
            ));
        }
        Init::Text => text.iter().copied().cycle().take(count).collect(),
        Init::Vocab => {
            let size = model.config().vocab_size as u64;
            let draw = |i| (mix(seed, i) % size) as u32;
            (0..count as u64).map(draw).collect()
        }
    };
    match options.kind {
        Kind::Embedding => embeddings_of(model, &ids, &mut adapter),
        Kind::Layer => keys_and_values_of(ranks, model, &ids, &mut adapter)?,
    }
    Ok(adapter)
}

fn embeddings_of(model: &Decoder, ids: &[u32], adapter: &mut Adapter) {
    let mut rest = ids;
    for slot in 0..adapter.params.slots() {
        let (own, others) = rest.split_at(adapter.params.shape(slot).0);
        // A later stage of a pipeline has no embeddings, and no use for these values.
        let Some(table) = model.weights().get(WeightId::Embedding) else {
            return;
        };
        embedding_forward(adapter.params.view_mut(slot), own, table, false);
        // What the model itself would put there.
        if let Some(factor) = model.table_scale() {
            scale(adapter.params.view_mut(slot), factor);
        }
        rest = others;
    }
}

/// The keys, turned to the positions from 0 on, and the values of a sequence.
fn keys_and_values_of(
    ranks: &Ranks<'_>,
    model: &Decoder,
    ids: &[u32],
    adapter: &mut Adapter,
) -> Result<(), Error> {
    let mut cache = KvCache::new(model.config(), KvCache::blocks_for(ids.len()));
    let rows = cache.take(ids.len()).expect("it was made for them");
    let places: Vec<_> = rows.places(0..ids.len()).collect();
    let mut batch = Batch::default();
    batch.push(ids, &[]);
    for segment in &mut batch.segments {
        segment.keys.clone_from(&places);
    }
    batch.appends.extend(rows.appends(0, 0..ids.len()));
    let ws = Workspace::new();
    let stage = ranks.stage();
    let below = match stage {
        0 => None,
        _ => Some(ranks.rows_from(stage - 1, ids.len(), model.config().hidden_size)?),
    };
    let rows = model.fill_cache(&batch, below, &mut cache, &ws);
    if !ranks.scores() {
        ranks.send_rows(stage + 1, rows.view())?;
        ranks.comm().flush()?;
    }
    let blocks = model.weights().stage().blocks.clone();
    let sites = adapter.virtual_tokens.key_values.clone();
    for (layer, (key, value)) in sites.into_iter().enumerate() {
        if !blocks.contains(&layer) {
            continue;
        }
        for (slot, cached) in [key, value]
            .into_iter()
            .zip(<[_; 2]>::from(cache.layer(layer)))
        {
            let mut to = adapter.params.view_mut(slot);
            for (own, place) in &batch.appends {
                let from = cached.slice_rows(*place..place + own.len());
                to.reborrow().slice_rows(own.clone()).copy_from(from);
            }
        }
    }
    Ok(())
}

/// The options of a folder's config.
///
/// # Errors
/// A field that is missing, out of range, or of another model.
fn read(raw: &HfConfig, model: &ModelConfig) -> Result<Options, Error> {
    if raw.str("peft_type")? == PEFT_TYPE {
        check_keys(raw, &["infix_tokens", "num_virtual_tokens", "prefix_kind"])?;
        if raw
            .opt_str("prefix_kind")?
            .is_some_and(|k| k != "embedding")
        {
            return Err(raw.unsupported("prefix_kind", "\"embedding\"").into());
        }
        let options = Options {
            kind: Kind::Embedding,
            prefix: raw.usize("num_virtual_tokens")?,
            infix: raw.usize("infix_tokens")?,
        };
        check_room(raw, model, options)?;
        return Ok(options);
    }
    let config = PromptConfig::from_config(raw)?;
    let options = Options {
        kind: match config.kind {
            PromptKind::Prefix => Kind::Layer,
            PromptKind::Prompt => Kind::Embedding,
        },
        prefix: config.num_virtual_tokens,
        infix: 0,
    };
    let expected = peft_config(model, Vec::new(), options, "");
    for (key, found, needed) in [
        ("num_layers", config.num_layers, expected.num_layers),
        ("token_dim", config.token_dim, expected.token_dim),
    ] {
        if let (Some(found), Some(needed)) = (found, needed)
            && found != needed
        {
            let accepted = format!("{needed}: is this adapter for another model?");
            return Err(raw.unsupported(key, accepted).into());
        }
    }
    check_room(raw, model, options)?;
    Ok(options)
}

fn check_room(raw: &HfConfig, model: &ModelConfig, options: Options) -> Result<(), Error> {
    options
        .check(model)
        .map_err(|problem| raw.unsupported("num_virtual_tokens", problem).into())
}

/// Fills a laid out adapter from a folder's weights.
///
/// # Errors
/// Tensors that are missing, left over or of another shape.
fn read_layers(weights: &Checkpoint, adapter: &mut Adapter) -> Result<(), Error> {
    let slots = adapter.params.slots();
    let (n, width) = adapter.params.shape(0);
    let shape = [n, slots * width];
    let mut problems = Vec::new();
    match weights.get(PROMPT_EMBEDDINGS) {
        None => problems.push(format!("{PROMPT_EMBEDDINGS}: missing (expected {shape:?})")),
        Some(entry) if entry.shape != shape => problems.push(format!(
            "{PROMPT_EMBEDDINGS}: shape {:?}, the model needs {shape:?}; is this adapter for another model?",
            entry.shape
        )),
        Some(entry) if problems.is_empty() => {
            check_finite([&entry])?;
            let parts = split_prefix(&entry.to_f32()?, n, slots);
            for (slot, values) in parts.into_iter().enumerate() {
                let values = Tensor::from_f32(n, width, values);
                adapter.params.view_mut(slot).copy_from(values.view());
            }
        }
        Some(_) => {}
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::Tensors {
        path: weights.path().to_path_buf(),
        problems,
    })
}

/// Writes the adapter's two files.
///
/// # Errors
/// A file can't be written.
fn save(
    folder: &Path,
    model: &ModelConfig,
    options: Options,
    adapter: &Adapter,
    base: BaseMark,
) -> Result<(), Error> {
    if options.kind == Kind::Layer {
        let (n, width) = adapter.params.shape(0);
        let saved = adapter.saved.slots.clone();
        let slots = adapter.params.slots() - saved.len();
        let parts: Vec<Vec<f32>> = (0..slots)
            .map(|slot| adapter.params.view(slot).to_vec())
            .collect();
        let spec = TensorSpec {
            name: PROMPT_EMBEDDINGS.to_owned(),
            dtype: StoredDType::F32,
            shape: vec![n, slots * width],
        };
        let values = Tensor::from_f32(n, slots * width, join_prefix(&parts, n));
        let bytes = values.to_le_bytes(lowrank_kernels::DType::F32);
        let specs: Vec<_> = std::iter::once(spec).chain(saved_specs(adapter)).collect();
        write_safetensors(
            &folder.join(ADAPTER_WEIGHTS),
            &specs,
            &base.metadata(),
            |index, out| match index.checked_sub(1) {
                None => out.write_all(&bytes),
                Some(n) => {
                    let values = adapter.params.view(saved.start + n);
                    out.write_all(&values.to_le_bytes(lowrank_kernels::DType::F32))
                }
            },
        )?;
    } else {
        super::files::write_values(folder, adapter, base)?;
    }
    if options.has_peft_type() {
        peft_config(model, adapter.saved.names.clone(), options, base.name).write(folder)?;
        return Ok(());
    }
    write_config(
        folder,
        PEFT_TYPE,
        base.name,
        (model, adapter),
        MethodConfig::options(&options),
    )
}

/// Refuses embeddings behind a prompt where there is no prompt.
fn check_infix(model: &ModelConfig, options: Options) -> Result<(), Error> {
    if options.infix > 0 && model.classifier().is_some() {
        let reason = "infix_tokens stand between a prompt and its completion, and a classifier's rows have none; leave them out";
        return Err(Error::Settings(reason.to_owned()));
    }
    Ok(())
}

/// PEFT's config of these options.
fn peft_config(
    model: &ModelConfig,
    modules_to_save: Vec<String>,
    options: Options,
    base: &str,
) -> PromptConfig {
    let (kind, token_dim, heads) = match options.kind {
        Kind::Layer => (
            PromptKind::Prefix,
            model.kv_size(),
            model.num_key_value_heads,
        ),
        Kind::Embedding => (
            PromptKind::Prompt,
            model.hidden_size,
            model.num_attention_heads,
        ),
    };
    PromptConfig {
        kind,
        num_virtual_tokens: options.prefix,
        token_dim: Some(token_dim),
        num_attention_heads: Some(heads),
        num_layers: Some(model.num_hidden_layers),
        base_model_name_or_path: Some(base.to_owned()),
        task_type: Some(task_type(model).to_owned()),
        modules_to_save,
    }
}

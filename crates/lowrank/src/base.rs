//! A base model as a user names it: a folder, a GGUF file, a Hub id that was pulled, or `builtin:tiny`.

mod builtin;
pub(crate) mod gguf;
mod grown;
mod limits;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowrank_formats::quantized::QUANTIZATION_CONFIG;
use lowrank_formats::{Format, FormatError, atomic, snapshots};
use lowrank_kernels::release_freed_memory;

use crate::Error;
use crate::data::{Labels, ProblemType, TaskType, Tokenizer};
use crate::model::stored::{StoredTensors, Unquantized};
use crate::model::weights::with_head_of;
use crate::model::{Decoder, LoadIn, ModelConfig, Purpose, Stage, Weights, families};

pub use builtin::{BUILTIN, BUILTIN_FILES, BUILTIN_TASKS, BUILTIN_WORDS, write_builtin_task};
use builtin::{builtin, builtin_config, builtin_ends, check_builtin};
pub use gguf::GgufFile;
pub use grown::Grown;
pub(crate) use limits::LoadingBytes;
pub use lowrank_formats::{Checkpoint, HfConfig, SharedBytes, StoredDType, TensorEntry};
pub use lowrank_kernels::DType;

/// Files that go with a model and hold no weights; copied byte for byte where a new model folder is written.
pub(crate) const SIDE_FILES: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// Folders of such files: named chat templates.
pub(crate) const SIDE_FOLDERS: &[&str] = &["additional_chat_templates"];

/// The files of a model folder that this program writes itself; the others are copied from the base.
pub const MODEL_FILES: &[&str] = &["config.json", "model.safetensors"];

/// Where a model's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A Hugging Face folder.
    Folder(PathBuf),
    /// A GGUF file, which is used as it is.
    Gguf(Box<GgufFile>),
    /// Inside the binary; nothing of it can be read without the feature `builtin-model`.
    Builtin,
    /// Another one, whose matrices are quantized while they are loaded.
    LoadIn(Box<Source>, LoadIn),
    /// Another one, with tokens that an adapter brings.
    Grown(Box<Grown>),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => write!(f, "{}", path.display()),
            Self::Gguf(file) => write!(f, "{}", file.path().display()),
            Self::Builtin => f.write_str(BUILTIN),
            Self::LoadIn(base, _) => base.fmt(f),
            Self::Grown(grown) => grown.base.fmt(f),
        }
    }
}

/// A model that is ready to be used.
pub struct Base {
    /// The network.
    pub decoder: Arc<Decoder>,
    /// Its tokenizer and chat template.
    pub tokenizer: Tokenizer,
    /// Where it came from.
    pub source: Source,
}

/// A model without its tokenizer: all that training needs once the rows are tokens. The tokenizer of a large vocabulary
/// takes tens of megabytes.
#[derive(Clone)]
pub struct Network {
    /// The network.
    pub decoder: Arc<Decoder>,
    /// Where it came from.
    pub source: Source,
    /// What the outputs of its classifier mean, if it has one.
    pub labels: Option<Labels>,
}

impl Base {
    /// Loads a language model by its name: a folder in the Hugging Face layout, a GGUF file, an id of the Hub that was pulled, or
    /// [`BUILTIN`]. Its weights are held as `dtype`.
    ///
    /// # Errors
    /// A name that means nothing; anything about the files that can't be used, by name; an encoder.
    pub fn load(model: &str, dtype: DType) -> Result<Self, Error> {
        Source::find(model)?.load(dtype)
    }

    /// The model without its tokenizer; the weights are shared.
    pub fn network(&self) -> Network {
        Network {
            decoder: Arc::clone(&self.decoder),
            source: self.source.clone(),
            labels: None,
        }
    }

    /// Drops the tokenizer, and gives its memory back to the system.
    pub fn into_network(self) -> Network {
        let network = self.network();
        drop(self);
        release_freed_memory();
        network
    }
}

/// Which stage of a model is to be loaded, from its config as the tensors have it; `None`: all of it.
pub(crate) type StageOf<'a> = &'a dyn Fn(&ModelConfig) -> Result<Option<Stage>, Error>;

impl Source {
    /// Finds the files that a `--model` value means.
    ///
    /// # Errors
    /// A name that is neither a folder, nor a GGUF file, nor built in, nor a pulled Hub id; a GGUF file of an architecture that is not known, or that
    /// the process's limits have no room for.
    pub fn find(model: &str) -> Result<Self, Error> {
        if let Some(other) = model.strip_prefix("builtin:") {
            check_builtin()?;
            if model == BUILTIN {
                return Ok(Self::Builtin);
            }
            return Err(Error::Settings(format!(
                "there is no built-in model `{other}`; the one there is: {BUILTIN}"
            )));
        }
        let path = Path::new(model);
        if path.is_dir() {
            // A model's folder in the Hub's cache holds it under its revisions; the one in use stands first.
            let snapshot = snapshots(path).and_then(|found| found.into_iter().next());
            return Ok(Self::Folder(snapshot.unwrap_or_else(|| path.to_path_buf())));
        }
        if path.is_file() && Format::of_file(path) == Some(Format::Gguf) {
            limits::check_gguf(path)?;
            return Ok(Self::Gguf(Box::new(GgufFile::open(path)?)));
        }
        if path.is_file() {
            let folder = path
                .parent()
                .filter(|folder| folder.join("config.json").is_file());
            let mend = if let Some(folder) = folder.filter(|folder| !folder.as_os_str().is_empty())
            {
                format!("give the folder that holds it, {}", folder.display())
            } else {
                "give the folder that holds config.json and model.safetensors".to_owned()
            };
            return Err(Error::Settings(format!(
                "{model} is a file, and a model is a folder or a GGUF file; {mend}"
            )));
        }
        crate::hub::cached(model).map(Self::Folder).ok_or_else(|| {
            let mend = if crate::hub::looks_like_id(model) {
                crate::hub::how_to_fetch(model)
            } else {
                format!("give a folder, a Hub id (owner/name) or {BUILTIN}")
            };
            Error::Settings(format!("model {model}: there is no such folder; {mend}"))
        })
    }

    /// The same model, whose matrices are quantized while they are loaded.
    ///
    /// # Errors
    /// A model that is quantized already.
    pub fn load_in(self, load_in: Option<LoadIn>) -> Result<Self, Error> {
        let Some(load_in) = load_in else {
            return Ok(self);
        };
        self.tensors()?.load_in(load_in)?;
        Ok(Self::LoadIn(Box::new(self), load_in))
    }

    /// What its matrices are quantized to while they are loaded, if they are.
    fn loads_in(&self) -> Option<LoadIn> {
        match self {
            Self::LoadIn(_, load_in) => Some(*load_in),
            Self::Grown(grown) => grown.base.loads_in(),
            Self::Folder(_) | Self::Gguf(_) | Self::Builtin => None,
        }
    }

    /// The model as it was before it was quantized while it was loaded; `None` where it was not.
    ///
    /// # Errors
    /// Files that are missing or damaged.
    pub(crate) fn unquantized(&self) -> Result<Option<Unquantized>, Error> {
        if self.loads_in().is_none() {
            return Ok(None);
        }
        let files = self.files();
        Ok(Some(Unquantized {
            model: families::read_config(&files.config()?)?,
            stored: files.tensors()?,
        }))
    }

    /// The parsed `config.json`.
    ///
    /// # Errors
    /// A file that is missing or not JSON.
    pub fn config(&self) -> Result<HfConfig, Error> {
        Ok(match self {
            Self::Folder(folder) => HfConfig::read(folder)?,
            Self::Gguf(file) => file.config(),
            Self::Builtin => {
                check_builtin()?;
                HfConfig::from_map(Path::new(BUILTIN), builtin_config())
            }
            Self::LoadIn(base, _) => base.config()?,
            Self::Grown(grown) => {
                let raw = families::read_part(grown.base.config()?)?;
                let mut map = raw.map().clone();
                let rows = grown.rows(families::read_config(&raw)?.vocab_size);
                map.insert("vocab_size".to_owned(), rows.into());
                HfConfig::from_map(raw.path(), map)
            }
        })
    }

    /// What holds the files: itself, or what was grown.
    fn files(&self) -> &Self {
        match self {
            Self::LoadIn(base, _) => base.files(),
            Self::Grown(grown) => grown.base.files(),
            files => files,
        }
    }

    /// The folder that holds the files, if one does.
    pub fn folder(&self) -> Option<&Path> {
        match self.files() {
            Self::Folder(folder) => Some(folder),
            _ => None,
        }
    }

    /// The weights for a purpose, as they are used.
    ///
    /// # Errors
    /// Anything about its files that can't be used, by name.
    pub fn weights_for(&self, dtype: DType, purpose: Purpose) -> Result<Weights, Error> {
        self.stage_weights_for(dtype, purpose, &|_| Ok(None))
    }

    /// The same of one stage of a pipeline.
    fn stage_weights_for(
        &self,
        dtype: DType,
        purpose: Purpose,
        stage_of: StageOf<'_>,
    ) -> Result<Weights, Error> {
        let config = families::read_config_for(&self.files().config()?, purpose)?;
        let stored = self.tensors()?;
        let mut weights = Weights::stage_from_stored(config, &stored, dtype, stage_of)?;
        if let Self::Grown(grown) = self {
            weights.grow(grown.rows(weights.config().vocab_size))?;
        }
        Ok(weights)
    }

    /// The model's shapes and choices: config.json's, with the head as the weights have it.
    ///
    /// # Errors
    /// Files that are missing or damaged, and what is not supported, by name.
    pub fn model_config(&self) -> Result<ModelConfig, Error> {
        with_head_of(families::read_config(&self.config()?)?, &self.tensors()?)
    }

    /// The same for a purpose.
    ///
    /// # Errors
    /// As [`model_config`](Self::model_config); a purpose that the architecture does not have.
    pub fn model_config_for(&self, purpose: Purpose) -> Result<ModelConfig, Error> {
        let config = families::read_config_for(&self.config()?, purpose)?;
        with_head_of(config, &self.tensors()?)
    }

    /// The same for who loads no weights: where they cannot be read, what config.json says.
    ///
    /// # Errors
    /// A config.json that cannot be used; a purpose that the architecture does not have.
    pub fn shapes_for(&self, purpose: Purpose) -> Result<ModelConfig, Error> {
        let config = families::read_config_for(&self.config()?, purpose)?;
        let of_weights = self.tensors().ok();
        let found = of_weights.and_then(|weights| with_head_of(config.clone(), &weights).ok());
        Ok(found.unwrap_or(config))
    }

    /// The opened weights.
    ///
    /// # Errors
    /// Files that are missing or damaged.
    pub fn tensors(&self) -> Result<StoredTensors, Error> {
        let tensors = match self.files() {
            Self::Folder(folder) => StoredTensors::of_folder(folder, &HfConfig::read(folder)?)?,
            Self::Gguf(file) => file.tensors()?,
            Self::Builtin | Self::LoadIn(..) | Self::Grown(_) => {
                check_builtin()?;
                let file = builtin("model.safetensors");
                Checkpoint::from_static(file, Path::new(BUILTIN))?.into()
            }
        };
        match self.loads_in() {
            Some(load_in) => tensors.load_in(load_in),
            None => Ok(tensors),
        }
    }

    /// The tokenizer with its chat template.
    ///
    /// # Errors
    /// Files that are missing or damaged.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        let mut tokenizer = match self {
            Self::Folder(folder) => {
                for name in ["tokenizer.json", "tokenizer_config.json"] {
                    check_is_there(&folder.join(name))?;
                }
                Tokenizer::from_folder(folder)?
            }
            Self::Gguf(file) => file.tokenizer()?,
            Self::Builtin => {
                check_builtin()?;
                let template = String::from_utf8_lossy(builtin("chat_template.jinja"));
                let json = builtin("tokenizer.json");
                Tokenizer::from_parts(json, Some(&template), "<|endoftext|>", &builtin_ends())?
            }
            Self::LoadIn(base, _) => base.tokenizer()?,
            Self::Grown(grown) => {
                let mut tokenizer = grown.base.tokenizer()?;
                tokenizer.add(&grown.tokens)?;
                tokenizer
            }
        };
        // A tokenizer can be used without a model that is known here.
        let config = self
            .config()
            .ok()
            .and_then(|config| families::read_config(&config).ok());
        if let Some(config) = config {
            tokenizer.limit(config.vocab_size);
        }
        Ok(tokenizer)
    }

    /// The type in which weights lose nothing but f16's last digits: f32 where a matrix is stored so.
    ///
    /// # Errors
    /// Files that are missing or damaged.
    pub fn stored_dtype(&self) -> Result<DType, Error> {
        self.held(&["F32"])
    }

    /// The type in which weights lose nothing at all.
    ///
    /// # Errors
    /// Files that are missing or damaged.
    pub fn exact_dtype(&self) -> Result<DType, Error> {
        // A GGUF file's f16 stays as it is.
        self.held(if self.gguf().is_some() {
            &["F32"]
        } else {
            &["F32", "F16"]
        })
    }

    fn held(&self, wide: &[&str]) -> Result<DType, Error> {
        let stored = self.tensors()?;
        let is_wide = |name: &str| {
            let tensor = stored.find(name).ok().flatten();
            // Vectors of a GGUF file are f32 always.
            tensor.is_some_and(|tensor| {
                wide.contains(&tensor.type_name())
                    && (tensor.shape().len() > 1 || !tensor.is_of_gguf())
            })
        };
        let wide = stored.names().into_iter().any(is_wide);
        Ok(if wide { DType::F32 } else { DType::Bf16 })
    }

    /// The GGUF file, if it is one.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match self.files() {
            Self::Gguf(file) => Some(file),
            _ => None,
        }
    }

    /// What its config.json says that it is for: a classifier that was trained, or what its architecture is made for.
    ///
    /// # Errors
    /// As [`config`](Self::config); an architecture that is not supported.
    pub fn purpose(&self) -> Result<(Purpose, Option<Labels>), Error> {
        purpose_in(&self.config()?)
    }

    /// Loads the model as a language model.
    ///
    /// # Errors
    /// Anything about its files that can't be used, by name; an encoder.
    pub fn load(self, dtype: DType) -> Result<Base, Error> {
        let config = families::read_config_for(&self.config()?, Purpose::LanguageModel)?;
        self.check_limits(&config, dtype, 1.0)?;
        let tokenizer = self.tokenizer()?;
        let purpose = Purpose::LanguageModel;
        let network = self.load_weights(&config, dtype, purpose, &|_| Ok(None))?;
        Ok(Base {
            decoder: Decoder::new(network.0),
            tokenizer,
            source: network.1,
        })
    }

    /// Loads the model for a purpose, without its tokenizer. What its files lack of a classifier begins anew, as `seed` says.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_for(
        self,
        dtype: DType,
        purpose: Purpose,
        labels: Option<Labels>,
        seed: u64,
    ) -> Result<Network, Error> {
        self.load_network(dtype, purpose, labels, (seed, false), &|_| Ok(None))
    }

    /// Loads the stage of the model that `stage_of` says, or all of it. Where `renew` says so, the last linear of the classifier begins
    /// anew.
    ///
    /// # Errors
    /// As [`load`](Self::load); what `stage_of` says.
    pub(crate) fn load_network(
        self,
        dtype: DType,
        purpose: Purpose,
        labels: Option<Labels>,
        (seed, renew): (u64, bool),
        stage_of: StageOf<'_>,
    ) -> Result<Network, Error> {
        let config = families::read_config_for(&self.config()?, purpose)?;
        let stage = stage_of(&config)?;
        let share = stage.map_or(1.0, |stage| stage.share(&config, dtype));
        self.check_limits(&config, dtype, share)?;
        let (mut weights, source) = self.load_weights(&config, dtype, purpose, stage_of)?;
        if renew {
            weights.renew_classifier();
        }
        weights.begin_classifier(seed);
        Ok(Network {
            decoder: Decoder::new(weights),
            source,
            labels,
        })
    }

    fn load_weights(
        self,
        config: &ModelConfig,
        dtype: DType,
        purpose: Purpose,
        stage_of: StageOf<'_>,
    ) -> Result<(Weights, Self), Error> {
        let tied = config.ties_head();
        let weights = self.stage_weights_for(dtype, purpose, stage_of)?;
        if tied && !weights.config().tie_word_embeddings {
            tracing::warn!(
                "{self}: lm_head.weight differs from the embedding, so it is used as the head, though config.json has \
                 tie_word_embeddings: true; set it to false"
            );
        }
        Ok((weights, self))
    }

    /// Copies the tokenizer, the chat template and the generation settings into `folder`, byte for byte, and writes
    /// config.json with the dtype of the weights beside it.
    ///
    /// # Errors
    /// A file can't be read or written.
    pub fn write_side_files(&self, folder: &Path, dtype: DType) -> Result<(), Error> {
        self.write_changed_side_files(folder, dtype, &[])
    }

    /// [`write_side_files`](Self::write_side_files), with some keys of config.json set to another value.
    ///
    /// # Errors
    /// A file can't be read or written.
    pub(crate) fn write_changed_side_files(
        &self,
        folder: &Path,
        dtype: DType,
        changes: &[(&str, serde_json::Value)],
    ) -> Result<(), Error> {
        let mut of_gguf = match self.files() {
            Self::Gguf(file) => file.side_files()?,
            _ => BTreeMap::new(),
        };
        for name in SIDE_FILES {
            let bytes = match self.files() {
                Self::Folder(from) => match std::fs::read(from.join(name)) {
                    Ok(bytes) => bytes,
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(Error::io(from.join(name))(error)),
                },
                Self::Gguf(_) => match of_gguf.remove(*name) {
                    Some(bytes) => bytes,
                    None => continue,
                },
                _ => match BUILTIN_FILES.iter().find(|(known, _)| known == name) {
                    Some((_, bytes)) => bytes.to_vec(),
                    None => continue,
                },
            };
            atomic::write_file(&folder.join(name), |out| out.write_all(&bytes))?;
        }
        if let Some(from) = self.folder() {
            for name in SIDE_FOLDERS {
                copy_files(&from.join(name), &folder.join(name))?;
            }
        }
        self.write_added_tokens(folder)?;
        let mut config = families::read_part(self.config()?)?.map().clone();
        // What is written beside it is not quantized, or says so in `changes`.
        config.shift_remove(QUANTIZATION_CONFIG);
        let name = match dtype {
            DType::F32 => "float32",
            DType::Bf16 => "bfloat16",
        };
        // Of both, `dtype` is what transformers reads.
        let key = if config.contains_key("dtype") {
            config.shift_remove("torch_dtype");
            "dtype"
        } else {
            "torch_dtype"
        };
        config.insert(key.to_owned(), name.into());
        let tied = families::read_config(&self.config()?)?.tie_word_embeddings;
        if tied && !self.model_config()?.tie_word_embeddings {
            config.insert("tie_word_embeddings".to_owned(), false.into());
        }
        for (key, value) in changes {
            config.insert((*key).to_owned(), value.clone());
        }
        atomic::write_file(&folder.join("config.json"), |out| {
            serde_json::to_writer_pretty(&mut *out, &config)?;
            out.write_all(b"\n")
        })?;
        Ok(())
    }

    /// A short name for cards and reports: a folder's own name, never a path.
    pub fn short_name(&self) -> String {
        match self {
            Self::Folder(path) => path.file_name().map_or_else(
                || "model".into(),
                |name| name.to_string_lossy().into_owned(),
            ),
            Self::Gguf(file) => file.name(),
            Self::Builtin => BUILTIN.to_owned(),
            Self::LoadIn(base, _) => base.short_name(),
            Self::Grown(grown) => grown.base.short_name(),
        }
    }
}

/// What a config.json says that its model is for, and what the outputs of its classifier mean.
///
/// # Errors
/// An architecture that is not supported, labels that are no map of numbers to names.
fn purpose_in(raw: &HfConfig) -> Result<(Purpose, Option<Labels>), Error> {
    let architectures = raw.opt_strs("architectures")?.unwrap_or_default();
    let is_for = |task: &str| architectures.iter().any(|name| name.ends_with(task));
    if is_for("ForSequenceClassification") || is_for("ForTokenClassification") {
        let names = label_names(raw)?;
        let (labels, of_tokens) = (names.len(), is_for("ForTokenClassification"));
        let problem_type = match raw.opt_str("problem_type")? {
            Some("regression") => ProblemType::Regression,
            Some("multi_label_classification") => ProblemType::MultiLabelClassification,
            None if labels == 1 && !of_tokens => ProblemType::Regression,
            None | Some("single_label_classification") => ProblemType::SingleLabelClassification,
            Some(_) => {
                let accepted =
                    "single_label_classification, multi_label_classification or regression";
                return Err(raw.unsupported("problem_type", accepted).into());
            }
        };
        let purpose = if of_tokens {
            Purpose::TokenClassifier { labels }
        } else {
            Purpose::SequenceClassifier { labels }
        };
        let labels = Labels {
            names,
            problem_type,
        };
        return Ok((purpose, Some(labels)));
    }
    let config = families::read_config(raw)?;
    let purpose = if config.causal {
        Purpose::LanguageModel
    } else {
        Purpose::Features
    };
    Ok((purpose, None))
}

/// What a model will be for in a run of which the rows are not known yet: `task` if that is set, what its config.json says, or of an
/// encoder by itself, to classify. A classifier has so many `labels`, or those that it has, or two.
///
/// # Errors
/// An architecture that is not supported, labels that are no map of numbers to names.
pub fn purpose_for(
    raw: &HfConfig,
    task: Option<TaskType>,
    labels: Option<usize>,
) -> Result<Purpose, Error> {
    let (own, _) = purpose_in(raw)?;
    let of_own = match own {
        Purpose::SequenceClassifier { labels } | Purpose::TokenClassifier { labels } => {
            Some(labels)
        }
        Purpose::LanguageModel | Purpose::Features => None,
    };
    let labels = labels.or(of_own).unwrap_or(2);
    let of_sequences = Purpose::SequenceClassifier { labels };
    let of_tokens = Purpose::TokenClassifier { labels };
    Ok(match (task, own) {
        (Some(TaskType::CausalLm), _) | (None, Purpose::LanguageModel) => Purpose::LanguageModel,
        (Some(TaskType::FeatureExtraction), _) => Purpose::Features,
        (Some(TaskType::TokenCls), _) | (None, Purpose::TokenClassifier { .. }) => of_tokens,
        (Some(TaskType::SeqCls), _)
        | (None, Purpose::SequenceClassifier { .. } | Purpose::Features) => of_sequences,
    })
}

/// What config.json says of a classifier, so that transformers' pipelines name its labels.
pub(crate) fn classifier_keys(
    model: &ModelConfig,
    labels: Option<&Labels>,
) -> Vec<(&'static str, serde_json::Value)> {
    let (Some(labels), Some(architecture)) = (labels, families::architecture(model)) else {
        return Vec::new();
    };
    let numbered = labels.names.iter().enumerate();
    let id2label: serde_json::Map<_, _> = numbered
        .clone()
        .map(|(id, name)| (id.to_string(), name.as_str().into()))
        .collect();
    let label2id: serde_json::Map<_, _> = numbered
        .map(|(id, name)| (name.clone(), id.into()))
        .collect();
    vec![
        ("architectures", serde_json::json!([architecture])),
        ("id2label", id2label.into()),
        ("label2id", label2id.into()),
        ("problem_type", serde_json::json!(labels.problem_type)),
    ]
}

/// The names of a classifier's outputs (`id2label`), or transformers' where there are none.
fn label_names(raw: &HfConfig) -> Result<Vec<String>, FormatError> {
    const FIELD: &str = "id2label";
    let Some(map) = raw.opt_object(FIELD)? else {
        let count = raw.opt_usize("num_labels")?.unwrap_or(2);
        return Ok((0..count).map(|n| format!("LABEL_{n}")).collect());
    };
    let count = map.map().len();
    let name = |n: usize| map.map().get(&n.to_string())?.as_str().map(str::to_owned);
    let names: Option<Vec<String>> = (0..count).map(name).collect();
    names.ok_or_else(|| raw.unsupported(FIELD, "an object with a name for each of 0, 1, 2, …"))
}

/// Copies the files of a folder, if it is there, into another.
fn copy_files(from: &Path, to: &Path) -> Result<(), Error> {
    let Ok(entries) = std::fs::read_dir(from) else {
        return Ok(());
    };
    for entry in entries.flatten().filter(|entry| entry.path().is_file()) {
        let bytes = std::fs::read(entry.path()).map_err(Error::io(&entry.path()))?;
        std::fs::create_dir_all(to).map_err(Error::io(to))?;
        let copy = to.join(entry.file_name());
        atomic::write_file(&copy, |out| out.write_all(&bytes))?;
    }
    Ok(())
}

/// Refuses what stands in a file's place where a clone or a download has failed.
fn check_is_there(path: &Path) -> Result<(), Error> {
    let format = Format::of_file(path);
    match format.and_then(|format| Some((format, format.fetch_again()?))) {
        None => Ok(()),
        Some((format, mend)) => Err(Error::Format(FormatError::Malformed {
            path: path.to_path_buf(),
            problem: format!("is {format}; {mend}"),
        })),
    }
}

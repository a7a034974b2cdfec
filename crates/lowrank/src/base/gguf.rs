//! A GGUF file as a base: its config, tensors and tokenizer as the folder would have them that it was made from.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use lowrank_formats::checkpoint::StoredDType;
use lowrank_formats::gguf::{Gguf, GgufMetadata, GgufStrings};
use lowrank_formats::{FormatError, HfConfig, gguf_model};
use serde_json::{Map, Value};

use crate::Error;
use crate::data::Tokenizer;
use crate::data::gguf_tokenizer::GgufTokenizerParts;
use crate::model::stored::StoredTensors;

/// A GGUF file, or the first of several, that holds a model. It is read and mapped once, and stays so.
#[derive(Clone, Debug)]
pub struct GgufFile {
    opened: Arc<Gguf>,
    /// What config.json of its folder would say.
    config: Map<String, Value>,
}

/// Two are equal that are of the same file and model.
impl PartialEq for GgufFile {
    fn eq(&self, other: &Self) -> bool {
        self.path() == other.path() && self.config == other.config
    }
}

impl Eq for GgufFile {}

impl GgufFile {
    /// Opens a file and reads what kind of model it holds.
    ///
    /// # Errors
    /// A file that is damaged, or of a model that is not supported; the message names the key.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let opened = Gguf::open(path)?;
        let config = gguf_model::hf_config_json(&opened, StoredDType::BF16)?;
        Ok(Self {
            opened: Arc::new(opened),
            config: config.as_object().cloned().unwrap_or_default(),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.opened.path()
    }

    /// What is in it.
    pub(crate) fn opened(&self) -> &Gguf {
        &self.opened
    }

    /// What it is called in cards and reports.
    pub(super) fn name(&self) -> String {
        let stem = self.path().file_stem();
        stem.map_or_else(
            || "model".into(),
            |stem| stem.to_string_lossy().into_owned(),
        )
    }

    /// What config.json of its folder would say.
    pub fn config(&self) -> HfConfig {
        HfConfig::from_map(self.path(), self.config.clone())
    }

    pub(super) fn tensors(&self) -> Result<StoredTensors, Error> {
        StoredTensors::of_gguf(&self.opened)
    }

    /// Bytes of its tensors.
    pub(super) fn bytes(&self) -> u64 {
        let tensors = self.opened.tensors().iter();
        tensors
            .map(|tensor| tensor.bytes.as_ref().len() as u64)
            .sum()
    }

    pub(crate) fn tokenizer(&self) -> Result<Tokenizer, Error> {
        Ok(Tokenizer::from_files(self.path(), &self.side_files()?)?)
    }

    /// The files that stand beside the weights in a folder, by name.
    pub(super) fn side_files(&self) -> Result<BTreeMap<String, Vec<u8>>, Error> {
        side_files(&self.opened)
    }
}

/// The files of a folder that say what is not in the tensors, by name, but for config.json.
///
/// # Errors
/// A tokenizer that is not supported.
pub(crate) fn side_files(gguf: &Gguf) -> Result<BTreeMap<String, Vec<u8>>, Error> {
    let tokenizer = tokenizer_parts(gguf.metadata()).to_files()?;
    let mut files = BTreeMap::from([
        (
            "tokenizer.json".to_owned(),
            pretty(&tokenizer.tokenizer_json),
        ),
        (
            "tokenizer_config.json".to_owned(),
            pretty(&tokenizer.tokenizer_config),
        ),
        (
            "generation_config.json".to_owned(),
            pretty(&gguf_model::generation_config_json(gguf)),
        ),
    ]);
    if let Some(template) = tokenizer.chat_template {
        files.insert("chat_template.jinja".to_owned(), template.into_bytes());
    }
    Ok(files)
}

/// A value as the text of a file.
pub(crate) fn pretty(value: &Value) -> Vec<u8> {
    let mut text = format!("{value:#}");
    text.push('\n');
    text.into_bytes()
}

fn tokenizer_parts(metadata: &GgufMetadata) -> GgufTokenizerParts {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let strings = |name: &str| {
        let found = metadata.get_str_array(&key(name)).into_iter();
        found
            .flat_map(GgufStrings::iter)
            .map(str::to_owned)
            .collect()
    };
    GgufTokenizerParts {
        architecture: metadata
            .get_str("general.architecture")
            .unwrap_or_default()
            .to_owned(),
        model: metadata
            .get_str(&key("model"))
            .unwrap_or_default()
            .to_owned(),
        pre: metadata.get_str(&key("pre")).map(str::to_owned),
        tokens: strings("tokens"),
        token_types: metadata
            .get_i64_array(&key("token_type"))
            .unwrap_or_default()
            .into_iter()
            .map(|kind| kind.try_into().unwrap_or_default())
            .collect(),
        scores: metadata
            .get_f64_array(&key("scores"))
            .unwrap_or_default()
            .to_vec(),
        merges: strings("merges"),
        bos_id: metadata.get_u32(&key("bos_token_id")),
        eos_id: metadata.get_u32(&key("eos_token_id")),
        unk_id: metadata.get_u32(&key("unknown_token_id")),
        pad_id: metadata.get_u32(&key("padding_token_id")),
        add_bos: metadata.get_bool(&key("add_bos_token")),
        add_eos: metadata.get_bool(&key("add_eos_token")),
        add_space_prefix: metadata.get_bool(&key("add_space_prefix")),
        remove_extra_whitespaces: metadata.get_bool(&key("remove_extra_whitespaces")),
        charsmap: metadata
            .get_i64_array(&key("precompiled_charsmap"))
            .unwrap_or_default()
            .into_iter()
            // A byte, which some writers give a sign.
            .map(|byte| byte as u8)
            .collect(),
        chat_template: metadata
            .get_str("tokenizer.chat_template")
            .map(str::to_owned),
    }
}

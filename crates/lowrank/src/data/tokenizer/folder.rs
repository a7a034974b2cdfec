//! What the files beside tokenizer.json say, read in the order in which `transformers` reads them.
//!
//! `AutoTokenizer` lets tokenizer_config.json's `added_tokens_decoder` decide whether special_tokens_map.json and
//! added_tokens.json count at all: where it is, they don't; where it isn't, special_tokens_map.json goes before
//! tokenizer_config.json. `add_bos_token` and `add_eos_token` do nothing beside a tokenizer.json, whose post-processor
//! decides alone. docs/formats.md has the whole table.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::DataError;
use super::class::Class;
use crate::data::template::{DEFAULT, Templates};

/// The special tokens that every tokenizer may have, in the order in which `transformers` adds those that are missing.
const NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// Where files are.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    /// In a folder.
    Folder(&'a Path),
    /// In memory, by name, and what they were made from.
    Memory(&'a Path, &'a BTreeMap<String, Vec<u8>>),
}

impl Place<'_> {
    /// A file's name in messages.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Folder(folder) => folder.join(name),
            Self::Memory(origin, _) => origin.to_path_buf(),
        }
    }

    /// A file, if it is there.
    pub(super) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, DataError> {
        match self {
            Self::Folder(folder) => {
                let path = folder.join(name);
                match fs::read(&path) {
                    Ok(bytes) => Ok(Some(bytes)),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(DataError::io(&path, error)),
                }
            }
            Self::Memory(_, files) => Ok(files.get(name).cloned()),
        }
    }

    /// A JSON object, or nothing where there is no such file.
    fn read_json(&self, name: &str) -> Result<Option<Map<String, Value>>, DataError> {
        let Some(bytes) = self.read(name)? else {
            return Ok(None);
        };
        let path = self.path(name);
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => Ok(Some(map)),
            Ok(_) => Err(wrong(&path, "must hold one JSON object")),
            Err(error) => Err(wrong(&path, format!("invalid JSON: {error}"))),
        }
    }
}

/// What is known besides tokenizer.json.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// Which class of `transformers` reads the folder.
    pub(super) class: Class,
    /// Special tokens by name (`bos_token`, …): first those of [`NAMES`], then others.
    pub(super) named: IndexMap<String, AddedToken>,
    /// Special tokens without a name.
    pub(super) extra: Vec<AddedToken>,
    /// Added tokens that tokenizer_config.json or added_tokens.json lists, by the id that it gives them.
    pub(super) listed: BTreeMap<u32, AddedToken>,
    /// Which of the two it is.
    pub(super) listed_in: &'static str,
    /// Whether that list is tokenizer_config.json's, in whose place a class that rebuilds does not read tokenizer.json's.
    pub(super) complete: bool,
    /// `add_bos_token` and `add_eos_token`, which do nothing beside a tokenizer.json.
    pub(super) flags: [Option<bool>; 2],
    /// Special tokens that stand in a text are encoded as text.
    pub(super) split_special_tokens: bool,
    /// `truncation_side`: what is too long loses its beginning.
    pub(super) cuts_from_left: bool,
    pub(super) templates: Templates,
    /// Ids that generation_config.json and config.json call ends.
    pub(super) end_ids: Vec<u32>,
}

impl Files {
    /// Reads all files but tokenizer.json, whose contents are `tokenizer_json`; nothing where there is none.
    pub(super) fn read(place: Place<'_>, tokenizer_json: &[u8]) -> Result<Self, DataError> {
        const CONFIG: &str = "tokenizer_config.json";
        let config_path = place.path(CONFIG);
        let config = place.read_json(CONFIG)?.unwrap_or_default();
        let model = place.read_json("config.json")?.unwrap_or_default();
        let mut special = Special::default();
        special.read_config(&config_path, &config)?;
        let mut files = Self::default();
        if let Some(list) = config.get("added_tokens_decoder") {
            files.listed = read_decoder(&config_path, list)?;
            files.listed_in = "tokenizer_config.json";
            files.complete = true;
        } else {
            let name = "special_tokens_map.json";
            if let Some(map) = place.read_json(name)? {
                special.read_map(&place.path(name), &map)?;
            }
            let name = "added_tokens.json";
            if let Some(list) = place.read_json(name)? {
                files.listed = read_added_tokens(&place.path(name), &list, &special)?;
                files.listed_in = "added_tokens.json";
            }
        }
        files.class = Class::of(&config, &model, tokenizer_json);
        let defaults = files.class.names();
        let absent = |name: &str| !special.named.contains_key(name);
        let defaults: Vec<_> = defaults.iter().filter(|(name, _)| absent(name)).collect();
        for (name, text) in defaults {
            let token = Some(AddedToken::from(*text, true));
            special.named.insert((*name).to_owned(), token);
        }
        special.named.sort_by(|a, _, b, _| rank(a).cmp(&rank(b)));
        files.named = special
            .named
            .into_iter()
            .filter_map(|(name, token)| Some((name, token?)))
            .collect();
        files.extra = special.extra.unwrap_or_default();
        files.flags = ["add_bos_token", "add_eos_token"]
            .map(|name| config.get(name).and_then(Value::as_bool));
        files.split_special_tokens = config.get("split_special_tokens") == Some(&Value::Bool(true));
        files.cuts_from_left = config.get("truncation_side") == Some(&Value::from("left"));
        files.templates = read_templates(place, &config_path, &config)?;
        for file in ["generation_config.json", "config.json"] {
            files.read_ends(place, file)?;
        }
        Ok(files)
    }

    fn read_ends(&mut self, place: Place<'_>, name: &str) -> Result<(), DataError> {
        let config = place.read_json(name)?.unwrap_or_default();
        let value = match config.get("eos_token_id") {
            None | Some(Value::Null) => return Ok(()),
            Some(value) => value,
        };
        let ids = match value {
            Value::Array(items) => items.iter().map(as_id).collect::<Option<Vec<u32>>>(),
            one => as_id(one).map(|id| vec![id]),
        };
        let Some(ids) = ids else {
            let reason = format!("\"eos_token_id\" must be an id or a list of ids, but is {value}");
            return Err(wrong(&place.path(name), reason));
        };
        self.end_ids.extend(ids);
        Ok(())
    }
}

/// Where a name stands among the special tokens; names of a model's own come last, in the order they were read.
fn rank(name: &str) -> usize {
    NAMES
        .iter()
        .position(|known| *known == name)
        .unwrap_or(NAMES.len())
}

/// Special tokens while the files are read.
#[derive(Debug, Default)]
struct Special {
    /// By name; null takes away what a class would name by itself.
    named: IndexMap<String, Option<AddedToken>>,
    /// Those without a name; none as long as no file has such a list.
    extra: Option<Vec<AddedToken>>,
}

impl Special {
    /// What tokenizer_config.json says.
    fn read_config(&mut self, path: &Path, config: &Map<String, Value>) -> Result<(), DataError> {
        for (name, value) in config.iter().filter(|(name, _)| name.ends_with("_token")) {
            self.read_named(path, name, value)?;
        }
        let is_empty = |value: &Value| match value {
            Value::Null => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        // The older name of the list counts where the newer one is absent or empty.
        let newer = config.get("extra_special_tokens");
        let older = config.get("additional_special_tokens");
        match (newer, older) {
            (None, Some(list)) => self.read_extra(path, "additional_special_tokens", list),
            (Some(empty), Some(list)) if is_empty(empty) => {
                self.read_extra(path, "additional_special_tokens", list)
            }
            (Some(list), _) => self.read_extra(path, "extra_special_tokens", list),
            (None, None) => Ok(()),
        }
    }

    /// What special_tokens_map.json says over that.
    fn read_map(&mut self, path: &Path, map: &Map<String, Value>) -> Result<(), DataError> {
        for (name, value) in map {
            match name.as_str() {
                "additional_special_tokens" if self.extra.is_none() => {
                    self.read_extra(path, name, value)?;
                }
                "extra_special_tokens" => self.read_extra(path, name, value)?,
                _ if name.ends_with("_token") => self.read_named(path, name, value)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn read_named(&mut self, path: &Path, name: &str, value: &Value) -> Result<(), DataError> {
        let token = match value {
            Value::Null => None,
            // `add_bos_token` and its like.
            Value::Bool(_) => return Ok(()),
            _ => {
                let reason = || format!("{name:?} is neither a text nor a token's object");
                let token = token_of(value).ok_or_else(|| wrong(path, reason()))?;
                Some(token.special(true))
            }
        };
        self.named.insert(name.to_owned(), token);
        Ok(())
    }

    /// A list of tokens, which is added to one that was there, or an object of tokens by name.
    fn read_extra(&mut self, path: &Path, key: &str, value: &Value) -> Result<(), DataError> {
        match value {
            Value::Null => Ok(()),
            Value::Object(map) => {
                for (name, value) in map {
                    self.read_named(path, name, value)?;
                }
                Ok(())
            }
            Value::Array(items) => {
                let Some(tokens) = items.iter().map(token_of).collect::<Option<Vec<_>>>() else {
                    let reason = format!("{key:?} must be a list of texts or tokens' objects");
                    return Err(wrong(path, reason));
                };
                let extra = self.extra.get_or_insert_default();
                for (token, item) in tokens.into_iter().zip(items) {
                    let special = token.special || item.get("special").is_none();
                    if !extra.iter().any(|known| known.content == token.content) {
                        extra.push(token.special(special));
                    }
                }
                Ok(())
            }
            other => {
                let reason = format!("{key:?} must be a list of tokens, but is {other}");
                Err(wrong(path, reason))
            }
        }
    }

    fn names_or_lists(&self, text: &str) -> bool {
        let mut named = self.named.values().flatten();
        let mut extra = self.extra.iter().flatten();
        named.any(|token| token.content == text) || extra.any(|token| token.content == text)
    }
}

/// tokenizer_config.json's `added_tokens_decoder`: tokens by id.
fn read_decoder(path: &Path, list: &Value) -> Result<BTreeMap<u32, AddedToken>, DataError> {
    let bad = |found: String| {
        let reason = format!(
            "\"added_tokens_decoder\" must be an object with ids as keys and tokens' objects as values, but {found}"
        );
        wrong(path, reason)
    };
    let Value::Object(list) = list else {
        return Err(bad(format!("is {list}")));
    };
    list.iter()
        .map(|(id, value)| {
            let number = id.parse::<u32>();
            let number = number.map_err(|_| bad(format!("has the key {id:?}")))?;
            let token = value.is_object().then(|| token_of(value)).flatten();
            let token = token.ok_or_else(|| bad(format!("has {value} under {id:?}")))?;
            Ok((number, token))
        })
        .collect()
}

/// added_tokens.json: ids by text. Those that are named as special somewhere are special.
fn read_added_tokens(
    path: &Path,
    list: &Map<String, Value>,
    special: &Special,
) -> Result<BTreeMap<u32, AddedToken>, DataError> {
    list.iter()
        .map(|(text, value)| {
            let reason = || format!("the value of {text:?} must be an id, but is {value}");
            let id = as_id(value).ok_or_else(|| wrong(path, reason()))?;
            let token = AddedToken::from(text.as_str(), special.names_or_lists(text));
            Ok((id, token))
        })
        .collect()
}

/// The templates of chat_template.jinja and the folder additional_chat_templates, or, where there is none of these,
/// those of tokenizer_config.json: a text, a list of named ones, or an object of them.
fn read_templates(
    place: Place<'_>,
    config_path: &Path,
    config: &Map<String, Value>,
) -> Result<Templates, DataError> {
    let mut templates = Templates::default();
    let text = |path: &Path| fs::read_to_string(path).map_err(|error| DataError::io(path, error));
    if let Some(bytes) = place.read("chat_template.jinja")? {
        let template = String::from_utf8(bytes)
            .map_err(|_| wrong(&place.path("chat_template.jinja"), "is not UTF-8 text"))?;
        templates.add(DEFAULT, template);
    }
    if let Place::Folder(folder) = place
        && let Ok(entries) = fs::read_dir(folder.join("additional_chat_templates"))
    {
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let name = path.file_stem().and_then(|stem| stem.to_str());
            if let (Some(name), true) = (name, path.extension().is_some_and(|end| end == "jinja")) {
                templates.add(name, text(&path)?);
            }
        }
    }
    if !templates.is_empty() {
        return Ok(templates);
    }
    let bad = || {
        wrong(
            config_path,
            "\"chat_template\" must be a text or a list of named templates, {\"name\", \"template\"}",
        )
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => {}
        Some(Value::String(text)) => templates.add(DEFAULT, text.clone()),
        Some(Value::Array(list)) => {
            for entry in list {
                let (name, text) = (entry["name"].as_str(), entry["template"].as_str());
                let (Some(name), Some(text)) = (name, text) else {
                    return Err(bad());
                };
                templates.add(name, text.to_owned());
            }
        }
        Some(Value::Object(map)) => {
            for (name, text) in map {
                let text = text.as_str().ok_or_else(bad)?;
                templates.add(name, text.to_owned());
            }
        }
        Some(_) => return Err(bad()),
    }
    if templates.is_empty() && place.read("chat_template.json")?.is_some() {
        templates.only_of_a_processor = true;
    }
    Ok(templates)
}

fn as_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// A token is written as its text, or as an object with the text under "content".
fn token_of(value: &Value) -> Option<AddedToken> {
    if let Some(text) = value.as_str() {
        return Some(AddedToken::from(text, true));
    }
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(false);
    let token = AddedToken::from(value.get("content")?.as_str()?, special)
        .single_word(flag("single_word").unwrap_or(false))
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false))
        .normalized(flag("normalized").unwrap_or(!special));
    Some(token)
}

pub(super) fn wrong(path: &Path, reason: impl Into<String>) -> DataError {
    DataError::tokenizer(path.display().to_string(), reason)
}

//! A model with tokens that are not in its files: those that a run adds, or that an adapter brings.

use std::path::Path;

use lowrank_formats::peft::read_adapter_config;
use lowrank_formats::{FormatError, atomic};

use super::{Source, builtin};
use crate::Error;
use crate::data::Tokenizer;
use crate::data::added_tokens::{
    NewToken, config_with_tokens, listed_tokens, read_tokens, with_tokens,
};
use crate::model::families;

/// A model with more tokens than its files have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grown {
    pub(super) base: Source,
    /// All tokens that are added to its tokenizer.
    pub(super) tokens: Vec<NewToken>,
    /// The ids among them that are new.
    ids: Vec<u32>,
}

impl Grown {
    /// Rows of the embedding, where the files have so many.
    pub(super) fn rows(&self, rows: usize) -> usize {
        let needed = self.tokens.iter().map(|token| token.id as usize + 1).max();
        rows.max(needed.unwrap_or(0))
    }
}

impl Source {
    /// The new tokens' ids; empty where the model has those of its files alone.
    pub fn new_ids(&self) -> &[u32] {
        match self {
            Self::Grown(grown) => &grown.ids,
            _ => &[],
        }
    }

    /// The model with the tokens of a file, and what is to be said of them.
    ///
    /// # Errors
    /// A file that lists no tokens, none that is new, or one twice; a model whose tokenizer cannot take them.
    pub fn with_new_tokens(self, file: &Path) -> Result<(Self, Vec<String>), Error> {
        let listed = read_tokens(file)?.into_iter();
        let tokens: Vec<NewToken> = listed.map(|text| NewToken::ordinary(0, text)).collect();
        let own = listed_tokens(&self.tokenizer_json()?, Path::new("tokenizer.json"))?;
        let mut tokenizer = self.tokenizer()?;
        let count = tokenizer.vocab_size();
        let rows = families::read_config(&self.config()?)?.vocab_size;
        let wrong = |reason: String| Error::Settings(format!("{}: {reason}", file.display()));
        if count > rows {
            return Err(wrong(format!(
                "no token can be added to {self}, whose tokenizer has {count} tokens and whose embedding has {rows} rows"
            )));
        }
        let ids = tokenizer
            .add(&tokens)
            .map_err(|error| wrong(error.to_string()))?;
        let with_ids = tokens.into_iter().zip(ids);
        let tokens: Vec<NewToken> = with_ids
            .map(|(token, id)| NewToken { id, ..token })
            .collect();
        let is_new = |token: &&NewToken| token.id as usize >= count;
        let known: Vec<String> = tokens
            .iter()
            .filter(|token| !is_new(token))
            .map(|token| format!("{:?} ({})", token.content, token.id))
            .collect();
        let ids: Vec<u32> = tokens.iter().filter(is_new).map(|token| token.id).collect();
        let (Some(first), Some(last)) = (ids.iter().min(), ids.iter().max()) else {
            return Err(wrong(format!(
                "the tokenizer of {self} has all of these tokens already, so there is none to add"
            )));
        };
        let grown = (*last as usize + 1).max(rows);
        let mut notes = vec![format!(
            "{} tokens of {} are new, with the ids {first} to {last}; the embedding has {}",
            ids.len(),
            file.display(),
            if grown > rows {
                format!("{grown} rows in place of {rows}")
            } else {
                format!("rows for them already ({rows})")
            }
        )];
        if !known.is_empty() {
            notes.push(format!(
                "the tokenizer has these tokens already, and they keep their ids: {}",
                known.join(", ")
            ));
        }
        Ok((self.grown(&own, &tokenizer, count), notes))
    }

    /// The model with the tokens that a tokenizer.json lists beside its own.
    ///
    /// # Errors
    /// A file that cannot be read, or is of another tokenizer.
    pub(crate) fn with_tokens_listed_in(self, file: &Path) -> Result<Self, Error> {
        let own = listed_tokens(&self.tokenizer_json()?, Path::new("tokenizer.json"))?;
        let json = std::fs::read(file).map_err(Error::io(file))?;
        let mut tokens = listed_tokens(&json, file)?;
        tokens.retain(|token| !own.iter().any(|known| known.content == token.content));
        if tokens.is_empty() {
            return Ok(self);
        }
        tokens.sort_by_key(|token| token.id);
        let mut tokenizer = self.tokenizer()?;
        let count = tokenizer.vocab_size();
        let found = tokenizer.add(&tokens)?;
        if let Some((token, found)) = tokens.iter().zip(found).find(|(t, id)| t.id != *id) {
            return Err(Error::Settings(format!(
                "{}: {:?} has the id {} there, and {found} when it is added to the tokenizer of {self}; is it of another model?",
                file.display(),
                token.content,
                token.id
            )));
        }
        Ok(self.grown(&own, &tokenizer, count))
    }

    /// The model with a tokenizer to which tokens were added, of which those from `count` on are new. Among the tokens are then also
    /// those that the tokenizer's class, or another file than tokenizer.json, adds: without them the ids of the new ones would be others.
    fn grown(self, own: &[NewToken], tokenizer: &Tokenizer, count: usize) -> Self {
        let mut tokens = tokenizer.added();
        tokens.retain(|token| !own.iter().any(|known| known.content == token.content));
        let ids = tokens.iter().map(|token| token.id);
        Self::Grown(Box::new(Grown {
            ids: ids.filter(|id| *id as usize >= count).collect(),
            base: self,
            tokens,
        }))
    }

    /// The model with the tokens that these adapters bring: those in a tokenizer.json beside an adapter that has rows of tokens.
    ///
    /// # Errors
    /// As for one adapter's files; adapters that do not bring the same.
    pub fn with_tokens_of(self, adapters: &[&Path]) -> Result<Self, Error> {
        let mut all: Vec<(&Path, Self)> = Vec::new();
        for folder in adapters {
            let file = folder.join("tokenizer.json");
            let says = |folder: &Path| {
                let raw = read_adapter_config(folder)?;
                Ok::<_, FormatError>(raw.get("trainable_token_indices").is_some())
            };
            let brings = file.is_file() && says(folder)?;
            let source = self.clone();
            let source = if brings {
                source.with_tokens_listed_in(&file)?
            } else {
                source
            };
            if let Some((first, other)) = all.first()
                && *other != source
            {
                return Err(Error::Settings(format!(
                    "{} and {} do not bring the same tokens, and a model has one tokenizer; use each by itself",
                    first.display(),
                    folder.display()
                )));
            }
            all.push((folder, source));
        }
        Ok(all.pop().map_or(self, |(_, source)| source))
    }

    /// The contents of its tokenizer.json, without tokens that were added.
    pub(crate) fn tokenizer_json(&self) -> Result<Vec<u8>, Error> {
        const NAME: &str = "tokenizer.json";
        self.side_file(NAME)?.ok_or_else(|| {
            let folder = self.folder().unwrap_or(Path::new(""));
            Error::Settings(format!(
                "{}: is missing, and tokens are added to this file; save the tokenizer with transformers' AutoTokenizer",
                folder.join(NAME).display()
            ))
        })
    }

    /// A file that stands beside the weights, without tokens that were added; nothing where there is none.
    fn side_file(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        match self.files() {
            Self::Folder(folder) => {
                let path = folder.join(name);
                match std::fs::read(&path) {
                    Ok(bytes) => Ok(Some(bytes)),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(Error::io(path)(error)),
                }
            }
            Self::Gguf(file) => Ok(file.side_files()?.remove(name)),
            Self::Builtin | Self::LoadIn(..) | Self::Grown(_) => {
                Ok(Some(builtin(name).to_vec()).filter(|bytes| !bytes.is_empty()))
            }
        }
    }

    /// Writes the tokenizer with the tokens that were added, and the chat template, into `folder`; nothing where there are none.
    ///
    /// # Errors
    /// A file can't be read or written.
    pub(crate) fn write_added_tokens(&self, folder: &Path) -> Result<(), Error> {
        let Self::Grown(grown) = self else {
            return Ok(());
        };
        let json = self.tokenizer_json()?;
        let json = with_tokens(&json, Path::new("tokenizer.json"), &grown.tokens)?;
        atomic::write_file(&folder.join("tokenizer.json"), |out| out.write_all(&json))?;
        for name in [
            "special_tokens_map.json",
            "added_tokens.json",
            "chat_template.jinja",
        ] {
            if let Some(bytes) = self.side_file(name)? {
                atomic::write_file(&folder.join(name), |out| out.write_all(&bytes))?;
            }
        }
        let name = "tokenizer_config.json";
        let Some(config) = self.side_file(name)? else {
            return Ok(());
        };
        let config = config_with_tokens(&config, Path::new(name), &grown.tokens)?;
        Ok(atomic::write_file(&folder.join(name), |out| {
            out.write_all(&config)
        })?)
    }
}

//! Models from the Hugging Face Hub, kept in its own cache so that other tools find them too. Without the feature `hub`
//! there are only names: nothing is downloaded, and the cache is not looked into.

use std::path::PathBuf;

#[cfg(feature = "hub")]
pub use hf_hub::api::Progress;
#[cfg(feature = "hub")]
use hf_hub::api::sync::ApiBuilder;
#[cfg(feature = "hub")]
use hf_hub::{Cache, Repo, RepoType};

#[cfg(feature = "hub")]
use crate::Error;

/// Whether a name has the form `owner/name`.
pub fn looks_like_id(model: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && !p.starts_with('.')
            && p.chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    matches!(model.split('/').collect::<Vec<_>>().as_slice(), [owner, name] if part(owner) && part(name))
}

/// The folder of a model that was pulled before, if it is complete enough to be opened.
pub fn cached(model: &str) -> Option<PathBuf> {
    if !looks_like_id(model) {
        return None;
    }
    in_cache(model)
}

#[cfg(feature = "hub")]
fn in_cache(model: &str) -> Option<PathBuf> {
    let config = Cache::from_env()
        .model(model.to_owned())
        .get("config.json")?;
    config.parent().map(PathBuf::from)
}

#[cfg(not(feature = "hub"))]
fn in_cache(_model: &str) -> Option<PathBuf> {
    None
}

/// The way to a model that was not pulled yet.
pub(crate) fn how_to_fetch(model: &str) -> String {
    if cfg!(feature = "hub") {
        format!("as a Hub id it has not been fetched yet: lowrank model pull {model}")
    } else {
        "it may be a Hub id, and lowrank was compiled without its feature `hub`; give a folder, or add the feature".to_owned()
    }
}

/// Fetches config, tokenizer and safetensors weights of a model into the Hub's cache and returns the folder. Files that
/// are there are not fetched again; a broken download goes on where it stopped. `progress` makes a bar for a file's name.
///
/// # Errors
/// A name that is no Hub id; no network; a model that does not exist, is gated, or has no safetensors weights.
#[cfg(feature = "hub")]
pub fn pull<P: Progress>(
    model: &str,
    revision: Option<&str>,
    mut progress: impl FnMut(&str) -> P,
) -> Result<PathBuf, Error> {
    if !looks_like_id(model) {
        return Err(Error::Settings(format!(
            "{model} is not a Hub id; it has the form owner/name"
        )));
    }
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Error::Training(format!(
            "{model}: {what}: {error}; check the name and the network, and for a gated model set HF_TOKEN"
        ))
    };
    let mut builder = ApiBuilder::from_env().with_progress(false);
    // hf-hub itself reads only the token that a login has stored.
    if let Ok(token) = std::env::var("HF_TOKEN") {
        builder = builder.with_token(Some(token));
    }
    let api = builder
        .build()
        .map_err(|e| failed("the Hub can't be used", &e))?;
    let place = || match revision {
        Some(revision) => {
            Repo::with_revision(model.to_owned(), RepoType::Model, revision.to_owned())
        }
        None => Repo::model(model.to_owned()),
    };
    let repo = api.repo(place());
    let cache = Cache::from_env().repo(place());
    let info = repo
        .info()
        .map_err(|e| failed("its files can't be listed", &e))?;
    let names: Vec<&str> = info
        .siblings
        .iter()
        .map(|file| file.rfilename.as_str())
        .filter(|name| is_wanted(name))
        .collect();
    if !names.iter().any(|name| name.ends_with(".safetensors")) {
        return Err(Error::Training(format!(
            "{model} has no safetensors weights, which are the only ones read here"
        )));
    }
    let mut folder = None;
    // The weights last: a folder that has them has everything.
    let (weights, small): (Vec<&str>, Vec<&str>) = names
        .iter()
        .partition(|name| name.ends_with(".safetensors"));
    for name in small.into_iter().chain(weights) {
        let path = match cache.get(name) {
            Some(path) => path,
            None => repo
                .download_with_progress(name, progress(name))
                .map_err(|e| failed(name, &e))?,
        };
        folder = path.parent().map(PathBuf::from);
    }
    folder.ok_or_else(|| Error::Training(format!("{model}: nothing was fetched")))
}

/// Files of a model's top folder that this program reads.
#[cfg(feature = "hub")]
fn is_wanted(name: &str) -> bool {
    const NAMES: &[&str] = &[
        "config.json",
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
        "model.safetensors.index.json",
    ];
    let weights = name.starts_with("model") && name.ends_with(".safetensors");
    !name.contains('/') && (weights || NAMES.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_an_owner_and_a_name() {
        assert!(looks_like_id("HuggingFaceTB/SmolLM2-135M"));
        for other in ["gpt2", "/a/b", "./models/x", "a/b/c", "a/", "../x"] {
            assert!(!looks_like_id(other), "{other}");
        }
    }

    /// What is copied with a model is fetched with it.
    #[cfg(feature = "hub")]
    #[test]
    fn every_side_file_is_fetched() {
        for name in crate::base::SIDE_FILES {
            assert!(is_wanted(name), "{name}");
        }
    }

    #[cfg(feature = "hub")]
    #[test]
    fn only_what_is_read_is_fetched() {
        assert!(is_wanted("model-00001-of-00002.safetensors") && is_wanted("tokenizer.json"));
        for other in [
            "onnx/model.safetensors",
            "pytorch_model.bin",
            "README.md",
            "consolidated.safetensors",
        ] {
            assert!(!is_wanted(other), "{other}");
        }
    }
}

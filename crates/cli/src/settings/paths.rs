//! Where the files are that a run's config.yaml names, when it is used from another working folder.
//!
//! Relative paths start at the folder in which the program is used now. Where nothing is there, they start at the one in
//! which the run began, which its config.yaml holds.

use std::path::{Path, PathBuf};

use lowrank::base::Source;
use lowrank::data::looks_remote;
use lowrank::hub::looks_like_id;
use lowrank::train::Began;

use super::{File, flag};

/// Keys that name files or folders which must be there.
const KEYS: [&str; 4] = ["model", "data", "valid_data", "init_adapter"];

/// A path of a settings file at which nothing is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// Its key.
    pub key: &'static str,
    /// The path as the file has it.
    path: PathBuf,
    /// The file's name.
    file: String,
    /// Where the run began, if the path starts there.
    began: Option<PathBuf>,
}

impl Lost {
    /// The problem in words, with its mend.
    pub fn problem(&self) -> String {
        let (path, flag) = (self.path.display(), flag(self.key));
        let place = match &self.began {
            Some(folder) => format!(
                "{path} is neither in this folder nor in {}, where the run began",
                folder.display()
            ),
            None => format!("{path} does not exist"),
        };
        let pull = if self.key == "model" && looks_like_id(&path.to_string()) {
            format!(", or fetch it from the Hub: lowrank model pull {path}")
        } else {
            String::new()
        };
        format!(
            "{} (in {}): {place}; say where it is now with {flag}{pull}",
            self.key, self.file
        )
    }
}

/// Takes the record of when and where a run began out of its settings, and writes into them where its files are found.
/// Keys that are given anew elsewhere (`over`) are left as they are. Returns the paths that lead nowhere.
pub fn find(file: &mut File, over: &dyn Fn(&str) -> bool) -> Vec<Lost> {
    let began = file.values.shift_remove("began");
    let began: Option<Began> = began.and_then(|value| serde_json::from_value(value).ok());
    let began = began.and_then(|began| began.folder);
    let mut lost = Vec::new();
    for key in KEYS.into_iter().filter(|key| !over(key)) {
        let Some(text) = file.values.get(key).and_then(|value| value.as_str()) else {
            continue;
        };
        let path = PathBuf::from(text);
        if is_there(&path) {
            continue;
        }
        let began = began.clone().filter(|_| path.is_relative());
        let found = began.as_ref().map(|folder| folder.join(&path));
        match found.filter(|found| is_there(found)) {
            Some(found) => {
                let found = found.display().to_string();
                file.values.insert(key.to_owned(), found.into());
            }
            // A model may have a name instead of a folder; whoever looks it up says what is wrong with it.
            None if key == "model" && is_named(text, began.as_deref()) => {}
            None => lost.push(Lost {
                key,
                path,
                file: file.name(),
                began,
            }),
        }
    }
    lost
}

/// Whether a model that is no folder is to be looked up by its name: it is known by it, or it is of a file that no run wrote, whose
/// reader says what is wrong.
fn is_named(model: &str, began: Option<&Path>) -> bool {
    Path::new(model).is_relative()
        && (began.is_none() || model.starts_with("builtin:") || Source::find(model).is_ok())
}

/// Why there may be no adapter at a path, where it looks like an address or an id of the Hub.
pub fn why_no_adapter(folder: &Path) -> Option<String> {
    let remote = !folder.exists() && looks_remote(folder);
    remote.then(|| {
        "does not exist, and adapters are not downloaded here; download it first: hf download OWNER/NAME --local-dir adapter, \
         and give that folder"
            .to_owned()
    })
}

fn is_there(path: &Path) -> bool {
    // A path that cannot be looked at is left to whoever opens it, whose message says why.
    path.try_exists().unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_from_another_folder() {
        let began = tempfile::tempdir().unwrap();
        std::fs::write(began.path().join("rows.jsonl"), "").unwrap();
        std::fs::create_dir(began.path().join("m")).unwrap();
        let yaml = format!(
            "model: m\ndata: rows.jsonl\nvalid_data: none.jsonl\ninit_adapter: /nowhere/a\nr: 4\n\
             began:\n  time: 7\n  folder: {}\n",
            began.path().display()
        );
        let path = began.path().join("config.yaml");
        std::fs::write(&path, yaml).unwrap();
        let mut file = File::read(&path).unwrap();
        let lost = find(&mut file, &|_| false);
        let at = |name: &str| began.path().join(name).display().to_string();
        assert_eq!(file.values["model"], at("m"));
        assert_eq!(file.values["data"], at("rows.jsonl"));
        assert_eq!(file.values["valid_data"], "none.jsonl");
        assert!(!file.values.contains_key("began"));
        let problems: Vec<String> = lost.iter().map(Lost::problem).collect();
        let both = format!(
            "valid_data (in config.yaml): none.jsonl is neither in this folder nor in {}, where the run began; \
             say where it is now with --valid-data",
            began.path().display()
        );
        let gone = "init_adapter (in config.yaml): /nowhere/a does not exist; say where it is now with --init-adapter";
        assert_eq!(problems, [both.as_str(), gone]);

        // A model that moved is no name.
        std::fs::rename(began.path().join("m"), began.path().join("n")).unwrap();
        let mut file = File::read(&path).unwrap();
        let lost = find(&mut file, &|key| key != "model");
        let text = lost.first().unwrap().problem();
        assert!(
            text.starts_with("model (in config.yaml): m is neither"),
            "{text}"
        );
        assert!(text.ends_with("say where it is now with --model"), "{text}");
        file.values
            .insert("model".to_owned(), "builtin:tiny".into());
        assert_eq!(find(&mut file, &|key| key != "model"), []);

        let mut file = File::read(&path).unwrap();
        assert_eq!(find(&mut file, &|key| key != "r"), []);
        assert_eq!(file.values["data"], "rows.jsonl");
    }
}

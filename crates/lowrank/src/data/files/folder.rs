//! Which file a data path means: the path itself, or a split's file in a folder.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::super::error::DataError;
use super::not_rows::table_mend;
use super::open::{STANDARD_INPUT, missing};

/// Which rows of a data folder are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Split {
    /// train.jsonl.
    ///
    /// Of a path that is one file, the file itself.
    Train,
    /// valid.jsonl.
    Valid,
    /// test.jsonl.
    Test,
    /// The path is one file.
    #[cfg_attr(feature = "clap", value(skip))]
    File,
}

/// What rows are called before compression.
pub(super) const ENDINGS: &[&str] = &["jsonl", "json", "ndjson", "jsonlines"];
/// What tables are called, and what stands between their fields.
pub(super) const TABLES: &[(&str, u8)] = &[("csv", b','), ("tsv", b'\t')];
/// What is added to a name by the compressions that are read.
pub(super) const COMPRESSED: &[&str] = &["", ".gz", ".zst"];

impl Split {
    /// What a folder's file may be called without its ending. The first is the name that documents use; the others are
    /// those of other trainers, and mean the same.
    pub fn stems(self) -> &'static [&'static str] {
        match self {
            Self::Train => &["train", "training"],
            Self::Valid => &["valid", "validation", "val", "eval", "dev"],
            Self::Test => &["test", "testing"],
            Self::File => &[],
        }
    }
}

/// The file of a split: none where a folder has no such file, or where `path` is a file and the split is `Valid` or `Test`.
/// `-` is standard input.
///
/// # Errors
/// If there is nothing at `path`, a folder is given for [`Split::File`], or a folder has several files for the split.
pub fn split_file(path: &Path, split: Split) -> Result<Option<PathBuf>, DataError> {
    let of_file = matches!(split, Split::Train | Split::File);
    if path == Path::new("-") {
        return Ok(of_file.then(|| STANDARD_INPUT.into()));
    }
    let kind = fs::metadata(path).map_err(|error| missing(path, error))?;
    if !kind.is_dir() {
        return Ok(of_file.then(|| path.to_owned()));
    }
    if split == Split::File {
        return Err(DataError::layout(
            path,
            "is a folder; name one of its files",
        ));
    }
    let mut found = Vec::new();
    for stem in split.stems() {
        for (ending, compressed) in endings() {
            let file = path.join(format!("{stem}.{ending}{compressed}"));
            // A link to nothing, or a folder that may not be looked into, is an error and not a split that is not there.
            match file.symlink_metadata() {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(DataError::io(&file, error)),
                Ok(_) => {
                    let kind = fs::metadata(&file).map_err(|error| missing(&file, error))?;
                    if !kind.is_dir() {
                        found.push(file);
                    }
                }
            }
        }
    }
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        _ => Err(DataError::layout(
            path,
            format!(
                "holds {}, which are read for the same rows ({}); remove or rename all but one",
                names(&found).join(" and "),
                split.stems()[0]
            ),
        )),
    }
}

fn endings() -> impl Iterator<Item = (&'static str, &'static str)> {
    let tables = TABLES.iter().map(|(ending, _)| ending);
    ENDINGS.iter().chain(tables).flat_map(|ending| {
        COMPRESSED
            .iter()
            .map(move |compressed| (*ending, *compressed))
    })
}

fn names(files: &[PathBuf]) -> Vec<String> {
    let name = |file: &PathBuf| Some(file.file_name()?.to_string_lossy().into_owned());
    files.iter().filter_map(name).collect()
}

/// The file of a split that must be there.
pub(in crate::data) fn require_split(path: &Path, split: Split) -> Result<PathBuf, DataError> {
    if let Some(file) = split_file(path, split)? {
        return Ok(file);
    }
    let stem = split.stems().first().copied().unwrap_or_default();
    if !path.is_dir() {
        let reason = format!(
            "is one file, so there is no {stem} split; give a folder with train.jsonl and {stem}.jsonl"
        );
        return Err(DataError::layout(path, reason));
    }
    fs::read_dir(path).map_err(|error| DataError::io(path, error))?;
    if is_model(path) {
        let reason = "is a model, not rows of text; give the folder or file of the rows";
        return Err(DataError::layout(path, reason));
    }
    Err(DataError::layout(
        path,
        format!(
            "is a folder without {} (as .jsonl, .json, .ndjson, .jsonlines, .csv or .tsv, also compressed as .gz or .zst); {}",
            split.stems().join(", "),
            what_it_holds(path)
        ),
    ))
}

/// Whether a folder holds a model or an adapter.
fn is_model(folder: &Path) -> bool {
    [
        "config.json",
        "adapter_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    .iter()
    .any(|name| folder.join(name).is_file())
}

/// What a folder without the wanted rows holds instead, and how they become rows.
fn what_it_holds(folder: &Path) -> String {
    let listed = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten();
        let mut files: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        files.sort();
        files
    };
    let files = listed(folder);
    let ends = |file: &PathBuf, wanted: &[&str]| {
        let name = file.to_string_lossy().to_ascii_lowercase();
        wanted
            .iter()
            .any(|ending| name.ends_with(&format!(".{ending}")))
    };
    let is_rows = |file: &PathBuf| {
        // Hugging Face's datasets keeps these beside its tables.
        let about = ["dataset_dict.json", "dataset_info.json", "state.json"];
        let named = |(ending, compressed)| ends(file, &[&format!("{ending}{compressed}")]);
        !about.iter().any(|name| file.ends_with(name)) && endings().any(named)
    };
    let rows: Vec<PathBuf> = files.iter().filter(|file| is_rows(file)).cloned().collect();
    if let Some(first) = rows.first() {
        let shown = names(&rows).join(", ");
        return format!(
            "it holds {shown}; rename one, or name it: {}",
            first.display()
        );
    }
    if folder.join("dataset_dict.json").is_file() || folder.join("state.json").is_file() {
        return format!(
            "it is what `save_to_disk` of Hugging Face's datasets writes; write its rows as JSON lines: \
             python -c \"from datasets import load_from_disk; load_from_disk('{}').to_json('train.jsonl')\" \
             (of several splits, load_from_disk(…)['train'])",
            folder.display()
        );
    }
    // A snapshot of a data set on the Hub keeps its files in data/ or in a folder for each of its parts.
    let inner: Vec<PathBuf> = files
        .iter()
        .filter(|file| file.is_dir())
        .flat_map(|inner| listed(inner))
        .collect();
    if let Some(first) = inner.iter().find(|file| is_rows(file)) {
        let holder = first.parent().unwrap_or(folder).display();
        return format!(
            "its rows lie deeper; give {holder}, or one file such as {}",
            first.display()
        );
    }
    let tables: Vec<PathBuf> = files
        .iter()
        .cloned()
        .chain(inner)
        .filter(|file| ends(file, &["parquet", "arrow", "feather"]))
        .collect();
    match tables.first() {
        None => "it holds no rows".to_owned(),
        Some(first) => {
            let more = match tables.len() {
                1 => String::new(),
                count => format!(" and {} more like it", count - 1),
            };
            let ending = first
                .extension()
                .unwrap_or_default()
                .to_string_lossy()
                .to_ascii_lowercase();
            let shown = first.strip_prefix(folder).unwrap_or(first).display();
            let mend = table_mend(&ending, first)
                .unwrap_or_else(|| "write its rows as JSON lines".to_owned());
            format!("it holds {shown}{more}; {mend}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_lie_deeper_and_models_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let reason = || require_split(path, Split::Train).unwrap_err().to_string();
        fs::create_dir(path.join("data")).unwrap();
        let inner = path.join("data").join("train.jsonl");
        fs::write(&inner, "").unwrap();
        let expected = format!(
            "its rows lie deeper; give {}, or one file such as {}",
            path.join("data").display(),
            inner.display()
        );
        assert!(reason().ends_with(&expected), "{}", reason());
        fs::write(path.join("config.json"), "{}").unwrap();
        assert!(reason().contains("is a model, not rows"), "{}", reason());
    }

    #[test]
    fn splits_are_files_of_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let reason = |split| require_split(path, split).unwrap_err().to_string();
        assert!(
            reason(Split::Train).contains("is a folder without train, training (as .jsonl, .json")
        );
        fs::write(path.join("train.jsonl"), "").unwrap();
        fs::write(path.join("test.json"), "").unwrap();
        assert_eq!(
            split_file(path, Split::Train).unwrap(),
            Some(path.join("train.jsonl"))
        );
        assert_eq!(
            split_file(path, Split::Test).unwrap(),
            Some(path.join("test.json"))
        );
        assert_eq!(split_file(path, Split::Valid).unwrap(), None);
        assert!(
            reason(Split::Valid)
                .contains("; it holds test.json, train.jsonl; rename one, or name it: ")
        );
        assert!(reason(Split::File).ends_with("is a folder; name one of its files"));
        fs::write(path.join("train.json"), "").unwrap();
        assert!(reason(Split::Train).contains(
            "holds train.jsonl and train.json, which are read for the same rows (train)"
        ));
        let file = path.join("train.jsonl");
        assert_eq!(split_file(&file, Split::File).unwrap(), Some(file.clone()));
        assert_eq!(split_file(&file, Split::Train).unwrap(), Some(file.clone()));
        assert_eq!(split_file(&file, Split::Valid).unwrap(), None);
        assert!(
            require_split(&file, Split::Test)
                .unwrap_err()
                .to_string()
                .contains("is one file, so there is no test split")
        );
        assert!(
            split_file(&path.join("none"), Split::File)
                .unwrap_err()
                .to_string()
                .contains("none: cannot be read")
        );
    }

    #[test]
    fn a_split_has_the_names_that_other_trainers_give_it() {
        for (name, split) in [
            ("training.json", Split::Train),
            ("validation.jsonl", Split::Valid),
            ("val.ndjson", Split::Valid),
            ("eval.jsonl.gz", Split::Valid),
            ("dev.json.zst", Split::Valid),
            ("testing.jsonlines", Split::Test),
            ("train.csv", Split::Train),
            ("dev.tsv", Split::Valid),
            ("test.csv.gz", Split::Test),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join(name);
            fs::write(&file, "").unwrap();
            assert_eq!(split_file(folder.path(), split).unwrap(), Some(file));
            fs::write(folder.path().join("valid.jsonl"), "").unwrap();
            let both = split_file(folder.path(), Split::Valid);
            assert_eq!(both.is_err(), split == Split::Valid, "{name}");
            if let Err(error) = both {
                let error = error.to_string();
                assert!(
                    error.contains(name) && error.contains("valid.jsonl"),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn folders_of_other_programs_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let reason = || require_split(path, Split::Train).unwrap_err().to_string();
        assert!(reason().ends_with("; it holds no rows"));
        fs::create_dir(path.join("data")).unwrap();
        fs::write(path.join("data/train-00000-of-00002.parquet"), "").unwrap();
        fs::write(path.join("data/train-00001-of-00002.parquet"), "").unwrap();
        let error = reason();
        for part in [
            "it holds data/train-00000-of-00002.parquet and 1 more like it",
            "pandas.read_parquet(",
        ] {
            assert!(error.contains(part), "{error}");
        }
        fs::write(path.join("dataset_dict.json"), "").unwrap();
        assert!(reason().contains("load_from_disk("));
        fs::write(path.join("mine.jsonl"), "").unwrap();
        assert!(reason().contains("it holds mine.jsonl; rename one, or name it: "));
    }

    #[cfg(unix)]
    #[test]
    fn what_cannot_be_opened_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        std::os::unix::fs::symlink("gone.jsonl", path.join("train.jsonl")).unwrap();
        for found in [path.to_owned(), path.join("train.jsonl")] {
            let error = split_file(&found, Split::Train).unwrap_err().to_string();
            assert!(
                error.contains("train.jsonl: is a link to gone.jsonl, which is not there"),
                "{error}"
            );
        }
        let gone = Path::new("/dev/fd/987");
        let error = split_file(gone, Split::Train).unwrap_err().to_string();
        assert!(
            error.contains("was a pipe of the command that named it"),
            "{error}"
        );
        fs::create_dir(path.join("valid.jsonl")).unwrap();
        assert_eq!(split_file(path, Split::Valid).unwrap(), None);
        let error = split_file(&path.join("valid.jsonl"), Split::File).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("is a folder; name one of its files")
        );
    }
}

//! The model inside the binary, and its tasks.

use std::path::Path;

use crate::Error;

/// The name of the model inside the binary.
pub const BUILTIN: &str = "builtin:tiny";

/// The built-in model's files by name, a static since the linker keeps a copy of a constant for each unit of code; none without the feature `builtin-model`. It was pretrained by this program (`cargo dev builtin-model`).
#[cfg(feature = "builtin-model")]
pub static BUILTIN_FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../../builtin/config.json")),
    (
        "generation_config.json",
        include_bytes!("../../builtin/generation_config.json"),
    ),
    (
        "model.safetensors",
        include_bytes!("../../builtin/model.safetensors"),
    ),
    (
        "tokenizer.json",
        include_bytes!("../../builtin/tokenizer.json"),
    ),
    (
        "tokenizer_config.json",
        include_bytes!("../../builtin/tokenizer_config.json"),
    ),
    (
        "chat_template.jinja",
        include_bytes!("../../builtin/chat_template.jinja"),
    ),
];

/// The built-in model's files, of which there are none without the feature `builtin-model`.
#[cfg(not(feature = "builtin-model"))]
pub static BUILTIN_FILES: &[(&str, &[u8])] = &[];

#[cfg(feature = "builtin-model")]
macro_rules! task {
    ($name:literal) => {
        (
            $name,
            &[
                (
                    "train.jsonl",
                    include_str!(concat!("../../builtin/tasks/", $name, "/train.jsonl")),
                ),
                (
                    "valid.jsonl",
                    include_str!(concat!("../../builtin/tasks/", $name, "/valid.jsonl")),
                ),
                (
                    "test.jsonl",
                    include_str!(concat!("../../builtin/tasks/", $name, "/test.jsonl")),
                ),
            ],
        )
    };
}

/// The files of a task by name.
type TaskFiles = &'static [(&'static str, &'static str)];

/// The built-in tasks with their rows (`cargo dev builtin-data`); none without the feature `builtin-model`.
#[cfg(feature = "builtin-model")]
pub static BUILTIN_TASKS: &[(&str, TaskFiles)] = &[task!("cards"), task!("report")];

/// The built-in tasks, of which there are none without the feature `builtin-model`.
#[cfg(not(feature = "builtin-model"))]
pub static BUILTIN_TASKS: &[(&str, TaskFiles)] = &[];

/// The names, animals, things and places that the built-in tasks' rows are about, one a line: a row's completion takes those
/// of its prompt.
#[cfg(feature = "builtin-model")]
pub const BUILTIN_WORDS: &str = include_str!("../../builtin/tasks/words.txt");

/// The words of the built-in tasks, of which there are none without the feature `builtin-model`.
#[cfg(not(feature = "builtin-model"))]
pub const BUILTIN_WORDS: &str = "";

/// Writes the rows of a built-in task into a folder, which is made where it is not there: `train.jsonl`, `valid.jsonl` and
/// `test.jsonl`.
///
/// # Errors
/// A name that is not in [`BUILTIN_TASKS`]; a file that can't be written.
pub fn write_builtin_task(name: &str, folder: &Path) -> Result<(), Error> {
    let Some((_, files)) = BUILTIN_TASKS.iter().find(|(known, _)| *known == name) else {
        check_builtin()?;
        let known: Vec<&str> = BUILTIN_TASKS.iter().map(|(name, _)| *name).collect();
        return Err(Error::Settings(format!(
            "there is no built-in task `{name}`; those there are: {}",
            known.join(", ")
        )));
    };
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    for (file, rows) in *files {
        let path = folder.join(file);
        std::fs::write(&path, rows).map_err(Error::io(&path))?;
    }
    Ok(())
}

/// The ids that generation_config.json of the built-in model names as ends.
pub(super) fn builtin_ends() -> Vec<u32> {
    #[derive(serde::Deserialize)]
    struct Ends {
        eos_token_id: Vec<u32>,
    }
    serde_json::from_slice::<Ends>(builtin("generation_config.json"))
        .map(|ends| ends.eos_token_id)
        .unwrap_or_default()
}

/// Refuses the built-in model where it was left out.
pub(super) fn check_builtin() -> Result<(), Error> {
    if cfg!(feature = "builtin-model") {
        return Ok(());
    }
    Err(Error::Settings(
        "there is no built-in model, because lowrank was compiled without its feature `builtin-model`; add the feature, or give \
         another model"
            .to_owned(),
    ))
}

pub(super) fn builtin_config() -> serde_json::Map<String, serde_json::Value> {
    serde_json::from_slice(builtin("config.json")).unwrap_or_default()
}

pub(super) fn builtin(name: &str) -> &'static [u8] {
    BUILTIN_FILES
        .iter()
        .find(|(known, _)| *known == name)
        .map_or(&[], |(_, bytes)| bytes)
}

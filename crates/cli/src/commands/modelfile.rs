//! Ollama's Modelfile beside a GGUF file that was written.

use std::path::{Path, PathBuf};

use clap::Args;
use lowrank::data::Tokenizer;
use lowrank::modelfile::modelfile;
use lowrank::write_text;
use serde::Serialize;

use crate::failure::Misuse;

/// Whether one is written.
#[derive(Debug, Clone, Args)]
pub struct ModelfileArgs {
    /// Write no Modelfile for Ollama beside a GGUF file
    #[arg(long)]
    pub no_modelfile: bool,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WrittenModelfile {
    /// The file.
    pub path: PathBuf,
    /// Whether it has the model's chat template.
    pub has_template: bool,
}

impl ModelfileArgs {
    /// Where it is to be, beside `file`; nothing where none is wanted.
    ///
    /// # Errors
    /// One that is there and not to be replaced.
    pub fn beside(&self, file: &Path, overwrite: bool) -> Result<Option<PathBuf>, Misuse> {
        if self.no_modelfile {
            return Ok(None);
        }
        let path = file.with_file_name("Modelfile");
        if path.exists() && !overwrite {
            return Err(Misuse::new(format!(
                "{} exists; give --no-modelfile to leave it alone, --overwrite to replace it, or another folder with --output",
                path.display()
            )));
        }
        Ok(Some(path))
    }
}

/// Writes it for `from`, and an adapter in the same folder.
///
/// # Errors
/// A file that cannot be written.
pub fn write(
    path: PathBuf,
    from: &str,
    adapter: Option<&Path>,
    tokenizer: &Tokenizer,
) -> Result<WrittenModelfile, lowrank::Error> {
    let adapter = adapter.map(in_same_folder);
    let made = modelfile(from, adapter.as_deref(), tokenizer);
    write_text(&path, &made.text)?;
    if !made.has_template && tokenizer.has_chat_template() {
        tracing::warn!(
            "{}: the model's chat template cannot be written in Ollama's language, so the file has none",
            path.display()
        );
    }
    Ok(WrittenModelfile {
        path,
        has_template: made.has_template,
    })
}

/// A file of the Modelfile's folder as it is written there.
pub fn in_same_folder(file: &Path) -> String {
    format!(
        "./{}",
        file.file_name().unwrap_or_default().to_string_lossy()
    )
}

//! From PEFT's folder to the files of other programs, and back.

use std::path::Path;

use lowrank_formats::checkpoint::StoredDType;
use lowrank_formats::gguf_model::Shapes;
use lowrank_formats::{Format, atomic};
use serde::{Deserialize, Serialize};

use super::gguf::Written;
use super::mlx::{MLX_CONFIG, MLX_WEIGHTS};
use super::{LoraFile, folder, gguf, loralib, mlx};
use crate::Error;
use crate::names::named;

/// Whose files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// llama.cpp's, a file.
    Gguf,
    /// mlx-lm's, a folder.
    Mlx,
    /// loralib's names in a safetensors file.
    Loralib,
    /// PEFT's, a folder.
    Peft,
}

/// How an adapter is written.
#[derive(Clone, Copy, Debug)]
pub struct ExportOptions<'a> {
    /// The adapter's folder.
    pub from: &'a Path,
    /// Whose files.
    pub form: Form,
    /// The file or folder to write.
    pub output: &'a Path,
    /// How its values are stored.
    pub dtype: StoredDType,
    /// What llama.cpp calls the model's tensors; [`Form::Gguf`] needs it.
    pub shapes: Option<&'a Shapes>,
    /// The adapter's name, where the form has a place for one.
    pub name: &'a str,
    /// Whether an earlier one is replaced.
    pub overwrite: bool,
}

impl LoraFile {
    /// Writes the adapter for another program.
    ///
    /// # Errors
    /// What the form cannot hold, by name; an output that exists (without `overwrite`), holds other files, or cannot be written.
    pub fn export(&self, options: &ExportOptions<'_>) -> Result<Written, Error> {
        let ExportOptions { output, dtype, .. } = *options;
        match options.form {
            Form::Gguf => {
                check_file(output, options.overwrite)?;
                let shapes = options.shapes.ok_or_else(|| {
                    Error::Settings(format!(
                        "llama.cpp's names follow from the model; give {}",
                        named("model")
                    ))
                })?;
                gguf::write(self, shapes, output, options.name, dtype)
            }
            Form::Loralib => {
                check_file(output, options.overwrite)?;
                loralib::write(self, output, dtype)
            }
            Form::Mlx => {
                check_folder(output, options.overwrite, &[MLX_WEIGHTS, MLX_CONFIG])?;
                atomic::write_folder(output, options.overwrite, |folder| {
                    mlx::write(self, folder, dtype)
                })
            }
            Form::Peft => {
                folder::check_output(output, options.overwrite, &[options.from])?;
                let beside = folder::tokenizer_files(&[(options.from, self)])?;
                atomic::write_folder(output, options.overwrite, |folder| {
                    self.write(folder, dtype)?;
                    for (name, bytes) in &beside {
                        atomic::write_file(&folder.join(name), |out| out.write_all(bytes))?;
                    }
                    Ok(Written {
                        modules: self.modules.len(),
                        alpha: None,
                        folded: 0,
                    })
                })
            }
        }
    }

    /// Reads the adapter of another program; its files say which. `shapes` are the model's, which an adapter of llama.cpp needs; `alpha` is loralib's.
    ///
    /// # Errors
    /// A path that is none of them, or files that are damaged or do not fit the model.
    pub fn import(
        path: &Path,
        shapes: Option<&Shapes>,
        alpha: Option<f64>,
    ) -> Result<(Form, Self), Error> {
        if path.is_dir() {
            if path.join(MLX_WEIGHTS).is_file() {
                return Ok((Form::Mlx, mlx::read(path)?));
            }
            return Ok((Form::Peft, Self::read(path)?));
        }
        match Format::of_file(path) {
            Some(Format::Gguf) => {
                let shapes = shapes.ok_or_else(|| {
                    Error::Settings(format!(
                        "{}: how llama.cpp orders rows follows from the model; give {}",
                        path.display(),
                        named("model")
                    ))
                })?;
                Ok((Form::Gguf, gguf::read(path, shapes)?))
            }
            Some(Format::Safetensors | Format::Torch | Format::Pickle) => {
                Ok((Form::Loralib, loralib::read(path, alpha)?))
            }
            _ => Err(Error::Settings(format!(
                "{} is no adapter; one of llama.cpp is a GGUF file, loralib's a safetensors file, and mlx-lm's and PEFT's are folders",
                path.display()
            ))),
        }
    }
}

/// Refuses to write over a file that nobody asked to replace.
pub(crate) fn check_file(path: &Path, overwrite: bool) -> Result<(), Error> {
    if path.is_dir() {
        return Err(Error::Settings(format!(
            "output {} is a folder, and a file is written; give a file's name as {}",
            path.display(),
            named("output")
        )));
    }
    if path.exists() && !overwrite {
        return Err(Error::Settings(format!(
            "output {} exists; give another {}, or {} to replace the file",
            path.display(),
            named("output"),
            named("overwrite")
        )));
    }
    Ok(())
}

/// Refuses to replace a folder that holds other files than the `known` ones.
///
/// # Errors
/// The name of one, or a folder that cannot be read.
pub fn check_folder(path: &Path, overwrite: bool, known: &[&str]) -> Result<(), Error> {
    if overwrite && crate::output::is_taken(path)? {
        crate::output::check_replaceable(path, &[known])?;
    }
    Ok(())
}

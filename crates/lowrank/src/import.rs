//! `model import`: a GGUF file as a Hugging Face folder that transformers loads.

use std::path::Path;
use std::{fs, io};

use half::bf16;
use lowrank_formats::checkpoint::StoredDType;
use lowrank_formats::gguf::Gguf;
use lowrank_formats::gguf_model::{self, GgufWeight};
use lowrank_formats::{TensorSpec, atomic, write_safetensors};
use lowrank_kernels::{DType, View};
use serde::Serialize;

use crate::Error;
use crate::base::gguf::{pretty, side_files};
use crate::base::{MODEL_FILES, SIDE_FILES};
use crate::model::stored::for_rows;

/// What an import wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImportReport {
    /// Tensors in the GGUF file.
    pub tensors: usize,
    /// How many tensors of each type the GGUF file holds, as "Q4_1 ×210".
    pub types: Vec<String>,
    /// Bytes of model.safetensors.
    pub bytes: u64,
    /// Whether the file brought a chat template.
    pub chat_template: bool,
}

/// Writes config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
/// chat_template.jinja into a new folder; the folder appears whole or not at all.
///
/// # Errors
/// A file that is no GGUF or is damaged, an architecture, a tensor type or a tokenizer that is not supported, an output
/// that exists (without `overwrite`) or can't be written.
pub fn import_gguf(
    file: &Path,
    output: &Path,
    dtype: DType,
    overwrite: bool,
) -> Result<ImportReport, Error> {
    let gguf = Gguf::open(file)?;
    if overwrite && crate::output::is_taken(output)? {
        crate::output::check_apart(output, file)?;
        crate::output::check_replaceable(output, &[MODEL_FILES, SIDE_FILES])?;
    }
    atomic::write_folder(output, overwrite, |folder| {
        let files = side_files(&gguf)?;
        for (name, bytes) in &files {
            atomic::write_file(&folder.join(name), |out| out.write_all(bytes))?;
        }
        let bytes = import_weights(&gguf, folder, dtype)?;
        Ok(ImportReport {
            tensors: gguf.tensors().len(),
            types: types(&gguf),
            bytes,
            chat_template: files.contains_key("chat_template.jinja"),
        })
    })
}

/// Writes config.json and model.safetensors into a folder, which exists, with weights in f32 or bf16. They stream through a buffer of a
/// row. What comes of it are the bytes of the weights.
///
/// # Errors
/// As of [`import_gguf`].
pub fn import_weights(gguf: &Gguf, folder: &Path, dtype: DType) -> Result<u64, Error> {
    let stored = match dtype {
        DType::F32 => StoredDType::F32,
        DType::Bf16 => StoredDType::BF16,
    };
    let config = gguf_model::hf_config_json(gguf, stored)?;
    let weights = gguf_model::weights(gguf)?;
    let specs: Vec<TensorSpec> = weights
        .iter()
        .map(|weight| TensorSpec {
            name: weight.name.clone(),
            dtype: stored,
            shape: weight.shape(),
        })
        .collect();
    let path = folder.join("model.safetensors");
    write_safetensors(&path, &specs, &[].into(), |i, out| {
        for_rows(&weights[i], |row| {
            let bytes = View::of_row(row).to_le_bytes(dtype);
            check_rounded(&weights[i], row, dtype)?;
            out.write_all(&bytes).map_err(Error::io(&path))
        })
        .map_err(io::Error::other)
    })?;
    // The configuration last: a folder without one is not taken for a model.
    atomic::write_file(&folder.join("config.json"), |out| {
        out.write_all(&pretty(&config))
    })?;
    Ok(fs::metadata(&path).map_err(Error::io(&path))?.len())
}

/// Refuses numbers that bf16 cannot hold.
fn check_rounded(weight: &GgufWeight, row: &[f32], dtype: DType) -> Result<(), Error> {
    let is_lost = |value: &&f32| dtype == DType::Bf16 && !bf16::from_f32(**value).is_finite();
    match row.iter().find(is_lost) {
        None => Ok(()),
        Some(value) => Err(Error::Training(format!(
            "tensor `{}`: {value} does not fit in bfloat16; import as float32",
            weight.name
        ))),
    }
}

fn types(gguf: &Gguf) -> Vec<String> {
    let mut counts: Vec<(String, usize)> = Vec::new();
    for tensor in gguf.tensors() {
        let name = tensor.kind.to_string();
        match counts.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += 1,
            None => counts.push((name, 1)),
        }
    }
    counts
        .into_iter()
        .map(|(name, count)| format!("{name} ×{count}"))
        .collect()
}

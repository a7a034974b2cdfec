//! `model import`: a GGUF file as a Hugging Face folder that transformers loads.

use std::path::Path;

use lowrank_formats::checkpoint::StoredDType;
use lowrank_formats::gguf::Gguf;
use lowrank_formats::{atomic, gguf_model};
use lowrank_kernels::DType;
use serde::Serialize;

use crate::Error;
use crate::base::{MODEL_FILES, SIDE_FILES};
use crate::data::gguf_tokenizer::GgufTokenizerParts;

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
    let stored = match dtype {
        DType::F32 => StoredDType::F32,
        DType::Bf16 => StoredDType::BF16,
    };
    if overwrite && crate::output::is_taken(output)? {
        crate::output::check_apart(output, file)?;
        crate::output::check_replaceable(output, &[MODEL_FILES, SIDE_FILES])?;
    }
    atomic::write_folder(output, overwrite, |folder| {
        let tokenizer = tokenizer_parts(&gguf).to_files()?;
        write_json(&folder.join("tokenizer.json"), &tokenizer.tokenizer_json)?;
        write_json(
            &folder.join("tokenizer_config.json"),
            &tokenizer.tokenizer_config,
        )?;
        if let Some(template) = &tokenizer.chat_template {
            atomic::write_file(&folder.join("chat_template.jinja"), |out| {
                out.write_all(template.as_bytes())
            })?;
        }
        gguf_model::import_weights(&gguf, folder, stored)?;
        let weights = folder.join("model.safetensors");
        let bytes = std::fs::metadata(&weights)
            .map_err(Error::io(&weights))?
            .len();
        Ok(ImportReport {
            tensors: gguf.tensors().len(),
            types: types(&gguf),
            bytes,
            chat_template: tokenizer.chat_template.is_some(),
        })
    })
}

fn write_json(path: &Path, value: &serde_json::Value) -> Result<(), Error> {
    Ok(atomic::write_file(path, |out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        out.write_all(b"\n")
    })?)
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

fn tokenizer_parts(gguf: &Gguf) -> GgufTokenizerParts {
    let metadata = gguf.metadata();
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let strings = |name: &str| {
        metadata
            .get_str_array(&key(name))
            .unwrap_or_default()
            .to_vec()
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

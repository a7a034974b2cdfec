//! A model as a GGUF file of llama.cpp: tensors under its names, numbers in its blocks, the tokenizer, the chat template and what ends an answer.
//!
//! A base that is a GGUF file already lends its metadata as they are. Of a folder they are made from config.json and tokenizer.json, and read
//! again before the file counts as written: what a GGUF file cannot say of a model, or of how it cuts texts, is an error and not another model.

mod folder;
mod types;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::path::Path;

use lowrank_formats::gguf::{GgmlType, Gguf, GgufSpec, GgufTensor, KeyValue, write_gguf};
use lowrank_formats::gguf_model::{Change, Place, Shapes};
use lowrank_kernels::{Layout, NumberFormat, Tensor};
use rayon::prelude::*;
use serde::Serialize;

use crate::Error;
use crate::base::{GgufFile, Source};
use crate::data::Tokenizer;
use crate::data::gguf_tokenizer::GgufTokenizerParts;
use crate::model::stored::transposed;
use crate::model::{ModelConfig, WeightId, Weights, families};

pub use folder::{FolderReport, FolderType, write_quantized_folder};
pub use lowrank_formats::quantized::FourBitKind;
pub use types::FileType;
pub(crate) use types::q4_k_m;

/// Rows that are quantized at a time.
const ROWS: usize = 256;

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExportReport {
    /// Tensors in the file.
    pub tensors: usize,
    /// How many of each type, as "Q4_K ×180".
    pub types: Vec<String>,
    /// Bytes of the file.
    pub bytes: u64,
    /// Whether it has a chat template.
    pub chat_template: bool,
    /// The tokens that end an answer.
    pub ends: Vec<String>,
    /// Tensors whose columns do not fill the blocks of their type, and are stored in another one.
    pub instead: usize,
}

/// Gives the values of rows of a weight, f32, one after the other.
pub type RowsOf<'a> = dyn FnMut(WeightId, Range<usize>) -> Vec<f32> + 'a;

/// The rows of a model's own weights.
pub fn own_rows(weights: &Weights) -> impl FnMut(WeightId, Range<usize>) -> Vec<f32> + '_ {
    |id, rows| weights.view(id).slice_rows(rows).to_vec()
}

/// Writes a model of this config, whose values `rows` gives. Weights for which `is_own` holds are the source's: where that is a GGUF file with the same type,
/// their blocks are copied.
///
/// # Errors
/// A model, a tokenizer or a chat template that a GGUF file cannot say; values that the type cannot hold; an output that exists (without `overwrite`) or
/// cannot be written.
pub fn write_model(
    source: &Source,
    config: &ModelConfig,
    output: &Path,
    file_type: FileType,
    overwrite: bool,
    is_own: &dyn Fn(WeightId) -> bool,
    rows: &mut RowsOf<'_>,
) -> Result<ExportReport, Error> {
    crate::lora_files::check_file(output, overwrite)?;
    let raw = source.config()?;
    let shapes = Shapes::of_config(&raw)?.with_head(config.vocab_size, config.tie_word_embeddings);
    let tokenizer = source.tokenizer()?;
    let gguf = source.gguf().map(GgufFile::opened);
    let (mut keys, factors) = if let Some(gguf) = gguf {
        (keys_of(gguf), factors_of(gguf)?)
    } else {
        let made = shapes.keys(&raw, &source.short_name())?;
        let parts = GgufTokenizerParts::of_json(
            shapes.architecture(),
            &json_of(source)?,
            &tokenizer,
            config.vocab_size,
        )?;
        let tokens = parts.keys(tokenizer.stop_ids());
        ([made.keys, tokens].concat(), made.factors)
    };
    set(
        &mut keys,
        "general.file_type",
        KeyValue::U32(file_type.number()),
    );
    let plan = planned(
        source,
        config,
        &shapes,
        file_type,
        gguf.map(|gguf| (gguf, is_own)),
    )?;
    let mut specs: Vec<GgufSpec> = plan
        .iter()
        .map(|planned| GgufSpec {
            name: planned.place.gguf.clone(),
            kind: planned.kind,
            shape: planned.place.shape.clone(),
        })
        .collect();
    let single = type_named("F32")?;
    specs.extend(factors.iter().map(|(name, values)| GgufSpec {
        name: name.clone(),
        kind: single,
        shape: vec![values.len()],
    }));
    write_gguf(output, &keys, &specs, |index, out| {
        if let Some(planned) = plan.get(index) {
            return planned.write(output, rows, out).map_err(io::Error::other);
        }
        out.write_all(bytemuck::cast_slice(&factors[index - plan.len()].1))
    })?;
    if gguf.is_none() {
        prove(output, config, &tokenizer).inspect_err(|_| {
            let _ = std::fs::remove_file(output);
        })?;
    }
    Ok(ExportReport {
        tensors: specs.len(),
        types: counted(&specs),
        bytes: std::fs::metadata(output).map_err(Error::io(output))?.len(),
        chat_template: tokenizer.has_chat_template(),
        ends: (tokenizer.stop_ids().iter())
            .map(|id| tokenizer.token_text(*id))
            .collect(),
        instead: plan.iter().filter(|planned| planned.is_other).count(),
    })
}

/// What is written of a model, in llama.cpp's order. `of_source` is a GGUF file that is the source, and which weights are its own.
fn planned(
    source: &Source,
    config: &ModelConfig,
    shapes: &Shapes,
    file_type: FileType,
    of_source: Option<(&Gguf, &dyn Fn(WeightId) -> bool)>,
) -> Result<Vec<Planned>, Error> {
    let by_name: HashMap<String, WeightId> = (config.weights().iter())
        .map(|(id, _)| (families::tensor_name(config, *id), *id))
        .collect();
    let places = shapes.places();
    let placed: HashSet<String> = places.iter().map(|place| place.name.clone()).collect();
    if let Some(name) = by_name.keys().find(|name| !placed.contains(*name)) {
        return Err(Error::Settings(format!(
            "{name} has no place in a {} of llama.cpp",
            shapes.architecture()
        )));
    }
    let mut plan = Vec::new();
    for place in places {
        let Some(id) = by_name.get(&place.name).copied() else {
            return Err(Error::Settings(format!(
                "{source} has no tensor {}, which a {} of llama.cpp has",
                place.name,
                shapes.architecture()
            )));
        };
        let (kind, is_other) = file_type.of(&place, shapes);
        let own = of_source.filter(|(_, is_own)| is_own(id));
        let copied = own
            .and_then(|(gguf, _)| gguf.tensor(&place.gguf))
            .filter(|tensor| tensor.kind.name() == kind);
        plan.push(Planned {
            kind: type_named(kind)?,
            copied: copied.cloned(),
            turns: place.change == Change::Turned && config.layout == Layout::InOut,
            is_other,
            place,
            id,
        });
    }
    Ok(plan)
}

/// One tensor to be written.
struct Planned {
    place: Place,
    id: WeightId,
    kind: GgmlType,
    /// Whether another type was wanted.
    is_other: bool,
    /// The same tensor of the source, in the same type.
    copied: Option<GgufTensor>,
    /// Whether the file has the columns of what `rows` gives as its rows.
    turns: bool,
}

impl Planned {
    fn write(
        &self,
        output: &Path,
        rows: &mut RowsOf<'_>,
        out: &mut dyn io::Write,
    ) -> Result<(), Error> {
        if let Some(tensor) = &self.copied {
            let result = out.write_all(tensor.bytes.as_ref());
            tensor.bytes.release();
            return result.map_err(Error::io(output));
        }
        let columns = self.place.shape.last().copied().unwrap_or(1);
        let count = self.place.shape[..self.place.shape.len() - 1]
            .iter()
            .product::<usize>()
            .max(1);
        if self.place.shape.len() == 1 {
            let row = self.in_order(&rows(self.id, 0..1));
            return out
                .write_all(&self.stored(output, &row, columns)?)
                .map_err(Error::io(output));
        }
        if self.turns {
            let values = rows(self.id, 0..columns);
            let values = transposed(&Tensor::from_f32(columns, count, values));
            let stored = self.stored(output, &values.to_vec(), columns)?;
            return out.write_all(&stored).map_err(Error::io(output));
        }
        // Rows that the file has in another order are heads' rows; their tensors are small.
        let step = if matches!(self.place.change, Change::Interleaved(_)) {
            count
        } else {
            ROWS
        };
        for first in (0..count).step_by(step) {
            let values = rows(self.id, first..count.min(first + step));
            let values = self.in_file_order(values, columns);
            out.write_all(&self.stored(output, &values, columns)?)
                .map_err(Error::io(output))?;
        }
        Ok(())
    }

    /// A vector as the file has it.
    fn in_order(&self, values: &[f32]) -> Vec<f32> {
        let mut moved = vec![0.0; values.len()];
        for (i, value) in values.iter().enumerate() {
            let shift = if self.place.change == Change::PlusOne {
                1.0
            } else {
                0.0
            };
            moved[self.place.change.source(i, values.len())] = value + shift;
        }
        moved
    }

    fn in_file_order(&self, values: Vec<f32>, columns: usize) -> Vec<f32> {
        if !matches!(self.place.change, Change::Interleaved(_)) {
            return values;
        }
        let count = values.len() / columns;
        let mut moved = vec![0.0; values.len()];
        for (row, line) in values.chunks_exact(columns).enumerate() {
            let to = self.place.change.source(row, count) * columns;
            moved[to..to + columns].copy_from_slice(line);
        }
        moved
    }

    /// Rows in the blocks of the type.
    fn stored(&self, output: &Path, values: &[f32], columns: usize) -> Result<Vec<u8>, Error> {
        let name = self.kind.name();
        let mut known = NumberFormat::ALL.into_iter();
        let known = known.find(|format| format.to_string().eq_ignore_ascii_case(name));
        let format = known.ok_or_else(|| Error::Settings(format!("{name} cannot be written")))?;
        let parts: Result<Vec<Vec<u8>>, _> = values
            .par_chunks(columns)
            .map(|row| {
                let mut bytes = Vec::new();
                format.quantize(row, &mut bytes).map(|()| bytes)
            })
            .collect();
        let parts = parts.map_err(|error| {
            lowrank_formats::FormatError::tensor(output, &self.place.gguf, error.to_string())
        })?;
        Ok(parts.concat())
    }
}

fn type_named(name: &str) -> Result<GgmlType, Error> {
    GgmlType::named(name).ok_or_else(|| Error::Settings(format!("{name} is no type of ggml")))
}

/// tokenizer.json of a model.
fn json_of(source: &Source) -> Result<serde_json::Value, Error> {
    serde_json::from_slice(&source.tokenizer_json()?)
        .map_err(|error| Error::Settings(format!("{source}: tokenizer.json is not JSON ({error})")))
}

/// The metadata of a GGUF file, but for what says that it was split.
fn keys_of(gguf: &Gguf) -> Vec<(String, KeyValue)> {
    let keys = gguf.raw_keys();
    keys.filter(|(key, _)| !key.starts_with("split."))
        .map(|(key, bytes)| (key.to_owned(), KeyValue::Raw(bytes.to_vec())))
        .collect()
}

/// The tensors of rotary factors of a GGUF file.
fn factors_of(gguf: &Gguf) -> Result<Vec<(String, Vec<f32>)>, Error> {
    let names = gguf.tensors().iter().map(|tensor| tensor.name.as_str());
    names
        .filter(|name| name.starts_with("rope_f"))
        .map(|name| Ok((name.to_owned(), gguf.f32s(name)?)))
        .collect()
}

fn set(keys: &mut Vec<(String, KeyValue)>, key: &str, value: KeyValue) {
    match keys.iter_mut().find(|(known, _)| known == key) {
        Some((_, known)) => *known = value,
        None => keys.push((key.to_owned(), value)),
    }
}

fn counted(specs: &[GgufSpec]) -> Vec<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for spec in specs {
        *counts.entry(spec.kind.name()).or_default() += 1;
    }
    let shown = counts.into_iter();
    shown
        .map(|(name, count)| format!("{name} ×{count}"))
        .collect()
}

/// Texts that tokenizers cut in many ways.
const TEXTS: [&str; 4] = [
    "The 2,048 tokens of `fn main() {}`\n\n\tcost £14.50 — isn't that odd?  Yes.",
    "Ünïcode: 東京 🦀🦀 Привет, e\u{301}té ١٢٣",
    "  leading, trailing   and    many spaces \n \r\n",
    "A_b-C+d/E==1234567890 'll 'RE they'Ve",
];

/// The first field that a config read again has otherwise. A family's name alone is no difference: llama.cpp takes Mistral for Llama.
fn difference(config: &ModelConfig, read: &ModelConfig) -> Option<String> {
    let (mut config, mut read) = (config.clone(), read.clone());
    read.family = config.family;
    (config.formats, read.formats) = (BTreeMap::new(), BTreeMap::new());
    read.tie_word_embeddings = config.tie_word_embeddings;
    if config == read {
        return None;
    }
    let (config, read) = (format!("{config:#?}"), format!("{read:#?}"));
    let differs = config
        .lines()
        .zip(read.lines())
        .find(|(here, there)| here != there);
    let (here, there) = differs?;
    let (here, there) = (
        here.trim().trim_end_matches(','),
        there.trim().trim_end_matches(','),
    );
    Some(format!("{there} instead of {here}"))
}

/// Reads the file's metadata again, and compares what they say with the model and its tokenizer.
fn prove(output: &Path, config: &ModelConfig, tokenizer: &Tokenizer) -> Result<(), Error> {
    let file = GgufFile::open(output)?;
    let read = families::read_config(&file.config())?;
    if let Some(field) = difference(config, &read) {
        return Err(Error::Settings(format!(
            "a GGUF file cannot say everything of this model: read again, it has {field}; nothing was written"
        )));
    }
    let other = file.tokenizer()?;
    for text in TEXTS {
        let (here, there) = (tokenizer.encode(text, true)?, other.encode(text, true)?);
        if here != there {
            return Err(Error::Settings(format!(
                "a GGUF file cannot say everything of this tokenizer: read again, it cuts {text:?} otherwise; nothing was written"
            )));
        }
    }
    let ends = |tokenizer: &Tokenizer| {
        let mut ends = tokenizer.stop_ids().to_vec();
        ends.sort_unstable();
        ends
    };
    if ends(tokenizer) != ends(&other) {
        return Err(Error::Settings(format!(
            "a GGUF file has places for three tokens that end an answer, and this tokenizer has {}; nothing was written",
            tokenizer.stop_ids().len()
        )));
    }
    Ok(())
}

//! A model as a folder whose matrices bitsandbytes' users can load: NF4, FP4 or int8, as transformers saves them.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use lowrank_formats::checkpoint::StoredDType;
use lowrank_formats::quantized::{FourBitKind, QUANTIZATION_CONFIG};
use lowrank_formats::safetensors_writer::{TensorSpec, write_safetensors};
use lowrank_formats::{FormatError, atomic};
use lowrank_kernels::{DType, Layout, NESTED_BLOCK, NestedParts, NumberFormat, Tensor, nested_map};
use serde_json::{Value, json};

use crate::Error;
use crate::base::{MODEL_FILES, SIDE_FILES, SIDE_FOLDERS, Source};
use crate::model::load_in::{EightBitMatrix, FourBitMatrix, LoadIn};
use crate::model::stored::four_bit_format;
use crate::model::{Purpose, WeightId, Weights, families};
use crate::output;

/// How the matrices of such a folder are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FolderType {
    /// NF4 with scales that are quantized themselves, or FP4 so.
    FourBit(FourBitKind),
    /// int8 with a scale a row.
    EightBit,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct FolderReport {
    /// Matrices that were quantized.
    pub matrices: usize,
    /// Tensors that were not.
    pub others: usize,
    /// Bytes of model.safetensors.
    pub bytes: u64,
}

/// A tensor of the file.
enum Part {
    /// A weight's own numbers, in a type.
    Plain(WeightId, StoredDType),
    /// The numbers of a matrix.
    Packed(WeightId),
    /// Something small that belongs to one.
    Bytes(Vec<u8>),
}

/// Writes the folder of a model whose linears are quantized; tables of tokens, output projections, classifiers, norms and biases are not, as
/// transformers leaves them.
///
/// # Errors
/// A model that is quantized already, or whose matrices lie the other way; rows that are not made of whole blocks; an output that exists
/// (without `overwrite`), that holds other files than a model's, or that cannot be written.
pub fn write_quantized_folder(
    source: &Source,
    purpose: Purpose,
    folder_type: FolderType,
    folder: &Path,
    overwrite: bool,
) -> Result<FolderReport, Error> {
    check(source, folder, overwrite)?;
    let weights = source.weights_for(source.exact_dtype()?, purpose)?;
    let stored = stored_type(source)?;
    let (mut specs, mut parts) = (Vec::new(), Vec::new());
    let (mut matrices, mut others) = (0, 0);
    for (id, (rows, cols)) in weights.config().weights() {
        let name = families::tensor_name(weights.config(), id);
        if !LoadIn::is_for(weights.config(), id) {
            let shape = if id.is_vector() {
                vec![cols]
            } else {
                vec![rows, cols]
            };
            specs.push(TensorSpec {
                name,
                dtype: stored,
                shape,
            });
            parts.push(Part::Plain(id, stored));
            others += 1;
            continue;
        }
        matrices += 1;
        for (spec, part) in tensors_of(&weights, id, &name, folder_type, stored)? {
            specs.push(spec);
            parts.push(part);
        }
    }
    let changes = [(
        QUANTIZATION_CONFIG,
        quantization_config(folder_type, stored),
    )];
    atomic::write_folder(folder, overwrite, |folder| {
        let file = folder.join("model.safetensors");
        write_safetensors(&file, &specs, &BTreeMap::new(), |index, out| {
            match &parts[index] {
                Part::Plain(id, dtype) => write_plain(&weights, *id, *dtype, out),
                Part::Packed(id) => {
                    let packed = packed(&weights, *id, folder_type);
                    out.write_all(&packed.map_err(std::io::Error::other)?)
                }
                Part::Bytes(bytes) => out.write_all(bytes),
            }
        })?;
        let dtype = match stored {
            StoredDType::F32 => DType::F32,
            _ => DType::Bf16,
        };
        source.write_changed_side_files(folder, dtype, &changes)?;
        let bytes = std::fs::metadata(&file).map_err(Error::io(&file))?.len();
        Ok(FolderReport {
            matrices,
            others,
            bytes,
        })
    })
}

fn check(source: &Source, folder: &Path, overwrite: bool) -> Result<(), Error> {
    let tensors = source.tensors()?;
    if tensors.has_formats() {
        return Err(Error::Settings(format!(
            "{source} is quantized already, or is a GGUF file, which has formats of its own; take the folder of the model as it was before"
        )));
    }
    let config = families::read_config(&source.config()?)?;
    if config.layout == Layout::InOut {
        return Err(Error::Settings(format!(
            "{source}: the matrices of {} lie the other way, and are not written quantized",
            config.family.model_type()
        )));
    }
    let known = [MODEL_FILES, SIDE_FILES, SIDE_FOLDERS];
    output::check_folder(folder, source.folder(), overwrite, &known)
}

/// The type of most of the source's numbers, in which those are written that are not quantized.
fn stored_type(source: &Source) -> Result<StoredDType, Error> {
    let tensors = source.tensors()?;
    let mut counts = [0_usize; 3];
    for name in tensors.names() {
        let Some(tensor) = tensors.find(name)? else {
            continue;
        };
        let size: usize = tensor.shape().iter().product();
        match tensor.type_name() {
            "F32" => counts[0] += size,
            "F16" => counts[1] += size,
            _ => counts[2] += size,
        }
    }
    let most = counts.iter().max().copied().unwrap_or_default();
    Ok(match counts {
        [single, ..] if single == most => StoredDType::F32,
        [_, half, _] if half == most => StoredDType::F16,
        _ => StoredDType::BF16,
    })
}

/// A matrix in f32.
fn wide(weights: &Weights, id: WeightId) -> Tensor {
    let view = weights.view(id);
    Tensor::from_f32(view.rows(), view.cols(), view.to_vec())
}

fn four_bits(weights: &Weights, id: WeightId, kind: FourBitKind) -> Result<FourBitMatrix, Error> {
    let matrix = FourBitMatrix::of(wide(weights, id), four_bit_format(kind), true);
    matrix.map_err(|e| named(weights, id, &e.to_string()))
}

fn eight_bits(weights: &Weights, id: WeightId) -> Result<EightBitMatrix, Error> {
    let matrix = EightBitMatrix::of(&wide(weights, id));
    matrix.map_err(|e| named(weights, id, &e.to_string()))
}

fn named(weights: &Weights, id: WeightId, problem: &str) -> Error {
    let name = families::tensor_name(weights.config(), id);
    FormatError::tensor(Path::new("model.safetensors"), name, problem).into()
}

/// The tensors that a matrix becomes.
fn tensors_of(
    weights: &Weights,
    id: WeightId,
    name: &str,
    folder_type: FolderType,
    stored: StoredDType,
) -> Result<Vec<(TensorSpec, Part)>, Error> {
    const BYTES: StoredDType = StoredDType::Other("U8");
    let spec = |name: String, dtype, shape: Vec<usize>| TensorSpec { name, dtype, shape };
    let floats = |name: String, values: &[f32]| {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes());
        let part = Part::Bytes(bytes.collect());
        (spec(name, StoredDType::F32, vec![values.len()]), part)
    };
    let (rows, cols) = {
        let view = weights.view(id);
        (view.rows(), view.cols())
    };
    let kind = match folder_type {
        FolderType::FourBit(kind) => kind,
        FolderType::EightBit => {
            let module = name.strip_suffix("weight").unwrap_or(name);
            let scales = eight_bits(weights, id)?.scales;
            return Ok(vec![
                (
                    spec(name.to_owned(), StoredDType::Other("I8"), vec![rows, cols]),
                    Part::Packed(id),
                ),
                floats(format!("{module}SCB"), &scales),
                // Numbers lie row by row.
                (
                    spec(format!("{module}weight_format"), BYTES, vec![]),
                    Part::Bytes(vec![0]),
                ),
            ]);
        }
    };
    let matrix = four_bits(weights, id, kind)?;
    let nested = matrix
        .nested
        .unwrap_or_else(|| NestedParts::of(&matrix.scales));
    let values = four_bit_format(kind).four_bit_values();
    let state = json!({
        "quant_type": kind.key(),
        "blocksize": four_bit_format(kind).block_len(),
        "dtype": name_of(stored),
        "shape": [rows, cols],
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": f64::from(nested.offset),
    });
    let state = state.to_string().into_bytes();
    Ok(vec![
        (
            spec(name.to_owned(), BYTES, vec![rows * cols / 2, 1]),
            Part::Packed(id),
        ),
        (
            spec(format!("{name}.absmax"), BYTES, vec![nested.bytes.len()]),
            Part::Bytes(nested.bytes),
        ),
        floats(format!("{name}.nested_absmax"), &nested.scales),
        floats(format!("{name}.nested_quant_map"), &nested_map()),
        floats(
            format!("{name}.quant_map"),
            values.map_or(&[], |values| values.as_slice()),
        ),
        (
            spec(
                format!("{name}.quant_state.bitsandbytes__{}", kind.key()),
                BYTES,
                vec![state.len()],
            ),
            Part::Bytes(state),
        ),
    ])
}

/// The numbers of a matrix, once more: all matrices at once would not fit in memory.
fn packed(weights: &Weights, id: WeightId, folder_type: FolderType) -> Result<Vec<u8>, Error> {
    Ok(match folder_type {
        FolderType::FourBit(kind) => four_bits(weights, id, kind)?.packed,
        FolderType::EightBit => eight_bits(weights, id)?.numbers,
    })
}

fn write_plain(
    weights: &Weights,
    id: WeightId,
    dtype: StoredDType,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    let view = weights.view(id);
    for row in 0..view.rows() {
        let row = view.slice_rows(row..row + 1);
        match dtype {
            StoredDType::F32 => out.write_all(&row.to_le_bytes(DType::F32))?,
            StoredDType::F16 => {
                let mut bytes = Vec::new();
                let done = NumberFormat::F16.quantize(&row.to_vec(), &mut bytes);
                done.map_err(std::io::Error::other)?;
                out.write_all(&bytes)?;
            }
            _ => out.write_all(&row.to_le_bytes(DType::Bf16))?,
        }
    }
    Ok(())
}

fn name_of(stored: StoredDType) -> &'static str {
    match stored {
        StoredDType::F32 => "float32",
        StoredDType::F16 => "float16",
        _ => "bfloat16",
    }
}

/// config.json's `quantization_config`, with every key that transformers writes.
fn quantization_config(folder_type: FolderType, stored: StoredDType) -> Value {
    let four_bits = matches!(folder_type, FolderType::FourBit(_));
    let kind = match folder_type {
        FolderType::FourBit(kind) => kind,
        FolderType::EightBit => FourBitKind::Fp4,
    };
    json!({
        "_load_in_4bit": four_bits,
        "_load_in_8bit": !four_bits,
        "bnb_4bit_compute_dtype": name_of(stored),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind.key(),
        "bnb_4bit_use_double_quant": four_bits,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four_bits,
        "load_in_8bit": !four_bits,
        "quant_method": "bitsandbytes",
    })
}

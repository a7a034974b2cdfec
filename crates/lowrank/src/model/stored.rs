//! The tensors of a base as its files have them: numbers in safetensors files, quantized or not, or blocks in a GGUF file.

mod packed;

pub(crate) use self::packed::four_bit_format;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lowrank_formats::checkpoint::{
    Checkpoint, StoredDType, TensorEntry, check_finite, check_finite_as_bf16,
};
use lowrank_formats::gguf_model::{self, Change, GgufWeight};
use lowrank_formats::quantized::{PackedTensor, QuantMethod, QuantizedCheckpoint};
use lowrank_formats::{FormatError, Gguf, HfConfig, SharedBytes};
use lowrank_kernels::{DType, NumberFormat, Tensor, View};
use rayon::prelude::*;

use super::config::ModelConfig;
use super::load_in::LoadIn;
use crate::Error;

/// A model as it is before it is quantized.
pub struct Unquantized {
    /// Its shapes and choices.
    pub model: ModelConfig,
    /// Its tensors.
    pub stored: StoredTensors,
}

/// The opened weights of a base.
pub enum StoredTensors {
    /// A folder's, or a single file's.
    Safetensors(Checkpoint),
    /// The same, of which matrices are quantized while they are loaded.
    LoadIn(Checkpoint, LoadIn),
    /// A folder's whose matrices are quantized.
    Quantized(QuantizedCheckpoint),
    /// Those of a GGUF file, by the names that they would have in a folder.
    Gguf {
        /// The file, or the first of several.
        path: PathBuf,
        /// The tensors.
        weights: BTreeMap<String, GgufWeight>,
    },
}

impl From<Checkpoint> for StoredTensors {
    fn from(checkpoint: Checkpoint) -> Self {
        Self::Safetensors(checkpoint)
    }
}

impl StoredTensors {
    /// Those of a folder, which may be quantized; `config` is its config.json.
    ///
    /// # Errors
    /// Files that are missing or damaged; a kind of quantization that is not read.
    pub fn of_folder(folder: &Path, config: &HfConfig) -> Result<Self, Error> {
        let checkpoint = Checkpoint::open(folder)?;
        Ok(match QuantMethod::read(config)? {
            None => Self::Safetensors(checkpoint),
            Some(method) => Self::Quantized(QuantizedCheckpoint::new(checkpoint, method)?),
        })
    }

    /// The same, whose matrices are to be quantized while they are loaded.
    ///
    /// # Errors
    /// Matrices that are quantized already.
    pub fn load_in(self, load_in: LoadIn) -> Result<Self, Error> {
        match self {
            Self::Safetensors(checkpoint) => Ok(Self::LoadIn(checkpoint, load_in)),
            quantized => Err(Error::Settings(format!(
                "{} is quantized already, or is a GGUF file, which has formats of its own; leave out load_in",
                quantized.path().display()
            ))),
        }
    }

    /// What matrices are quantized to while they are loaded, if they are.
    pub fn loads_in(&self) -> Option<LoadIn> {
        match self {
            Self::LoadIn(_, load_in) => Some(*load_in),
            _ => None,
        }
    }

    /// Whether matrices may be stored in other formats than those that are computed with.
    pub fn has_formats(&self) -> bool {
        !matches!(self, Self::Safetensors(_))
    }

    /// Those of a GGUF file.
    ///
    /// # Errors
    /// An architecture that is not supported; tensors that are missing, unexpected, of the wrong shape or of a type that is not read.
    pub fn of_gguf(gguf: &Gguf) -> Result<Self, Error> {
        let weights = gguf_model::weights(gguf)?;
        let named = |weight: GgufWeight| (weight.name.clone(), weight);
        Ok(Self::Gguf {
            path: gguf.path().to_path_buf(),
            weights: weights.into_iter().map(named).collect(),
        })
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        match self {
            Self::Safetensors(checkpoint) | Self::LoadIn(checkpoint, _) => checkpoint.path(),
            Self::Quantized(quantized) => quantized.checkpoint().path(),
            Self::Gguf { path, .. } => path,
        }
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        match self {
            Self::Safetensors(checkpoint) | Self::LoadIn(checkpoint, _) => {
                checkpoint.names().collect()
            }
            Self::Quantized(quantized) => quantized.names(),
            Self::Gguf { weights, .. } => weights.keys().map(String::as_str).collect(),
        }
    }

    /// The shape of a tensor, which is not mapped for it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        match self {
            Self::Safetensors(checkpoint) | Self::LoadIn(checkpoint, _) => checkpoint.shape(name),
            Self::Quantized(quantized) => quantized.shape(name),
            Self::Gguf { weights, .. } => Some(&weights.get(name)?.tensor.shape),
        }
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        match self {
            Self::Safetensors(checkpoint) | Self::LoadIn(checkpoint, _) => checkpoint.total_bytes(),
            Self::Quantized(quantized) => quantized.checkpoint().total_bytes(),
            Self::Gguf { weights, .. } => {
                let all = weights.values();
                all.map(|weight| weight.tensor.bytes.as_ref().len() as u64)
                    .sum()
            }
        }
    }

    /// Bytes of the matrices of a GGUF file whose rows are put in another order, in memory of their own.
    pub(crate) fn reordered_bytes(&self) -> u64 {
        let Self::Gguf { weights, .. } = self else {
            return 0;
        };
        let weights = weights.values();
        let moved = weights.filter(|weight| {
            matches!(weight.change, Change::Interleaved(_)) && weight.tensor.rows() > 1
        });
        moved
            .map(|weight| weight.tensor.bytes.as_ref().len() as u64)
            .sum()
    }

    /// A tensor, if it is there.
    ///
    /// # Errors
    /// The process has no room to map it.
    pub fn find(&self, name: &str) -> Result<Option<StoredTensor>, Error> {
        Ok(match self {
            Self::Safetensors(checkpoint) | Self::LoadIn(checkpoint, _) => {
                checkpoint.find(name)?.map(StoredTensor::Numbers)
            }
            Self::Quantized(quantized) => match quantized.packed(name)? {
                Some(packed) => Some(StoredTensor::Packed(Box::new(packed))),
                None => quantized.plain(name)?.map(StoredTensor::Numbers),
            },
            Self::Gguf { weights, .. } => weights.get(name).cloned().map(StoredTensor::Gguf),
        })
    }
}

/// A tensor of a base's files.
#[derive(Clone, Debug)]
pub enum StoredTensor {
    /// Of a safetensors file.
    Numbers(TensorEntry),
    /// Of several tensors of safetensors files, that are quantized.
    Packed(Box<PackedTensor>),
    /// Of a GGUF file.
    Gguf(GgufWeight),
}

/// Refuses values that are not finite. Of a folder, all tensors that have some are listed.
///
/// # Errors
/// The file and the tensors.
pub(crate) fn check_all_finite(tensors: &[StoredTensor]) -> Result<(), Error> {
    let is_bad = |tensor: &&StoredTensor| tensor.check_finite().is_err();
    let bad: Vec<&StoredTensor> = tensors.par_iter().filter(is_bad).collect();
    check_finite(bad.iter().filter_map(|tensor| match tensor {
        StoredTensor::Numbers(entry) => Some(entry),
        StoredTensor::Packed(_) | StoredTensor::Gguf(_) => None,
    }))?;
    bad.first().map_or(Ok(()), |tensor| tensor.check_finite())
}

/// How a GGUF file stores a tensor.
///
/// # Errors
/// A type that is not read.
fn format_of(weight: &GgufWeight) -> Result<NumberFormat, FormatError> {
    let name = weight.tensor.kind.name();
    let known = NumberFormat::ALL.into_iter();
    let mut known = known.filter(|format| format.to_string().eq_ignore_ascii_case(name));
    known.next().ok_or_else(|| FormatError::Tensor {
        path: weight.tensor.file.to_path_buf(),
        tensor: weight.tensor.name.clone(),
        problem: format!("is stored as {name}, which is not read"),
    })
}

impl StoredTensor {
    /// Its name in a Hugging Face folder.
    pub fn name(&self) -> &str {
        match self {
            Self::Numbers(entry) => &entry.name,
            Self::Packed(tensor) => &tensor.name,
            Self::Gguf(weight) => &weight.name,
        }
    }

    /// An error about it.
    pub(crate) fn error(&self, problem: &str) -> Error {
        let (file, name) = match self {
            Self::Numbers(entry) => (&entry.file, &entry.name),
            Self::Packed(tensor) => (&tensor.main().file, &tensor.name),
            Self::Gguf(weight) => (&weight.tensor.file, &weight.tensor.name),
        };
        FormatError::tensor(file, name, problem).into()
    }

    /// Its dimensions as its file has them, outermost first.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Numbers(entry) => &entry.shape,
            Self::Packed(tensor) => &tensor.shape,
            Self::Gguf(weight) => &weight.tensor.shape,
        }
    }

    /// Its type as the file names it.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Numbers(entry) => entry.dtype.name(),
            Self::Packed(tensor) => tensor.type_name(),
            Self::Gguf(weight) => weight.tensor.kind.name(),
        }
    }

    /// How its numbers are stored, if that is a format of 16 bits or fewer that is not bf16.
    pub(crate) fn own_format(&self) -> Option<NumberFormat> {
        let format = match self {
            Self::Numbers(_) => return None,
            Self::Packed(tensor) => packed::format(tensor)?,
            Self::Gguf(weight) => format_of(weight).ok()?,
        };
        format.as_dtype().is_none().then_some(format)
    }

    /// Whether it is of a GGUF file.
    pub fn is_of_gguf(&self) -> bool {
        matches!(self, Self::Gguf(_))
    }

    /// The memory of its file.
    pub fn bytes(&self) -> &SharedBytes {
        match self {
            Self::Numbers(entry) => &entry.bytes,
            Self::Packed(tensor) => &tensor.main().bytes,
            Self::Gguf(weight) => &weight.tensor.bytes,
        }
    }

    /// One element, counted row after row; NaN where there is none.
    pub(crate) fn value(&self, index: usize) -> f32 {
        match self {
            Self::Numbers(entry) => entry.value(index).unwrap_or(f32::NAN),
            Self::Packed(tensor) => packed::value(tensor, index),
            Self::Gguf(weight) => {
                let mut rows = GgufRows::new(weight);
                match &mut rows {
                    Ok(rows) if index < rows.stored.len() => {
                        let row = rows.row(index / rows.stored.cols());
                        row[index % row.len()]
                    }
                    _ => f32::NAN,
                }
            }
        }
    }

    /// Whether both hold the same values.
    ///
    /// # Errors
    /// A type that is not read.
    pub(crate) fn has_values_of(&self, other: &Self) -> Result<bool, Error> {
        let same_type = self.type_name() == other.type_name();
        if same_type && self.bytes().as_ref() == other.bytes().as_ref() {
            return Ok(true);
        }
        match (self, other) {
            (Self::Numbers(one), Self::Numbers(other)) if !same_type => {
                Ok(one.to_f32()? == other.to_f32()?)
            }
            _ => Ok(false),
        }
    }

    /// Refuses values that are not finite.
    ///
    /// # Errors
    /// The file and the tensor.
    fn check_finite(&self) -> Result<(), Error> {
        match self {
            Self::Numbers(entry) => Ok(check_finite([entry])?),
            // It was checked when it was read.
            Self::Packed(_) => Ok(()),
            Self::Gguf(weight) => check_blocks(weight, GgufRows::new(weight)?.stored.view()),
        }
    }

    /// The tensor as the model holds it. With [`DType::F32`] all numbers are widened. With [`DType::Bf16`] what takes no more memory
    /// stays as it is stored, wherever it is mapped; f32 numbers are rounded.
    ///
    /// # Errors
    /// A type that is not read; values that are not finite, or would not be as `dtype`.
    pub(crate) fn to_tensor(
        &self,
        (rows, cols): (usize, usize),
        dtype: DType,
    ) -> Result<Tensor, Error> {
        match self {
            Self::Numbers(entry) => numbers(entry, (rows, cols), dtype),
            Self::Packed(tensor) => packed::to_tensor(tensor, (rows, cols), dtype),
            Self::Gguf(weight) => {
                let source = GgufRows::new(weight)?;
                let format = source.stored.format();
                let is_kept =
                    format == dtype.into() || dtype == DType::Bf16 && format != NumberFormat::F32;
                if is_kept && matches!(weight.change, Change::None | Change::Turned) {
                    return Ok(source.stored.reshape(rows, cols));
                }
                check_blocks(weight, source.stored.view())?;
                if is_kept && rows > 1 {
                    return source.in_order();
                }
                source.converted((rows, cols), dtype)
            }
        }
    }
}

/// Rows of a tensor in a GGUF file.
struct GgufRows<'a> {
    weight: &'a GgufWeight,
    /// As the file has it; a vector is one row.
    stored: Tensor,
}

impl<'a> GgufRows<'a> {
    fn new(weight: &'a GgufWeight) -> Result<Self, Error> {
        let tensor = &weight.tensor;
        let (bytes, format) = (&tensor.bytes, format_of(weight)?);
        let (rows, cols) = (tensor.rows(), tensor.columns());
        let shared = Tensor::from_shared(bytes.owner(), bytes.range(), format, rows, cols);
        let stored =
            shared.or_else(|_| Tensor::from_le_bytes(bytes.as_ref(), format, rows, cols))?;
        Ok(Self { weight, stored })
    }

    /// A row of Hugging Face's tensor, or one of its columns where that is turned.
    fn row(&self, index: usize) -> Vec<f32> {
        let (rows, change) = (self.stored.rows(), self.weight.change);
        if rows == 1 {
            let values = self.stored.to_vec();
            let count = values.len();
            let in_order = (0..count).map(|i| values[change.source(i, count)]);
            return match change {
                Change::PlusOne => in_order.map(|value| value - 1.0).collect(),
                Change::None | Change::Interleaved(_) | Change::Turned => in_order.collect(),
            };
        }
        let from = change.source(index, rows);
        self.stored.view().slice_rows(from..from + 1).to_vec()
    }

    /// The rows in Hugging Face's order, as they are stored.
    fn in_order(&self) -> Result<Tensor, Error> {
        let (rows, cols) = (self.stored.rows(), self.stored.cols());
        let view = self.stored.view();
        let mut bytes = Vec::with_capacity(self.stored.nbytes());
        for row in 0..rows {
            let from = self.weight.change.source(row, rows);
            bytes.extend_from_slice(view.slice_rows(from..from + 1).stored_bytes());
        }
        self.weight.tensor.bytes.release();
        let format = self.stored.format();
        Ok(Tensor::from_le_bytes(&bytes, format, rows, cols)?)
    }

    fn converted(&self, (rows, cols): (usize, usize), dtype: DType) -> Result<Tensor, Error> {
        let mut bytes = Vec::with_capacity(dtype.bytes_for(rows * cols));
        for row in 0..self.stored.rows() {
            let row = self.row(row);
            let row = View::of_row(&row).to_le_bytes(dtype).into_owned();
            bytes.extend(row);
        }
        self.weight.tensor.bytes.release();
        Ok(Tensor::from_le_bytes(&bytes, dtype, rows, cols)?)
    }
}

/// The matrix turned, f32.
pub(crate) fn transposed(matrix: &Tensor) -> Tensor {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let values = matrix.to_vec();
    let turned = (0..cols).flat_map(|col| values[col..].iter().step_by(cols));
    Tensor::from_f32(cols, rows, turned.copied().collect())
}

/// Calls `write` with each row of a tensor of a GGUF file, as a Hugging Face folder has it.
///
/// # Errors
/// A type that is not read, values that are not finite, and what `write` says.
pub(crate) fn for_rows(
    weight: &GgufWeight,
    mut write: impl FnMut(&[f32]) -> Result<(), Error>,
) -> Result<(), Error> {
    let source = GgufRows::new(weight)?;
    let turned = (weight.change == Change::Turned).then(|| transposed(&source.stored));
    for row in 0..turned.as_ref().unwrap_or(&source.stored).rows() {
        let row = match &turned {
            Some(turned) => turned.view().slice_rows(row..row + 1).to_vec(),
            None => source.row(row),
        };
        if row.iter().any(|value| !value.is_finite()) {
            check_blocks(weight, source.stored.view())?;
        }
        write(&row)?;
    }
    weight.tensor.bytes.release();
    Ok(())
}

/// Refuses values that are not finite.
fn check_blocks(weight: &GgufWeight, stored: View<'_>) -> Result<(), Error> {
    let cols = stored.cols();
    let bad = (0..stored.rows()).into_par_iter().find_map_first(|row| {
        let values = stored.slice_rows(row..row + 1).to_vec();
        let place = values.iter().position(|value| !value.is_finite())?;
        Some((row * cols + place, values[place]))
    });
    let Some((place, value)) = bad else {
        return Ok(());
    };
    Err(FormatError::Tensor {
        path: weight.tensor.file.to_path_buf(),
        tensor: weight.tensor.name.clone(),
        problem: format!(
            "holds {value} as its number {place}; the file is damaged, or was made of damaged weights, so take another"
        ),
    }
    .into())
}

/// A tensor of a safetensors file as f32 or bf16: in place where it is stored so and aligned, otherwise converted.
fn numbers(
    entry: &TensorEntry,
    (rows, cols): (usize, usize),
    dtype: DType,
) -> Result<Tensor, Error> {
    let stored = match entry.dtype {
        StoredDType::F32 => Some(DType::F32),
        StoredDType::BF16 => Some(DType::Bf16),
        _ => None,
    };
    if stored == Some(dtype) {
        let bytes = &entry.bytes;
        if let Ok(tensor) = Tensor::from_shared(bytes.owner(), bytes.range(), dtype, rows, cols) {
            return Ok(tensor);
        }
        check_finite([entry])?;
        return Ok(Tensor::from_le_bytes(bytes.as_ref(), dtype, rows, cols)?);
    }
    let check = |entry: &TensorEntry| match dtype {
        DType::F32 => check_finite([entry]),
        DType::Bf16 => check_finite_as_bf16([entry]),
    };
    // A part at a time, whose pages are given back before those of the next are read: a table of tokens is large.
    let mut bytes = Vec::with_capacity(dtype.bytes_for(entry.len()));
    for part in entry.parts(CONVERTED_AT_ONCE) {
        if check(&part).is_err() {
            // The message counts from the tensor's start.
            check(entry)?;
        }
        match dtype {
            DType::F32 => bytes.extend(part.to_f32()?.into_iter().flat_map(f32::to_le_bytes)),
            DType::Bf16 => bytes.extend(
                part.to_bf16()?
                    .into_iter()
                    .flat_map(half::bf16::to_le_bytes),
            ),
        }
        part.bytes.release();
    }
    entry.bytes.release();
    Ok(Tensor::from_le_bytes(&bytes, dtype, rows, cols)?)
}

/// Elements of a tensor that are converted at a time.
const CONVERTED_AT_ONCE: usize = 1 << 20;

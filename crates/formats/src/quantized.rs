//! Folders whose matrices are quantized: bitsandbytes (NF4, FP4, int8), GPTQ and AWQ.
//!
//! Such a folder keeps a matrix in several tensors. Here they are one under the name that it would have unquantized, with what its numbers
//! come from; what they come to is computed elsewhere.

mod bitsandbytes;
mod grouped;

use std::collections::{BTreeMap, BTreeSet};

use crate::FormatError;
use crate::checkpoint::{Checkpoint, StoredDType, TensorEntry};
use crate::hf_config::HfConfig;

pub use bitsandbytes::{FourBitKind, FourBitScales};

/// The key of config.json that says how a folder is quantized.
pub const QUANTIZATION_CONFIG: &str = "quantization_config";

/// How the matrices of a folder are quantized, by config.json's `quantization_config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantMethod {
    /// `bitsandbytes`: NF4, FP4 or int8.
    Bitsandbytes,
    /// `gptq`, of four bits.
    Gptq {
        /// Whether zeros are stored less one: in the format `gptq`, not in `gptq_v2`.
        less_one: bool,
    },
    /// `awq`, of four bits, in the order of its `gemm` version.
    Awq,
}

impl QuantMethod {
    /// What config.json says; `None` where the weights are plain.
    ///
    /// # Errors
    /// A method, a number of bits or a version that is not read.
    pub fn read(config: &HfConfig) -> Result<Option<Self>, FormatError> {
        const METHODS: &str = "bitsandbytes, gptq, awq; take another folder of the model, a GGUF file or the model as it was before, or, \
         where its weights are plain all the same, remove the key quantization_config";
        let Some(quantization) = config.opt_object(QUANTIZATION_CONFIG)? else {
            return Ok(None);
        };
        let method = quantization.opt_str("quant_method")?;
        // Folders that bitsandbytes wrote before there were others do not name it.
        let is_named = |key| {
            quantization
                .opt_bool(key)
                .is_ok_and(|value| value == Some(true))
        };
        let method = match method {
            None if is_named("load_in_4bit") || is_named("load_in_8bit") => "bitsandbytes",
            None => return Err(quantization.unsupported("quant_method", METHODS)),
            Some(method) => method,
        };
        let four_bits = || match quantization.opt_usize("bits")? {
            None | Some(4) => Ok(()),
            Some(_) => Err(quantization.unsupported("bits", "4")),
        };
        Ok(Some(match method {
            "bitsandbytes" => Self::Bitsandbytes,
            "gptq" => {
                four_bits()?;
                match quantization.opt_str("checkpoint_format")? {
                    None | Some("gptq") => Self::Gptq { less_one: true },
                    Some("gptq_v2") => Self::Gptq { less_one: false },
                    Some(_) => {
                        return Err(quantization.unsupported("checkpoint_format", "gptq, gptq_v2"));
                    }
                }
            }
            "awq" => {
                four_bits()?;
                match quantization.opt_str("version")? {
                    None | Some("gemm" | "GEMM") => Self::Awq,
                    Some(_) => return Err(quantization.unsupported("version", "gemm")),
                }
            }
            _ => return Err(quantization.unsupported("quant_method", METHODS)),
        }))
    }
}

/// A matrix, or a vector, that is in other tensors than one of its own numbers.
#[derive(Clone, Debug)]
pub struct PackedTensor {
    /// Its name where it is not quantized.
    pub name: String,
    /// Its dimensions there: [out, in].
    pub shape: Vec<usize>,
    /// What its numbers come from.
    pub parts: PackedParts,
}

/// What the numbers of a matrix come from.
#[derive(Clone, Debug)]
pub enum PackedParts {
    /// bitsandbytes' NF4 and FP4.
    FourBit {
        /// Which of them.
        kind: FourBitKind,
        /// Two numbers a byte, the first in the high half, whatever type the file calls them.
        packed: TensorEntry,
        /// The 16 values.
        map: Vec<f32>,
        /// What they are multiplied with.
        scales: FourBitScales,
        /// Numbers that share a scale.
        block: usize,
    },
    /// bitsandbytes' int8.
    EightBit {
        /// The numbers [out, in].
        numbers: TensorEntry,
        /// The largest magnitude of each row.
        scales: Vec<f32>,
    },
    /// GPTQ's and AWQ's integers of four bits.
    Grouped {
        /// Which of the two.
        method: QuantMethod,
        /// `qweight`.
        words: TensorEntry,
        /// `qzeros`.
        zeros: TensorEntry,
        /// `scales`: [groups, out].
        scales: Vec<f32>,
        /// The group of each input.
        groups: Vec<usize>,
    },
    /// Half precision, in a tensor of its own: what is left unquantized is not to be rounded further.
    Half(TensorEntry),
}

impl PackedTensor {
    /// The tensor that holds its numbers, to which others belong.
    pub fn main(&self) -> &TensorEntry {
        match &self.parts {
            PackedParts::FourBit { packed: main, .. }
            | PackedParts::EightBit { numbers: main, .. }
            | PackedParts::Grouped { words: main, .. }
            | PackedParts::Half(main) => main,
        }
    }

    /// How its numbers are stored, in the words of those who quantize.
    pub fn type_name(&self) -> &'static str {
        match &self.parts {
            PackedParts::FourBit { kind, .. } => kind.name(),
            PackedParts::EightBit { .. } => "int8",
            PackedParts::Grouped {
                method: QuantMethod::Awq,
                ..
            } => "AWQ",
            PackedParts::Grouped { .. } => "GPTQ",
            PackedParts::Half(_) => "F16",
        }
    }

    /// An error about it.
    pub fn error(&self, problem: impl Into<String>) -> FormatError {
        FormatError::tensor(&self.main().file, &self.name, problem)
    }
}

/// A quantized folder's tensors under the names that they would have unquantized.
pub struct QuantizedCheckpoint {
    checkpoint: Checkpoint,
    method: QuantMethod,
    /// Shapes of the matrices that are quantized.
    packed: BTreeMap<String, Vec<usize>>,
    /// The tensors that they are made of.
    parts: BTreeSet<String>,
}

impl QuantizedCheckpoint {
    /// Finds the matrices of an opened checkpoint.
    ///
    /// # Errors
    /// A quantized matrix without its shape or some of its tensors, by name.
    pub fn new(checkpoint: Checkpoint, method: QuantMethod) -> Result<Self, FormatError> {
        let (mut packed, mut parts) = (BTreeMap::new(), BTreeSet::new());
        let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
        for name in &names {
            let found = match method {
                QuantMethod::Bitsandbytes => bitsandbytes::place(&checkpoint, name)?,
                QuantMethod::Gptq { .. } | QuantMethod::Awq => {
                    grouped::place(&checkpoint, method, name)?
                }
            };
            let Some(place) = found else { continue };
            parts.extend(place.parts);
            packed.insert(place.name, place.shape);
        }
        Ok(Self {
            checkpoint,
            method,
            packed,
            parts,
        })
    }

    /// The checkpoint as its files have it.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let plain = self.checkpoint.names();
        let plain = plain.filter(|name| !self.parts.contains(*name));
        let packed = self.packed.keys().map(String::as_str);
        let names: BTreeSet<&str> = plain.chain(packed).collect();
        names.into_iter().collect()
    }

    /// The shape of a tensor, which is not mapped for it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        match self.packed.get(name) {
            Some(shape) => Some(shape),
            None if self.parts.contains(name) => None,
            None => self.checkpoint.shape(name),
        }
    }

    /// A matrix that is quantized, or one in half precision, with its tensors.
    ///
    /// # Errors
    /// Tensors that are missing, of another type or of another shape than its numbers need.
    pub fn packed(&self, name: &str) -> Result<Option<PackedTensor>, FormatError> {
        let Some(shape) = self.packed.get(name) else {
            let plain = self.plain(name)?;
            let plain = plain.filter(|entry| entry.dtype == StoredDType::F16);
            return Ok(plain.map(|entry| PackedTensor {
                name: entry.name.clone(),
                shape: entry.shape.clone(),
                parts: PackedParts::Half(entry),
            }));
        };
        let parts = match self.method {
            QuantMethod::Bitsandbytes => bitsandbytes::parts(&self.checkpoint, name, shape)?,
            QuantMethod::Gptq { .. } | QuantMethod::Awq => {
                grouped::parts(&self.checkpoint, self.method, name, shape)?
            }
        };
        Ok(Some(PackedTensor {
            name: name.to_owned(),
            shape: shape.clone(),
            parts,
        }))
    }

    /// A tensor that is not quantized.
    ///
    /// # Errors
    /// The process has no room to map it.
    pub fn plain(&self, name: &str) -> Result<Option<TensorEntry>, FormatError> {
        if self.packed.contains_key(name) || self.parts.contains(name) {
            return Ok(None);
        }
        self.checkpoint.find(name)
    }
}

/// A quantized matrix before its tensors are looked at.
struct Place {
    name: String,
    shape: Vec<usize>,
    parts: Vec<String>,
}

/// A tensor that has to be there.
fn required(checkpoint: &Checkpoint, matrix: &str, name: &str) -> Result<TensorEntry, FormatError> {
    checkpoint.find(name)?.ok_or_else(|| {
        let problem = format!(
            "is quantized, and its tensor `{name}` is missing; the folder is damaged or was saved in part, so take another copy"
        );
        FormatError::tensor(checkpoint.path(), matrix, problem)
    })
}

/// Refuses a tensor of another type or number of elements.
fn check(entry: &TensorEntry, dtype: &str, elements: usize) -> Result<(), FormatError> {
    if entry.dtype.name() == dtype && entry.len() == elements {
        return Ok(());
    }
    Err(FormatError::tensor(
        &entry.file,
        &entry.name,
        format!(
            "is {} of {} elements, but a matrix of that shape needs {dtype} of {elements}",
            entry.dtype,
            entry.len()
        ),
    ))
}

/// The finite numbers of a tensor of scales.
fn floats(entry: &TensorEntry, elements: usize) -> Result<Vec<f32>, FormatError> {
    if entry.len() != elements {
        check(entry, entry.dtype.name(), elements)?;
    }
    let numbers = entry.to_f32()?;
    if let Some(at) = numbers.iter().position(|number| !number.is_finite()) {
        let problem = format!(
            "holds {} as its number {at}; take another copy",
            numbers[at]
        );
        return Err(FormatError::tensor(&entry.file, &entry.name, problem));
    }
    Ok(numbers)
}

//! Quantizing a base while it is loaded, as bitsandbytes does it (`load_in_4bit`, `load_in_8bit`).

use lowrank_kernels::{
    DType, EightBit, FourBit, FourBitParts, Layout, NestedParts, NumberFormat, Tensor, TensorError,
    eight_bits,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::config::{ModelConfig, Part, WeightId};
use super::stored::{StoredTensor, transposed};
use crate::Error;

/// What the matrices of a base's blocks are quantized to while they are loaded (`--load-in`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum LoadIn {
    /// NF4 with scales that are quantized themselves, as QLoRA does (Dettmers et al. 2023).
    #[serde(rename = "4bit")]
    #[cfg_attr(feature = "clap", value(name = "4bit"))]
    FourBit,
    /// int8 with a scale a row (Dettmers et al. 2022).
    #[serde(rename = "8bit")]
    #[cfg_attr(feature = "clap", value(name = "8bit"))]
    EightBit,
}

impl LoadIn {
    /// The format that it makes.
    pub fn format(self) -> NumberFormat {
        match self {
            Self::FourBit => NumberFormat::Nf4,
            Self::EightBit => NumberFormat::Int8,
        }
    }

    /// Whether it is for a tensor: for linears of blocks. Tables of tokens, output projections and classifiers stay as they are.
    pub(crate) fn is_for(config: &ModelConfig, id: WeightId) -> bool {
        matches!(id, WeightId::Linear(_, Part::Weight)) && !config.is_of_classifier(id)
    }

    /// Says in a config which tensors have its format. Their rows are those of a weight [out, in], whatever the files have.
    pub fn mark(self, config: &mut ModelConfig) {
        config.load_in = Some(self);
        config.layout = Layout::OutIn;
        for (id, _) in config.weights() {
            if Self::is_for(config, id) {
                config.formats.insert(id, self.format());
            }
        }
    }

    /// A matrix [rows, cols] in its format; where it is `turned`, the files have it as [cols, rows].
    ///
    /// # Errors
    /// A type that is not read, a number that is not finite or that half precision does not hold, or rows that are not made of whole blocks.
    pub(crate) fn quantized(
        self,
        stored: &StoredTensor,
        (rows, cols): (usize, usize),
        turned: bool,
    ) -> Result<Tensor, Error> {
        let wide = if turned {
            transposed(&stored.to_tensor((cols, rows), DType::F32)?)
        } else {
            stored.to_tensor((rows, cols), DType::F32)?
        };
        let wrong = |e: TensorError| stored.error(&format!("{e}; leave out load_in"));
        let parts = match self {
            Self::FourBit => FourBitMatrix::of(wide, NumberFormat::Nf4, true)
                .map_err(wrong)?
                .blocks(rows, cols),
            Self::EightBit => EightBitMatrix::of(&wide).map_err(wrong)?.blocks(rows, cols),
        };
        parts.map_err(wrong)
    }
}

/// A matrix in NF4 or FP4, as bitsandbytes stores it.
pub(crate) struct FourBitMatrix {
    pub(crate) format: NumberFormat,
    pub(crate) packed: Vec<u8>,
    /// `absmax`.
    pub(crate) scales: Vec<f32>,
    /// The same quantized ("double quantization").
    pub(crate) nested: Option<NestedParts>,
}

impl FourBitMatrix {
    /// Quantizes a matrix of f32.
    pub(crate) fn of(
        matrix: Tensor,
        format: NumberFormat,
        double: bool,
    ) -> Result<Self, TensorError> {
        let view = matrix.view();
        let rows: Result<Vec<Vec<u8>>, TensorError> = (0..view.rows())
            .into_par_iter()
            .map(|row| {
                let mut bytes = Vec::new();
                format.quantize(&view.slice_rows(row..row + 1).to_vec(), &mut bytes)?;
                Ok(bytes)
            })
            .collect();
        let blocks = rows?.concat();
        drop(matrix);
        let FourBitParts { packed, scales } = FourBitParts::of(&blocks);
        let nested = double.then(|| NestedParts::of(&scales));
        Ok(Self {
            format,
            packed,
            scales,
            nested,
        })
    }

    fn blocks(&self, rows: usize, cols: usize) -> Result<Tensor, TensorError> {
        let widened = self.nested.as_ref().map(NestedParts::widened).transpose()?;
        let map = self.format.four_bit_values();
        let matrix = FourBit {
            format: self.format,
            packed: &self.packed,
            map: map.map_or(&[], |map| map.as_slice()),
            scales: widened.as_deref().unwrap_or(&self.scales),
            block: self.format.block_len(),
        };
        matrix.matrix(rows, cols)
    }
}

/// A matrix in int8, as bitsandbytes stores it.
pub(crate) struct EightBitMatrix {
    pub(crate) numbers: Vec<u8>,
    /// `SCB`.
    pub(crate) scales: Vec<f32>,
}

impl EightBitMatrix {
    /// Quantizes a matrix of f32.
    pub(crate) fn of(matrix: &Tensor) -> Result<Self, TensorError> {
        let view = matrix.view();
        let rows: Result<Vec<_>, TensorError> = (0..view.rows())
            .into_par_iter()
            .map(|row| {
                let values = view.slice_rows(row..row + 1).to_vec();
                eight_bits(&values).map_err(|at| TensorError::Number {
                    format: NumberFormat::Int8,
                    at,
                    value: values[at],
                })
            })
            .collect();
        let (numbers, scales): (Vec<_>, Vec<_>) = rows?.into_iter().unzip();
        Ok(Self {
            numbers: numbers.concat(),
            scales,
        })
    }

    fn blocks(&self, rows: usize, cols: usize) -> Result<Tensor, TensorError> {
        let matrix = EightBit {
            numbers: &self.numbers,
            scales: &self.scales,
        };
        matrix.matrix(rows, cols)
    }
}

//! The tensors of bitsandbytes' matrices: `X.weight` with what belongs to it in tensors whose names begin with its own.

use serde_json::Value;

use super::{PackedParts, Place, check, floats, required};
use crate::FormatError;
use crate::checkpoint::{Checkpoint, StoredDType, TensorEntry};

/// Before the name of the type in the name of the tensor that describes a matrix of four bits.
const STATE: &str = ".quant_state.bitsandbytes__";
/// What a matrix of int8 has beside its numbers.
const SCALES: &str = "SCB";
const LAYOUT: &str = "weight_format";
/// The values of the bytes of nested scales.
const NESTED_VALUES: usize = 256;

/// A type of four bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FourBitKind {
    /// Quantiles of a normal distribution.
    Nf4,
    /// Floats.
    Fp4,
}

impl FourBitKind {
    const ALL: [Self; 2] = [Self::Nf4, Self::Fp4];

    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "NF4",
            Self::Fp4 => "FP4",
        }
    }

    /// In bitsandbytes' names of tensors.
    pub fn key(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }
}

/// What the values of four bits are multiplied with.
#[derive(Clone, Debug)]
pub enum FourBitScales {
    /// Numbers.
    Plain(Vec<f32>),
    /// Numbers that are quantized themselves ("double quantization").
    Nested {
        /// `absmax`: a byte for each scale.
        bytes: TensorEntry,
        /// `nested_quant_map`.
        map: Vec<f32>,
        /// `nested_absmax`.
        scales: Vec<f32>,
        /// `nested_blocksize`.
        block: usize,
        /// `nested_offset`.
        offset: f32,
    },
}

/// The matrix whose numbers a tensor has, if they are quantized.
pub(super) fn place(checkpoint: &Checkpoint, name: &str) -> Result<Option<Place>, FormatError> {
    for kind in FourBitKind::ALL {
        let state = format!("{name}{STATE}{}", kind.key());
        if checkpoint.shape(&state).is_none() {
            continue;
        }
        let shape = State::read(checkpoint, name, kind)?.shape;
        let beside = format!("{name}.");
        let parts = checkpoint.names();
        let parts = parts.filter(|part| part.starts_with(&beside));
        return Ok(Some(Place {
            name: name.to_owned(),
            shape: shape.to_vec(),
            parts: parts.map(str::to_owned).collect(),
        }));
    }
    let Some(module) = name.strip_suffix(".weight") else {
        return Ok(None);
    };
    let scales = format!("{module}.{SCALES}");
    let (Some(_), Some(shape)) = (checkpoint.shape(&scales), checkpoint.shape(name)) else {
        return Ok(None);
    };
    Ok(Some(Place {
        name: name.to_owned(),
        shape: shape.to_vec(),
        parts: vec![scales, format!("{module}.{LAYOUT}")],
    }))
}

/// The tensors of a matrix.
pub(super) fn parts(
    checkpoint: &Checkpoint,
    name: &str,
    shape: &[usize],
) -> Result<PackedParts, FormatError> {
    let main = required(checkpoint, name, name)?;
    let kind = FourBitKind::ALL.into_iter().find(|kind| {
        let state = format!("{name}{STATE}{}", kind.key());
        checkpoint.shape(&state).is_some()
    });
    match kind {
        Some(kind) => four_bit(checkpoint, main, kind),
        None => eight_bit(checkpoint, main, shape),
    }
}

fn four_bit(
    checkpoint: &Checkpoint,
    packed: TensorEntry,
    kind: FourBitKind,
) -> Result<PackedParts, FormatError> {
    let part = |suffix: &str| {
        let name = format!("{}.{suffix}", packed.name);
        required(checkpoint, &packed.name, &name)
    };
    let state = State::read(checkpoint, &packed.name, kind)?;
    let numbers = state.shape[0] * state.shape[1];
    let (expected, found) = (numbers.div_ceil(2), packed.bytes.as_ref().len());
    if expected != found {
        let problem = format!(
            "has {found} bytes, but {numbers} numbers of four bits take {expected}; take another copy"
        );
        return Err(FormatError::tensor(&packed.file, &packed.name, problem));
    }
    let map = floats(&part("quant_map")?, 16)?;
    let absmax = part("absmax")?;
    let count = numbers.div_ceil(state.block);
    let scales = if absmax.dtype == StoredDType::Other("U8") {
        check(&absmax, "U8", count)?;
        let Some((block, offset)) = state.nested else {
            let problem = "is quantized itself, but nested_blocksize and nested_offset are missing in the matrix's quant_state";
            return Err(FormatError::tensor(&absmax.file, &absmax.name, problem));
        };
        FourBitScales::Nested {
            map: floats(&part("nested_quant_map")?, NESTED_VALUES)?,
            scales: floats(&part("nested_absmax")?, count.div_ceil(block))?,
            bytes: absmax,
            block,
            offset,
        }
    } else {
        FourBitScales::Plain(floats(&absmax, count)?)
    };
    Ok(PackedParts::FourBit {
        kind,
        packed,
        map,
        scales,
        block: state.block,
    })
}

fn eight_bit(
    checkpoint: &Checkpoint,
    numbers: TensorEntry,
    shape: &[usize],
) -> Result<PackedParts, FormatError> {
    check(&numbers, "I8", shape.iter().product())?;
    let module = numbers.name.strip_suffix("weight").unwrap_or_default();
    if let Some(layout) = checkpoint.find(&format!("{module}{LAYOUT}"))?
        && layout.bytes.as_ref().iter().any(|byte| *byte != 0)
    {
        let problem = "says another order of the numbers than by rows; save the model again with bitsandbytes 0.45 or later";
        return Err(FormatError::tensor(&layout.file, &layout.name, problem));
    }
    let scales = required(checkpoint, &numbers.name, &format!("{module}{SCALES}"))?;
    let scales = floats(&scales, shape.first().copied().unwrap_or(1))?;
    Ok(PackedParts::EightBit { numbers, scales })
}

/// What a matrix's `quant_state` says, which is JSON in a tensor of bytes.
struct State {
    shape: [usize; 2],
    block: usize,
    /// Scales that share one, and what is added to them, where scales are quantized.
    nested: Option<(usize, f32)>,
}

impl State {
    fn read(checkpoint: &Checkpoint, matrix: &str, kind: FourBitKind) -> Result<Self, FormatError> {
        let entry = required(
            checkpoint,
            matrix,
            &format!("{matrix}{STATE}{}", kind.key()),
        )?;
        let wrong = |problem: String| FormatError::tensor(&entry.file, &entry.name, problem);
        let state: Value = serde_json::from_slice(entry.bytes.as_ref())
            .map_err(|e| wrong(format!("is not JSON: {e}")))?;
        let size = |value: Option<&Value>| {
            let size = value.and_then(Value::as_u64);
            let size = size.and_then(|size| usize::try_from(size).ok());
            size.filter(|size| (1..=1 << 31).contains(size))
        };
        let sizes = state.get("shape").and_then(Value::as_array);
        let shape = sizes.and_then(|sizes| match sizes.as_slice() {
            [rows, cols] => Some([size(Some(rows))?, size(Some(cols))?]),
            _ => None,
        });
        let shape = shape.ok_or_else(|| wrong("has no `shape` of two sizes".to_owned()))?;
        let block = size(state.get("blocksize"));
        let block = block.ok_or_else(|| wrong("has no `blocksize`".to_owned()))?;
        let offset = state.get("nested_offset").and_then(Value::as_f64);
        let offset = offset.map(|offset| offset as f32);
        let nested = size(state.get("nested_blocksize")).zip(offset);
        if nested.is_some_and(|(_, offset)| !offset.is_finite()) {
            return Err(wrong("has a `nested_offset` that is not finite".to_owned()));
        }
        Ok(Self {
            shape,
            block,
            nested,
        })
    }
}

//! The tensors of GPTQ's and AWQ's matrices: `X.qweight`, `X.qzeros`, `X.scales`, and `X.g_idx` where inputs were reordered.

use super::{PackedParts, Place, QuantMethod, check, floats, required};
use crate::FormatError;
use crate::checkpoint::{Checkpoint, TensorEntry};

/// Numbers of a word.
const OF_WORD: usize = 8;

/// The matrix whose `qweight` a tensor is.
pub(super) fn place(
    checkpoint: &Checkpoint,
    method: QuantMethod,
    name: &str,
) -> Result<Option<Place>, FormatError> {
    let Some(module) = name.strip_suffix(".qweight") else {
        return Ok(None);
    };
    let wrong = |problem: String| FormatError::tensor(checkpoint.path(), name, problem);
    let Some([rows, cols]) = checkpoint.shape(name) else {
        return Err(wrong("is not a matrix of words".to_owned()));
    };
    let too_large = || wrong("is too large".to_owned());
    let times = |words: usize| words.checked_mul(OF_WORD).ok_or_else(too_large);
    let (outs, inputs) = match method {
        QuantMethod::Awq => (times(*cols)?, *rows),
        QuantMethod::Gptq { .. } | QuantMethod::Bitsandbytes => (*cols, times(*rows)?),
    };
    // The other number of words would belong to numbers of another size.
    let scales = format!("{module}.scales");
    match checkpoint.shape(&scales) {
        Some([groups, of_scales]) if *of_scales == outs && (1..=inputs).contains(groups) => {}
        other => {
            let found = other.map_or("is missing".to_owned(), |shape| format!("is {shape:?}"));
            return Err(wrong(format!(
                "is {rows} × {cols} words, which are {outs} outputs of {inputs} inputs with four bits each, but `{scales}` {found} and \
                 not [groups, {outs}]; other sizes than four bits are not read"
            )));
        }
    }
    let parts = ["qweight", "qzeros", "scales", "g_idx"];
    Ok(Some(Place {
        name: format!("{module}.weight"),
        shape: vec![outs, inputs],
        parts: parts.map(|part| format!("{module}.{part}")).to_vec(),
    }))
}

/// The tensors of a matrix.
pub(super) fn parts(
    checkpoint: &Checkpoint,
    method: QuantMethod,
    name: &str,
    shape: &[usize],
) -> Result<PackedParts, FormatError> {
    let (module, [outs, inputs]) = match (name.strip_suffix("weight"), shape) {
        (Some(module), [outs, inputs]) => (module, [*outs, *inputs]),
        _ => unreachable!("`place` gives such names and shapes"),
    };
    let part = |suffix: &str| required(checkpoint, name, &format!("{module}{suffix}"));
    let words = part("qweight")?;
    check(&words, "I32", outs * inputs / OF_WORD)?;
    let scales = part("scales")?;
    let groups = scales.shape.first().copied().unwrap_or(1);
    let zeros = part("qzeros")?;
    check(&zeros, "I32", groups * outs.div_ceil(OF_WORD))?;
    let scales = floats(&scales, groups * outs)?;
    let groups = if let Some(order) = checkpoint.find(&format!("{module}g_idx"))? {
        read_groups(&order, inputs, groups)?
    } else {
        let of_group = inputs.div_ceil(groups);
        (0..inputs).map(|input| input / of_group).collect()
    };
    Ok(PackedParts::Grouped {
        method,
        words,
        zeros,
        scales,
        groups,
    })
}

/// `g_idx`: the group of each input.
fn read_groups(
    entry: &TensorEntry,
    inputs: usize,
    groups: usize,
) -> Result<Vec<usize>, FormatError> {
    check(entry, "I32", inputs)?;
    let numbers = entry.bytes.as_ref().as_chunks().0.iter();
    let numbers = numbers.map(|number| i32::from_le_bytes(*number));
    let found: Option<Vec<usize>> = numbers
        .map(|group| usize::try_from(group).ok().filter(|group| *group < groups))
        .collect();
    found.ok_or_else(|| {
        let problem = format!(
            "names a group that is not one of the {groups} that have scales; take another copy"
        );
        FormatError::tensor(&entry.file, &entry.name, problem)
    })
}

//! Values that are not finite, which make every result worthless and would otherwise only show as NaN at the end.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{StoredDType, TensorEntry};
use crate::FormatError;

/// Refuses tensors with a value that is not finite. All such tensors are listed, each with its first such value.
///
/// # Errors
/// The file, the tensors, and where in them.
pub fn check_finite<'a>(
    entries: impl IntoIterator<Item = &'a TensorEntry>,
) -> Result<(), FormatError> {
    check(entries, |entry| entry.first_beyond(F32_INFINITY))
}

/// [`check_finite`] for values that are going to be rounded to bf16: some of the largest of f32 would become infinite.
///
/// # Errors
/// The file, the tensors, and where in them.
pub fn check_finite_as_bf16<'a>(
    entries: impl IntoIterator<Item = &'a TensorEntry>,
) -> Result<(), FormatError> {
    check(entries, |entry| entry.first_beyond(ROUNDS_TO_INFINITY))
}

/// The bits of f32's infinity: a magnitude with these or larger ones is infinite or no number.
const F32_INFINITY: u32 = 0x7F80_0000;
/// The bits of the smallest f32 that bf16 rounds to infinity.
const ROUNDS_TO_INFINITY: u32 = 0x7F7F_8000;

fn check<'a>(
    entries: impl IntoIterator<Item = &'a TensorEntry>,
    first: impl Fn(&TensorEntry) -> Option<usize>,
) -> Result<(), FormatError> {
    let mut found: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
    for entry in entries {
        if let Some(index) = first(entry) {
            let problems = found.entry(entry.file.to_path_buf()).or_default();
            problems.push(entry.describe(index));
        }
    }
    match found.into_iter().next() {
        None => Ok(()),
        Some((path, problems)) => {
            let list = match problems.as_slice() {
                [one] => one.clone(),
                all => format!(
                    "{} tensors are not finite:\n  - {}\n",
                    all.len(),
                    all.join("\n  - ")
                ),
            };
            let end = if problems.len() == 1 { "; " } else { "" };
            let problem = format!("{list}{end}{MEND}");
            Err(FormatError::Malformed { path, problem })
        }
    }
}

const MEND: &str = "these weights cannot be used: the training that wrote them diverged, or the file is damaged; take an earlier checkpoint, \
     or download or train it again";

impl TensorEntry {
    /// The index of the first value whose magnitude has at least these bits as f32.
    fn first_beyond(&self, limit: u32) -> Option<usize> {
        let bytes = self.bytes.as_ref();
        match self.dtype {
            StoredDType::F32 => first(bytes.as_chunks().0, |value: [u8; 4]| {
                u32::from_le_bytes(value) & 0x7FFF_FFFF >= limit
            }),
            // The 16-bit types have no value that only rounding to bf16 would make infinite.
            StoredDType::BF16 => first(bytes.as_chunks().0, |value: [u8; 2]| {
                u16::from_le_bytes(value) & 0x7FFF >= 0x7F80
            }),
            StoredDType::F16 => first(bytes.as_chunks().0, |value: [u8; 2]| {
                u16::from_le_bytes(value) & 0x7FFF >= 0x7C00
            }),
            StoredDType::Other(_) => None,
        }
    }

    /// "`name`: the value at [3, 5] is NaN".
    fn describe(&self, index: usize) -> String {
        let mut place = Vec::new();
        let mut rest = index;
        for &size in self.shape.iter().rev() {
            place.push(rest % size.max(1));
            rest /= size.max(1);
        }
        place.reverse();
        let value = self
            .to_f32()
            .ok()
            .and_then(|values| values.get(index).copied());
        let value = value.map_or_else(
            || "not finite".to_owned(),
            |value| match value {
                value if value.is_nan() => "NaN".to_owned(),
                value if value.is_infinite() => {
                    format!("{}infinity", if value < 0.0 { "-" } else { "" })
                }
                value => format!("{value:e}, which bf16 cannot hold"),
            },
        );
        format!("`{}`: the value at {place:?} is {value}", self.name)
    }
}

/// The index of the first element for which `is_bad` holds. A block is tested as a whole, without a branch for each element, so
/// that compilers make vectors of it.
fn first<const N: usize>(values: &[[u8; N]], is_bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    const BLOCK: usize = 1024;
    let any = |block: &[[u8; N]]| block.iter().fold(false, |any, value| any | is_bad(*value));
    let block = values.chunks(BLOCK).position(any)?;
    let start = block * BLOCK;
    let inside = values[start..].iter().position(|value| is_bad(*value))?;
    Some(start + inside)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use half::{bf16, f16};

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::safetensors_writer::{TensorSpec, write_safetensors};

    fn with(path: &Path, dtype: StoredDType, index: usize, value: f32) -> TensorEntry {
        let spec = TensorSpec {
            name: "w".into(),
            dtype,
            shape: vec![30, 100],
        };
        write_safetensors(path, &[spec], &BTreeMap::new(), |_, out| {
            for at in 0..3000 {
                let value = if at == index { value } else { at as f32 - 5.0 };
                match dtype {
                    StoredDType::F32 => out.write_all(&value.to_le_bytes())?,
                    StoredDType::F16 => out.write_all(&f16::from_f32(value).to_le_bytes())?,
                    _ => out.write_all(&bf16::from_f32(value).to_le_bytes())?,
                }
            }
            Ok(())
        })
        .unwrap();
        Checkpoint::open(path).unwrap().get("w").unwrap()
    }

    #[test]
    fn a_value_that_is_not_finite_is_found_in_every_type() {
        let folder = tempfile::tempdir().unwrap();
        for (number, dtype) in [StoredDType::F32, StoredDType::F16, StoredDType::BF16]
            .into_iter()
            .enumerate()
        {
            for (index, value, shown) in [
                (0, f32::NAN, "[0, 0] is NaN"),
                (1024, -f32::NAN, "[10, 24] is NaN"),
                (2999, f32::INFINITY, "[29, 99] is infinity"),
                (1023, f32::NEG_INFINITY, "[10, 23] is -infinity"),
            ] {
                let path = folder.path().join(format!("{number}-{index}"));
                let entry = with(&path, dtype, index, value);
                let error = check_finite([&entry]).unwrap_err().to_string();
                assert!(
                    error.contains(&format!("`w`: the value at {shown}")),
                    "{error}"
                );
                assert!(error.contains(&path.display().to_string()), "{error}");
                assert!(check_finite_as_bf16([&entry]).is_err());
            }
            let entry = with(&folder.path().join("fine"), dtype, 7, 60_000.0);
            assert!(check_finite([&entry]).is_ok() && check_finite_as_bf16([&entry]).is_ok());
        }
    }

    #[test]
    fn values_that_rounding_makes_infinite_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w");
        for (bits, fits) in [(ROUNDS_TO_INFINITY - 1, true), (ROUNDS_TO_INFINITY, false)] {
            let value = f32::from_bits(bits);
            assert_eq!(bf16::from_f32(value).is_finite(), fits);
            let entry = with(&path, StoredDType::F32, 5, value);
            assert!(check_finite([&entry]).is_ok());
            let checked = check_finite_as_bf16([&entry]).map_err(|error| error.to_string());
            assert_eq!(checked.is_ok(), fits, "{checked:?}");
        }
    }
}

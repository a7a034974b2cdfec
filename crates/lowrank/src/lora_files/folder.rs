//! What combining and pruning have in common: the output folder, the files that go with an adapter, and rounding to what is stored.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lowrank_formats::atomic;
use lowrank_formats::checkpoint::StoredDType;
use lowrank_kernels::Tensor;

use super::{ADAPTER_FILES, LoraFile};
use crate::Error;

/// Files of a tokenizer that stand beside an adapter with rows of tokens.
const TOKENIZER_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
];

/// Refuses an output folder that cannot be written, or must not be replaced, before anything is computed.
///
/// # Errors
/// With `overwrite`, a folder with other files than an adapter's, or that an input lies in.
pub(super) fn check_output(output: &Path, overwrite: bool, inputs: &[&Path]) -> Result<(), Error> {
    if !overwrite || !crate::output::is_taken(output)? {
        return Ok(());
    }
    for input in inputs {
        crate::output::check_apart(output, input)?;
    }
    crate::output::check_replaceable(output, &[ADAPTER_FILES, TOKENIZER_FILES])
}

/// Tokenizer files that these adapters bring: of those with rows of tokens alone, since otherwise nothing reads them.
///
/// # Errors
/// A file that cannot be read; adapters that do not bring the same.
pub(super) fn tokenizer_files(
    adapters: &[(&Path, &LoraFile)],
) -> Result<BTreeMap<&'static str, Vec<u8>>, Error> {
    let mut found: BTreeMap<&'static str, (PathBuf, Vec<u8>)> = BTreeMap::new();
    for (folder, file) in adapters {
        if file.config.trainable_token_indices.is_none() {
            continue;
        }
        for name in TOKENIZER_FILES {
            let path = folder.join(name);
            let bytes = match std::fs::read(&path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io(path)(error)),
            };
            match found.get(name) {
                Some((other, known)) if *known != bytes => {
                    return Err(Error::Settings(format!(
                        "{} and {} are not the same, and an adapter has one tokenizer; combine adapters that were trained with the same added tokens",
                        other.display(),
                        path.display()
                    )));
                }
                Some(_) => {}
                None => {
                    found.insert(name, (path, bytes));
                }
            }
        }
    }
    let files = found.into_iter();
    Ok(files.map(|(name, (_, bytes))| (name, bytes)).collect())
}

/// Writes an adapter's folder as a whole, made by `make` once it is known that it can be written.
///
/// # Errors
/// As `make`; a folder that is there and not to be replaced; a file that cannot be written.
pub(super) fn write<R>(
    output: &Path,
    overwrite: bool,
    dtype: StoredDType,
    make: impl FnOnce() -> Result<(LoraFile, BTreeMap<&'static str, Vec<u8>>, R), Error>,
) -> Result<R, Error> {
    atomic::write_folder(output, overwrite, |folder| {
        let (mut file, beside, report) = make()?;
        file.config.inference_mode = true;
        file.config.peft_version = None;
        file.write(folder, dtype)?;
        for (name, bytes) in beside {
            atomic::write_file(&folder.join(name), |out| out.write_all(&bytes))?;
        }
        Ok(report)
    })
}

/// The numbers that a file of this type holds for these.
pub(super) fn rounded(tensor: Tensor, dtype: StoredDType) -> Tensor {
    let round: fn(f32) -> f32 = match dtype {
        StoredDType::F16 => |value| half::f16::from_f32(value).to_f32(),
        StoredDType::BF16 => |value| half::bf16::from_f32(value).to_f32(),
        _ => return tensor,
    };
    let values = tensor.to_vec().into_iter().map(round).collect();
    Tensor::from_f32(tensor.rows(), tensor.cols(), values)
}

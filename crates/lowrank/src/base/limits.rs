//! What loading a model takes, held against the process's own limits before it begins: the system's own "no" to an allocation
//! can't be answered.

use std::fmt::Display;
use std::fs;
use std::path::Path;

use lowrank_formats::gguf;
use lowrank_kernels::DType;

use super::Source;
use super::builtin::builtin;
use crate::Error;
use crate::machine;
use crate::model::ModelConfig;
use crate::model::weights::with_head_of;
use crate::units;

/// Bytes that reading a tokenizer takes for one of its file; 14 were measured with a vocabulary of 49,152.
const TOKENIZER_FACTOR: u64 = 20;

/// Bytes that loading weights takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadingBytes {
    /// Of the files, which are mapped as a whole.
    pub mapped: u64,
    /// Whether they are mapped already.
    pub is_mapped: bool,
    /// Of weights that are held in another type than the files'.
    pub converted: u64,
}

/// Refuses a GGUF file that cannot be mapped, which reading its header alone would do.
///
/// # Errors
/// A limit that has less left than the file, or all files of its model, are long.
pub(super) fn check_gguf(path: &Path) -> Result<(), Error> {
    refuse_beyond(&path.display(), gguf::file_bytes(path), 0)
}

/// An error where the process's limits have no room for so many bytes.
fn refuse_beyond(model: &dyn Display, mapped: u64, allocated: u64) -> Result<(), Error> {
    machine::check_limits(mapped, allocated).map_err(|(needed, left, bound)| {
        Error::Training(format!(
            "{model}: to load it takes about {}, and {} has {} left; raise the limit, or use a smaller model",
            units::bytes(needed),
            bound.whose(),
            units::bytes(left)
        ))
    })
}

impl Source {
    /// Refuses a model of which the process's limits have no room for this share.
    pub(super) fn check_limits(
        &self,
        config: &ModelConfig,
        dtype: DType,
        share: f64,
    ) -> Result<(), Error> {
        let tokenizer = match self.files() {
            Self::Folder(folder) => {
                fs::metadata(folder.join("tokenizer.json")).map_or(0, |data| data.len())
            }
            // What is no tensor is a vocabulary for the most part.
            Self::Gguf(file) => gguf::file_bytes(file.path()).saturating_sub(file.bytes()),
            Self::Builtin | Self::LoadIn(..) | Self::Grown(_) => return Ok(()),
        };
        let stored = self.tensors()?;
        // What is quantized takes less than config.json alone says.
        let config = with_head_of(config.clone(), &stored)?;
        let mut loading = self.loading_bytes(&config, dtype);
        if loading.converted == 0 {
            loading.converted = stored.reordered_bytes();
        }
        let of_share = |bytes: u64| (bytes as f64 * share) as u64;
        let allocated = of_share(loading.converted) + TOKENIZER_FACTOR * tokenizer;
        let to_map = if loading.is_mapped {
            0
        } else {
            of_share(loading.mapped)
        };
        refuse_beyond(self, to_map, allocated)
    }

    /// What loading the weights takes.
    pub(crate) fn loading_bytes(&self, config: &ModelConfig, dtype: DType) -> LoadingBytes {
        let (mapped, held) = (self.weight_file_bytes(), config.weight_bytes(dtype));
        // Blocks are made of a quantized folder's tensors, however much these resemble them in size.
        let is_made = self.gguf().is_none() && !config.formats.is_empty();
        let is_converted = is_made || mapped.abs_diff(held) > held / 10;
        LoadingBytes {
            mapped,
            is_mapped: self.gguf().is_some(),
            converted: if is_converted { held } else { 0 },
        }
    }

    /// Bytes of the files of weights, as far as they can be looked at.
    fn weight_file_bytes(&self) -> u64 {
        let folder = match self.files() {
            Self::Folder(folder) => folder,
            Self::Gguf(file) => return file.bytes(),
            Self::Builtin | Self::LoadIn(..) | Self::Grown(_) => {
                return builtin("model.safetensors").len() as u64;
            }
        };
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let weights = entries.map(|entry| entry.path()).filter(|path| {
            path.extension()
                .is_some_and(|ending| ending == "safetensors")
        });
        weights
            .filter_map(|path| Some(fs::metadata(path).ok()?.len()))
            .sum()
    }
}

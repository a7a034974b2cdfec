//! Settings that are one of a few words, and what a run writes of its beginning.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Storage of the base's matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum BaseDtype {
    /// 32-bit floats.
    F32,
    /// bfloat16, half the memory.
    ///
    /// It is widened where it is used.
    #[default]
    Bf16,
}

impl From<lowrank_kernels::DType> for BaseDtype {
    fn from(dtype: lowrank_kernels::DType) -> Self {
        match dtype {
            lowrank_kernels::DType::F32 => Self::F32,
            lowrank_kernels::DType::Bf16 => Self::Bf16,
        }
    }
}

impl From<BaseDtype> for lowrank_kernels::DType {
    fn from(dtype: BaseDtype) -> Self {
        match dtype {
            BaseDtype::F32 => Self::F32,
            BaseDtype::Bf16 => Self::Bf16,
        }
    }
}

/// How the factors of a training's products are read (`--compute-dtype`). Sums are f32 always, and evaluation and generation are as exact as
/// f32 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum ComputeFormat {
    /// Rounded to bfloat16, as PyTorch's autocast does, where the processor multiplies that faster.
    ///
    /// That is with AVX512-BF16 or AMX. Other processors read 32-bit floats.
    Bf16,
    /// As the sum of two bfloat16 numbers, where the processor is faster with these.
    ///
    /// That is with AMX. It rounds to 16 bits of the 24.
    Bf16x2,
    /// As 32-bit floats.
    F32,
}

impl ComputeFormat {
    /// The default beside a base that is stored so.
    pub fn beside(base: BaseDtype) -> Self {
        match base {
            BaseDtype::F32 => Self::F32,
            BaseDtype::Bf16 => Self::Bf16,
        }
    }

    /// What it comes to on this processor.
    #[must_use]
    pub fn here(self) -> Self {
        match lowrank_kernels::ComputeDType::from(self).here() {
            lowrank_kernels::ComputeDType::F32 => Self::F32,
            lowrank_kernels::ComputeDType::Bf16x2 => Self::Bf16x2,
            lowrank_kernels::ComputeDType::Bf16 => Self::Bf16,
        }
    }
}

impl std::fmt::Display for ComputeFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::Bf16x2 => "bf16x2",
            Self::F32 => "f32",
        })
    }
}

impl From<ComputeFormat> for lowrank_kernels::ComputeDType {
    fn from(format: ComputeFormat) -> Self {
        match format {
            ComputeFormat::Bf16 => Self::Bf16,
            ComputeFormat::Bf16x2 => Self::Bf16x2,
            ComputeFormat::F32 => Self::F32,
        }
    }
}

/// What a classifier's loss is weighted with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum ClassWeights {
    /// By how rare each label is in the training rows.
    Balanced,
}

/// The shape of the learning rate after the warm-up (`lr_scheduler_type`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum SchedulerType {
    /// Falls linearly to zero.
    ///
    /// It would be zero at the step behind the last.
    #[default]
    Linear,
    /// Falls to zero along half a cosine.
    Cosine,
    /// Stays.
    Constant,
}

/// When and where a run began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Began {
    /// Seconds since 1970. A chat template that writes today's date writes that of this time, also when the run is resumed.
    pub time: i64,
    /// The working folder, which relative paths of the settings start at; `None` where its name is not UTF-8.
    pub folder: Option<PathBuf>,
}

impl Began {
    /// Now and here.
    pub(crate) fn now() -> Self {
        let folder = std::env::current_dir().ok();
        Self {
            time: crate::data::seconds_since_1970(),
            folder: folder.filter(|folder| folder.to_str().is_some()),
        }
    }
}

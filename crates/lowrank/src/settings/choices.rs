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

/// What the blocks keep beside a base that is stored so.
impl From<BaseDtype> for lowrank_kernels::ActivationDType {
    fn from(dtype: BaseDtype) -> Self {
        match dtype {
            BaseDtype::F32 => Self::F32,
            BaseDtype::Bf16 => Self::Bf16,
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

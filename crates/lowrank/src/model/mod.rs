//! The transformer and its families.
//!
//! One configurable block serves every family; a family is a translation of `config.json` and of tensor names.

mod adapter;
mod batch;
mod block;
mod bottleneck;
mod cache;
mod config;
mod decoder;
pub mod families;
mod linear;
pub(crate) mod load_in;
mod magnitude;
mod norm;
mod pass;
mod prefix;
mod relative;
mod rope;
mod saving;
mod scales;
mod stage;
mod storage;
pub mod stored;
mod token_rows;
mod top;
pub(crate) mod weights;

pub use adapter::{
    Adapter, AdapterSet, BottleneckSite, LowRankSite, Reach, SavedModules, ScaleSite,
    TokenRowSites, TokenRows, VirtualSites,
};
pub use batch::{Batch, Scored, VirtualPart, VirtualTokens};
#[cfg(test)]
pub(crate) use block::BlockSaved;
pub use cache::{BLOCK_ROWS, CacheRows, KvCache};
pub use config::{
    Biases, BlockNorm, Classifier, ClassifierDense, EmbeddingScale, Family, HeadKind, LayerConfig,
    LinearId, LinearKind, MlpKind, ModelConfig, NormKind, NormPlacement, Part, Pooling, Position,
    Purpose, QkNorm, QueryScale, RelativeAttention, Rope, RopeScaling, Sublayer, WeightId,
};
pub use decoder::{Decoder, ForeignAdapter, Forward, PassOptions, StageForward};
pub use load_in::LoadIn;
pub(crate) use magnitude::keeps_output;
pub use saving::{Recompute, Saving};
pub(crate) use stage::stages_of_slots;
pub use stage::{Stage, split};
pub use top::{ClassifierSaved, Head, Top};
pub use weights::Weights;

// Of the crate below, what the signatures here mention.
pub use lowrank_kernels::{
    Activation, Arena, HeadWeight, Layout, LogitScaling, OwnRows, RopeOrder, RowClasses, Segment,
    Tensor, View, ViewMut, Weight,
};

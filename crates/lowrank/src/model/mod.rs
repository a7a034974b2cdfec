//! The decoder and its families.
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
mod norm;
mod pass;
mod prefix;
mod saving;
mod scales;
pub(crate) mod weights;

pub use adapter::{
    Adapter, AdapterSet, BottleneckSite, LowRankSite, Reach, ScaleSite, VirtualSites,
};
pub use batch::{Batch, VirtualPart, VirtualTokens};
pub use cache::{BLOCK_ROWS, CacheRows, KvCache};
pub use config::{
    Biases, BlockNorm, Family, LinearId, LinearKind, MlpKind, ModelConfig, NormKind, Part,
    Position, Rope, RopeScaling, Sublayer, WeightId,
};
pub use decoder::{Decoder, ForeignAdapter, Forward, Head, PassOptions};
pub use saving::{Recompute, Saving};
pub use weights::Weights;

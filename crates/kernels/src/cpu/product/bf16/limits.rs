//! What suits a kind of unit, and what products cost there.

use super::{dots, tiles};
use crate::cpu::product::cut::Costs;

/// What suits a kind of unit.
pub(super) struct Limits {
    /// Rows whose left factors are taken apart at once, and steps of them: they stay in the L2 cache.
    pub(super) rows: usize,
    pub(super) depth: usize,
    /// Steps more that there may be, so that a low-rank branch goes with its linear.
    pub(super) slack: usize,
    /// Tiles of columns that are multiplied at once.
    pub(super) together: usize,
}

/// 1.2 MB of left factors of three parts.
pub(super) const TILES: Limits = Limits {
    rows: 256,
    depth: 24,
    slack: 4,
    together: tiles::TOGETHER,
};

/// A panel of 3 tiles of columns stays in the L1 cache.
pub(super) const DOTS: Limits = Limits {
    rows: 1024,
    depth: 12,
    slack: 2,
    together: dots::TOGETHER,
};

/// Of both.
pub(super) const MOST_TOGETHER: usize = 4;

/// What a piece costs with tiles, roughly.
const TILES_COSTS: Costs = Costs {
    pack: 2.4,
    read: 3.3,
    strips: &[
        4096, 3072, 2048, 1536, 1152, 1024, 768, 576, 512, 384, 320, 288, 256, 192, 144, 128, 64,
    ],
};

/// And with dot products.
const DOTS_COSTS: Costs = Costs {
    pack: 1.0,
    read: 1.0,
    strips: &[
        4608, 3072, 2304, 1536, 1152, 1008, 768, 576, 480, 384, 336, 288, 240, 192, 144, 96, 48,
    ],
};

/// What a piece costs here.
pub(crate) fn costs() -> Costs {
    if tiles::supported() {
        TILES_COSTS
    } else {
        DOTS_COSTS
    }
}

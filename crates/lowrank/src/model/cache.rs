//! The KV cache: keys and values of tokens that were read before, in blocks of rows that are handed out and taken back.

use std::ops::Range;

use lowrank_kernels::{Tensor, View};

use super::adapter::Adapter;
use super::config::ModelConfig;

/// Rows of a block. Attention cuts what a row sees at the ends of blocks, and so in the same places wherever the blocks lie.
pub const BLOCK_ROWS: usize = 128;

/// One matrix [blocks · layers · 2 · 128, KV·D]: a block has the keys of its rows in the first layer, their values, the keys in the second, and so on.
/// Which rows belong to whom is told by [`CacheRows`].
///
/// Memory is taken from the system as rows are first written, so blocks that are never used cost nothing. What a block has of all layers lies together, so
/// that the first use of a block waits for that block's memory alone and not, with large pages, for that of many blocks in each layer.
pub struct KvCache {
    values: Tensor,
    num_layers: usize,
    /// Blocks that nobody has. The last one is handed out next: it was in use most recently.
    free: Vec<u32>,
}

/// Rows of a cache that belong together, in blocks that may lie anywhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheRows {
    blocks: Vec<u32>,
    len: usize,
    /// Rows of the cache's matrix from a block to the next.
    stride: usize,
}

impl KvCache {
    /// A cache of so many blocks of [`BLOCK_ROWS`] rows.
    pub fn new(config: &ModelConfig, blocks: usize) -> Self {
        let num_layers = config.num_hidden_layers;
        Self {
            values: Tensor::zeros(blocks * stride(num_layers), config.kv_size()),
            num_layers,
            free: (0..blocks as u32).rev().collect(),
        }
    }

    /// Blocks that so many rows take.
    pub fn blocks_for(rows: usize) -> usize {
        rows.div_ceil(BLOCK_ROWS)
    }

    /// Blocks that nobody has.
    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// So many rows; `None` where there are not enough blocks. They hold what was last written to them.
    pub fn take(&mut self, len: usize) -> Option<CacheRows> {
        let left = self.free.len().checked_sub(Self::blocks_for(len))?;
        let mut blocks = self.free.split_off(left);
        blocks.reverse();
        Some(CacheRows {
            blocks,
            len,
            stride: stride(self.num_layers),
        })
    }

    /// Takes rows back.
    pub fn give(&mut self, rows: CacheRows) {
        self.free.extend(rows.blocks.into_iter().rev());
    }

    /// Writes an adapter's trained keys and values to these rows.
    pub(crate) fn write_prefix(&mut self, adapter: &Adapter, rows: &CacheRows) {
        for (layer, &(k, v)) in adapter.virtual_tokens.key_values.iter().enumerate() {
            let appends: Vec<_> = rows.appends(0, 0..rows.len).collect();
            let values = |slot| adapter.params.view(slot);
            self.append(layer, values(k), values(v), &appends);
        }
    }

    /// The keys and the values of a layer, whose rows lie where [`CacheRows::places`] says.
    pub(crate) fn layer(&self, layer: usize) -> (View<'_>, View<'_>) {
        // Up to the last block's rows of the layer; nothing where there are no blocks.
        let rows = (self.values.rows() + BLOCK_ROWS).saturating_sub(stride(self.num_layers));
        let from = |first: usize| match self.values.rows() {
            0 => self.values.view(),
            _ => self.values.view().slice_rows(first..first + rows),
        };
        let first = 2 * layer * BLOCK_ROWS;
        (from(first), from(first + BLOCK_ROWS))
    }

    /// Writes rows of k and v to their places.
    pub(crate) fn append(
        &mut self,
        layer: usize,
        k: View,
        v: View,
        appends: &[(Range<usize>, usize)],
    ) {
        for (which, new) in [k, v].into_iter().enumerate() {
            let first = (2 * layer + which) * BLOCK_ROWS;
            for (rows, place) in appends {
                let target = first + place..first + place + rows.len();
                let mut target = self.values.view_mut().slice_rows(target);
                target.copy_from(new.slice_rows(rows.clone()));
            }
        }
    }
}

/// Rows of the matrix that a block has.
fn stride(num_layers: usize) -> usize {
    2 * num_layers * BLOCK_ROWS
}

impl CacheRows {
    /// How many they are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds rows behind these, which fill their blocks.
    ///
    /// # Panics
    /// If they do not.
    pub(crate) fn extend(&mut self, more: &Self) {
        assert_eq!(self.len % BLOCK_ROWS, 0, "whole blocks");
        self.blocks.extend(&more.blocks);
        self.len += more.len;
        self.stride = more.stride;
    }

    /// The rows of one whole block of them.
    pub(crate) fn block(&self, at: usize) -> Self {
        Self {
            blocks: vec![self.blocks[at]],
            len: BLOCK_ROWS,
            stride: self.stride,
        }
    }

    /// The rows behind the first `blocks` blocks.
    pub(crate) fn behind(mut self, blocks: usize) -> Self {
        self.blocks.drain(..blocks);
        self.len -= (blocks * BLOCK_ROWS).min(self.len);
        self
    }

    /// Where some of them lie in each layer's matrices of the cache, a range a block.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn places(&self, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> + '_ {
        assert!(rows.end <= self.len, "{rows:?} of {} rows", self.len);
        let mut next = rows.start;
        std::iter::from_fn(move || {
            if next >= rows.end {
                return None;
            }
            let (block, first) = (next / BLOCK_ROWS, next % BLOCK_ROWS);
            let count = (BLOCK_ROWS - first).min(rows.end - next);
            let start = self.blocks[block] as usize * self.stride + first;
            next += count;
            Some(start..start + count)
        })
    }

    /// Where rows of a batch from `first` on are written if they are these: entries of
    /// [`Batch::appends`](super::Batch::appends).
    pub fn appends(
        &self,
        first: usize,
        rows: Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, usize)> + '_ {
        let mut next = first;
        self.places(rows).map(move |place| {
            let rows = next..next + place.len();
            next = rows.end;
            (rows, place.start)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_and_go() {
        let mut cache = KvCache {
            values: Tensor::zeros(4 * stride(1), 2),
            num_layers: 1,
            free: (0..4).rev().collect(),
        };
        let a = cache.take(130).expect("two blocks");
        let b = cache.take(1).expect("one block");
        assert_eq!(cache.take(129), None);
        assert_eq!(cache.free_blocks(), 1);
        assert_eq!(a.places(0..130).collect::<Vec<_>>(), [0..128, 256..258]);
        assert_eq!(b.places(0..1).next(), Some(512..513));
        cache.give(a);
        let mut c = cache.take(300).expect("three blocks");
        // What was given back last is handed out first.
        assert_eq!(
            c.places(100..300).collect::<Vec<_>>(),
            [100..128, 256..384, 768..812]
        );
        let appends: Vec<_> = c.appends(7, 120..140).collect();
        assert_eq!(appends, [(7..15, 120), (15..27, 256)]);
        cache.give(std::mem::take(&mut c));
        cache.give(b);
        assert_eq!((c.len(), cache.free_blocks()), (0, 4));
        assert!(cache.take(0).is_some_and(|rows| rows.is_empty()));
    }

    #[test]
    fn a_layer_has_its_own_keys_and_values() {
        let mut cache = KvCache {
            values: Tensor::zeros(3 * stride(2), 1),
            num_layers: 2,
            free: (0..3).rev().collect(),
        };
        let rows = cache.take(200).expect("two blocks");
        let numbers =
            |from: f32| Tensor::from_f32(200, 1, (0..200).map(|i| from + i as f32).collect());
        let appends: Vec<_> = rows.appends(0, 0..200).collect();
        for layer in 0..2 {
            let (k, v) = (
                numbers(1000.0 * layer as f32),
                numbers(1000.0 * layer as f32 + 500.0),
            );
            cache.append(layer, k.view(), v.view(), &appends);
        }
        for layer in 0..2 {
            let (k, v) = cache.layer(layer);
            let read = |view: View| -> Vec<f32> {
                let places = rows.places(0..200);
                places
                    .flat_map(|place| view.slice_rows(place).to_vec())
                    .collect()
            };
            assert_eq!(read(k), numbers(1000.0 * layer as f32).view().to_vec());
            assert_eq!(
                read(v),
                numbers(1000.0 * layer as f32 + 500.0).view().to_vec()
            );
        }
    }
}

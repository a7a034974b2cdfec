//! What adapters put before their sequences, as rows of the cache: once an adapter, for all sequences that use it.

use std::ops::Range;

use lowrank_kernels::Segment;

use super::PromptIds;
use crate::model::AdapterSet;
use crate::model::{Batch, KvCache, VirtualPart};

/// The first rows of a cache.
pub(super) struct Prefixes {
    all: Vec<Prefix>,
    rows: usize,
}

/// The rows that sequences of one adapter have before their own.
struct Prefix {
    adapter: usize,
    rows: Range<usize>,
    /// Whether they are those of trained embeddings, which a pass computes.
    embedded: bool,
}

impl Prefixes {
    /// Room for what the prompts' adapters put before them.
    pub(super) fn new(adapters: AdapterSet, prompts: &[PromptIds]) -> Self {
        let mut all: Vec<Prefix> = Vec::new();
        let mut rows = 0;
        for adapter in prompts.iter().filter_map(|prompt| prompt.adapter) {
            let tokens = adapters.get(adapter).virtual_tokens();
            let count = tokens.keys + tokens.prefix;
            if count > 0 && all.iter().all(|prefix| prefix.adapter != adapter) {
                all.push(Prefix {
                    adapter,
                    rows: rows..rows + count,
                    embedded: tokens.keys == 0,
                });
                rows += count;
            }
        }
        Self { all, rows }
    }

    /// The first row behind all of them.
    pub(super) fn end(&self) -> usize {
        self.rows
    }

    /// The rows before a sequence's own.
    pub(super) fn before(&self, prompt: &PromptIds) -> Range<usize> {
        let mut all = self.all.iter();
        all.find(|prefix| Some(prefix.adapter) == prompt.adapter)
            .map_or(0..0, |prefix| prefix.rows.clone())
    }

    /// Fills the rows of trained keys and values.
    pub(super) fn write_keys(&self, adapters: AdapterSet, cache: &mut KvCache) {
        for prefix in self.all.iter().filter(|prefix| !prefix.embedded) {
            cache.write_prefix(adapters.get(prefix.adapter), prefix.rows.start);
        }
    }

    /// Adds trained embeddings to the first batch, which holds the prompts too.
    pub(super) fn read_embeddings(&self, batch: &mut Batch) {
        for prefix in self.all.iter().filter(|prefix| prefix.embedded) {
            let rows = batch.tokens()..batch.tokens() + prefix.rows.len();
            batch.ids.resize(rows.end, 0);
            batch.positions.extend(0..rows.len() as u32);
            batch.appends.push((rows.clone(), prefix.rows.start));
            batch.embedded.push((rows.clone(), VirtualPart::Prefix));
            batch.adapters.push((rows.clone(), prefix.adapter));
            batch.segments.push(Segment {
                queries: rows,
                keys: vec![prefix.rows.clone()],
                causal: true,
            });
        }
    }
}

/// Trained embeddings behind a prompt.
pub(super) fn infix(adapters: AdapterSet, prompt: &PromptIds) -> usize {
    let adapter = prompt.adapter.map(|adapter| adapters.get(adapter));
    adapter.map_or(0, |adapter| adapter.virtual_tokens().infix)
}

/// Adds the rows of trained embeddings behind a prompt's.
pub(super) fn read_infix(batch: &mut Batch, count: usize) {
    if count > 0 {
        let rows = batch.tokens()..batch.tokens() + count;
        batch.ids.resize(rows.end, 0);
        batch.embedded.push((rows, VirtualPart::Infix));
    }
}

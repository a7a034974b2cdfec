//! What adapters put before their sequences, as rows of the cache: once an adapter, for all sequences that use it.

use std::ops::Deref;

use super::layout::{Layout, Sight};
use super::session::NoRoom;
use crate::model::{Adapter, CacheRows, KvCache};

/// The prefixes of the adapters that are in use.
pub(super) struct Prefixes<A> {
    all: Vec<Prefix<A>>,
    /// What an adapter without a prefix has.
    nothing: CacheRows,
}

/// The rows that sequences of one adapter have before their own.
struct Prefix<A> {
    adapter: A,
    rows: CacheRows,
    /// Whether the rows are written: trained keys at once, trained embeddings in the first pass that has them.
    is_written: bool,
    /// Sequences that use it.
    users: usize,
}

/// Rows that an adapter puts before its sequences.
pub(super) fn rows_before(adapter: &Adapter) -> usize {
    let tokens = adapter.virtual_tokens();
    tokens.keys + tokens.prefix
}

impl<A: Deref<Target = Adapter> + Clone> Prefixes<A> {
    pub(super) fn new() -> Self {
        Self {
            all: Vec::new(),
            nothing: CacheRows::default(),
        }
    }

    /// Another sequence uses this adapter; nothing happens where that puts nothing before it.
    ///
    /// # Errors
    /// If the cache has no room for its rows, which were not there yet.
    pub(super) fn enter(&mut self, adapter: &A, cache: &mut KvCache) -> Result<(), NoRoom> {
        let len = rows_before(adapter);
        if len == 0 {
            return Ok(());
        }
        if let Some(prefix) = self.all.iter_mut().find(|p| same(&p.adapter, adapter)) {
            prefix.users += 1;
            return Ok(());
        }
        let rows = cache.take(len).ok_or(NoRoom)?;
        let has_keys = adapter.virtual_tokens().keys > 0;
        if has_keys {
            cache.write_prefix(adapter, &rows);
        }
        self.all.push(Prefix {
            adapter: adapter.clone(),
            rows,
            is_written: has_keys,
            users: 1,
        });
        Ok(())
    }

    /// A sequence of this adapter is over.
    pub(super) fn leave(&mut self, adapter: &A, cache: &mut KvCache) {
        let found = self.all.iter().position(|p| same(&p.adapter, adapter));
        let Some(at) = found else { return };
        self.all[at].users -= 1;
        if self.all[at].users == 0 {
            cache.give(self.all.swap_remove(at).rows);
        }
    }

    /// Whether an adapter's prefix is there.
    pub(super) fn has(&self, adapter: &A) -> bool {
        self.all.iter().any(|p| same(&p.adapter, adapter))
    }

    /// What comes before the rows of a sequence of this adapter, which is `index` in the pass's set.
    pub(super) fn sight(&self, adapter: Option<&A>, index: Option<usize>) -> Sight<'_> {
        let prefix = adapter.and_then(|a| self.all.iter().find(|p| same(&p.adapter, a)));
        Sight {
            before: prefix.map_or(&self.nothing, |prefix| &prefix.rows),
            adapter: index,
        }
    }

    /// Adds the rows of an adapter's prefix to a batch unless they are written.
    pub(super) fn write(&mut self, adapter: &A, index: usize, layout: &mut Layout) {
        let mut unwritten = self.all.iter_mut().filter(|p| !p.is_written);
        if let Some(prefix) = unwritten.find(|p| same(&p.adapter, adapter)) {
            layout.push_prefix(&prefix.rows, index);
            prefix.is_written = true;
        }
    }
}

/// Whether two handles are of one adapter.
pub(super) fn same<A: Deref<Target = Adapter>>(a: &A, b: &A) -> bool {
    let (a, b): (&Adapter, &Adapter) = (a, b);
    std::ptr::eq(a, b)
}

//! What adapters put before their sequences, as rows of the cache: once an adapter, for all sequences that use it.

use std::ops::Deref;

use super::session::NoRoom;
use crate::model::{Adapter, CacheRows, KvCache};

/// The prefixes of the adapters that are in use.
pub(super) struct Prefixes<A> {
    all: Vec<Prefix<A>>,
}

/// The rows that sequences of one adapter have before their own.
pub(super) struct Prefix<A> {
    pub(super) adapter: A,
    pub(super) rows: CacheRows,
    /// Whether the rows are written: trained keys at once, trained embeddings in the first pass that has them.
    pub(super) is_written: bool,
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
        Self { all: Vec::new() }
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

    /// That of an adapter, if it has one.
    pub(super) fn of(&self, adapter: &A) -> Option<&Prefix<A>> {
        self.all.iter().find(|p| same(&p.adapter, adapter))
    }

    /// Says that the rows of an adapter's prefix are written.
    pub(super) fn set_written(&mut self, adapter: &Adapter) {
        let found = self.all.iter_mut().find(|p| same_as(&p.adapter, adapter));
        if let Some(prefix) = found {
            prefix.is_written = true;
        }
    }
}

/// Whether two handles are of one adapter.
pub(super) fn same<A: Deref<Target = Adapter>>(a: &A, b: &A) -> bool {
    same_as(a, b)
}

fn same_as(a: &Adapter, b: &Adapter) -> bool {
    std::ptr::eq(a, b)
}

//! Prompts that were read before: whole blocks of the cache, found by what they hold.
//!
//! A block is known by the request's key, by everything that the prompt had before it, and by its own tokens, all of which are compared in
//! full, so that a block is never taken for another. Blocks of sequences that go on are shared; others stay until their
//! room is needed, those that were used longest ago going first. Only prompts are kept: what is generated is computed as
//! a row of another class, with bits of its own.

use std::collections::HashMap;

use crate::model::{BLOCK_ROWS, CacheRows, KvCache};

/// What a prompt's keys and values depend on beside its tokens: the adapter by its content, and whatever keeps callers apart.
pub type CacheKey = u128;

/// The blocks that are kept.
#[derive(Default)]
pub(super) struct SharedBlocks {
    nodes: HashMap<u64, Node>,
    /// A block by the one before it and its own tokens.
    places: HashMap<(Before, Box<[u32]>), u64>,
    next: u64,
    /// Counts uses, so that the one used longest ago is known.
    clock: u64,
}

/// What stands before a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Before {
    Nothing(CacheKey),
    Block(u64),
}

struct Node {
    rows: CacheRows,
    place: (Before, Box<[u32]>),
    /// Sequences that use it.
    users: usize,
    /// Blocks that come after it.
    followers: usize,
    last_used: u64,
}

/// The shared blocks that a sequence begins with.
#[derive(Debug)]
pub(super) struct Shared {
    /// `None`: nothing of the sequence is shared.
    key: Option<CacheKey>,
    nodes: Vec<u64>,
}

impl Shared {
    /// Nothing yet.
    pub(super) fn new(key: Option<CacheKey>) -> Self {
        Self {
            key,
            nodes: Vec::new(),
        }
    }

    /// Rows that it covers.
    pub(super) fn rows(&self) -> usize {
        self.nodes.len() * BLOCK_ROWS
    }

    fn before(&self) -> Option<Before> {
        match self.nodes.last() {
            Some(node) => Some(Before::Block(*node)),
            None => self.key.map(Before::Nothing),
        }
    }
}

impl SharedBlocks {
    /// The longest known beginning of a prompt, of which a last token is left to read. It is in use from now on.
    pub(super) fn enter(&mut self, key: CacheKey, prompt: &[u32]) -> Shared {
        let mut shared = Shared::new(Some(key));
        let whole = prompt.len().saturating_sub(1) / BLOCK_ROWS;
        for tokens in prompt.chunks_exact(BLOCK_ROWS).take(whole) {
            let before = shared.before();
            match before.and_then(|before| self.places.get(&(before, tokens.into()))) {
                Some(node) => shared.nodes.push(*node),
                None => break,
            }
        }
        self.clock += 1;
        for node in &shared.nodes {
            if let Some(node) = self.nodes.get_mut(node) {
                node.users += 1;
                node.last_used = self.clock;
            }
        }
        shared
    }

    /// The rows of the cache that shared blocks are.
    pub(super) fn rows_of(&self, shared: &Shared) -> CacheRows {
        let mut rows = CacheRows::default();
        for node in shared.nodes.iter().filter_map(|node| self.nodes.get(node)) {
            rows.extend(&node.rows);
        }
        rows
    }

    /// Shares the whole blocks of a prompt that was read: `rows` are those of its sequence, the first of which are `shared`. What is known by
    /// now from elsewhere stays the sequence's own.
    pub(super) fn share(&mut self, shared: &mut Shared, prompt: &[u32], rows: &CacheRows) {
        let blocks = prompt.chunks_exact(BLOCK_ROWS).enumerate();
        for (at, tokens) in blocks.skip(shared.nodes.len()) {
            let Some(before) = shared.before() else {
                return;
            };
            let place = (before, Box::from(tokens));
            if self.places.contains_key(&place) {
                return;
            }
            let id = self.next;
            self.next += 1;
            if let Before::Block(before) = place.0
                && let Some(before) = self.nodes.get_mut(&before)
            {
                before.followers += 1;
            }
            self.places.insert(place.clone(), id);
            let node = Node {
                rows: rows.block(at),
                place,
                users: 1,
                followers: 0,
                last_used: self.clock,
            };
            self.nodes.insert(id, node);
            shared.nodes.push(id);
        }
    }

    /// A sequence no longer uses its shared blocks, which stay.
    pub(super) fn leave(&mut self, shared: &Shared) {
        for node in &shared.nodes {
            if let Some(node) = self.nodes.get_mut(node) {
                node.users -= 1;
            }
        }
    }

    /// All blocks.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Blocks that nobody uses now.
    pub(super) fn idle(&self) -> usize {
        self.nodes.values().filter(|node| node.users == 0).count()
    }

    /// Gives blocks back to the cache until that has `free` of them or none is idle.
    pub(super) fn make_room(&mut self, free: usize, cache: &mut KvCache) {
        while cache.free_blocks() < free {
            let idle = |node: &Node| node.users == 0 && node.followers == 0;
            let nodes = self.nodes.iter().filter(|(_, node)| idle(node));
            let Some(oldest) = nodes.min_by_key(|(id, node)| (node.last_used, **id)) else {
                return;
            };
            let id = *oldest.0;
            self.forget(id, cache);
        }
    }

    /// Gives back all blocks of a key that nobody uses.
    pub(super) fn drop_key(&mut self, key: CacheKey, cache: &mut KvCache) {
        let mut of_key: Vec<u64> = Vec::new();
        let mut ids: Vec<u64> = self.nodes.keys().copied().collect();
        // A block is newer than what stands before it.
        ids.sort_unstable();
        for id in ids {
            let belongs = match self.nodes.get(&id).map(|node| node.place.0) {
                Some(Before::Nothing(own)) => own == key,
                Some(Before::Block(before)) => of_key.binary_search(&before).is_ok(),
                None => false,
            };
            if belongs {
                of_key.push(id);
            }
        }
        for id in of_key.into_iter().rev() {
            let idle = |node: &Node| node.users == 0 && node.followers == 0;
            if self.nodes.get(&id).is_some_and(idle) {
                self.forget(id, cache);
            }
        }
    }

    fn forget(&mut self, id: u64, cache: &mut KvCache) {
        let Some(node) = self.nodes.remove(&id) else {
            return;
        };
        self.places.remove(&node.place);
        if let Before::Block(before) = node.place.0
            && let Some(before) = self.nodes.get_mut(&before)
        {
            before.followers -= 1;
        }
        cache.give(node.rows);
    }
}

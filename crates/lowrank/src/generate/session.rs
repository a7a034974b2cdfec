//! Sequences that come and go between the steps of one decoding session.
//!
//! A step reads the prompts that were admitted, or pieces of them, and the last token of every sequence that goes on, all in one
//! batch, and makes a token for each. Every sequence has its own adapter or none, its own options and its own seed, and its rows of the cache, which it
//! gives back when it ends. Adapters that replace base weights act on every row of a batch, so they have batches of their own.

use std::ops::Deref;

use lowrank_kernels::{Tensor, Workspace, all_finite, argmax_rows};

use super::beams::{BeamOptions, Search};
use super::constraint::Constraint;
use super::layout::{Layout, Prompt};
use super::logprobs::{LogProbs, Token};
use super::prefixes::{Prefixes, rows_before, same};
use super::sequence::Sequence;
use super::shared::{CacheKey, Shared, SharedBlocks};
use super::{Continuation, Finish, GenerateOptions};
use crate::model::{Adapter, AdapterSet, Decoder, KvCache};

/// What is asked of a session.
#[derive(Clone, Debug)]
pub struct Request<A> {
    /// Token ids of the prompt; nothing is made of none.
    pub prompt: Vec<u32>,
    /// The adapter; `None`: the base alone.
    pub adapter: Option<A>,
    /// How it goes on.
    pub search: Strategy,
    /// Which log-probabilities are wanted; a beam search gives none.
    pub log_probs: LogProbs,
    /// What the prompt's keys and values depend on beside its tokens: the adapter by its content, and a salt where callers are to be kept
    /// apart. Prompts of one key that begin alike share what was computed of them, which changes no bit; `None`: nothing is shared. A beam
    /// search shares nothing.
    pub cache_key: Option<CacheKey>,
}

impl<A> Request<A> {
    /// A request for tokens alone, which shares nothing.
    pub fn new(prompt: impl Into<Vec<u32>>, adapter: Option<A>, search: Strategy) -> Self {
        Self {
            prompt: prompt.into(),
            adapter,
            search,
            log_probs: LogProbs::default(),
            cache_key: None,
        }
    }
}

/// How a prompt is continued.
#[derive(Clone, Debug, PartialEq)]
pub enum Strategy {
    /// Token by token.
    Sample(GenerateOptions),
    /// By beam search.
    Beams(BeamOptions),
}

/// A request's name in its session; no other has it later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(u64);

/// What a step did for a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    /// The request.
    pub id: RequestId,
    /// Tokens of the prompt that were read, with their log-probabilities; none unless those were asked for.
    pub read: Vec<Token>,
    /// The token that follows, if one does: a stop token is none, and a beam search gives all at its end.
    pub token: Option<Token>,
    /// What the request came to, if it is over.
    pub finished: Option<Continuation>,
}

/// A request that the cache has no room for now: some that are under way have to end before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cache has no room for another sequence of this length until others end")]
pub struct NoRoom;

/// A session. `A` is a handle of an adapter: `&Adapter`, or `Arc<Adapter>` where adapters outlive whoever loaded them.
pub struct Decoding<'m, A> {
    model: &'m Decoder,
    ws: &'m Workspace,
    cache: KvCache,
    prefixes: Prefixes<A>,
    shared: SharedBlocks,
    requests: Vec<Entry<A>>,
    /// Those that were over before a step.
    ended: Vec<Made>,
    next: u64,
    prompt_rows: usize,
}

/// A request under way.
struct Entry<A> {
    id: RequestId,
    adapter: Option<A>,
    work: Work,
}

enum Work {
    Sample(Box<Sequence>),
    Beams(Box<Search>),
}

/// A request whose logits come out of a pass.
struct Part {
    index: usize,
    /// Rows of them.
    rows: usize,
    /// The first row of the prompt that the pass has read, if it has.
    first: Option<usize>,
}

/// What a request needs.
enum Plan {
    Sample(Prompt, GenerateOptions, usize),
    Beams(Prompt, BeamOptions, usize),
}

impl<'m, A: Deref<Target = Adapter> + Clone> Decoding<'m, A> {
    /// A session with a cache of so many blocks of [`BLOCK_ROWS`](crate::model::BLOCK_ROWS) rows.
    pub fn new(model: &'m Decoder, blocks: usize, ws: &'m Workspace) -> Self {
        Self {
            model,
            ws,
            cache: KvCache::new(model.config(), blocks),
            prefixes: Prefixes::new(),
            shared: SharedBlocks::default(),
            requests: Vec::new(),
            ended: Vec::new(),
            next: 0,
            prompt_rows: usize::MAX,
        }
    }

    /// A session whose cache has room for all of these requests at once.
    pub fn with_room_for(model: &'m Decoder, requests: &[Request<A>], ws: &'m Workspace) -> Self {
        let mut adapters: Vec<&A> = Vec::new();
        let mut blocks = 0;
        for request in requests {
            blocks += plan(model, request).map_or(0, |plan| plan.blocks());
            if let Some(adapter) = &request.adapter
                && !adapters.iter().any(|known| same(*known, adapter))
            {
                adapters.push(adapter);
                blocks += KvCache::blocks_for(rows_before(adapter));
            }
        }
        Self::new(model, blocks, ws)
    }

    /// Lets a step read so many tokens of prompts at most, so that a long prompt does not hold up the sequences that go on. What
    /// is made does not depend on it.
    #[must_use]
    pub fn with_prompt_rows(mut self, rows: usize) -> Self {
        self.set_prompt_rows(rows);
        self
    }

    /// The same between steps.
    pub fn set_prompt_rows(&mut self, rows: usize) {
        self.prompt_rows = rows.max(1);
    }

    /// Takes up a request. It has all rows of the cache that it may need until it ends.
    ///
    /// # Errors
    /// If the cache has not so many left.
    pub fn admit(&mut self, request: Request<A>) -> Result<RequestId, NoRoom> {
        let id = RequestId(self.next);
        let plan = match plan(self.model, &request) {
            Ok(plan) => plan,
            Err(finish) => {
                let ids = Vec::new();
                self.next += 1;
                self.ended.push(Made {
                    id,
                    read: Vec::new(),
                    token: None,
                    finished: Some(Continuation { ids, finish }),
                });
                return Ok(id);
            }
        };
        let log_probs = request.log_probs;
        let shared = match (&plan, request.cache_key) {
            // The log-probabilities of a prompt take all of its rows.
            (Plan::Sample(prompt, ..), Some(key)) if !log_probs.prompt => {
                self.shared.enter(key, &prompt.ids)
            }
            (_, key) => Shared::new(key),
        };
        let adapter = request.adapter;
        let prefix = match &adapter {
            Some(adapter) if !self.prefixes.has(adapter) => {
                KvCache::blocks_for(rows_before(adapter))
            }
            _ => 0,
        };
        let blocks = plan.blocks() - KvCache::blocks_for(shared.rows()) + prefix;
        if blocks > self.free_blocks() {
            self.shared.leave(&shared);
            return Err(NoRoom);
        }
        self.shared.make_room(blocks, &mut self.cache);
        if let Some(adapter) = &adapter {
            self.prefixes.enter(adapter, &mut self.cache)?;
        }
        let mut take = |rows| self.cache.take(rows).ok_or(NoRoom);
        let work = match plan {
            Plan::Sample(mut prompt, options, len) => {
                let mut rows = self.shared.rows_of(&shared);
                rows.extend(&take(len - rows.len())?);
                prompt.skip(shared.rows());
                let sequence = Sequence::new(prompt, options, log_probs, rows, shared);
                Work::Sample(Box::new(sequence))
            }
            Plan::Beams(prompt, options, most) => {
                let rows = take(prompt.len())?;
                let slots = (0..options.num_beams).map(|_| take(most - 1));
                let slots = slots.collect::<Result<_, _>>()?;
                Work::Beams(Box::new(Search::new(prompt, options, most, rows, slots)))
            }
        };
        self.next += 1;
        self.requests.push(Entry { id, adapter, work });
        Ok(id)
    }

    /// Lets the text of a request that was just admitted follow a grammar; a beam search follows none.
    pub fn constrain(&mut self, id: RequestId, grammar: Box<dyn Constraint>) {
        let entry = self.requests.iter_mut().find(|entry| entry.id == id);
        if let Some(Work::Sample(sequence)) = entry.map(|entry| &mut entry.work) {
            sequence.constraint = Some(grammar);
        }
    }

    /// How many tokens of a request's prompt were computed for others before; `None` if it is over.
    pub fn cached_tokens(&self, id: RequestId) -> Option<usize> {
        let entry = self.requests.iter().find(|entry| entry.id == id)?;
        Some(match &entry.work {
            Work::Sample(sequence) => sequence.cached,
            Work::Beams(_) => 0,
        })
    }

    /// Gives back what is kept of prompts of this key, but for what requests under way use.
    pub fn forget(&mut self, key: CacheKey) {
        self.shared.drop_key(key, &mut self.cache);
    }

    /// Takes a request out, with what was made of it until now; `None` if it is over, or never was.
    pub fn remove(&mut self, id: RequestId) -> Option<Continuation> {
        let at = self.requests.iter().position(|entry| entry.id == id)?;
        let mut entry = self.requests.remove(at);
        let continuation = match &mut entry.work {
            Work::Sample(sequence) => sequence.end(Finish::Cancelled),
            Work::Beams(search) => Continuation {
                finish: Finish::Cancelled,
                ..search.end()
            },
        };
        self.give_back(entry);
        Some(continuation)
    }

    /// Requests that are under way.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether a step would do nothing.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty() && self.ended.is_empty()
    }

    /// Blocks of the cache that no request under way has.
    pub fn free_blocks(&self) -> usize {
        self.cache.free_blocks() + self.shared.idle()
    }

    /// Blocks of prompts that are kept for later ones, in use or not.
    pub fn kept_blocks(&self) -> usize {
        self.shared.len()
    }

    /// One step for every request under way, in the order in which they were admitted. A request whose prompt is not read to its end
    /// yet is not among what was made.
    pub fn step(&mut self) -> Vec<Made> {
        let mut made = std::mem::take(&mut self.ended);
        for members in self.passes() {
            self.pass(&members, &mut made);
        }
        made.sort_by_key(|made| made.id);
        for made in made.iter().filter(|made| made.finished.is_some()) {
            if let Some(at) = self.requests.iter().position(|entry| entry.id == made.id) {
                let entry = self.requests.remove(at);
                self.give_back(entry);
            }
        }
        made
    }

    /// Which requests are computed together: all but those whose adapters replace base weights, each of which has a pass of its
    /// own.
    fn passes(&self) -> Vec<Vec<usize>> {
        let mut together = Vec::new();
        let mut others: Vec<(&A, Vec<usize>)> = Vec::new();
        for (index, entry) in self.requests.iter().enumerate() {
            match entry.adapter.as_ref().filter(|a| !a.goes_with_others()) {
                None => together.push(index),
                Some(adapter) => match others.iter_mut().find(|(a, _)| same(*a, adapter)) {
                    Some((_, members)) => members.push(index),
                    None => others.push((adapter, vec![index])),
                },
            }
        }
        let others = others.into_iter().map(|(_, members)| members);
        let all = std::iter::once(together).chain(others);
        all.filter(|members| !members.is_empty()).collect()
    }

    fn pass(&mut self, members: &[usize], made: &mut Vec<Made>) {
        let handles = self.adapters_of(members);
        let adapters: Vec<&Adapter> = handles.iter().map(|adapter| &**adapter).collect();
        let mut layout = Layout::default();
        let order = self.lay_out(members, &handles, &mut layout);
        let Layout { batch, wanted } = layout;
        let set = AdapterSet::new(&adapters);
        let cache = Some(&mut self.cache);
        let logits = self.model.logits(&batch, set, &wanted, cache, self.ws);
        self.advance(&order, &logits, made);
        self.ws.give(logits);
    }

    /// The adapters of some requests, each once.
    fn adapters_of(&self, members: &[usize]) -> Vec<A> {
        let mut adapters: Vec<A> = Vec::new();
        for adapter in members
            .iter()
            .filter_map(|i| self.requests[*i].adapter.as_ref())
        {
            if !adapters.iter().any(|known| same(known, adapter)) {
                adapters.push(adapter.clone());
            }
        }
        adapters
    }

    /// Puts what is read next into a batch: prompts, then new tokens. Gives the requests whose logits come out, in that order.
    fn lay_out(&mut self, members: &[usize], adapters: &[A], layout: &mut Layout) -> Vec<Part> {
        let Self {
            requests, prefixes, ..
        } = self;
        let index_of = |adapter: &A| adapters.iter().position(|known| same(known, adapter));
        let mut order = Vec::new();
        let mut left = self.prompt_rows;
        for &index in members {
            let Entry { adapter, work, .. } = &mut requests[index];
            if !work.prompt().is_unread() || left == 0 {
                continue;
            }
            let at = adapter.as_ref().and_then(index_of);
            if let (Some(adapter), Some(at)) = (&*adapter, at) {
                prefixes.write(adapter, at, layout);
            }
            let sight = prefixes.sight(adapter.as_ref(), at);
            let first = work.prompt().filled();
            let (read, every) = match work {
                Work::Sample(sequence) => {
                    let (rows, every) = (&sequence.rows, sequence.log_probs.prompt);
                    let read = sequence.prompt.read(layout, &sight, rows, (left, every));
                    (read, every)
                }
                Work::Beams(search) => {
                    let (prompt, rows) = (&mut search.prompt, &search.rows);
                    (prompt.read(layout, &sight, rows, (left, false)), false)
                }
            };
            left = left.saturating_sub(read);
            if every || !work.prompt().is_unread() {
                order.push(Part {
                    index,
                    rows: if every { read } else { 1 },
                    first: Some(first),
                });
            }
        }
        let first = layout.batch.tokens();
        let prompts: Vec<usize> = order.iter().map(|part| part.index).collect();
        let mut going_on: Vec<(Option<usize>, usize)> = members
            .iter()
            .filter(|i| !requests[**i].work.prompt().is_unread() && !prompts.contains(i))
            .map(|&i| (requests[i].adapter.as_ref().and_then(index_of), i))
            .collect();
        // Rows of one adapter side by side are one branch.
        going_on.sort_unstable();
        for (at, index) in going_on {
            let Entry { adapter, work, .. } = &requests[index];
            let sight = prefixes.sight(adapter.as_ref(), at);
            let rows = match work {
                Work::Sample(sequence) => {
                    sequence.read_token(layout, &sight);
                    1
                }
                Work::Beams(search) => {
                    search.read_tokens(layout, &sight);
                    search.beams()
                }
            };
            order.push(Part {
                index,
                rows,
                first: None,
            });
        }
        layout.batch.generated = layout.batch.tokens() - first;
        order
    }

    /// Goes on with every request after its rows of the logits.
    fn advance(&mut self, order: &[Part], logits: &Tensor, made: &mut Vec<Made>) {
        let finite = all_finite(logits.view());
        let greedy = order
            .iter()
            .any(|part| match &self.requests[part.index].work {
                Work::Sample(sequence) => sequence.is_greedy(),
                Work::Beams(_) => false,
            });
        let largest = if greedy {
            argmax_rows(logits.view())
        } else {
            Vec::new()
        };
        let mut end = 0;
        for part in order {
            let own = logits.view().slice_rows(end..end + part.rows);
            end += part.rows;
            let best = largest.get(end - 1).copied();
            let Entry { id, work, .. } = &mut self.requests[part.index];
            let mut one = Made {
                id: *id,
                read: Vec::new(),
                token: None,
                finished: None,
            };
            match work {
                // NaN and ∞ come of a calculation that overflowed.
                Work::Sample(sequence) if !finite && !all_finite(own) => {
                    one.finished = Some(sequence.end(Finish::NotFinite));
                }
                Work::Sample(sequence) => {
                    let advanced = sequence.advance(own, part.first, best);
                    (one.read, one.token) = (advanced.read, advanced.token);
                    one.finished = advanced.finish.map(|finish| sequence.end(finish));
                }
                Work::Beams(search) => {
                    search.advance(own);
                    one.finished = search.is_done().then(|| search.end());
                }
            }
            if let Work::Sample(sequence) = work
                && part.first.is_some()
            {
                let Sequence {
                    prompt,
                    rows,
                    shared,
                    ..
                } = &mut **sequence;
                let read = &prompt.ids[..prompt.filled().min(prompt.ids.len())];
                self.shared.share(shared, read, rows);
            }
            if one != Made::nothing(*id) {
                made.push(one);
            }
        }
    }

    fn give_back(&mut self, entry: Entry<A>) {
        match entry.work {
            Work::Sample(sequence) => {
                let Sequence { rows, shared, .. } = *sequence;
                let blocks = KvCache::blocks_for(shared.rows());
                self.shared.leave(&shared);
                self.cache.give(rows.behind(blocks));
            }
            Work::Beams(search) => {
                for rows in std::iter::once(search.rows).chain(search.slots) {
                    self.cache.give(rows);
                }
            }
        }
        if let Some(adapter) = &entry.adapter {
            self.prefixes.leave(adapter, &mut self.cache);
        }
    }
}

impl Made {
    fn nothing(id: RequestId) -> Self {
        Self {
            id,
            read: Vec::new(),
            token: None,
            finished: None,
        }
    }
}

impl Work {
    fn prompt(&self) -> &Prompt {
        match self {
            Self::Sample(sequence) => &sequence.prompt,
            Self::Beams(search) => &search.prompt,
        }
    }
}

impl Plan {
    /// Blocks of the cache that it takes, those of its adapter's prefix left out.
    fn blocks(&self) -> usize {
        match self {
            Self::Sample(_, _, rows) => KvCache::blocks_for(*rows),
            Self::Beams(prompt, options, most) => {
                KvCache::blocks_for(prompt.len())
                    + options.num_beams * KvCache::blocks_for(most - 1)
            }
        }
    }
}

/// What a request needs, or why it is over before it began.
fn plan<A: Deref<Target = Adapter>>(model: &Decoder, request: &Request<A>) -> Result<Plan, Finish> {
    let context = model.config().max_position_embeddings;
    let adapter = request.adapter.as_deref();
    let infix = adapter.map_or(0, |adapter| adapter.virtual_tokens().infix);
    let prompt = Prompt::new(request.prompt.clone(), infix);
    let before = adapter.map_or(0, rows_before);
    let limit = context.saturating_sub(before);
    let asked = match &request.search {
        Strategy::Sample(options) => options.max_new_tokens,
        Strategy::Beams(options) => options.max_new_tokens.min(options.num_beams),
    };
    if asked == 0 && !request.log_probs.prompt || request.prompt.is_empty() {
        return Err(Finish::Length);
    }
    if prompt.len() > limit {
        return Err(Finish::ContextFull);
    }
    Ok(match &request.search {
        Strategy::Sample(options) => {
            let rows = Sequence::rows_for(&prompt, limit, options);
            Plan::Sample(prompt, options.clone(), rows)
        }
        Strategy::Beams(options) => {
            let most = Search::most_tokens(prompt.len(), limit, options);
            Plan::Beams(prompt, options.clone(), most)
        }
    })
}

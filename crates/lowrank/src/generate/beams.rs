//! Beam search: of every prompt the likeliest continuations so far go on together.
//!
//! As in transformers with `early_stopping=False`. In each step the candidates are the beams, each with any token; a
//! candidate's score is the sum of its tokens' log-probabilities. Those among the `num_beams` best that end with a stop token
//! are finished, and the best that do not are the next beams. A finished continuation of g tokens, its stop token
//! included, is worth score / g^length_penalty, and the `num_beams` most worthy are kept. A prompt is done when there are
//! that many and the best beam, divided in the same way, is not better than the worst of them, or after `max_new_tokens`, when
//! the beams that are left count as finished.
//!
//! Nothing is copied when beams part. A step writes the keys and values of beam `s` to row `step` of slot `s` of the cache,
//! which is never written again. A beam that goes on keeps its slot where it can; otherwise it takes a free one, and remembers
//! which steps of which slots it came by. So it reads the prompt's rows, which all share, and a few ranges. Virtual tokens before
//! a prompt are rows that all prompts of their adapter share, and those behind it are rows of the prompt.

use std::ops::Range;

use lowrank_kernels::{Segment, View, Workspace, all_finite};
use rayon::prelude::*;

use super::prefixes::{Prefixes, infix, read_infix};
use super::repeats::ban_repeats;
use super::{Continuation, Finish, PromptIds};
use crate::model::AdapterSet;
use crate::model::{Batch, Decoder, KvCache};

/// How beams are searched.
#[derive(Clone, Debug, PartialEq)]
pub struct BeamOptions {
    /// Continuations that go on together; 1 is greedy, except that a text may be better the sooner it stops.
    pub num_beams: usize,
    /// Scores are divided by length to this power: 0 favours short texts, more favours longer ones.
    pub length_penalty: f32,
    /// New tokens at most.
    pub max_new_tokens: usize,
    /// No run of so many tokens comes twice, the prompt's included; 0: any may.
    pub no_repeat_ngram_size: usize,
    /// A sequence ends with any of these; the token itself is not returned.
    pub stop_ids: Vec<u32>,
}

/// A continuation that goes on.
#[derive(Clone, Default)]
struct Beam {
    /// Sum of the tokens' log-probabilities.
    score: f32,
    made: Vec<u32>,
    slot: usize,
    /// Where its tokens' keys are: slots and steps, in order.
    path: Vec<(usize, Range<usize>)>,
}

/// The search of one prompt.
struct Search<'a> {
    prompt: &'a PromptIds,
    /// Rows of the cache that are its adapter's.
    before: Range<usize>,
    /// Rows of the cache that are the prompt's, an infix with it.
    rows: Range<usize>,
    /// New tokens at most, as far as the context reaches.
    most: usize,
    beams: Vec<Beam>,
    finished: Vec<(f32, Continuation)>,
}

/// A token that could follow a beam.
#[derive(Clone, Copy)]
struct Candidate {
    score: f32,
    beam: usize,
    token: u32,
}

/// Continues every prompt with its best beam, all together in one batch.
pub fn beam_search(
    model: &Decoder,
    adapters: AdapterSet,
    prompts: &[PromptIds],
    options: &BeamOptions,
    ws: &Workspace,
) -> Vec<Continuation> {
    let limit = model.config().max_position_embeddings;
    let prefixes = Prefixes::new(adapters, prompts);
    let mut rows = prefixes.end();
    let mut searches: Vec<Search> = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let before = prefixes.before(prompt);
        let own = prompt.ids.len() + infix(adapters, prompt);
        // The last token is not read, so it may be one more than there are places.
        let room = (limit + 1).saturating_sub(before.len() + own);
        let most = if prompt.ids.is_empty() || options.num_beams == 0 {
            0
        } else {
            options.max_new_tokens.min(room)
        };
        let search = Search {
            prompt,
            before,
            rows: rows..rows + own,
            most,
            beams: vec![Beam::default(); usize::from(most > 0)],
            finished: Vec::new(),
        };
        if most > 0 {
            rows += own + options.num_beams * (most - 1);
        }
        searches.push(search);
    }
    let mut cache = KvCache::new(model.config(), rows);
    prefixes.write_keys(adapters, &mut cache);
    let mut first = Some(prefixes);
    while searches.iter().any(|search| !search.beams.is_empty()) {
        let mut batch = Batch::default();
        let mut last_rows = Vec::new();
        if let Some(prefixes) = first.take() {
            prefixes.read_embeddings(&mut batch);
        }
        for search in &searches {
            search.read(&mut batch, &mut last_rows);
        }
        let logits = model.logits(&batch, adapters, &last_rows, Some(&mut cache), ws);
        let mut row = 0;
        for search in &mut searches {
            let beams = search.beams.len();
            search.advance(logits.view().slice_rows(row..row + beams), options);
            row += beams;
        }
        ws.give(logits);
    }
    searches
        .into_iter()
        .map(|search| {
            let all_there = options.max_new_tokens == 0 || search.prompt.ids.is_empty();
            let nothing = || Continuation {
                ids: Vec::new(),
                finish: if all_there || search.most > 0 {
                    Finish::Length
                } else {
                    Finish::ContextFull
                },
            };
            let best = search.finished.into_iter().next();
            best.map_or_else(nothing, |(_, continuation)| continuation)
        })
        .collect()
}

impl Search<'_> {
    /// Adds what is to be read next: the prompt, or the last token of each beam.
    fn read(&self, batch: &mut Batch, last_rows: &mut Vec<u32>) {
        let position = self.before.len() + self.rows.len();
        for beam in &self.beams {
            let start = batch.tokens();
            let mut keys = vec![self.before.clone(), self.rows.clone()];
            keys.retain(|keys| !keys.is_empty());
            let written = match beam.made.as_slice() {
                [] => {
                    batch.ids.extend(&self.prompt.ids);
                    read_infix(batch, self.rows.len() - self.prompt.ids.len());
                    let positions = self.before.len()..position;
                    batch.positions.extend(positions.map(|p| p as u32));
                    self.rows.start
                }
                [.., token] => {
                    batch.ids.push(*token);
                    let step = beam.made.len() - 1;
                    batch.positions.push((position + step) as u32);
                    keys.extend(beam.path.iter().map(|(slot, steps)| {
                        self.cache_row(*slot, steps.start)..self.cache_row(*slot, steps.end)
                    }));
                    self.cache_row(beam.slot, step)
                }
            };
            let rows = start..batch.tokens();
            batch.appends.push((rows.clone(), written));
            batch.segments.push(Segment {
                queries: rows.clone(),
                keys,
                causal: true,
            });
            last_rows.push((rows.end - 1) as u32);
            if let Some(adapter) = self.prompt.adapter {
                batch.adapters.push((rows, adapter));
            }
        }
    }

    fn cache_row(&self, slot: usize, step: usize) -> usize {
        self.rows.end + slot * (self.most - 1) + step
    }

    /// Goes on with the best candidates after logits [beams, V].
    fn advance(&mut self, logits: View, options: &BeamOptions) {
        let Some(first) = self.beams.first() else {
            return;
        };
        if !all_finite(logits) {
            let ids = first.made.clone();
            let finish = Finish::NotFinite;
            self.finished = vec![(f32::INFINITY, Continuation { ids, finish })];
            self.beams.clear();
            return;
        }
        let length = first.made.len() + 1;
        let worth = |score: f32| score / (length as f32).powf(options.length_penalty);
        let is_last = length == self.most;
        let candidates = self.candidates(logits, options);
        let mut next = Vec::with_capacity(options.num_beams);
        for (rank, candidate) in candidates.iter().enumerate() {
            let stops = options.stop_ids.contains(&candidate.token);
            if !stops && !is_last {
                if next.len() < options.num_beams {
                    next.push(*candidate);
                }
            } else if rank < options.num_beams {
                let mut ids = self.beams[candidate.beam].made.clone();
                let finish = if stops {
                    Finish::Stop
                } else {
                    ids.push(candidate.token);
                    if self.most < options.max_new_tokens {
                        Finish::ContextFull
                    } else {
                        Finish::Length
                    }
                };
                let continuation = Continuation { ids, finish };
                self.finished.push((worth(candidate.score), continuation));
            }
        }
        self.finished.sort_by(|a, b| b.0.total_cmp(&a.0));
        self.finished.truncate(options.num_beams);
        let goes_on = match (next.first(), self.finished.last()) {
            (Some(best), Some((worst, _))) => {
                self.finished.len() < options.num_beams || worth(best.score) > *worst
            }
            (best, _) => best.is_some(),
        };
        if !goes_on {
            next.clear();
        }
        self.beams = self.grow(&next, options.num_beams);
    }

    /// The best tokens after the beams, best first: enough for `num_beams` of them not to end the text.
    fn candidates(&self, logits: View, options: &BeamOptions) -> Vec<Candidate> {
        let wanted = options.num_beams * (1 + options.stop_ids.len());
        let beams = self.beams.par_iter().enumerate();
        let of_each = beams.map(|(index, beam)| {
            let mut row = logits.slice_rows(index..index + 1).to_vec();
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.iter().map(|x| f64::from((x - top).exp())).sum();
            let log_sum = sum.ln() as f32;
            let n = options.no_repeat_ngram_size;
            ban_repeats(&mut row, &self.prompt.ids, &beam.made, n);
            let best = largest(&row, wanted).into_iter();
            let candidate = |(logit, token): (f32, u32)| Candidate {
                score: beam.score + (logit - top - log_sum),
                beam: index,
                token,
            };
            best.map(candidate).collect::<Vec<_>>()
        });
        let mut all: Vec<Candidate> = of_each.collect::<Vec<_>>().concat();
        all.sort_by(|a, b| b.score.total_cmp(&a.score));
        all.truncate(wanted);
        all
    }

    /// The beams of the next step. A slot goes to the best that comes from it, and those left over to the others.
    fn grow(&self, chosen: &[Candidate], slots: usize) -> Vec<Beam> {
        let mut free = vec![true; slots];
        let inherited: Vec<Option<usize>> = chosen
            .iter()
            .map(|candidate| {
                let slot = self.beams[candidate.beam].slot;
                std::mem::take(&mut free[slot]).then_some(slot)
            })
            .collect();
        let mut others = (0..slots).filter(|&slot| free[slot]);
        chosen
            .iter()
            .zip(inherited)
            .filter_map(|(candidate, slot)| {
                let mut beam = self.beams[candidate.beam].clone();
                beam.slot = slot.or_else(|| others.next())?;
                beam.score = candidate.score;
                let step = beam.made.len();
                beam.made.push(candidate.token);
                match beam.path.last_mut() {
                    Some((slot, steps)) if *slot == beam.slot => steps.end = step + 1,
                    _ => beam.path.push((beam.slot, step..step + 1)),
                }
                Some(beam)
            })
            .collect()
    }
}

/// The `count` largest numbers and their places, the largest first and of equals the first; neither NaN nor -∞.
fn largest(row: &[f32], count: usize) -> Vec<(f32, u32)> {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(count + 1);
    for (id, &x) in row.iter().enumerate() {
        let too_small = best.len() == count && best.last().is_none_or(|least| x <= least.0);
        if too_small || x.is_nan() || x == f32::NEG_INFINITY {
            continue;
        }
        let at = best.partition_point(|other| other.0 >= x);
        best.insert(at, (x, id as u32));
        best.truncate(count);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_come_first() {
        let row = [1.0, f32::NAN, 3.0, f32::NEG_INFINITY, 3.0, -2.0];
        assert_eq!(largest(&row, 3), [(3.0, 2), (3.0, 4), (1.0, 0)]);
        assert_eq!(largest(&row, 9).len(), 4);
        assert!(largest(&row, 0).is_empty());
    }

    #[test]
    fn paths_part_without_copies() {
        let prompt = PromptIds {
            ids: vec![7, 8],
            adapter: None,
        };
        let mut search = Search {
            prompt: &prompt,
            before: 2..5,
            rows: 10..13,
            most: 5,
            beams: vec![Beam::default()],
            finished: Vec::new(),
        };
        let candidate = |beam, token| Candidate {
            score: 0.0,
            beam,
            token,
        };
        for step in [
            [candidate(0, 1), candidate(0, 2)],
            // Both go on from the second: the first of them keeps its slot.
            [candidate(1, 3), candidate(1, 4)],
            [candidate(1, 5), candidate(0, 6)],
        ] {
            search.beams = search.grow(&step, 2);
        }
        let [a, b] = search.beams.as_slice() else {
            panic!("two beams")
        };
        assert_eq!((a.made.as_slice(), a.slot), ([2, 4, 5].as_slice(), 0));
        assert_eq!(a.path, [(1, 0..1), (0, 1..3)]);
        assert_eq!((b.made.as_slice(), b.slot), ([2, 3, 6].as_slice(), 1));
        assert_eq!(b.path, [(1, 0..3)]);
        let (mut batch, mut last) = (Batch::default(), Vec::new());
        search.read(&mut batch, &mut last);
        assert_eq!((batch.ids, batch.positions), (vec![5, 6], vec![8, 8]));
        assert_eq!(batch.segments[0].keys, [2..5, 10..13, 17..18, 14..16]);
        assert_eq!(batch.segments[1].keys, [2..5, 10..13, 17..20]);
        assert_eq!(batch.appends, [(0..1, 15), (1..2, 19)]);
    }
}

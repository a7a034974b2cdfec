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

use lowrank_kernels::{View, all_finite};
use rayon::prelude::*;

use super::layout::{Layout, Prompt, Sight};
use super::repeats::ban_repeats;
use super::{Continuation, Finish};
use crate::model::CacheRows;

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

impl Default for BeamOptions {
    /// Four beams, scores divided by the length, 256 new tokens at most. No token ends a text: give those of the tokenizer,
    /// [`Tokenizer::stop_ids`](crate::data::Tokenizer::stop_ids).
    fn default() -> Self {
        Self {
            num_beams: 4,
            length_penalty: 1.0,
            max_new_tokens: 256,
            no_repeat_ngram_size: 0,
            stop_ids: Vec::new(),
        }
    }
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
pub(super) struct Search {
    pub(super) prompt: Prompt,
    options: BeamOptions,
    /// Rows of the cache that are the prompt's, an infix with it.
    pub(super) rows: CacheRows,
    /// Rows of each slot.
    pub(super) slots: Vec<CacheRows>,
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

impl Search {
    /// A search that begins, with rows of the cache for the prompt and for each slot, as [`rows_for`](Self::rows_for) asks.
    pub(super) fn new(
        prompt: Prompt,
        options: BeamOptions,
        most: usize,
        rows: CacheRows,
        slots: Vec<CacheRows>,
    ) -> Self {
        Self {
            prompt,
            options,
            rows,
            slots,
            most,
            beams: vec![Beam::default()],
            finished: Vec::new(),
        }
    }

    /// New tokens at most for a prompt of so many rows, `limit` being the rows that the context has for both.
    pub(super) fn most_tokens(own: usize, limit: usize, options: &BeamOptions) -> usize {
        // The last token is not read, so it may be one more than there are places.
        options.max_new_tokens.min((limit + 1).saturating_sub(own))
    }

    /// Adds the last token of each beam.
    pub(super) fn read_tokens(&self, layout: &mut Layout, sight: &Sight<'_>) {
        for beam in &self.beams {
            let Some((token, step)) = beam.made.last().zip(beam.made.len().checked_sub(1)) else {
                continue;
            };
            let keys = self.rows.places(0..self.rows.len());
            let made = beam.path.iter();
            let made = made.flat_map(|(slot, steps)| self.slots[*slot].places(steps.clone()));
            let own = (&self.slots[beam.slot], step..step + 1);
            let position = sight.before.len() + self.rows.len() + step;
            let rows = layout.push_seeing(sight, keys.chain(made), own, position, &[*token]);
            layout.want(rows.start);
        }
    }

    /// Whether it is over.
    pub(super) fn is_done(&self) -> bool {
        self.beams.is_empty()
    }

    /// Beams that go on.
    pub(super) fn beams(&self) -> usize {
        self.beams.len()
    }

    /// The best continuation that was found.
    pub(super) fn end(&mut self) -> Continuation {
        let best = std::mem::take(&mut self.finished).into_iter().next();
        best.map_or_else(
            || Continuation {
                ids: Vec::new(),
                finish: Finish::Length,
            },
            |(_, continuation)| continuation,
        )
    }

    /// Goes on with the best candidates after logits [beams, V].
    pub(super) fn advance(&mut self, logits: View) {
        let options = &self.options;
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
        let candidates = self.candidates(logits);
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
    fn candidates(&self, logits: View) -> Vec<Candidate> {
        let options = &self.options;
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
    #[cfg(feature = "builtin-model")]
    use crate::{base::Source, model::KvCache};

    #[test]
    fn the_largest_come_first() {
        let row = [1.0, f32::NAN, 3.0, f32::NEG_INFINITY, 3.0, -2.0];
        assert_eq!(largest(&row, 3), [(3.0, 2), (3.0, 4), (1.0, 0)]);
        assert_eq!(largest(&row, 9).len(), 4);
        assert!(largest(&row, 0).is_empty());
    }

    #[cfg(feature = "builtin-model")]
    #[test]
    fn paths_part_without_copies() {
        // Rows of the cache are numbered so that each list of rows has a block of its own.
        let config = Source::Builtin.model_config().expect("a config");
        let mut cache = KvCache::new(&config, 4);
        let mut take = |rows| cache.take(rows).expect("a block");
        let (before, rows) = (take(3), take(3));
        let slots = vec![take(4), take(4)];
        let options = BeamOptions {
            num_beams: 2,
            length_penalty: 1.0,
            max_new_tokens: 5,
            no_repeat_ngram_size: 0,
            stop_ids: Vec::new(),
        };
        let mut search = Search::new(Prompt::new(vec![7, 8, 9], 0), options, 5, rows, slots);
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
        let mut layout = Layout::default();
        let sight = Sight {
            before: &before,
            adapter: None,
        };
        search.read_tokens(&mut layout, &sight);
        let batch = layout.batch;
        assert_eq!((batch.ids, batch.positions), (vec![5, 6], vec![8, 8]));
        let first_row = |block: usize| block * 2 * config.num_hidden_layers * 128;
        let of =
            |block, rows: Range<usize>| first_row(block) + rows.start..first_row(block) + rows.end;
        let shared = [of(0, 0..3), of(1, 0..3)];
        let first = [of(3, 0..1), of(2, 1..3)];
        assert_eq!(batch.segments[0].keys, [shared.clone(), first].concat());
        let second = [shared.as_slice(), &[of(3, 0..3)]].concat();
        assert_eq!(batch.segments[1].keys, second);
        assert_eq!(
            batch.appends,
            [(0..1, first_row(2) + 2), (1..2, first_row(3) + 2)]
        );
        assert_eq!(layout.wanted, [0, 1]);
    }
}

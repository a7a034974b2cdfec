//! How a token is drawn from logits, in the order in which transformers warps them: temperature, top-k, top-p, min-p.

use std::cmp::Ordering;

use lowrank_kernels::CounterRng;

use crate::random::mix;

/// Settings of the draw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0: always the most likely token.
    pub temperature: f32,
    /// Only the k most likely tokens; 0: all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability; 1: all.
    pub top_p: f32,
    /// Only tokens that are at least so likely as this share of the most likely one; 0: all.
    pub min_p: f32,
    /// The same seed draws the same tokens.
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 42,
        }
    }
}

impl Sampling {
    /// Whether nothing is random.
    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0
    }

    /// The same with a seed of this prompt's own, so that different prompts of one seed draw apart. It is the same wherever the prompt
    /// stands and whatever is made beside it, so equal prompts get equal texts.
    #[must_use]
    pub fn for_prompt(self, ids: &[u32]) -> Self {
        let seed = mix(self.seed, ids.len() as u64);
        Self {
            seed: ids.iter().fold(seed, |seed, id| mix(seed, u64::from(*id))),
            ..self
        }
    }

    /// Draws the token at a position of a sequence: a function of the logits, the seed and the position alone.
    pub fn draw(&self, logits: &[f32], position: u64) -> u32 {
        let top_k = if self.is_greedy() { 1 } else { self.top_k };
        let mut ranked = Ranked::new(logits, top_k, self.temperature);
        let mut total = ranked.total();
        if self.top_p < 1.0 || self.min_p > 0.0 {
            let goal = f64::from(self.top_p) * total;
            let (mut reached, mut kept) = (0.0, 0);
            // Weights are relative to the largest one.
            while let Some((_, weight)) = ranked.get(kept)
                && (kept == 0 || reached < goal && weight >= f64::from(self.min_p))
            {
                reached += weight;
                kept += 1;
            }
            ranked.order.truncate(kept);
            total = reached;
        }
        let mut rng = CounterRng::new(mix(self.seed, position));
        let mut point = rng.next_f64() * total;
        let (mut at, mut drawn) = (0, 0);
        while let Some((id, weight)) = ranked.get(at) {
            drawn = id;
            point -= weight;
            if point < 0.0 {
                break;
            }
            at += 1;
        }
        drawn
    }
}

/// Tokens by falling likelihood, of which only as many are put in order as are asked for.
struct Ranked<'a> {
    logits: &'a [f32],
    order: Vec<u32>,
    /// How many of `order` stand in their places.
    sorted: usize,
    top: f64,
    temperature: f64,
}

impl<'a> Ranked<'a> {
    /// The `top_k` most likely tokens of logits [V]; 0: all.
    fn new(logits: &'a [f32], top_k: usize, temperature: f32) -> Self {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        if top_k > 0 && top_k < order.len() {
            order.select_nth_unstable_by(top_k - 1, |a, b| by_logit(logits, *a, *b));
            order.truncate(top_k);
            order.sort_unstable_by(|a, b| by_logit(logits, *a, *b));
        }
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        Self {
            sorted: if order.len() < logits.len() {
                order.len()
            } else {
                0
            },
            logits,
            order,
            top: f64::from(top),
            temperature: if temperature > 0.0 {
                f64::from(temperature)
            } else {
                1.0
            },
        }
    }

    /// The weight of a token, the largest one's being 1.
    fn weight(&self, id: u32) -> f64 {
        ((f64::from(self.logits[id as usize]) - self.top) / self.temperature).exp()
    }

    /// The sum of all weights.
    fn total(&self) -> f64 {
        self.order.iter().map(|id| self.weight(*id)).sum()
    }

    /// The token of a rank, with its weight.
    fn get(&mut self, rank: usize) -> Option<(u32, f64)> {
        // Few of a large vocabulary are likely, and all of it is seldom put in order.
        while self.sorted <= rank && self.sorted < self.order.len() {
            let end = (4 * self.sorted).max(64).min(self.order.len());
            let rest = &mut self.order[self.sorted..];
            let count = end - self.sorted;
            if count < rest.len() {
                rest.select_nth_unstable_by(count, |a, b| by_logit(self.logits, *a, *b));
            }
            rest[..count].sort_unstable_by(|a, b| by_logit(self.logits, *a, *b));
            self.sorted = end;
        }
        let id = *self.order.get(rank)?;
        Some((id, self.weight(id)))
    }
}

/// Larger logits first, and of equal ones the smaller id.
fn by_logit(logits: &[f32], a: u32, b: u32) -> Ordering {
    logits[b as usize]
        .total_cmp(&logits[a as usize])
        .then(a.cmp(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(sampling: Sampling, logits: &[f32]) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for position in 0..4000 {
            counts[sampling.draw(logits, position) as usize] += 1.0 / 4000.0;
        }
        counts
    }

    #[test]
    fn draws_follow_the_distribution() {
        // softmax([ln 1, ln 2, ln 5]) = 1/8, 2/8, 5/8
        let logits = [0.0, 2.0_f32.ln(), 5.0_f32.ln()];
        let all = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        let close =
            |got: &[f64], want: &[f64]| got.iter().zip(want).all(|(g, w)| (g - w).abs() < 0.03);
        assert!(close(&share(all, &logits), &[0.125, 0.25, 0.625]));
        assert!(close(
            &share(Sampling { top_k: 2, ..all }, &logits),
            &[0.0, 2.0 / 7.0, 5.0 / 7.0]
        ));
        assert!(close(
            &share(Sampling { top_p: 0.6, ..all }, &logits),
            &[0.0, 0.0, 1.0]
        ));
        assert!(close(
            &share(Sampling { top_p: 0.7, ..all }, &logits),
            &[0.0, 2.0 / 7.0, 5.0 / 7.0]
        ));
        // The share is of the largest one, 5/8.
        assert!(close(
            &share(Sampling { min_p: 0.3, ..all }, &logits),
            &[0.0, 2.0 / 7.0, 5.0 / 7.0]
        ));
        // Temperature 1/2 squares the weights: 1, 4, 25.
        assert!(close(
            &share(
                Sampling {
                    temperature: 0.5,
                    ..all
                },
                &logits
            ),
            &[1.0 / 30.0, 4.0 / 30.0, 25.0 / 30.0]
        ));
    }

    /// As `draw`, with everything put in order first.
    fn draw_plainly(sampling: &Sampling, logits: &[f32], position: u64) -> u32 {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| by_logit(logits, *a, *b));
        if sampling.top_k > 0 {
            order.truncate(sampling.top_k);
        }
        let top = f64::from(logits[order[0] as usize]);
        let mut weights: Vec<f64> = order
            .iter()
            .map(|id| {
                ((f64::from(logits[*id as usize]) - top) / f64::from(sampling.temperature)).exp()
            })
            .collect();
        let total: f64 = weights.iter().sum();
        let mut reached = 0.0;
        let last = weights.iter().position(|w| {
            reached += w / total;
            reached >= f64::from(sampling.top_p)
        });
        if sampling.top_p < 1.0 {
            weights.truncate(last.map_or(weights.len(), |last| last + 1));
        }
        weights.retain(|w| *w >= f64::from(sampling.min_p));
        let mut rng = CounterRng::new(mix(sampling.seed, position));
        let mut point = rng.next_f64() * weights.iter().sum::<f64>();
        let drawn = weights.iter().position(|w| {
            point -= w;
            point < 0.0
        });
        order[drawn.unwrap_or(weights.len() - 1)]
    }

    #[test]
    fn what_is_put_in_order_lazily_is_drawn_as_from_all() {
        // Many equal logits among them.
        let logits: Vec<f32> = (0..3000)
            .map(|i| ((i * 7919) % 1000) as f32 / 300.0)
            .collect();
        for case in 0..60_u64 {
            let sampling = Sampling {
                temperature: [0.3, 1.0, 2.0][case as usize % 3],
                top_k: [0, 1, 50, 700, 9000][case as usize % 5],
                top_p: [1.0, 0.95, 0.2][case as usize / 3 % 3],
                min_p: [0.0, 0.1][case as usize / 5 % 2],
                seed: case,
            };
            for position in 0..20 {
                assert_eq!(
                    sampling.draw(&logits, position),
                    draw_plainly(&sampling, &logits, position),
                    "{sampling:?} at {position}"
                );
            }
        }
    }

    #[test]
    fn prompts_of_one_seed_draw_their_own() {
        let sampling = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        let draws = |seed: u64, ids: &[u32]| -> Vec<u32> {
            let own = Sampling { seed, ..sampling }.for_prompt(ids);
            (0..40).map(|at| own.draw(&[0.0; 64], at)).collect()
        };
        assert_eq!(draws(1, &[5, 6]), draws(1, &[5, 6]));
        let others = [
            draws(1, &[6, 5]),
            draws(1, &[5]),
            draws(1, &[]),
            draws(2, &[5, 6]),
        ];
        for other in others {
            assert_ne!(draws(1, &[5, 6]), other);
        }
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        let sampling = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        let logits: Vec<f32> = (0..50).map(|i| (i as f32).sin()).collect();
        for position in 0..20 {
            assert_eq!(
                sampling.draw(&logits, position),
                sampling.draw(&logits, position)
            );
        }
    }
}

//! How a token is drawn from logits, in the order in which transformers warps them: temperature, top-k, top-p.

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
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| {
            logits[*b as usize]
                .total_cmp(&logits[*a as usize])
                .then(a.cmp(b))
        };
        let top_k = if self.is_greedy() { 1 } else { self.top_k };
        if top_k > 0 && top_k < order.len() {
            order.select_nth_unstable_by(top_k - 1, by_logit);
            order.truncate(top_k);
        }
        order.sort_unstable_by(by_logit);
        let temperature = if self.is_greedy() {
            1.0
        } else {
            f64::from(self.temperature)
        };
        let top = f64::from(logits[order[0] as usize]);
        let mut weights: Vec<f64> = order
            .iter()
            .map(|&id| ((f64::from(logits[id as usize]) - top) / temperature).exp())
            .collect();
        let total: f64 = weights.iter().sum();
        if self.top_p < 1.0 {
            let mut reached = 0.0;
            let keep = weights.iter().position(|w| {
                reached += w / total;
                reached >= f64::from(self.top_p)
            });
            weights.truncate(keep.map_or(weights.len(), |last| last + 1));
        }
        let mut rng = CounterRng::new(mix(self.seed, position));
        let mut point = rng.next_f64() * weights.iter().sum::<f64>();
        for (weight, &id) in weights.iter().zip(&order) {
            point -= weight;
            if point < 0.0 {
                return id;
            }
        }
        order[weights.len() - 1]
    }
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

//! Log-probabilities of tokens, of the model's own distribution.

/// Which log-probabilities are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogProbs {
    /// Of each token that is made.
    pub made: bool,
    /// Of each token of the prompt but the first, which nothing predicts.
    pub prompt: bool,
    /// And of so many tokens that are the most likely at the same place.
    pub top: usize,
}

/// A token with its log-probability.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The logarithm of its probability, where that was asked for.
    pub log_prob: Option<f64>,
    /// The most likely tokens at its place with theirs, the likeliest first, where they were asked for. Of equal ones the smaller
    /// id stands first.
    pub top: Vec<(u32, f64)>,
}

/// Log-probabilities after one row of logits.
pub(super) struct Scores<'a> {
    logits: &'a [f32],
    top: f64,
    log_sum: f64,
}

impl<'a> Scores<'a> {
    /// Of logits [V].
    pub(super) fn new(logits: &'a [f32]) -> Self {
        let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits.iter().map(|x| (f64::from(*x) - top).exp()).sum();
        Self {
            logits,
            top,
            log_sum: sum.ln(),
        }
    }

    /// Of one token.
    pub(super) fn of(&self, id: u32) -> f64 {
        f64::from(self.logits[id as usize]) - self.top - self.log_sum
    }

    /// A token with its log-probability and those of the `top` most likely ones.
    pub(super) fn token(&self, id: u32, top: usize) -> Token {
        Token {
            id,
            log_prob: Some(self.of(id)),
            top: self.most_likely(top),
        }
    }

    /// The `n` most likely tokens.
    fn most_likely(&self, n: usize) -> Vec<(u32, f64)> {
        if n == 0 {
            return Vec::new();
        }
        let mut best: Vec<u32> = Vec::with_capacity(n + 1);
        for (id, logit) in (0..).zip(self.logits) {
            let place = best.partition_point(|known| self.logits[*known as usize] >= *logit);
            if place < n {
                best.insert(place, id);
                best.truncate(n);
            }
        }
        best.into_iter().map(|id| (id, self.of(id))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_likely_come_first_and_ties_by_id() {
        let logits = [0.0, 2.0, 1.0, 2.0, -1.0];
        let scores = Scores::new(&logits);
        let token = scores.token(2, 3);
        let ids: Vec<u32> = token.top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [1, 3, 2]);
        assert_eq!(token.log_prob, Some(token.top[2].1));
        let sum: f64 = scores.token(0, 5).top.iter().map(|(_, p)| p.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-12, "{sum}");
        assert!(scores.token(0, 0).top.is_empty());
    }
}

//! What is done to logits before a token is drawn: penalties of tokens that were there, and biases that a caller gives.

use std::collections::BTreeSet;

/// Penalties of tokens that were there before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalties {
    /// Divides positive logits and multiplies negative ones of every token of the prompt and the text; 1: none. Transformers'
    /// `repetition_penalty`.
    pub repetition: f32,
    /// Is subtracted from the logit of every token of the text; 0: none. OpenAI's `presence_penalty`.
    pub presence: f32,
    /// Is subtracted as often as a token is in the text; 0: none. OpenAI's `frequency_penalty`.
    pub frequency: f32,
}

impl Default for Penalties {
    fn default() -> Self {
        Self::NONE
    }
}

impl Penalties {
    /// Those that change nothing.
    pub const NONE: Self = Self {
        repetition: 1.0,
        presence: 0.0,
        frequency: 0.0,
    };

    /// Whether they change nothing.
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }

    /// Changes logits [V] behind a prompt and the text that was made of it.
    pub(super) fn apply(&self, logits: &mut [f32], prompt: &[u32], made: &[u32]) {
        if self.is_none() {
            return;
        }
        if self.repetition != 1.0 {
            let seen: BTreeSet<u32> = prompt.iter().chain(made).copied().collect();
            for id in seen {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit = if *logit > 0.0 {
                        *logit / self.repetition
                    } else {
                        *logit * self.repetition
                    };
                }
            }
        }
        let mut made = made.to_vec();
        made.sort_unstable();
        for run in made.chunk_by(|a, b| a == b) {
            if let Some(logit) = logits.get_mut(run[0] as usize) {
                *logit -= self.presence + self.frequency * run.len() as f32;
            }
        }
    }
}

/// Adds to the logits of these tokens.
pub(super) fn add_bias(logits: &mut [f32], bias: &[(u32, f32)]) {
    for (id, value) in bias {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit += value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_is_penalized() {
        let mut logits = [2.0, -2.0, 1.0, 1.0];
        let penalties = Penalties {
            repetition: 2.0,
            presence: 0.5,
            frequency: 0.25,
        };
        // Tokens of the prompt are repetitions alone; an id outside of the logits is left out.
        penalties.apply(&mut logits, &[0, 1, 9], &[2, 2]);
        assert_eq!(logits, [1.0, -4.0, 0.5 - 1.0, 1.0]);
        Penalties::default().apply(&mut logits, &[3], &[3]);
        assert_eq!(logits[3], 1.0);
    }

    #[test]
    fn a_bias_is_added() {
        let mut logits = [0.0, 1.0];
        add_bias(&mut logits, &[(1, -100.0), (5, 3.0)]);
        assert_eq!(logits, [0.0, -99.0]);
    }
}

//! BLEU (Papineni et al., 2002), as sacrebleu computes it for a corpus.
//!
//! ```text
//! BLEU = 100 · BP · exp( ¼ Σ_{n=1..4} ln p_n )        BP = 1 if c ≥ r, else exp(1 − r/c)
//! ```
//!
//! p_n is the share of the hypotheses' n-grams that are matched, each at most as often as in the reference that has it most
//! often. c sums the hypotheses' lengths, r for each of them the length of the reference that is nearest in length, the
//! shorter of two. An order in which nothing matches has 1 / (2^k · total) for the k-th such order (smoothing "exp", which
//! is mteval's). Without a single match, or with no hypothesis of four tokens, the score is 0.

use serde::Serialize;

use super::{Corpus, ngrams};

const ORDERS: usize = 4;

/// The score and what it is made of.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bleu {
    /// 0 to 100.
    pub score: f64,
    /// p_1 to p_4 after smoothing, 0 to 1.
    pub precisions: [f64; ORDERS],
    /// BP.
    pub brevity_penalty: f64,
    /// c, in tokens.
    pub hypothesis_length: usize,
    /// r, in tokens.
    pub reference_length: usize,
}

/// BLEU of a corpus.
pub fn bleu(corpus: &Corpus) -> Bleu {
    let mut correct = [0; ORDERS];
    let mut total = [0; ORDERS];
    let (mut c, mut r) = (0, 0);
    for meaning in &corpus.meanings {
        let length = meaning.hypothesis.len();
        c += length;
        let lengths = meaning.references.iter().map(Vec::len);
        r += lengths
            .min_by_key(|&reference| (reference.abs_diff(length), reference))
            .unwrap_or(0);
        for n in 1..=ORDERS {
            let references: Vec<_> = meaning.references.iter().map(|r| ngrams(r, n)).collect();
            for (ngram, count) in ngrams(&meaning.hypothesis, n) {
                let most = references.iter().filter_map(|r| r.get(ngram)).max();
                correct[n - 1] += count.min(most.copied().unwrap_or(0));
                total[n - 1] += count;
            }
        }
    }
    let brevity_penalty = match c {
        0 => 0.0,
        _ if c < r => (1.0 - r as f64 / c as f64).exp(),
        _ => 1.0,
    };
    let mut precisions = [0.0; ORDERS];
    if correct != [0; ORDERS] {
        let mut smoothing = 1.0;
        for n in 0..ORDERS {
            precisions[n] = match (correct[n], total[n]) {
                (_, 0) => break,
                (0, total) => {
                    smoothing *= 2.0;
                    1.0 / (smoothing * total as f64)
                }
                (correct, total) => correct as f64 / total as f64,
            };
        }
    }
    // ln 0 is -∞, and e to that is 0.
    let mean = precisions.iter().map(|p| p.ln()).sum::<f64>() / ORDERS as f64;
    Bleu {
        score: 100.0 * brevity_penalty * mean.exp(),
        precisions,
        brevity_penalty,
        hypothesis_length: c,
        reference_length: r,
    }
}

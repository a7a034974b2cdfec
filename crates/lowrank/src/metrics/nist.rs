//! NIST (Doddington, 2002), as nltk's `corpus_nist` computes it with n up to 5.
//!
//! ```text
//! info(w_1 … w_n) = log2( #(w_1 … w_{n−1}) / #(w_1 … w_n) )            counted over all references; for n = 1 the
//!                                                                      numerator is the number of their tokens
//! NIST = BP · Σ_{n=1..5} Σ_matched info / Σ hypotheses' n-grams        BP = exp( β · ln²( min(1, c/r) ) )
//! ```
//!
//! with β such that BP is ½ at c/r = ⅔. For each meaning and each n the reference counts that gives the highest share; r sums
//! the lengths of those. nltk divides by zero where no hypothesis has n tokens; here that order adds nothing.

use std::collections::HashMap;

use super::{Corpus, ngrams};

const ORDERS: usize = 5;

/// NIST of a corpus.
pub fn nist(corpus: &Corpus) -> f64 {
    let mut counts: HashMap<&[String], usize> = HashMap::new();
    let mut words = 0;
    for reference in corpus.meanings.iter().flat_map(|m| &m.references) {
        words += reference.len();
        for n in 1..=ORDERS {
            for ngram in reference.windows(n) {
                *counts.entry(ngram).or_insert(0) += 1;
            }
        }
    }
    let count = |ngram: &[String]| counts.get(ngram).copied().unwrap_or(0);
    let information = |ngram: &[String]| {
        let shorter = &ngram[..ngram.len() - 1];
        let before = if shorter.is_empty() {
            words
        } else {
            count(shorter)
        };
        // Not log2, which rounds otherwise: sums that tie there must tie here.
        (before as f64 / count(ngram) as f64).ln() / 2.0_f64.ln()
    };
    let mut score = 0.0;
    let (mut c, mut r) = (0, 0);
    for n in 1..=ORDERS {
        let (mut matched, mut total) = (0.0, 0);
        for meaning in &corpus.meanings {
            let hypothesis = ngrams(&meaning.hypothesis, n);
            let made: usize = hypothesis.values().sum();
            let best = meaning.references.iter().map(|reference| {
                let reference_ngrams = ngrams(reference, n);
                let sum: f64 = hypothesis
                    .iter()
                    .filter_map(|(ngram, &count)| {
                        let there = *reference_ngrams.get(ngram)?;
                        Some(information(ngram) * count.min(there) as f64)
                    })
                    .fold(0.0, |sum, x| sum + x); // `sum` of nothing is -0, which is less than 0
                (sum, reference.len())
            });
            // Every reference has the same denominator; of equal sums the longest reference counts.
            let best = best.max_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            let (sum, length) = best.unwrap_or((0.0, 0));
            matched += sum;
            total += made;
            c += meaning.hypothesis.len();
            r += length;
        }
        if total > 0 {
            score += matched / total as f64;
        }
    }
    score * length_penalty(c, r)
}

fn length_penalty(c: usize, r: usize) -> f64 {
    if c == 0 || r == 0 {
        return 0.0;
    }
    let ratio = (c as f64 / r as f64).min(1.0);
    let beta = 0.5_f64.ln() / 1.5_f64.ln().powi(2);
    (beta * ratio.ln().powi(2)).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_thirds_of_the_length_halve_the_score() {
        assert!((length_penalty(2, 3) - 0.5).abs() < 1e-12);
        assert_eq!((length_penalty(4, 3), length_penalty(0, 3)), (1.0, 0.0));
    }
}

//! CIDEr-D (Vedantam et al., 2015), as pycocoevalcap computes it under the name CIDEr.
//!
//! For n = 1 to 4 a text is a vector of its n-grams, each weighted with its count times ln(N / df): N meanings, of which df have a
//! reference with this n-gram. A hypothesis h and a reference s are as alike as
//!
//! ```text
//! sim_n = Σ min(h, s) · s / (‖h‖ ‖s‖) · exp(−Δ² / (2 · 6²))
//! CIDEr = 10 · mean over n, and over a meaning's references, of sim_n
//! ```
//!
//! where Δ is the difference of their lengths. That tool measures lengths in pairs of tokens, which differ like tokens do unless
//! one text is empty. With one meaning every weight is ln 1 and the score is 0.

use std::collections::{HashMap, HashSet};

use indexmap::IndexMap;

use super::{Corpus, ngrams};

const ORDERS: usize = 4;
const SIGMA: f64 = 6.0;

/// CIDEr of a corpus: the mean over its meanings.
pub fn cider(corpus: &Corpus) -> f64 {
    let mut frequency: HashMap<&[String], usize> = HashMap::new();
    for meaning in &corpus.meanings {
        let references = meaning.references.iter();
        let present: HashSet<&[String]> = references
            .flat_map(|r| (1..=ORDERS).flat_map(|n| r.windows(n)))
            .collect();
        for ngram in present {
            *frequency.entry(ngram).or_insert(0) += 1;
        }
    }
    let all = (corpus.len() as f64).ln();
    corpus.mean(|meaning| {
        let hypothesis = Vector::new(&meaning.hypothesis, all, &frequency);
        let references = meaning.references.iter();
        let likeness = |r: &Vec<String>| hypothesis.similarity(&Vector::new(r, all, &frequency));
        10.0 * references.map(likeness).sum::<f64>() / meaning.references.len() as f64
    })
}

/// A text's weights for each n.
struct Vector<'a> {
    weights: Vec<IndexMap<&'a [String], f64>>,
    norms: Vec<f64>,
    pairs: usize,
}

impl<'a> Vector<'a> {
    fn new(tokens: &'a [String], all: f64, frequency: &HashMap<&[String], usize>) -> Self {
        let weights: Vec<IndexMap<&[String], f64>> = (1..=ORDERS)
            .map(|n| {
                let counts = ngrams(tokens, n).into_iter();
                let weight = |(ngram, count)| {
                    let df = frequency.get(ngram).copied().unwrap_or(0).max(1);
                    (ngram, count as f64 * (all - (df as f64).ln()))
                };
                counts.map(weight).collect()
            })
            .collect();
        let norm = |weights: &IndexMap<_, f64>| weights.values().map(|w| w * w).sum::<f64>().sqrt();
        Self {
            norms: weights.iter().map(norm).collect(),
            weights,
            pairs: tokens.len().saturating_sub(1),
        }
    }

    /// The mean of sim_n over n.
    fn similarity(&self, reference: &Self) -> f64 {
        let delta = self.pairs as f64 - reference.pairs as f64;
        let likeness: f64 = (0..ORDERS)
            .map(|n| {
                let sum: f64 = self.weights[n]
                    .iter()
                    .filter_map(|(ngram, &h)| {
                        let s = *reference.weights[n].get(ngram)?;
                        Some(h.min(s) * s)
                    })
                    .sum();
                let norms = self.norms[n] * reference.norms[n];
                if norms > 0.0 { sum / norms } else { sum }
            })
            .sum();
        likeness / ORDERS as f64 * (-delta * delta / (2.0 * SIGMA * SIGMA)).exp()
    }
}

//! ROUGE-L (Lin and Och, 2004), as pycocoevalcap computes it.
//!
//! ```text
//! P = max over references of LCS / |hypothesis|      R = max over references of LCS / |reference|
//! ROUGE-L = (1 + β²) · P · R / (R + β² · P)          β = 1.2
//! ```
//!
//! LCS is the length of the longest common subsequence. P and R may come from different references. A text without tokens
//! counts as one empty token, so that it equals another such text.

use super::{Corpus, Meaning};

const BETA: f64 = 1.2;

/// ROUGE-L of a corpus: the mean over its meanings.
pub fn rouge_l(corpus: &Corpus) -> f64 {
    corpus.mean(sentence)
}

fn sentence(meaning: &Meaning) -> f64 {
    let empty = [String::new()];
    let hypothesis = or_empty(&meaning.hypothesis, &empty);
    let (mut precision, mut recall) = (0.0_f64, 0.0_f64);
    for reference in &meaning.references {
        let reference = or_empty(reference, &empty);
        let common = common_subsequence(hypothesis, reference) as f64;
        precision = precision.max(common / hypothesis.len() as f64);
        recall = recall.max(common / reference.len() as f64);
    }
    if precision == 0.0 {
        return 0.0;
    }
    (1.0 + BETA * BETA) * precision * recall / (recall + BETA * BETA * precision)
}

fn or_empty<'a>(tokens: &'a [String], empty: &'a [String]) -> &'a [String] {
    if tokens.is_empty() { empty } else { tokens }
}

/// The length of the longest common subsequence.
fn common_subsequence(a: &[String], b: &[String]) -> usize {
    // best[j]: of what was read of a, and the first j tokens of b.
    let mut best = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = best[j + 1];
            best[j + 1] = if x == y {
                diagonal + 1
            } else {
                above.max(best[j])
            };
            diagonal = above;
        }
    }
    best[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subsequences_may_have_gaps() {
        let letters = |text: &str| text.chars().map(String::from).collect::<Vec<_>>();
        let length = |a, b| common_subsequence(&letters(a), &letters(b));
        assert_eq!(length("abcbdab", "bdcaba"), 4);
        assert_eq!(length("", "abc"), 0);
        assert_eq!(length("aaa", "aa"), 2);
    }
}

//! METEOR (Lavie and Agarwal, 2007) of words and stems, as nltk computes it where WordNet knows no synonyms.
//!
//! ```text
//! P = m / |hypothesis|    R = m / |reference|    F = P · R / (0.9 · P + 0.1 · R)
//! METEOR = F · (1 − ½ · (chunks / m)³)           the best of the references counts
//! ```
//!
//! m words are matched, in lower case: first equal ones, then of those left over the ones with equal stems. Words of the
//! hypothesis are gone through from the last to the first, and each takes the last free equal one of the reference. A chunk
//! is a run of matches that are neighbours in both texts. WordNet's synonyms, nltk's third stage, would need its database
//! and are left out, so that scores are a little lower than METEOR's with synonyms.

use std::collections::HashMap;

use super::porter::stem;
use super::{Corpus, Meaning};

const ALPHA: f64 = 0.9;
const BETA: f64 = 3.0;
const GAMMA: f64 = 0.5;

/// METEOR of a corpus: the mean over its meanings.
pub fn meteor(corpus: &Corpus) -> f64 {
    corpus.mean(sentence)
}

fn sentence(meaning: &Meaning) -> f64 {
    let hypothesis = Words::new(&meaning.hypothesis);
    let references = meaning.references.iter().map(|r| Words::new(r));
    references.fold(0.0, |best, r| best.max(pair(&hypothesis, &r)))
}

/// The words of a text in lower case, and their stems.
struct Words {
    words: Vec<String>,
    stems: Vec<String>,
}

impl Words {
    fn new(tokens: &[String]) -> Self {
        let words: Vec<String> = tokens.iter().map(|word| word.to_lowercase()).collect();
        Self {
            stems: words.iter().map(|word| stem(word)).collect(),
            words,
        }
    }
}

fn pair(hypothesis: &Words, reference: &Words) -> f64 {
    let mut partners = vec![None; hypothesis.words.len()];
    let mut taken = vec![false; reference.words.len()];
    align(
        &hypothesis.words,
        &reference.words,
        &mut partners,
        &mut taken,
    );
    align(
        &hypothesis.stems,
        &reference.stems,
        &mut partners,
        &mut taken,
    );
    let matches = partners.iter().flatten().count() as f64;
    if matches == 0.0 {
        return 0.0;
    }
    let follows = |two: &&[Option<usize>]| matches!(two, [Some(a), Some(b)] if a + 1 == *b);
    let joined = partners.windows(2).filter(follows).count();
    let chunks = matches - joined as f64;
    let precision = matches / hypothesis.words.len() as f64;
    let recall = matches / reference.words.len() as f64;
    let mean = precision * recall / (ALPHA * precision + (1.0 - ALPHA) * recall);
    mean * (1.0 - GAMMA * (chunks / matches).powf(BETA))
}

/// Gives words without a partner one that is equal and free.
fn align(
    hypothesis: &[String],
    reference: &[String],
    partners: &mut [Option<usize>],
    taken: &mut [bool],
) {
    let mut free: HashMap<&str, Vec<usize>> = HashMap::new();
    for (j, word) in reference.iter().enumerate().filter(|(j, _)| !taken[*j]) {
        free.entry(word).or_default().push(j);
    }
    for (i, word) in hypothesis.iter().enumerate().rev() {
        if partners[i].is_none() {
            partners[i] = free.get_mut(word.as_str()).and_then(Vec::pop);
            if let Some(j) = partners[i] {
                taken[j] = true;
            }
        }
    }
}

//! Scores of generated texts against what people wrote: BLEU, NIST, ROUGE-L, METEOR and CIDEr; and figures of
//! classifiers, in [`classification`].
//!
//! A [`Corpus`] holds meanings: for each the text that a model made of it, and one or more references. Every metric is
//! a function of its tokens. Their values are those of the tools that papers quote: sacrebleu (BLEU), nltk (NIST, METEOR)
//! and pycocoevalcap (ROUGE-L, CIDEr), given the same tokens. `scripts/goldens_metrics.py` writes what the tests compare with.
//!
//! | metric | a corpus's score | range |
//! | --- | --- | --- |
//! | BLEU | counts summed over the corpus | 0 to 100 |
//! | NIST | counts summed over the corpus | 0 and up |
//! | ROUGE-L, METEOR | mean over meanings | 0 to 1 |
//! | CIDEr | mean over meanings | 0 to 10 |

mod bleu;
mod cider;
pub mod classification;
mod meteor;
mod nist;
mod porter;
mod predictions;
mod rouge;
mod tokens;

use indexmap::IndexMap;

pub use bleu::{Bleu, bleu};
pub use cider::cider;
pub use meteor::meteor;
pub use nist::nist;
pub use porter::stem;
pub use predictions::{Prediction, read_predictions, write_predictions};
pub use rouge::rouge_l;
pub use tokens::Tokenization;

/// Whether less of a metric is better.
pub fn is_error(name: &str) -> bool {
    matches!(
        name,
        "mean_squared_error" | "mean_absolute_error" | "expected_calibration_error"
    )
}

/// A metric's name as papers write it, from its name in files and flags.
pub fn title(name: &str) -> &str {
    match name {
        "bleu" => "BLEU",
        "nist" => "NIST",
        "rouge-l" => "ROUGE-L",
        "meteor" => "METEOR",
        "cider" => "CIDEr",
        "exact_match" => "exact match",
        "precision_micro" => "precision (micro)",
        "precision_macro" => "precision (macro)",
        "recall_micro" => "recall (micro)",
        "recall_macro" => "recall (macro)",
        "f1_binary" => "F1 (label 1)",
        "f1_micro" => "F1 (micro)",
        "f1_macro" => "F1 (macro)",
        "f1_weighted" => "F1 (weighted)",
        "matthews" => "Matthews",
        "expected_calibration_error" => "calibration error",
        "pearson" => "Pearson",
        "spearman" => "Spearman",
        "mean_squared_error" => "mean squared error",
        "mean_absolute_error" => "mean absolute error",
        other => other,
    }
}

/// Meanings, each a hypothesis and its references as tokens. There is at least one meaning, and each has a reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corpus {
    meanings: Vec<Meaning>,
}

/// A text that was made, and those that it is compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Meaning {
    hypothesis: Vec<String>,
    references: Vec<Vec<String>>,
}

/// Texts that cannot be scored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CorpusError {
    /// No texts.
    #[error("there are no texts to score")]
    Empty,
    /// As many lists of references as hypotheses are needed.
    #[error(
        "{hypotheses} hypotheses but {references} lists of references; each hypothesis needs one"
    )]
    Counts {
        /// Number of hypotheses.
        hypotheses: usize,
        /// Number of lists of references.
        references: usize,
    },
    /// A hypothesis with nothing to compare it with.
    #[error("text {number} has no reference to compare it with")]
    NoReference {
        /// Which, counted from 1.
        number: usize,
    },
}

impl Corpus {
    /// A corpus of tokens: hypothesis `i` has the references `i`.
    ///
    /// # Errors
    /// If there are none, the numbers differ, or a hypothesis has no reference. Texts without a token are fine.
    pub fn new(
        hypotheses: Vec<Vec<String>>,
        references: Vec<Vec<Vec<String>>>,
    ) -> Result<Self, CorpusError> {
        if hypotheses.len() != references.len() {
            return Err(CorpusError::Counts {
                hypotheses: hypotheses.len(),
                references: references.len(),
            });
        }
        if hypotheses.is_empty() {
            return Err(CorpusError::Empty);
        }
        if let Some(index) = references.iter().position(Vec::is_empty) {
            return Err(CorpusError::NoReference { number: index + 1 });
        }
        let meanings = hypotheses.into_iter().zip(references);
        Ok(Self {
            meanings: meanings
                .map(|(hypothesis, references)| Meaning {
                    hypothesis,
                    references,
                })
                .collect(),
        })
    }

    /// The corpus of predictions, cut into tokens.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn from_predictions(
        predictions: &[Prediction],
        tokenization: Tokenization,
        lowercase: bool,
    ) -> Result<Self, CorpusError> {
        let tokens = |text: &String| {
            if lowercase {
                tokenization.split(&text.to_lowercase())
            } else {
                tokenization.split(text)
            }
        };
        Self::new(
            predictions.iter().map(|p| tokens(&p.prediction)).collect(),
            predictions
                .iter()
                .map(|p| p.references.iter().map(tokens).collect())
                .collect(),
        )
    }

    /// Number of meanings.
    pub fn len(&self) -> usize {
        self.meanings.len()
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.meanings.is_empty()
    }

    /// Number of references of all meanings.
    pub fn references(&self) -> usize {
        self.meanings.iter().map(|m| m.references.len()).sum()
    }

    /// The mean of a score over the meanings.
    fn mean(&self, score: impl Fn(&Meaning) -> f64) -> f64 {
        self.meanings.iter().map(score).sum::<f64>() / self.len() as f64
    }
}

/// How often each run of `n` tokens is in a text, in the order of their first places, so that sums have one order.
fn ngrams(tokens: &[String], n: usize) -> IndexMap<&[String], usize> {
    let mut counts = IndexMap::new();
    for ngram in tokens.windows(n) {
        *counts.entry(ngram).or_insert(0) += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    /// A case of `scripts/goldens_metrics.py`: texts, and the scores of the reference tools.
    #[derive(Deserialize)]
    struct Case {
        name: String,
        tokenize: String,
        lowercase: bool,
        hypotheses: Vec<String>,
        references: Vec<Vec<String>>,
        tokens: Vec<String>,
        bleu: f64,
        brevity_penalty: f64,
        nist: Option<f64>,
        rouge_l: f64,
        meteor: f64,
        cider: f64,
    }

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn scores_are_those_of_the_reference_tools() {
        let cases: Vec<Case> =
            serde_json::from_str(include_str!("../../tests/goldens/metrics.json")).unwrap();
        assert!(cases.len() >= 8);
        for case in cases {
            let predictions: Vec<Prediction> = case
                .hypotheses
                .iter()
                .zip(&case.references)
                .map(|(hypothesis, references)| Prediction {
                    prompt: String::new(),
                    prediction: hypothesis.clone(),
                    references: references.clone(),
                })
                .collect();
            let tokenization = match case.tokenize.as_str() {
                "13a" => Tokenization::Mteval13a,
                _ => Tokenization::Whitespace,
            };
            let corpus =
                Corpus::from_predictions(&predictions, tokenization, case.lowercase).unwrap();
            for (meaning, tokens) in corpus.meanings.iter().zip(&case.tokens) {
                assert_eq!(meaning.hypothesis.join(" "), *tokens, "{}", case.name);
            }
            let bleu = bleu(&corpus);
            for (metric, ours, golden) in [
                ("bleu", bleu.score, Some(case.bleu)),
                ("brevity", bleu.brevity_penalty, Some(case.brevity_penalty)),
                ("nist", nist(&corpus), case.nist),
                ("rouge-l", rouge_l(&corpus), Some(case.rouge_l)),
                ("meteor", meteor(&corpus), Some(case.meteor)),
                ("cider", cider(&corpus), Some(case.cider)),
            ] {
                assert!(ours.is_finite(), "{} {metric}: {ours}", case.name);
                if let Some(golden) = golden {
                    assert!(
                        (ours - golden).abs() < 1e-6,
                        "{} {metric}: {ours}, golden {golden}",
                        case.name
                    );
                }
            }
        }
    }

    #[test]
    fn a_copy_is_perfect_and_nothing_is_worthless() {
        let references = || {
            vec![
                vec![words("a cat sat on the mat")],
                vec![
                    words("dogs ran off quite far"),
                    words("the dog ran away fast"),
                ],
            ]
        };
        let copy = Corpus::new(
            vec![
                words("a cat sat on the mat"),
                words("the dog ran away fast"),
            ],
            references(),
        )
        .unwrap();
        assert!((bleu(&copy).score - 100.0).abs() < 1e-9);
        assert!((rouge_l(&copy) - 1.0).abs() < 1e-12);
        assert!(meteor(&copy) > 0.99);
        let empty = Corpus::new(vec![Vec::new(), Vec::new()], references()).unwrap();
        let scores = [
            bleu(&empty).score,
            nist(&empty),
            rouge_l(&empty),
            meteor(&empty),
            cider(&empty),
        ];
        assert_eq!(scores, [0.0; 5]);
        assert_eq!((copy.len(), copy.references()), (2, 3));
    }

    #[test]
    fn texts_must_have_references() {
        assert_eq!(Corpus::new(Vec::new(), Vec::new()), Err(CorpusError::Empty));
        assert_eq!(
            Corpus::new(vec![words("a")], Vec::new()),
            Err(CorpusError::Counts {
                hypotheses: 1,
                references: 0
            })
        );
        let error = Corpus::new(
            vec![words("a"), words("b")],
            vec![vec![words("a")], Vec::new()],
        );
        assert_eq!(
            error.unwrap_err().to_string(),
            "text 2 has no reference to compare it with"
        );
    }
}

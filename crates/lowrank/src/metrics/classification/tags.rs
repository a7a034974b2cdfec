//! Tags of tokens: accuracy, and the entities that they spell, as seqeval reads them by default.
//!
//! A tag is `O` (outside), or a prefix and a type: `B-PER` begins an entity, `I-PER` goes on with it, `E-PER` ends it and `S-PER` is
//! a whole one. The types may be left out (`B`, `I`). Reading is lenient (seqeval's default, not its strict mode): an `I-` or `E-`
//! without an entity of its type before it begins one, and an entity that lacks its `E-` ends before the next token that
//! cannot belong to it. An entity is right if its type, its first and its last token are those of a gold one.
//!
//! A name without a prefix, such as `PER`, is read as `I-PER`: a run of the same name is one entity. seqeval would take
//! the first letter for the prefix, so that `ORG` would be outside and `SPORT` would be a whole entity of the type `PORT`.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::Serialize;

use super::text;
use super::{ClassificationError, Counts, LabelScores, mean, share};

/// Counts tokens and entities of rows.
#[derive(Debug, Clone, Default)]
pub struct Tags {
    rows: usize,
    tokens: u64,
    correct: u64,
    types: BTreeMap<String, Counts>,
}

/// How well tags and entities are predicted. All figures are 0 to 1.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TagMetrics {
    /// Number of rows.
    pub rows: u64,
    /// Number of tokens that have a tag.
    pub tokens: u64,
    /// The share of tokens whose tag is predicted.
    pub accuracy: f64,
    /// Precision of all entities together.
    pub precision_micro: f64,
    /// Recall of all entities together.
    pub recall_micro: f64,
    /// F1 of all entities together: seqeval's `f1_score`.
    pub f1_micro: f64,
    /// The mean of the types' precisions; nothing where there are no entities.
    pub precision_macro: Option<f64>,
    /// The mean of the types' recalls; nothing where there are no entities.
    pub recall_macro: Option<f64>,
    /// The mean of the types' F1; nothing where there are no entities.
    pub f1_macro: Option<f64>,
    /// Figures of the types that are gold or predicted somewhere, by name.
    pub types: Vec<LabelScores>,
}

impl Tags {
    /// No rows yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a row: the gold and the predicted tag of each of its tokens, leaving out tokens without a label.
    ///
    /// # Errors
    /// If there are more of the ones than of the others. The row is then not counted.
    pub fn add<S: AsRef<str>>(
        &mut self,
        gold: &[S],
        predicted: &[S],
    ) -> Result<(), ClassificationError> {
        if gold.len() != predicted.len() {
            return Err(ClassificationError::Tags {
                row: self.rows + 1,
                gold: gold.len(),
                predicted: predicted.len(),
            });
        }
        let same = gold
            .iter()
            .zip(predicted)
            .filter(|(gold, predicted)| gold.as_ref() == predicted.as_ref());
        self.correct += same.count() as u64;
        self.tokens += gold.len() as u64;
        self.rows += 1;
        let gold = entities(gold);
        let known: HashSet<&Entity> = gold.iter().collect();
        for entity in &gold {
            self.counts(entity.kind).gold += 1;
        }
        for entity in &entities(predicted) {
            let counts = self.counts(entity.kind);
            counts.predicted += 1;
            counts.correct += u64::from(known.contains(entity));
        }
        Ok(())
    }

    /// The figures of all rows so far.
    ///
    /// # Errors
    /// If they have no tokens.
    pub fn metrics(&self) -> Result<TagMetrics, ClassificationError> {
        if self.tokens == 0 {
            return Err(ClassificationError::Empty);
        }
        let all: Counts = self.types.values().copied().sum();
        let macro_mean = |score: fn(Counts) -> f64| mean(self.types.values().map(|c| score(*c)));
        Ok(TagMetrics {
            rows: self.rows as u64,
            tokens: self.tokens,
            accuracy: share(self.correct, self.tokens),
            precision_micro: all.precision(),
            recall_micro: all.recall(),
            f1_micro: all.f1(),
            precision_macro: macro_mean(Counts::precision),
            recall_macro: macro_mean(Counts::recall),
            f1_macro: macro_mean(Counts::f1),
            types: self
                .types
                .iter()
                .map(|(name, counts)| counts.scores(name))
                .collect(),
        })
    }

    fn counts(&mut self, kind: &str) -> &mut Counts {
        if !self.types.contains_key(kind) {
            self.types.insert(kind.to_owned(), Counts::default());
        }
        self.types.get_mut(kind).expect("it was just inserted")
    }
}

impl TagMetrics {
    /// The figures of all types together, by their names in JSON.
    pub fn figures(&self) -> Vec<(&'static str, Option<f64>)> {
        vec![
            ("accuracy", Some(self.accuracy)),
            ("precision_micro", Some(self.precision_micro)),
            ("recall_micro", Some(self.recall_micro)),
            ("f1_micro", Some(self.f1_micro)),
            ("precision_macro", self.precision_macro),
            ("recall_macro", self.recall_macro),
            ("f1_macro", self.f1_macro),
        ]
    }
}

impl fmt::Display for TagMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::figures("tokens", self.tokens, &self.figures()))?;
        f.write_str("\n")?;
        if self.types.is_empty() {
            f.write_str("There are no entities, neither gold nor predicted.\n")
        } else {
            f.write_str(&text::label_table("type", &self.types))
        }
    }
}

/// Tokens `first` to `last` of a row, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Entity<'a> {
    kind: &'a str,
    first: usize,
    last: usize,
}

/// A tag's prefix, and the type behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tag<'a> {
    prefix: char,
    kind: &'a str,
}

/// The type of tags that have none.
const NO_TYPE: &str = "_";

const OUTSIDE: Tag = Tag {
    prefix: 'O',
    kind: NO_TYPE,
};

impl<'a> Tag<'a> {
    fn read(name: &'a str) -> Self {
        let (prefix, kind) = match name.split_once('-') {
            Some((prefix, kind)) => (prefix, kind),
            None => (name, ""),
        };
        let kind = if kind.is_empty() { NO_TYPE } else { kind };
        let mut letters = prefix.chars();
        match (letters.next(), letters.next()) {
            (Some(prefix @ ('O' | 'B' | 'I' | 'E' | 'S')), None) => Self { prefix, kind },
            // Last, unit, middle and whole of other schemes, which are not known without a type.
            (Some(prefix @ ('L' | 'U' | 'M' | 'W')), None) if name.contains('-') => {
                Self { prefix, kind }
            }
            _ => Self {
                prefix: 'I',
                kind: name,
            },
        }
    }

    /// Whether an entity that `self` is in ends before `next`.
    fn ends_before(self, next: Self) -> bool {
        match (self.prefix, next.prefix) {
            ('E' | 'S', _) | ('B' | 'I', 'B' | 'S' | 'O') => true,
            ('O', _) => false,
            _ => self.kind != next.kind,
        }
    }

    /// Whether an entity begins at `next`, which follows `self`.
    fn begins_at(self, next: Self) -> bool {
        match (self.prefix, next.prefix) {
            (_, 'B' | 'S') | ('E' | 'S' | 'O', 'E' | 'I') => true,
            (_, 'O') => false,
            _ => self.kind != next.kind,
        }
    }
}

/// The entities of a row, in order.
fn entities<S: AsRef<str>>(tags: &[S]) -> Vec<Entity<'_>> {
    let mut previous = OUTSIDE;
    let mut first = 0;
    let mut entities = Vec::new();
    let read = tags.iter().map(|name| Tag::read(name.as_ref()));
    for (index, tag) in read.chain([OUTSIDE]).enumerate() {
        if previous.ends_before(tag) {
            entities.push(Entity {
                kind: previous.kind,
                first,
                last: index - 1,
            });
        }
        if previous.begins_at(tag) {
            first = index;
        }
        previous = tag;
    }
    entities
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entities as `TYPE first last`.
    fn spelled(tags: &str) -> Vec<String> {
        let tags: Vec<&str> = tags.split_whitespace().collect();
        let spell = |e: &Entity| format!("{} {} {}", e.kind, e.first, e.last);
        entities(&tags).iter().map(spell).collect()
    }

    #[test]
    fn entities_are_read_leniently() {
        assert_eq!(spelled("B-PER I-PER O B-LOC"), ["PER 0 1", "LOC 3 3"]);
        assert_eq!(
            spelled("O I-PER I-LOC B-LOC"),
            ["PER 1 1", "LOC 2 2", "LOC 3 3"]
        );
        assert_eq!(
            spelled("B-PER E-PER S-PER I-PER"),
            ["PER 0 1", "PER 2 2", "PER 3 3"]
        );
        assert_eq!(spelled("B I O I"), ["_ 0 1", "_ 3 3"]);
        assert_eq!(spelled("B-x-y I-x-y I-x"), ["x-y 0 1", "x 2 2"]);
        assert!(spelled("O O").is_empty());
        assert!(spelled("").is_empty());
    }

    #[test]
    fn names_without_a_prefix_are_whole() {
        assert_eq!(
            spelled("ORG ORG SPORT SPORT O x-ray PER"),
            ["ORG 0 1", "SPORT 2 3", "x-ray 5 5", "PER 6 6"]
        );
    }
}

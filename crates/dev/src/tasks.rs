//! Two small tasks that show what an adapter does, made from the words of the corpus.
//!
//! - `cards` is data to text: `name: Tom | animal: red fox | place: river | feeling: happy | text:` becomes a sentence
//!   or two that mention every field. The base has seen such lines in lists alone, and makes a list of it. There are
//!   three ways to say each card, so that the loss does not fall to zero, as it does not in real data; whether all
//!   fields are there can be counted.
//! - `report` is rewriting: `"I lost my kite," said Tom.` becomes `Tom said that he had lost his kite.` There is one
//!   right answer, so that exact matches can be counted. It takes the pronoun of a name, a change of tense and copying,
//!   all of which the base can do, but it has never seen reported speech of this kind, and goes on with a story.
//!
//! A completion begins with the space that parts it from its prompt, so that a prompt typed on a command line needs none
//! at its end, and a name is the same token in both. No prompt occurs twice, within a split or across them.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::corpus::{GRAMMAR, Kind};
use crate::random::Random;

/// The tasks' names.
pub const TASKS: [&str; 2] = ["cards", "report"];

/// The splits and their numbers of rows.
pub const SPLITS: [(&str, usize); 3] = [("train", 512), ("valid", 64), ("test", 64)];

const SEED: u64 = 20_240;

/// One row of a task.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Row {
    /// What the model is given.
    pub prompt: String,
    /// What it should add.
    pub completion: String,
}

/// The rows of each of the [`SPLITS`] of a task; none when there is no such task.
pub fn rows(task: &str) -> Vec<Vec<Row>> {
    let texts: Vec<_> = GRAMMAR
        .texts(Kind::Pair)
        .filter(|text| text.name.split('/').next() == Some(task))
        .collect();
    if texts.is_empty() {
        return vec![];
    }
    let mut prompts = BTreeSet::new();
    let mut index = 0;
    let mut row = || loop {
        let random = &mut Random::new(SEED, index);
        index += 1;
        let text = texts[random.below(texts.len())];
        let scene = GRAMMAR.cast(text, random);
        let [prompts_of_text, completions] = &text.beats[..] else {
            continue;
        };
        let prompt = GRAMMAR.expand(prompts_of_text.way(random), &scene, random);
        if prompts.insert(prompt.clone()) {
            let completion = format!(" {}", GRAMMAR.say(completions.way(random), &scene, random));
            return Row { prompt, completion };
        }
    };
    SPLITS
        .iter()
        .map(|&(_, count)| (0..count).map(|_| row()).collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_fills_its_splits_and_holds_out_its_prompts() {
        for task in TASKS {
            let splits = rows(task);
            let mut prompts = BTreeSet::new();
            for (rows, (_, count)) in splits.iter().zip(SPLITS) {
                assert_eq!(rows.len(), count);
                for row in rows {
                    assert!(prompts.insert(&row.prompt), "{task}: twice: {}", row.prompt);
                    assert!(
                        row.completion.starts_with(' ') && row.completion.ends_with('.'),
                        "{row:?}"
                    );
                    assert_eq!(row.prompt, row.prompt.trim());
                }
            }
        }
        assert!(rows("none").is_empty());
    }

    #[test]
    fn a_completion_mentions_every_field() {
        for row in rows("cards").iter().flatten() {
            for field in row.prompt.trim_end_matches(" | text:").split(" | ") {
                let (_, value) = field.split_once(": ").expect("a field is `name: value`");
                let found = row
                    .completion
                    .to_lowercase()
                    .contains(&value.to_lowercase());
                assert!(found, "{value} is not in {row:?}");
            }
        }
    }

    #[test]
    fn a_report_has_no_quotation_and_no_first_person() {
        for row in rows("report").iter().flatten() {
            let words: Vec<_> = row.completion.split([' ', '.', ',']).collect();
            assert!(
                !row.completion.contains('"')
                    && !words.iter().any(|word| ["I", "my", "me"].contains(word)),
                "{row:?}"
            );
            assert!(
                row.prompt.starts_with('"') && row.prompt.matches('"').count() == 2,
                "{row:?}"
            );
        }
    }
}

//! How often labels come, and what is odd about it.

use std::fmt;

use serde::Serialize;

use super::listed;
use crate::data::task::{Label, Labels, ProblemType};

/// How often each label comes in a file's rows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LabelCounts {
    /// The labels.
    pub labels: Labels,
    /// For each label the rows that have it, or the words; empty where the labels are numbers.
    pub counts: Vec<usize>,
    /// Least and greatest of the numbers, where the labels are numbers.
    pub range: Option<(f32, f32)>,
    /// Whether these numbers may be meant as classes: all of them are small and whole.
    #[serde(skip)]
    are_whole: bool,
}

impl LabelCounts {
    /// Counts the labels of rows.
    pub(in crate::data) fn of<'a>(labels: &Labels, rows: impl Iterator<Item = &'a Label>) -> Self {
        let mut counts = vec![0; labels.names.len()];
        let mut range: Option<(f32, f32)> = None;
        let mut are_whole = labels.problem_type == ProblemType::Regression;
        let mut count = |at: usize| {
            if let Some(count) = counts.get_mut(at) {
                *count += 1;
            }
        };
        for label in rows {
            match label {
                Label::Class(class) => count(*class as usize),
                Label::Tags(tags) => tags.iter().for_each(|(_, class)| count(*class as usize)),
                Label::Classes(classes) => {
                    let right = classes.iter().enumerate().filter(|(_, bit)| **bit > 0.0);
                    right.for_each(|(at, _)| count(at));
                }
                Label::Values(values) => {
                    for value in values {
                        are_whole &= value.fract() == 0.0 && (0.0..20.0).contains(value);
                        let (least, greatest) = range.unwrap_or((*value, *value));
                        range = Some((least.min(*value), greatest.max(*value)));
                    }
                }
            }
        }
        if labels.problem_type == ProblemType::Regression {
            counts.clear();
        }
        Self {
            labels: labels.clone(),
            counts,
            range,
            are_whole,
        }
    }

    /// What a reader should know of them, a sentence each. `rows` is how many rows there are.
    pub(in crate::data) fn notes(&self, rows: usize) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some((least, greatest)) = self.range {
            if least == greatest {
                notes.push(format!(
                    "all rows have the label {least}: there is nothing to learn from them"
                ));
            } else if self.are_whole {
                notes.push(
                    "all labels are whole numbers, and are learned as numbers; for classes write them without a point (1, not 1.0)"
                        .to_owned(),
                );
            }
            return notes;
        }
        let named = || self.labels.names.iter().zip(&self.counts);
        let found: Vec<_> = named().filter(|(_, count)| **count > 0).collect();
        let is_list = self.labels.problem_type == ProblemType::MultiLabelClassification;
        match found.as_slice() {
            [(name, count)] if !is_list && rows > 1 && **count > 1 => notes.push(format!(
                "all labels are {name:?}: there is nothing to tell apart"
            )),
            _ => {}
        }
        if is_list {
            let constant = |(_, count): &(&String, &usize)| **count == rows && rows > 1;
            let always: Vec<String> = named()
                .filter(constant)
                .map(|(name, _)| name.clone())
                .collect();
            if !always.is_empty() {
                notes.push(format!("every row has the labels {}", listed(&always)));
            }
        }
        let once: Vec<String> = named()
            .filter(|(_, count)| **count == 1)
            .map(|(name, _)| name.clone())
            .collect();
        if !once.is_empty() && rows > 1 {
            notes.push(format!("labels that come once: {}", listed(&once)));
        }
        let least = found.iter().min_by_key(|(_, count)| **count);
        let most = found.iter().max_by_key(|(_, count)| **count);
        if let (Some((few, least)), Some((many, most))) = (least, most)
            && **most > 10 * **least
        {
            notes.push(format!(
                "labels are unequal: {many:?} comes {most} times and {few:?} {least}; a classifier may learn to say the \
                 former alone"
            ));
        }
        let none: Vec<String> = named()
            .filter(|(_, count)| **count == 0)
            .map(|(name, _)| name.clone())
            .collect();
        if !none.is_empty() {
            notes.push(format!("labels that no row has: {}", listed(&none)));
        }
        notes
    }
}

impl fmt::Display for LabelCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 20;
        if let Some((least, greatest)) = self.range {
            return write!(f, "labels are numbers, from {least} to {greatest}");
        }
        let count = self.labels.names.len();
        write!(f, "{count} labels")?;
        if self.labels.problem_type == ProblemType::MultiLabelClassification {
            write!(f, ", any number of them a row")?;
        }
        let named = self.labels.names.iter().zip(&self.counts);
        for (at, (name, count)) in named.take(SHOWN).enumerate() {
            let before = if at == 0 { ": " } else { ", " };
            write!(f, "{before}{} {count}", name.escape_debug())?;
        }
        if count > SHOWN {
            write!(f, " and {} more", count - SHOWN)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::read_all;
    use super::*;

    #[test]
    fn what_is_odd_about_labels_is_said() {
        let notes = |rows: serde_json::Value| {
            let (labels, read) = read_all(&rows);
            let counts = LabelCounts::of(&labels, read.iter());
            (counts.to_string(), counts.notes(read.len()).join("; "))
        };
        let (shown, said) = notes(json!(["a", "a", "b", "b"]));
        assert_eq!((shown.as_str(), said.as_str()), ("2 labels: a 2, b 2", ""));
        let many: Vec<&str> = std::iter::repeat_n("a", 11).chain(["b"]).collect();
        let (_, said) = notes(json!(many));
        assert_eq!(
            said,
            "labels that come once: \"b\"; labels are unequal: \"a\" comes 11 times and \"b\" 1; a classifier may learn to say \
             the former alone"
        );
        let (_, said) = notes(json!(["a", "a"]));
        assert_eq!(said, "all labels are \"a\": there is nothing to tell apart");
        let (shown, said) = notes(json!([0.5, 0.5]));
        assert_eq!(shown, "labels are numbers, from 0.5 to 0.5");
        assert_eq!(
            said,
            "all rows have the label 0.5: there is nothing to learn from them"
        );
        let (_, said) = notes(json!([0.0, 1.0, 0.0]));
        assert!(
            said.contains("for classes write them without a point"),
            "{said}"
        );
        let (_, said) = notes(json!([0.0, 1.5]));
        assert_eq!(said, "");
        let (shown, said) = notes(json!([["a", "b"], ["b"], ["a", "b"]]));
        assert_eq!(shown, "2 labels, any number of them a row: a 2, b 3");
        assert_eq!(said, "every row has the labels \"b\"");
    }
}

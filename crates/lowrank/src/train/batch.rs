//! From rows to a batch, and to the objective that scores it.

use std::borrow::Cow;

use crate::base::Network;
use crate::data::batches::prompt_groups;
use crate::data::{Example, Label};
use crate::model::{Batch, ModelConfig, Pooling, Scored, VirtualTokens};
use crate::objective::{ClassTargets, Classes, NextToken, Objective};

/// How labels are scored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scoring {
    /// Share of a label's probability that is spread over all (`label_smoothing_factor`).
    pub label_smoothing: f32,
    /// Weights of a classifier's labels; empty: all the same.
    pub class_weights: Vec<f32>,
}

impl Scoring {
    /// What scores a batch of these rows.
    pub fn objective<'a>(&'a self, batch: &'a Batch, rows: &[&Example]) -> Box<dyn Objective + 'a> {
        match self.classes(rows) {
            Some(classes) => Box::new(classes),
            None => Box::new(NextToken {
                label_smoothing: self.label_smoothing,
                ..NextToken::of(batch)
            }),
        }
    }

    /// What scores the logits of rows that have labels.
    pub fn classes(&self, rows: &[&Example]) -> Option<Classes<'_>> {
        let weights = &self.class_weights;
        Some(Classes {
            targets: class_targets(rows)?,
            label_smoothing: self.label_smoothing,
            class_weights: (!weights.is_empty()).then_some(Cow::Borrowed(weights.as_slice())),
        })
    }
}

/// Weights that make up for how rare a label is: rows / (labels · rows that have it), as scikit-learn's `balanced`. A label without
/// rows has the weight 0, which no row asks for.
pub(super) fn balanced(rows: &[Example], base: &Network) -> Vec<f32> {
    let outputs = base.decoder.config().classifier();
    let mut counts = vec![0_usize; outputs.map_or(0, |classifier| classifier.labels)];
    for row in rows {
        let mut count = |label: u32| {
            if let Some(count) = counts.get_mut(label as usize) {
                *count += 1;
            }
        };
        match &row.label {
            Some(Label::Class(label)) => count(*label),
            Some(Label::Tags(tags)) => tags.iter().for_each(|(_, tag)| count(*tag)),
            _ => return Vec::new(),
        }
    }
    let total: usize = counts.iter().sum();
    let seen = counts.iter().filter(|count| **count > 0).count();
    let weight = |count: &usize| match count {
        0 => 0.0,
        count => total as f32 / (seen * count) as f32,
    };
    counts.iter().map(weight).collect()
}

/// The targets of rows that have labels.
fn class_targets(rows: &[&Example]) -> Option<ClassTargets> {
    let labels = rows.iter().filter_map(|row| row.label.as_ref());
    let (mut one, mut several, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for label in labels {
        match label {
            Label::Class(label) => one.push(*label),
            Label::Tags(tags) => one.extend(tags.iter().map(|(_, tag)| *tag)),
            Label::Classes(classes) => several.extend_from_slice(classes),
            Label::Values(numbers) => values.extend_from_slice(numbers),
        }
    }
    if !several.is_empty() {
        Some(ClassTargets::Several(several))
    } else if !values.is_empty() {
        Some(ClassTargets::Values(values))
    } else if one.is_empty() {
        None
    } else {
        Some(ClassTargets::One(one))
    }
}

/// The batch of some rows for a model, using adapter 0, whose virtual tokens these are.
pub fn batch_for<'e>(
    model: &ModelConfig,
    rows: impl IntoIterator<Item = &'e Example>,
    virtual_tokens: VirtualTokens,
) -> Batch {
    match model.classifier() {
        Some(classifier) => {
            classified(model, classifier.pooling, rows, virtual_tokens).with_adapter(0)
        }
        None => batch_of(rows, virtual_tokens),
    }
}

/// The same for a language model.
pub fn batch_of<'e>(
    rows: impl IntoIterator<Item = &'e Example>,
    virtual_tokens: VirtualTokens,
) -> Batch {
    let mut batch = Batch::with_virtual(virtual_tokens);
    for row in rows {
        batch.push_with_prompt(row.prompt().len(), &row.ids, &row.supervised);
    }
    batch.with_adapter(0)
}

/// The same for a classifier that reads these rows of a sequence. Without labels of tokens it reads every token.
pub fn classified<'e>(
    model: &ModelConfig,
    pooling: Pooling,
    rows: impl IntoIterator<Item = &'e Example>,
    virtual_tokens: VirtualTokens,
) -> Batch {
    let mut batch = if model.causal {
        Batch::with_virtual(virtual_tokens)
    } else {
        Batch::bidirectional(virtual_tokens)
    };
    for row in rows {
        let tokens: Vec<u32>;
        let scored = match pooling {
            Pooling::First => Scored::First,
            Pooling::Last => Scored::Last,
            Pooling::Mean => Scored::Mean,
            Pooling::Each => {
                tokens = match &row.label {
                    Some(Label::Tags(tags)) => tags.iter().map(|(token, _)| *token).collect(),
                    _ => (0..row.ids.len() as u32).collect(),
                };
                Scored::Tokens(&tokens)
            }
        };
        batch.push_scored(&row.ids, types_for(model, row), scored, model.causal);
    }
    batch
}

/// The types of a row's tokens; none where the model does not have them all: a tokenizer may number the texts of a pair for a model
/// that has one type.
fn types_for<'e>(model: &ModelConfig, row: &'e Example) -> &'e [u8] {
    let types = &row.token_types;
    if types
        .iter()
        .all(|kind| usize::from(*kind) < model.token_types)
    {
        types
    } else {
        &[]
    }
}

/// The same as [`batch_of`] where rows with the same prompt share its rows of the batch. Without dropout, losses and gradients are
/// those of `batch_of` up to rounding; a mask belongs to a row of the batch, so with dropout they are of other masks.
pub fn shared_batch_of(rows: &[&Example], virtual_tokens: VirtualTokens) -> Batch {
    let mut batch = Batch::with_virtual(virtual_tokens);
    for group in prompt_groups(rows.iter().copied()) {
        let sequences: Vec<(&[u32], &[bool])> = group
            .iter()
            .map(|&i| (&rows[i].ids[..], &rows[i].supervised[..]))
            .collect();
        let prefix = if sequences.len() > 1 || virtual_tokens.infix > 0 {
            rows[group[0]].prompt().len()
        } else {
            0
        };
        batch.push_shared(prefix, &sequences);
    }
    batch.with_adapter(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Purpose;
    use crate::plan::presets;

    #[test]
    fn a_model_with_one_type_reads_a_pair() {
        let purpose = Purpose::SequenceClassifier { labels: 2 };
        let mut model = presets::config_for("bert-base", purpose).unwrap();
        let row = Example {
            ids: vec![5, 6, 7],
            token_types: vec![0, 0, 1],
            ..Example::default()
        };
        assert_eq!(types_for(&model, &row), [0, 0, 1]);
        model.token_types = 1;
        assert!(types_for(&model, &row).is_empty());
    }
}

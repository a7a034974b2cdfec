//! What a model is for: going by the rows that it is trained on, or by the adapter that it is used with.

use std::path::Path;

use crate::Error;
use crate::base::Source;
use crate::data::{Labels, ProblemType, TaskType};
use crate::model::Purpose;
use crate::tuning;

/// What a model is for, going by the task of its rows.
pub fn purpose_of(task: TaskType, labels: Option<&Labels>) -> Purpose {
    let labels = labels.map_or(0, |labels| labels.names.len());
    match task {
        TaskType::CausalLm => Purpose::LanguageModel,
        TaskType::SeqCls => Purpose::SequenceClassifier { labels },
        TaskType::TokenCls => Purpose::TokenClassifier { labels },
        TaskType::FeatureExtraction => Purpose::Features,
    }
}

/// What a model is for, by itself or with the adapter in a folder, and what the outputs of its classifier mean.
///
/// # Errors
/// Files that cannot be used; an adapter that says it classifies and holds no classifier.
pub fn purpose_with(
    source: &Source,
    adapter: Option<&Path>,
) -> Result<(Purpose, Option<Labels>), Error> {
    let Some(folder) = adapter else {
        return source.purpose();
    };
    let task = tuning::task_of(folder)?;
    let outputs = || {
        task.outputs.ok_or_else(|| {
            Error::Settings(format!(
                "{}: its task_type is {}, and it holds no classifier (classifier.weight or score.weight)",
                folder.display(),
                task.task_type
            ))
        })
    };
    let (purpose, outputs) = match task.task_type.as_str() {
        "SEQ_CLS" => {
            let labels = outputs()?;
            (Purpose::SequenceClassifier { labels }, labels)
        }
        "TOKEN_CLS" => {
            let labels = outputs()?;
            (Purpose::TokenClassifier { labels }, labels)
        }
        "FEATURE_EXTRACTION" => return Ok((Purpose::Features, None)),
        _ => return Ok((Purpose::LanguageModel, None)),
    };
    let labels = labels_of(&task, outputs, source, folder)?;
    Ok((purpose, Some(labels)))
}

/// What the adapter's file says of its outputs, or what the model's config.json does, or numbers.
fn labels_of(
    task: &tuning::Task,
    outputs: usize,
    source: &Source,
    folder: &Path,
) -> Result<Labels, Error> {
    if let Some(text) = &task.labels {
        return serde_json::from_str(text).map_err(|error| {
            Error::Settings(format!(
                "{}: the labels in its metadata are damaged: {error}",
                folder.display()
            ))
        });
    }
    let (_, of_model) = source.purpose()?;
    if let Some(labels) = of_model.filter(|labels| labels.names.len() == outputs) {
        return Ok(labels);
    }
    Ok(Labels {
        names: (0..outputs).map(|n| format!("LABEL_{n}")).collect(),
        problem_type: if outputs == 1 && task.task_type == "SEQ_CLS" {
            ProblemType::Regression
        } else {
            ProblemType::SingleLabelClassification
        },
    })
}

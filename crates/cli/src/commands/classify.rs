//! `lowrank classify`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use lowrank::Workspace;
use lowrank::classify::{predict, probabilities, tags};
use lowrank::data::{Labels, ProblemType, UnlabelledRow};
use lowrank::metrics::classification::{is_predicted, top_label};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::common::BaseArgs;
use super::texts::TextsArgs;
use super::with_adapter::{self, WithAdapter};
use crate::output::not_written;

/// Arguments of `lowrank classify`.
#[derive(Debug, Args)]
pub struct ClassifyArgs {
    /// The model
    #[command(flatten)]
    pub base: BaseArgs,

    /// An adapter that was trained to classify
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// What is classified
    #[command(flatten)]
    pub texts: TextsArgs,

    /// Print a JSON object a row
    #[arg(long, conflicts_with = "csv")]
    pub json: bool,

    /// Print CSV
    #[arg(long)]
    pub csv: bool,
}

/// What is said of one row.
#[derive(Debug, Serialize)]
struct Said {
    /// Its line.
    line: usize,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    text_pair: Option<String>,
    /// Tokens of it that were cut, where some were.
    #[serde(skip_serializing_if = "is_zero")]
    cut_tokens: usize,
    #[serde(flatten)]
    answer: Answer,
    /// The row's own label, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    given: Option<Value>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(count: &usize) -> bool {
    *count == 0
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Answer {
    One {
        label: String,
        probability: f32,
        probabilities: Map<String, Value>,
    },
    Several {
        labels: Vec<String>,
        probabilities: Map<String, Value>,
    },
    Values {
        values: Map<String, Value>,
    },
    Words {
        words: Vec<TaggedWord>,
    },
}

#[derive(Debug, Serialize)]
struct TaggedWord {
    word: String,
    start: usize,
    end: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    probability: Option<f32>,
}

/// Runs the command.
///
/// # Errors
/// A model, adapter or data that cannot be used; a row that cannot be read, which ends the work.
pub fn run(args: &ClassifyArgs) -> anyhow::Result<()> {
    let plan = with_adapter::plan_of(args.base.source()?, args.adapter.as_deref())?;
    let Some(task) = plan.task() else {
        return Err(plan.no_classifier().into());
    };
    let tokenizer = Arc::new(plan.tokenizer()?);
    let classifier = plan.load(args.base.base_dtype, args.adapter.as_deref())?;
    let labels = classifier.network.labels.as_ref();
    let of_numbers = labels.is_some_and(|labels| labels.problem_type == ProblemType::Regression);
    let mut printer = Printer::new(args, if of_numbers { "value" } else { "probability" })?;
    let texts = &args.texts;
    texts.for_each_batch(&tokenizer, task, classifier.max_length, |rows| {
        for said in classify(&classifier, rows) {
            printer.print(&said)?;
        }
        printer.flush()
    })
}

/// What the classifier says of some rows.
fn classify(classifier: &WithAdapter, rows: Vec<UnlabelledRow>) -> Vec<Said> {
    let Some(labels) = &classifier.network.labels else {
        return Vec::new();
    };
    let examples: Vec<_> = rows.iter().map(|row| row.example.clone()).collect();
    let (model, ws) = (&classifier.network.decoder, Workspace::new());
    let mut outputs = Vec::with_capacity(rows.len());
    predict(model, classifier.trained(), &examples, &ws, |_, found| {
        outputs.extend(found);
        std::ops::ControlFlow::Continue(())
    });
    let is_of_tokens = |row: &UnlabelledRow| !row.words.is_empty();
    let said = rows.into_iter().zip(outputs).map(|(row, logits)| {
        let answer = if is_of_tokens(&row) {
            tagged(labels, &row, &logits)
        } else {
            answer(labels, logits)
        };
        Said {
            line: row.example.line,
            text: row.text,
            text_pair: row.pair,
            cut_tokens: row.example.truncated,
            answer,
            given: row.label,
        }
    });
    said.collect()
}

fn answer(labels: &Labels, mut values: Vec<f32>) -> Answer {
    probabilities(labels.problem_type, &mut values);
    let named = labels.names.iter().zip(&values);
    let map: Map<String, Value> = named
        .clone()
        .map(|(name, value)| (name.clone(), json!(value)))
        .collect();
    match labels.problem_type {
        ProblemType::Regression => Answer::Values { values: map },
        ProblemType::MultiLabelClassification => Answer::Several {
            labels: named
                .filter(|(_, value)| is_predicted(**value))
                .map(|(name, _)| name.clone())
                .collect(),
            probabilities: map,
        },
        ProblemType::SingleLabelClassification => {
            let top = top_label(&values);
            Answer::One {
                label: labels.names[top].clone(),
                probability: values[top],
                probabilities: map,
            }
        }
    }
}

fn tagged(labels: &Labels, row: &UnlabelledRow, logits: &[f32]) -> Answer {
    let found = tags(labels, &row.words, logits);
    let words = row.words.iter().zip(found).map(|(word, found)| TaggedWord {
        word: word.text.clone(),
        start: word.start,
        end: word.end,
        label: found.map(|(label, _)| label.to_owned()),
        probability: found.map(|(_, probability)| probability),
    });
    Answer::Words {
        words: words.collect(),
    }
}

/// Writes rows as they come.
struct Printer {
    json: bool,
    csv: Option<csv::Writer<io::Stdout>>,
}

impl Printer {
    /// `value` is what the last column of a table holds.
    fn new(args: &ClassifyArgs, value: &str) -> anyhow::Result<Self> {
        let csv = if args.csv {
            let mut writer = csv::Writer::from_writer(io::stdout());
            writer
                .write_record(["line", "text", "text_pair", "label", value])
                .map_err(not_written_csv)?;
            Some(writer)
        } else {
            None
        };
        Ok(Self {
            json: args.json,
            csv,
        })
    }

    fn print(&mut self, said: &Said) -> anyhow::Result<()> {
        if let Some(writer) = &mut self.csv {
            for (text, label, probability) in said.cells() {
                let line = said.line.to_string();
                let pair = said.text_pair.clone().unwrap_or_default();
                writer
                    .write_record([line, text, pair, label, probability])
                    .map_err(not_written_csv)?;
            }
            return Ok(());
        }
        let mut out = io::stdout().lock();
        let written = if self.json {
            writeln!(out, "{}", serde_json::to_string(said)?)
        } else {
            said.cells()
                .into_iter()
                .try_for_each(|(text, label, probability)| {
                    let line = |text: String| text.replace(['\n', '\r', '\t'], " ");
                    let pair = said
                        .text_pair
                        .clone()
                        .map(|pair| format!("\t{}", line(pair)));
                    let (label, text) = (line(label), line(text));
                    writeln!(
                        out,
                        "{label}\t{probability}\t{text}{}",
                        pair.unwrap_or_default()
                    )
                })
        };
        written.map_err(not_written)
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        match &mut self.csv {
            Some(writer) => writer.flush(),
            None => io::stdout().flush(),
        }
        .map_err(not_written)
    }
}

fn not_written_csv(error: csv::Error) -> anyhow::Error {
    not_written(error.into())
}

impl Said {
    /// Text, label and probability, a line for a row or for each word of it.
    fn cells(&self) -> Vec<(String, String, String)> {
        let shown = |value: f32| format!("{value:.4}");
        match &self.answer {
            Answer::One {
                label, probability, ..
            } => vec![(self.text.clone(), label.clone(), shown(*probability))],
            Answer::Several {
                labels,
                probabilities,
            } => {
                let values = labels
                    .iter()
                    .filter_map(|label| probabilities[label].as_f64());
                let values: Vec<_> = values.map(|value| shown(value as f32)).collect();
                vec![(self.text.clone(), labels.join("|"), values.join("|"))]
            }
            Answer::Values { values } => values
                .iter()
                .map(|(name, value)| (self.text.clone(), name.clone(), value.to_string()))
                .collect(),
            Answer::Words { words } => words
                .iter()
                .map(|word| {
                    let label = word.label.clone().unwrap_or_default();
                    let probability = word.probability.map(shown).unwrap_or_default();
                    (word.word.clone(), label, probability)
                })
                .collect(),
        }
    }
}

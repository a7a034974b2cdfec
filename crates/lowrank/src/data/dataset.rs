//! A file of rows as examples, and the account of what became of each row.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::DataError;
use super::example::{Example, encode_row};
use super::files::{RawRow, Rows, Split, require_split};
use super::rows::{RowKind, RowProblem, read_row, unknown_kind};
use super::tokenizer::Tokenizer;

/// What to do with a row that cannot be learned from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRow {
    /// Stop and say which.
    #[default]
    Error,
    /// Leave it out, and list it in the report.
    Skip,
}

/// How rows become examples.
#[derive(Debug, Clone)]
pub struct DataOptions {
    /// Tokens of an example at most; what is over is cut from its end.
    pub max_seq_length: usize,
    /// Let the loss fall on every token but the first.
    pub train_on_prompt: bool,
    /// What to do with a row that cannot be learned from.
    pub on_bad_row: OnBadRow,
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            max_seq_length: 2048,
            train_on_prompt: false,
            on_bad_row: OnBadRow::Error,
        }
    }
}

/// The examples of one file, in its order.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// One for each row that was kept.
    pub examples: Vec<Example>,
    /// The form of the rows.
    pub kind: RowKind,
    /// What became of the rows.
    pub report: DataReport,
}

/// A row that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BadRow {
    /// Its line, counted from 1.
    pub line: usize,
    /// Why.
    pub reason: String,
}

/// What became of a file's rows. `Display` says it in a few lines.
#[derive(Debug, Clone, Serialize)]
pub struct DataReport {
    /// The file that was read.
    pub path: PathBuf,
    /// The form of its rows, detected from the first.
    pub kind: RowKind,
    /// How rows were written as text, where there was a choice.
    pub layout: Option<String>,
    /// Rows in the file, blank lines not counted.
    pub rows: usize,
    /// Rows that became examples.
    pub kept: usize,
    /// Examples that were cut.
    pub truncated_rows: usize,
    /// Tokens that were cut from them.
    pub truncated_tokens: usize,
    /// Rows that were left out.
    pub skipped: Vec<BadRow>,
    /// Fields that rows have and that were not used.
    pub unused_fields: Vec<String>,
    /// Tokens of all examples.
    pub tokens: usize,
    /// Tokens that the loss falls on.
    pub supervised_tokens: usize,
    /// Tokens of the longest example.
    pub longest: usize,
}

impl Dataset {
    /// Reads and encodes a split of `path`, a folder or a file, on all threads of rayon's pool. Examples are in the
    /// file's order, whatever the number of threads.
    ///
    /// # Errors
    /// If the file is not there or empty, if its first row is of no known kind or a later one of another kind, or, with
    /// [`OnBadRow::Error`], for the first row that cannot be learned from.
    pub fn load(
        path: &Path,
        split: Split,
        tokenizer: &Tokenizer,
        options: &DataOptions,
    ) -> Result<Self, DataError> {
        let file = require_split(path, split)?;
        let mut rows = Rows::open(&file)?;
        let mut loader = Loader {
            path: &file,
            tokenizer,
            options,
            kind: None,
            unused: BTreeSet::new(),
        };
        let (mut examples, mut skipped, mut count) = (Vec::new(), Vec::new(), 0);
        loop {
            let batch = rows.next_batch(&file)?;
            if batch.is_empty() {
                break;
            }
            count += batch.len();
            loader.add(&batch, &mut examples, &mut skipped)?;
        }
        let Loader { kind, unused, .. } = loader;
        let (Some((kind, _)), false) = (kind, examples.is_empty()) else {
            let reason = match skipped.first() {
                None => "is empty: it holds no rows".to_owned(),
                Some(BadRow { line, reason }) => {
                    format!(
                        "none of its {count} rows can be used; the first one, line {line}: {reason}"
                    )
                }
            };
            return Err(DataError::Empty { path: file, reason });
        };
        let layout = (kind == RowKind::Alpaca).then(|| {
            let chosen = if tokenizer.has_chat_template() {
                "the model's chat template"
            } else {
                "the Alpaca prompt"
            };
            chosen.to_owned()
        });
        let report = DataReport {
            path: file,
            kind,
            layout,
            rows: count,
            kept: examples.len(),
            truncated_rows: examples
                .iter()
                .filter(|example| example.truncated > 0)
                .count(),
            truncated_tokens: examples.iter().map(|example| example.truncated).sum(),
            skipped,
            unused_fields: unused.into_iter().collect(),
            tokens: examples.iter().map(|example| example.ids.len()).sum(),
            supervised_tokens: examples.iter().map(Example::supervised_tokens).sum(),
            longest: examples
                .iter()
                .map(|example| example.ids.len())
                .max()
                .unwrap_or(0),
        };
        Ok(Self {
            examples,
            kind,
            report,
        })
    }
}

struct Loader<'a> {
    path: &'a Path,
    tokenizer: &'a Tokenizer,
    options: &'a DataOptions,
    /// The kind of the first row that has one, and its line.
    kind: Option<(RowKind, usize)>,
    unused: BTreeSet<String>,
}

type Parsed = Result<Map<String, Value>, (usize, String)>;

impl Loader<'_> {
    fn add(
        &mut self,
        batch: &[RawRow],
        examples: &mut Vec<Example>,
        skipped: &mut Vec<BadRow>,
    ) -> Result<(), DataError> {
        let parsed: Vec<Parsed> = batch.par_iter().map(RawRow::parse).collect();
        self.detect(batch, &parsed);
        let (kind, path) = (self.kind, self.path);
        let encoded: Vec<Result<Example, (usize, RowProblem)>> = batch
            .par_iter()
            .zip(parsed.par_iter())
            .map(|(raw, row)| match row {
                Err((line, reason)) => Err((*line, RowProblem::Bad(reason.clone()))),
                Ok(row) => self
                    .encode(kind.map(|(kind, _)| kind), row, raw.line)
                    .map_err(|problem| (raw.line, problem)),
            })
            .collect();
        for (outcome, row) in encoded.into_iter().zip(&parsed) {
            match outcome {
                Ok(example) => examples.push(example),
                Err((line, RowProblem::OtherKind(found))) => {
                    let (expected, first_line) =
                        kind.map_or((String::new(), 0), |(kind, at)| (kind.to_string(), at));
                    return Err(DataError::Mixed {
                        path: path.to_owned(),
                        line,
                        first_line,
                        expected,
                        found,
                    });
                }
                Err((line, RowProblem::Bad(reason))) => match self.options.on_bad_row {
                    OnBadRow::Error => return Err(DataError::row(path, line, reason)),
                    OnBadRow::Skip => skipped.push(BadRow { line, reason }),
                },
            }
            if let (Ok(row), Some((kind, _))) = (row, kind) {
                for name in row.keys().filter(|name| !kind.uses(name)) {
                    if !self.unused.contains(name) {
                        self.unused.insert(name.clone());
                    }
                }
            }
        }
        Ok(())
    }

    fn detect(&mut self, batch: &[RawRow], parsed: &[Parsed]) {
        if self.kind.is_none() {
            self.kind = batch
                .iter()
                .zip(parsed)
                .find_map(|(raw, row)| Some((RowKind::detect(row.as_ref().ok()?)?, raw.line)));
        }
    }

    fn encode(
        &self,
        kind: Option<RowKind>,
        row: &Map<String, Value>,
        line: usize,
    ) -> Result<Example, RowProblem> {
        let Some(kind) = kind else {
            return Err(RowProblem::Bad(unknown_kind(row)));
        };
        let content = read_row(kind, row)?;
        encode_row(self.tokenizer, &content, line, self.options).map_err(RowProblem::Bad)
    }
}

impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} rows, {}",
            self.path.display(),
            self.rows,
            self.kind
        )?;
        if let Some(layout) = &self.layout {
            write!(f, ", written with {layout}")?;
        }
        write!(
            f,
            "\n  {} examples, {} tokens ({} supervised), the longest {}",
            self.kept, self.tokens, self.supervised_tokens, self.longest
        )?;
        if self.truncated_rows > 0 {
            write!(
                f,
                "\n  {} rows were cut at max_seq_length; {} tokens are lost",
                self.truncated_rows, self.truncated_tokens
            )?;
        }
        if !self.unused_fields.is_empty() {
            write!(
                f,
                "\n  fields that are not used: {}",
                self.unused_fields.join(", ")
            )?;
        }
        if !self.skipped.is_empty() {
            write!(f, "\n  {} rows were skipped:", self.skipped.len())?;
            for bad in self.skipped.iter().take(SHOWN) {
                write!(f, "\n    line {}: {}", bad.line, bad.reason)?;
            }
            if self.skipped.len() > SHOWN {
                write!(f, "\n    and {} more", self.skipped.len() - SHOWN)?;
            }
        }
        Ok(())
    }
}

/// Skipped rows that the report names one by one.
const SHOWN: usize = 5;

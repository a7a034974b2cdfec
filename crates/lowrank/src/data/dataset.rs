//! A file of rows as examples, and the account of what became of each row.

use std::collections::BTreeSet;
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::DataError;
use super::example::{Boundary, Example, RowNotes, encode_row};
use super::files::{RawRow, Rows, Split, require_split};
use super::labelled::encode_labelled;
use super::labels::{self, LabelCounts, Written};
use super::message::MARKS;
use super::rows::{Content, RowKind, RowProblem, read_row, unknown_kind};
use super::task::{Labels, TaskType};
use super::tokenizer::Tokenizer;

mod report;

use report::Notes;
pub use report::{BadRow, DataReport};

/// What to do with a row that cannot be learned from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum OnBadRow {
    /// Stop and say which row and why.
    #[default]
    Error,
    /// Leave the row out, and say how many were.
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
    /// How a prompt and its completion become tokens.
    pub completion_boundary: Boundary,
    /// What the rows are to teach. None: what the first of them has fields for, which is a class where it has a label.
    pub task: Option<TaskType>,
    /// The labels that rows are read by, those of the training rows or of a model. None: those that the rows themselves have.
    pub labels: Option<Labels>,
    /// The labels that a classifier has already, in its order: rows that have the same ones take it.
    pub order: Option<Labels>,
    /// The names of the columns of a table without a header; `_` for one that is not wanted.
    pub columns: Option<Vec<String>>,
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            max_seq_length: 2048,
            train_on_prompt: false,
            on_bad_row: OnBadRow::Error,
            completion_boundary: Boundary::Joint,
            task: None,
            labels: None,
            order: None,
            columns: None,
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
    /// The labels of the rows, where they have some: what [`Example::label`] counts in.
    pub labels: Option<Labels>,
    /// What became of the rows.
    pub report: DataReport,
}

impl Dataset {
    /// Reads and encodes a split of `path`, a folder or a file, on all threads of rayon's pool. Examples are in the
    /// file's order, whatever the number of threads.
    ///
    /// # Errors
    /// If the task is one that no rows teach, if the file is not there or empty, if its first row is of no known kind or a later one of another kind, if labels are of
    /// different forms, or, with [`OnBadRow::Error`], for the first row that cannot be learned from.
    pub fn load(
        path: &Path,
        split: Split,
        tokenizer: &Tokenizer,
        options: &DataOptions,
    ) -> Result<Self, DataError> {
        if options.task == Some(TaskType::FeatureExtraction) {
            let reason = "no rows teach FEATURE_EXTRACTION, which gives texts their vectors as the model is; train with \
                          labels (SEQ_CLS) or on texts (CAUSAL_LM)";
            return Err(DataError::layout(path, reason));
        }
        let file = require_split(path, split)?;
        let mut rows = Rows::open(&file, options.columns.as_deref())?;
        let mut loader = Loader {
            path: &file,
            tokenizer,
            options,
            kind: None,
            unused: BTreeSet::new(),
            notes: Notes::default(),
            written: Vec::new(),
            is_table: rows.is_table(),
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
        examples.shrink_to_fit();
        let labels = loader.label(&mut examples, &mut skipped)?;
        let Loader {
            kind,
            unused,
            notes,
            ..
        } = loader;
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
        let counts = labels.as_ref().map(|labels| {
            let rows = examples.iter().filter_map(|example| example.label.as_ref());
            LabelCounts::of(labels, rows)
        });
        let mut sentences = notes.sentences();
        sentences.extend(
            counts
                .iter()
                .flat_map(|counts| counts.notes(examples.len())),
        );
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
            rows_without_end: examples
                .iter()
                .filter(|example| example.label.is_none() && !teaches_end(example, tokenizer))
                .count(),
            unnamed_end: tokenizer.unnamed_end().map(|id| tokenizer.token_text(id)),
            skipped,
            unused_fields: unused.into_iter().collect(),
            labels: counts,
            notes: sentences,
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
            labels,
            report,
        })
    }
}

/// What the first row of a split teaches.
///
/// # Errors
/// If the file is not there or empty, or none of its first rows is of a known kind.
pub fn task_of(
    path: &Path,
    split: Split,
    columns: Option<&[String]>,
) -> Result<TaskType, DataError> {
    let file = require_split(path, split)?;
    let first = Rows::open(&file, columns)?.next_batch(&file)?;
    let rows = first.iter().filter_map(|raw| raw.parse().ok());
    let mut kinds = rows.filter_map(|row| RowKind::detect(&row, None));
    kinds
        .next()
        .map(RowKind::task)
        .ok_or_else(|| DataError::Empty {
            path: file.clone(),
            reason: "holds no row of a known kind".to_owned(),
        })
}

fn teaches_end(example: &Example, tokenizer: &Tokenizer) -> bool {
    let mut labels = example.ids.iter().zip(&example.supervised);
    let ends = |id: &u32| tokenizer.stop_ids().contains(id) && Some(*id) != tokenizer.unnamed_end();
    example.truncated > 0 || labels.any(|(id, label)| *label && ends(id))
}

struct Loader<'a> {
    path: &'a Path,
    tokenizer: &'a Tokenizer,
    options: &'a DataOptions,
    /// The kind of the first row that has one, and its line.
    kind: Option<(RowKind, usize)>,
    unused: BTreeSet<String>,
    notes: Notes,
    /// The labels of the examples, where rows have some: what they mean is known when all have been seen.
    written: Vec<Written>,
    is_table: bool,
}

/// What a row became.
struct EncodedRow {
    example: Example,
    notes: RowNotes,
    written: Option<Written>,
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
        let encoded: Vec<Result<EncodedRow, (usize, RowProblem)>> = batch
            .par_iter()
            .zip(parsed.par_iter())
            .map(|(raw, row)| match row {
                Err((line, reason)) => Err((*line, RowProblem::Bad(reason.clone()))),
                Ok(row) => self
                    .encode(kind.map(|(kind, _)| kind), row, raw)
                    .map_err(|problem| (raw.line, problem.about(raw))),
            })
            .collect();
        for (outcome, row) in encoded.into_iter().zip(&parsed) {
            match outcome {
                Ok(row) => {
                    examples.push(row.example);
                    self.notes.add(row.notes);
                    self.written.extend(row.written);
                }
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
                for name in row.keys().filter(|name| !kind.uses(row, name)) {
                    if !self.unused.contains(name) {
                        self.unused.insert(name.clone());
                    }
                }
                self.add_unused_of_messages(kind, row);
            }
        }
        Ok(())
    }

    /// Fields of a conversation that nothing reads: neither this program nor, by its words, the chat template.
    fn add_unused_of_messages(&mut self, kind: RowKind, row: &Map<String, Value>) {
        let reads = |name: &str| self.tokenizer.template_mentions(name);
        let (list, known): (&str, &[&str]) = match kind {
            RowKind::Messages => ("messages", &["role", "content"]),
            RowKind::ShareGpt => ("conversations", &["from", "value"]),
            _ => return,
        };
        let mut found = Vec::new();
        let offers_tools = row.get("tools").and_then(Value::as_array);
        if offers_tools.is_some_and(|tools| !tools.is_empty())
            && !reads("tools")
            && !self.tokenizer.has_tool_template()
        {
            found.push("tools (the chat template does not write them)".to_owned());
        }
        let messages = row.get(list).and_then(Value::as_array);
        for message in messages.into_iter().flatten().filter_map(Value::as_object) {
            for (name, value) in message {
                let used = known.contains(&name.as_str())
                    || MARKS.contains(&name.as_str())
                    || value.is_null()
                    || (kind == RowKind::Messages && is_read(name, reads));
                if !used {
                    found.push(format!("{list}[].{name}"));
                }
            }
        }
        self.unused.extend(found);
    }

    fn detect(&mut self, batch: &[RawRow], parsed: &[Parsed]) {
        if self.kind.is_none() {
            self.kind = batch.iter().zip(parsed).find_map(|(raw, row)| {
                let kind = RowKind::detect(row.as_ref().ok()?, self.options.task)?;
                Some((kind, raw.line))
            });
        }
    }

    fn encode(
        &self,
        kind: Option<RowKind>,
        row: &Map<String, Value>,
        raw: &RawRow,
    ) -> Result<EncodedRow, RowProblem> {
        let Some(kind) = kind else {
            return Err(RowProblem::Bad(unknown_kind(row, self.options.task)));
        };
        let content = read_row(kind, row)?;
        if let Content::Labelled(row) = content {
            let length = self.options.max_seq_length;
            let (example, notes, written) =
                encode_labelled(self.tokenizer, row, raw, length).map_err(RowProblem::Bad)?;
            return Ok(EncodedRow {
                example,
                notes,
                written: Some(written),
            });
        }
        let (example, notes) = encode_row(self.tokenizer, &content, raw.line, self.options)
            .map_err(RowProblem::Bad)?;
        Ok(EncodedRow {
            example,
            notes,
            written: None,
        })
    }

    /// Gives the examples their labels, once all rows have been seen.
    fn label(
        &mut self,
        examples: &mut Vec<Example>,
        skipped: &mut Vec<BadRow>,
    ) -> Result<Option<Labels>, DataError> {
        let mut written = std::mem::take(&mut self.written);
        if written.is_empty() {
            return Ok(None);
        }
        let path = self.path;
        let bad = |row: &Written, reason: String| {
            DataError::row(path, row.line, RawRow::of_number(row.row, reason))
        };
        let labels = if let Some(labels) = &self.options.labels {
            labels.clone()
        } else {
            let mut found = labels::find(&mut written, self.is_table)
                .map_err(|(at, reason)| bad(&written[at], reason))?;
            if matches!(self.kind, Some((RowKind::Passages, _))) {
                labels::complete_marks(&mut found);
            }
            let order = self.options.order.as_ref();
            match order.filter(|order| found.are_those_of(order)) {
                Some(order) => order.clone(),
                None => found,
            }
        };
        let reader = labels::Reader::new(&labels, self.is_table);
        let mut kept = Vec::with_capacity(examples.len());
        for (mut example, row) in std::mem::take(examples).into_iter().zip(&written) {
            match (reader.read(row), self.options.on_bad_row) {
                (Ok(label), _) => {
                    example.label = Some(label);
                    kept.push(example);
                }
                (Err(reason), OnBadRow::Error) => return Err(bad(row, reason)),
                (Err(reason), OnBadRow::Skip) => skipped.push(BadRow {
                    line: row.line,
                    reason: RawRow::of_number(row.row, reason),
                }),
            }
        }
        skipped.sort_by_key(|bad| bad.line);
        *examples = kept;
        Ok(Some(labels))
    }
}

/// Whether a template reads a message's field: reasoning is handed to it under all of its names.
fn is_read(name: &str, reads: impl Fn(&str) -> bool) -> bool {
    let reasoning = ["reasoning_content", "thinking", "reasoning"];
    if reasoning.contains(&name) {
        return reasoning.iter().any(|name| reads(name));
    }
    reads(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixture;

    mod labelled;

    fn load_with(text: &str, options: &DataOptions) -> Result<Dataset, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.jsonl");
        std::fs::write(&path, text).unwrap();
        let loaded = Dataset::load(folder.path(), Split::Train, &fixture::tokenizer(), options);
        loaded.map_err(|error| {
            error
                .to_string()
                .replace(&folder.path().display().to_string(), "data")
        })
    }

    fn load(text: &str) -> Result<Dataset, String> {
        load_with(text, &DataOptions::default())
    }

    fn skipping() -> DataOptions {
        DataOptions {
            on_bad_row: OnBadRow::Skip,
            ..DataOptions::default()
        }
    }

    #[test]
    fn rows_become_examples_in_order() {
        let row = |n| format!("{{\"prompt\": \"{n}\", \"completion\": \"x\", \"id\": {n}}}");
        let text = (0..9000).map(row).collect::<Vec<_>>().join("\n\n");
        let data = load(&text).unwrap();
        assert_eq!(data.kind, RowKind::PromptCompletion);
        assert_eq!(
            (data.report.rows, data.report.kept, data.examples.len()),
            (9000, 9000, 9000)
        );
        let tokenizer = fixture::tokenizer();
        for (n, example) in data.examples.iter().enumerate() {
            assert_eq!(example.line, 2 * n + 1);
            assert_eq!(
                tokenizer.decode(&example.ids, true).unwrap(),
                format!("{n}x")
            );
        }
        assert_eq!(data.report.unused_fields, ["id"]);
        assert_eq!(data.report.supervised_tokens, 18_000);
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let row = |n| format!("{{\"text\": \"hello {n}\"}}");
        let text = (0..500).map(row).collect::<Vec<_>>().join("\n");
        let in_pool = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| load(&text).unwrap().examples)
        };
        assert_eq!(in_pool(1), in_pool(3));
    }

    #[test]
    fn errors_name_file_line_and_reason() {
        for (text, expected) in [
            ("", "data/train.jsonl: is empty: it holds no rows"),
            ("\n\n", "data/train.jsonl: is empty: it holds no rows"),
            (
                "{\"text\": \"a\"}\n\n{\"text\": 1}",
                "data/train.jsonl, line 3: \"text\" must be a text, but is a number (1)",
            ),
            (
                "{\"text\": \"a\"}\n{\"txt\": \"b\"}",
                "data/train.jsonl, line 2: \"text\" is missing; the row has \"txt\"",
            ),
            (
                "{\"a\": 1}",
                "data/train.jsonl, line 1: the row has \"a\", which is no known kind",
            ),
            (
                "{\"text\": \"a\"",
                "data/train.jsonl, line 1: invalid JSON at column 12",
            ),
            (
                "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}",
                "line 1: no message has the role \"assistant\"",
            ),
            (
                "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}, {\"role\": \"assistant\", \"content\": \"y\", \"weight\": 0}]}",
                "line 1: no token is supervised: every assistant message is marked",
            ),
        ] {
            let error = load(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_mixed_file_is_an_error_even_when_bad_rows_are_skipped() {
        let text = "{\"text\": \"a\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n";
        for options in [DataOptions::default(), skipping()] {
            let error = load_with(text, &options).unwrap_err();
            assert!(
                error.contains("data/train.jsonl, line 2: this row is prompt and completion, but the file began with text on line 1"),
                "{error}"
            );
        }
    }

    #[test]
    fn skipped_rows_are_listed_with_their_reasons() {
        let text =
            "{\n{\"x\": 1}\n{\"text\": \"hello\"}\n{\"text\": \"\"}\n{\"text\": \"a\"}\n[]\n";
        assert!(load(text).is_err());
        let data = load_with(text, &skipping()).unwrap();
        let lines: Vec<usize> = data.report.skipped.iter().map(|bad| bad.line).collect();
        assert_eq!(lines, [1, 2, 4, 6]);
        assert_eq!((data.report.rows, data.report.kept), (6, 2));
        let shown = data.report.to_string();
        assert!(
            shown.contains("4 rows were skipped:\n    line 1: invalid JSON"),
            "{shown}"
        );
        assert!(shown.contains("line 4: \"text\" is empty"), "{shown}");
        let error = load_with("{\"text\": \"\"}\n", &skipping()).unwrap_err();
        assert!(
            error.contains(
                "none of its 1 rows can be used; the first one, line 1: \"text\" is empty"
            ),
            "{error}"
        );
    }

    #[test]
    fn cuts_are_reported() {
        let options = DataOptions {
            max_seq_length: 4,
            ..DataOptions::default()
        };
        let data = load_with("{\"text\": \"abcdef\"}\n{\"text\": \"ab\"}\n", &options).unwrap();
        assert_eq!(
            (
                data.report.truncated_rows,
                data.report.truncated_tokens,
                data.report.longest
            ),
            (1, 3, 4)
        );
        let shown = data.report.to_string();
        assert!(
            shown.contains(
                "train.jsonl: 2 rows, text\n  2 examples, 7 tokens (5 supervised), the longest 4"
            ),
            "{shown}"
        );
        assert!(
            shown.contains("1 row was cut at 4 tokens") && shown.contains("3 tokens are lost"),
            "{shown}"
        );
        let error = load_with(
            "{\"prompt\": \"abcdef\", \"completion\": \"x\"}\n",
            &options,
        )
        .unwrap_err();
        assert!(
            error.contains("line 1: no supervised token is left"),
            "{error}"
        );
    }

    #[test]
    fn alpaca_rows_state_their_layout() {
        let data = load("{\"instruction\": \"a\", \"input\": \"\", \"output\": \"b\"}\n").unwrap();
        assert!(
            data.report
                .to_string()
                .contains("written with the model's chat template")
        );
    }

    #[test]
    fn an_answer_that_the_template_does_not_write_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chat.jsonl");
        let row = "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}";
        std::fs::write(&path, row).unwrap();
        let tokenizer = fixture::with_template(Some("{{ messages[0].content }}"));
        let options = DataOptions::default();
        let error = Dataset::load(&path, Split::File, &tokenizer, &options).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("the chat template does not write what the assistant says"),
            "{error}"
        );
    }

    #[test]
    fn a_template_without_an_end_token_is_noted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chat.jsonl");
        let row = "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}";
        std::fs::write(&path, row).unwrap();
        let template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
        let load = |tokenizer| {
            Dataset::load(&path, Split::File, &tokenizer, &DataOptions::default())
                .unwrap()
                .report
        };
        let report = load(fixture::with_template(Some(template)));
        assert_eq!(report.rows_without_end, 1);
        assert_eq!(report.unnamed_end, None);
        assert!(
            report
                .to_string()
                .contains("1 rows teach none of the model's end tokens")
        );
        assert_eq!(load(fixture::tokenizer()).rows_without_end, 0);
    }

    #[test]
    fn fields_of_messages_that_nothing_reads_are_named() {
        let text = "{\"messages\": [{\"role\": \"user\", \"content\": \"q\", \"id\": 1, \"name\": null}, \
                    {\"role\": \"assistant\", \"content\": \"a\", \"weight\": 1, \"reasoning\": \"hm\", \"tool_calls\": []}], \"tools\": [{\"name\": \"f\"}]}\n";
        let report = load(text).unwrap().report;
        assert_eq!(
            report.unused_fields,
            [
                "messages[].id",
                "messages[].reasoning",
                "messages[].tool_calls",
                "tools (the chat template does not write them)"
            ]
        );
        let text = "{\"conversations\": [{\"from\": \"human\", \"value\": \"q\", \"weight\": 0}, {\"from\": \"gpt\", \"value\": \"a\", \"score\": 1}]}\n";
        assert_eq!(
            load(text).unwrap().report.unused_fields,
            ["conversations[].score"]
        );
    }

    #[test]
    fn what_was_changed_or_is_odd_is_said() {
        let text = "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"q\"}]}, {\"role\": \"assistant\", \"content\": \"\"}, \
                    {\"role\": \"critic\", \"content\": \"c\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}\n";
        let shown = load(text).unwrap().report.to_string();
        let call = "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\", \
                    \"tool_calls\": [{\"name\": \"f\", \"arguments\": {\"id\": 123456789012345678901}}, {\"name\": \"f\", \"arguments\": \"x\"}]}]}\n";
        let of_call = load(call).unwrap().report.to_string();
        for expected in [
            "1 rows have tools or calls with whole numbers of 20 digits",
            "1 tool calls have arguments that are no JSON",
        ] {
            assert!(of_call.contains(expected), "{of_call}");
        }
        for expected in [
            "1 rows have contents in parts",
            "1 answers are empty",
            "roles that chat templates seldom know: \"critic\"",
        ] {
            assert!(shown.contains(expected), "{shown}");
        }
    }
}

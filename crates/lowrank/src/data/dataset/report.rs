//! The account of what became of a file's rows.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::data::example::RowNotes;
use crate::data::labels::LabelCounts;
use crate::data::rows::RowKind;
use crate::data::task::TaskType;

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
    /// Examples that were not cut and yet teach none of the end tokens that the model's files name: the chat template ends
    /// a turn with something else, so a program that reads those files may not stop.
    pub rows_without_end: usize,
    /// The special token that the chat template ends a turn with, where no file names it as an end.
    pub unnamed_end: Option<String>,
    /// Rows that were left out.
    pub skipped: Vec<BadRow>,
    /// Fields that rows have and that were not used; those of messages as `messages[].name`.
    pub unused_fields: Vec<String>,
    /// The labels, and how often each comes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<LabelCounts>,
    /// What else a reader should know, a sentence each.
    pub notes: Vec<String>,
    /// Tokens of all examples.
    pub tokens: usize,
    /// Tokens that the loss falls on, where rows teach their own tokens.
    pub supervised_tokens: usize,
    /// Tokens of the longest example.
    pub longest: usize,
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
        match self.kind.task() {
            TaskType::SeqCls => write!(f, ", to classify texts (SEQ_CLS)")?,
            TaskType::TokenCls => write!(f, ", to classify words (TOKEN_CLS)")?,
            TaskType::CausalLm | TaskType::FeatureExtraction => {}
        }
        write!(f, "\n  {} examples, {} tokens", self.kept, self.tokens)?;
        if self.kind.task() == TaskType::CausalLm {
            write!(f, " ({} supervised)", self.supervised_tokens)?;
        }
        write!(f, ", the longest {}", self.longest)?;
        if let Some(labels) = &self.labels {
            write!(f, "\n  {labels}")?;
        }
        if self.truncated_rows > 0 {
            let (rows, tokens, longest) =
                (self.truncated_rows, self.truncated_tokens, self.longest);
            let were = if rows == 1 { "row was" } else { "rows were" };
            write!(
                f,
                "\n  {rows} {were} cut at {longest} tokens (max_seq_length, or what the model has positions for); {tokens} tokens are lost"
            )?;
        }
        if self.rows_without_end > 0 {
            let rows = self.rows_without_end;
            match &self.unnamed_end {
                Some(end) => write!(
                    f,
                    "\n  {rows} rows end with {end}, which the model's files do not name as an end token; generation stops there \
                     all the same, but other programs may not: add its id to eos_token_id in generation_config.json"
                )?,
                None => write!(
                    f,
                    "\n  {rows} rows teach none of the model's end tokens (the chat template ends a turn with something else), \
                     so the model may not learn to stop"
                )?,
            }
        }
        for note in &self.notes {
            write!(f, "\n  {note}")?;
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

/// What the rows' notes come to.
#[derive(Debug, Default)]
pub(super) struct Notes {
    arguments: usize,
    parts: usize,
    rewritten: usize,
    empty: usize,
    unreadable: usize,
    large_numbers: usize,
    shared_token: usize,
    cut_words: usize,
    joined_words: usize,
    cut_marks: usize,
    lost_marks: usize,
    roles: BTreeSet<String>,
}

impl Notes {
    pub(super) fn add(&mut self, row: RowNotes) {
        self.arguments += usize::from(row.chat.arguments);
        self.parts += usize::from(row.chat.parts);
        self.rewritten += row.chat.rewritten;
        self.empty += row.chat.empty;
        self.unreadable += row.chat.unreadable;
        self.large_numbers += usize::from(row.chat.large_numbers);
        self.shared_token += usize::from(row.shared_token);
        self.cut_words += row.words.cut;
        self.joined_words += row.words.joined;
        self.cut_marks += row.words.cut_marks;
        self.lost_marks += row.words.lost_marks;
        self.roles.extend(row.chat.roles);
    }

    pub(super) fn sentences(&self) -> Vec<String> {
        let mut list = Vec::new();
        let mut add = |count: usize, text: &str| {
            if count > 0 {
                list.push(format!("{count} {text}"));
            }
        };
        add(
            self.arguments,
            "rows have tool calls whose arguments were given to the chat template in the form that it writes (JSON text as an \
             object, or the other way round)",
        );
        add(
            self.parts,
            "rows have contents in parts, which were joined by line ends, since the chat template writes texts",
        );
        add(
            self.rewritten,
            "messages are not in the text as they stand: the chat template leaves them out or rewrites them",
        );
        add(self.empty, "answers are empty: only their end is learned");
        add(
            self.unreadable,
            "tool calls have arguments that are no JSON, and are learned as they stand",
        );
        add(
            self.large_numbers,
            "rows have tools or calls with whole numbers of 20 digits or more, of which 17 are kept; write them as texts",
        );
        add(
            self.shared_token,
            "rows have a token that covers the end of the prompt and the beginning of the completion; the prompt alone is \
             encoded otherwise, so let the completion begin with the space or line end between them, or set \
             completion_boundary to apart",
        );
        add(
            self.cut_words,
            "words lie beyond the cut at max_seq_length, so their tags are not learned",
        );
        add(
            self.joined_words,
            "words share their first token with the word before them, so they have no tag of their own",
        );
        add(
            self.cut_marks,
            "marked passages begin or end inside a word; the whole word has their tag",
        );
        add(
            self.lost_marks,
            "marked passages have no word of their own, so they are not learned",
        );
        if !self.roles.is_empty() {
            let roles: Vec<String> = self.roles.iter().map(|role| format!("{role:?}")).collect();
            list.push(format!(
                "roles that chat templates seldom know: {} (usual are system, user, assistant and tool)",
                roles.join(", ")
            ));
        }
        list
    }
}

/// Skipped rows that the report names one by one.
const SHOWN: usize = 5;

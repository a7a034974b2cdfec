//! Rows that are to be classified, or given a vector: read a few at a time, with what is to be shown of each.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value};

use super::dataset::BadRow;
use super::error::DataError;
use super::example::Example;
use super::files::{RawRow, Rows, Split, require_split};
use super::labelled::{encode_input, example_of};
use super::rows::{Input, own_label, read_unlabelled};
use super::task::TaskType;
use super::tokenizer::Tokenizer;

/// How rows are read.
#[derive(Debug, Clone)]
pub struct UnlabelledOptions {
    /// What they are read for.
    pub task: TaskType,
    /// Tokens of a row at most; what is over is cut, of pairs from the longer text first.
    pub max_seq_length: usize,
    /// The names of the columns of a table without a header.
    pub columns: Option<Vec<String>>,
    /// Rows of a batch at most.
    pub batch_rows: usize,
}

/// A row that is to be classified.
#[derive(Debug, Clone, PartialEq)]
pub struct UnlabelledRow {
    /// Its tokens.
    pub example: Example,
    /// What was read: the text, or its words with a space between.
    pub text: String,
    /// The second text of a pair.
    pub pair: Option<String>,
    /// The words that are to be tagged, for [`TaskType::TokenCls`].
    pub words: Vec<Word>,
    /// The row's own label, as it stands there.
    pub label: Option<Value>,
}

/// A word that is to be tagged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Word {
    /// The word.
    pub text: String,
    /// The first of its characters in the row's text.
    pub start: usize,
    /// The first character behind it.
    pub end: usize,
    /// The token that speaks for it; none where the word was cut, or shares its token with the word before.
    pub token: Option<u32>,
}

/// The rows of a file or of standard input, batch by batch. Each row of a batch is one, or the reason why it is none; an error
/// of the file itself ends them.
///
/// Rows are `{"text"}`, two texts by any of the names that rows with labels have, or `{"tokens"}`, in JSON or a table; a file whose name
/// ends in .txt, and standard input that is not JSON, is a text a line. Spaces around a line are not part of its text.
pub struct Unlabelled<'a> {
    path: PathBuf,
    rows: Rows,
    tokenizer: &'a Tokenizer,
    options: UnlabelledOptions,
    /// Whether any row was read, and whether all were.
    begun: bool,
    ended: bool,
}

impl<'a> Unlabelled<'a> {
    /// Opens a file, or standard input where `path` is `-`.
    ///
    /// # Errors
    /// If there is no such file, or it is none of rows or lines.
    pub fn open(
        path: &Path,
        tokenizer: &'a Tokenizer,
        options: UnlabelledOptions,
    ) -> Result<Self, DataError> {
        let path = require_split(path, Split::File)?;
        let rows = Rows::open_or_lines(&path, options.columns.as_deref())?;
        Ok(Self {
            path,
            rows,
            tokenizer,
            options,
            begun: false,
            ended: false,
        })
    }

    fn next_batch(&mut self) -> Result<Vec<Result<UnlabelledRow, BadRow>>, DataError> {
        let batch = self
            .rows
            .next_rows(&self.path, self.options.batch_rows.max(1))?;
        if batch.is_empty() && !self.begun {
            return Err(DataError::Empty {
                path: self.path.clone(),
                reason: "is empty: it holds no rows".into(),
            });
        }
        self.begun = true;
        let (tokenizer, options) = (self.tokenizer, &self.options);
        let read = |raw: &RawRow| -> Result<UnlabelledRow, (usize, String)> {
            let row = raw.parse()?;
            let here = |reason: String| (raw.line, raw.about(reason));
            let input = input_of(&row, options.task).map_err(here)?;
            let label = own_label(&row).cloned();
            let read = encode(tokenizer, input, options.max_seq_length, raw.line).map_err(here)?;
            Ok(UnlabelledRow { label, ..read })
        };
        let rows = batch.par_iter().map(|raw| {
            let bad = |(line, reason)| BadRow { line, reason };
            read(raw).map_err(bad)
        });
        Ok(rows.collect())
    }
}

impl Iterator for Unlabelled<'_> {
    type Item = Result<Vec<Result<UnlabelledRow, BadRow>>, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let batch = self.next_batch();
        self.ended = batch.as_ref().map_or(true, Vec::is_empty);
        match batch {
            Ok(rows) if rows.is_empty() => None,
            batch => Some(batch),
        }
    }
}

impl UnlabelledRow {
    /// A row of one text, or of a pair.
    ///
    /// # Errors
    /// If a text is empty, if the tokenizer cannot encode it, or if a pair is given where words are to be tagged.
    pub fn of_text(
        tokenizer: &Tokenizer,
        text: &str,
        pair: Option<&str>,
        options: &UnlabelledOptions,
    ) -> Result<Self, DataError> {
        let mut row = Map::new();
        row.insert("text".into(), text.into());
        row.extend(pair.map(|pair| ("text_pair".to_owned(), pair.into())));
        let input = input_of(&row, options.task);
        let read = input.and_then(|input| encode(tokenizer, input, options.max_seq_length, 1));
        read.map_err(DataError::Text)
    }
}

/// What a model of a task reads of a row.
fn input_of(row: &Map<String, Value>, task: TaskType) -> Result<Input, String> {
    match (read_unlabelled(row)?, task) {
        (Input::Text { text, pair: None }, TaskType::TokenCls) => Ok(Input::Passages(text)),
        (Input::Text { pair: Some(_), .. }, TaskType::TokenCls) => Err(
            "the row has two texts, and the model tags the words of one; give each text a row of its own".into(),
        ),
        (input @ Input::Words(_), TaskType::TokenCls) | (input @ Input::Text { .. }, _) => Ok(input),
        (Input::Words(_) | Input::Passages(_), _) => Err(
            "the row has \"tokens\", and the model reads texts; give the text as \"text\"".into(),
        ),
    }
}

/// A row's tokens, and what is to be shown of it; without its label.
fn encode(
    tokenizer: &Tokenizer,
    input: Input,
    max_length: usize,
    line: usize,
) -> Result<UnlabelledRow, String> {
    let encoded = encode_input(tokenizer, &input, max_length)?;
    let (text, pair, ranges) = match input {
        Input::Text { text, pair } => (text, pair, Vec::new()),
        Input::Passages(text) => (text, None, encoded.words),
        Input::Words(words) => {
            let mut text = String::new();
            let mut ranges = Vec::with_capacity(words.len());
            for word in &words {
                if !text.is_empty() {
                    text.push(' ');
                }
                let start = text.len();
                text.push_str(word);
                ranges.push(start..text.len());
            }
            (text, None, ranges)
        }
    };
    // Words stand in the order of the text, so each is counted on from the one before.
    let (mut byte, mut character) = (0, 0);
    let mut count = |upto: usize| {
        character += text[byte..upto].chars().count();
        byte = upto;
        character
    };
    let words = ranges.into_iter().zip(encoded.first);
    let words: Vec<Word> = words
        .map(|(range, token)| Word {
            start: count(range.start),
            end: count(range.end),
            text: text[range].to_owned(),
            token,
        })
        .collect();
    Ok(UnlabelledRow {
        example: example_of(encoded.encoded, line),
        text,
        pair,
        words,
        label: None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::fixture;

    fn options(task: TaskType) -> UnlabelledOptions {
        UnlabelledOptions {
            task,
            max_seq_length: 64,
            columns: None,
            batch_rows: 2,
        }
    }

    /// The batches of a file.
    fn read(
        name: &str,
        text: &str,
        options: UnlabelledOptions,
    ) -> Result<Vec<Vec<Result<UnlabelledRow, BadRow>>>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let tokenizer = fixture::tokenizer();
        let shorten =
            |error: DataError| error.to_string().replace(&path.display().to_string(), name);
        let rows = Unlabelled::open(&path, &tokenizer, options).map_err(shorten)?;
        rows.map(|batch| batch.map_err(shorten)).collect()
    }

    fn texts(batches: &[Vec<Result<UnlabelledRow, BadRow>>]) -> Vec<Vec<&str>> {
        let mut all = Vec::new();
        for batch in batches {
            all.push(
                batch
                    .iter()
                    .map(|row| row.as_ref().unwrap().text.as_str())
                    .collect(),
            );
        }
        all
    }

    #[test]
    fn rows_come_a_batch_at_a_time() {
        let lines = "hello\n\n  {a}, b\r\nc";
        let json =
            "{\"text\": \"hello\"}\n{\"sentence\": \"{a}, b\"}\n{\"text\": \"c\", \"label\": 1}";
        let table = "idx,text,label\n0,hello,\n1,\"{a}, b\",\n2,c,1";
        for (name, text) in [
            ("a.txt", lines),
            ("a.jsonl", json),
            ("a.csv", table),
            ("b.txt", json),
        ] {
            let batches = read(name, text, options(TaskType::SeqCls)).unwrap();
            assert_eq!(
                texts(&batches),
                [vec!["hello", "{a}, b"], vec!["c"]],
                "{name}"
            );
            let last = batches[1][0].as_ref().unwrap();
            assert_eq!(
                last.example.line,
                if name == "a.csv" || name == "a.txt" {
                    4
                } else {
                    3
                }
            );
            assert_eq!(
                last.example.ids,
                fixture::tokenizer().encode("c", false).unwrap()
            );
        }
        let batches = read("a.jsonl", json, options(TaskType::SeqCls)).unwrap();
        let label = |batch: usize| batches[batch][0].as_ref().unwrap().label.clone();
        assert_eq!((label(0), label(1)), (None, Some(json!(1))));
        let columns = UnlabelledOptions {
            columns: Some(vec!["label".into(), "text".into()]),
            ..options(TaskType::SeqCls)
        };
        let batches = read("a.txt", "1\ta\n0\tb\n", columns).unwrap();
        assert_eq!(texts(&batches), [["a", "b"]]);
    }

    #[cfg(unix)]
    #[test]
    fn a_pipe_is_lines_a_table_or_json() {
        for (text, expected) in [
            ("hello\n[b]\n", vec![vec!["hello", "[b]"]]),
            ("{\"text\": \"hello\"}\n", vec![vec!["hello"]]),
            ("[{\"text\": \"hello\"}]", vec![vec!["hello"]]),
            (
                "idx\ttext\n0\thello\n1\tb\n2\tc\n",
                vec![vec!["hello", "b"], vec!["c"]],
            ),
            ("text\n\"hello, b\"\n", vec![vec!["hello, b"]]),
            ("texts\nhello\n", vec![vec!["texts", "hello"]]),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("pipe");
            let made = std::process::Command::new("mkfifo").arg(&path).status();
            assert!(made.is_ok_and(|status| status.success()));
            let writer = {
                let path = path.clone();
                std::thread::spawn(move || std::fs::write(path, text))
            };
            let tokenizer = fixture::tokenizer();
            let rows = Unlabelled::open(&path, &tokenizer, options(TaskType::SeqCls)).unwrap();
            let batches: Vec<_> = rows.map(Result::unwrap).collect();
            writer.join().unwrap().unwrap();
            assert_eq!(texts(&batches), expected);
        }
    }

    #[test]
    fn words_are_found_and_placed() {
        let rows = "{\"text\": \"é hello\"}\n{\"tokens\": [\"é\", \"hello\"]}\n";
        let batches = read("a.jsonl", rows, options(TaskType::TokenCls)).unwrap();
        for row in &batches[0] {
            let row = row.as_ref().unwrap();
            assert_eq!(row.text, "é hello");
            let words: Vec<_> = row
                .words
                .iter()
                .map(|word| (word.text.as_str(), word.start, word.end))
                .collect();
            assert_eq!(words, [("é", 0, 1), ("hello", 2, 7)]);
            let last = row.words[1].token.unwrap();
            assert_eq!(last as usize, row.example.ids.len() - 1);
        }
    }

    #[test]
    fn bad_rows_are_named_and_the_others_read() {
        let rows =
            "{\"text\": \"\"}\n{\"txt\": \"a\"}\n{\"tokens\": [\"a\"]}\n{\n{\"text\": \"a\"}\n";
        let batches = read("a.jsonl", rows, options(TaskType::SeqCls)).unwrap();
        let rows: Vec<_> = batches.concat();
        for (row, expected) in rows.iter().zip([
            "\"text\" is empty",
            "the row has \"txt\"; rows to classify have {\"text\"}",
            "the row has \"tokens\", and the model reads texts",
            "invalid JSON",
        ]) {
            let bad = row.as_ref().unwrap_err();
            assert!(bad.reason.contains(expected), "{}", bad.reason);
        }
        let lines: Vec<usize> = rows
            .iter()
            .filter_map(|row| Some(row.as_ref().err()?.line))
            .collect();
        assert_eq!((lines, rows[4].is_ok()), (vec![1, 2, 3, 4], true));
        let pair = "{\"text\": \"a\", \"text_pair\": \"b\"}";
        let rows = read("a.jsonl", pair, options(TaskType::TokenCls)).unwrap();
        assert!(
            rows[0][0]
                .as_ref()
                .unwrap_err()
                .reason
                .contains("the row has two texts")
        );
        for (name, expected) in [("a.txt", "a.txt: is empty"), ("a.csv", "a.csv: is empty")] {
            let error = read(name, "", options(TaskType::SeqCls)).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_text_is_a_row_of_its_own() {
        let tokenizer = fixture::tokenizer();
        let of = |text, pair, task| UnlabelledRow::of_text(&tokenizer, text, pair, &options(task));
        let row = of("hello", Some(" hello"), TaskType::SeqCls).unwrap();
        assert_eq!(
            row.example.ids,
            tokenizer.encode("hello hello", false).unwrap()
        );
        assert_eq!(
            (row.text.as_str(), row.pair.as_deref()),
            ("hello", Some(" hello"))
        );
        assert!(
            of("", None, TaskType::SeqCls)
                .unwrap_err()
                .to_string()
                .contains("\"text\" is empty")
        );
        assert!(of("a", Some("b"), TaskType::TokenCls).is_err());
    }
}

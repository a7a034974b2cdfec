//! Finding a data file, and reading it row by row.
//!
//! A file is lines of JSON or one JSON array; which of them is seen from its first character, whatever it is called,
//! since both are found under the name `.json`. Lines are streamed; an array is read whole and its rows are found
//! one after the other, so that each can be parsed on its own, in parallel, and named by its line. A table, CSV or
//! tab-separated, is known by its name, or by the columns that are named for it.

use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::describe::type_name;
use super::error::DataError;

mod array;
mod folder;
mod lines;
mod not_rows;
mod open;
mod slips;
mod table;

use array::Array;
pub(super) use folder::require_split;
pub use folder::{Split, split_file};
use lines::Lines;
use open::{Form, Opened};
pub use open::{is_read_once, is_standard_input, looks_remote, why_missing};
use table::Table;

/// How many rows a split has, without reading them as anything but JSON or a table, whose columns are `columns` where it has
/// no header.
///
/// # Errors
/// If the file is not there, or holds no rows.
pub fn count_rows(
    path: &Path,
    split: Split,
    columns: Option<&[String]>,
) -> Result<usize, DataError> {
    let file = require_split(path, split)?;
    let mut rows = Rows::open(&file, columns)?;
    let mut count = 0;
    loop {
        match rows.next_batch(&file)?.len() {
            0 => return Ok(count),
            more => count += more,
        }
    }
}

/// The bytes of one row and where they stand.
#[derive(Debug, PartialEq)]
pub(super) struct RawRow {
    /// Counted from 1.
    pub(super) line: usize,
    /// Which row of an array it is, counted from 1: many of them may stand on one line.
    pub(super) number: Option<usize>,
    /// Bytes of the line before the row.
    column: usize,
    /// Bytes of the file before the row.
    offset: usize,
    body: Body,
}

/// What a row is made of.
#[derive(Debug, PartialEq)]
pub(super) enum Body {
    /// The bytes of an object.
    Json(Vec<u8>),
    /// The fields of a table's row, all of them texts.
    Row(Map<String, Value>),
    /// Why a table's row is none.
    Bad(String),
}

impl RawRow {
    /// The row as an object, or the line and the reason why it is none.
    pub(super) fn parse(&self) -> Result<Map<String, Value>, (usize, String)> {
        let bytes = match &self.body {
            Body::Json(bytes) => bytes,
            Body::Row(row) => return Ok(row.clone()),
            Body::Bad(reason) => return Err((self.line, reason.clone())),
        };
        if let Some(problem) = self.utf8_problem() {
            return Err(problem);
        }
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => Ok(map),
            Ok(other) => Err((
                self.line,
                self.about(format!(
                    "a row must be an object, but this is {}",
                    type_name(&other)
                )),
            )),
            Err(error) => Err(self.describe(&error)),
        }
    }

    /// What is wrong with the row, begun with its number where the line alone may not tell which row it is.
    pub(super) fn about(&self, reason: String) -> String {
        Self::of_number(self.number, reason)
    }

    /// As [`Self::about`], of a row that is gone but for its number.
    pub(super) fn of_number(number: Option<usize>, reason: String) -> String {
        match number {
            Some(number) => format!("row {number} of the array: {reason}"),
            None => reason,
        }
    }

    /// As [`Self::about`], with the number behind the text.
    pub(super) fn after(&self, text: String) -> String {
        match self.number {
            Some(number) => format!("{text} (row {number} of the array)"),
            None => text,
        }
    }

    /// The bytes of an object; none of a table's row.
    fn bytes(&self) -> &[u8] {
        match &self.body {
            Body::Json(bytes) => bytes,
            Body::Row(_) | Body::Bad(_) => &[],
        }
    }

    /// The row of a line of text.
    fn into_text(self) -> Self {
        let body = match (self.utf8_problem(), String::from_utf8_lossy(self.bytes())) {
            (Some((_, reason)), _) => Body::Bad(reason),
            (None, text) => Body::Row([("text".to_owned(), text.into())].into_iter().collect()),
        };
        Self { body, ..self }
    }

    /// About how much memory the row takes.
    fn size(&self) -> usize {
        match &self.body {
            Body::Json(bytes) => bytes.len(),
            Body::Row(row) => {
                let text = |value: &Value| value.as_str().map_or(0, str::len);
                row.values().map(text).sum()
            }
            Body::Bad(reason) => reason.len(),
        }
    }

    fn utf8_problem(&self) -> Option<(usize, String)> {
        let at = std::str::from_utf8(self.bytes()).err()?.valid_up_to();
        let line = self.line + self.bytes()[..at].split(|byte| *byte == b'\n').count() - 1;
        let offset = self.offset + at;
        Some((
            line,
            self.about(format!(
                "invalid UTF-8 at byte {offset} of the file; save the file as UTF-8"
            )),
        ))
    }

    fn describe(&self, error: &serde_json::Error) -> (usize, String) {
        let (line, column) = (error.line().max(1), error.column());
        let text = error.to_string();
        let what = text
            .rsplit_once(" at line ")
            .map_or(text.as_str(), |(what, _)| what);
        let before = self.bytes().split_inclusive(|byte| *byte == b'\n');
        let before: usize = before.take(line - 1).map(<[u8]>::len).sum();
        let hint = slips::hint(self.bytes(), before + column.saturating_sub(1), what);
        let column = if line == 1 {
            self.column + column
        } else {
            column
        };
        (
            self.line + line - 1,
            self.about(format!("invalid JSON at column {column}: {what}{hint}")),
        )
    }
}

/// A batch is small enough to hold beside its tokens, and large enough to keep every core busy.
const BATCH_ROWS: usize = 4096;
const BATCH_BYTES: usize = 16 << 20;

/// Some editors write it at the start of a file.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// Rows of a file, batch by batch.
pub(super) enum Rows {
    Lines(Lines),
    Array(Array),
    Table(Box<Table>),
    /// Lines of text, each a row that has nothing else.
    Plain(Lines),
}

impl Rows {
    /// Opens a file. `columns` are those of a table that has no header.
    pub(super) fn open(path: &Path, columns: Option<&[String]>) -> Result<Self, DataError> {
        Self::of(path, columns, open::open(path, columns.is_some(), false)?)
    }

    /// As [`Self::open`]; a file of text that is not JSON, or standard input that is not, is a row a line.
    pub(super) fn open_or_lines(
        path: &Path,
        columns: Option<&[String]>,
    ) -> Result<Self, DataError> {
        Self::of(path, columns, open::open(path, columns.is_some(), true)?)
    }

    fn of(path: &Path, columns: Option<&[String]>, mut opened: Opened) -> Result<Self, DataError> {
        match opened.form {
            Form::Table(dialect) => {
                let table = Table::open(path, opened.reader, opened.place, dialect, columns)?;
                return Ok(Self::Table(Box::new(table)));
            }
            _ if columns.is_some() => {
                let reason = "is JSON, whose rows name their fields, and columns names those of a table; leave columns out";
                return Err(DataError::layout(path, reason));
            }
            Form::Lines => {}
            Form::Plain => return Ok(Self::Plain(Lines::new(opened.reader, opened.place))),
            Form::Array => {
                let mut bytes = Vec::new();
                let read = opened.reader.read_to_end(&mut bytes);
                read.map_err(|error| DataError::io(path, error))?;
                return Ok(Self::Array(Array::new(bytes, opened.place)));
            }
        }
        Ok(Self::Lines(Lines::new(opened.reader, opened.place)))
    }

    /// Whether the rows are a table's, where every value is a text.
    pub(super) fn is_table(&self) -> bool {
        matches!(self, Self::Table(_))
    }

    /// The next rows, in order; none at the end.
    pub(super) fn next_batch(&mut self, path: &Path) -> Result<Vec<RawRow>, DataError> {
        self.next_rows(path, BATCH_ROWS)
    }

    /// As [`Self::next_batch`], at most so many.
    pub(super) fn next_rows(
        &mut self,
        path: &Path,
        at_most: usize,
    ) -> Result<Vec<RawRow>, DataError> {
        let mut batch = Vec::new();
        let mut size = 0;
        while batch.len() < at_most && size < BATCH_BYTES {
            let row = match self {
                Self::Lines(lines) => lines
                    .next_row()
                    .map_err(|error| DataError::io(path, error))?,
                Self::Array(array) => array
                    .next_row()
                    .map_err(|(line, reason)| DataError::row(path, line, reason))?,
                Self::Plain(lines) => lines
                    .next_row()
                    .map_err(|error| DataError::io(path, error))?
                    .map(RawRow::into_text),
                Self::Table(table) => table
                    .next_row()
                    .map_err(|error| DataError::io(path, error))?,
            };
            let Some(row) = row else { break };
            size += row.size();
            batch.push(row);
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The rows' lines and contents, or the first error, in which the file goes by `name` alone.
    pub(super) fn read_with(
        name: &str,
        bytes: &[u8],
        columns: Option<&[&str]>,
    ) -> Result<Vec<(usize, String)>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let columns = columns.map(|names| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        });
        let shorten =
            |error: DataError| error.to_string().replace(&path.display().to_string(), name);
        let mut rows = Rows::open(&path, columns.as_deref()).map_err(shorten)?;
        let mut out = Vec::new();
        loop {
            let batch = rows.next_batch(&path).map_err(shorten)?;
            if batch.is_empty() {
                return Ok(out);
            }
            for raw in batch {
                let row = raw
                    .parse()
                    .map_err(|(line, reason)| format!("line {line}: {reason}"))?;
                out.push((raw.line, Value::Object(row).to_string()));
            }
        }
    }

    fn read(name: &str, bytes: &[u8]) -> Result<Vec<(usize, String)>, String> {
        read_with(name, bytes, None).map_err(|error| error.replace(&format!("{name}, "), ""))
    }

    fn lines(rows: &[(usize, String)]) -> Vec<usize> {
        rows.iter().map(|(line, _)| *line).collect()
    }

    #[test]
    fn lines_and_arrays_are_told_by_their_first_character() {
        let rows = read("a.jsonl", b"\xEF\xBB\xBF\n{\"a\": 1}\r\n\n  \n{\"a\": 2}").unwrap();
        assert_eq!(
            rows,
            [(2, r#"{"a":1}"#.to_owned()), (5, r#"{"a":2}"#.to_owned())]
        );
        assert_eq!(
            lines(&read("a.json", b"{\"a\": 1}\n{\"a\": 2}\n").unwrap()),
            [1, 2]
        );
        let array = b"\xEF\xBB\xBF \n[ {\"a\": 1},\n {\n\"a\": [\"]\", {}]\n}\n,{\"a\": 3}]\n";
        assert_eq!(lines(&read("a.json", array).unwrap()), [2, 3, 6]);
        assert_eq!(lines(&read("a.jsonl", b"[{\"a\": 1}]").unwrap()), [1]);
        assert_eq!(read("a.json", b" [ ] ").unwrap(), []);
        assert_eq!(read("a.jsonl", b"\n \n").unwrap(), []);
        assert_eq!(read("a.jsonl", b"").unwrap(), []);
    }

    #[test]
    fn more_rows_than_a_batch_keep_their_order() {
        let row = |n| format!("{{\"n\": {n}}}");
        let text = (0..BATCH_ROWS * 2 + 5)
            .map(row)
            .collect::<Vec<_>>()
            .join("\n");
        let rows = read("a.jsonl", text.as_bytes()).unwrap();
        assert_eq!(rows.len(), BATCH_ROWS * 2 + 5);
        assert!(
            rows.iter()
                .enumerate()
                .all(|(n, (line, row))| *line == n + 1 && *row == format!("{{\"n\":{n}}}"))
        );
        let array = format!("[{}]", text.trim_end().replace('\n', ",\n"));
        assert_eq!(read("a.json", array.as_bytes()).unwrap(), rows);
    }

    /// Files by name and contents, and a part of each one's error.
    fn assert_errors(cases: &[(&str, &[u8], &str)]) {
        for (name, bytes, expected) in cases {
            let error = read(name, bytes).unwrap_err();
            assert!(
                error.contains(expected),
                "{:?}: {error}",
                String::from_utf8_lossy(bytes)
            );
        }
    }

    #[test]
    fn problems_name_line_and_place() {
        assert_errors(&[
            (
                "a.jsonl",
                b"{\"a\": 1}\n{\"a\" 1}\n".as_slice(),
                "line 2: invalid JSON at column 6: expected `:`",
            ),
            (
                "a.jsonl",
                b"{\"a\": 1\n}\n",
                "has an object over several lines",
            ),
            (
                "a.jsonl",
                b"{} {}\n",
                "line 1: invalid JSON at column 4: trailing characters",
            ),
            (
                "a.jsonl",
                b"7\n",
                "line 1: a row must be an object, but this is a number",
            ),
            (
                "a.jsonl",
                b"{}\n\n{\"a\": \"\xff\"}\n",
                "line 3: invalid UTF-8 at byte 11 of the file",
            ),
            (
                "a.jsonl",
                b"\xEF\xBB\xBF{\"\xff",
                "line 1: invalid UTF-8 at byte 5 of the file",
            ),
            (
                "a.json",
                b"[{\"a\": 1},\n  {\"a\" 1}]",
                "line 2: row 2 of the array: invalid JSON at column 8: expected `:`",
            ),
            (
                "a.json",
                b"[{\"a\": 1}\n{\"a\": 1}]",
                "line 2: invalid JSON at column 1: expected \",\" or \"]\" after a row, found '{'",
            ),
            (
                "a.json",
                b"[{},\n]",
                "line 2: invalid JSON at column 1: expected a row, found ']'; remove the comma before it",
            ),
            (
                "a.json",
                b"[{},",
                "line 1: invalid JSON at column 5: expected a row, found the end of the file",
            ),
            (
                "a.json",
                b"[{}",
                "line 1: invalid JSON at column 4: expected \",\" or \"]\" after a row, found the end",
            ),
            (
                "a.json",
                b"[{}] x",
                "line 1: invalid JSON at column 6: expected nothing after the array, found 'x'",
            ),
            (
                "a.json",
                b"[{},\n\"x\"]",
                "line 2: row 2 of the array: a row must be an object, but this is a text",
            ),
            (
                "a.json",
                b"[{}, {}, {\"a\": \"\xff\"}]",
                "line 1: row 3 of the array: invalid UTF-8 at byte 16 of the file",
            ),
            (
                "a.json",
                b"[{},\n{\"\xff\": 1}]",
                "line 2: row 2 of the array: invalid UTF-8 at byte 7 of the file",
            ),
            (
                "a.json",
                b"[{\"a\":\n1",
                "line 2: row 1 of the array: invalid JSON at column 1: EOF while parsing an object",
            ),
            (
                "a.jsonl",
                b"{'a': 1}",
                "line 1: invalid JSON at column 2: key must be a string; this is a Python dict",
            ),
            (
                "a.jsonl",
                b"{}\n{\"a\": NaN}",
                "line 2: invalid JSON at column 7: expected value; NaN and Infinity are not JSON",
            ),
            ("a.txt", b"x", "is text, and rows are read as JSON"),
        ]);
    }

    #[test]
    fn slips_come_with_their_mend() {
        assert_errors(&[
            (
                "a.jsonl",
                b"{\"a\": \"\\ud83d\"}".as_slice(),
                "the row has half of a surrogate pair",
            ),
            (
                "a.jsonl",
                b"{\"a\": \"\\uDE00\"}",
                "the row has half of a surrogate pair",
            ),
            (
                "a.jsonl",
                b"{\"a\": 1},\n{\"a\": 2},\n",
                "trailing characters; remove the comma at the end of the line",
            ),
            (
                "a.jsonl",
                b"{\"a\": 1}\n{\"a\": 2} {\"a\": 3}\n",
                "line 2: invalid JSON at column 10: trailing characters; another object follows on the line",
            ),
            (
                "a.jsonl",
                b"{\"a\": 1}\r{\"a\": 2}\r",
                "the lines end with CR alone",
            ),
            (
                "a.jsonl",
                b"{\"a\": 1}\n// {\"a\": 2}\n",
                "line 2: invalid JSON at column 1: expected value; JSON has no comments",
            ),
            (
                "a.jsonl",
                b"# rows\n{\"a\": 1}\n",
                "line 1: invalid JSON at column 1: expected value; JSON has no comments",
            ),
            (
                "a.jsonl",
                b"{\"a\": 1} # one\n",
                "trailing characters; JSON has no comments",
            ),
            (
                "a.jsonl",
                b"{\"a\": 1}\n\x1A",
                "line 2: invalid JSON at column 1: expected value; the row ends with Ctrl-Z",
            ),
            (
                "a.jsonl",
                b"\xEF\xBB\xBF\xEF\xBB\xBF{\"a\": 1}\n",
                "line 1: invalid JSON at column 1: expected value; a byte order mark stands before the row",
            ),
            (
                "a.jsonl",
                b"{\"a\": 1}\n\xEF\xBB\xBF{\"a\": 1}\n",
                "line 2: invalid JSON at column 1: expected value; a byte order mark",
            ),
            (
                "a.json",
                b"[{\"a\": 1}, {\"a\": NaN}]",
                "row 2 of the array: invalid JSON at column 18: expected value; NaN and Infinity",
            ),
            (
                "a.json",
                b"[{}, // none\n{}]",
                "row 2 of the array: invalid JSON at column 6: expected value; JSON has no comments",
            ),
            (
                "a.json",
                b"[{\"a\": \"\\ud83d\"}]",
                "row 1 of the array: invalid JSON at column 15: unexpected end of hex escape; the row has half",
            ),
        ]);
    }

    #[test]
    fn any_number_of_blank_lines_may_stand_between_rows() {
        let blank = "\r\n \n".repeat(500_000);
        for file in [
            format!("\u{feff}{blank}  {{\"a\": 1}}\n{blank}{{\"a\": }}"),
            format!("{blank}[{{\"a\": 1}},\n{blank}{{\"a\": }}]"),
        ] {
            let start = std::time::Instant::now();
            let error = read("a.jsonl", file.as_bytes()).unwrap_err();
            assert!(error.starts_with("line 2000002: "), "{error}");
            assert!(
                error.contains("invalid JSON at column 7: expected value"),
                "{error}"
            );
            let packed = gzip(file.replace("{\"a\": }", "{}").as_bytes());
            assert_eq!(
                lines(&read("a.gz", &packed).unwrap()),
                [1_000_001, 2_000_002]
            );
            // A reader that looks at every blank line again with each one takes minutes.
            assert!(start.elapsed().as_secs() < 30);
        }
        let marked = [b"\xEF\xBB\xBF".as_slice(), blank.as_bytes(), b" {\"\xff"].concat();
        let error = read("a.jsonl", &marked).unwrap_err();
        let byte = marked.len() - 1;
        assert!(
            error.contains(&format!("line 1000001: invalid UTF-8 at byte {byte} of")),
            "{error}"
        );
        // Nothing but blanks, on one line, is an empty file.
        assert_eq!(read("a.jsonl", &vec![b' '; 20 << 20]).unwrap(), []);
    }

    #[test]
    fn what_is_no_file_of_rows_is_named_with_its_mend() {
        let utf16 = |order: fn(u16) -> [u8; 2]| -> Vec<u8> {
            "{\"a\": 1}\n".encode_utf16().flat_map(order).collect()
        };
        let pretty = b"{\n \"prompt\": \"a\",\n \"completion\": \"b\"\n}\n{\n}\n";
        for (name, bytes, expected) in [
            (
                "a.jsonl",
                pretty.to_vec(),
                "an object over several lines (the first ends on line 4 of it)",
            ),
            ("a.jsonl", pretty.to_vec(), "jq -c . "),
            (
                "a.json",
                b"{\"data\": [{\"a\": 1}]}".to_vec(),
                "holds its rows in \"data\"; take them out: jq -c '.[\"data\"][]'",
            ),
            (
                "a.json",
                b"{\n\"version\": 1,\n\"train\": [\n{\"a\": 1}],\n\"test\": [{}]}".to_vec(),
                "holds its rows in \"train\" and \"test\"",
            ),
            (
                "a.json",
                b"{\"features\": [], \"rows\": [{\"row_idx\": 0, \"row\": {}}]}".to_vec(),
                "jq -c '.[\"rows\"][].row'",
            ),
            (
                "a.json",
                b"{\"text\": {\"0\": \"a\", \"1\": \"b\"}}".to_vec(),
                "one object of columns, as pandas",
            ),
            ("a.jsonl", utf16(u16::to_le_bytes), "UTF-16 text"),
            (
                "a.jsonl",
                utf16(u16::to_le_bytes),
                "iconv -f UTF-16LE -t UTF-8",
            ),
            (
                "a.jsonl",
                utf16(u16::to_be_bytes),
                "iconv -f UTF-16BE -t UTF-8",
            ),
            (
                "a.jsonl",
                b"prompt,completion\na,b\n".to_vec(),
                "is CSV by another name; let its name end in .csv",
            ),
            (
                "a.txt",
                b"prompt\tcompletion\na\tb\n".to_vec(),
                "tab-separated",
            ),
            ("a.yaml", b"- prompt: a\n".to_vec(), "is YAML"),
            (
                "a.jsonl",
                b"PAR1\x15\x04".to_vec(),
                "is Parquet, and rows are read as JSON, one object a line; write its rows as JSON lines: python -c \"import pandas; pandas.read_parquet(",
            ),
            ("a.jsonl", b"\x80\x04\x95\x10".to_vec(), "a Python pickle"),
            (
                "a.jsonl",
                b"PK\x03\x04 rows.jsonl".to_vec(),
                "a zip archive",
            ),
            ("a.jsonl", b"BZh91AY".to_vec(), "compressed with bzip2"),
            (
                "a.jsonl",
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec(),
                "`git lfs pull`",
            ),
            (
                "a.jsonl",
                b"<!DOCTYPE html>\n<html>".to_vec(),
                "an HTML page",
            ),
            ("a.jsonl", b"GGUF\x03\0\0\0".to_vec(), "these are weights"),
            ("a.bin", b"\x01\x02\x03\x05\x06\x07".to_vec(), "is binary"),
            (
                "a.jsonl",
                b"\x01\x02\x03\x05\n{\x06\x07".to_vec(),
                "is binary",
            ),
        ] {
            let error = read(name, &bytes).unwrap_err();
            assert!(
                error.contains(expected),
                "{}: {error}",
                String::from_utf8_lossy(&bytes)
            );
        }
    }

    #[test]
    fn rows_are_rows_whatever_the_file_is_called() {
        for name in ["a.ndjson", "a.jsonlines", "a.txt", "a", "a.JSONL"] {
            assert_eq!(
                lines(&read(name, b"\n{\"a\": 1}\n").unwrap()),
                [2],
                "{name}"
            );
            assert_eq!(lines(&read(name, b"[{}, {}]").unwrap()), [1, 1], "{name}");
        }
        let long = format!("{{\"a\": \"{}\"}}\n{{}}\n", "x".repeat(17 << 20));
        assert_eq!(lines(&read("a.jsonl", long.as_bytes()).unwrap()), [1, 2]);
        // A damaged first line is a damaged line, and not a file of another format.
        let error = read("a.jsonl", b"# rows\n{\"a\": 1}\n").unwrap_err();
        assert!(
            error.contains("line 1: invalid JSON at column 1"),
            "{error}"
        );
        // A row may have objects in a list of its own.
        assert!(read("a.jsonl", b"{\"messages\": [{}], \"data\": [{}]}\n").is_ok());
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        std::io::Write::write_all(&mut out, bytes).unwrap();
        out.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    #[test]
    fn compressed_rows_are_read_whatever_the_file_is_called() {
        let (one, two) = (b"{\"a\": 1}\n".as_slice(), b"{\"a\": 2}\n".as_slice());
        let plain = read("a.jsonl", &[one, two].concat()).unwrap();
        let notes = b"\x50\x2A\x4D\x18\x03\0\0\0abc".to_vec();
        for (name, bytes) in [
            ("a.jsonl", gzip(&[one, two].concat())),
            ("a.jsonl.gz", [gzip(one), gzip(two)].concat()),
            ("a.zst", zstd(&[one, two].concat())),
            ("a.jsonl", [zstd(one), notes, zstd(two)].concat()),
        ] {
            assert_eq!(read(name, &bytes).unwrap(), plain, "{name}");
        }
        assert_eq!(lines(&read("a.gz", &gzip(b"[{},\n{}]")).unwrap()), [1, 2]);
        assert_eq!(read("a.gz", &gzip(b"")).unwrap(), []);
    }

    #[test]
    fn compressed_rows_that_are_damaged_are_an_error() {
        // Numbers without a pattern, so that there are several blocks.
        let row = |n: u64| format!("{{\"a\": {}}}", n.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let text = (0..40_000).map(row).collect::<Vec<_>>().join("\n");
        for (name, whole) in [
            ("gzip", gzip(text.as_bytes())),
            ("Zstandard", zstd(text.as_bytes())),
        ] {
            assert_eq!(read("a", &whole).unwrap().len(), 40_000);
            for cut in [whole.len() - 1, whole.len() - 5, whole.len() / 2, 12] {
                let error = read("a.jsonl", &whole[..cut]).unwrap_err();
                assert!(
                    error.contains(&format!("the {name} data ends in its middle")),
                    "{cut}: {error}"
                );
            }
            let mut damaged = whole.clone();
            let middle = damaged.len() / 2;
            damaged[middle..middle + 8].fill(0xA5);
            let error = read("a.jsonl", &damaged).unwrap_err();
            assert!(
                error.contains("damaged") || error.contains("invalid"),
                "{error}"
            );
        }
        let error = read("a.jsonl.gz", &gzip(b"PAR1")).unwrap_err();
        assert!(error.contains("once decompressed, is Parquet"), "{error}");
        let error = read("a.jsonl.gz", &gzip(&gzip(b"{}"))).unwrap_err();
        assert!(error.contains("compressed twice"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_pipe_is_read_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.is_ok_and(|status| status.success()));
        assert!(is_read_once(&path));
        let writer = {
            let path = path.clone();
            std::thread::spawn(move || fs::write(path, gzip(b"{\"a\": 1}\n{\"a\": 2}\n")))
        };
        let count = count_rows(&path, Split::Train, None).unwrap();
        writer.join().unwrap().unwrap();
        assert_eq!(count, 2);
    }

    #[test]
    fn standard_input_has_names() {
        for name in ["-", "/dev/stdin"] {
            assert!(is_standard_input(Path::new(name)) && is_read_once(Path::new(name)));
        }
        assert!(!is_standard_input(Path::new("./-")));
        let found = |split| split_file(Path::new("-"), split).unwrap();
        assert_eq!(found(Split::File), Some("/dev/stdin".into()));
        assert_eq!(found(Split::Train), Some("/dev/stdin".into()));
        assert_eq!(found(Split::Valid), None);
    }
}

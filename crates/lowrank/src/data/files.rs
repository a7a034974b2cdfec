//! Finding a data file, and reading it row by row.
//!
//! A file is lines of JSON or one JSON array; which of them is seen from its first character, whatever it is called,
//! since both are found under the name `.json`. Lines are streamed; an array is read whole and its rows are found
//! one after the other, so that each can be parsed on its own, in parallel, and named by its line.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::error::DataError;
use super::rows::type_name;

/// Which rows of a data folder are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// train.jsonl of a folder, or the file itself.
    Train,
    /// valid.jsonl of a folder.
    Valid,
    /// test.jsonl of a folder.
    Test,
    /// The path is one file.
    File,
}

impl Split {
    fn stem(self) -> Option<&'static str> {
        match self {
            Self::Train => Some("train"),
            Self::Valid => Some("valid"),
            Self::Test => Some("test"),
            Self::File => None,
        }
    }
}

/// The file of a split: none where a folder has no such file, or where `path` is a file and the split is `Valid` or `Test`.
///
/// # Errors
/// If there is nothing at `path`, a folder is given for [`Split::File`], or a folder has the split both as .jsonl and as .json.
pub fn split_file(path: &Path, split: Split) -> Result<Option<PathBuf>, DataError> {
    let kind = fs::metadata(path).map_err(|error| DataError::io(path, error))?;
    if !kind.is_dir() {
        return Ok(matches!(split, Split::Train | Split::File).then(|| path.to_owned()));
    }
    let Some(stem) = split.stem() else {
        return Err(DataError::layout(
            path,
            "is a folder; name one of its files",
        ));
    };
    let found: Vec<PathBuf> = ["jsonl", "json"]
        .iter()
        .map(|end| path.join(format!("{stem}.{end}")))
        .filter(|file| file.is_file())
        .collect();
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        _ => Err(DataError::layout(
            path,
            format!("holds both {stem}.jsonl and {stem}.json; remove one of them"),
        )),
    }
}

/// The file of a split that must be there.
pub(super) fn require_split(path: &Path, split: Split) -> Result<PathBuf, DataError> {
    if let Some(file) = split_file(path, split)? {
        return Ok(file);
    }
    let stem = split.stem().unwrap_or_default();
    if !path.is_dir() {
        let reason = format!(
            "is one file, so there is no {stem} split; give a folder with train.jsonl and {stem}.jsonl"
        );
        return Err(DataError::layout(path, reason));
    }
    let mut names: Vec<String> = fs::read_dir(path)
        .map_err(|error| DataError::io(path, error))?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| {
            Path::new(name)
                .extension()
                .is_some_and(|end| end == "jsonl" || end == "json")
        })
        .collect();
    names.sort();
    let holds = if names.is_empty() {
        "no .jsonl or .json file".into()
    } else {
        names.join(", ")
    };
    Err(DataError::layout(
        path,
        format!("has no {stem}.jsonl or {stem}.json; it holds {holds}"),
    ))
}

/// The bytes of one row and where they stand.
#[derive(Debug, PartialEq)]
pub(super) struct RawRow {
    /// Counted from 1.
    pub(super) line: usize,
    /// Bytes of the line before the row.
    column: usize,
    /// Bytes of the file before the row.
    offset: usize,
    bytes: Vec<u8>,
}

impl RawRow {
    /// The row as an object, or the line and the reason why it is none.
    pub(super) fn parse(&self) -> Result<Map<String, Value>, (usize, String)> {
        if let Some(problem) = self.utf8_problem() {
            return Err(problem);
        }
        match serde_json::from_slice(&self.bytes) {
            Ok(Value::Object(map)) => Ok(map),
            Ok(other) => Err((
                self.line,
                format!("a row must be an object, but this is {}", type_name(&other)),
            )),
            Err(error) => Err(self.describe(&error)),
        }
    }

    fn utf8_problem(&self) -> Option<(usize, String)> {
        let at = std::str::from_utf8(&self.bytes).err()?.valid_up_to();
        let line = self.line + self.bytes[..at].split(|byte| *byte == b'\n').count() - 1;
        let offset = self.offset + at;
        Some((
            line,
            format!("invalid UTF-8 at byte {offset} of the file; save the file as UTF-8"),
        ))
    }

    fn describe(&self, error: &serde_json::Error) -> (usize, String) {
        let (line, column) = (error.line().max(1), error.column());
        let text = error.to_string();
        let what = text
            .rsplit_once(" at line ")
            .map_or(text.as_str(), |(what, _)| what);
        let column = if line == 1 {
            self.column + column
        } else {
            column
        };
        (
            self.line + line - 1,
            format!("invalid JSON at column {column}: {what}"),
        )
    }
}

/// A batch is small enough to hold beside its tokens, and large enough to keep every core busy.
const BATCH_ROWS: usize = 4096;
const BATCH_BYTES: usize = 16 << 20;

/// Some editors write it at the start of a file.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// Rows of a file, batch by batch.
#[derive(Debug)]
pub(super) enum Rows {
    Lines(Lines),
    Array(Array),
}

impl Rows {
    pub(super) fn open(path: &Path) -> Result<Self, DataError> {
        if !path
            .extension()
            .is_some_and(|end| end == "jsonl" || end == "json")
        {
            return Err(DataError::layout(
                path,
                "data files are named .jsonl (a row a line) or .json (an array of rows)",
            ));
        }
        let io = |error| DataError::io(path, error);
        let mut first = None;
        let file = File::open(path).map_err(io)?;
        for (at, byte) in BufReader::new(file).bytes().enumerate() {
            let byte = byte.map_err(io)?;
            let mark = at < BYTE_ORDER_MARK.len() && byte == BYTE_ORDER_MARK[at];
            if !byte.is_ascii_whitespace() && !mark {
                first = Some(byte);
                break;
            }
        }
        if first == Some(b'[') {
            let bytes = fs::read(path).map_err(io)?;
            return Ok(Self::Array(Array {
                bytes,
                at: 0,
                line: 1,
                line_start: 0,
                state: State::Before,
            }));
        }
        let reader = BufReader::with_capacity(1 << 20, File::open(path).map_err(io)?);
        Ok(Self::Lines(Lines {
            reader,
            line: 0,
            offset: 0,
        }))
    }

    /// The next rows, in order; none at the end.
    pub(super) fn next_batch(&mut self, path: &Path) -> Result<Vec<RawRow>, DataError> {
        let mut batch = Vec::new();
        let mut size = 0;
        while batch.len() < BATCH_ROWS && size < BATCH_BYTES {
            let row = match self {
                Self::Lines(lines) => lines
                    .next_row()
                    .map_err(|error| DataError::io(path, error))?,
                Self::Array(array) => array
                    .next_row()
                    .map_err(|(line, reason)| DataError::row(path, line, reason))?,
            };
            let Some(row) = row else { break };
            size += row.bytes.len();
            batch.push(row);
        }
        Ok(batch)
    }
}

/// A row a line; blank lines are passed over.
#[derive(Debug)]
pub(super) struct Lines {
    reader: BufReader<File>,
    /// Lines read so far.
    line: usize,
    /// Bytes read so far.
    offset: usize,
}

impl Lines {
    fn next_row(&mut self) -> std::io::Result<Option<RawRow>> {
        loop {
            let mut bytes = Vec::new();
            let read = self.reader.read_until(b'\n', &mut bytes)?;
            if read == 0 {
                return Ok(None);
            }
            let mut start = 0;
            if self.offset == 0 && bytes.starts_with(BYTE_ORDER_MARK) {
                bytes.drain(..BYTE_ORDER_MARK.len());
                start = BYTE_ORDER_MARK.len();
            }
            self.line += 1;
            while bytes
                .last()
                .is_some_and(|byte| matches!(byte, b'\n' | b'\r'))
            {
                bytes.pop();
            }
            let row = RawRow {
                line: self.line,
                column: 0,
                offset: self.offset + start,
                bytes,
            };
            self.offset += read;
            if !row.bytes.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some(row));
            }
        }
    }
}

/// The elements of one array. What is no JSON ends the file: where the next row would begin cannot be known.
#[derive(Debug)]
pub(super) struct Array {
    bytes: Vec<u8>,
    at: usize,
    /// The line of `at`, counted from 1, and where it starts.
    line: usize,
    line_start: usize,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Before,
    Inside,
    After,
}

impl Array {
    fn next_row(&mut self) -> Result<Option<RawRow>, (usize, String)> {
        let mut next = self.skip_blank();
        match self.state {
            State::After => return Ok(None),
            State::Before => {
                // The caller has seen the bracket.
                self.at += 1;
                next = self.skip_blank();
                if next == Some(b']') {
                    return self.end();
                }
            }
            State::Inside => match next {
                Some(b']') => return self.end(),
                Some(b',') => {
                    self.at += 1;
                    next = self.skip_blank();
                }
                _ => return Err(self.expected("\",\" or \"]\" after a row", next)),
            },
        }
        self.state = State::Inside;
        if next.is_none() || next == Some(b']') {
            return Err(self.expected("a row", next));
        }
        let (line, column) = (self.line, self.at - self.line_start);
        let mut elements =
            serde_json::Deserializer::from_slice(&self.bytes[self.at..]).into_iter::<IgnoredAny>();
        let outcome = elements.next();
        let length = elements.byte_offset();
        let row = |bytes: &[u8]| RawRow {
            line,
            column,
            offset: self.at,
            bytes: bytes.to_vec(),
        };
        if let Some(Err(error)) = outcome {
            let from = &self.bytes[self.at..];
            // A text that is no UTF-8 is named as such, not as what the parser trips over.
            let mut ends = from.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
            let upto = ends.nth(error.line().max(1) - 1);
            let upto = upto.map_or(from.len(), |(end, _)| end);
            return Err(row(&from[..upto])
                .utf8_problem()
                .unwrap_or_else(|| row(&[]).describe(&error)));
        }
        let row = row(&self.bytes[self.at..self.at + length]);
        self.advance(length);
        Ok(Some(row))
    }

    fn end(&mut self) -> Result<Option<RawRow>, (usize, String)> {
        self.at += 1;
        self.state = State::After;
        match self.skip_blank() {
            None => Ok(None),
            next => Err(self.expected("nothing after the array", next)),
        }
    }

    fn expected(&self, what: &str, next: Option<u8>) -> (usize, String) {
        let found = next.map_or("the end of the file".to_owned(), |byte| {
            format!("{:?}", char::from(byte))
        });
        let column = self.at - self.line_start + 1;
        (
            self.line,
            format!("invalid JSON at column {column}: expected {what}, found {found}"),
        )
    }

    /// Goes to the next byte that means something.
    fn skip_blank(&mut self) -> Option<u8> {
        if self.at == 0 && self.bytes.starts_with(BYTE_ORDER_MARK) {
            self.at = BYTE_ORDER_MARK.len();
            self.line_start = self.at;
        }
        let blank = self.bytes[self.at..]
            .iter()
            .take_while(|byte| byte.is_ascii_whitespace())
            .count();
        self.advance(blank);
        self.bytes.get(self.at).copied()
    }

    fn advance(&mut self, length: usize) {
        for (at, _) in self.bytes[self.at..self.at + length]
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == b'\n')
        {
            self.line += 1;
            self.line_start = self.at + at + 1;
        }
        self.at += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows' lines and contents, or the first error.
    fn read(name: &str, bytes: &[u8]) -> Result<Vec<(usize, String)>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let shorten = |error: DataError| {
            error
                .to_string()
                .replace(&format!("{}, ", path.display()), "")
        };
        let mut rows = Rows::open(&path).map_err(shorten)?;
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

    #[test]
    fn problems_name_line_and_place() {
        for (name, bytes, expected) in [
            (
                "a.jsonl",
                b"{\"a\": 1}\n{\"a\" 1}\n".as_slice(),
                "line 2: invalid JSON at column 6: expected `:`",
            ),
            (
                "a.jsonl",
                b"{\"a\": 1\n}\n",
                "line 1: invalid JSON at column 7: EOF while parsing an object",
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
                "a.jsonl",
                b"{\"a\": \"\\ud83d\"}",
                "line 1: invalid JSON at column",
            ),
            (
                "a.json",
                b"[{\"a\": 1},\n  {\"a\" 1}]",
                "line 2: invalid JSON at column 8: expected `:`",
            ),
            (
                "a.json",
                b"[{\"a\": 1}\n{\"a\": 1}]",
                "line 2: invalid JSON at column 1: expected \",\" or \"]\" after a row, found '{'",
            ),
            (
                "a.json",
                b"[{},\n]",
                "line 2: invalid JSON at column 1: expected a row, found ']'",
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
                "line 2: a row must be an object, but this is a text",
            ),
            (
                "a.json",
                b"[{},\n{\"\xff\": 1}]",
                "line 2: invalid UTF-8 at byte 7 of the file",
            ),
            (
                "a.json",
                b"[{\"a\":\n1",
                "line 2: invalid JSON at column 1: EOF while parsing an object",
            ),
            ("a.txt", b"x", "data files are named .jsonl"),
        ] {
            let error = read(name, bytes).unwrap_err();
            assert!(
                error.contains(expected),
                "{:?}: {error}",
                String::from_utf8_lossy(bytes)
            );
        }
    }

    #[test]
    fn splits_are_files_of_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let reason = |split| require_split(path, split).unwrap_err().to_string();
        assert!(
            reason(Split::Train)
                .ends_with("has no train.jsonl or train.json; it holds no .jsonl or .json file")
        );
        fs::write(path.join("train.jsonl"), "").unwrap();
        fs::write(path.join("test.json"), "").unwrap();
        assert_eq!(
            split_file(path, Split::Train).unwrap(),
            Some(path.join("train.jsonl"))
        );
        assert_eq!(
            split_file(path, Split::Test).unwrap(),
            Some(path.join("test.json"))
        );
        assert_eq!(split_file(path, Split::Valid).unwrap(), None);
        assert!(
            reason(Split::Valid)
                .ends_with("has no valid.jsonl or valid.json; it holds test.json, train.jsonl")
        );
        assert!(reason(Split::File).ends_with("is a folder; name one of its files"));
        fs::write(path.join("train.json"), "").unwrap();
        assert!(
            reason(Split::Train)
                .ends_with("holds both train.jsonl and train.json; remove one of them")
        );
        let file = path.join("train.jsonl");
        assert_eq!(split_file(&file, Split::File).unwrap(), Some(file.clone()));
        assert_eq!(split_file(&file, Split::Train).unwrap(), Some(file.clone()));
        assert_eq!(split_file(&file, Split::Valid).unwrap(), None);
        assert!(
            require_split(&file, Split::Test)
                .unwrap_err()
                .to_string()
                .contains("is one file, so there is no test split")
        );
        assert!(
            split_file(&path.join("none"), Split::File)
                .unwrap_err()
                .to_string()
                .contains("none: cannot be read")
        );
    }
}

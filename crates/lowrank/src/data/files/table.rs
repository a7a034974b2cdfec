//! Rows of a table: CSV, or tab-separated values.
//!
//! CSV has quotes as RFC 4180 has them. Tab-separated files of GLUE have none: a quotation mark is a character like any other, and
//! a sentence may begin with one that is never closed. Others, written by pandas, quote fields. So quotes of a tab-separated file
//! mean something where every field among the first lines that begins with one also ends with one.

use std::io::{self, BufRead, Read};
use std::path::Path;

use csv::{ByteRecord, Reader, ReaderBuilder, Terminator};
use serde_json::{Map, Value};

use super::super::error::DataError;
use super::folder::{COMPRESSED, TABLES};
use super::lines::Place;
use super::{Body, RawRow};
use crate::names::valued;

/// How fields are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dialect {
    delimiter: u8,
    quotes: bool,
}

impl Dialect {
    /// That of a file whose first lines are `head`, if its name is that of a table, or, with `is_table`, if it is not JSON.
    pub(super) fn of(path: &Path, head: &[u8], is_table: bool) -> Option<Self> {
        let named = delimiter_by_name(path);
        if (named.is_none() && !is_table) || is_json(head) {
            return None;
        }
        let first = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let delimiter = named.unwrap_or(if first.contains(&b'\t') { b'\t' } else { b',' });
        Some(Self {
            delimiter,
            quotes: delimiter != b'\t' || quotes_close(head),
        })
    }

    /// That of a file whose first line is nothing but names of fields: two at least, or `text` alone.
    pub(super) fn of_header(head: &[u8]) -> Option<Self> {
        let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = std::str::from_utf8(line).ok()?;
        if line.trim() == "text" {
            return Some(Self {
                delimiter: b',',
                quotes: true,
            });
        }
        let found = TABLES.iter().find(|(_, delimiter)| {
            let mut names = line.split(char::from(*delimiter));
            line.contains(char::from(*delimiter)) && names.all(|name| is_field(name.trim()))
        });
        found.map(|(_, delimiter)| Self {
            delimiter: *delimiter,
            quotes: *delimiter != b'\t',
        })
    }
}

/// Whether a file has the name of a table.
pub(super) fn is_table_by_name(path: &Path) -> bool {
    delimiter_by_name(path).is_some()
}

fn delimiter_by_name(path: &Path) -> Option<u8> {
    let name = path.to_string_lossy().to_ascii_lowercase();
    let ends = |ending: &str| {
        let mut compressed = COMPRESSED.iter();
        compressed.any(|more| name.ends_with(&format!(".{ending}{more}")))
    };
    let found = TABLES.iter().find(|(ending, _)| ends(ending));
    found.map(|(_, delimiter)| *delimiter)
}

/// Whether a file begins as rows of JSON do, whatever it is called.
pub(super) fn is_json(head: &[u8]) -> bool {
    let text = head.trim_ascii_start();
    let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let is_object = |text: &[u8]| serde_json::from_slice::<Map<String, Value>>(text).is_ok();
    match text.first() {
        Some(b'{') => is_object(line),
        Some(b'[') => text[1..].trim_ascii_start().starts_with(b"{\""),
        _ => false,
    }
}

/// Whether fields of tab-separated lines that begin with a quotation mark also end with one, and some do.
fn quotes_close(head: &[u8]) -> bool {
    // The last line may have been cut.
    let upto = head.iter().rposition(|byte| *byte == b'\n');
    let lines = head[..upto.unwrap_or(head.len())].split(|byte| *byte == b'\n');
    let fields = lines.flat_map(|line| {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        line.split(|byte| *byte == b'\t')
    });
    let mut any = false;
    for field in fields.filter(|field| field.starts_with(b"\"")) {
        let inside = field[1..].strip_suffix(b"\"");
        let doubled = |text: &[u8]| {
            let text = String::from_utf8_lossy(text).replace("\"\"", "");
            !text.contains('"')
        };
        if !inside.is_some_and(doubled) {
            return false;
        }
        any = true;
    }
    any
}

/// A row a record.
pub(in crate::data) struct Table {
    reader: Reader<Tail>,
    /// What stands before the reader's first byte.
    place: Place,
    /// The name of each column; none where its values are not wanted.
    columns: Vec<Option<String>>,
    /// The line that has them; 0 where they were given.
    header: usize,
    /// The first record, where it is a row.
    first: Option<(ByteRecord, usize)>,
}

impl Table {
    /// Opens a table. Without `columns` its first record names them.
    ///
    /// # Errors
    /// If there is no header and none was given, or one that does not fit.
    pub(super) fn open(
        path: &Path,
        reader: Box<dyn BufRead>,
        place: Place,
        dialect: Dialect,
        columns: Option<&[String]>,
    ) -> Result<Self, DataError> {
        let reader = ReaderBuilder::new()
            .delimiter(dialect.delimiter)
            .quoting(dialect.quotes)
            .flexible(true)
            // The reader counts lines by LF, and takes that of a CRLF for the next record's. So the CR is taken off here.
            .terminator(Terminator::Any(b'\n'))
            .has_headers(false)
            .from_reader(Tail::new(reader));
        let mut table = Self {
            reader,
            place,
            columns: Vec::new(),
            header: 0,
            first: None,
        };
        let named = table.name_columns(columns);
        match named.map_err(|error| DataError::io(path, error))? {
            Ok(()) => Ok(table),
            Err(reason) => Err(DataError::layout(path, reason)),
        }
    }

    /// Reads the first record, and finds what the columns are called. The inner error is a reason why the table cannot be read.
    fn name_columns(&mut self, columns: Option<&[String]>) -> io::Result<Result<(), String>> {
        let given = match columns.map(named).transpose() {
            Ok(given) => given,
            Err(reason) => return Ok(Err(reason)),
        };
        let Some((record, line)) = self.read()? else {
            self.columns = given.unwrap_or_default();
            return Ok(Ok(()));
        };
        let cells = record.iter();
        let cells = cells.map(|cell| String::from_utf8_lossy(cell).trim().to_owned());
        let cells: Vec<String> = cells.collect();
        let Some(given) = given else {
            return Ok(match header(cells, line) {
                Ok(names) => {
                    self.columns = names;
                    self.header = line;
                    Ok(())
                }
                Err(reason) => Err(reason),
            });
        };
        if cells.len() != given.len() {
            return Ok(Err(format!(
                "columns names {} columns, and the first row (line {line}) has {}: {}; name every column, those that are not \
                 wanted as _",
                given.len(),
                cells.len(),
                shown(&cells)
            )));
        }
        let mut pairs = cells.iter().zip(columns.unwrap_or_default());
        if pairs.all(|(cell, name)| cell == name) {
            self.header = line;
        } else if cells.iter().any(|cell| is_field(cell)) {
            return Ok(Err(format!(
                "has a header ({}), and columns names the columns of a file without one; leave columns out, or rename the \
                 header's fields",
                shown(&cells)
            )));
        } else {
            self.first = Some((record, line));
        }
        self.columns = given;
        Ok(Ok(()))
    }

    pub(super) fn next_row(&mut self) -> io::Result<Option<RawRow>> {
        let next = match self.first.take() {
            Some(first) => Some(first),
            None => self.read()?,
        };
        Ok(next.map(|(record, line)| RawRow {
            line,
            number: None,
            column: 0,
            offset: 0,
            body: self.row(&record),
        }))
    }

    fn row(&self, record: &ByteRecord) -> Body {
        let lines = record.iter().any(|field| field.contains(&b'\n'));
        if record.len() != self.columns.len() {
            let names = match self.header {
                0 => "columns names".to_owned(),
                line => format!("the header on line {line} has"),
            };
            let hint = if lines {
                "; one of them goes over several lines, so a quote may not be closed"
            } else {
                "; a field that has the separator in it stands in quotes"
            };
            return Body::Bad(format!(
                "the row has {} fields, and {names} {}{hint}",
                record.len(),
                self.columns.len()
            ));
        }
        // A quote that is never closed takes all rows that follow for its own.
        let last = record.iter().next_back().unwrap_or_default();
        if last.contains(&b'\n')
            && self.reader.get_ref().is_over
            && self.reader.get_ref().last_sign != b'"'
        {
            return Body::Bad(
                "a quote opens in the row's last field and is not closed up to the end of the file; close it, or double it \
                 where it is meant as a character"
                    .into(),
            );
        }
        let mut row = Map::new();
        for (name, field) in self.columns.iter().zip(record) {
            let Some(name) = name else { continue };
            match std::str::from_utf8(field) {
                Ok(text) => row.insert(name.clone(), text.into()),
                Err(_) => {
                    return Body::Bad(format!("{name:?} is invalid UTF-8; save the file as UTF-8"));
                }
            };
        }
        Body::Row(row)
    }

    /// The next record, and the line that it begins on.
    fn read(&mut self) -> io::Result<Option<(ByteRecord, usize)>> {
        let mut record = ByteRecord::new();
        loop {
            if !self
                .reader
                .read_byte_record(&mut record)
                .map_err(io::Error::from)?
            {
                return Ok(None);
            }
            // A blank line that ends with CRLF.
            if record.len() != 1 || &record[0] != b"\r" {
                break;
            }
        }
        // Lines are counted from the end of the record, since blank ones may stand before it.
        let end = self.reader.position().line() as usize;
        let breaks = record
            .iter()
            .flatten()
            .filter(|byte| **byte == b'\n')
            .count();
        let tail = self.reader.get_ref();
        let last = record.iter().next_back().unwrap_or_default();
        let is_ended = !tail.is_over || (tail.last == b'\n' && !last.ends_with(b"\n"));
        let line = end.saturating_sub(breaks + usize::from(is_ended)).max(1);
        if let Some(text) = last.strip_suffix(b"\r") {
            let text = text.to_vec();
            record.truncate(record.len() - 1);
            record.push_field(&text);
        }
        Ok(Some((record, self.place.lines + line)))
    }
}

/// A reader that remembers how it ended.
struct Tail {
    reader: Box<dyn BufRead>,
    /// Its last byte.
    last: u8,
    /// Its last byte that is no space.
    last_sign: u8,
    /// Whether all of it was read.
    is_over: bool,
}

impl Tail {
    fn new(reader: Box<dyn BufRead>) -> Self {
        Self {
            reader,
            last: 0,
            last_sign: 0,
            is_over: false,
        }
    }
}

impl Read for Tail {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(into)?;
        let read = &into[..count];
        self.is_over = count == 0;
        self.last = read.last().copied().unwrap_or(self.last);
        let sign = read.trim_ascii_end().last();
        self.last_sign = sign.copied().unwrap_or(self.last_sign);
        Ok(count)
    }
}

/// The names that a header gives, or why it is none.
fn header(cells: Vec<String>, line: usize) -> Result<Vec<Option<String>>, String> {
    if !cells.iter().any(|cell| is_field(cell)) {
        let hint = if cells.len() == 1 && cells[0].contains(';') {
            ", and fields are separated by commas, not by semicolons"
        } else {
            ""
        };
        return Err(format!(
            "its first row (line {line}) is {}, where no field has a name that is known{hint}; if these are names, rename them \
             (such as text and label); if the file has no header, give their names: {columns}",
            shown(&cells),
            columns = valued("columns", "text,label")
        ));
    }
    if let Some(twice) = twice(&cells) {
        return Err(format!(
            "its header (line {line}) names {twice:?} twice; rename one"
        ));
    }
    // pandas writes rows' numbers under no name.
    let name = |(at, cell): (usize, String)| match cell.as_str() {
        "" => Some(format!("column {}", at + 1)),
        _ => Some(cell),
    };
    Ok(cells.into_iter().enumerate().map(name).collect())
}

/// Names that were given for columns; `_` for those that are not wanted.
fn named(names: &[String]) -> Result<Vec<Option<String>>, String> {
    let wanted: Vec<String> = names.iter().filter(|name| *name != "_").cloned().collect();
    if wanted.is_empty() {
        return Err("columns names no column; name them in their order, such as text,label".into());
    }
    if let Some(twice) = twice(&wanted) {
        return Err(format!(
            "columns names {twice:?} twice; name columns that are not wanted _"
        ));
    }
    let column = |name: &String| (name != "_").then(|| name.clone());
    Ok(names.iter().map(column).collect())
}

fn twice(names: &[String]) -> Option<&String> {
    let mut later = names.iter().enumerate().skip(1);
    let found = later.find(|(at, name)| !name.is_empty() && names[..*at].contains(name));
    found.map(|(_, name)| name)
}

/// Whether a cell of a header has the name of a field, in any case.
fn is_field(cell: &str) -> bool {
    super::super::rows::FIELDS
        .iter()
        .any(|name| cell.eq_ignore_ascii_case(name))
}

/// Cells for a message.
fn shown(cells: &[String]) -> String {
    const CELLS: usize = 6;
    let cell = |cell: &String| {
        let mut text: String = cell.chars().take(40).collect();
        if text.len() < cell.len() {
            text.push('…');
        }
        format!("{text:?}")
    };
    let mut list: Vec<String> = cells.iter().take(CELLS).map(cell).collect();
    if cells.len() > CELLS {
        list.push(format!("{} more", cells.len() - CELLS));
    }
    list.join(", ")
}

#[cfg(test)]
mod tests {
    use super::super::tests::read_with;

    fn read(name: &str, text: &str) -> Result<Vec<(usize, String)>, String> {
        read_with(name, text.as_bytes(), None)
    }

    type Read = Result<Vec<(usize, String)>, String>;

    fn rows<const COUNT: usize>(expected: [(usize, &str); COUNT]) -> Read {
        expected
            .iter()
            .map(|(line, row)| Ok((*line, (*row).to_owned())))
            .collect()
    }

    #[test]
    fn a_header_names_the_fields() {
        let two = rows([
            (2, r#"{"text":"a","label":"1"}"#),
            (3, r#"{"text":"b","label":"0"}"#),
        ]);
        for text in [
            "text,label\na,1\nb,0\n",
            "text,label\na,1\nb,0",
            "\u{feff}text,label\r\na,1\r\nb,0\r\n",
            " text , label\na,1\nb,0",
        ] {
            assert_eq!(read("a.csv", text), two, "{text:?}");
            assert_eq!(read("a.TSV", &text.replace(',', "\t")), two, "{text:?}");
        }
        let spread = rows([
            (4, r#"{"text":"a","label":"1"}"#),
            (7, r#"{"text":"b","label":"0"}"#),
        ]);
        for end in ["\n", "\r\n"] {
            let text = "\n\ntext,label\na,1\n\n\nb,0\n".replace('\n', end);
            assert_eq!(read("a.csv", &text), spread, "{text:?}");
        }
        assert_eq!(
            read("a.csv", ",text\n0,a\n"),
            rows([(2, r#"{"column 1":"0","text":"a"}"#)])
        );
        assert_eq!(read("a.csv", "text,label\n"), Ok(Vec::new()));
        assert_eq!(read("a.csv", ""), Ok(Vec::new()));
        // What is JSON is JSON, whatever it is called.
        assert_eq!(
            read("a.csv", "{\"text\": \"a\"}\n"),
            rows([(1, r#"{"text":"a"}"#)])
        );
        assert_eq!(
            read("a.csv", "[{\"text\": \"a\"}]"),
            rows([(1, r#"{"text":"a"}"#)])
        );
    }

    #[test]
    fn quotes_hold_separators_and_lines() {
        let text = "label,text\n1,\"a, \"\"b\"\"\nc\"\n0,say \"hi\"\n";
        let expected = rows([
            (2, r#"{"label":"1","text":"a, \"b\"\nc"}"#),
            (4, r#"{"label":"0","text":"say \"hi\""}"#),
        ]);
        assert_eq!(read("a.csv", text), expected);
        // pandas quotes fields of a tab-separated file, too.
        let text = "text\tlabel\n\"a \"\"b\"\"\"\t1\n";
        assert_eq!(
            read("a.tsv", text),
            rows([(2, r#"{"text":"a \"b\"","label":"1"}"#)])
        );
        let text = "text\tlabel\n\"a\"\"\"\"\"\"b\"\t1\n";
        assert_eq!(
            read("a.tsv", text),
            rows([(2, r#"{"text":"a\"\"\"b","label":"1"}"#)])
        );
        // GLUE does not, and a sentence may begin with a mark that is never closed.
        let text = "sentence\tlabel\n\"the end\"\t1\n\"no end\t0\n";
        let expected = rows([
            (2, r#"{"sentence":"\"the end\"","label":"1"}"#),
            (3, r#"{"sentence":"\"no end","label":"0"}"#),
        ]);
        assert_eq!(read("a.tsv", text), expected);
    }

    #[test]
    fn columns_are_named_where_there_is_no_header() {
        let names: &[&str] = &["text", "label"];
        let two = rows([
            (1, r#"{"text":"a","label":"1"}"#),
            (2, r#"{"text":"b","label":"0"}"#),
        ]);
        for name in ["a.tsv", "a.txt", "a"] {
            assert_eq!(read_with(name, b"a\t1\nb\t0\n", Some(names)), two, "{name}");
        }
        assert_eq!(read_with("a.csv", b"a,1\nb,0\n", Some(names)), two);
        let with_header = rows([(2, r#"{"text":"a","label":"1"}"#)]);
        assert_eq!(
            read_with("a.csv", b"text,label\na,1\n", Some(names)),
            with_header
        );
        let cola = read_with(
            "a.tsv",
            b"gj04\t1\t\tA b.\n",
            Some(&["_", "label", "_", "sentence"]),
        );
        assert_eq!(cola, rows([(1, r#"{"label":"1","sentence":"A b."}"#)]));
    }

    #[test]
    fn a_table_that_does_not_fit_is_an_error() {
        for (name, text, columns, expected) in [
            (
                "a.csv",
                "a stirring film,1\n",
                None,
                "a.csv: its first row (line 1) is \"a stirring film\", \"1\", where no field has a name that is known; if these are \
                 names, rename them (such as text and label); if the file has no header, give their names: columns: text,label",
            ),
            (
                "a.csv",
                "text;label\na;1\n",
                None,
                "fields are separated by commas, not by semicolons",
            ),
            (
                "a.csv",
                "text,text,label\n",
                None,
                "its header (line 1) names \"text\" twice",
            ),
            (
                "a.csv",
                "text,label\na,1\nb,c,0\n",
                None,
                "line 3: the row has 3 fields, and the header on line 1 has 2; a field that has the separator",
            ),
            (
                "a.csv",
                "text,label\na\n",
                None,
                "line 2: the row has 1 fields",
            ),
            (
                "a.csv",
                "text,label\n\"a,1\nb,0\n",
                None,
                "line 2: the row has 1 fields, and the header on line 1 has 2; one of them goes over several lines",
            ),
            (
                "a.csv",
                "label,text\n1,a\n1,\"b\n0,c\n",
                None,
                "line 3: a quote opens in the row's last field and is not closed",
            ),
            (
                "a.csv",
                "a,1,x\n",
                Some(["text", "label"]),
                "columns names 2 columns, and the first row (line 1) has 3: \"a\", \"1\", \"x\"",
            ),
            (
                "a.csv",
                "a,1\nb\n",
                Some(["text", "label"]),
                "line 2: the row has 1 fields, and columns names 2",
            ),
            (
                "a.csv",
                "sentence,label\na,1\n",
                Some(["text", "label"]),
                "has a header (\"sentence\", \"label\"), and columns names",
            ),
            (
                "a.csv",
                "a,1\n",
                Some(["text", "text"]),
                "columns names \"text\" twice",
            ),
            (
                "a.csv",
                "a,1\n",
                Some(["_", "_"]),
                "columns names no column",
            ),
            (
                "a.jsonl",
                "{\"text\": \"a\"}\n",
                Some(["text", "label"]),
                "a.jsonl: is JSON, whose rows name their fields",
            ),
        ] {
            let error = read_with(
                name,
                text.as_bytes(),
                columns.as_ref().map(<[&str; 2]>::as_slice),
            );
            let error = error.unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        let error = read_with("a.csv", b"text\na\xff\n", None).unwrap_err();
        assert_eq!(
            error,
            "line 2: \"text\" is invalid UTF-8; save the file as UTF-8"
        );
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_rows_or_an_error(
            pieces in proptest::collection::vec(proptest::sample::select(vec!["text", ",", "\t", "\"", "\r", "\n", "a", "\u{feff}", " ", "{", "["]), 0..40),
            tabs in proptest::bool::ANY,
        ) {
            let name = if tabs { "a.tsv" } else { "a.csv" };
            let text = pieces.concat();
            for columns in [None, Some(["text", "label"].as_slice())] {
                if let Ok(rows) = read_with(name, text.as_bytes(), columns) {
                    let lines = text.split('\n').count();
                    proptest::prop_assert!(rows.iter().all(|(line, _)| *line >= 1 && *line <= lines));
                    proptest::prop_assert!(rows.is_sorted_by(|one, two| one.0 < two.0), "{:?}", rows);
                }
            }
        }
    }
}

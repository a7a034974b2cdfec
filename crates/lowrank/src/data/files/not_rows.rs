//! Files that hold no rows as they are read here: what each is, and how it becomes rows.

use std::io::{self, BufRead, Read};
use std::path::Path;

use lowrank_formats::recognise::Format;
use serde_json::{Map, Value};

use super::super::rows::RowKind;
use super::BYTE_ORDER_MARK;
use super::folder::{COMPRESSED, ENDINGS};
use super::open::FIRST_LINE;
use crate::names::{named, valued};

/// How much of a text is looked at to tell whether any of its lines is JSON.
const TEXT: u64 = 64 << 10;

/// The first byte that is no space.
fn first_byte(line: &[u8]) -> Option<u8> {
    line.trim_ascii_start().first().copied()
}

/// About a file of another format.
pub(super) fn not_rows(format: Format, path: &Path) -> String {
    let mend = format.fetch_again().map(str::to_owned).or_else(|| {
        Some(match format {
            Format::Utf16Le => recode("UTF-16LE", path),
            Format::Utf16Be => recode("UTF-16BE", path),
            Format::Utf32 => recode("UTF-32", path),
            Format::Gzip | Format::Zstd => "it was compressed twice; decompress it once".to_owned(),
            Format::Bzip2 => format!("decompress it first: bunzip2 -k {}", path.display()),
            Format::Xz => format!("decompress it first: xz -dk {}", path.display()),
            Format::Lz4 => format!("decompress it first: lz4 -d {}", path.display()),
            Format::Tar | Format::Zip | Format::SevenZip | Format::Rar => {
                "unpack it and give a file of rows in it".to_owned()
            }
            Format::Office => return table_mend("xlsx", path),
            Format::Parquet => return table_mend("parquet", path),
            Format::Arrow => return table_mend("arrow", path),
            Format::Safetensors | Format::Gguf | Format::Ggml | Format::Torch | Format::Onnx => {
                format!(
                    "these are weights; {data} takes rows of text",
                    data = named("data")
                )
            }
            _ => return None,
        })
    });
    let mend = mend.unwrap_or_else(|| "write its rows as JSON lines".to_owned());
    format!("is {format}, and rows are read as JSON, one object a line; {mend}")
}

fn recode(from: &str, path: &Path) -> String {
    let ending = path.extension().and_then(|ending| ending.to_str());
    format!(
        "save it as UTF-8: iconv -f {from} -t UTF-8 {} > rows.{}",
        path.display(),
        ending.unwrap_or("jsonl")
    )
}

/// The command that turns a table into rows; `kind` is the ending that files of its format have.
pub(super) fn table_mend(kind: &str, path: &Path) -> Option<String> {
    let shown = path.display();
    let read = match kind {
        "parquet" => format!("read_parquet('{shown}')"),
        "feather" => format!("read_feather('{shown}')"),
        "xlsx" => format!("read_excel('{shown}')"),
        "arrow" => {
            return Some(format!(
                "write its rows as JSON lines: python -c \"from datasets import Dataset; \
                 Dataset.from_file('{shown}').to_json('rows.jsonl')\""
            ));
        }
        _ => return None,
    };
    Some(format!(
        "write its rows as JSON lines: python -c \"import pandas; \
         pandas.{read}.to_json('rows.jsonl', orient='records', lines=True, force_ascii=False)\""
    ))
}

/// What is wrong with a file whose first character is a brace, where it is not a row a line. `head` is its first line
/// that is not blank, after `blank` lines that are.
pub(super) fn object_problem(
    path: &Path,
    blank: usize,
    head: &mut Vec<u8>,
    rest: &mut impl Read,
) -> io::Result<Option<String>> {
    // A line that is longer than what is looked at may be a row all the same.
    if head.len() as u64 >= FIRST_LINE && !head.ends_with(b"\n") {
        return Ok(None);
    }
    let first = serde_json::from_slice::<Value>(head);
    match first {
        Ok(Value::Object(object)) => Ok(wrapped(&object, path)),
        // The object goes on in the next line. Damage is left to the reader of lines, which names its place.
        Err(error) if error.is_eof() => {
            rest.take(FIRST_LINE).read_to_end(head)?;
            let mut objects = serde_json::Deserializer::from_slice(head).into_iter();
            let object: Value = match objects.next() {
                Some(Ok(object)) => object,
                Some(Err(error)) if error.is_eof() && head.len() as u64 > FIRST_LINE => {
                    return Ok(Some(several_lines(None, path)));
                }
                _ => return Ok(None),
            };
            let upto = &head[..objects.byte_offset()];
            let lines = blank + upto.split(|byte| *byte == b'\n').count();
            let wrapped = object.as_object().and_then(|object| wrapped(object, path));
            Ok(Some(
                wrapped.unwrap_or_else(|| several_lines(Some(lines), path)),
            ))
        }
        _ => Ok(None),
    }
}

fn several_lines(lines: Option<usize>, path: &Path) -> String {
    let end = lines.map_or(String::new(), |lines| {
        format!(" (the first ends on line {lines} of it)")
    });
    format!(
        "has an object over several lines{end}, and rows are one object a line, or one array; \
         rewrite it: jq -c . {} > rows.jsonl",
        path.display()
    )
}

/// An object that holds the rows under a key, or in columns. None for a row.
fn wrapped(object: &Map<String, Value>, path: &Path) -> Option<String> {
    if RowKind::detect(object, None).is_some() && !is_columns(object) {
        return None;
    }
    if is_columns(object) {
        return Some(format!(
            "is one object of columns, as pandas writes it; write rows: python -c \"import pandas; \
             pandas.read_json('{}').to_json('rows.jsonl', orient='records', lines=True, force_ascii=False)\"",
            path.display()
        ));
    }
    let holds_rows = |value: &Value| {
        let list = value.as_array().filter(|list| !list.is_empty());
        list.is_some_and(|list| list.iter().all(Value::is_object))
    };
    let keys: Vec<&String> = object
        .iter()
        .filter(|(_, value)| holds_rows(value))
        .map(|(key, _)| key)
        .collect();
    // A row of an unknown kind may have a list of objects; what rows are kept under has a name of its own.
    let key = keys
        .iter()
        .find(|key| WRAPPERS.contains(&key.to_ascii_lowercase().as_str()))?;
    // The Hub's viewer puts each row into an object of its own.
    let viewer = object[key.as_str()]
        .get(0)
        .is_some_and(|row| row.get("row_idx").is_some());
    let part = if viewer { ".row" } else { "" };
    let shown: Vec<String> = keys.iter().map(|key| format!("\"{key}\"")).collect();
    Some(format!(
        "is one object that holds its rows in {}; take them out: jq -c '.[\"{key}\"][]{part}' {} > rows.jsonl",
        shown.join(" and "),
        path.display()
    ))
}

/// Keys that programs keep rows under.
const WRAPPERS: &[&str] = &[
    "data",
    "dataset",
    "dev",
    "documents",
    "entries",
    "eval",
    "examples",
    "instances",
    "items",
    "records",
    "results",
    "rows",
    "samples",
    "test",
    "train",
    "training",
    "training_data",
    "val",
    "valid",
    "validation",
];

/// Every value is an object whose first key is 0: the rows' numbers, under each column.
fn is_columns(object: &Map<String, Value>) -> bool {
    let column = |value: &Value| {
        value
            .as_object()
            .is_some_and(|column| column.contains_key("0"))
    };
    !object.is_empty() && object.values().all(column)
}

/// What is wrong with a file whose first character begins no row. Some of its lines may be rows all the same: then it is
/// a file of rows with a damaged line, which the reader of lines names.
pub(super) fn text_problem(
    path: &Path,
    head: &mut Vec<u8>,
    rest: &mut impl BufRead,
) -> io::Result<Option<String>> {
    // A second mark is a slip that the reader of lines names.
    if head.starts_with(BYTE_ORDER_MARK) {
        return Ok(None);
    }
    rest.by_ref().take(TEXT).read_to_end(head)?;
    let text = head.as_slice();
    let control = |byte: &u8| byte.is_ascii_control() && !byte.is_ascii_whitespace();
    if text.iter().filter(|byte| control(byte)).count() * 20 > text.len() {
        return Ok(Some(
            "is binary, and rows are read as JSON, one object a line".to_owned(),
        ));
    }
    let json = |line: &[u8]| serde_json::from_slice::<serde::de::IgnoredAny>(line).is_ok();
    let any_row = text
        .split(|byte| *byte == b'\n')
        .any(|line| matches!(first_byte(line), Some(b'{' | b'[')) || json(line));
    let name = path.to_string_lossy().to_ascii_lowercase();
    let named_rows = ENDINGS.iter().any(|ending| {
        let compressed = |more: &&str| name.ends_with(&format!(".{ending}{more}"));
        COMPRESSED.iter().any(compressed)
    });
    if any_row && (named_rows || !path.is_file()) {
        return Ok(None);
    }
    let ending = path
        .extension()
        .and_then(|ending| ending.to_str())
        .unwrap_or_default();
    let ending = ending.to_ascii_lowercase();
    let begins = |with: &str| text.starts_with(with.as_bytes());
    let table = |what: &str, ending: &str| {
        format!(
            "is {what} by another name; let its name end in .{ending}, or give their names: {columns}",
            columns = valued("columns", "text,label")
        )
    };
    Ok(Some(if ending == "tab" || separated_by(text, b'\t') {
        table("a table of tab-separated values", "tsv")
    } else if separated_by(text, b',') {
        table("CSV", "csv")
    } else if ending == "yaml" || ending == "yml" || begins("---") || begins("- ") {
        "is YAML, and rows are read as JSON, one object a line; write it so".to_owned()
    } else {
        "is text, and rows are read as JSON, one object a line, such as {\"text\": \"…\"}; write it so".to_owned()
    }))
}

/// Whether the first lines have the same number of fields, more than one. A separator between quotes counts too, so a table
/// with such fields may be taken for text, and no text for a table.
fn separated_by(text: &[u8], separator: u8) -> bool {
    let mut lines = text
        .split(|byte| *byte == b'\n')
        .filter(|line| first_byte(line).is_some());
    let count = |line: &[u8]| line.split(|byte| *byte == separator).count();
    let (Some(header), Some(second)) = (lines.next(), lines.next()) else {
        return false;
    };
    count(header) > 1 && count(header) == count(second)
}

//! Opening a data file once, whatever it is: a pipe, standard input, compressed; and saying what it is where it holds no rows.
//!
//! A pipe can be read only once, so nothing is looked at and opened again: what was read to see what the file is stands
//! before the rest.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Cursor, ErrorKind, IsTerminal, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use lowrank_formats::recognise::{Format, HEAD};
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::super::error::DataError;
use super::folder::COMPRESSED;
use super::lines::{Place, skip_blank, skip_mark};
use super::not_rows::{not_rows, object_problem, text_problem};
use super::table::{Dialect, is_json, is_table_by_name};

/// What `-` is called in messages and reports.
pub(super) const STANDARD_INPUT: &str = "/dev/stdin";

/// Whether a data path means the program's standard input.
pub fn is_standard_input(path: &Path) -> bool {
    ["-", STANDARD_INPUT, "/dev/fd/0", "/proc/self/fd/0"]
        .iter()
        .any(|name| path == Path::new(name))
}

/// Whether a data path is a pipe or the like, whose rows are gone once they have been read.
pub fn is_read_once(path: &Path) -> bool {
    is_standard_input(path)
        || fs::metadata(path).is_ok_and(|kind| !kind.is_file() && !kind.is_dir())
}

/// An error about a file that cannot be opened.
pub(super) fn missing(path: &Path, error: io::Error) -> DataError {
    match (error.kind(), why_missing(path)) {
        (ErrorKind::NotFound, Some(reason)) => DataError::layout(path, reason),
        _ => DataError::io(path, error),
    }
}

/// Why there may be nothing at a data path, with the mend; none where nothing but its absence is known.
pub fn why_missing(path: &Path) -> Option<String> {
    if let Ok(target) = fs::read_link(path) {
        return Some(format!(
            "is a link to {}, which is not there",
            target.display()
        ));
    }
    if path.starts_with("/dev/fd") || path.starts_with("/proc") {
        let reason = "was a pipe of the command that named it, and its rows are gone with it; \
                      save the rows to a file to read them again";
        return Some(reason.to_owned());
    }
    if !looks_remote(path) {
        return None;
    }
    let shown = path.to_string_lossy();
    let mend = if shown.contains("://") {
        "download the file first, and give its path".to_owned()
    } else {
        format!(
            "save its rows first: python -c \"from datasets import load_dataset; \
             load_dataset('{shown}', split='train').to_json('train.jsonl')\""
        )
    };
    Some(format!(
        "does not exist, and data sets are not downloaded here; {mend}"
    ))
}

/// Whether a path at which nothing is looks like an address, or like an id of the Hub, `owner/name`.
pub fn looks_remote(path: &Path) -> bool {
    let text = path.to_string_lossy();
    if text.contains("://") || text.starts_with("hf:") {
        return true;
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match text.split('/').collect::<Vec<_>>().as_slice() {
        [owner, name] => {
            let is_part = |part: &str| !part.is_empty() && part.chars().all(allowed);
            let is_file = [
                ".jsonl", ".json", ".gz", ".zst", ".txt", ".csv", ".tsv", ".parquet",
            ];
            is_part(owner)
                && is_part(name)
                && !owner.starts_with('.')
                && !Path::new(owner).exists()
                && !is_file.iter().any(|ending| name.ends_with(ending))
        }
        _ => false,
    }
}

/// Opened rows, not yet parsed.
pub(super) struct Opened {
    pub(super) reader: Box<dyn BufRead>,
    pub(super) form: Form,
    /// That of the reader's first byte, which is not blank but for a table.
    pub(super) place: Place,
}

/// How rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// An object a line.
    Lines,
    /// One array of objects.
    Array,
    Table(Dialect),
    /// A text a line.
    Plain,
}

/// How much of a table is looked at to see how it is written.
const TABLE: u64 = 64 << 10;

/// How much is read to see what a file is. A first line longer than this is one that is not checked beforehand.
pub(super) const FIRST_LINE: u64 = 16 << 20;

/// Opens a file of rows, decompresses it, and refuses what holds none. With `is_table` it is a table unless it is JSON, whatever it
/// is called. A pipe may be a table with a header too. With `or_lines` a .txt file or a pipe that is neither is lines of text.
pub(super) fn open(path: &Path, is_table: bool, or_lines: bool) -> Result<Opened, DataError> {
    let io = |error| DataError::io(path, error);
    let refuse = |reason: String| Err(DataError::layout(path, reason));
    let (mut head, mut reader) = peek(source(path)?).map_err(io)?;
    let mut inside = "";
    if let Some(decoder) = decoder(Format::of(&head)) {
        inside = "once decompressed, ";
        (head, reader) = peek(decoder(reader)).map_err(io)?;
    }
    match Format::of(&head) {
        None | Some(Format::Empty) => {}
        Some(format) => return refuse(format!("{inside}{}", not_rows(format, path))),
    }
    let mut reader = BufReader::with_capacity(1 << 20, reader);
    let mut place = Place::default();
    skip_mark(&mut reader, &mut place).map_err(io)?;
    if is_table || is_table_by_name(path) {
        let mut head = Vec::new();
        let mut limited = reader.by_ref().take(TABLE);
        // A pipe's writer may wait for what becomes of its first row.
        if is_read_once(path) {
            limited.read_until(b'\n', &mut head).map_err(io)?;
        } else {
            limited.read_to_end(&mut head).map_err(io)?;
        }
        let dialect = Dialect::of(path, &head, is_table);
        let again = Cursor::new(head).chain(reader);
        reader = BufReader::with_capacity(1 << 20, Box::new(again));
        if let Some(dialect) = dialect {
            return Ok(Opened {
                reader: Box::new(reader),
                form: Form::Table(dialect),
                place,
            });
        }
    }
    let first = skip_blank(&mut reader, &mut place).map_err(io)?;
    let mut head = Vec::new();
    let mut limited = reader.by_ref().take(FIRST_LINE);
    limited.read_until(b'\n', &mut head).map_err(io)?;
    if first.is_some() && !is_json(&head) {
        let piped = is_read_once(path);
        let or_lines = or_lines && (piped || is_text_by_name(path));
        let table = Dialect::of_header(&head).filter(|_| piped || or_lines);
        if let Some(form) = table.map(Form::Table).or(or_lines.then_some(Form::Plain)) {
            return Ok(Opened {
                reader: Box::new(Cursor::new(head).chain(reader)),
                form,
                place,
            });
        }
    }
    let problem = match first {
        None | Some(b'[') => None,
        Some(b'{') => object_problem(path, place.lines, &mut head, &mut reader).map_err(io)?,
        Some(_) => text_problem(path, &mut head, &mut reader).map_err(io)?,
    };
    match problem {
        Some(problem) => refuse(format!("{inside}{problem}")),
        None => Ok(Opened {
            reader: Box::new(Cursor::new(head).chain(reader)),
            form: if first == Some(b'[') {
                Form::Array
            } else {
                Form::Lines
            },
            place,
        }),
    }
}

/// Whether a file has the name of a text, compressed or not.
fn is_text_by_name(path: &Path) -> bool {
    let name = path.to_string_lossy().to_ascii_lowercase();
    let mut compressed = COMPRESSED.iter();
    compressed.any(|more| name.ends_with(&format!(".txt{more}")))
}

fn source(path: &Path) -> Result<Box<dyn Read>, DataError> {
    if is_standard_input(path) {
        let input = io::stdin();
        if input.is_terminal() {
            tracing::info!(
                "rows are read from standard input; Ctrl-D on a line of its own ends them"
            );
        }
        return Ok(Box::new(input));
    }
    let kind = fs::metadata(path).map_err(|error| missing(path, error))?;
    #[cfg(unix)]
    if std::os::unix::fs::FileTypeExt::is_fifo(&kind.file_type()) && !path.starts_with("/dev/fd") {
        tracing::info!("{}: rows are read from this pipe", path.display());
    }
    if kind.is_dir() {
        return Err(DataError::layout(
            path,
            "is a folder; name one of its files",
        ));
    }
    let file = File::open(path).map_err(|error| DataError::io(path, error))?;
    Ok(Box::new(file))
}

/// The first bytes, and a reader that begins with them. A pipe's writer may wait for what becomes of its first line, so no more
/// than that is waited for.
fn peek(mut reader: Box<dyn Read>) -> io::Result<(Vec<u8>, Box<dyn Read>)> {
    let mut head = vec![0; HEAD];
    let mut filled = 0;
    while filled < HEAD && !head[..filled].contains(&b'\n') {
        match reader.read(&mut head[filled..]) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    head.truncate(filled);
    let again = Cursor::new(head.clone()).chain(reader);
    Ok((head, Box::new(again)))
}

type Decoder = fn(Box<dyn Read>) -> Box<dyn Read>;

fn decoder(format: Option<Format>) -> Option<Decoder> {
    match format {
        Some(Format::Gzip) => Some(|reader| {
            let decoder = MultiGzDecoder::new(reader);
            Box::new(Explained("gzip", decoder))
        }),
        Some(Format::Zstd) => Some(|reader| Box::new(Explained("Zstandard", Frames::new(reader)))),
        _ => None,
    }
}

/// A decoder whose errors say that the compressed data is at fault.
struct Explained<R>(&'static str, R);

impl<R: Read> Read for Explained<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Self(name, decoder) = self;
        decoder.read(into).map_err(|error| match error.kind() {
            ErrorKind::Interrupted => error,
            ErrorKind::UnexpectedEof => io::Error::new(
                error.kind(),
                format!("the {name} data ends in its middle: the file is not complete; copy or download it again"),
            ),
            kind => io::Error::new(
                kind,
                format!("the {name} data is damaged ({error}); copy or download the file again"),
            ),
        })
    }
}

/// The frames of a Zstandard file one after the other; `pzstd` writes several, and files may be put together.
struct Frames {
    reader: BufReader<Box<dyn Read>>,
    decoder: FrameDecoder,
    /// Whether a frame has begun whose contents have not all been handed on.
    inside: bool,
}

impl Frames {
    fn new(reader: Box<dyn Read>) -> Self {
        Self {
            reader: BufReader::with_capacity(1 << 16, reader),
            decoder: FrameDecoder::new(),
            inside: false,
        }
    }

    /// Begins the next frame; false at the end of the file.
    fn begin(&mut self) -> io::Result<bool> {
        loop {
            if self.reader.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.init(&mut self.reader) {
                Ok(()) => return Ok(true),
                // A frame that a tool keeps its own notes in.
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let mut notes = self.reader.by_ref().take(length.into());
                    if io::copy(&mut notes, &mut io::sink())? < u64::from(length) {
                        return Err(ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(of_frame(error)),
            }
        }
    }
}

impl Read for Frames {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.inside && !self.begin()? {
                return Ok(0);
            }
            self.inside = true;
            if self.decoder.can_collect() > 0 || into.is_empty() {
                return self.decoder.read(into);
            }
            if self.decoder.is_finished() {
                let stored = self.decoder.get_checksum_from_data();
                if stored.is_some() && stored != self.decoder.get_calculated_checksum() {
                    return Err(io::Error::other("its checksum does not match"));
                }
                self.inside = false;
                continue;
            }
            self.decoder
                .decode_blocks(&mut self.reader, BlockDecodingStrategy::UptoBlocks(1))
                .map_err(of_frame)?;
        }
    }
}

/// An end of the file inside a frame is told from damage.
fn of_frame(error: FrameDecoderError) -> io::Error {
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(one) = cause {
        let io = one.downcast_ref::<io::Error>();
        if io.is_some_and(|io| io.kind() == ErrorKind::UnexpectedEof) {
            return ErrorKind::UnexpectedEof.into();
        }
        cause = one.source();
    }
    io::Error::other(error)
}

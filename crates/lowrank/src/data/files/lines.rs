//! Rows of one object a line, and the blank bytes between rows.

use std::io::{self, BufRead, ErrorKind};

use super::{BYTE_ORDER_MARK, Body, RawRow};

/// Where in a file the next byte stands.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(in crate::data) struct Place {
    /// Line ends before it.
    pub(super) lines: usize,
    /// Bytes of its line before it; a byte order mark is not one of them.
    pub(super) column: usize,
    /// Bytes of the file before it.
    pub(super) offset: usize,
}

impl Place {
    pub(super) fn advance(&mut self, bytes: &[u8]) {
        self.offset += bytes.len();
        match bytes.iter().rposition(|byte| *byte == b'\n') {
            None => self.column += bytes.len(),
            Some(last) => {
                self.lines += bytes.split(|byte| *byte == b'\n').count() - 1;
                self.column = bytes.len() - last - 1;
            }
        }
    }
}

/// Goes to the next byte that is no blank and returns it; none at the end. Nothing that it passes over is kept, so a file
/// may have any number of blank lines.
pub(super) fn skip_blank(reader: &mut impl BufRead, place: &mut Place) -> io::Result<Option<u8>> {
    loop {
        let buffer = match reader.fill_buf() {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            buffer => buffer?,
        };
        if buffer.is_empty() {
            return Ok(None);
        }
        let next = buffer.iter().position(|byte| !byte.is_ascii_whitespace());
        let blank = next.unwrap_or(buffer.len());
        let found = next.map(|at| buffer[at]);
        place.advance(&buffer[..blank]);
        reader.consume(blank);
        if found.is_some() {
            return Ok(found);
        }
    }
}

/// Passes over the byte order mark that some editors write at the start of a file. The buffer holds the start of the file.
pub(super) fn skip_mark(reader: &mut impl BufRead, place: &mut Place) -> io::Result<()> {
    if reader.fill_buf()?.starts_with(BYTE_ORDER_MARK) {
        reader.consume(BYTE_ORDER_MARK.len());
        place.offset += BYTE_ORDER_MARK.len();
    }
    Ok(())
}

/// A row a line; blank lines are passed over.
pub(in crate::data) struct Lines {
    reader: Box<dyn BufRead>,
    place: Place,
}

impl Lines {
    /// `place` is that of the reader's next byte.
    pub(super) fn new(reader: Box<dyn BufRead>, place: Place) -> Self {
        Self { reader, place }
    }

    pub(super) fn next_row(&mut self) -> io::Result<Option<RawRow>> {
        if skip_blank(&mut self.reader, &mut self.place)?.is_none() {
            return Ok(None);
        }
        let start = self.place;
        let mut bytes = Vec::new();
        self.reader.read_until(b'\n', &mut bytes)?;
        self.place.advance(&bytes);
        bytes.truncate(bytes.trim_ascii_end().len());
        Ok(Some(RawRow {
            line: start.lines + 1,
            number: None,
            column: start.column,
            offset: start.offset,
            body: Body::Json(bytes),
        }))
    }
}

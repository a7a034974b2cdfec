//! Rows of one JSON array.

use serde::de::IgnoredAny;

use super::lines::Place;
use super::{Body, RawRow};

/// The elements of one array. What is no JSON ends the file: where the next row would begin cannot be known.
pub(in crate::data) struct Array {
    bytes: Vec<u8>,
    at: usize,
    /// That of `at`.
    place: Place,
    /// Rows that were begun.
    rows: usize,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Before,
    Inside,
    After,
}

impl Array {
    /// The bytes of a file from its bracket on, which stands at `place`.
    pub(super) fn new(bytes: Vec<u8>, place: Place) -> Self {
        Self {
            bytes,
            at: 0,
            place,
            rows: 0,
            state: State::Before,
        }
    }

    pub(super) fn next_row(&mut self) -> Result<Option<RawRow>, (usize, String)> {
        let mut next = self.skip_blank();
        match self.state {
            State::After => return Ok(None),
            State::Before => {
                // The caller has seen the bracket.
                self.advance(1);
                next = self.skip_blank();
                if next == Some(b']') {
                    return self.end();
                }
            }
            State::Inside => match next {
                Some(b']') => return self.end(),
                Some(b',') => {
                    self.advance(1);
                    next = self.skip_blank();
                }
                _ => return Err(self.expected("\",\" or \"]\" after a row", next)),
            },
        }
        self.state = State::Inside;
        if next.is_none() || next == Some(b']') {
            return Err(self.expected("a row", next));
        }
        self.rows += 1;
        let (place, number) = (self.place, self.rows);
        let mut elements =
            serde_json::Deserializer::from_slice(&self.bytes[self.at..]).into_iter::<IgnoredAny>();
        let outcome = elements.next();
        let length = elements.byte_offset();
        let row = |bytes: &[u8]| RawRow {
            line: place.lines + 1,
            number: Some(number),
            column: place.column,
            offset: place.offset,
            body: Body::Json(bytes.to_vec()),
        };
        if let Some(Err(error)) = outcome {
            let from = &self.bytes[self.at..];
            // A text that is no UTF-8 is named as such, not as what the parser trips over.
            let mut ends = from.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
            let upto = ends.nth(error.line().max(1) - 1);
            let upto = upto.map_or(from.len(), |(end, _)| end);
            return Err(row(&from[..upto])
                .utf8_problem()
                .unwrap_or_else(|| row(&from[..upto]).describe(&error)));
        }
        let row = row(&self.bytes[self.at..self.at + length]);
        self.advance(length);
        Ok(Some(row))
    }

    fn end(&mut self) -> Result<Option<RawRow>, (usize, String)> {
        self.advance(1);
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
        let column = self.place.column + 1;
        let hint = match next {
            Some(b']') => "; remove the comma before it",
            Some(b'/' | b'#') => "; JSON has no comments, so remove it",
            _ => "",
        };
        (
            self.place.lines + 1,
            format!("invalid JSON at column {column}: expected {what}, found {found}{hint}"),
        )
    }

    /// Goes to the next byte that means something.
    fn skip_blank(&mut self) -> Option<u8> {
        let blank = self.bytes[self.at..]
            .iter()
            .take_while(|byte| byte.is_ascii_whitespace())
            .count();
        self.advance(blank);
        self.bytes.get(self.at).copied()
    }

    fn advance(&mut self, length: usize) {
        self.place.advance(&self.bytes[self.at..self.at + length]);
        self.at += length;
    }
}

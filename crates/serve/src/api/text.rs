//! From tokens to the text of an answer: whole characters, texts that end it, tool calls.

use lowrank::data::{DecodeStream, Tokenizer};

use crate::tools::{Tool, ToolCall, ToolForm, ToolStream};

/// A part of an answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) content: String,
    pub(crate) calls: Vec<ToolCall>,
}

/// An answer under way.
pub(crate) struct Text<'a> {
    stream: Option<DecodeStream<'a>>,
    stops: StopScanner,
    tools: Option<ToolStream>,
}

impl<'a> Text<'a> {
    /// An answer that ends before any of these texts, whose calls are taken out where there are tools.
    pub(crate) fn new(
        tokenizer: &'a Tokenizer,
        stops: Vec<String>,
        tools: Option<(ToolForm, &[Tool], u64)>,
    ) -> Self {
        // The marks of calls may be special tokens.
        let stream = tokenizer.decode_stream(tools.is_none());
        Self {
            stream: Some(stream),
            stops: StopScanner::new(stops),
            tools: tools.map(|(form, tools, seed)| ToolStream::new(form, tools, seed)),
        }
    }

    /// The next token; `None` where the text ended before it or in it, with what was before.
    pub(crate) fn push(&mut self, id: u32) -> (Piece, bool) {
        let text = match &mut self.stream {
            Some(stream) => stream.push(id).unwrap_or_default(),
            None => return (Piece::default(), true),
        };
        let (text, has_ended) = self.stops.push(&text);
        if has_ended {
            self.stream = None;
        }
        (self.piece(&text), has_ended)
    }

    /// What was held back.
    pub(crate) fn finish(mut self) -> Piece {
        let mut text = String::new();
        if let Some(stream) = self.stream.take() {
            // A character that was cut in its middle is left out.
            let rest = stream.finish().unwrap_or_default();
            let rest = rest.trim_end_matches('\u{FFFD}');
            let (more, has_ended) = self.stops.push(rest);
            text.push_str(&more);
            if !has_ended {
                text.push_str(&self.stops.finish());
            }
        }
        let mut piece = self.piece(&text);
        if let Some(tools) = self.tools.take() {
            let last = tools.finish();
            piece.content.push_str(&last.content.unwrap_or_default());
            piece.calls.extend(last.calls);
        }
        piece
    }

    fn piece(&mut self, text: &str) -> Piece {
        match &mut self.tools {
            None => Piece {
                content: text.to_owned(),
                calls: Vec::new(),
            },
            Some(tools) => {
                let parsed = tools.push(text);
                Piece {
                    content: parsed.content.unwrap_or_default(),
                    calls: parsed.calls,
                }
            }
        }
    }
}

/// Finds texts that end an answer, over the ends of pieces.
#[derive(Debug)]
struct StopScanner {
    stops: Vec<String>,
    held: String,
}

impl StopScanner {
    fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            held: String::new(),
        }
    }

    /// What is certain of the text, and whether it ended there.
    fn push(&mut self, piece: &str) -> (String, bool) {
        if self.stops.is_empty() {
            return (piece.to_owned(), false);
        }
        self.held.push_str(piece);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()));
        if let Some(at) = found.min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        // The longest end that a stop may begin with.
        let may_stop = |at: &usize| {
            let end = &self.held[*at..];
            self.stops.iter().any(|stop| stop.starts_with(end))
        };
        let at = self.held.char_indices().map(|(at, _)| at).find(may_stop);
        let rest = self.held.split_off(at.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, rest), false)
    }

    fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut scanner = StopScanner::new(stops.iter().map(|&stop| stop.into()).collect());
        let mut text = String::new();
        for piece in pieces {
            let (more, has_ended) = scanner.push(piece);
            text.push_str(&more);
            if has_ended {
                return (text, true);
            }
        }
        text.push_str(&scanner.finish());
        (text, false)
    }

    #[test]
    fn a_stop_is_found_over_the_ends_of_pieces() {
        assert_eq!(scan(&["END"], &["aE", "N", "Db"]), ("a".into(), true));
        assert_eq!(scan(&["END"], &["aE", "NE", "ND"]), ("aEN".into(), true));
        assert_eq!(scan(&["\n\n", "x"], &["é\n", "\nx"]), ("é".into(), true));
        assert_eq!(scan(&["END"], &["aEN"]), ("aEN".into(), false));
        assert_eq!(scan(&[], &["a", "b"]), ("ab".into(), false));
        // The earliest one counts, whichever it is.
        assert_eq!(scan(&["b", "ab"], &["ab"]), (String::new(), true));
    }
}

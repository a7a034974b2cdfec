//! Text of ids that come one by one.

use super::error::DataError;
use super::tokenizer::Tokenizer;

/// Gives out text as soon as it is certain.
///
/// A token may hold a part of a character, so text that ends in a broken one is held back until the rest has come;
/// and some decoders drop the space in front of a text's first word, so a token is always decoded behind the ones
/// before it. All pieces and [`Self::finish`]
/// together are what [`Tokenizer::decode`] gives for all ids.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// The tokens that are decoded together: first those whose text is out, kept for their influence on what follows.
    window: Vec<u32>,
    /// How many of them are out whole.
    read: usize,
    /// What is out of the window's text.
    emitted: String,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            window: Vec::new(),
            read: 0,
            emitted: String::new(),
        }
    }

    /// Takes the next id and gives the text that became certain, often none.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, DataError> {
        self.window.push(id);
        let text = self.window_text()?;
        let certain = text.trim_end_matches('\u{FFFD}');
        let piece = certain
            .strip_prefix(&self.emitted)
            .unwrap_or_default()
            .to_owned();
        self.emitted.push_str(&piece);
        if certain.len() == text.len() {
            self.slide()?;
        }
        Ok(piece)
    }

    /// The rest: what was held back because its character never became whole.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn finish(mut self) -> Result<String, DataError> {
        let text = self.window_text()?;
        Ok(text
            .strip_prefix(&self.emitted)
            .unwrap_or_default()
            .to_owned())
    }

    /// The window's text. Decoders that write bytes as tokens of their own take back a whole run of them when a later
    /// one does not fit; what is out cannot be taken back, so from there on the rest is decoded by itself.
    fn window_text(&mut self) -> Result<String, DataError> {
        let text = self.tokenizer.decode(&self.window, self.skip_special)?;
        if text.starts_with(&self.emitted) {
            return Ok(text);
        }
        self.window.drain(..self.read);
        self.read = 0;
        self.emitted.clear();
        self.tokenizer.decode(&self.window, self.skip_special)
    }

    /// Forgets the tokens that were out before the last piece. The window keeps at least one token with a text, so that
    /// what follows is not taken for the beginning.
    fn slide(&mut self) -> Result<(), DataError> {
        if self.read > 0 {
            let rest = self
                .tokenizer
                .decode(&self.window[self.read..], self.skip_special)?;
            if rest.is_empty() {
                return Ok(());
            }
            self.window.drain(..self.read);
            self.emitted = rest;
        }
        self.read = self.window.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::data::fixture;

    fn bytes_of(c: char) -> Vec<u32> {
        c.to_string()
            .bytes()
            .map(|byte| 7 + u32::from(byte))
            .collect()
    }

    fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> Vec<String> {
        let mut stream = tokenizer.decode_stream(skip_special);
        let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        pieces
    }

    #[test]
    fn a_character_comes_out_whole() {
        let tokenizer = fixture::tokenizer();
        let ids = tokenizer.encode("a👍é", false).unwrap();
        assert_eq!(
            streamed(&tokenizer, &ids, false),
            ["a", "", "", "", "👍", "", "é", ""]
        );
        // What is never completed is said at the end, as decode says it.
        assert_eq!(
            streamed(&tokenizer, &ids[..3], false),
            ["a", "", "", "\u{FFFD}"]
        );
    }

    #[test]
    fn spaces_between_words_stay() {
        let tokenizer = fixture::sentence_piece();
        assert_eq!(
            streamed(&tokenizer, &[1, 3, 4, 6, 4], true),
            ["", "Hello", " you", "!", " you", ""]
        );
        // A special token that is not shown does not make a new beginning.
        assert_eq!(
            streamed(&tokenizer, &[3, 2, 4, 2, 2, 4], true).concat(),
            "Hello you you"
        );
        let byte = |byte: u32| 7 + byte;
        assert_eq!(
            streamed(&tokenizer, &[3, byte(0xc3), byte(0xa9), 4], true),
            ["Hello", "", "é", " you", ""]
        );
    }

    #[test]
    fn bytes_that_do_not_fit_spoil_only_themselves() {
        let tokenizer = fixture::sentence_piece();
        let byte = |byte: u32| 7 + byte;
        let ids = [byte(0x71), byte(0xc3), byte(0x72), 4];
        assert_eq!(
            streamed(&tokenizer, &ids, false).concat(),
            "q\u{FFFD}\u{FFFD} you"
        );
        assert_eq!(
            streamed(&tokenizer, &[byte(0x71), byte(0xc3)], false),
            ["q", "", "\u{FFFD}"]
        );
    }

    proptest! {
        #[test]
        fn pieces_together_are_the_whole(ids in prop::collection::vec(0_u32..266, 0..40), skip in any::<bool>()) {
            let bytes = fixture::tokenizer();
            prop_assert_eq!(streamed(&bytes, &ids, skip).concat(), bytes.decode(&ids, skip).unwrap());
        }

        #[test]
        fn pieces_together_are_the_whole_with_dropped_spaces(
            parts in prop::collection::vec(prop_oneof![(0_u32..7).prop_map(|id| vec![id]), any::<char>().prop_map(bytes_of)], 0..20),
            skip in any::<bool>(),
        ) {
            let words = fixture::sentence_piece();
            let ids = parts.concat();
            prop_assert_eq!(streamed(&words, &ids, skip).concat(), words.decode(&ids, skip).unwrap());
        }

        #[test]
        fn any_ids_give_some_text(ids in prop::collection::vec(0_u32..300, 0..30)) {
            streamed(&fixture::sentence_piece(), &ids, false);
        }
    }
}

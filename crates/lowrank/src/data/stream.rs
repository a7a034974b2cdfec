//! Text of ids that come one by one.

use super::error::DataError;
use super::tokenizer::Tokenizer;

/// Gives out text as soon as it is certain.
///
/// A token may hold a part of a character, so text that ends in a broken one is held back until the rest has come;
/// and some decoders drop the space in front of a text's first word, so a token is always decoded behind the ones
/// before it. All pieces and [`Self::finish`] together are exactly what [`Tokenizer::decode`] gives for all ids.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// The tokens that are decoded together: first those whose text is out, kept for their influence on what follows.
    window: Vec<u32>,
    /// How many of them are out whole.
    read: usize,
    /// How many bytes of the window's text are out.
    emitted: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            window: Vec::new(),
            read: 0,
            emitted: 0,
        }
    }

    /// Takes the next id and gives the text that became certain, often none.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, DataError> {
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window, self.skip_special)?;
        let certain = text.trim_end_matches('\u{FFFD}');
        let piece = certain.get(self.emitted..).unwrap_or_default().to_owned();
        self.emitted = self.emitted.max(certain.len());
        if certain.len() == text.len() {
            self.slide()?;
        }
        Ok(piece)
    }

    /// The rest: what was held back because its character never became whole.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn finish(self) -> Result<String, DataError> {
        let text = self.tokenizer.decode(&self.window, self.skip_special)?;
        Ok(text.get(self.emitted..).unwrap_or_default().to_owned())
    }

    /// Forgets the tokens that were out before the last piece. The window keeps at least one token with a text, so that
    /// what follows is not taken for the beginning.
    fn slide(&mut self) -> Result<(), DataError> {
        let rest = self
            .tokenizer
            .decode(&self.window[self.read..], self.skip_special)?;
        if self.read == 0 || !rest.is_empty() {
            if self.read > 0 {
                self.window.drain(..self.read);
                self.emitted = rest.len();
            }
            self.read = self.window.len();
        }
        Ok(())
    }
}

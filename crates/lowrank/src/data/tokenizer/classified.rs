//! Texts as a classifier reads them: with the tokenizer's own tokens around them, in pairs, and cut from the longest.

use tokenizers::utils::truncation::{TruncationParams, TruncationStrategy, truncate_encodings};
use tokenizers::{Encoding, PostProcessor as _};

use super::{DataError, Encoded, Tokenizer};

impl Tokenizer {
    /// A text, or a pair of them, with the tokens that the tokenizer puts around them: `tokenizer(text, pair)` of
    /// transformers. What is over `max_length` tokens is cut from the end of the longer text, then from both
    /// (`longest_first`); the tokens around them are always kept.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it, or `max_length` leaves no room for the text.
    pub fn encode_classified(
        &self,
        text: &str,
        pair: Option<&str>,
        max_length: usize,
    ) -> Result<Encoded, DataError> {
        let encode = |text: &str| self.inner.encode(text, false).map_err(failed);
        let first = encode(text)?;
        let second = pair.map(encode).transpose()?;
        self.surround(first, second, max_length)
    }

    /// A text that is split into words already: `tokenizer(words, is_split_into_words=True)`, which also says the word of
    /// each token. Every word begins with a space where the tokenizer tells words by the space before them, as
    /// transformers' examples have it (`add_prefix_space=True` for RoBERTa and GPT-2).
    ///
    /// # Errors
    /// As [`Self::encode_classified`].
    pub fn encode_words<S: AsRef<str>>(
        &self,
        words: &[S],
        max_length: usize,
    ) -> Result<Encoded, DataError> {
        let is_token = |word: &str| {
            let id = self.inner.token_to_id(word);
            let added = self.inner.get_added_vocabulary();
            id.is_some_and(|id| added.simple_id_to_token(id).is_some())
        };
        let words: Vec<String> = words
            .iter()
            .map(AsRef::as_ref)
            .map(|word| {
                if self.spaces_before_words
                    && !word.is_empty()
                    && !word.starts_with(' ')
                    && !is_token(word)
                {
                    format!(" {word}")
                } else {
                    word.to_owned()
                }
            })
            .collect();
        let encoding = self.inner.encode(words, false).map_err(failed)?;
        self.surround(encoding, None, max_length)
    }

    /// Cuts, and puts the tokenizer's own tokens around.
    fn surround(
        &self,
        first: Encoding,
        second: Option<Encoding>,
        max_length: usize,
    ) -> Result<Encoded, DataError> {
        let length = |first: &Encoding, second: &Option<Encoding>| {
            first.len() + second.as_ref().map_or(0, Encoding::len)
        };
        let processor = self.processor.as_ref();
        let added = processor.map_or(0, |processor| processor.added_tokens(second.is_some()));
        if max_length <= added {
            return Err(DataError::Encoding(format!(
                "max_seq_length is {max_length}, which leaves no room for a text: the tokenizer puts {added} tokens around it; \
                 set max_seq_length higher"
            )));
        }
        let whole = length(&first, &second);
        let options = TruncationParams {
            max_length: max_length - added,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
            direction: self.cuts_from,
        };
        let (first, second) = truncate_encodings(first, second, &options).map_err(failed)?;
        let truncated = whole - length(&first, &second);
        let encoding = match processor {
            Some(processor) => processor.process(first, second, true).map_err(failed)?,
            None => Encoding::merge([Some(first), second].into_iter().flatten(), false),
        };
        // A tokenizer that puts nothing around texts does not tell two of them apart either.
        let kinds = encoding.get_type_ids();
        let token_types = if added == 0 || kinds.iter().all(|kind| *kind == 0) {
            Vec::new()
        } else {
            kinds.iter().map(|kind| *kind as u8).collect()
        };
        let encoded = Encoded {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding.get_offsets().to_vec(),
            words: encoding.get_word_ids().to_vec(),
            token_types,
            truncated,
            added,
        };
        self.check(&encoded.ids)?;
        Ok(encoded)
    }
}

fn failed(error: impl std::fmt::Display) -> DataError {
    DataError::Encoding(error.to_string())
}

//! The tokenizer of the built-in model: byte-level BPE, trained on the corpus.
//!
//! The corpus has about fifteen hundred words, so that with [`VOCABULARY`] tokens nearly every word is one token, and
//! any other text still falls apart into bytes.

use anyhow::{Result, anyhow};
use serde_json::json;
use tokenizers::decoders::byte_level::ByteLevel as Decoder;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
};
use tokenizers::{Tokenizer, TokenizerBuilder};

use crate::corpus::{END_OF_TEXT, TURN_END, TURN_START, corpus};

/// Tokens in all: the specials, the 256 bytes and the merges.
pub const VOCABULARY: usize = 2048;
/// The most tokens of a context.
pub const CONTEXT: usize = 512;
/// The token that fills up batches in other programs. It is not the end token: whoever masks the padding must not
/// mask the end.
pub const PADDING: &str = "<|pad|>";
/// The special tokens, in the order of their ids.
pub const SPECIALS: [&str; 4] = [END_OF_TEXT, TURN_START, TURN_END, PADDING];

const DOCUMENTS: u64 = 6_000;
const SEED: u64 = 1;

/// Trains the tokenizer; the same on every machine.
///
/// # Errors
/// Where the `tokenizers` crate gives one; not expected.
pub fn train() -> Result<Tokenizer> {
    let fail = |error: tokenizers::Error| anyhow!("cannot train the tokenizer: {error}");
    let specials = SPECIALS.map(|token| AddedToken::from(token, true));
    let mut trainer = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(specials.to_vec())
        .build();
    let bytes = ByteLevel::new(false, true, true);
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >::new()
    .with_model(BPE::default())
    .with_normalizer(None)
    .with_pre_tokenizer(Some(bytes.into()))
    .with_post_processor(None)
    .with_decoder(Some(Decoder::default().into()))
    .build()
    .map_err(fail)?;
    // The marks of turns are tokens already; what stands between them is text.
    let texts = corpus(SEED, DOCUMENTS).flat_map(|document| {
        let pieces: Vec<_> = document
            .split(TURN_START)
            .flat_map(|turn| turn.split(TURN_END))
            .map(String::from)
            .collect();
        pieces
    });
    tokenizer.train(&mut trainer, texts).map_err(fail)?;
    Ok(tokenizer.into())
}

/// `tokenizer.json`, without white space.
///
/// # Errors
/// Where the `tokenizers` crate gives one; not expected.
pub fn json(tokenizer: &Tokenizer) -> Result<String> {
    let mut text = tokenizer
        .to_string(false)
        .map_err(|error| anyhow!("cannot write the tokenizer: {error}"))?;
    text.push('\n');
    Ok(text)
}

/// `tokenizer_config.json`, as transformers reads it.
pub fn config() -> serde_json::Value {
    let decoder: serde_json::Map<_, _> = SPECIALS
        .iter()
        .enumerate()
        .map(|(id, token)| {
            let entry = json!({
                "content": token, "lstrip": false, "normalized": false,
                "rstrip": false, "single_word": false, "special": true,
            });
            (id.to_string(), entry)
        })
        .collect();
    json!({
        "add_prefix_space": false,
        "added_tokens_decoder": decoder,
        "bos_token": null,
        "clean_up_tokenization_spaces": false,
        "eos_token": END_OF_TEXT,
        "extra_special_tokens": {},
        "model_max_length": CONTEXT,
        "pad_token": PADDING,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": null,
    })
}

/// `chat_template.jinja`: ChatML, without a system turn of its own.
pub const CHAT_TEMPLATE: &str = "\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
";

/// The corpus number `seed` as rows of `length` token ids, without end: documents follow one another, each ended by
/// [`END_OF_TEXT`], and are cut where a row is full. A row begins with the last token of the row before it, so that
/// every token is predicted once.
pub fn rows(
    tokenizer: &Tokenizer,
    seed: u64,
    length: usize,
) -> impl Iterator<Item = Result<Vec<u32>>> {
    let mut documents = corpus(seed, u64::MAX);
    let mut ids: Vec<u32> = vec![0];
    std::iter::from_fn(move || {
        while ids.len() < length {
            let document = documents.next()? + END_OF_TEXT;
            match tokenizer.encode_fast(document, false) {
                Ok(encoding) => ids.extend(encoding.get_ids()),
                Err(error) => return Some(Err(anyhow!("cannot encode the corpus: {error}"))),
            }
        }
        let row = ids[..length].to_vec();
        ids.drain(..length.saturating_sub(1).max(1));
        Some(Ok(row))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_and_common_words_are_one_token() -> Result<()> {
        let tokenizer = train()?;
        assert_eq!(tokenizer.get_vocab_size(true), VOCABULARY);
        for (id, token) in SPECIALS.iter().enumerate() {
            assert_eq!(tokenizer.token_to_id(token), Some(id as u32));
        }
        for text in [
            "Tom took his brown dog to the river.",
            "Über 3 naïve 🦊?\n\n\t\"So!\"",
            "name: Mia | place: river",
        ] {
            let encoding = tokenizer
                .encode_fast(text, false)
                .map_err(|error| anyhow!(error))?;
            assert_eq!(
                tokenizer
                    .decode(encoding.get_ids(), false)
                    .map_err(|error| anyhow!(error))?,
                text
            );
        }
        let encoding = tokenizer
            .encode_fast("Tom took his brown dog to the river.", false)
            .map_err(|error| anyhow!(error))?;
        assert_eq!(encoding.get_ids().len(), 9);
        Ok(())
    }

    #[test]
    fn rows_overlap_by_one_token_and_hold_the_whole_corpus() -> Result<()> {
        let tokenizer = train()?;
        let rows: Vec<_> = rows(&tokenizer, 3, 64).take(20).collect::<Result<_>>()?;
        for pair in rows.windows(2) {
            assert_eq!(pair[0].len(), 64);
            assert_eq!(pair[0].last(), pair[1].first());
        }
        let ids: Vec<u32> = rows.iter().flat_map(|row| row[1..].to_vec()).collect();
        let text = tokenizer
            .decode(&ids, false)
            .map_err(|error| anyhow!(error))?;
        let first: Vec<_> = corpus(3, 2).collect();
        assert!(text.starts_with(&first.join(END_OF_TEXT)));
        Ok(())
    }
}

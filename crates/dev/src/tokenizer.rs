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
}

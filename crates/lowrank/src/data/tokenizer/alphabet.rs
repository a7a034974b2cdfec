//! How a vocabulary writes bytes, to show tokens as text.

use std::fmt::Write as _;

use tokenizers::TokenizerImpl;

/// How the tokens of a vocabulary write bytes.
#[derive(Debug)]
pub(super) enum ByteAlphabet {
    /// GPT-2's: a printable character for each byte.
    Printable(Box<[u32; 256]>),
    /// SentencePiece's: `▁` is a space, `<0xE2>` a byte.
    SentencePiece,
}

impl ByteAlphabet {
    pub(super) fn of<M, N, P, PP>(
        inner: &TokenizerImpl<M, N, P, PP, tokenizers::DecoderWrapper>,
    ) -> Self
    where
        M: tokenizers::Model,
        N: tokenizers::Normalizer,
        P: tokenizers::PreTokenizer,
        PP: tokenizers::PostProcessor,
    {
        fn is_byte_level(decoder: &tokenizers::DecoderWrapper) -> bool {
            match decoder {
                tokenizers::DecoderWrapper::ByteLevel(_) => true,
                tokenizers::DecoderWrapper::Sequence(sequence) => {
                    sequence.get_decoders().iter().any(is_byte_level)
                }
                _ => false,
            }
        }
        if inner.get_decoder().is_some_and(is_byte_level) {
            Self::Printable(Box::new(printable_bytes()))
        } else {
            Self::SentencePiece
        }
    }

    pub(super) fn text_of(&self, token: &str) -> String {
        readable(&self.bytes_of(token))
    }

    /// The bytes that a token of the vocabulary stands for. One that the alphabet could not have written stands for itself.
    pub(super) fn bytes_of(&self, token: &str) -> Vec<u8> {
        let bytes: Option<Vec<u8>> = match self {
            Self::Printable(alphabet) => {
                let byte = |c: char| alphabet.iter().position(|known| *known == c as u32);
                token.chars().map(|c| byte(c).map(|at| at as u8)).collect()
            }
            Self::SentencePiece => {
                let byte = token
                    .strip_prefix("<0x")
                    .and_then(|rest| rest.strip_suffix('>'));
                match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => Some(vec![byte]),
                    None => Some(token.replace('▁', " ").into_bytes()),
                }
            }
        };
        bytes.unwrap_or_else(|| token.as_bytes().to_vec())
    }
}

/// Bytes as text, with `\xE2` for those that are no whole character.
fn readable(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        for byte in chunk.invalid() {
            // Writing to a String cannot fail.
            let _ = write!(out, "\\x{byte:02X}");
        }
    }
    out
}

/// GPT-2's character of every byte: itself where it is printable, the next one from 256 on where it is not.
pub(in crate::data) fn printable_bytes() -> [u32; 256] {
    let mut next = 256;
    std::array::from_fn(|byte| {
        if matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) {
            byte as u32
        } else {
            next += 1;
            next - 1
        }
    })
}

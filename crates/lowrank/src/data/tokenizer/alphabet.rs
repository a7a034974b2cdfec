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
        match self {
            Self::Printable(alphabet) => {
                let byte = |c: char| alphabet.iter().position(|known| *known == c as u32);
                match token.chars().map(byte).collect::<Option<Vec<usize>>>() {
                    Some(bytes) => {
                        readable(&bytes.iter().map(|byte| *byte as u8).collect::<Vec<u8>>())
                    }
                    None => token.to_owned(),
                }
            }
            Self::SentencePiece => {
                let byte = token
                    .strip_prefix("<0x")
                    .and_then(|rest| rest.strip_suffix('>'));
                match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => readable(&[byte]),
                    None => token.replace('▁', " "),
                }
            }
        }
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

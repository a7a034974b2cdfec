//! SentencePiece's model files (`sentencepiece.bpe.model`, `spm.model`): the pieces, and how texts are normalized.
//!
//! They are protocol buffers, `ModelProto` of sentencepiece_model.proto. Of its fields those are read that a tokenizer needs: `pieces` (1)
//! with `piece` (1), `score` (2) and `type` (3); `model_type` (3) of `trainer_spec` (2); `precompiled_charsmap` (2) of
//! `normalizer_spec` (3). All others are passed over.

use std::path::Path;

use crate::error::FormatError;

/// What a model file says.
#[derive(Debug, Clone, PartialEq)]
pub struct SentencePieces {
    /// The vocabulary; a piece's place is its id.
    pub pieces: Vec<Piece>,
    /// Whether texts are cut by the pieces' probabilities; otherwise by merges, or in another way.
    pub is_unigram: bool,
    /// The table by which characters are replaced before a text is cut; empty where there is none.
    pub charsmap: Vec<u8>,
}

/// A piece of the vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// Its text, with `▁` for a space.
    pub text: String,
    /// The logarithm of its probability.
    pub score: f32,
    /// What it is for.
    pub kind: PieceKind,
}

/// What a piece is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PieceKind {
    /// A part of texts.
    Normal,
    /// What stands for all that is not in the vocabulary.
    Unknown,
    /// Not a part of texts, such as their beginning.
    Control,
    /// A part of texts that is never cut.
    UserDefined,
    /// A byte, or what no text is cut into.
    Other,
}

/// Vocabularies have up to half a million pieces.
const PIECES: usize = 4 << 20;

/// Reads a model file from its bytes; `path` is for messages.
///
/// # Errors
/// If the bytes are no model, or one without pieces.
pub fn read_sentence_pieces(path: &Path, bytes: &[u8]) -> Result<SentencePieces, FormatError> {
    let malformed = |problem: String| FormatError::Malformed {
        path: path.to_owned(),
        problem,
    };
    let mut read = SentencePieces {
        pieces: Vec::new(),
        is_unigram: true,
        charsmap: Vec::new(),
    };
    let mut fields = Fields { bytes, at: 0 };
    while let Some(field) = fields.next().map_err(malformed)? {
        match field {
            (1, Content::Bytes(bytes)) => {
                if read.pieces.len() == PIECES {
                    return Err(malformed(format!("has more than {PIECES} pieces")));
                }
                let at = read.pieces.len();
                let piece = read_piece(bytes);
                let piece = piece.map_err(|problem| malformed(format!("piece {at} {problem}")))?;
                read.pieces.push(piece);
            }
            (2, Content::Bytes(bytes)) => {
                let mut inside = Fields { bytes, at: 0 };
                while let Some(field) = inside.next().map_err(malformed)? {
                    if let (3, Content::Number(kind)) = field {
                        read.is_unigram = kind == 1;
                    }
                }
            }
            (3, Content::Bytes(bytes)) => {
                let mut inside = Fields { bytes, at: 0 };
                while let Some(field) = inside.next().map_err(malformed)? {
                    if let (2, Content::Bytes(table)) = field {
                        table.clone_into(&mut read.charsmap);
                    }
                }
            }
            _ => {}
        }
    }
    if read.pieces.is_empty() {
        return Err(malformed(
            "is no SentencePiece model: it has no pieces".into(),
        ));
    }
    Ok(read)
}

fn read_piece(bytes: &[u8]) -> Result<Piece, String> {
    let mut text = None;
    let (mut score, mut kind) = (0.0, PieceKind::Normal);
    let mut fields = Fields { bytes, at: 0 };
    while let Some(field) = fields.next()? {
        match field {
            (1, Content::Bytes(bytes)) => {
                let read = std::str::from_utf8(bytes);
                text = Some(read.map_err(|_| "is no UTF-8")?.to_owned());
            }
            (2, Content::Four(bytes)) => score = f32::from_le_bytes(bytes),
            (3, Content::Number(number)) => {
                kind = match number {
                    1 => PieceKind::Normal,
                    2 => PieceKind::Unknown,
                    3 => PieceKind::Control,
                    4 => PieceKind::UserDefined,
                    _ => PieceKind::Other,
                }
            }
            _ => {}
        }
    }
    if !score.is_finite() {
        return Err(format!("has the score {score}"));
    }
    let text = text.ok_or("has no text")?;
    Ok(Piece { text, score, kind })
}

/// The fields of a message, one after the other.
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// What a field holds.
enum Content<'a> {
    Number(u64),
    Four([u8; 4]),
    Eight,
    Bytes(&'a [u8]),
}

impl<'a> Fields<'a> {
    /// The next field's number and content; none at the end.
    fn next(&mut self) -> Result<Option<(u64, Content<'a>)>, String> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let key = self.number()?;
        let content = match key & 7 {
            0 => Content::Number(self.number()?),
            1 => {
                self.take(8)?;
                Content::Eight
            }
            2 => {
                let length = self.number()?;
                let length = usize::try_from(length).map_err(|_| damaged())?;
                Content::Bytes(self.take(length)?)
            }
            5 => {
                let four = self.take(4)?;
                Content::Four([four[0], four[1], four[2], four[3]])
            }
            _ => return Err(damaged()),
        };
        Ok(Some((key >> 3, content)))
    }

    /// A number in groups of seven bits, the lowest first.
    fn number(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(damaged())
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(count);
        let taken = end.and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or_else(damaged)?;
        self.at += count;
        Ok(taken)
    }
}

fn damaged() -> String {
    "is no SentencePiece model, or a damaged one; copy it from the model's repository again".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(mut value: u64) -> Vec<u8> {
        let mut out = Vec::new();
        while value >= 0x80 {
            out.push(value as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
        out
    }

    fn bytes(field: u64, content: &[u8]) -> Vec<u8> {
        [
            number(field << 3 | 2),
            number(content.len() as u64),
            content.to_vec(),
        ]
        .concat()
    }

    fn piece(text: &str, score: f32, kind: u64) -> Vec<u8> {
        let score = [vec![2 << 3 | 5], score.to_le_bytes().to_vec()].concat();
        let kind = [vec![3 << 3], number(kind)].concat();
        bytes(1, &[bytes(1, text.as_bytes()), score, kind].concat())
    }

    fn model() -> Vec<u8> {
        let trainer = [
            bytes(1, b"input.txt"),
            vec![3 << 3, 1],
            vec![10 << 3 | 1],
            vec![0; 8],
        ]
        .concat();
        [
            piece("<unk>", 0.0, 2),
            piece("<s>", 0.0, 3),
            piece("▁a", -1.5, 1),
            piece("<user>", -2.0, 4),
            bytes(2, &trainer),
            bytes(3, &[bytes(1, b"nmt_nfkc"), bytes(2, b"table")].concat()),
        ]
        .concat()
    }

    fn read(bytes: &[u8]) -> Result<SentencePieces, String> {
        read_sentence_pieces(Path::new("spm.model"), bytes).map_err(|error| error.to_string())
    }

    #[test]
    fn pieces_and_normalizer_are_read() {
        let read = read(&model()).unwrap();
        let pieces: Vec<_> = read
            .pieces
            .iter()
            .map(|piece| (piece.text.as_str(), piece.score, piece.kind))
            .collect();
        assert_eq!(
            pieces,
            [
                ("<unk>", 0.0, PieceKind::Unknown),
                ("<s>", 0.0, PieceKind::Control),
                ("▁a", -1.5, PieceKind::Normal),
                ("<user>", -2.0, PieceKind::UserDefined)
            ]
        );
        assert!(read.is_unigram);
        assert_eq!(read.charsmap, b"table");
    }

    #[test]
    fn what_is_no_model_is_an_error() {
        let whole = model();
        for cut in 0..whole.len() {
            // A file that is cut between two fields is a shorter one.
            if let Err(error) = read(&whole[..cut]) {
                assert!(
                    error.starts_with("spm.model: is no SentencePiece model"),
                    "{cut}: {error}"
                );
            }
        }
        let error = |bytes: &[u8]| read(bytes).unwrap_err();
        assert!(error(b"").contains("it has no pieces"));
        assert!(error(b"{}").contains("is no SentencePiece model, or a damaged one"));
        assert!(error(&[0xff; 20]).contains("damaged"));
        assert!(
            error(&[
                0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01
            ])
            .contains("damaged")
        );
        assert!(error(&bytes(1, b"")).contains("piece 0 has no text"));
        assert!(error(&bytes(1, &bytes(1, b"\xff"))).contains("piece 0 is no UTF-8"));
        assert!(error(&piece("a", f32::NAN, 1)).contains("piece 0 has the score NaN"));
    }
}

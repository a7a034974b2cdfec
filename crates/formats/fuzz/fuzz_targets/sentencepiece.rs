//! Any bytes as a SentencePiece model: an error or a vocabulary.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use lowrank_formats::sentencepiece::read_sentence_pieces;

fuzz_target!(|data: &[u8]| {
    if let Ok(read) = read_sentence_pieces(Path::new("spm.model"), data) {
        assert!(!read.pieces.is_empty());
        assert!(read.pieces.iter().all(|piece| piece.score.is_finite()));
    }
});

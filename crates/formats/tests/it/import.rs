//! GGUF to Hugging Face, against folders whose tensors are known.

use std::env;
use std::path::{Path, PathBuf};

use lowrank_formats::checkpoint::{Checkpoint, StoredDType};
use lowrank_formats::gguf::Gguf;
use lowrank_formats::gguf_llama::import_weights;
use lowrank_formats::hf_config::HfConfig;

/// Every tensor equals the expected folder's, bit for bit.
fn assert_import_equals(gguf: &Path, expected: &Path) {
    let out = tempfile::tempdir().unwrap();
    import_weights(&Gguf::open(gguf).unwrap(), out.path(), StoredDType::F32).unwrap();
    let (ours, theirs) = (
        Checkpoint::open(out.path()).unwrap(),
        Checkpoint::open(expected).unwrap(),
    );
    let names: Vec<_> = ours.names().collect();
    assert_eq!(
        names,
        theirs
            .names()
            .filter(|name| *name != "lm_head.weight")
            .collect::<Vec<_>>()
    );
    for name in names {
        let (ours, theirs) = (ours.get(name).unwrap(), theirs.get(name).unwrap());
        assert_eq!(ours.shape, theirs.shape, "{name}");
        assert!(
            ours.to_f32().unwrap() == theirs.to_f32().unwrap(),
            "{name} differs"
        );
    }
    let (ours, theirs) = (
        HfConfig::read(out.path()).unwrap(),
        HfConfig::read(expected).unwrap(),
    );
    for field in [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "vocab_size",
    ] {
        assert_eq!(
            ours.usize(field).unwrap(),
            theirs.usize(field).unwrap(),
            "{field}"
        );
    }
    let eps = |config: &HfConfig| config.f64("rms_norm_eps").unwrap() as f32;
    assert_eq!(eps(&ours), eps(&theirs));
    assert_eq!(
        ours.bool("tie_word_embeddings").unwrap(),
        theirs.bool("tie_word_embeddings").unwrap()
    );
}

#[test]
fn a_downloaded_model_imports_exactly() {
    let path = |name| env::var_os(name).map(PathBuf::from);
    let (Some(gguf), Some(folder)) = (path("LOWRANK_TEST_GGUF"), path("LOWRANK_TEST_HF")) else {
        eprintln!(
            "skipped: set LOWRANK_TEST_GGUF and LOWRANK_TEST_HF to a model's GGUF file and f32 folder"
        );
        return;
    };
    assert_import_equals(&gguf, &folder);
}

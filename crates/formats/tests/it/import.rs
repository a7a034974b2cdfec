//! GGUF to Hugging Face, against folders whose tensors are known.

use std::env;
use std::path::{Path, PathBuf};

use lowrank_formats::checkpoint::{Checkpoint, StoredDType};
use lowrank_formats::gguf::Gguf;
use lowrank_formats::gguf_model::import_weights;
use lowrank_formats::hf_config::{HfConfig, eos_token_ids};
use serde_json::json;

use crate::golden;

/// Every tensor equals the expected folder's, bit for bit.
fn assert_import_equals(gguf: &Path, expected: &Path) {
    let out = tempfile::tempdir().unwrap();
    import_weights(&Gguf::open(gguf).unwrap(), out.path(), StoredDType::F32).unwrap();
    let (ours, theirs) = (
        Checkpoint::open(out.path()).unwrap(),
        Checkpoint::open(expected).unwrap(),
    );
    let names: Vec<_> = ours.names().collect();
    // transformers may save a tied head a second time.
    let tied = HfConfig::read(expected)
        .unwrap()
        .bool("tie_word_embeddings")
        .unwrap();
    let theirs_names: Vec<_> = theirs
        .names()
        .filter(|name| !tied || *name != "lm_head.weight")
        .collect();
    assert_eq!(names, theirs_names);
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

#[test]
fn a_small_model_imports_exactly() {
    assert_import_equals(&golden("llama.gguf"), &golden("llama"));
}

#[test]
fn the_configuration_serves_both_generations_of_transformers() {
    let out = tempfile::tempdir().unwrap();
    let gguf = Gguf::open(&golden("llama.gguf")).unwrap();
    import_weights(&gguf, out.path(), StoredDType::BF16).unwrap();
    let config = HfConfig::read(out.path()).unwrap();
    let scaling = json!({
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    assert_eq!(config.get("rope_scaling"), Some(&scaling));
    assert_eq!(config.f64("rope_theta").unwrap(), 500_000.0);
    let parameters = config.opt_object("rope_parameters").unwrap().unwrap();
    assert_eq!(parameters.str("rope_type").unwrap(), "llama3");
    assert_eq!(parameters.f64("rope_theta").unwrap(), 500_000.0);
    assert_eq!(config.f64("rms_norm_eps").unwrap(), 1e-5);
    assert!(config.bool("attention_bias").unwrap());
    assert_eq!(config.str("dtype").unwrap(), "bfloat16");
    // A turn ends with the end-of-turn token, a text with the end-of-text token.
    assert_eq!(eos_token_ids(out.path()).unwrap(), [2, 3]);

    let weights = Checkpoint::open(out.path()).unwrap();
    let expected = Checkpoint::open(&golden("llama")).unwrap();
    for name in weights.names() {
        let (ours, theirs) = (weights.get(name).unwrap(), expected.get(name).unwrap());
        assert_eq!(ours.dtype, StoredDType::BF16);
        assert_eq!(ours.to_bf16().unwrap(), theirs.to_bf16().unwrap(), "{name}");
    }
}

#[test]
fn another_architecture_is_refused_by_name() {
    let out = tempfile::tempdir().unwrap();
    let gguf = Gguf::open(&golden("quants.gguf")).unwrap();
    let error = import_weights(&gguf, out.path(), StoredDType::F32)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("general.architecture") && error.contains("\"quants\""),
        "{error}"
    );
    assert_eq!(
        std::fs::read_dir(out.path()).unwrap().count(),
        0,
        "nothing may be written"
    );
}

#[test]
fn weights_too_large_for_float16_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut bytes = std::fs::read(golden("llama.gguf")).unwrap();
    let gguf = Gguf::open(&golden("llama.gguf")).unwrap();
    let norm = gguf.tensor("output_norm.weight").unwrap().bytes.range();
    bytes[norm.start..norm.start + 4].copy_from_slice(&1e6f32.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let error = import_weights(&gguf, &out, StoredDType::F16)
        .unwrap_err()
        .to_string();
    assert!(error.contains("`model.norm.weight`: 1000000"), "{error}");
    assert_eq!(
        std::fs::read_dir(&out).unwrap().count(),
        0,
        "nothing may stay"
    );
    import_weights(&gguf, &out, StoredDType::BF16).unwrap();
}

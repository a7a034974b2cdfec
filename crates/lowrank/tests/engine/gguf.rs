//! GGUF files as they are: every storage type, models whose weights stay quantized, and what is written from them.

use std::env;
use std::path::{Path, PathBuf};

use lowrank::base::{Network, Source};
use lowrank::bench::write_random_gguf;
use lowrank::import::import_weights;
use lowrank::kernels::NumberFormat;
use lowrank::model::families::read_config;
use lowrank::model::{Decoder, ModelConfig, Purpose};
use lowrank::{DType, Tensor};
use lowrank_formats::checkpoint::{Checkpoint, StoredDType};
use lowrank_formats::gguf::{Gguf, READABLE};
use lowrank_formats::gguf_model::generation_config_json;
use lowrank_formats::hf_config::HfConfig;
use serde_json::json;

use super::common::{adapter, all_linear, difference, examples, ids, logits};
use super::gradients::{gradients, options};

/// The goldens that `scripts/goldens_gguf.py` makes.
fn formats(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../formats/tests/goldens")
        .join(name)
}

/// A file's tensor as a matrix.
fn matrix(gguf: &Gguf, name: &str) -> Tensor {
    let tensor = gguf.tensor(name).unwrap();
    let known = NumberFormat::ALL.into_iter();
    let mut known =
        known.filter(|format| format.to_string().eq_ignore_ascii_case(tensor.kind.name()));
    let format = known.next().unwrap();
    Tensor::from_le_bytes(
        tensor.bytes.as_ref(),
        format,
        tensor.rows(),
        tensor.columns(),
    )
    .unwrap()
}

#[test]
fn every_readable_type_has_the_values_of_the_gguf_package() {
    let gguf = Gguf::open(&formats("quants.gguf")).unwrap();
    let expected = Checkpoint::open(&formats("quants.safetensors")).unwrap();
    // GGUF files have every format but those of folders that bitsandbytes, GPTQ and AWQ quantize.
    assert_eq!(READABLE.len(), NumberFormat::ALL.len() - 4);
    for name in READABLE {
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let expected = expected.get(name).unwrap().to_f32().unwrap();
        assert_eq!(
            bits(&matrix(&gguf, name).to_vec()),
            bits(&expected),
            "{name}"
        );
    }
}

/// The shapes of a small model whose rows are whole blocks of 256.
pub(super) fn small() -> ModelConfig {
    let raw = json!({
        "model_type": "llama", "vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": true,
    });
    let raw = raw.as_object().unwrap().clone();
    read_config(&HfConfig::from_map(Path::new("small"), raw)).unwrap()
}

pub(super) fn network(path: &Path, dtype: DType) -> Result<Network, lowrank::Error> {
    let source = Source::find(path.to_str().unwrap())?;
    source.load_for(dtype, Purpose::LanguageModel, None, 0)
}

/// Weights that stay in blocks compute what the numbers do that they stand for, forward and backward.
pub(super) fn assert_computes_the_same(stored: &Decoder, exact: &Decoder, name: &str) {
    let ids = ids(40, 3);
    let off = difference(&logits(stored, None, &ids), &logits(exact, None, &ids));
    assert!(off < 1e-5, "{name}: {off:e}");
    let trained = |model: &Decoder| {
        let adapter = adapter(model, &all_linear(), 1);
        let rows = examples();
        let (sums, grads) = gradients(model, &adapter, &rows, 0, &options(5, 0.0));
        (sums.loss, grads, adapter.names)
    };
    let ((loss, found, names), (exact_loss, expected, _)) = (trained(stored), trained(exact));
    assert!((loss / exact_loss - 1.0).abs() < 1e-5, "{name}");
    for ((found, expected), slot) in found.iter().zip(&expected).zip(names) {
        let off = difference(found, expected);
        assert!(off < 1e-5, "{name}, {slot}: {off:e}");
    }
}

#[test]
fn blocks_are_trained_beside_as_they_are() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("model.gguf");
    for kind in READABLE.into_iter().filter(|kind| *kind != "F32") {
        write_random_gguf(&path, &small(), &|_, _| kind).unwrap();
        let stored = network(&path, DType::Bf16).unwrap().decoder;
        let exact = network(&path, DType::F32).unwrap().decoder;
        let bytes = |model: &Decoder| model.weights().bytes() as u64;
        assert_eq!(bytes(&stored), stored.config().weight_bytes(DType::Bf16));
        assert_eq!(bytes(&exact), exact.config().weight_bytes(DType::F32));
        assert!(bytes(&stored) < bytes(&exact) * 11 / 20, "{kind}");

        assert_computes_the_same(&stored, &exact, kind);
    }
}

#[test]
fn damaged_blocks_are_named() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("model.gguf");
    write_random_gguf(&path, &small(), &|_, _| "Q4_K").unwrap();
    let gguf = Gguf::open(&path).unwrap();
    for name in ["blk.1.ffn_up.weight", "blk.0.attn_q.weight"] {
        let mut bytes = std::fs::read(&path).unwrap();
        let start = gguf.tensor(name).unwrap().bytes.range().start;
        // The first scale becomes infinite.
        bytes[start..start + 2].copy_from_slice(&0x7c00_u16.to_le_bytes());
        let damaged = place.path().join("damaged.gguf");
        std::fs::write(&damaged, bytes).unwrap();
        for dtype in [DType::Bf16, DType::F32] {
            let error = network(&damaged, dtype).err().unwrap().to_string();
            for word in ["damaged.gguf", name, "the file is damaged"] {
                assert!(error.contains(word), "{error}");
            }
        }
    }
}

/// Every tensor equals the expected folder's, bit for bit.
fn assert_import_equals(gguf: &Path, expected: &Path) {
    let out = tempfile::tempdir().unwrap();
    import_weights(&Gguf::open(gguf).unwrap(), out.path(), DType::F32).unwrap();
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
    assert_import_equals(&formats("llama.gguf"), &formats("llama"));
}

#[test]
fn the_configuration_serves_both_generations_of_transformers() {
    let out = tempfile::tempdir().unwrap();
    let gguf = Gguf::open(&formats("llama.gguf")).unwrap();
    import_weights(&gguf, out.path(), DType::Bf16).unwrap();
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
    let generation = generation_config_json(&gguf);
    assert_eq!(generation["eos_token_id"], json!([2, 3]));

    let weights = Checkpoint::open(out.path()).unwrap();
    let expected = Checkpoint::open(&formats("llama")).unwrap();
    for name in weights.names() {
        let (ours, theirs) = (weights.get(name).unwrap(), expected.get(name).unwrap());
        assert_eq!(ours.dtype, StoredDType::BF16);
        assert_eq!(ours.to_bf16().unwrap(), theirs.to_bf16().unwrap(), "{name}");
    }
}

#[test]
fn another_architecture_is_refused_by_name() {
    let out = tempfile::tempdir().unwrap();
    let gguf = Gguf::open(&formats("quants.gguf")).unwrap();
    let error = import_weights(&gguf, out.path(), DType::F32)
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
fn values_that_cannot_be_stored_are_refused_by_name() {
    let place = tempfile::tempdir().unwrap();
    let (path, out) = (place.path().join("model.gguf"), place.path().join("out"));
    let gguf = Gguf::open(&formats("llama.gguf")).unwrap();
    let norm = gguf.tensor("output_norm.weight").unwrap().bytes.range();
    for (value, dtype, words) in [
        (
            f32::NAN,
            DType::F32,
            "holds NaN as its number 0; the file is damaged",
        ),
        (
            f32::INFINITY,
            DType::Bf16,
            "holds inf as its number 0; the file is damaged",
        ),
        (
            f32::MAX,
            DType::Bf16,
            "does not fit in bfloat16; import as float32",
        ),
    ] {
        let mut bytes = std::fs::read(formats("llama.gguf")).unwrap();
        bytes[norm.start..norm.start + 4].copy_from_slice(&value.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        std::fs::create_dir(&out).unwrap();
        let error = import_weights(&gguf, &out, dtype).unwrap_err().to_string();
        assert!(
            error.contains(words) && error.contains("norm.weight`"),
            "{error}"
        );
        assert_eq!(
            std::fs::read_dir(&out).unwrap().count(),
            0,
            "nothing may stay"
        );
        if value.is_finite() {
            import_weights(&gguf, &out, DType::F32).unwrap();
        }
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn a_type_that_cannot_be_read_is_named() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("model.gguf");
    let mut bytes = std::fs::read(formats("llama.gguf")).unwrap();
    let name = b"blk.0.ffn_up.weight";
    let at = bytes
        .windows(name.len())
        .position(|part| part == name)
        .unwrap()
        + name.len();
    // Behind the name are the number of dimensions, two of them, and the type, which becomes I8.
    bytes[at + 20..at + 24].copy_from_slice(&24_u32.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = network(&path, DType::Bf16).err().unwrap().to_string();
    for words in ["`blk.0.ffn_up.weight`", "stored as I8", "Q4_K"] {
        assert!(error.contains(words), "{error}");
    }
}

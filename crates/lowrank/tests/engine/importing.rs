//! GGUF files of every architecture, written by llama.cpp's conventions, against what transformers says of the models that they were
//! made of. `scripts/goldens_gguf_models.py` makes the goldens, and compares what transformers makes of the imported folders.

use std::fs;
use std::path::{Path, PathBuf};

use lowrank::DType;
use lowrank::base::Source;
use lowrank::data::Tokenizer;
use lowrank::import::import_gguf;
use lowrank::model::families::read_config;
use lowrank_formats::checkpoint::Checkpoint;
use lowrank_formats::gguf::Gguf;
use lowrank_formats::hf_config::HfConfig;
use serde_json::Value;

use super::common::{assert_says, difference, failure, logits, open};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens_gguf")
}

fn json(name: &str) -> Value {
    let text = fs::read(goldens().join(name)).expect("the golden");
    serde_json::from_slice(&text).expect("JSON")
}

fn list<T: serde::de::DeserializeOwned>(value: &Value) -> Vec<T> {
    serde_json::from_value(value.clone()).expect("a list")
}

#[test]
fn every_architecture_is_the_model_it_was_made_of() {
    let tensors = Checkpoint::open(&goldens().join("models.safetensors")).expect("the goldens");
    let known = json("models.json");
    let known = known.as_object().expect("models by name");
    assert!(known.len() >= 18);
    for (name, model) in known {
        let place = tempfile::tempdir().expect("a temporary folder");
        let folder = place.path().join("model");
        let file = goldens().join(format!("{name}.gguf"));
        let report = import_gguf(&file, &folder, DType::F32, false)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let gguf = Gguf::open(&file).expect("the file");
        assert_eq!(report.tensors, gguf.tensors().len(), "{name}");

        let config =
            |raw: HfConfig| read_config(&raw).unwrap_or_else(|error| panic!("{name}: {error}"));
        let original = model["config"].as_object().expect("a config").clone();
        assert_eq!(
            config(HfConfig::read(&folder).expect("config.json")),
            config(HfConfig::from_map(Path::new("original"), original)),
            "{name}"
        );

        let expected = tensors.get(&format!("{name}.logits")).expect("the golden");
        let expected = expected.to_f32().expect("floats");
        let found = logits(&open(&folder), None, &list::<u32>(&model["ids"]));
        let off = difference(&found[found.len() - expected.len()..], &expected);
        assert!(off < 1e-5, "{name}: {off}");

        // The file itself is the same model.
        let file = file.to_str().expect("a name");
        let base = Source::find(file).and_then(|source| source.load(DType::F32));
        let base = base.unwrap_or_else(|error| panic!("{name}: {error}"));
        let of_file = logits(&base.decoder, None, &list::<u32>(&model["ids"]));
        assert!(of_file == found, "{name}");
    }
}

#[test]
fn every_kind_of_tokenizer_gives_the_same_ids() {
    let (known, goldens_of) = (json("models.json"), json("tokenizers.json"));
    let texts: Vec<String> = list(&goldens_of["texts"]);
    let mut checked = 0;
    for (name, model) in known.as_object().expect("models by name") {
        let place = tempfile::tempdir().expect("a temporary folder");
        let folder = place.path().join("model");
        import_gguf(
            &goldens().join(format!("{name}.gguf")),
            &folder,
            DType::Bf16,
            false,
        )
        .unwrap_or_else(|error| panic!("{name}: {error}"));
        let tokenizer = Tokenizer::from_folder(&folder).expect("a tokenizer");
        let file = goldens().join(format!("{name}.gguf"));
        let source = Source::find(file.to_str().expect("a name")).expect("a model");
        let of_file = source.tokenizer().expect("a tokenizer");
        assert_eq!(of_file.stop_ids(), tokenizer.stop_ids(), "{name}");
        assert_eq!(
            of_file.has_chat_template(),
            tokenizer.has_chat_template(),
            "{name}"
        );
        let expected = &goldens_of["ids"][model["tokenizer"].as_str().expect("a name")];
        let (plain, special) = (&expected["ids"], &expected["with_special"]);
        for (at, text) in texts
            .iter()
            .enumerate()
            .filter(|(at, _)| !plain[at].is_null())
        {
            let ids = |add: bool| tokenizer.encode(text, add).expect("ids");
            assert_eq!(ids(false), list::<u32>(&plain[at]), "{name}: {text:?}");
            assert_eq!(ids(true), list::<u32>(&special[at]), "{name}: {text:?}");
            assert_eq!(of_file.encode(text, true).expect("ids"), ids(true));
            checked += 1;
        }
    }
    assert!(checked > 600, "{checked}");
}

/// What is wrong in a file: its name, a text in it and another of the same length in its place, and what the error says.
const WRONG: [[&str; 4]; 14] = [
    [
        "gemma3",
        "gemma3.rope.freq_base_swa",
        "gemma3.rope.freq_base_abc",
        "`gemma3.rope.freq_base_abc` is 100",
    ],
    [
        "qwen2",
        "blk.1.attn_k.bias",
        "blk.1.attn_k.bits",
        "tensor `blk.1.attn_k.bias` is missing",
    ],
    [
        "qwen2",
        "blk.1.attn_k.bias",
        "blk.1.attn_k.bits",
        "tensor `blk.1.attn_k.bits` has no place in Qwen2ForCausalLM",
    ],
    [
        "gemma2",
        "blk.0.post_ffw_norm",
        "blk.0.post_fff_norm",
        "tensor `blk.0.post_ffw_norm.weight` is missing",
    ],
    [
        "phi3",
        "rope_factors_long",
        "rope_factors_lang",
        "`rope_factors_long.weight`: is missing",
    ],
    [
        "phi3",
        "rope.scaling.attn_factor",
        "rope.scaling.attn_fuctor",
        "`phi3.rope.scaling.attn_fuctor` is 1",
    ],
    [
        "granite",
        "granite.residual_scale",
        "granite.residual_stale",
        "`granite.residual_stale` is 0.69",
    ],
    [
        "glm4",
        "glm4.rope.dimension_count",
        "glm4.rope.dimension_caunt",
        "`glm4.rope.dimension_caunt` is 4",
    ],
    [
        "olmo2",
        "blk.0.attn_q_norm",
        "blk.0.attn_q_morm",
        "tensor `blk.0.attn_q_norm.weight` is missing",
    ],
    [
        "smollm3",
        "smollm3.embedding_length",
        "smollm3.embedding_langth",
        "`smollm3.embedding_length` is missing",
    ],
    [
        "ministral3",
        "yarn_log_multiplier",
        "yarn_lag_multiplier",
        "`mistral3.rope.scaling.yarn_lag_multiplier` is 0.5",
    ],
    [
        "qwen3",
        "general.architecture",
        "general.architectura",
        "general.architecture` is missing; accepted: \"llama\", \"qwen2\"",
    ],
    [
        "llama",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.skores",
        "but 0 scores (tokenizer.ggml.scores)",
    ],
    [
        "llama_unigram",
        "tokenizer.ggml.model",
        "tokenizer.ggml.madel",
        "of the kind \"\"",
    ],
];

/// A key or a tensor that nothing reads, and so one that is missing: an error that names it, and no folder.
#[test]
fn what_is_not_understood_is_named() {
    let place = tempfile::tempdir().expect("a temporary folder");
    for [name, old, new, words] in WRONG {
        let mut bytes = fs::read(goldens().join(format!("{name}.gguf"))).expect("the golden");
        assert_eq!(old.len(), new.len());
        let mut replaced = 0;
        for at in 0..bytes.len() - old.len() {
            if bytes[at..].starts_with(old.as_bytes()) {
                bytes[at..at + new.len()].copy_from_slice(new.as_bytes());
                replaced += 1;
            }
        }
        assert!(replaced > 0, "{name} has no {old}");
        let (file, folder) = (place.path().join("model.gguf"), place.path().join("model"));
        fs::write(&file, bytes).expect("a file");
        let error = failure(import_gguf(&file, &folder, DType::F32, false));
        assert_says(&error, &[words]);
        assert!(!folder.exists(), "{name}");
    }
}

/// Whatever a byte is changed to: a folder or an error.
#[test]
fn a_damaged_file_never_panics() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let (file, folder) = (place.path().join("model.gguf"), place.path().join("model"));
    let (mut imported, mut refused) = (0, 0);
    for name in ["gemma3", "llama_unigram", "olmo3", "phi3"] {
        let whole = fs::read(goldens().join(format!("{name}.gguf"))).expect("the golden");
        // Keys and tensors' descriptions lie in front.
        for (turn, at) in (8..whole.len().min(16_000)).step_by(263).enumerate() {
            let mut bytes = whole.clone();
            bytes[at] = [0, 1, 255, bytes[at] ^ 16][turn % 4];
            fs::write(&file, bytes).expect("a file");
            match import_gguf(&file, &folder, DType::Bf16, true) {
                Ok(_) => imported += 1,
                Err(_) => refused += 1,
            }
        }
    }
    assert!(imported > 20 && refused > 20, "{imported} {refused}");
}

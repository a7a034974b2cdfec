//! Two adapters side by side: what must be alike is, and what cannot be compared says why.

use std::fs;
use std::path::{Path, PathBuf};

use lowrank::base::{Network, Source};
use lowrank::diff::{DiffReport, Of, diff};
use lowrank::tuning::lora::{self, InitLoraWeights};
use lowrank_formats::peft::LoraConfig;
use serde_json::Value;
use tempfile::TempDir;

use super::common::{assert_says, decoder, failure, golden, lora_config};

const ALL: [Of; 3] = [Of::A, Of::B, Of::Delta];

/// Writes an adapter of random A and B.
fn write(
    folder: &TempDir,
    name: &str,
    family: &str,
    config: &LoraConfig,
    init: InitLoraWeights,
    seed: u64,
) -> PathBuf {
    let path = folder.path().join(name);
    fs::create_dir(&path).expect("a folder");
    let model = decoder(family);
    let (adapter, _) = lora::inject(model.config(), config, init, seed).expect("injected");
    lora::save(
        &path,
        model.config(),
        config,
        &adapter,
        lowrank::tuning::BaseMark {
            fingerprint: "print",
            ..lowrank::tuning::BaseMark::default()
        },
    )
    .expect("saved");
    path
}

fn compare(first: &Path, second: &Path, of: Of) -> DiffReport {
    diff(first, second, of, None).expect("they can be compared")
}

#[test]
fn an_adapter_is_like_itself() {
    let folder = golden("llama").join("all_linear");
    for of in ALL {
        let report = compare(&folder, &folder, of);
        assert!(report.modules.len() > 10 && report.only_first.is_empty());
        for module in &report.modules {
            assert!((module.cosine.expect("not nought") - 1.0).abs() < 1e-9);
            let all = module.similarity.iter().flatten();
            for value in all {
                assert!((value - 1.0).abs() < 1e-9, "{module:?}");
            }
        }
    }
}

#[test]
fn another_rank_and_a_module_more_are_no_obstacle() {
    let place = tempfile::tempdir().expect("a folder");
    let narrow = LoraConfig {
        r: 2,
        ..lora_config(&["q_proj"])
    };
    let wide = LoraConfig {
        r: 5,
        ..lora_config(&["q_proj", "k_proj"])
    };
    let random = InitLoraWeights::Random;
    let narrow = write(&place, "narrow", "llama", &narrow, random, 1);
    let wide = write(&place, "wide", "llama", &wide, random, 2);
    let report = compare(&narrow, &wide, Of::A);
    assert_eq!(report.same_base, Some(true));
    assert_eq!((report.modules.len(), report.only_second.len()), (2, 2));
    let similarity = &report.modules[0].similarity;
    assert_eq!((similarity.len(), similarity[0].len()), (2, 5));
    // Turned round, the table is transposed.
    let turned = compare(&wide, &narrow, Of::A);
    assert!((turned.modules[0].similarity[3][1] - similarity[1][3]).abs() < 1e-12);
}

#[test]
fn what_was_not_trained_has_no_directions() {
    let place = tempfile::tempdir().expect("a folder");
    let config = lora_config(&["q_proj"]);
    let fresh = write(
        &place,
        "fresh",
        "llama",
        &config,
        InitLoraWeights::Gaussian,
        1,
    );
    let random = write(
        &place,
        "random",
        "llama",
        &config,
        InitLoraWeights::Random,
        2,
    );
    for of in [Of::B, Of::Delta] {
        let report = compare(&fresh, &random, of);
        let module = &report.modules[0];
        assert!(module.similarity.is_empty() && module.whole().is_none());
        assert_eq!((module.cosine, module.first.norm), (None, 0.0));
        assert_eq!(module.first.effective_rank, 0.0);
    }
    assert!(compare(&fresh, &random, Of::A).modules[0].whole().is_some());
}

#[test]
fn parts_of_a_fused_linear_are_compared_each_for_itself() {
    let place = tempfile::tempdir().expect("a folder");
    let parts = lora_config(&["c_attn.q", "c_attn.v"]);
    let random = InitLoraWeights::Random;
    let one = write(&place, "one", "gpt2", &parts, random, 1);
    let other = write(&place, "other", "gpt2", &parts, random, 2);
    let report = compare(&one, &other, Of::B);
    let model = decoder("gpt2");
    let (width, layers) = (model.config().hidden_size, model.config().num_hidden_layers);
    assert_eq!(report.modules.len(), 2 * layers);
    assert!(report.modules[0].module.ends_with("c_attn.q"));
    assert!(report.modules.iter().all(|m| m.shape == (width, width)));
    // The whole and its parts are not the same thing.
    let whole = write(
        &place,
        "whole",
        "gpt2",
        &lora_config(&["c_attn"]),
        random,
        1,
    );
    let text = failure(diff(&one, &whole, Of::A, None));
    assert_says(&text, &["share no module", "c_attn.q", "different models?"]);
}

#[test]
fn adapters_of_different_models_are_refused() {
    let (llama, gpt2) = (
        golden("llama").join("all_linear"),
        golden("gpt2").join("c_attn"),
    );
    let text = failure(diff(&llama, &gpt2, Of::A, None));
    assert_says(&text, &["cannot be compared", "share no module", "c_attn"]);
    let text = failure(diff(&llama, Path::new("nowhere"), Of::A, None));
    assert_says(&text, &["nowhere", "adapter_config.json"]);
    // Same names, another width.
    let place = tempfile::tempdir().expect("a folder");
    let config = lora_config(&["q_proj"]);
    let mistral = write(&place, "m", "mistral", &config, InitLoraWeights::Random, 1);
    let qwen = write(&place, "q", "qwen3", &config, InitLoraWeights::Random, 1);
    let shape = |family| {
        let (input, output) = decoder(family)
            .config()
            .linear_shape(lowrank::model::LinearKind::Q);
        format!("[{output}, {input}]")
    };
    let (one, other) = (shape("mistral"), shape("qwen3"));
    assert_ne!(one, other);
    let text = failure(diff(&mistral, &qwen, Of::A, None));
    assert_says(&text, &["q_proj", &one, &other]);
}

#[test]
fn a_damaged_adapter_is_named_with_what_is_wrong() {
    let place = tempfile::tempdir().expect("a folder");
    let folder = place.path().join("broken");
    fs::create_dir(&folder).expect("a folder");
    let good = golden("llama").join("all_linear");
    let file = "adapter_model.safetensors";
    fs::copy(good.join(file), folder.join(file)).expect("copied");
    let config = fs::read_to_string(good.join("adapter_config.json")).expect("read");
    let wrong = config.replace("\"r\": 3", "\"r\": 4");
    assert_ne!(wrong, config);
    fs::write(folder.join("adapter_config.json"), wrong).expect("written");
    let text = failure(diff(&folder, &good, Of::A, None));
    assert_says(&text, &["broken", "q_proj", "and r is 4"]);
}

/// Subspaces, norms and amplification against numpy's decompositions of dense matrices (`scripts/goldens_diff.py`).
#[test]
fn differences_of_adapters_are_numpys() {
    for model in ["llama", "gpt2"] {
        let folder = golden(model);
        let text = fs::read_to_string(folder.join("diff.json")).unwrap();
        let expected_of: Value = serde_json::from_str(&text).unwrap();
        let adapter = |side: &str| folder.join(expected_of[side].as_str().unwrap());
        let source = Source::find(&folder.display().to_string()).unwrap();
        let decoder = decoder(model);
        let base = Network {
            decoder,
            source,
            labels: None,
        };
        for of in [Of::A, Of::B, Of::Delta] {
            let report = diff(&adapter("first"), &adapter("second"), of, Some(&base)).unwrap();
            let expected = expected_of["modules"].as_array().unwrap();
            assert_eq!(report.modules.len(), expected.len());
            for found in &report.modules {
                let expected = expected
                    .iter()
                    .find(|one| one["module"] == found.module.as_str());
                let mut expected = expected.unwrap().clone();
                let overlap = expected
                    [format!("of_{}", serde_json::to_value(of).unwrap().as_str().unwrap())]
                .take();
                let found = serde_json::to_value(found).unwrap();
                agree("similarity", &overlap, &found["similarity"]);
                for field in ["cosine", "first", "second"] {
                    agree(field, &expected[field], &found[field]);
                }
            }
        }
    }
}

/// Every number of `expected` is in `found`.
fn agree(place: &str, expected: &Value, found: &Value) {
    match expected {
        Value::Object(fields) => {
            for (name, value) in fields {
                agree(&format!("{place}.{name}"), value, &found[name]);
            }
        }
        Value::Array(items) => {
            assert_eq!(Some(items.len()), found.as_array().map(Vec::len), "{place}");
            for (index, value) in items.iter().enumerate() {
                agree(&format!("{place}[{index}]"), value, &found[index]);
            }
        }
        _ => {
            let (expected, found) = (expected.as_f64().unwrap(), found.as_f64().unwrap());
            let near = (expected - found).abs() <= 1e-5 * expected.abs().max(1e-2);
            assert!(near, "{place}: {found}, numpy has {expected}");
        }
    }
}

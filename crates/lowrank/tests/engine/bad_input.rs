//! Model folders that can't be used: each error names the file, the field and what would mend it.

use std::fs;
use std::path::Path;

use lowrank::DType;
use lowrank::base::Source;
use serde_json::{Map, Value, json};

use super::common::{Place, assert_says, failure, write_tokenizer};

fn load(model: &Path) -> String {
    let model = model.display().to_string();
    failure(Source::find(&model).and_then(|source| source.load(DType::F32).map(|_| ())))
}

fn change(place: &Place, change: impl FnOnce(&mut Map<String, Value>)) {
    let path = place.path("model").join("config.json");
    let text = fs::read(&path).expect("config.json");
    let mut config = serde_json::from_slice(&text).expect("JSON");
    change(&mut config);
    fs::write(&path, json!(config).to_string()).expect("config.json");
}

#[test]
fn a_config_that_is_not_supported_is_named() {
    let cases: &[(&str, &str, Value, &[&str])] = &[
        (
            "llama",
            "model_type",
            json!("mamba"),
            &[
                "model_type",
                "mamba",
                "llama, mistral, qwen2, qwen3, gemma2, gemma3_text, gemma3, smollm3, granite",
            ],
        ),
        (
            "llama",
            "hidden_act",
            json!("mish"),
            &["hidden_act", "mish", "silu"],
        ),
        (
            "llama3",
            "rope_parameters",
            json!({"rope_type": "proportional", "factor": 4.0, "rope_theta": 1e4}),
            &[
                "rope_type",
                "proportional",
                "default, linear, dynamic, llama3, yarn, longrope",
            ],
        ),
        (
            "llama",
            "rope_scaling",
            json!({"type": "dynamic"}),
            &["rope_scaling.factor"],
        ),
        (
            "qwen2",
            "use_sliding_window",
            json!(true),
            &["use_sliding_window", "false"],
        ),
        (
            "gpt2",
            "scale_attn_by_inverse_layer_idx",
            json!(true),
            &["scale_attn_by_inverse_layer_idx"],
        ),
        (
            "gpt2",
            "activation_function",
            json!("quick"),
            &["activation_function", "quick"],
        ),
        (
            "llama",
            "num_key_value_heads",
            json!(3),
            &["num_key_value_heads", "divisor"],
        ),
        (
            "llama",
            "num_hidden_layers",
            json!(0),
            &["num_hidden_layers", "at least 1"],
        ),
        ("llama", "hidden_size", json!("32"), &["hidden_size"]),
    ];
    for (family, field, value, words) in cases {
        let place = Place::new(family);
        change(&place, |config| {
            if *field == "rope_scaling" {
                config.remove("rope_parameters");
            }
            if *field == "use_sliding_window" {
                config.remove("layer_types");
                config.insert("sliding_window".into(), 4.into());
                config.insert("max_window_layers".into(), 0.into());
            }
            config.insert((*field).to_owned(), value.clone());
        });
        let text = load(&place.path("model"));
        assert_says(&text, &["config.json"]);
        assert_says(&text, words);
    }
}

#[test]
fn a_file_that_is_missing_or_damaged_is_named() {
    let place = Place::new("llama");
    let model = place.path("model");
    let with = |name: &str, contents: Option<&[u8]>| {
        let path = model.join(name);
        let before = fs::read(&path).expect("the file");
        match contents {
            Some(contents) => fs::write(&path, contents).expect("the file"),
            None => fs::remove_file(&path).expect("the file"),
        }
        let text = load(&model);
        fs::write(&path, before).expect("the file");
        text
    };
    assert_says(&with("config.json", None), &["config.json"]);
    assert_says(
        &with("config.json", Some(b"{\"model_type\": ")),
        &["config.json"],
    );
    assert_says(
        &with("config.json", Some(b"{}")),
        &["config.json", "model_type"],
    );
    assert_says(
        &with("tokenizer.json", None),
        &["tokenizer.json", "copy it"],
    );
    assert_says(&with("tokenizer.json", Some(b"{}")), &["tokenizer.json"]);
    assert_says(&with("model.safetensors", None), &["model.safetensors"]);
    let bytes = fs::read(model.join("model.safetensors")).expect("the weights");
    for length in [0, 7, 100, bytes.len() - 4] {
        assert_says(
            &with("model.safetensors", Some(&bytes[..length])),
            &["model.safetensors"],
        );
    }
    Source::Folder(model)
        .load(DType::F32)
        .expect("nothing is wrong now");
}

#[test]
fn every_tensor_that_does_not_fit_is_named() {
    let place = Place::new("llama");
    change(&place, |config| {
        config.insert("vocab_size".into(), json!(98));
        config.insert("intermediate_size".into(), json!(40));
    });
    let text = load(&place.path("model"));
    assert_says(
        &text,
        &[
            "model.embed_tokens.weight: shape [97, 32], expected [98, 32]",
            "lm_head.weight: shape [97, 32], expected [98, 32]",
            "model.layers.0.mlp.gate_proj.weight: shape [44, 32], expected [40, 32]",
            "model.layers.1.mlp.down_proj.weight: shape [32, 44], expected [32, 40]",
        ],
    );

    let place = Place::new("llama");
    change(&place, |config| {
        config.insert("num_hidden_layers".into(), json!(1));
    });
    let text = load(&place.path("model"));
    assert_says(
        &text,
        &["model.layers.1.self_attn.q_proj.weight: no part of this architecture reads it"],
    );
    change(&place, |config| {
        config.insert("num_hidden_layers".into(), json!(3));
    });
    let text = load(&place.path("model"));
    assert_says(
        &text,
        &["model.layers.2.self_attn.q_proj.weight: missing (expected ["],
    );
}

#[test]
fn a_token_without_a_row_of_the_embedding_is_refused_where_it_is_used() {
    let place = Place::new("llama");
    let last = |size: u32| {
        write_tokenizer(&place.path("model"), size);
        let source = Source::Folder(place.path("model"));
        let base = source.load(DType::F32).expect("a model");
        let text = base.tokenizer.token_text(size - 1);
        assert!(
            base.tokenizer
                .encode(&base.tokenizer.token_text(96), false)
                .is_ok()
        );
        base.tokenizer.encode(&text, false)
    };
    assert_eq!(last(97).expect("it just fits"), [96]);
    let error = last(98).expect_err("one token too many").to_string();
    assert_says(
        &error,
        &["has the id 97", "embedding has 97 rows", "leave it out"],
    );
}

#[test]
fn a_name_that_is_no_model_is_explained() {
    let place = Place::new("llama");
    fs::write(place.path("model.gguf"), "GGUF").expect("a file");
    assert_says(
        &load(&place.path("model.gguf")),
        &["model.gguf", "is truncated"],
    );
    let weights = place.path("model").join("model.safetensors");
    assert_says(&load(&weights), &["is a file", "give the folder"]);
    assert_says(
        &load(&place.path("nowhere")),
        &["nowhere", "no such folder", "builtin:tiny"],
    );
    assert_says(&load(Path::new("builtin:huge")), &["huge", "builtin:tiny"]);
    assert_says(
        &load(Path::new("nobody/nothing-here")),
        &["lowrank model pull nobody/nothing-here"],
    );
}

//! Where config.json says a thing twice, or the tensors say otherwise: what transformers does, or an error.
//!
//! `scripts/check_configs.py` compares more of it with transformers itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lowrank::DType;
use lowrank::base::Source;
use lowrank::model::families::read_config;
use lowrank::model::{ModelConfig, Weights};
use lowrank::tuning::Method;
use lowrank_formats::checkpoint::{Checkpoint, StoredDType};
use lowrank_formats::hf_config::HfConfig;
use lowrank_formats::safetensors_writer::{TensorSpec, write_safetensors};
use serde_json::{Map, Value, json};

use super::common::{
    Place, adapter, all_linear, assert_says, difference, failure, golden, ids, logits, merge_f32,
    open, run,
};

fn config_of(folder: &Path) -> Map<String, Value> {
    let text = fs::read(folder.join("config.json")).expect("config.json");
    serde_json::from_slice(&text).expect("JSON")
}

fn change_config(folder: &Path, change: impl FnOnce(&mut Map<String, Value>)) {
    let mut config = config_of(folder);
    change(&mut config);
    fs::write(folder.join("config.json"), json!(config).to_string()).expect("config.json");
}

/// Rewrites the tensors of a model: names with f32 values and their shapes.
fn change_tensors(
    folder: &Path,
    change: impl FnOnce(&mut BTreeMap<String, (Vec<usize>, Vec<f32>)>),
) {
    let path = folder.join("model.safetensors");
    let mut tensors = BTreeMap::new();
    {
        let checkpoint = Checkpoint::open(&path).expect("the weights");
        for name in checkpoint.names() {
            let entry = checkpoint.get(name).expect("the tensor");
            let values = entry.to_f32().expect("floats");
            tensors.insert(name.to_owned(), (entry.shape, values));
        }
    }
    change(&mut tensors);
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, (shape, _))| TensorSpec {
            name: name.clone(),
            dtype: StoredDType::F32,
            shape: shape.clone(),
        })
        .collect();
    let values: Vec<&Vec<f32>> = tensors.values().map(|(_, values)| values).collect();
    write_safetensors(&path, &specs, &BTreeMap::new(), |index, out| {
        values[index]
            .iter()
            .try_for_each(|value| out.write_all(&value.to_le_bytes()))
    })
    .expect("the weights are written");
}

fn load(folder: &Path) -> Result<(), lowrank::Error> {
    Weights::load(folder, DType::F32).map(drop)
}

#[test]
fn a_head_of_its_own_is_used_whatever_the_config_says() {
    let place = Place::new("llama");
    let model = place.path("model");
    let ids = ids(20, 1);
    let expected = logits(&open(&model), None, &ids);
    change_config(&model, |config| {
        config.insert("tie_word_embeddings".into(), true.into());
    });
    let network = open(&model);
    assert!(!network.config().tie_word_embeddings);
    assert_eq!(logits(&network, None, &ids), expected);

    // What is written from it says so.
    let trained = adapter(&network, &all_linear(), 3);
    let merged = place.path("merged");
    let source = Source::Folder(model);
    merge_f32(&source, &trained, std::slice::from_ref(&ids), &merged).expect("the merge");
    assert_eq!(config_of(&merged)["tie_word_embeddings"], false);
    let off = difference(
        &logits(&open(&merged), None, &ids),
        &logits(&network, Some(&trained), &ids),
    );
    assert!(off < 1e-5, "{off:e}");
    let config = place.config(Method::Full, "full");
    run(&config).expect("the training");
    assert_eq!(config_of(&config.output)["tie_word_embeddings"], false);
    assert!(!open(&config.output).config().tie_word_embeddings);
}

#[test]
fn a_tied_pair_is_one_tensor_under_either_name() {
    for (family, embedding) in [
        ("llama3", "model.embed_tokens.weight"),
        ("gpt2", "transformer.wte.weight"),
    ] {
        let place = Place::new(family);
        let model = place.path("model");
        let ids = ids(20, 1);
        let expected = logits(&open(&model), None, &ids);
        change_tensors(&model, |tensors| {
            let same = tensors[embedding].clone();
            tensors.insert("lm_head.weight".into(), same);
        });
        assert!(open(&model).config().tie_word_embeddings, "{family}");
        assert_eq!(logits(&open(&model), None, &ids), expected, "{family}");
        change_tensors(&model, |tensors| {
            tensors.remove(embedding);
        });
        assert!(open(&model).config().tie_word_embeddings, "{family}");
        assert_eq!(logits(&open(&model), None, &ids), expected, "{family}");
        change_tensors(&model, |tensors| {
            tensors.remove("lm_head.weight");
        });
        let text = failure(load(&model));
        assert_says(&text, &[&format!("{embedding}: missing")]);
    }
}

#[test]
fn a_head_that_is_missing_names_the_key_that_asks_for_it() {
    let place = Place::new("llama");
    let model = place.path("model");
    change_tensors(&model, |tensors| {
        tensors.remove("lm_head.weight");
    });
    for absent in [false, true] {
        if absent {
            change_config(&model, |config| {
                config.remove("tie_word_embeddings");
            });
        }
        let text = failure(load(&model));
        assert_says(
            &text,
            &["lm_head.weight: missing", "tie_word_embeddings is false"],
        );
    }
}

#[test]
fn tensors_that_nothing_reads_name_the_keys_that_would() {
    let place = Place::new("llama");
    let model = place.path("model");
    change_tensors(&model, |tensors| {
        for (name, size) in [("self_attn.o_proj", 32), ("mlp.down_proj", 32)] {
            let bias = (vec![size], vec![0.5; size]);
            tensors.insert(format!("model.layers.0.{name}.bias"), bias);
        }
    });
    change_config(&model, |config| {
        config.insert("num_hidden_layers".into(), 1.into());
    });
    let text = failure(load(&model));
    assert_says(
        &text,
        &[
            "model.layers.0.mlp.down_proj.bias: no part of this architecture reads it",
            "num_hidden_layers is 1 in config.json, and the file holds 2 layers",
            "attention_bias and mlp_bias must be true",
        ],
    );
}

#[test]
fn values_that_are_not_finite_are_named() {
    let place = Place::new("llama");
    let model = place.path("model");
    let name = "model.layers.1.mlp.up_proj.weight";
    for value in [f32::NAN, f32::NEG_INFINITY] {
        change_tensors(&model, |tensors| {
            tensors.get_mut(name).expect("the tensor").1[33] = value;
        });
        for dtype in [DType::F32, DType::Bf16] {
            let text = failure(Weights::load(&model, dtype).map(drop));
            let value = if value.is_nan() { "NaN" } else { "-infinity" };
            assert_says(
                &text,
                &[
                    "model.safetensors",
                    &format!("`{name}`: the value at [1, 1] is {value}"),
                ],
            );
        }
    }
    let mut config = place.config(Method::Lora, "run");
    config.init_adapter = None;
    let text = failure(run(&config));
    assert_says(&text, &["up_proj"]);
    assert!(!config.output.exists());
    // It would only be infinite as bf16.
    change_tensors(&model, |tensors| {
        tensors.get_mut(name).expect("the tensor").1[33] = f32::MAX;
    });
    load(&model).expect("f32 holds it");
    let text = failure(Weights::load(&model, DType::Bf16).map(drop));
    assert_says(&text, &["3.4028235e38, which bf16 cannot hold"]);
}

/// What a golden model's config means with some keys changed; null takes one away, and "null" stands for null.
fn read(family: &str, changes: &Value) -> Result<ModelConfig, String> {
    let mut config = config_of(&golden(family));
    for (key, value) in changes.as_object().expect("an object") {
        match value {
            Value::Null => drop(config.remove(key)),
            Value::String(text) if text == "null" => drop(config.insert(key.clone(), Value::Null)),
            value => drop(config.insert(key.clone(), value.clone())),
        }
    }
    let raw = HfConfig::from_map(Path::new("config.json"), config);
    read_config(&raw).map_err(|error| error.to_string())
}

#[test]
fn the_text_half_of_a_model_that_reads_pictures_is_a_model() {
    let place = Place::new("gemma3");
    let model = place.path("model");
    let ids = ids(20, 1);
    let expected = logits(&open(&model), None, &ids);
    let text = config_of(&model);
    for whole in ["language_model.model.", "model.language_model."] {
        let half = json!(text);
        change_config(&model, |config| {
            *config = Map::from_iter([
                ("model_type".to_owned(), "gemma3".into()),
                ("text_config".to_owned(), half),
                ("vision_config".to_owned(), json!({"hidden_size": 8})),
                ("eos_token_id".to_owned(), json!([1, 2])),
            ]);
        });
        change_tensors(&model, |tensors| {
            let named = std::mem::take(tensors).into_iter();
            let short = |name: &str| {
                name.split_once("layers.")
                    .map(|(_, rest)| format!("layers.{rest}"))
            };
            *tensors = named
                .filter(|(name, _)| !name.contains("vision_tower") && !name.contains("lm_head"))
                .map(|(name, tensor)| {
                    let last = name
                        .rsplit_once("model.")
                        .map_or("", |(_, rest)| rest)
                        .to_owned();
                    (format!("{whole}{}", short(&name).unwrap_or(last)), tensor)
                })
                .collect();
            // The head is the embedding, but may be stored all the same.
            let embedding = tensors[&format!("{whole}embed_tokens.weight")].clone();
            let head = whole
                .strip_suffix(".model.")
                .map_or("", |_| "language_model.");
            tensors.insert(format!("{head}lm_head.weight"), embedding);
            let tower = if whole.starts_with("model.") {
                "model.vision_tower"
            } else {
                "vision_tower"
            };
            tensors.insert(format!("{tower}.patches.weight"), (vec![2], vec![1.0, 2.0]));
        });
        let network = open(&model);
        assert_eq!(logits(&network, None, &ids), expected, "{whole}");

        // What is written from it is the half by itself.
        let trained = adapter(&network, &all_linear(), 3);
        let merged = place.path(whole);
        let source = Source::Folder(model.clone());
        let passages = std::slice::from_ref(&ids);
        merge_f32(&source, &trained, passages, &merged).expect("the merge");
        let written = config_of(&merged);
        assert_eq!(written["model_type"], "gemma3_text");
        assert_eq!(written["eos_token_id"], text["eos_token_id"]);
        assert!(!written.contains_key("vision_config"));
        let off = difference(
            &logits(&open(&merged), None, &ids),
            &logits(&network, Some(&trained), &ids),
        );
        assert!(off < 1e-4, "{off:e}");
    }
    change_config(&model, |config| drop(config.remove("text_config")));
    assert_says(&failure(load(&model)), &["text_config", "an object"]);
}

/// The rotary parameters of the golden model of that name, with another original length.
fn llama3_with(original: usize) -> Value {
    let mut parameters = config_of(&golden("llama3"))["rope_parameters"].clone();
    parameters["original_max_position_embeddings"] = original.into();
    parameters
}

/// The rotary parameters of the golden Phi-3 with one other value.
fn phi3_with(key: &str, value: Value) -> Value {
    let mut parameters = config_of(&golden("phi3"))["rope_parameters"].clone();
    parameters[key] = value;
    json!({ "rope_parameters": parameters })
}

#[test]
fn longrope_has_the_positions_of_pretraining() {
    let config = read("phi3", &json!({})).expect("it is supported");
    assert_eq!(config.max_position_embeddings, 64);
    let plain = json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}});
    let config = read("phi3", &plain).expect("it is supported");
    assert_eq!(config.max_position_embeddings, 256);
}

#[test]
fn keys_that_mean_the_same_are_read_in_transformers_order() {
    let linear = json!({"type": "linear", "factor": 2.0});
    for (family, one, other) in [
        // The older object wins as a whole, an empty one or null does not.
        (
            "llama",
            json!({"rope_scaling": linear, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
            json!({"rope_scaling": linear, "rope_parameters": null}),
        ),
        (
            "llama",
            json!({"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
            json!({"rope_scaling": "null", "rope_parameters": linear}),
        ),
        // A base in the object wins over one beside it.
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rope_theta": 700.0}),
            json!({"rope_parameters": null, "rope_theta": 300.0}),
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}),
            json!({"rope_parameters": linear}),
        ),
        // GPT-2's values by their common names.
        (
            "gpt2",
            json!({"n_embd": 99, "hidden_size": 32, "n_layer": null, "num_hidden_layers": 2}),
            json!({}),
        ),
        ("mistral", json!({"use_sliding_window": false}), json!({})),
        (
            "mistral",
            json!({"layer_types": ["full_attention", "full_attention"]}),
            json!({"sliding_window": "null"}),
        ),
        (
            "mistral",
            json!({"layer_types": ["sliding_attention", "sliding_attention"]}),
            json!({}),
        ),
        (
            "llama3",
            json!({"original_max_position_embeddings": 7}),
            json!({"rope_parameters": llama3_with(7)}),
        ),
        ("gpt2", json!({"head_dim": 3}), json!({})),
        (
            "mistral",
            json!({"num_key_value_heads": "null"}),
            json!({"num_key_value_heads": 4}),
        ),
        (
            "qwen2",
            json!({"layer_types": null, "use_sliding_window": true, "sliding_window": 4, "max_window_layers": 2}),
            json!({}),
        ),
        (
            "qwen2",
            json!({"use_sliding_window": true, "sliding_window": 4, "max_window_layers": 0}),
            json!({}),
        ),
        (
            "llama",
            json!({"dtype": "float16", "torch_dtype": "bfloat16", "quantization_config": "null"}),
            json!({}),
        ),
        (
            "llama",
            json!({"architectures": ["MistralForCausalLM"], "hidden_activation": "gelu"}),
            json!({}),
        ),
    ] {
        assert_same(family, &one, &other);
    }
}

fn assert_same(family: &str, one: &Value, other: &Value) {
    let (one_read, other_read) = (read(family, one), read(family, other));
    assert_eq!(one_read, other_read, "{one} {other}");
    one_read.expect("it is supported");
}

#[test]
fn absent_and_older_keys_of_families_stand_for_their_values() {
    for (family, one, other) in [
        // Gemma 3 as transformers 4 wrote it.
        (
            "gemma3",
            json!({
                "rope_parameters": null, "rope_theta": 10000.0, "rope_local_base_freq": 100.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "layer_types": null, "sliding_window_pattern": 2,
            }),
            json!({"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        ),
        (
            "gemma2",
            json!({"attn_logit_softcapping": null, "final_logit_softcapping": null, "layer_types": null}),
            json!({"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
        ),
        (
            "smollm3",
            json!({"no_rope_layers": [1, 0, 1, 0]}),
            json!({"no_rope_layers": null, "layer_types": null, "no_rope_layer_interval": 2}),
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
            json!({"rope_parameters": {"rope_type": "default"}}),
        ),
        // Phi-3's older names of one scaling.
        ("phi3", phi3_with("rope_type", json!("su")), json!({})),
        ("phi3", phi3_with("rope_type", json!("yarn")), json!({})),
        (
            "glm4",
            json!({"rope_parameters": {"rope_theta": 100.0}}),
            json!({}),
        ),
        (
            "ministral3",
            json!({"rope_parameters": null}),
            json!({"rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
            }}),
        ),
    ] {
        assert_same(family, &one, &other);
    }
}

#[test]
fn configs_that_cannot_be_followed_name_their_keys() {
    for (family, changes, words) in [
        (
            "llama",
            json!({"quantization_config": {"quant_method": "hqq"}}),
            &["quantization_config", "hqq", "remove the key"][..],
        ),
        (
            "llama",
            json!({"quantization": {"bits": 4}}),
            &["`quantization`", "MLX"],
        ),
        (
            "llama",
            json!({"partial_rotary_factor": 0.5}),
            &["partial_rotary_factor"],
        ),
        (
            "llama",
            json!({"text_config": {"hidden_size": 3}}),
            &["text_config"],
        ),
        (
            "llama",
            json!({"model_type": null, "_class_name": "UNet2DConditionModel"}),
            &["UNet2DConditionModel", "Diffusers"],
        ),
        (
            "qwen3",
            json!({"rope_parameters": {"full_attention": {"rope_theta": 3.0}}}),
            &["rope_parameters.full_attention"],
        ),
        (
            "qwen3",
            json!({"layer_types": ["full_attention"]}),
            &["layer_types", "num_hidden_layers, which is 2"],
        ),
        (
            "qwen2",
            json!({"layer_types": null, "use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1}),
            &["use_sliding_window", "max_window_layers of 2"],
        ),
        (
            "qwen2",
            json!({"num_key_value_heads": null}),
            &["num_key_value_heads"],
        ),
        (
            "mistral",
            json!({"sliding_window": 0}),
            &["sliding_window", "at least 1"],
        ),
        (
            "mistral",
            json!({"layer_types": ["sliding_attention", "full_attention"]}),
            &["layer_types", "the same kind on every layer"],
        ),
        (
            "mistral",
            json!({"attention_bias": true}),
            &["attention_bias", "Mistral has no biases"],
        ),
    ] {
        assert_says(&read(family, &changes).expect_err("it is refused"), words);
    }
}

#[test]
fn values_that_a_family_has_not_are_named() {
    for (family, changes, words) in [
        (
            "gemma2",
            json!({"attn_logit_softcapping": 0.0}),
            &["attn_logit_softcapping", "null for none"][..],
        ),
        (
            "smollm3",
            json!({"no_rope_layers": [1, 0]}),
            &["no_rope_layers", "num_hidden_layers, which is 4"],
        ),
        (
            "smollm3",
            json!({"no_rope_layers": null, "no_rope_layer_interval": 0}),
            &["no_rope_layer_interval", "at least 1"],
        ),
        (
            "smollm3",
            json!({"use_sliding_window": false}),
            &["use_sliding_window", "layer_types names layers that slide"],
        ),
        (
            "granite",
            json!({"logits_scaling": 0}),
            &["logits_scaling", "above 0"],
        ),
        (
            "olmo3",
            json!({"layer_types": ["linear_attention", "full_attention", "full_attention"]}),
            &["layer_types", "linear_attention"],
        ),
        (
            "phi3",
            phi3_with("short_factor", json!([1.0, 2.0])),
            &[
                "rope_parameters.short_factor",
                "a list of 6 numbers above 0",
            ],
        ),
        (
            "phi3",
            phi3_with("long_factor", json!([1, 1, 1, 1, 1, 0])),
            &["rope_parameters.long_factor", "above 0"],
        ),
        (
            "phi3",
            phi3_with("partial_rotary_factor", json!(1.5)),
            &["partial_rotary_factor", "a head of 16"],
        ),
        (
            "glm4",
            json!({"rope_parameters": {"partial_rotary_factor": 0.25}}),
            &["partial_rotary_factor", "even"],
        ),
        (
            "llama",
            json!({"rope_parameters": null, "rope_scaling": null, "rope_theta": 0.0}),
            &["rope_theta", "greater than 0"],
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}}),
            &["rope_parameters.rope_theta", "greater than 1"],
        ),
        (
            "ministral3",
            json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
            &["rope_parameters.llama_4_scaling_beta"],
        ),
        (
            "gemma3",
            json!({"use_bidirectional_attention": true}),
            &["use_bidirectional_attention", "false"],
        ),
        (
            "gemma3",
            json!({"attn_logit_softcapping": 50.0}),
            &["attn_logit_softcapping", "null"],
        ),
        (
            "gemma3",
            json!({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}),
            &["layer_types", "chunked_attention", "sliding_attention"],
        ),
        (
            "gemma3",
            json!({"query_pre_attn_scalar": 0}),
            &["query_pre_attn_scalar", "above 0"],
        ),
        (
            "gemma3",
            json!({"layer_types": null, "sliding_window_pattern": 0}),
            &["sliding_window_pattern", "at least 1"],
        ),
    ] {
        assert_says(&read(family, &changes).expect_err("it is refused"), words);
    }
}

//! Adapters: which modules they reach, what their folders must hold, and that many share one base.

use std::fs;
use std::path::Path;

use lowrank::Workspace;
use lowrank::model::{Adapter, AdapterSet, Batch};
use lowrank::tuning::lora::{self, InitLoraWeights};
use lowrank_formats::peft::{LoraConfig, ModuleNames, TargetModules};
use serde_json::{Value, json};

use super::common::{
    FAMILIES, adapter, all_linear, assert_says, decoder, difference, failure, ids, logits,
    lora_config, tensors,
};

#[test]
fn adapters_are_swapped_on_one_base() {
    for family in FAMILIES {
        let shared = decoder(family);
        let (one, two) = (
            adapter(&shared, &all_linear(), 1),
            adapter(&shared, &all_linear(), 2),
        );
        let ids = ids(19, 4);
        let plain = logits(&shared, None, &ids);
        let first = logits(&shared, Some(&one), &ids);
        let second = logits(&shared, Some(&two), &ids);
        assert!(difference(&first, &second) > 1e-3 && difference(&first, &plain) > 1e-3);
        // Nothing stays behind, and a base of its own says the same.
        assert_eq!(logits(&shared, Some(&one), &ids), first, "{family}");
        assert_eq!(logits(&shared, None, &ids), plain, "{family}");
        assert_eq!(
            logits(&decoder(family), Some(&two), &ids),
            second,
            "{family}"
        );
    }
}

#[test]
fn one_batch_uses_many_adapters() {
    for family in FAMILIES {
        let model = decoder(family);
        let wide = adapter(&model, &all_linear(), 1);
        let mut narrow = all_linear();
        narrow.r = 2;
        let narrow = adapter(&model, &narrow, 2);
        let set = [&wide, &narrow];
        // Two rows of one adapter, rows with none between them.
        let rows = [
            (11, Some(0)),
            (7, None),
            (23, Some(1)),
            (2, None),
            (16, Some(0)),
        ];
        let mut batch = Batch::default();
        let mut expected = Vec::new();
        for (n, &(length, used)) in rows.iter().enumerate() {
            let ids = ids(length, n as u32);
            let start = batch.tokens();
            batch.push(&ids, &[]);
            if let Some(index) = used {
                batch.adapters.push((start..start + length, index));
            }
            expected.extend(logits(&model, used.map(|index| set[index]), &ids));
        }
        let all: Vec<u32> = (0..batch.tokens() as u32).collect();
        let together = model.logits(&batch, AdapterSet::new(&set), &all, None, &Workspace::new());
        let off = difference(&together.to_vec(), &expected);
        assert!(off < 1e-5, "{family}: {off:e}");
    }
}

fn refused(family: &str, config: &LoraConfig) -> String {
    let model = decoder(family);
    failure(lora::inject(
        model.config(),
        config,
        InitLoraWeights::Gaussian,
        0,
    ))
}

#[test]
fn what_matches_nothing_is_refused() {
    let text = refused("llama", &lora_config(&["q_proj", "query", "c_attn"]));
    assert_says(
        &text,
        &[
            "`query` matches no module",
            "`c_attn` matches no module",
            "linears are self_attn.q_proj",
        ],
    );
    assert!(!text.contains("`q_proj`"), "{text}");
    let regex = LoraConfig {
        target_modules: TargetModules::Regex(r".*\.7\..*".into()),
        ..lora_config(&[])
    };
    assert_says(
        &refused("llama", &regex),
        &[r"/.*\.7\..*/ matches no module"],
    );

    let patterns = LoraConfig {
        rank_pattern: vec![("v_proj".into(), 2), ("k_proj".into(), 2)],
        alpha_pattern: vec![("layers.9.q_proj".into(), 2.0)],
        exclude_modules: Some(ModuleNames::List(vec!["o_proj".into(), "dense".into()])),
        ..lora_config(&["q_proj", "v_proj"])
    };
    let text = refused("llama", &patterns);
    assert_says(
        &text,
        &[
            "rank_pattern: `k_proj` matches no adapted module",
            "alpha_pattern: `layers.9.q_proj` matches no adapted module",
            "exclude_modules: `dense` matches no module",
        ],
    );
    assert!(
        !text.contains("`v_proj`") && !text.contains("`o_proj`"),
        "{text}"
    );

    let large = LoraConfig {
        r: 33,
        ..lora_config(&["q_proj"])
    };
    assert_says(
        &refused("llama", &large),
        &["layers.0.self_attn.q_proj: r 33 is larger", "[32, 32]"],
    );
    let both = lora_config(&["c_attn", "c_attn.q"]);
    assert_says(
        &refused("gpt2", &both),
        &[
            "h.0.attn.c_attn is targeted whole and in the part",
            "choose one",
        ],
    );
    let impossible = LoraConfig {
        r: 0,
        lora_dropout: 1.5,
        ..lora_config(&["q_proj"])
    };
    assert_says(
        &refused("llama", &impossible),
        &["`r` is 0", "`lora_dropout` is 1.5"],
    );
}

fn saved(family: &str, config: &LoraConfig, folder: &Path) -> Adapter {
    let model = decoder(family);
    let made = adapter(&model, config, 5);
    lora::save(
        folder,
        model.config(),
        config,
        &made,
        lowrank::tuning::BaseMark {
            fingerprint: "print",
            ..lowrank::tuning::BaseMark::default()
        },
    )
    .expect("saved");
    made
}

fn edit(folder: &Path, key: &str, value: Value) {
    let path = folder.join("adapter_config.json");
    let text = fs::read(&path).expect("the config");
    let mut config: serde_json::Map<String, Value> = serde_json::from_slice(&text).expect("JSON");
    config.insert(key.to_owned(), value);
    fs::write(&path, json!(config).to_string()).expect("the config");
}

#[test]
fn every_tensor_of_an_adapter_is_accounted_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let model = decoder("llama");
    let load = || lora::load(folder, model.config());
    let made = saved("llama", &lora_config(&["q_proj", "v_proj"]), folder);
    let loaded = load().expect("it is whole");
    assert_eq!(loaded.adapter.names, made.names);
    assert_eq!(loaded.adapter.low_rank, made.low_rank);
    assert_eq!(loaded.base_fingerprint.as_deref(), Some("print"));
    assert_eq!(
        loaded.coverage.targets,
        [("q_proj".into(), 2), ("v_proj".into(), 2)]
    );
    for slot in 0..made.names.len() {
        assert_eq!(
            loaded.adapter.params.view(slot).to_vec(),
            made.params.view(slot).to_vec()
        );
    }

    edit(folder, "target_modules", json!(["q_proj"]));
    let text = failure(load());
    assert_says(
        &text,
        &[
            "layers.1.self_attn.v_proj.lora_B.weight: no adapted module",
            "layers.0.self_attn.v_proj",
        ],
    );
    edit(
        folder,
        "target_modules",
        json!(["q_proj", "v_proj", "up_proj"]),
    );
    assert_says(
        &failure(load()),
        &["mlp.up_proj.lora_A.weight: missing (expected [4, 32])"],
    );
    edit(folder, "target_modules", json!(["q_proj", "v_proj"]));
    edit(folder, "r", json!(3));
    assert_says(
        &failure(load()),
        &["q_proj.lora_A.weight: shape [4, 32], the model needs [3, 32]"],
    );
    edit(folder, "r", json!(4));
    edit(folder, "lora_bias", json!(true));
    edit(folder, "modules_to_save", json!(["lm_head"]));
    assert_says(
        &failure(load()),
        &["adapter_config.json", "`lora_bias` is true"],
    );
    edit(folder, "lora_bias", json!(false));
    assert_says(
        &failure(load()),
        &["base_model.model.lm_head.weight: missing"],
    );
    edit(folder, "modules_to_save", json!(["nothing"]));
    assert_says(
        &failure(load()),
        &[
            "adapter_config.json",
            "modules_to_save: `nothing` matches no module",
        ],
    );
    edit(folder, "modules_to_save", Value::Null);
    load().expect("it is whole again");

    let weights = folder.join("adapter_model.safetensors");
    let bytes = fs::read(&weights).expect("the weights");
    fs::write(&weights, &bytes[..bytes.len() - 8]).expect("cut off");
    assert_says(&failure(load()), &["adapter_model.safetensors"]);
    fs::remove_file(&weights).expect("gone");
    assert_says(&failure(load()), &["adapter_model.safetensors"]);
}

/// Saves and loads an adapter of GPT-2 and compares it with what it was.
fn comes_back(config: &LoraConfig, exact: bool) {
    let folder = tempfile::tempdir().expect("a folder");
    let model = decoder("gpt2");
    let made = saved("gpt2", config, folder.path());
    let loaded = lora::load(folder.path(), model.config()).expect("it loads");
    assert_eq!(loaded.adapter.names, made.names);
    assert_eq!(loaded.coverage.modules * 2, made.names.len());
    assert!(
        loaded.coverage.targets.iter().all(|(_, n)| *n > 0),
        "{}",
        loaded.coverage
    );
    let ids = ids(21, 6);
    let expected = logits(&model, Some(&made), &ids);
    if exact {
        assert_eq!(loaded.adapter.low_rank, made.low_rank);
        for slot in 0..made.names.len() {
            assert_eq!(
                loaded.adapter.params.view(slot).to_vec(),
                made.params.view(slot).to_vec()
            );
        }
    }
    assert!(difference(&logits(&model, Some(&loaded.adapter), &ids), &expected) < 1e-6);

    // As PEFT has it: one LoRA a module, without our metadata.
    let path = folder.path().join("adapter_model.safetensors");
    let mut bytes = fs::read(&path).expect("the weights");
    if let Some(at) = find(&bytes, b"lowrank.fused_parts") {
        bytes[at] = b'x';
    }
    fs::write(&path, bytes).expect("the weights");
    let whole = lora::load(folder.path(), model.config()).expect("it loads");
    assert_eq!(whole.adapter.names.len(), tensors(&path).len());
    assert!(
        whole
            .adapter
            .names
            .iter()
            .all(|name| !name.contains("c_attn.q") && !name.contains("c_attn.v"))
    );
    assert!(difference(&logits(&model, Some(&whole.adapter), &ids), &expected) < 1e-5);
}

fn find(bytes: &[u8], word: &[u8]) -> Option<usize> {
    bytes.windows(word.len()).position(|window| window == word)
}

#[test]
fn parts_of_a_fused_linear_come_back() {
    for use_rslora in [false, true] {
        for targets in [
            &["c_attn.q", "c_attn.v"][..],
            &["c_attn.v"],
            &["c_attn.q", "c_proj"],
            &["c_attn.k", "mlp.c_fc"],
        ] {
            let config = LoraConfig {
                use_rslora,
                ..lora_config(targets)
            };
            comes_back(&config, true);
            // Parts of different ranks, with one scale.
            if targets.len() == 2 && !use_rslora {
                let ranks = LoraConfig {
                    rank_pattern: vec![(targets[1].replace('.', r"\."), 2)],
                    alpha_pattern: vec![(targets[1].replace('.', r"\."), 3.0)],
                    ..config
                };
                comes_back(&ranks, true);
            }
        }
    }
    // Parts of different scales: the values carry the ratio.
    let scales = LoraConfig {
        alpha_pattern: vec![(r"c_attn\.v".into(), 1.0)],
        ..lora_config(&["c_attn.q", "c_attn.v"])
    };
    comes_back(&scales, false);
    // One layer alone: the saved names must not reach the other.
    let one_layer = LoraConfig {
        target_modules: TargetModules::Regex(r".*h\.0\.attn\.c_attn\.q|.*h\.1\.mlp\.c_fc".into()),
        ..lora_config(&[])
    };
    comes_back(&one_layer, true);
    let layers = LoraConfig {
        layers_to_transform: Some(vec![1]),
        ..lora_config(&["c_attn.q", "c_attn.v"])
    };
    comes_back(&layers, true);
}

#[test]
fn metadata_that_does_not_fit_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = decoder("gpt2");
    saved(
        "gpt2",
        &lora_config(&["c_attn.q", "c_attn.v"]),
        folder.path(),
    );
    let path = folder.path().join("adapter_model.safetensors");
    let bytes = fs::read(&path).expect("the weights");
    let replace = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let mut changed = bytes.clone();
        let at = find(&bytes, from.as_bytes()).expect("the metadata");
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(&path, changed).expect("the weights");
        failure(lora::load(folder.path(), model.config()))
    };
    // Ranks that leave some of the module out; a part that there is not; values where no part is; no JSON.
    let mends = [
        "adapter_model.safetensors",
        "lowrank.fused_parts",
        "remove the metadata to use the adapter whole",
    ];
    for (from, to) in [
        (r#"[\"q\",4]"#, r#"[\"q\",3]"#),
        (r#"[\"q\",4]"#, r#"[\"q\",5]"#),
        (r#"[\"q\",4]"#, r#"[\"q\",0]"#),
        (r#"[\"q\",4]"#, r#"[\"x\",4]"#),
        (r#"[\"v\",4]"#, r#"[\"k\",4]"#),
        (r#"[\"v\",4]"#, r#"[\"v\";4]"#),
    ] {
        assert_says(&replace(from, to), &mends);
    }
    let text = replace(
        r#"\"transformer.h.1.attn.c_attn\":"#,
        r#"\"transformer.h.7.attn.c_attn\":"#,
    );
    assert_says(&text, &["h.7.attn.c_attn, which is not adapted"]);

    saved("gpt2", &lora_config(&["c_attn"]), folder.path());
    edit(folder.path(), "target_modules", json!(["c_attn.q"]));
    let text = failure(lora::load(folder.path(), model.config()));
    assert_says(&text, &["c_attn.q", "parts of a fused linear"]);
}

#[test]
fn the_norm_of_a_change_needs_no_change() {
    let model = decoder("llama");
    let adapter = adapter(&model, &all_linear(), 3);
    let changes = adapter.squared_changes();
    assert_eq!(changes.len(), adapter.low_rank.len());
    for (linear, square) in changes {
        let site = &adapter.low_rank[&linear][0];
        let (a, b) = (adapter.params.view(site.a), adapter.params.view(site.b));
        let (r, inputs) = (a.rows(), a.cols());
        let (a, b) = (a.to_vec(), b.to_vec());
        let mut sum = 0.0;
        for row in b.chunks_exact(r) {
            for column in 0..inputs {
                let terms = row.iter().enumerate();
                let value: f32 = terms.map(|(i, x)| x * a[i * inputs + column]).sum();
                sum += f64::from(site.scale * value).powi(2);
            }
        }
        assert!((square - sum).abs() < 1e-4 * sum, "{square} {sum}");
    }
}

//! A merged model is the adapter on its base, in a folder of its own.

use std::fs;

use lowrank::base::Source;
use lowrank::merge::{F32_LIMIT, MergeOptions, MergeReport, merge};
use lowrank::model::{Adapter, Purpose};
use lowrank::tuning::lora;
use lowrank::{DType, Error};
use lowrank_kernels::scale;
use serde_json::Value;

use super::common::{
    Place, adapter, all_linear, assert_says, decoder, difference, failure, golden, ids, logits,
    lora_config, merge_f32, open, tensors,
};

fn passages() -> Vec<Vec<u32>> {
    // The last is longer than GPT-2's context here.
    vec![ids(20, 1), ids(33, 2), ids(45, 3)]
}

struct Merging {
    dtype: DType,
    overwrite: bool,
    force: bool,
}

const PLAIN: Merging = Merging {
    dtype: DType::F32,
    overwrite: false,
    force: false,
};

fn merge_into(
    place: &Place,
    adapter: &Adapter,
    name: &str,
    how: &Merging,
) -> Result<MergeReport, Error> {
    let source = Source::Folder(place.path("model"));
    merge(&MergeOptions {
        source: &source,
        purpose: Purpose::LanguageModel,
        labels: None,
        adapter,
        passages: &passages(),
        output: &place.path(name),
        dtype: how.dtype,
        overwrite: how.overwrite,
        force: how.force,
    })
}

#[test]
fn the_merged_model_has_the_adapters_logits() {
    for (family, targets) in [
        ("llama", None),
        ("llama3", None),
        ("qwen2", None),
        ("qwen3", None),
        ("gpt2", None),
        (
            "gpt2",
            Some(lora_config(&["c_attn.q", "c_attn.v", "mlp.c_proj"])),
        ),
    ] {
        let place = Place::new(family);
        let templates = place.path("model").join("additional_chat_templates");
        fs::create_dir(&templates).expect("a folder");
        fs::write(templates.join("tool_use.jinja"), "tools").expect("a template");
        let base = open(&place.path("model"));
        let trained = adapter(&base, &targets.unwrap_or_else(all_linear), 3);
        let report = merge_into(&place, &trained, "merged", &PLAIN).expect("the merge");
        assert_eq!(report.modules, trained.low_rank.len());
        assert_eq!(report.rounding_difference, None);
        assert!(
            report.is_faithful() && report.max_logit_difference > 0.0 && report.limit == F32_LIMIT
        );
        assert!(report.max_logit_difference < 1e-4, "{family}: {report:?}");

        let merged = open(&place.path("merged"));
        let ids = ids(24, 9);
        let (expected, plain) = (
            logits(&base, Some(&trained), &ids),
            logits(&base, None, &ids),
        );
        let off = difference(&logits(&merged, None, &ids), &expected);
        assert!(off < 1e-5, "{family}: {off:e}");
        assert!(
            difference(&plain, &expected) > 1e-3,
            "{family}: the adapter does something"
        );

        // The same tensors under the same names: a tied head stays tied, and no embedding moved.
        let (before, after) = (
            tensors(&place.path("model").join("model.safetensors")),
            tensors(&place.path("merged").join("model.safetensors")),
        );
        let names = |all: &[(String, Vec<f32>)]| {
            all.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(&before), names(&after), "{family}");
        for ((name, a), (_, b)) in before.iter().zip(&after) {
            if ["embed", "lm_head", "wte", "wpe", "norm", "ln_", "bias"]
                .iter()
                .any(|part| name.contains(part))
            {
                assert_eq!(a, b, "{family}: {name} is not adapted");
            }
        }
        for name in [
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
        ] {
            let read = |folder: &str| fs::read(place.path(folder).join(name)).expect("the file");
            assert_eq!(read("model"), read("merged"), "{name}");
        }
        let config = |folder: &str| -> Value {
            let text = fs::read(place.path(folder).join("config.json")).expect("config.json");
            serde_json::from_slice(&text).expect("JSON")
        };
        assert_eq!(config("model"), config("merged"), "{family}");
    }
}

#[test]
fn a_16_bit_merge_reports_its_rounding() {
    let place = Place::new("qwen2");
    let base = open(&place.path("model"));
    let trained = adapter(&base, &all_linear(), 3);
    let how = Merging {
        dtype: DType::Bf16,
        ..PLAIN
    };
    let report = merge_into(&place, &trained, "merged", &how).expect("the merge");
    let rounding = report.rounding_difference.expect("a figure");
    assert!(
        rounding > 0.0 && report.max_logit_difference > 1e-4,
        "{report:?}"
    );
    assert_eq!(report.limit, rounding * lowrank::merge::ROUNDING_FACTOR);
    let config = fs::read_to_string(place.path("merged").join("config.json")).expect("config.json");
    assert_says(&config, &[r#""dtype": "bfloat16""#]);
}

#[test]
fn a_merge_that_drifts_leaves_nothing() {
    let place = Place::new("llama");
    let base = open(&place.path("model"));
    let before = place.list(".");
    for value in [f32::NAN, f32::INFINITY] {
        let mut broken = adapter(&base, &lora_config(&["v_proj"]), 3);
        broken.params.view_mut(1).fill(value);
        let text = failure(merge_into(&place, &broken, "merged", &PLAIN));
        assert_says(
            &text,
            &[
                "v_proj.weight",
                "would not be finite",
                "nothing was written",
            ],
        );
        assert_eq!(place.list("."), before);
    }
    // Attention this sharp turns the rounding of 16 bit into other answers.
    let mut sharp = adapter(&base, &lora_config(&["q_proj"]), 3);
    for slot in 0..sharp.names.len() {
        scale(sharp.params.view_mut(slot), 30.0);
    }
    let how = Merging {
        dtype: DType::Bf16,
        ..PLAIN
    };
    let text = failure(merge_into(&place, &sharp, "merged", &how));
    assert_says(&text, &["over the limit of", "dtype: f32"]);
    assert_eq!(place.list("."), before);
    let how = Merging { force: true, ..how };
    let report = merge_into(&place, &sharp, "merged", &how).expect("it is forced");
    assert!(!report.is_faithful());
    open(&place.path("merged"));
    // What is advised works.
    let report = merge_into(&place, &sharp, "wide", &PLAIN).expect("the merge");
    assert!(report.is_faithful());
}

#[test]
fn a_merge_replaces_only_a_model_and_only_when_told() {
    let place = Place::new("llama");
    let base = open(&place.path("model"));
    let trained = adapter(&base, &all_linear(), 3);
    merge_into(&place, &trained, "merged", &PLAIN).expect("the merge");
    assert_says(
        &failure(merge_into(&place, &trained, "merged", &PLAIN)),
        &["merged", "already exists"],
    );
    let overwrite = Merging {
        overwrite: true,
        ..PLAIN
    };
    let other = adapter(&base, &all_linear(), 4);
    let before = tensors(&place.path("merged").join("model.safetensors"));
    merge_into(&place, &other, "merged", &overwrite).expect("it is replaced");
    assert_ne!(
        before,
        tensors(&place.path("merged").join("model.safetensors"))
    );

    fs::write(place.path("merged").join("LICENSE"), "mine").expect("a file");
    let text = failure(merge_into(&place, &trained, "merged", &overwrite));
    assert_says(&text, &["LICENSE", "did not write"]);
    let text = failure(merge_into(&place, &trained, "model", &overwrite));
    assert_says(&text, &["is to be replaced", "is read from it"]);
    let source = Source::Folder(place.path("model"));
    let text = failure(merge_f32(&source, &trained, &[], &place.path("other")));
    assert_says(&text, &["no text to prove the merge on"]);
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let adapter = golden("llama").join("all_linear");
    let text = failure(lora::load(&adapter, decoder("qwen3").config()));
    assert_says(
        &text,
        &[
            "adapter_model.safetensors",
            "q_proj.lora_B.weight: shape [",
            "the model needs [",
            "for another model?",
        ],
    );
    let text = failure(lora::load(
        &golden("mistral").join("q_v"),
        decoder("gpt2").config(),
    ));
    assert_says(
        &text,
        &[
            "for another model",
            "`q_proj` matches no module",
            "attn.c_attn",
        ],
    );
}

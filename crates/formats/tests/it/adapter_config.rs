//! `adapter_config.json`: PEFT's own answers, and random parts. `scripts/goldens_peft.py` makes the golden.

use std::fs;

use lowrank_formats::peft::LoraConfig;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use crate::golden;

#[test]
fn peft_adapts_the_same_modules_with_the_same_scale() {
    let text = fs::read_to_string(golden("peft_matching.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert!(cases.len() >= 30);
    for case in &cases {
        let config = LoraConfig::from_json(case["config"].as_object().unwrap()).unwrap();
        for (module, expected) in case["modules"].as_object().unwrap() {
            let name = format!("{} on {module}", case["config"]);
            assert_eq!(json!(config.matches(module)), expected[0], "{name}");
            assert_eq!(json!(config.rank_of(module)), expected[1], "{name}");
            assert_eq!(
                Some(config.alpha_of(module)),
                expected[2].as_f64(),
                "{name}"
            );
            let scale = expected[3].as_f64().unwrap();
            assert!(
                (config.scale_of(module) - scale).abs() <= 1e-12 * scale,
                "{name}"
            );
        }
    }
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0u64..20).prop_map(Value::from),
        "[a-z.*()|\\[\\]?+{}0-9^$\\\\]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::vec(("[a-z.*(]{0,6}", inner), 0..3)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

fn key() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "use_rslora",
        "use_dora",
        "bias",
        "init_lora_weights",
        "auto_mapping",
        "something_new",
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn what_is_accepted_can_be_written_and_read_again(entries in prop::collection::vec((key(), value()), 0..6)) {
        let mut map = Map::new();
        map.insert("peft_type".into(), json!("LORA"));
        map.insert("target_modules".into(), json!(["q_proj"]));
        map.extend(entries.into_iter().map(|(key, value)| (key.to_string(), value)));
        if let Ok(config) = LoraConfig::from_json(&map) {
            let module = "model.layers.3.self_attn.q_proj";
            let _ = config.matches(module);
            prop_assert!(config.rank_of(module) > 0);
            prop_assert!(config.scale_of(module).is_finite());
            let again = LoraConfig::from_json(&config.to_json()).unwrap();
            let config = LoraConfig { peft_version: again.peft_version.clone(), ..config };
            prop_assert_eq!(again, config);
        }
    }
}

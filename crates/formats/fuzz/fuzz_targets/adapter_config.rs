//! Any bytes as adapter_config.json: an error or a configuration that is written and read back unchanged.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lowrank_formats::peft::LoraConfig;

fuzz_target!(|data: &[u8]| {
    let Ok(map) = serde_json::from_slice(data) else {
        return;
    };
    if let Ok(config) = LoraConfig::from_json(&map) {
        let _ = config.matches("model.layers.0.self_attn.q_proj");
        assert!(
            config
                .scale_of("model.layers.0.self_attn.q_proj")
                .is_finite()
        );
        let again = LoraConfig::from_json(&config.to_json()).expect("what was read can be written");
        // The version is filled in where the file named none.
        assert_eq!(
            LoraConfig {
                peft_version: None,
                ..again
            },
            LoraConfig {
                peft_version: None,
                ..config
            }
        );
    }
});

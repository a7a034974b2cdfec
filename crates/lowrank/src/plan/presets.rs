//! Shapes of well-known models, as their config.json says them.

use std::path::Path;

use lowrank_formats::hf_config::HfConfig;
use lowrank_kernels::Layout;
use serde_json::{Map, Value, json};

use crate::Error;
use crate::model::{Family, ModelConfig, Purpose, families};

/// Every preset.
pub const NAMES: &[&str] = &[
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "gpt3-175b",
    "llama-2-7b",
    "llama-3-8b",
    "mistral-7b",
    "qwen2.5-0.5b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "smollm2-135m",
    "smollm2-360m",
    "smollm2-1.7b",
    "smollm3-3b",
    "gemma-2-2b",
    "gemma-3-270m",
    "gemma-3-1b",
    "gemma-3-4b",
    "granite-3.3-2b",
    "olmo-2-1b",
    "phi-4-mini",
    "bert-base",
    "bert-large",
    "minilm-l6",
    "roberta-base",
    "roberta-large",
    "xlm-roberta-base",
    "distilbert-base",
    "modernbert-base",
    "modernbert-large",
    "deberta-v3-small",
    "deberta-v3-base",
    "deberta-v3-large",
];

/// A preset's shapes, as a language model, or as an encoder by itself.
///
/// # Errors
/// A name that is not one of [`NAMES`].
pub fn config(name: &str) -> Result<ModelConfig, Error> {
    Ok(as_named(name, families::read_config(&raw(name)?)?))
}

/// The same for a purpose.
///
/// # Errors
/// As [`config`]; a purpose that the architecture does not have.
pub fn config_for(name: &str, purpose: Purpose) -> Result<ModelConfig, Error> {
    let config = families::read_config_for(&raw(name)?, purpose)?;
    Ok(as_named(name, config))
}

/// A preset's config.json.
///
/// # Errors
/// A name that is not one of [`NAMES`].
pub fn raw(name: &str) -> Result<HfConfig, Error> {
    let Some(fields) = fields(name) else {
        return Err(Error::Settings(format!(
            "there is no preset {name}; known are {}",
            NAMES.join(", ")
        )));
    };
    let path = format!("preset {name}");
    Ok(HfConfig::from_map(Path::new(&path), fields))
}

/// What a config.json does not say of a preset.
///
/// GPT-3 was not released, so no file names its modules. As in the paper, q, k and v are matrices of their own; they are called as
/// Llama's are: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `up_proj`, `down_proj`.
fn as_named(name: &str, mut config: ModelConfig) -> ModelConfig {
    if name == "gpt3-175b" {
        config.family = Family::Llama;
        config.fused_qkv = false;
        config.layout = Layout::OutIn;
    }
    if config.family == Family::DebertaV2 {
        // The released files have no pooler.
        return config.with_saved_dense();
    }
    config
}

fn fields(name: &str) -> Option<Map<String, Value>> {
    let gpt2 = |layers: usize, heads: usize, width: usize, context: usize| {
        json!({"model_type": "gpt2", "vocab_size": 50257, "n_positions": context, "n_ctx": context, "n_embd": width,
            "n_layer": layers, "n_head": heads, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5})
    };
    let llama = |family: &str,
                 vocabulary: usize,
                 [layers, width, mlp, heads, kv]: [usize; 5],
                 context: usize,
                 tied| {
        json!({"model_type": family, "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": mlp,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
            "max_position_embeddings": context, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "tie_word_embeddings": tied, "rope_theta": 10000.0})
    };
    let encoder = |family: &str, vocabulary: usize, [layers, width, mlp, heads]: [usize; 4]| {
        // RoBERTa's positions begin behind its padding token's id, and it has one type of token.
        let is_bert = family == "bert";
        json!({"model_type": family, "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": mlp,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "max_position_embeddings": if is_bert { 512 } else { 514 }, "type_vocab_size": if is_bert { 2 } else { 1 }})
    };
    let modernbert = |[layers, width, mlp, heads]: [usize; 4]| {
        json!({"model_type": "modernbert", "vocab_size": 50368, "hidden_size": width, "intermediate_size": mlp,
            "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 8192})
    };
    let deberta = |[layers, width, mlp, heads]: [usize; 4]| {
        json!({"model_type": "deberta-v2", "vocab_size": 128_100, "hidden_size": width, "intermediate_size": mlp,
            "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 512,
            "relative_attention": true, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": true,
            "pos_att_type": "p2c|c2p", "position_biased_input": false})
    };
    let mut value = match name {
        "bert-base" => encoder("bert", 30522, [12, 768, 3072, 12]),
        "bert-large" => encoder("bert", 30522, [24, 1024, 4096, 16]),
        "minilm-l6" => encoder("bert", 30522, [6, 384, 1536, 12]),
        "roberta-base" => encoder("roberta", 50265, [12, 768, 3072, 12]),
        "roberta-large" => encoder("roberta", 50265, [24, 1024, 4096, 16]),
        "xlm-roberta-base" => encoder("xlm-roberta", 250_002, [12, 768, 3072, 12]),
        "distilbert-base" => json!({"model_type": "distilbert"}),
        "modernbert-base" => modernbert([22, 768, 1152, 12]),
        "modernbert-large" => modernbert([28, 1024, 2624, 16]),
        "deberta-v3-small" => deberta([6, 768, 3072, 12]),
        "deberta-v3-base" => deberta([12, 768, 3072, 12]),
        "deberta-v3-large" => deberta([24, 1024, 4096, 16]),
        "gpt2" => gpt2(12, 12, 768, 1024),
        "gpt2-medium" => gpt2(24, 16, 1024, 1024),
        "gpt2-large" => gpt2(36, 20, 1280, 1024),
        "gpt2-xl" => gpt2(48, 25, 1600, 1024),
        "gpt3-175b" => gpt2(96, 96, 12288, 2048),
        "llama-2-7b" => llama("llama", 32000, [32, 4096, 11008, 32, 32], 4096, false),
        "llama-3-8b" => llama("llama", 128_256, [32, 4096, 14336, 32, 8], 8192, false),
        "mistral-7b" => llama("mistral", 32000, [32, 4096, 14336, 32, 8], 32768, false),
        "qwen2.5-0.5b" => llama("qwen2", 151_936, [24, 896, 4864, 14, 2], 32768, true),
        "qwen2.5-7b" => llama("qwen2", 152_064, [28, 3584, 18944, 28, 4], 32768, false),
        "qwen3-0.6b" => llama("qwen3", 151_936, [28, 1024, 3072, 16, 8], 40960, true),
        "smollm2-135m" => llama("llama", 49152, [30, 576, 1536, 9, 3], 8192, true),
        "smollm2-360m" => llama("llama", 49152, [32, 960, 2560, 15, 5], 8192, true),
        "smollm2-1.7b" => llama("llama", 49152, [24, 2048, 8192, 32, 32], 8192, true),
        "smollm3-3b" => llama("smollm3", 128_256, [36, 2048, 11008, 16, 4], 65536, true),
        "gemma-2-2b" => llama("gemma2", 256_000, [26, 2304, 9216, 8, 4], 8192, true),
        "gemma-3-270m" => llama("gemma3_text", 262_144, [18, 640, 2048, 4, 1], 32768, true),
        "gemma-3-1b" => llama("gemma3_text", 262_144, [26, 1152, 6912, 4, 1], 32768, true),
        // The text half.
        "gemma-3-4b" => llama(
            "gemma3_text",
            262_208,
            [34, 2560, 10240, 8, 4],
            131_072,
            true,
        ),
        "granite-3.3-2b" => llama("granite", 49159, [40, 2048, 8192, 32, 8], 131_072, true),
        "olmo-2-1b" => llama("olmo2", 100_352, [16, 2048, 8192, 16, 16], 4096, false),
        "phi-4-mini" => llama("phi3", 200_064, [32, 3072, 8192, 24, 8], 131_072, true),
        _ => return None,
    };
    match name {
        "qwen3-0.6b" => value["head_dim"] = 128.into(),
        "mistral-7b" => value["sliding_window"] = 4096.into(),
        "gemma-3-270m" | "gemma-3-1b" => value["sliding_window"] = 512.into(),
        "gemma-3-4b" => value["sliding_window"] = 1024.into(),
        "phi-4-mini" => {
            // The factors themselves change nothing that is planned.
            let factors = [1.0; 48];
            value["rope_scaling"] = json!({"type": "longrope", "short_factor": factors.as_slice(), "long_factor": factors.as_slice()});
            value["partial_rotary_factor"] = 0.75.into();
            value["original_max_position_embeddings"] = 4096.into();
        }
        _ => {}
    }
    match value {
        Value::Object(fields) => Some(fields),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_as_many_parameters_as_the_released_files() {
        let known = [
            ("gpt2", 124_439_808),
            ("gpt2-medium", 354_823_168),
            ("gpt2-large", 774_030_080),
            ("gpt2-xl", 1_557_611_200),
            ("llama-2-7b", 6_738_415_616),
            ("llama-3-8b", 8_030_261_248),
            ("mistral-7b", 7_241_732_096),
            ("qwen2.5-0.5b", 494_032_768),
            ("qwen2.5-7b", 7_615_616_512),
            ("qwen3-0.6b", 596_049_920),
            ("smollm2-135m", 134_515_008),
            ("smollm2-360m", 361_821_120),
            ("smollm2-1.7b", 1_711_376_384),
            ("smollm3-3b", 3_075_098_624),
            ("gemma-2-2b", 2_614_341_888),
            ("gemma-3-270m", 268_098_176),
            ("gemma-3-1b", 999_885_952),
            ("gemma-3-4b", 3_880_263_168),
            ("granite-3.3-2b", 2_533_539_840),
            ("olmo-2-1b", 1_484_916_736),
            ("phi-4-mini", 3_836_021_760),
        ];
        for (name, parameters) in known {
            assert_eq!(config(name).unwrap().parameters(), parameters, "{name}");
        }
        // What transformers counts of their AutoModelForSequenceClassification with two labels.
        let classifiers = [
            ("bert-base", 109_483_778),
            ("bert-large", 335_143_938),
            ("minilm-l6", 22_713_986),
            ("roberta-base", 124_647_170),
            ("roberta-large", 355_361_794),
            ("xlm-roberta-base", 278_045_186),
            ("distilbert-base", 66_955_010),
            ("modernbert-base", 149_606_402),
            ("modernbert-large", 395_833_346),
            ("deberta-v3-small", 141_896_450),
            ("deberta-v3-base", 184_423_682),
            ("deberta-v3-large", 435_063_810),
        ];
        for (name, parameters) in classifiers {
            let purpose = Purpose::SequenceClassifier { labels: 2 };
            let config = config_for(name, purpose).unwrap();
            assert_eq!(config.parameters(), parameters, "{name}");
        }
        let gpt3 = config("gpt3-175b").unwrap().parameters();
        assert!((174_000_000_000..176_000_000_000).contains(&gpt3), "{gpt3}");
        assert_eq!(known.len() + classifiers.len() + 1, NAMES.len());
    }

    #[test]
    fn an_unknown_preset_lists_the_known_ones() {
        let text = config("gpt5").unwrap_err().to_string();
        assert!(text.contains("no preset gpt5") && text.contains("smollm2-360m"));
    }
}

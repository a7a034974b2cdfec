//! Ministral 3: Mistral with YaRN, and queries that grow with the position.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;
use serde_json::{Map, Value, json};

use super::super::config::{Family, ModelConfig, Position, QueryScale};
use super::llama::{Absent, shapes};
use super::rope::Rules;

pub(super) fn config(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    let absent = Absent {
        kv_heads: Some(8),
        // Null stands for hidden_size / num_attention_heads.
        head_size: (!raw.map().contains_key("head_dim")).then_some(128),
        positions: 262_144,
        eps: 1e-5,
        tied: false,
    };
    let base = shapes(raw, Family::Ministral3, &absent)?;
    let window = super::sliding_window(raw, None)?;
    Ok(ModelConfig {
        position: position(raw, &base)?,
        layers: super::same_layers(base.num_hidden_layers, window),
        ..base
    })
}

fn position(raw: &HfConfig, base: &ModelConfig) -> Result<Position, FormatError> {
    let rules = Rules::new(10_000.0, base.max_position_embeddings, base.head_size);
    let parameters = match raw.opt_object("rope_scaling")? {
        Some(scaling) if !scaling.map().is_empty() => Some(scaling),
        _ => raw.opt_object("rope_parameters")?,
    };
    let Some(parameters) = parameters else {
        let absent = HfConfig::from_map(raw.path(), absent_parameters());
        return position(&absent, base);
    };
    let scale = QueryScale {
        beta: parameters.f64("llama_4_scaling_beta")?,
        original_max_position_embeddings: rules.original(raw, Some(&parameters))?,
    };
    let Position::Rope(ropes) = rules.read(raw)? else {
        unreachable!("the rules of rotary positions read nothing else")
    };
    let mut ropes = ropes;
    for rope in &mut ropes {
        rope.query_scale = (scale.beta != 0.0).then_some(scale);
    }
    Ok(Position::Rope(ropes))
}

/// `rope_parameters` of a file that has none.
fn absent_parameters() -> Map<String, Value> {
    let parameters = json!({
        "type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    });
    Map::from_iter([("rope_parameters".to_owned(), parameters)])
}

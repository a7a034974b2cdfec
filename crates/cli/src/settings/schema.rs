//! A JSON schema of a settings file, for editors, from the same definition as the flags.

use std::any::TypeId;

use clap::Command;
use lowrank::fields::{Field, Range};
use serde_json::{Map, Value, json};

/// The schema. `command` holds the arguments, `fields` the settings' ranges, and `defaults` their keys with the default values.
pub fn schema(
    title: &str,
    command: &Command,
    fields: &[Field],
    defaults: &Map<String, Value>,
) -> Value {
    let properties: Map<String, Value> = defaults
        .iter()
        .filter_map(|(key, default)| {
            let arg = command
                .get_arguments()
                .find(|arg| arg.get_id() == key.as_str())?;
            let mut property = kind(arg, default);
            let field = fields.iter().find(|field| field.key == key);
            if let Some(range) = field.and_then(|field| field.range) {
                limit(&mut property, range);
            }
            if let Some(help) = arg.get_long_help().or(arg.get_help()) {
                property.insert("description".to_string(), help.to_string().into());
            }
            // A default that help does not show is decided by something else; a switch shows none.
            let decided = arg.is_hide_default_value_set() && !default.is_boolean();
            if !default.is_null() && !decided {
                property.insert("default".to_string(), default.clone());
            }
            Some((key.clone(), Value::Object(property)))
        })
        .collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "type": "object",
        "additionalProperties": false,
        "properties": properties,
    })
}

/// Puts a range into a property, or where that is a map of patterns, into its numbers.
fn limit(property: &mut Map<String, Value>, range: Range) {
    let numbers = match property.get_mut("additionalProperties") {
        Some(Value::Object(numbers)) => numbers,
        _ => property,
    };
    for (keyword, number) in range.limits.iter().map(|limit| limit.keyword()) {
        let number = if number.fract() == 0.0 {
            json!(number as i64)
        } else {
            json!(number)
        };
        numbers.insert(keyword.to_string(), number);
    }
}

/// The part of a property that says which values it takes.
fn kind(arg: &clap::Arg, default: &Value) -> Map<String, Value> {
    let mut kind = Map::new();
    let mut set = |key: &str, value: Value| {
        kind.insert(key.to_string(), value);
    };
    let parser = arg.get_value_parser().type_id();
    let choices: Vec<String> = arg
        .get_possible_values()
        .iter()
        .map(|value| value.get_name().to_string())
        .collect();
    if default.is_object() {
        set("type", json!("object"));
        set("additionalProperties", json!({"type": "number"}));
    } else if default.is_boolean() {
        set("type", json!("boolean"));
    } else if !choices.is_empty() {
        // `init_lora_weights: true` is a boolean to YAML.
        let booleans = choices
            .iter()
            .filter_map(|choice| choice.parse::<bool>().ok())
            .map(Value::Bool);
        // `pissa_niter_N` stands for many words.
        let (numbered, words): (Vec<&String>, Vec<&String>) =
            choices.iter().partition(|choice| choice.ends_with("_N"));
        let all: Vec<Value> = words
            .into_iter()
            .cloned()
            .map(Value::String)
            .chain(booleans)
            .collect();
        match numbered.first().and_then(|choice| choice.strip_suffix('N')) {
            None => set("enum", all.into()),
            Some(begin) => set(
                "anyOf",
                json!([{"enum": all}, {"type": "string", "pattern": format!("^{begin}[0-9]+$")}]),
            ),
        }
    } else if parser == TypeId::of::<f64>() {
        set("type", json!("number"));
    } else if arg.get_value_names().is_some_and(|names| names == ["SIZE"]) {
        // A number of bytes, or a text such as 2GiB.
        set("type", json!(["integer", "string"]));
    } else if parser == TypeId::of::<u64>() || parser == TypeId::of::<usize>() {
        set("type", json!("integer"));
        set("minimum", json!(0));
    } else if parser == TypeId::of::<lowrank::tuning::targets::Targets>() {
        set("type", json!(["string", "array"]));
        set("items", json!({"type": "string"}));
    } else if parser == TypeId::of::<lowrank::tuning::lora::TokenIndices>() {
        let ids = json!({"type": "array", "items": {"type": "integer", "minimum": 0}});
        set("type", json!(["string", "array", "object"]));
        set("items", ids["items"].clone());
        set("additionalProperties", ids);
    } else {
        set("type", json!("string"));
    }
    kind
}

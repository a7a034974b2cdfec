//! How error messages name JSON values.

use serde_json::{Map, Value};

/// The fields of a row, for a message.
pub(super) fn names(row: &Map<String, Value>) -> String {
    if row.is_empty() {
        return "no field at all".into();
    }
    let mut list: Vec<String> = row
        .keys()
        .take(12)
        .map(|name| format!("{name:?}"))
        .collect();
    if row.len() > list.len() {
        list.push(format!("{} more", row.len() - list.len()));
    }
    list.join(", ")
}

pub(super) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A scalar as it is, anything else by its type.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Bool(_) | Value::Number(_) => format!("{} ({value})", type_name(value)),
        Value::String(text) if text.chars().count() <= 40 => format!("{text:?}"),
        _ => type_name(value).to_owned(),
    }
}

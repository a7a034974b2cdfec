//! A message of a conversation, and the strict reading of one.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::describe::{names, shown, type_name};

/// Fields of a message that say whether it is learned, by the names of several trainers: true or 1, false or 0.
pub(super) const MARKS: [&str; 5] = ["weight", "train", "training", "trainable", "loss"];

/// A message of a conversation: every field as it was given, since templates may use any of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Message(Map<String, Value>);

impl Message {
    /// A message of plain text.
    pub fn new(role: &str, content: &str) -> Self {
        Self(Map::from_iter([
            ("role".to_owned(), role.into()),
            ("content".to_owned(), content.into()),
        ]))
    }

    /// The role: `system`, `user`, `assistant` or `tool`; empty if there is none.
    pub fn role(&self) -> &str {
        self.0
            .get("role")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// The content where it is plain text.
    pub fn content(&self) -> Option<&str> {
        self.0.get("content").and_then(Value::as_str)
    }

    /// All fields.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.0
    }

    /// Whether the loss falls on it: what the assistant says, unless a mark (`weight`, `train`, `training`, `trainable`,
    /// `loss`) is 0 or false.
    pub fn is_supervised(&self) -> bool {
        let marks = MARKS.iter().filter_map(|name| self.0.get(*name));
        self.role() == "assistant" && !marks.filter_map(as_mark).any(|learned| !learned)
    }

    /// The same message with another value in a field.
    pub(super) fn with(&self, field: &str, value: Value) -> Self {
        let mut fields = self.0.clone();
        fields.insert(field.to_owned(), value);
        Self(fields)
    }
}

/// The value of one of [`MARKS`], if it is one.
fn as_mark(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(learned) => Some(*learned),
        Value::Number(number) if number.as_f64() == Some(0.0) => Some(false),
        Value::Number(number) if number.as_f64() == Some(1.0) => Some(true),
        _ => None,
    }
}

pub(super) fn read_messages(value: &Value) -> Result<Vec<Message>, String> {
    let Value::Array(items) = value else {
        return Err(format!(
            "\"messages\" must be a list, but is {}",
            type_name(value)
        ));
    };
    if items.is_empty() {
        return Err("\"messages\" is empty".into());
    }
    items
        .iter()
        .enumerate()
        .map(|(at, item)| read_message(at, item))
        .collect()
}

pub(super) fn read_message(at: usize, item: &Value) -> Result<Message, String> {
    let place = format!("messages[{at}]");
    let Value::Object(fields) = item else {
        return Err(format!(
            "{place} must be an object, but is {}",
            type_name(item)
        ));
    };
    let role = match fields.get("role") {
        Some(Value::String(role)) if !role.is_empty() => role.as_str(),
        Some(other) => {
            return Err(format!(
                "{place}.role must be a name, but is {}",
                shown(other)
            ));
        }
        None => return Err(format!("{place} has no \"role\"; it has {}", names(fields))),
    };
    let other_ways = ["tool_calls", "function_call"]
        .iter()
        .any(|name| fields.get(*name).is_some_and(|v| !v.is_null()));
    match fields.get("tool_calls") {
        None | Some(Value::Null) => {}
        Some(Value::Array(calls)) => {
            if let Some(at) = calls.iter().position(|call| !call.is_object()) {
                return Err(format!(
                    "{place}.tool_calls[{at}] must be an object, but is {}",
                    type_name(&calls[at])
                ));
            }
        }
        Some(other) => {
            return Err(format!(
                "{place}.tool_calls must be a list of objects, but is {}; a JSON text has to be parsed into the list first",
                type_name(other)
            ));
        }
    }
    match fields.get("content") {
        Some(Value::String(_) | Value::Array(_)) => {}
        None | Some(Value::Null) if role == "assistant" && other_ways => {}
        None => {
            return Err(format!(
                "{place} has no \"content\"; it has {}",
                names(fields)
            ));
        }
        Some(other) => {
            return Err(format!(
                "{place}.content must be a text or a list of parts, but is {}",
                shown(other)
            ));
        }
    }
    let mut said: Option<(&str, bool)> = None;
    for name in MARKS {
        let learned = match fields.get(name) {
            None | Some(Value::Null) => continue,
            Some(value) => as_mark(value).ok_or_else(|| {
                format!(
                    "{place}.{name} must be 0 or 1 (or false or true), but is {}",
                    shown(value)
                )
            })?,
        };
        if learned && role != "assistant" {
            return Err(format!(
                "{place} has a {name:?}, but is of the role {role:?}; only what the assistant says is learned"
            ));
        }
        match said {
            Some((other, before)) if before != learned => {
                return Err(format!(
                    "{place} has both {other:?} and {name:?}, which say the opposite of each other; leave one of them out"
                ));
            }
            _ => said = Some((name, learned)),
        }
    }
    Ok(Message(fields.clone()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn marks_of_other_trainers_say_what_is_learned() {
        let learned = |fields: Value| {
            let mut message = json!({"role": "assistant", "content": "a"});
            for (name, value) in fields.as_object().unwrap() {
                message[name] = value.clone();
            }
            read_message(0, &message).map(|message| message.is_supervised())
        };
        for name in MARKS {
            for (value, expected) in [
                (json!(0), false),
                (json!(false), false),
                (json!(0.0), false),
                (json!(1), true),
                (json!(true), true),
                (json!(null), true),
            ] {
                assert_eq!(learned(json!({name: value})), Ok(expected), "{name}");
            }
        }
        assert_eq!(learned(json!({"train": true, "weight": 1})), Ok(true));
        let error = learned(json!({"train": false, "weight": 1})).unwrap_err();
        assert!(error.contains("both \"weight\" and \"train\""), "{error}");
        let user = json!({"role": "user", "content": "q", "train": false});
        assert!(read_message(0, &user).is_ok());
    }
}

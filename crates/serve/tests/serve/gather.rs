//! What a stream comes to, in the form of an answer without one.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// The choices of the events of a text completion or a conversation.
#[track_caller]
pub(crate) fn choices(events: &[Value]) -> Vec<Value> {
    let mut all: BTreeMap<u64, Value> = BTreeMap::new();
    for event in events {
        for part in event["choices"].as_array().expect("choices") {
            let index = part["index"].as_u64().expect("an index");
            let is_chat = part.get("delta").is_some();
            let choice = all.entry(index).or_insert_with(|| {
                if is_chat {
                    json!({"index": index, "message": {}, "logprobs": null, "finish_reason": null})
                } else {
                    json!({"index": index, "text": "", "logprobs": null, "finish_reason": null})
                }
            });
            assert_eq!(
                choice["finish_reason"],
                Value::Null,
                "something came behind the end"
            );
            choice["finish_reason"] = part["finish_reason"].clone();
            add_log_probs(&mut choice["logprobs"], &part["logprobs"]);
            if is_chat {
                add_delta(&mut choice["message"], &part["delta"]);
            } else {
                append(&mut choice["text"], &part["text"]);
            }
        }
    }
    let mut choices: Vec<Value> = all.into_values().collect();
    for choice in &mut choices {
        if choice["message"]["tool_calls"].is_array() && choice["message"]["content"] == "" {
            choice["message"]["content"] = Value::Null;
        }
    }
    choices
}

fn append(text: &mut Value, more: &Value) {
    let more = more.as_str().unwrap_or_else(|| panic!("no text: {more}"));
    *text = (text.as_str().unwrap_or_default().to_owned() + more).into();
}

fn add_log_probs(all: &mut Value, more: &Value) {
    let Value::Object(more) = more else { return };
    if all.is_null() {
        *all = Map::new().into();
    }
    for (name, list) in more {
        match (all.get_mut(name), list) {
            (Some(Value::Array(known)), Value::Array(list)) => known.extend_from_slice(list),
            _ => all[name] = list.clone(),
        }
    }
}

fn add_delta(message: &mut Value, delta: &Value) {
    for (name, value) in delta.as_object().expect("a delta") {
        match name.as_str() {
            "content" => append(&mut message["content"], value),
            "tool_calls" => {
                for call in value.as_array().expect("calls") {
                    add_call(message, call);
                }
            }
            _ => message[name] = value.clone(),
        }
    }
}

/// As openai-python puts calls together: by their index, arguments one behind the other.
fn add_call(message: &mut Value, call: &Value) {
    let index = call["index"].as_u64().expect("an index") as usize;
    if message.get("tool_calls").is_none() {
        message["tool_calls"] = json!([]);
    }
    let calls = message["tool_calls"].as_array_mut().expect("calls");
    if index == calls.len() {
        let mut call = call.clone();
        call.as_object_mut().expect("an object").remove("index");
        calls.push(call);
    } else {
        let arguments = &mut calls[index]["function"]["arguments"];
        let more = call["function"]["arguments"].as_str().unwrap_or_default();
        *arguments = (arguments.as_str().unwrap_or_default().to_owned() + more).into();
    }
}

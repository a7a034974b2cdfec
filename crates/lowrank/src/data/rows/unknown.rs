//! Rows of no known kind, and what to rename.

use serde_json::{Map, Value};

use super::RowKind;
use crate::data::TaskType;
use crate::data::describe::names;

/// Why the first row's kind cannot be told, where rows of a task are wanted, or of any.
pub(in crate::data) fn unknown_kind(row: &Map<String, Value>, task: Option<TaskType>) -> String {
    let to_go_on = r#"{"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "output"} or {"text"}"#;
    let texts = r#"{"text", "label"} or two texts and their label, {"text", "text_pair", "label"}"#;
    let words = r#"{"tokens", "tags"} or {"text", "spans"}"#;
    let kinds = match task {
        Some(TaskType::CausalLm) => format!("is no known kind; rows are {to_go_on}"),
        None => format!(
            "is no known kind; rows are {to_go_on}; to classify texts, {texts}; to classify words, {words}"
        ),
        Some(TaskType::TokenCls) => format!("is no row of words to classify; rows are {words}"),
        Some(_) => format!("is no row of texts to classify; rows are {texts}"),
    };
    format!("the row has {}, which {kinds}{}", names(row), mend(row))
}

/// Names of other data sets for the fields of a known kind: theirs, and ours.
const RENAMES: &[(&[&str], &str)] = &[
    (
        &["prompt", "response"],
        r#"rename "response" to "completion""#,
    ),
    (&["prompt", "answer"], r#"rename "answer" to "completion""#),
    (&["prompt", "output"], r#"rename "output" to "completion""#),
    (
        &["prompt", "chosen"],
        r#"rename "chosen" to "completion" and leave "rejected" out"#,
    ),
    (
        &["instruction", "context", "response"],
        r#"rename "context" to "input" and "response" to "output""#,
    ),
    (
        &["instruction", "response"],
        r#"rename "response" to "output""#,
    ),
    (
        &["instruction", "completion"],
        r#"rename "completion" to "output""#,
    ),
    (&["instruction", "answer"], r#"rename "answer" to "output""#),
    (
        &["question", "answer"],
        r#"rename "question" to "prompt" and "answer" to "completion""#,
    ),
    (
        &["question", "response"],
        r#"rename "question" to "prompt" and "response" to "completion""#,
    ),
    (
        &["query", "response"],
        r#"rename "query" to "prompt" and "response" to "completion""#,
    ),
    (
        &["query", "answer"],
        r#"rename "query" to "prompt" and "answer" to "completion""#,
    ),
    (
        &["input", "output"],
        r#"rename "input" to "prompt" and "output" to "completion""#,
    ),
    (
        &["source", "target"],
        r#"rename "source" to "prompt" and "target" to "completion""#,
    ),
    (
        &["conversation"],
        r#"rename "conversation" to "messages" or "conversations""#,
    ),
    (
        &["dialogue"],
        r#"rename "dialogue" to "messages" or "conversations""#,
    ),
    (&["content"], r#"rename "content" to "text""#),
    (&["document"], r#"rename "document" to "text""#),
];

/// How a row becomes one of a known kind, where that can be told; it begins with a semicolon.
pub(super) fn mend(row: &Map<String, Value>) -> String {
    let inside = row.iter().find_map(|(name, value)| {
        let kind = RowKind::detect(value.as_object()?, None)?;
        Some((name, kind))
    });
    if let Some((name, kind)) = inside {
        let key = Value::from(name.as_str());
        return format!(
            "; under {name:?} is a row ({kind}): take it out, for example with jq -c '.[{key}]'"
        );
    }
    let lower = |wanted: &str| {
        let mut names = row.keys();
        names.find(|name| *name != wanted && name.trim().eq_ignore_ascii_case(wanted))
    };
    // The same names in another case, as tables have them.
    for (_, required, _) in RowKind::FIELDS {
        let found: Vec<_> = required.iter().map(|name| (lower(name), *name)).collect();
        let fits =
            |(found, name): &(Option<&String>, &str)| found.is_some() || row.contains_key(*name);
        if found.iter().all(fits) {
            let pairs: Vec<String> = found
                .iter()
                .filter_map(|(found, name)| Some(format!("{:?} to {name:?}", (*found)?)))
                .collect();
            // A row that has the names as they are is one of another task.
            if !pairs.is_empty() {
                return format!("; rename {}", pairs.join(" and "));
            }
        }
    }
    let known = |names: &[&str]| names.iter().all(|name| row.contains_key(*name));
    let found = RENAMES.iter().find(|(names, _)| known(names));
    found.map_or_else(String::new, |(_, mend)| format!("; {mend}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{RowProblem, read_row};
    use super::*;

    #[test]
    fn rows_of_other_data_sets_are_told_what_to_rename() {
        for (row, expected) in [
            (
                json!({"question": "a", "answer": "b"}),
                r#"rename "question" to "prompt" and "answer" to "completion""#,
            ),
            (
                json!({"prompt": "a", "response": "b"}),
                r#"rename "response" to "completion""#,
            ),
            (
                json!({"instruction": "a", "context": "", "response": "b", "category": "c"}),
                r#"rename "context" to "input" and "response" to "output""#,
            ),
            (
                json!({"instruction": "a", "response": "b"}),
                r#"; rename "response" to "output""#,
            ),
            (
                json!({"input": "a", "output": "b"}),
                r#"rename "input" to "prompt" and "output" to "completion""#,
            ),
            (
                json!({"Prompt": "a", "Completion": "b"}),
                r#"rename "Prompt" to "prompt" and "Completion" to "completion""#,
            ),
            (json!({"Text": "a"}), r#"rename "Text" to "text""#),
            (
                json!({"custom_id": "1", "body": {"model": "x", "messages": []}}),
                r#"under "body" is a row (chat ("messages")): take it out, for example with jq -c '.["body"]'"#,
            ),
            (
                json!({"row_idx": 0, "row": {"text": "a"}}),
                r#"jq -c '.["row"]'"#,
            ),
        ] {
            let text = unknown_kind(row.as_object().unwrap(), Some(TaskType::CausalLm));
            assert!(text.contains(expected), "{text}");
        }
        let row = json!({"prompt": "a", "response": "b"});
        let Err(RowProblem::Bad(text)) =
            read_row(RowKind::PromptCompletion, row.as_object().unwrap())
        else {
            panic!("it has no completion")
        };
        assert!(
            text.ends_with(r#"; rename "response" to "completion""#),
            "{text}"
        );
        let row = json!({"a": 1});
        let of = |task| unknown_kind(row.as_object().unwrap(), task);
        assert!(of(Some(TaskType::CausalLm)).ends_with(r#"or {"text"}"#));
        assert!(
            of(Some(TaskType::TokenCls))
                .ends_with(r#"rows are {"tokens", "tags"} or {"text", "spans"}"#)
        );
        for part in [
            r#"or {"text"}; to classify texts, {"text", "label"} or"#,
            "to classify words",
        ] {
            assert!(of(None).contains(part), "{}", of(None));
        }
        let row = json!({"messages": [{"from": "human", "value": "a"}]});
        let Err(RowProblem::Bad(text)) = read_row(RowKind::Messages, row.as_object().unwrap())
        else {
            panic!("it has no roles")
        };
        assert!(
            text.contains(r#"rename "messages" to "conversations""#),
            "{text}"
        );
        let row = json!({"conversations": [{"from": "function_call", "value": "{}"}]});
        let Err(RowProblem::Bad(text)) = read_row(RowKind::ShareGpt, row.as_object().unwrap())
        else {
            panic!("a call is no text")
        };
        assert!(text.contains("\"tool_calls\""), "{text}");
    }
}

//! The kinds of rows, and the strict reading of one.

use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value};

use super::describe::{names, shown, type_name};
use super::files::RawRow;
use super::message::{MARKS, Message, read_message, read_messages};
use super::task::TaskType;

mod labelled;
mod unknown;

use labelled::read_labelled;
pub(super) use labelled::{Given, Input, LabelledRow, Scalar, Span, own_label, read_unlabelled};
pub(super) use unknown::unknown_kind;

/// The form of a file's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RowKind {
    /// `{"messages": [{"role", "content"}, …]}`, OpenAI's form, with `weight` and `tools`.
    Messages,
    /// `{"conversations": [{"from", "value"}, …]}`.
    ShareGpt,
    /// `{"prompt", "completion"}`.
    PromptCompletion,
    /// `{"instruction", "input", "output"}`.
    Alpaca,
    /// `{"text"}`.
    Text,
    /// `{"text", "label"}`, or `sentence` in place of `text`.
    Labelled,
    /// Two texts and their label: `{"text", "text_pair", "label"}`, or by the names that GLUE's tasks have.
    LabelledPair,
    /// `{"tokens", "tags"}`: words and a label for each.
    Tagged,
    /// `{"text", "spans": [{"start", "end", "label"}, …]}`: passages of a text and their labels.
    Passages,
}

/// The names that fields of rows have: one of them is in the header of a table that has one.
pub(super) const FIELDS: [&str; 26] = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "text",
    "text_pair",
    "sentence",
    "sentence1",
    "sentence2",
    "premise",
    "hypothesis",
    "question",
    "question1",
    "question2",
    "label",
    "labels",
    "tokens",
    "tags",
    "ner_tags",
    "spans",
    "idx",
    "id",
];

impl RowKind {
    /// Every kind without labels, with the fields that it is known by and those that it may have, in the order they are tried.
    const FIELDS: [(Self, &'static [&'static str], &'static [&'static str]); 5] = [
        (Self::Messages, &["messages"], &["system", "tools"]),
        (Self::ShareGpt, &["conversations"], &["system", "tools"]),
        (Self::PromptCompletion, &["prompt", "completion"], &[]),
        (
            Self::Alpaca,
            &["instruction", "output"],
            &["input", "system", "history"],
        ),
        (Self::Text, &["text"], &[]),
    ];

    /// The kind of a row, by the fields that are there; where a task is given, one that teaches it.
    pub(super) fn detect(row: &Map<String, Value>, task: Option<TaskType>) -> Option<Self> {
        let has_all = |names: &[&str]| names.iter().all(|name| row.contains_key(*name));
        let text = |kind: &Self| *kind == Self::Text;
        let kinds = Self::FIELDS
            .iter()
            .filter(|(_, required, _)| has_all(required));
        let mut kinds = kinds.map(|(kind, _, _)| *kind);
        let found = match task {
            Some(TaskType::CausalLm) => return kinds.next(),
            // A text with a label is more than a text; whatever else has one is read as ever.
            None => match kinds.next() {
                Some(kind) if !text(&kind) => return Some(kind),
                found => Self::detect_labelled(row).or(found),
            },
            Some(_) => Self::detect_labelled(row),
        };
        found.filter(|kind| task.is_none_or(|task| kind.task() == task))
    }

    /// What rows of this kind teach.
    pub fn task(self) -> TaskType {
        match self {
            Self::Labelled | Self::LabelledPair => TaskType::SeqCls,
            Self::Tagged | Self::Passages => TaskType::TokenCls,
            _ => TaskType::CausalLm,
        }
    }

    /// The fields of this kind, those it must have first.
    fn fields(self) -> (&'static [&'static str], &'static [&'static str]) {
        let found = Self::FIELDS.iter().find(|(kind, _, _)| *kind == self);
        found.map_or((&[], &[]), |(_, required, optional)| (required, optional))
    }

    /// Whether a field of a row of this kind is read.
    pub(super) fn uses(self, row: &Map<String, Value>, field: &str) -> bool {
        if self.task() != TaskType::CausalLm {
            return self.labelled_fields(row).contains(&field);
        }
        let (required, optional) = self.fields();
        required.contains(&field) || optional.contains(&field)
    }
}

impl fmt::Display for RowKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Messages => "chat (\"messages\")",
            Self::ShareGpt => "ShareGPT (\"conversations\")",
            Self::PromptCompletion => "prompt and completion",
            Self::Alpaca => "Alpaca (\"instruction\", \"input\", \"output\")",
            Self::Text => "text",
            Self::Labelled => "text and label",
            Self::LabelledPair => "two texts and a label",
            Self::Tagged => "words and tags",
            Self::Passages => "text with marked passages (\"spans\")",
        })
    }
}

/// What a row says, whatever its form.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    Chat {
        messages: Vec<Message>,
        tools: Option<Value>,
    },
    Pair {
        prompt: String,
        completion: String,
    },
    Instruction(AlpacaRow),
    Text(String),
    Labelled(LabelledRow),
}

/// Alpaca's row.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct AlpacaRow {
    pub(super) instruction: String,
    pub(super) input: String,
    pub(super) output: String,
    pub(super) system: Option<String>,
    /// Earlier questions and answers.
    pub(super) history: Vec<(String, String)>,
}

/// Why a row was not understood.
#[derive(Debug, PartialEq)]
pub(super) enum RowProblem {
    /// It is of another kind; the text names the kind, or the fields found.
    OtherKind(String),
    Bad(String),
}

impl RowProblem {
    /// Names the row where its line alone may not tell which it is.
    pub(super) fn about(self, row: &RawRow) -> Self {
        match self {
            Self::Bad(reason) => Self::Bad(row.about(reason)),
            Self::OtherKind(found) => Self::OtherKind(row.after(found)),
        }
    }
}

impl From<String> for RowProblem {
    fn from(reason: String) -> Self {
        Self::Bad(reason)
    }
}

/// Reads a row of the expected kind.
pub(super) fn read_row(kind: RowKind, row: &Map<String, Value>) -> Result<Content, RowProblem> {
    let (required, _) = kind.fields();
    if let Some(missing) = required.iter().find(|name| !row.contains_key(**name)) {
        return Err(match RowKind::detect(row, Some(TaskType::CausalLm)) {
            Some(other) => RowProblem::OtherKind(other.to_string()),
            None => RowProblem::Bad(format!(
                "{missing:?} is missing; the row has {}{}",
                names(row),
                unknown::mend(row)
            )),
        });
    }
    Ok(match kind {
        RowKind::Messages => Content::Chat {
            messages: with_system(
                read_messages(&row["messages"]).map_err(|e| sharegpt(e, row))?,
                row,
            )?,
            tools: read_tools(row)?,
        },
        RowKind::ShareGpt => read_sharegpt(row)?,
        RowKind::PromptCompletion => {
            let prompt = string(row, "prompt")?;
            let completion = string(row, "completion")?;
            if completion.is_empty() {
                return Err(RowProblem::Bad("\"completion\" is empty".into()));
            }
            Content::Pair { prompt, completion }
        }
        RowKind::Alpaca => {
            let instruction = string(row, "instruction")?;
            let input = match row.get("input") {
                None | Some(Value::Null) => String::new(),
                Some(_) => string(row, "input")?,
            };
            let output = string(row, "output")?;
            if output.is_empty() {
                return Err(RowProblem::Bad("\"output\" is empty".into()));
            }
            Content::Instruction(AlpacaRow {
                instruction,
                input,
                output,
                system: system_of(row)?,
                history: read_history(row)?,
            })
        }
        RowKind::Text => {
            let text = string(row, "text")?;
            if text.is_empty() {
                return Err(RowProblem::Bad("\"text\" is empty".into()));
            }
            Content::Text(text)
        }
        RowKind::Labelled | RowKind::LabelledPair | RowKind::Tagged | RowKind::Passages => {
            Content::Labelled(read_labelled(kind, row)?)
        }
    })
}

/// The reason why messages cannot be read, with the mend where they are ShareGPT's.
fn sharegpt(reason: String, row: &Map<String, Value>) -> String {
    let messages = row.get("messages").and_then(Value::as_array);
    let is_turn = |item: &Value| item.get("role").is_none() && item.get("from").is_some();
    if messages.is_some_and(|list| list.iter().any(is_turn)) {
        format!(
            "{reason}; rename \"messages\" to \"conversations\", whose turns have \"from\" and \"value\""
        )
    } else {
        reason
    }
}

fn read_tools(row: &Map<String, Value>) -> Result<Option<Value>, String> {
    match row.get("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(tools)) => match tools.iter().position(|tool| !tool.is_object()) {
            Some(at) => Err(format!(
                "tools[{at}] must be an object, but is {}",
                type_name(&tools[at])
            )),
            None => Ok(Some(Value::Array(tools.clone()))),
        },
        Some(other) => Err(format!(
            "\"tools\" must be a list of objects, but is {}{}",
            type_name(other),
            if other.is_string() {
                "; parse the JSON text into the list first"
            } else {
                ""
            }
        )),
    }
}

fn read_sharegpt(row: &Map<String, Value>) -> Result<Content, String> {
    let value = &row["conversations"];
    let Value::Array(turns) = value else {
        return Err(format!(
            "\"conversations\" must be a list, but is {}",
            type_name(value)
        ));
    };
    if turns.is_empty() {
        return Err("\"conversations\" is empty".into());
    }
    let mut messages = Vec::with_capacity(turns.len() + 1);
    for (at, turn) in turns.iter().enumerate() {
        let place = format!("conversations[{at}]");
        let Value::Object(fields) = turn else {
            return Err(format!(
                "{place} must be an object, but is {}",
                type_name(turn)
            ));
        };
        let from = match fields.get("from") {
            Some(Value::String(from)) => from.as_str(),
            Some(other) => {
                return Err(format!(
                    "{place}.from must be a name, but is {}",
                    shown(other)
                ));
            }
            None if fields.contains_key("role") => {
                return Err(format!(
                    "{place} has \"role\" in place of \"from\"; rename \"conversations\" to \"messages\""
                ));
            }
            None => return Err(format!("{place} has no \"from\"; it has {}", names(fields))),
        };
        let role = match from {
            "system" => "system",
            "human" | "user" => "user",
            "gpt" | "assistant" | "chatgpt" | "bing" | "bard" | "model" => "assistant",
            "tool" | "observation" | "function_response" => "tool",
            "function_call" => {
                return Err(format!(
                    "{place}.from is \"function_call\", which is written as a message of the role assistant with \
                     \"tool_calls\": rename \"conversations\" to \"messages\", \"from\" and \"value\" to \"role\" and \
                     \"content\", and put the call into tool_calls"
                ));
            }
            other => {
                return Err(format!(
                    "{place}.from is {other:?}; known are system, human, user, gpt, assistant and tool"
                ));
            }
        };
        match fields.get("value") {
            Some(Value::String(text)) => {
                let mut message = Message::new(role, text);
                for name in MARKS {
                    if let Some(mark) = fields.get(name) {
                        message = message.with(name, mark.clone());
                    }
                }
                messages.push(
                    read_message(at, &Value::Object(message.fields().clone()))
                        .map_err(|e| e.replace("messages[", "conversations["))?,
                );
            }
            Some(other) => {
                return Err(format!(
                    "{place}.value must be a text, but is {}",
                    type_name(other)
                ));
            }
            None => {
                return Err(format!(
                    "{place} has no \"value\"; it has {}",
                    names(fields)
                ));
            }
        }
    }
    Ok(Content::Chat {
        messages: with_system(messages, row)?,
        tools: read_tools(row)?,
    })
}

/// A row's own `system`, where there is one and it is not empty.
fn system_of(row: &Map<String, Value>) -> Result<Option<String>, String> {
    match row.get("system") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(system)) if system.is_empty() => Ok(None),
        Some(Value::String(system)) => Ok(Some(system.clone())),
        Some(other) => Err(format!(
            "\"system\" must be a text, but is {}",
            type_name(other)
        )),
    }
}

/// Messages with the row's own `system` in front.
fn with_system(
    mut messages: Vec<Message>,
    row: &Map<String, Value>,
) -> Result<Vec<Message>, String> {
    let Some(system) = system_of(row)? else {
        return Ok(messages);
    };
    match messages.iter().find(|message| message.role() == "system") {
        Some(given) if given.content() == Some(&system) => {}
        Some(_) => {
            return Err(
                "the row has a \"system\" of its own and a message of the role \"system\" that says something else; \
                 leave one of them out"
                    .into(),
            );
        }
        None => messages.insert(0, Message::new("system", &system)),
    }
    Ok(messages)
}

/// Alpaca's `history`: earlier questions and answers, as LLaMA-Factory reads it.
fn read_history(row: &Map<String, Value>) -> Result<Vec<(String, String)>, String> {
    let turns = match row.get("history") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(turns)) => turns,
        Some(other) => {
            return Err(format!(
                "\"history\" must be a list of pairs of texts, but is {}",
                type_name(other)
            ));
        }
    };
    let read = |(at, turn): (usize, &Value)| match turn.as_array().map(Vec::as_slice) {
        Some([Value::String(question), Value::String(answer)]) => {
            Ok((question.clone(), answer.clone()))
        }
        _ => Err(format!(
            "history[{at}] must be a pair of texts, [\"question\", \"answer\"]"
        )),
    };
    turns.iter().enumerate().map(read).collect()
}

fn string(row: &Map<String, Value>, name: &str) -> Result<String, String> {
    match row.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("{name:?} must be a text, but is {}", shown(other))),
        None => Err(format!("{name:?} is missing; the row has {}", names(row))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: &Value) -> Result<Content, String> {
        let row = value.as_object().unwrap();
        let task = Some(TaskType::CausalLm);
        let kind = RowKind::detect(row, task).ok_or_else(|| unknown_kind(row, task))?;
        read_row(kind, row).map_err(|problem| match problem {
            RowProblem::Bad(reason) => reason,
            RowProblem::OtherKind(kind) => format!("other kind: {kind}"),
        })
    }

    #[test]
    fn kinds_are_told_by_their_fields() {
        for (row, kind) in [
            (json!({"messages": 1, "text": 1}), Some(RowKind::Messages)),
            (
                json!({"id": 1, "conversations": 1}),
                Some(RowKind::ShareGpt),
            ),
            (
                json!({"prompt": 1, "completion": 1, "text": 1}),
                Some(RowKind::PromptCompletion),
            ),
            (
                json!({"instruction": 1, "output": 1, "text": 1}),
                Some(RowKind::Alpaca),
            ),
            (json!({"text": 1}), Some(RowKind::Text)),
            (json!({"prompt": 1}), None),
            (json!({}), None),
        ] {
            assert_eq!(
                RowKind::detect(row.as_object().unwrap(), None),
                kind,
                "{row}"
            );
        }
    }

    #[test]
    fn sharegpt_is_messages_by_other_names() {
        let row = json!({"system": "S", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}, {"from": "tool", "value": "t"}]});
        let Content::Chat {
            messages,
            tools: None,
        } = read(&row).unwrap()
        else {
            panic!()
        };
        let roles: Vec<&str> = messages.iter().map(Message::role).collect();
        assert_eq!(roles, ["system", "user", "assistant", "tool"]);
        assert_eq!(messages[1].content(), Some("q"));
        assert!(!messages[2].is_supervised());
    }

    #[test]
    fn messages_keep_every_field() {
        let row = json!({"messages": [{"role": "assistant", "content": null, "tool_calls": [{"id": "x"}]}, {"role": "tool", "content": [{"type": "text", "text": "t"}], "tool_call_id": "x"}], "tools": [{"name": "f"}]});
        let Content::Chat { messages, tools } = read(&row).unwrap() else {
            panic!()
        };
        assert_eq!(tools, Some(json!([{"name": "f"}])));
        assert_eq!(serde_json::to_value(&messages).unwrap(), row["messages"]);
        assert_eq!(messages[1].content(), None);
    }

    #[test]
    fn every_wrong_field_of_a_message_is_named() {
        let message =
            |fields: Value| json!({"messages": [{"role": "user", "content": "q"}, fields]});
        let cases = [
            (
                json!({}),
                "the row has no field at all, which is no known kind",
            ),
            (
                json!({"question": "q", "answer": "a"}),
                "the row has \"question\", \"answer\", which is no known kind",
            ),
            (
                json!({"messages": "hi"}),
                "\"messages\" must be a list, but is a text",
            ),
            (json!({"messages": []}), "\"messages\" is empty"),
            (
                message(json!("x")),
                "messages[1] must be an object, but is a text",
            ),
            (
                message(json!({"content": "x"})),
                "messages[1] has no \"role\"; it has \"content\"",
            ),
            (
                message(json!({"role": 3, "content": "x"})),
                "messages[1].role must be a name, but is a number (3)",
            ),
            (
                message(json!({"role": "user"})),
                "messages[1] has no \"content\"; it has \"role\"",
            ),
            (
                message(json!({"role": "user", "content": null})),
                "messages[1].content must be a text or a list of parts, but is null",
            ),
            (
                message(json!({"role": "assistant", "content": 5})),
                "messages[1].content must be a text or a list of parts, but is a number (5)",
            ),
            (
                message(json!({"role": "assistant", "content": "x", "weight": 0.5})),
                "messages[1].weight must be 0 or 1 (or false or true), but is a number (0.5)",
            ),
            (
                message(json!({"role": "assistant", "content": "x", "weight": "0"})),
                "messages[1].weight must be 0 or 1 (or false or true), but is \"0\"",
            ),
            (
                message(json!({"role": "user", "content": "x", "weight": 1})),
                "messages[1] has a \"weight\", but is of the role \"user\"",
            ),
            (
                json!({"messages": [{"role": "user", "content": ""}], "tools": {}}),
                "\"tools\" must be a list of objects, but is an object",
            ),
            (
                json!({"messages": [{"role": "user", "content": ""}], "tools": [1]}),
                "tools[0] must be an object, but is a number",
            ),
        ];
        assert_errors(&cases);
    }

    #[test]
    fn every_wrong_field_of_other_rows_is_named() {
        let turn = |fields: Value| json!({"conversations": [fields]});
        let cases = [
            (
                json!({"conversations": {}}),
                "\"conversations\" must be a list, but is an object",
            ),
            (json!({"conversations": []}), "\"conversations\" is empty"),
            (
                turn(json!([])),
                "conversations[0] must be an object, but is a list",
            ),
            (
                turn(json!({"value": "x"})),
                "conversations[0] has no \"from\"; it has \"value\"",
            ),
            (
                turn(json!({"role": "user", "content": "x"})),
                "rename \"conversations\" to \"messages\"",
            ),
            (
                turn(json!({"from": "bob", "value": "x"})),
                "conversations[0].from is \"bob\"; known are",
            ),
            (
                turn(json!({"from": null, "value": "x"})),
                "conversations[0].from must be a name, but is null",
            ),
            (
                turn(json!({"from": "gpt"})),
                "conversations[0] has no \"value\"; it has \"from\"",
            ),
            (
                turn(json!({"from": "gpt", "value": 1})),
                "conversations[0].value must be a text, but is a number",
            ),
            (
                turn(json!({"from": "human", "value": "q", "weight": 1.0})),
                "conversations[0] has a \"weight\"",
            ),
            (
                json!({"system": 1, "conversations": [{"from": "gpt", "value": "x"}]}),
                "\"system\" must be a text, but is a number",
            ),
            (
                json!({"prompt": 1, "completion": "x"}),
                "\"prompt\" must be a text, but is a number (1)",
            ),
            (
                json!({"prompt": "x", "completion": null}),
                "\"completion\" must be a text, but is null",
            ),
            (
                json!({"prompt": "x", "completion": ""}),
                "\"completion\" is empty",
            ),
            (
                json!({"instruction": "x", "input": [], "output": "y"}),
                "\"input\" must be a text, but is a list",
            ),
            (
                json!({"instruction": "x", "output": ""}),
                "\"output\" is empty",
            ),
            (json!({"text": ""}), "\"text\" is empty"),
            (
                json!({"text": true}),
                "\"text\" must be a text, but is a boolean (true)",
            ),
        ];
        assert_errors(&cases);
    }

    fn assert_errors(cases: &[(Value, &str)]) {
        for (row, expected) in cases {
            let error = read(row).unwrap_err();
            assert!(error.contains(expected), "{row}: {error}");
        }
    }

    #[test]
    fn a_row_of_another_kind_is_told_from_one_that_lacks_a_field() {
        let expect =
            |row: Value| read_row(RowKind::PromptCompletion, row.as_object().unwrap()).unwrap_err();
        assert_eq!(
            expect(json!({"text": "x"})),
            RowProblem::OtherKind("text".into())
        );
        assert_eq!(
            expect(json!({"prompt": "x", "id": 3})),
            RowProblem::Bad("\"completion\" is missing; the row has \"prompt\", \"id\"".into())
        );
    }

    #[test]
    fn a_system_beside_the_messages_comes_first() {
        let row = |system: &str, first: &str| {
            let row = json!({"system": system, "messages": [{"role": first, "content": "S"}, {"role": "assistant", "content": "a"}]});
            read(&row).map(|content| match content {
                Content::Chat { messages, .. } => messages
                    .iter()
                    .map(|message| message.role().to_owned())
                    .collect::<Vec<_>>(),
                _ => panic!(),
            })
        };
        assert_eq!(row("S", "user").unwrap(), ["system", "user", "assistant"]);
        assert_eq!(row("", "user").unwrap(), ["user", "assistant"]);
        assert_eq!(row("S", "system").unwrap(), ["system", "assistant"]);
        assert!(
            row("T", "system")
                .unwrap_err()
                .contains("leave one of them out")
        );
    }

    #[test]
    fn alpacas_system_and_history_are_read() {
        let row =
            json!({"instruction": "i", "output": "o", "system": "S", "history": [["q", "a"]]});
        let Content::Instruction(read_row) = read(&row).unwrap() else {
            panic!()
        };
        assert_eq!(read_row.system.as_deref(), Some("S"));
        assert_eq!(read_row.history, [("q".to_owned(), "a".to_owned())]);
        for (history, expected) in [
            (json!("x"), "\"history\" must be a list of pairs of texts"),
            (json!([["q"]]), "history[0] must be a pair of texts"),
            (json!([["q", "a"], {"q": "a"}]), "history[1] must be a pair"),
        ] {
            let row = json!({"instruction": "i", "output": "o", "history": history});
            let error = read(&row).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}

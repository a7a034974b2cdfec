//! The `tools` of chat requests: what the model may call, and the calls in what it wrote.
//!
//! Each family of models writes calls in a form of its own, and its chat template shows which ([`ToolForm::of_template`]).
//! [`ToolStream`] finds calls in a text that comes in pieces, and [`parse`] in a finished one; any way to cut a text into pieces
//! gives the same. What looks like a call and is none (damaged JSON, a function that the request does not have) stays
//! content, so no text is lost. White space next to a call is left out.

mod stream;
#[cfg(test)]
mod tests;

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::grammar::{Framed, move_references};

pub use stream::ToolStream;

/// A tool of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tool {
    /// What kind of tool it is.
    #[serde(rename = "type")]
    pub kind: ToolKind,
    /// The function.
    pub function: Function,
}

/// The kinds of tools. There is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ToolKind {
    /// A function that the client runs.
    #[default]
    Function,
}

/// A function that a model may call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// What it does, for the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The JSON schema of its arguments; none where it has no arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Value>,
    /// Whether the arguments must follow the schema.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

/// A call that the model wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// By what the answer to it names it.
    pub id: String,
    /// What kind of tool is called.
    #[serde(rename = "type", default)]
    pub kind: ToolKind,
    /// The function and its arguments.
    pub function: CalledFunction,
}

/// A function and its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalledFunction {
    /// Its name.
    pub name: String,
    /// A JSON object as text, as the model wrote it.
    pub arguments: String,
}

/// Whether the model must call a tool.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Value")]
pub enum ToolChoice {
    /// It must not.
    None,
    /// It may.
    #[default]
    Auto,
    /// It must call at least one.
    Required,
    /// It must call this one.
    Named(String),
}

impl TryFrom<Value> for ToolChoice {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match &value {
            Value::String(text) => match text.as_str() {
                "none" => return Ok(Self::None),
                "auto" => return Ok(Self::Auto),
                "required" => return Ok(Self::Required),
                _ => {}
            },
            Value::Object(map) if map.get("type").is_some_and(|kind| kind == "function") => {
                let name = map
                    .get("function")
                    .and_then(|function| function.get("name"));
                if let Some(name) = name.and_then(Value::as_str) {
                    return Ok(Self::Named(name.to_owned()));
                }
            }
            _ => {}
        }
        Err(
            "tool_choice must be \"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}"
                .to_owned(),
        )
    }
}

/// What is wrong with a request's tools.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ToolError {
    /// A name that no function can have.
    #[error(
        "tools[{at}].function.name is {name:?}, and must have 1 to 64 letters, digits, underscores or dashes"
    )]
    Name {
        /// Which of the tools it is.
        at: usize,
        /// Its name.
        name: String,
    },
    /// Two tools with the same name.
    #[error("tools[{at}].function.name is {name:?}, as that of another tool")]
    Twice {
        /// Which of the tools it is.
        at: usize,
        /// Its name.
        name: String,
    },
    /// A schema that is none.
    #[error("tools[{at}].function.parameters must be a JSON schema of an object")]
    Parameters {
        /// Which of the tools it is.
        at: usize,
    },
    /// A tool must be called and there is none.
    #[error("tool_choice is \"required\" and there are no tools")]
    NoTools,
    /// A tool must be called and is not there.
    #[error("tool_choice names {name:?}, which is not among the tools")]
    Unknown {
        /// The name.
        name: String,
    },
}

/// How a model writes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolForm {
    /// Hermes, Qwen 2.5 and 3: `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`, once or several times.
    Hermes,
    /// Llama 3.1 and on: `{"name": …, "parameters": {…}}` at the beginning of the text or behind `<|python_tag|>`, several with `;`
    /// between them.
    Llama,
    /// Mistral up to Small 3: `[TOOL_CALLS][{"name": …, "arguments": {…}}]`. The marker is a special token, which a decoder may leave
    /// out, so such a list at the beginning of the text is taken without it.
    Mistral,
}

impl ToolForm {
    /// The form that a chat template shows; none where it shows none or one that is not known here.
    pub fn of_template(template: &str) -> Option<Self> {
        let has = |text: &str| template.contains(text);
        if has("<tool_call>") {
            // Qwen 3 Coder and GLM write XML between the same markers.
            (!has("<function=") && !has("<arg_key>")).then_some(Self::Hermes)
        } else if has("[TOOL_CALLS]") {
            // Later models of Mistral write the name outside of the JSON.
            (!has("[ARGS]")).then_some(Self::Mistral)
        } else if has("<|python_tag|>") || has("<|start_header_id|>") && has("\"parameters\": ") {
            Some(Self::Llama)
        } else {
            None
        }
    }

    /// What goes before the JSON of a call.
    fn marker(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>",
            Self::Llama => "<|python_tag|>",
            Self::Mistral => "[TOOL_CALLS]",
        }
    }

    /// The key of the arguments.
    fn arguments(self) -> &'static str {
        match self {
            Self::Llama => "parameters",
            Self::Hermes | Self::Mistral => "arguments",
        }
    }
}

/// A text, or the next part of one, and the calls in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parsed {
    /// The text without the calls; none where nothing else is there.
    pub content: Option<String>,
    /// The calls.
    pub calls: Vec<ToolCall>,
}

/// The calls in a finished text, and what else it says. `seed` is what the calls' ids are made of.
pub fn parse(form: ToolForm, tools: &[Tool], seed: u64, text: &str) -> Parsed {
    let mut stream = ToolStream::new(form, tools, seed);
    let mut parsed = stream.push(text);
    let last = stream.finish();
    if let Some(more) = last.content {
        parsed.content.get_or_insert_default().push_str(&more);
    }
    parsed.calls.extend(last.calls);
    parsed
}

/// Checks the tools of a request.
///
/// # Errors
/// If a name cannot be one or stands twice, or if parameters are no schema of an object.
pub fn check(tools: &[Tool]) -> Result<(), ToolError> {
    let mut names = HashSet::new();
    for (at, tool) in tools.iter().enumerate() {
        let name = &tool.function.name;
        let is_sign = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
        if !(1..=64).contains(&name.len()) || !name.bytes().all(is_sign) {
            let name = name.clone();
            return Err(ToolError::Name { at, name });
        }
        if !names.insert(name) {
            let name = name.clone();
            return Err(ToolError::Twice { at, name });
        }
        let parameters = tool.function.parameters.as_ref();
        let is_object = |schema: &Value| {
            let kind = schema.get("type");
            schema.is_object() && kind.is_none_or(|kind| kind == "object")
        };
        if !parameters.is_none_or(is_object) {
            return Err(ToolError::Parameters { at });
        }
    }
    Ok(())
}

/// What the answer must follow where the choice demands a call; none where it does not. `parallel` allows several calls for
/// [`ToolChoice::Required`], as `parallel_tool_calls` of a request does.
///
/// The schema has the parameters of each function at `#/$defs/<name>`, so errors of the grammar name the function.
///
/// # Errors
/// If the tool that must be called is not there.
pub fn forced(
    form: ToolForm,
    tools: &[Tool],
    choice: &ToolChoice,
    parallel: bool,
) -> Result<Option<Framed>, ToolError> {
    let chosen: Vec<&Tool> = match choice {
        ToolChoice::None | ToolChoice::Auto => return Ok(None),
        ToolChoice::Required if tools.is_empty() => return Err(ToolError::NoTools),
        ToolChoice::Required => tools.iter().collect(),
        ToolChoice::Named(name) => {
            let tool = tools.iter().find(|tool| tool.function.name == *name);
            let tool = tool.ok_or_else(|| ToolError::Unknown { name: name.clone() })?;
            vec![tool]
        }
    };
    let several = parallel && *choice == ToolChoice::Required;
    let mut parts = Map::new();
    let mut calls = Vec::new();
    for tool in chosen {
        let name = &tool.function.name;
        let mut parameters = tool.function.parameters.clone().unwrap_or_else(
            || json!({"type": "object", "properties": {}, "additionalProperties": false}),
        );
        if let Value::Object(map) = &mut parameters {
            map.entry("type").or_insert_with(|| "object".into());
        }
        move_references(&mut parameters, &format!("#/$defs/{name}"));
        parts.insert(name.clone(), parameters);
        let key = form.arguments();
        calls.push(json!({
            "type": "object",
            "properties": {"name": {"const": name}, key: {"$ref": format!("#/$defs/{name}")}},
            "required": ["name", key],
            "additionalProperties": false,
        }));
    }
    let call = match calls.pop() {
        Some(only) if calls.is_empty() => only,
        last => {
            calls.extend(last);
            json!({"anyOf": calls})
        }
    };
    let mut schema = match form {
        ToolForm::Hermes | ToolForm::Llama => call,
        ToolForm::Mistral if several => json!({"type": "array", "items": call, "minItems": 1}),
        ToolForm::Mistral => json!({"type": "array", "items": call, "minItems": 1, "maxItems": 1}),
    };
    schema["$defs"] = Value::Object(parts);
    let (before, after, between) = match form {
        ToolForm::Hermes => ("<tool_call>\n", "\n</tool_call>", Some("\n")),
        ToolForm::Llama => ("", "", Some("; ")),
        ToolForm::Mistral => ("[TOOL_CALLS]", "", None),
    };
    Ok(Some(Framed {
        before: before.to_owned(),
        schema,
        after: after.to_owned(),
        between: between.filter(|_| several).map(str::to_owned),
    }))
}

//! Messages in a form that the chat template can write.
//!
//! Two things come in two forms. A tool call's arguments are a JSON text in OpenAI's files and an object in those of
//! `transformers`; a content is a text, or a list of parts. Templates are written for one of them, and many write the
//! other wrongly without an error: arguments as a quoted text within JSON, parts as a list of Python or not at all. So
//! the template is tried: the conversation is rendered in each form with marks in place of the texts of parts, and the
//! first form is taken in which no mark is lost, nothing is printed as Python and no arguments are quoted.

use std::borrow::Cow;

use minijinja::value::{Serde, Value as Jinja};
use serde_json::{Map, Value};

use crate::data::describe::{shown, type_name};
use crate::data::message::Message;
use crate::data::pyjson;
use crate::data::tokenizer::Tokenizer;

/// A conversation that the template writes rightly, and its text.
pub(in crate::data) struct Written<'a> {
    pub(in crate::data) messages: Cow<'a, [Message]>,
    pub(in crate::data) text: String,
    /// Arguments of tool calls had to be given in the other form.
    pub(in crate::data) arguments: bool,
    /// Contents in parts had to be given as texts.
    pub(in crate::data) parts: bool,
}

/// Parts of a content that are no text. This program knows no model that reads them.
const MEDIA: [&str; 10] = [
    "image",
    "image_url",
    "input_image",
    "audio",
    "audio_url",
    "input_audio",
    "video",
    "video_url",
    "file",
    "document",
];

/// Finds the form in which the template writes `messages`; with the generation prompt if `prompt`.
///
/// # Errors
/// Parts that are no text; what the template says where it refuses every form.
pub(in crate::data) fn written<'a>(
    tokenizer: &Tokenizer,
    messages: &'a [Message],
    tools: Option<&Value>,
    prompt: bool,
) -> Result<Written<'a>, String> {
    written_with(tokenizer, messages, tools, prompt, &Map::new())
}

/// The same with variables for the template.
///
/// # Errors
/// As [`written`].
pub(in crate::data) fn written_with<'a>(
    tokenizer: &Tokenizer,
    messages: &'a [Message],
    tools: Option<&Value>,
    prompt: bool,
    variables: &Map<String, Value>,
) -> Result<Written<'a>, String> {
    let has_parts = check_parts(tokenizer, messages)?;
    let has_arguments = messages
        .iter()
        .any(|message| argument_values(message).next().is_some());
    let render = |messages: &[Message]| {
        let text = tokenizer.render_chat_with(messages, tools, prompt, variables);
        text.map_err(|error| error.to_string())
    };
    // The forms to try, as they came first.
    let mut forms = Vec::new();
    // A message of tool calls alone has null for a content, which templates that add texts stumble over.
    for fill in [false, true] {
        for arguments in [Arguments::Given, Arguments::Objects, Arguments::Texts] {
            for as_text in [false, true] {
                forms.push((fill, arguments, as_text));
            }
        }
    }
    let is_possible = |&(fill, arguments, as_text): &(bool, Arguments, bool)| {
        (!fill || messages.iter().any(lacks_content))
            && (arguments == Arguments::Given || has_arguments)
            && (!as_text || has_parts)
    };
    forms.retain(is_possible);
    let mut best: Option<(usize, Written<'a>)> = None;
    let mut refusal = None;
    for (fill, arguments, as_text) in forms {
        if fill && best.is_some() {
            break;
        }
        let is_given = !fill && arguments == Arguments::Given && !as_text;
        let changed: Cow<'a, [Message]> = if is_given {
            Cow::Borrowed(messages)
        } else {
            let change = |message| changed(message, fill, arguments, as_text);
            messages.iter().map(change).collect::<Vec<_>>().into()
        };
        let text = match render(&changed) {
            Ok(text) => text,
            Err(error) => {
                refusal = refusal.or(Some(error));
                continue;
            }
        };
        let amount = wrong(messages, &changed, &text, as_text, &render);
        if best.as_ref().is_none_or(|(least, _)| amount < *least) {
            let written = Written {
                arguments: differs(messages, &changed, arguments_of),
                parts: as_text,
                messages: changed,
                text,
            };
            best = Some((amount, written));
        }
        if amount == 0 {
            break;
        }
    }
    best.map(|(_, written)| written)
        .ok_or_else(|| refusal.unwrap_or_default())
}

fn lacks_content(message: &Message) -> bool {
    let content = message.fields().get("content");
    content.is_none_or(Value::is_null)
}

/// The form in which arguments are handed to the template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arguments {
    Given,
    /// JSON texts as what they hold.
    Objects,
    /// Objects as JSON texts.
    Texts,
}

/// How much of a rendering is wrong: parts that are lost or printed as Python, arguments that are quoted.
fn wrong(
    given: &[Message],
    changed: &[Message],
    text: &str,
    as_text: bool,
    render: &impl Fn(&[Message]) -> Result<String, String>,
) -> usize {
    let arguments = changed.iter().flat_map(argument_values);
    let quoted = arguments.filter_map(Value::as_str).flat_map(quoted);
    let mut amount = quoted.filter(|bad| text.contains(bad)).count();
    // Marks instead of the texts: a short text could stand elsewhere by chance.
    let mut marks = Vec::new();
    let marked: Vec<Message> = given
        .iter()
        .zip(changed)
        .map(|(given, changed)| marked(given, changed, as_text, &mut marks))
        .collect();
    if marks.is_empty() {
        return amount;
    }
    let Ok(text) = render(&marked) else {
        // The template looks into the texts; what came out with the real ones has to do.
        return amount;
    };
    amount += marks.iter().filter(|mark| !text.contains(*mark)).count();
    let python = marked.iter().filter_map(first_part_in_python);
    amount + 1000 * python.filter(|bad| text.contains(bad)).count()
}

/// The message with a mark in place of each part's text; the marks are added to the list.
fn marked(given: &Message, changed: &Message, as_text: bool, marks: &mut Vec<String>) -> Message {
    let Some(parts) = parts_of(given) else {
        return changed.clone();
    };
    let mut mark = || {
        let mark = format!("qz{}zq", marks.len());
        marks.push(mark.clone());
        mark
    };
    if as_text {
        let texts: Vec<String> = parts.iter().map(|_| mark()).collect();
        return changed.with("content", texts.join("\n").into());
    }
    let parts = parts.iter().map(|part| match part {
        Value::Object(fields) => {
            let mut fields = fields.clone();
            fields.insert("text".to_owned(), mark().into());
            Value::Object(fields)
        }
        _ => mark().into(),
    });
    changed.with("content", parts.collect::<Vec<Value>>().into())
}

fn differs(given: &[Message], changed: &[Message], of: impl Fn(&Message) -> Vec<&Value>) -> bool {
    given.iter().zip(changed).any(|(a, b)| of(a) != of(b))
}

/// Whether there are contents in parts.
///
/// # Errors
/// For a part that is no text, unless the template says that it knows its type.
fn check_parts(tokenizer: &Tokenizer, messages: &[Message]) -> Result<bool, String> {
    let mut found = false;
    for (at, message) in messages.iter().enumerate() {
        let parts = parts_of(message);
        found |= parts.is_some();
        for (number, part) in parts.unwrap_or_default().iter().enumerate() {
            if text_of(part).is_some() {
                continue;
            }
            let place = format!("messages[{at}].content[{number}]");
            let Some(kind) = part.get("type").and_then(Value::as_str) else {
                return Err(format!(
                    "{place} must be a text or a part such as {{\"type\": \"text\", \"text\": …}}, but is {}",
                    type_name(part)
                ));
            };
            if MEDIA.contains(&kind) {
                return Err(format!(
                    "{place} is of the type {kind:?}, and the model reads text alone; leave such parts out"
                ));
            }
            if kind == "text" {
                let found = part.get("text").map_or("missing".to_owned(), shown);
                return Err(format!("{place}.text must be a text, but is {found}"));
            }
            if !tokenizer.template_has_text(kind) {
                return Err(format!(
                    "{place} is of the type {kind:?}, which this chat template does not write; put reasoning into \
                     \"reasoning_content\" of the message, calls into \"tool_calls\", results into messages of the role \
                     \"tool\", or leave the part out"
                ));
            }
        }
    }
    Ok(found)
}

fn parts_of(message: &Message) -> Option<&[Value]> {
    message
        .fields()
        .get("content")
        .and_then(Value::as_array)
        .map(Vec::as_slice)
}

/// The text of a part: `{"type": "text", "text": …}`, the same without a type, or a plain text.
fn text_of(part: &Value) -> Option<&str> {
    let kind = part.get("type").and_then(Value::as_str);
    match part {
        Value::String(text) => Some(text),
        Value::Object(fields)
            if matches!(kind, None | Some("text" | "input_text" | "output_text")) =>
        {
            fields.get("text")?.as_str()
        }
        _ => None,
    }
}

/// How a template would print the first part of a content that it takes for a text.
fn first_part_in_python(message: &Message) -> Option<String> {
    let part = parts_of(message)?.first()?;
    part.is_object()
        .then(|| Jinja::from(Serde(part)).to_string())
}

/// A text as a string of JSON, the way `json.dumps` writes it.
fn quoted(text: &str) -> [String; 2] {
    [false, true].map(|ensure_ascii| {
        let style = pyjson::Style {
            ensure_ascii,
            ..pyjson::Style::default()
        };
        pyjson::dumps(&Value::from(text), &style)
    })
}

/// The arguments of a message's tool calls.
fn arguments_of(message: &Message) -> Vec<&Value> {
    let calls = message.fields().get("tool_calls").and_then(Value::as_array);
    let calls = calls.into_iter().flatten();
    let functions = calls.map(|call| call.get("function").unwrap_or(call));
    functions
        .chain(message.fields().get("function_call"))
        .filter_map(|function| function.get("arguments"))
        .collect()
}

/// Those that have another form.
fn argument_values(message: &Message) -> impl Iterator<Item = &Value> {
    arguments_of(message)
        .into_iter()
        .filter(|arguments| object_of(arguments).is_some() || arguments.is_object())
}

/// How many arguments are texts that hold no JSON.
pub(super) fn unreadable_arguments(message: &Message) -> usize {
    let texts = arguments_of(message).into_iter().filter_map(Value::as_str);
    texts
        .filter(|text| serde_json::from_str::<Value>(text).is_err())
        .count()
}

/// The object that a JSON text holds.
fn object_of(arguments: &Value) -> Option<Value> {
    let object: Map<String, Value> = serde_json::from_str(arguments.as_str()?).ok()?;
    Some(Value::Object(object))
}

fn in_form(arguments: &Value, form: Arguments) -> Option<Value> {
    match form {
        Arguments::Objects => object_of(arguments),
        Arguments::Texts if arguments.is_object() => Some(Value::from(pyjson::dumps(
            arguments,
            &pyjson::Style::default(),
        ))),
        Arguments::Given | Arguments::Texts => None,
    }
}

fn changed(message: &Message, fill: bool, arguments: Arguments, as_text: bool) -> Message {
    let mut message = message.clone();
    if fill && lacks_content(&message) {
        message = message.with("content", "".into());
    }
    if as_text && let Some(list) = parts_of(&message) {
        let texts: Option<Vec<&str>> = list.iter().map(text_of).collect();
        if let Some(texts) = texts {
            // As llama.cpp and vLLM join them for such templates.
            let text = texts.join("\n");
            message = message.with("content", text.into());
        }
    }
    if arguments == Arguments::Given {
        return message;
    }
    let change = |function: &mut Value| {
        if let Some(given) = function.get_mut("arguments")
            && let Some(other) = in_form(given, arguments)
        {
            *given = other;
        }
    };
    if let Some(Value::Array(calls)) = message.fields().get("tool_calls") {
        let mut calls = calls.clone();
        for call in &mut calls {
            match call.get_mut("function") {
                Some(function) => change(function),
                None => change(call),
            }
        }
        message = message.with("tool_calls", calls.into());
    }
    if let Some(call) = message.fields().get("function_call") {
        let mut call = call.clone();
        change(&mut call);
        message = message.with("function_call", call);
    }
    message
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::fixture;

    const AS_TEXT: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}{{ '<|im_end|>' }}{% endfor %}";
    const AS_PARTS: &str = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}";
    const CALLS: &str = "{% for m in messages %}{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}{% endfor %}{% endfor %}";
    const CALLS_AS_TEXT: &str = "{% for m in messages %}{% for c in m.tool_calls %}{{ '(' + c.function.arguments + ')' }}{% endfor %}{% endfor %}";
    const CALLS_EITHER: &str = "{% for m in messages %}{% for c in m.tool_calls %}{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}{% endfor %}{% endfor %}";

    fn write(template: &str, messages: &Value) -> Result<(String, bool, bool), String> {
        let tokenizer = fixture::with_template(Some(template));
        let messages: Vec<Message> = serde_json::from_value(messages.clone()).unwrap();
        let written = written(&tokenizer, &messages, None, false)?;
        Ok((written.text, written.arguments, written.parts))
    }

    #[test]
    fn parts_are_given_as_text_to_a_template_that_writes_texts() {
        let parts = |list: Value| json!([{"role": "user", "content": list}]);
        let one = parts(json!([{"type": "text", "text": "Hi"}]));
        let written = |text: &str, parts| Ok((text.to_owned(), false, parts));
        assert_eq!(
            write(AS_TEXT, &one),
            written("<|im_start|>user\nHi<|im_end|>", true)
        );
        assert_eq!(write(AS_PARTS, &one), written("[Hi]", false));
        let two = parts(json!([{"type": "text", "text": "a"}, {"text": "b"}, "c"]));
        assert_eq!(
            write(AS_TEXT, &two),
            written("<|im_start|>user\na\nb\nc<|im_end|>", true)
        );
        // A template that adds texts, and one that leaves out what is no text.
        for template in [
            "{% for m in messages %}{{ m.content + '' }}{% endfor %}",
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}",
            "{% for m in messages %}{{ m.content | trim }}{% endfor %}",
        ] {
            assert_eq!(write(template, &one), written("Hi", true), "{template}");
        }
    }

    #[test]
    fn parts_that_are_no_text_are_named() {
        for (part, expected) in [
            (
                json!({"type": "image_url", "image_url": {}}),
                "messages[0].content[1] is of the type \"image_url\", and the model reads text alone",
            ),
            (
                json!({"type": "text"}),
                "messages[0].content[1].text must be a text, but is missing",
            ),
            (json!(3), "messages[0].content[1] must be a text or a part"),
            (
                json!({"type": "thinking", "thinking": "hm"}),
                "is of the type \"thinking\", which this chat template does not write",
            ),
        ] {
            let messages =
                json!([{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]);
            let error = write(AS_TEXT, &messages).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn arguments_are_given_in_the_form_that_the_template_writes() {
        let call = |arguments: Value| json!([{"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]}]);
        let object = call(json!({"city": "Oslo"}));
        let text = call(json!("{\"city\":\"Oslo\"}"));
        let written = |text: &str, arguments| Ok((text.to_owned(), arguments, false));
        let json = r#"{"name": "f", "arguments": {"city": "Oslo"}}"#;
        assert_eq!(write(CALLS, &object), written(json, false));
        assert_eq!(write(CALLS, &text), written(json, true));
        assert_eq!(
            write(CALLS_AS_TEXT, &text),
            written("({\"city\":\"Oslo\"})", false)
        );
        assert_eq!(
            write(CALLS_AS_TEXT, &object),
            written("({\"city\": \"Oslo\"})", true)
        );
        // A template that knows both forms gets what is there.
        assert_eq!(
            write(CALLS_EITHER, &text),
            written("{\"city\":\"Oslo\"}", false)
        );
        assert_eq!(
            write(CALLS_EITHER, &object),
            written("{\"city\": \"Oslo\"}", false)
        );
        // What is no JSON is a text.
        let plain = call(json!("Oslo"));
        assert_eq!(
            write(CALLS, &plain),
            written(r#"{"name": "f", "arguments": "Oslo"}"#, false)
        );
    }

    #[test]
    fn a_short_text_is_not_taken_for_another_one() {
        // As Qwen 3: what is no text is left out.
        let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}";
        let messages = json!([{"role": "user", "content": "A or B?"}, {"role": "assistant", "content": [{"type": "text", "text": "B"}]}]);
        let (text, _, parts) = write(template, &messages).unwrap();
        assert!(text.ends_with("assistant\nB<|im_end|>"), "{text}");
        assert!(parts);
    }

    #[test]
    fn arguments_of_both_forms_become_one() {
        let call = |arguments: Value| json!({"function": {"name": "f", "arguments": arguments}});
        let messages = json!([{"role": "assistant", "tool_calls": [call(json!("{\"a\": 1}")), call(json!({"b": 2}))]}]);
        let (text, arguments, _) = write(CALLS, &messages).unwrap();
        assert_eq!(
            text,
            r#"{"name": "f", "arguments": {"a": 1}}{"name": "f", "arguments": {"b": 2}}"#
        );
        assert!(arguments);
    }

    #[test]
    fn a_content_that_is_null_or_without_parts_is_empty() {
        let template = "{% for m in messages %}{{ '[' + m.content + ']' }}{% for c in m.tool_calls %}{{ c.name }}{% endfor %}{% endfor %}";
        let messages = json!([{"role": "user", "content": []}, {"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]}]);
        assert_eq!(write(template, &messages).unwrap().0, "[][]f");
        let messages =
            json!([{"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]}]);
        assert_eq!(write(template, &messages).unwrap().0, "[]f");
    }
}

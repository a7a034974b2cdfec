//! A chat template, rendered as `transformers` renders it.
//!
//! Templates are Jinja2 written against `transformers`' environment: `trim_blocks`, `lstrip_blocks`, `break` and
//! `continue`, Python's methods on strings and dictionaries, `raise_exception`, `strftime_now`, a `tojson` that writes
//! as `json.dumps`, and the special tokens as variables. `{% generation %}` blocks only mark a span there, so they
//! render as their content here.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja};
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::{Map, Value};

use super::dates::{seconds_since_1970, strftime};
use super::error::DataError;
use super::pyjson;
use super::rows::Message;

const NAME: &str = "chat_template";

/// The compiled template or templates of a tokenizer.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    /// A second one for conversations with tools, where the tokenizer has one under the name `tool_use`.
    with_tools: bool,
    /// `bos_token`, `eos_token` and so on.
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles `source`, and `tool_use` for conversations that offer tools.
    pub(super) fn new(
        source: &str,
        tool_use: Option<&str>,
        special_tokens: Vec<(String, String)>,
    ) -> Result<Self, DataError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|error| DataError::Template(error.to_string()))?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        // Chat text is not HTML.
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Jinja, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        add_date(&mut environment, seconds_since_1970());
        environment.add_filter(
            "tojson",
            |value: &Jinja, ascii: Option<bool>, options: Kwargs| tojson(value, ascii, &options),
        );
        let compile =
            |error: Error| DataError::Template(format!("cannot be read: {}", describe(&error)));
        environment
            .add_template_owned(NAME, without_generation_marks(source))
            .map_err(compile)?;
        if let Some(tool_use) = tool_use {
            environment
                .add_template_owned("tool_use", without_generation_marks(tool_use))
                .map_err(compile)?;
        }
        Ok(Self {
            environment,
            with_tools: tool_use.is_some(),
            special_tokens,
        })
    }

    /// From now on `strftime_now` gives the date of `seconds` since 1970.
    pub(super) fn set_date(&mut self, seconds: i64) {
        add_date(&mut self.environment, seconds);
    }

    /// The text of `messages`, with the header of an assistant's turn behind it if `add_generation_prompt`.
    pub(super) fn render(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, DataError> {
        let name = if self.with_tools && tools.is_some() {
            "tool_use"
        } else {
            NAME
        };
        let messages: Vec<Map<String, Value>> = messages.iter().map(for_template).collect();
        let special: Map<String, Value> = self
            .special_tokens
            .iter()
            .map(|(name, text)| (name.clone(), Value::from(text.as_str())))
            .collect();
        let variables = context! {
            messages => Jinja::from(Serde(&messages)),
            tools => Jinja::from(Serde(tools)),
            documents => (),
            add_generation_prompt,
            ..Jinja::from(Serde(&special))
        };
        self.environment
            .get_template(name)
            .and_then(|template| template.render(variables))
            .map_err(|error| DataError::Template(describe(&error)))
    }
}

fn add_date(environment: &mut Environment<'static>, seconds: i64) {
    environment.add_function("strftime_now", move |format: &str| {
        strftime(format, seconds).map_err(|code| {
            let message = format!("strftime_now: the format %{code} is not supported");
            Error::new(ErrorKind::InvalidOperation, message)
        })
    });
}

/// A message as `transformers` hands it to a template: null fields left out, and a reasoning found under one of its
/// names given under the others. `weight` speaks to the trainer, so the template does not see it.
fn for_template(message: &Message) -> Map<String, Value> {
    let mut fields: Map<String, Value> = message
        .fields()
        .iter()
        .filter(|(name, value)| !value.is_null() && *name != "weight")
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|name| fields.get(*name))
        .cloned();
    if let Some(reasoning) = reasoning {
        fields
            .entry("thinking")
            .or_insert_with(|| reasoning.clone());
        fields.insert("reasoning_content".into(), reasoning);
    }
    fields
}

/// `{% generation %}` and `{% endgeneration %}` become a block that is always shown, whitespace control and all.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let inside = &tag[2..end];
        let word = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        match replacement {
            Some(replacement) => {
                out.push_str("{%");
                out.push_str(&inside.replace(word, replacement));
                out.push_str("%}");
            }
            None => out.push_str(&tag[..end + 2]),
        }
        rest = &tag[end + 2..];
    }
    out.push_str(rest);
    out
}

fn describe(error: &Error) -> String {
    let place = error
        .line()
        .map(|line| format!(" (line {line} of the template)"))
        .unwrap_or_default();
    match error.detail() {
        // What a template says through raise_exception is meant for the user as it is.
        Some(detail) if error.kind() == ErrorKind::InvalidOperation => format!("{detail}{place}"),
        Some(detail) => format!("{}: {detail}{place}", error.kind()),
        None => format!("{}{place}", error.kind()),
    }
}

fn tojson(value: &Jinja, positional: Option<bool>, options: &Kwargs) -> Result<Jinja, Error> {
    let json = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, format!("tojson: {error}")))?;
    let indent = match options.get::<Option<Jinja>>("indent")? {
        Some(value) if value.is_none() || value.is_undefined() => None,
        Some(value) => match value.as_str() {
            Some(text) => Some(text.to_owned()),
            None => Some(
                " ".repeat(
                    usize::try_from(value.as_i64().unwrap_or(0).max(0))
                        .unwrap_or(0)
                        .min(64),
                ),
            ),
        },
        None => None,
    };
    let separators = match options.get::<Option<Vec<String>>>("separators")? {
        Some(pair) => match <[String; 2]>::try_from(pair) {
            Ok([item, key]) => Some((item, key)),
            Err(_) => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    "tojson: separators are two texts",
                ));
            }
        },
        None => None,
    };
    let style = pyjson::Style {
        indent,
        ensure_ascii: options
            .get::<Option<bool>>("ensure_ascii")?
            .or(positional)
            .unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        separators,
    };
    options.assert_all_used()?;
    Ok(Jinja::from(pyjson::dumps(&json, &style)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render_with(
        template: &str,
        messages: &Value,
        tools: Option<&Value>,
    ) -> Result<String, DataError> {
        let messages: Vec<Message> = serde_json::from_value(messages.clone()).unwrap();
        let special = vec![("bos_token".to_owned(), "<s>".to_owned())];
        ChatTemplate::new(template, None, special)?.render(&messages, tools, true)
    }

    fn render(template: &str) -> String {
        render_with(
            template,
            &json!([{"role": "user", "content": " Hi there "}]),
            None,
        )
        .unwrap()
    }

    #[test]
    fn blocks_leave_no_lines_behind() {
        let template = "{{ bos_token }}\n{% for message in messages %}\n    {% if true %}\n{{ message.role }}\n    {% endif %}\n{% endfor %}\n";
        assert_eq!(render(template), "<s>\nuser\n");
        assert_eq!(render("a\n  {%- if true +%}\nb{% endif %}\n"), "a\nb");
        assert_eq!(
            render("{{ eos_token }}|{{ tools is none }}|{{ documents is none }}"),
            "|True|True"
        );
    }

    #[test]
    fn python_methods_and_loop_controls_work() {
        assert_eq!(
            render("{{ messages[0].content.strip().upper().split(' ')[-1] }}"),
            "THERE"
        );
        assert_eq!(
            render("{{ messages[0].get('name', 'none') }}{{ messages[0].items() | length }}"),
            "none2"
        );
        assert_eq!(
            render(
                "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
            ),
            "023"
        );
        assert_eq!(
            render(
                "{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
            ),
            "2"
        );
        assert_eq!(
            render("{{ messages[0]['content'][::-1] }}{{ messages[::-1][0].role }}"),
            " ereht iH user"
        );
        assert_eq!(
            render("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') }}"),
            "<a>"
        );
        assert_eq!(
            render("{{ {'a': none, 'b': [true, 1.0, 'x']} }}"),
            "{'a': None, 'b': [True, 1.0, 'x']}"
        );
    }

    #[test]
    fn json_is_pythons() {
        let value = "{'b': ['<é>', 1.0, none], 'a': {}}";
        assert_eq!(
            render(&format!("{{{{ {value} | tojson }}}}")),
            r#"{"b": ["<é>", 1.0, null], "a": {}}"#
        );
        assert_eq!(
            render(&format!("{{{{ {value} | tojson(indent=2) }}}}")),
            "{\n  \"b\": [\n    \"<é>\",\n    1.0,\n    null\n  ],\n  \"a\": {}\n}"
        );
        assert_eq!(
            render(&format!(
                "{{{{ {value} | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}}}"
            )),
            r#"{"a":{},"b":["<\u00e9>",1.0,null]}"#
        );
    }

    #[test]
    fn tools_pass_through_in_their_order() {
        let tools =
            json!([{"type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": 2}}}]);
        let text = render_with(
            "{% for t in tools %}{{ t | tojson }}{% endfor %}",
            &json!([]),
            Some(&tools),
        )
        .unwrap();
        assert_eq!(
            text,
            r#"{"type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": 2}}}"#
        );
    }

    #[test]
    fn null_fields_and_weights_are_not_seen_and_reasoning_has_all_its_names() {
        let messages =
            json!([{"role": "assistant", "content": null, "weight": 0, "reasoning": "hm"}]);
        let text = render_with("{{ messages[0] | tojson }}", &messages, None).unwrap();
        assert_eq!(
            text,
            r#"{"role": "assistant", "reasoning": "hm", "thinking": "hm", "reasoning_content": "hm"}"#
        );
    }

    #[test]
    fn what_a_template_refuses_is_said_in_its_words() {
        let error = render_with(
            "\n{{ raise_exception('Roles must alternate') }}",
            &json!([]),
            None,
        )
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "chat template: Roles must alternate (line 2 of the template)"
        );
        let error = render_with(
            "{{ messages[0].content + 1 }}",
            &json!([{"role": "user", "content": "x"}]),
            None,
        );
        assert!(
            error
                .unwrap_err()
                .to_string()
                .starts_with("chat template: ")
        );
    }

    #[test]
    fn generation_marks_only_mark() {
        let template = "{%- for m in messages -%} {% generation %}\n{{ m.content }}{%- endgeneration %}\n!{% endfor %}";
        assert_eq!(render(template), " Hi there !");
        assert_eq!(
            without_generation_marks("{%- generation -%}x{%endgeneration%}{% if a"),
            "{%- if true -%}x{%endif%}{% if a"
        );
    }

    #[test]
    fn the_date_can_be_asked() {
        assert_eq!(render("{{ strftime_now('%%') }}"), "%");
    }

    #[test]
    fn the_date_can_be_set() {
        let source = "{{ strftime_now('%d %b %Y') }}";
        let mut template = ChatTemplate::new(source, None, Vec::new()).unwrap();
        template.set_date(86_400);
        assert_eq!(template.render(&[], None, false).unwrap(), "02 Jan 1970");
    }
}

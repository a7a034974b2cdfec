//! A chat template, rendered as `transformers` renders it.
//!
//! Templates are Jinja2 written against `transformers`' environment: `trim_blocks`, `lstrip_blocks`, `break` and
//! `continue`, Python's methods on strings and dictionaries, `raise_exception`, `strftime_now`, a `tojson` that writes
//! as `json.dumps`, and the special tokens as variables. `{% generation %}` blocks only mark a span there, so they
//! render as their content here.

use std::borrow::Cow;
use std::collections::HashSet;

use indexmap::IndexMap;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja};
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::{Map, Value};

use super::dates::{seconds_since_1970, strftime};
use super::error::DataError;
use super::jinja2;
use super::message::{MARKS, Message};
use super::pyjson;

pub(super) const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Templates by name, as a tokenizer's files have them. `default` is the usual one; `tool_use` is that of conversations
/// with tools where it is there.
#[derive(Debug, Default)]
pub(super) struct Templates {
    sources: IndexMap<String, String>,
    /// There is a chat_template.json, which `transformers` reads for multimodal processors alone.
    pub(super) only_of_a_processor: bool,
}

impl Templates {
    pub(super) fn add(&mut self, name: &str, source: String) {
        self.sources.insert(name.to_owned(), source);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }
}

/// The compiled template or templates of a tokenizer.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    names: Vec<String>,
    /// Every word of the sources.
    words: HashSet<String>,
    /// The sources, one behind the other.
    text: String,
    /// `bos_token`, `eos_token` and so on.
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles the templates; nothing where there is none.
    pub(super) fn new(
        templates: Templates,
        special_tokens: Vec<(String, String)>,
    ) -> Result<Option<Self>, DataError> {
        if templates.is_empty() {
            return Ok(None);
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|error| DataError::Template(error.to_string()))?);
        // Chat text is not HTML.
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Jinja, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        jinja2::add_to(&mut environment);
        add_date(&mut environment, seconds_since_1970());
        environment.add_filter(
            "tojson",
            |value: &Jinja, ascii: Option<bool>, options: Kwargs| tojson(value, ascii, &options),
        );
        let (mut names, mut words, mut text) = (Vec::new(), HashSet::new(), String::new());
        for (name, source) in templates.sources {
            if source.starts_with('\u{FEFF}') {
                tracing::warn!(
                    "the chat template begins with a byte order mark, which every conversation then begins with, too, as in \
                     transformers; remove it unless the model was trained so"
                );
            }
            words.extend(words_of(&source).map(str::to_owned));
            text.push_str(&source);
            let source = without_generation_marks(&with_unix_line_ends(&source));
            environment
                .add_template_owned(name.clone(), source)
                .map_err(|error| {
                    DataError::Template(format!("cannot be read: {}", describe(&error)))
                })?;
            names.push(name);
        }
        Ok(Some(Self {
            environment,
            names,
            words,
            text,
            special_tokens,
        }))
    }

    /// Whether a source has `text` in quotes.
    pub(super) fn has_text(&self, text: &str) -> bool {
        self.text.contains(&format!("'{text}'")) || self.text.contains(&format!("\"{text}\""))
    }

    /// The template's source.
    pub(super) fn source(&self) -> &str {
        &self.text
    }

    pub(super) fn has_tool_use(&self) -> bool {
        self.names.iter().any(|name| name == TOOL_USE)
    }

    /// Whether a source has `word`: a field of that name may be read.
    pub(super) fn mentions(&self, word: &str) -> bool {
        self.words.contains(word)
    }

    /// From now on `strftime_now` gives the date of `seconds` since 1970.
    pub(super) fn set_date(&mut self, seconds: i64) {
        add_date(&mut self.environment, seconds);
    }

    /// The text of `messages`, with the header of an assistant's turn behind it if `add_generation_prompt`. The template
    /// sees `variables`, too, where it has none of these names.
    pub(super) fn render(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
        variables: &Map<String, Value>,
    ) -> Result<String, DataError> {
        let has = |name: &str| self.names.iter().any(|known| known == name);
        let name = match tools {
            Some(_) if has(TOOL_USE) => TOOL_USE,
            _ if has(DEFAULT) => DEFAULT,
            _ => {
                return Err(DataError::Template(format!(
                    "the model has several and none of them is the default; their names are {}: name one \"default\"",
                    self.names.join(", ")
                )));
            }
        };
        let messages: Vec<Map<String, Value>> = messages.iter().map(for_template).collect();
        let special = self
            .special_tokens
            .iter()
            .map(|(name, text)| (name.clone(), Value::from(text.as_str())));
        let mut others = variables.clone();
        others.extend(special);
        let variables = context! {
            messages => Jinja::from(Serde(&messages)),
            tools => Jinja::from(Serde(tools)),
            documents => Jinja::from(Serde(variables.get("documents"))),
            add_generation_prompt,
            ..Jinja::from(Serde(&others))
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
/// names given under the others. `weight` and its like speak to the trainer, so the template does not see them.
fn for_template(message: &Message) -> Map<String, Value> {
    let mut fields: Map<String, Value> = message
        .fields()
        .iter()
        .filter(|(name, value)| !value.is_null() && !MARKS.contains(&name.as_str()))
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

fn words_of(source: &str) -> impl Iterator<Item = &str> {
    source
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
}

/// Jinja2 reads every end of a line as `\n`.
fn with_unix_line_ends(source: &str) -> Cow<'_, str> {
    if source.contains('\r') {
        source.replace("\r\n", "\n").replace('\r', "\n").into()
    } else {
        source.into()
    }
}

/// `{% generation %}` and `{% endgeneration %}` become a block that is always shown, whitespace control and all. What stands
/// in `{% raw %}` stays as it is.
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
        if word == "raw" {
            // Jinja2 keeps the end of the line behind this tag; the renderer here drops one.
            if !inside.ends_with('-') && rest.starts_with('\n') {
                out.push('\n');
            }
            let end = rest.find("endraw").unwrap_or(rest.len());
            let end = rest[..end].rfind("{%").unwrap_or(rest.len());
            out.push_str(&rest[..end]);
            rest = &rest[end..];
        }
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
    if jinja2::has_undefined(value) {
        return Err(Error::new(
            ErrorKind::UndefinedError,
            "tojson: a value is undefined",
        ));
    }
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
        let mut templates = Templates::default();
        templates.add(DEFAULT, template.to_owned());
        let template = ChatTemplate::new(templates, special)?.unwrap();
        template.render(&messages, tools, true, &Map::new())
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
    fn undefined_values_and_texts_are_what_they_are_in_jinja2() {
        for (template, expected) in [
            (
                "{{ tools is iterable }}{{ nothing is iterable }}{{ 'a' is iterable }}{{ 1 is iterable }}",
                "FalseTrueTrueFalse",
            ),
            (
                "{% if tools is iterable and tools | length > 0 %}x{% endif %}y",
                "y",
            ),
            (
                "{{ nothing | length }}{{ nothing | count }}{{ 'ab' | length }}{{ [1] | length }}",
                "0021",
            ),
            (
                "{{ 'a' is sequence }}{{ [] is sequence }}{{ {} is sequence }}{{ 1 is sequence }}{{ nothing is sequence }}",
                "TrueTrueTrueFalseTrue",
            ),
            (
                "{{ 'a.b.c'.rsplit('.', 1) }}{{ ' a  b '.rsplit() }}{{ 'a b c'.rsplit(none, 1) }}",
                "['a.b', 'c']['a', 'b']['a b', 'c']",
            ),
            (
                "{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('bc') }}{{ 'abc'.removeprefix('x') }}",
                "bcaabc",
            ),
            (
                "{{ 'a=b=c'.partition('=') | list }}{{ 'a=b=c'.rpartition('=') | list }}{{ 'a'.partition('=') | list }}",
                "['a', '=', 'b=c']['a=b', '=', 'c']['a', '', '']",
            ),
            ("{{ 'a b  c' | wordcount }}", "3"),
            (
                "{% raw %}\n{{ x }}\n{% generation %}{% endraw %}\ny",
                "\n{{ x }}\n{% generation %}y",
            ),
            ("{%- raw -%}\n{{ x }}{%- endraw -%}\ny", "{{ x }}y"),
        ] {
            assert_eq!(render(template), expected, "{template}");
        }
        for (template, expected) in [
            (
                "{{ 1e-5 }} {{ 1e16 }} {{ 0.5 }} {{ 100.0 }}",
                "1e-05 1e+16 0.5 100.0",
            ),
            (
                "{{ [2e-5, 'a', none] }} {{ {'k': 1e17} | string }}",
                "[2e-05, 'a', None] {'k': 1e+17}",
            ),
            ("{{ '<a href=\"/x\">' | e }}", "&lt;a href=&#34;/x&#34;&gt;"),
            (
                "{{ 'a\nb\n\nc' | indent }}|{{ 'a\nb' | indent(2, true) }}|{{ 'a\nb' | indent(width='> ') }}",
                "a\n    b\n\n    c|  a\n  b|a\n> b",
            ),
        ] {
            assert_eq!(render(template), expected, "{template}");
        }
        for (template, expected) in [
            ("{{ nothing | tojson }}", "undefined"),
            ("{{ {'a': messages[0].nothing} | tojson }}", "undefined"),
            ("{{ 'x' | indent(99999999999) }}", "at most 1000"),
            (
                "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
                "fuel",
            ),
        ] {
            let error = render_with(template, &json!([{"role": "user"}]), None).unwrap_err();
            assert!(error.to_string().contains(expected), "{template}: {error}");
        }
        let error = render_with("{{ tools | length }}", &json!([]), None).unwrap_err();
        assert!(
            error.to_string().contains("cannot calculate length"),
            "{error}"
        );
    }

    #[test]
    fn the_date_can_be_asked() {
        assert_eq!(render("{{ strftime_now('%%') }}"), "%");
    }

    #[test]
    fn the_date_can_be_set() {
        let source = "{{ strftime_now('%d %b %Y') }}";
        let mut templates = Templates::default();
        templates.add(DEFAULT, source.to_owned());
        let mut template = ChatTemplate::new(templates, Vec::new()).unwrap().unwrap();
        template.set_date(86_400);
        assert_eq!(
            template.render(&[], None, false, &Map::new()).unwrap(),
            "02 Jan 1970"
        );
    }
}

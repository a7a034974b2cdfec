//! A chat template, rendered as `transformers` renders it.
//!
//! Templates are Jinja2 written against `transformers`' environment: `trim_blocks`, `lstrip_blocks`, `break` and
//! `continue`, Python's methods on strings and dictionaries, `raise_exception`, `strftime_now`, a `tojson` that writes
//! as `json.dumps`, and the special tokens as variables. `{% generation %}` blocks only mark a span there, so they
//! render as their content here.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja};
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::{Map, Value};

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
        let now = seconds_since_1970();
        environment.add_function("strftime_now", move |format: &str| strftime(format, now));
        environment.add_filter("tojson", tojson);
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
                out.push_str(&format!("{{%{}%}}", inside.replace(word, replacement)))
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

fn tojson(value: &Jinja, positional: Option<bool>, options: Kwargs) -> Result<Jinja, Error> {
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

/// Now, in seconds; taken when the template is compiled, so that one run renders one date.
fn seconds_since_1970() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(0))
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// The formats of dates that chat templates use, in UTC: there is no safe way to ask the system for its time zone.
fn strftime(format: &str, seconds: i64) -> Result<String, Error> {
    let (day, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, date) = civil(day);
    let hour = second / 3600;
    let hour12 = (hour + 11) % 12 + 1;
    let month_name = MONTHS[(month - 1) as usize];
    let day_name = DAYS[(day + 4).rem_euclid(7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = chars.next();
        let plain = code == Some('-');
        if plain {
            code = chars.next();
        }
        let number = |value: i64| {
            if plain {
                value.to_string()
            } else {
                format!("{value:02}")
            }
        };
        out.push_str(&match code {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100),
            Some('m') => number(month),
            Some('d') => number(date),
            Some('e') => format!("{date:2}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => number(hour),
            Some('I') => number(hour12),
            Some('M') => number(second / 60 % 60),
            Some('S') => number(second % 60),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('j') => format!("{:03}", day - days_before(year) + 1),
            Some('F') => format!("{year}-{month:02}-{date:02}"),
            Some('T') => format!("{hour:02}:{:02}:{:02}", second / 60 % 60, second % 60),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let code = other.map(String::from).unwrap_or_default();
                let message = format!("strftime_now: the format %{code} is not supported");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        });
    }
    Ok(out)
}

/// Days from 1970-01-01 to the first of January of `year`.
fn days_before(year: i64) -> i64 {
    let y = year - 1;
    365 * (year - 1970) + (y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400)) - 477
}

/// Year, month and day of a day counted from 1970-01-01 in the Gregorian calendar.
fn civil(day: i64) -> (i64, i64, i64) {
    let mut year = 1970 + day.div_euclid(366);
    while days_before(year + 1) <= day {
        year += 1;
    }
    let leap = days_before(year + 1) - days_before(year) == 366;
    let mut left = day - days_before(year);
    for (at, length) in [
        31,
        if leap { 29 } else { 28 },
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ]
    .iter()
    .enumerate()
    {
        if left < *length {
            return (year, at as i64 + 1, left + 1);
        }
        left -= length;
    }
    (year, 12, 31)
}

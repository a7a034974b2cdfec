//! Where the template engine differs from Jinja2: tests and filters that say something else of an undefined value, of none or
//! of a text, and Python's methods.

use minijinja::value::{Kwargs, Value as Jinja, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat;

use super::pyjson;

/// Gives an environment what templates written for Jinja2 and Python expect.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(unknown_method);
    environment.set_formatter(|out, state, value| match python_text(value) {
        Some(text) => out.write_str(&text).map_err(Error::from),
        None => minijinja::escape_formatter(out, state, value),
    });
    environment.add_filter("string", |value: &Jinja| {
        python_text(value).unwrap_or_else(|| value.to_string())
    });
    for name in ["e", "escape"] {
        environment.add_filter(name, |text: String| {
            text.replace('&', "&amp;")
                .replace('<', "&lt;")
                .replace('>', "&gt;")
                .replace('\'', "&#39;")
                .replace('"', "&#34;")
        });
    }
    environment.add_filter(
        "indent",
        |text: &str,
         width: Option<Jinja>,
         first: Option<bool>,
         blank: Option<bool>,
         options: Kwargs| { indent(text, width, first, blank, &options) },
    );
    // A template that would run for hours is a mistake or an attack.
    environment.set_fuel(Some(FUEL));
    environment.add_test("iterable", |value: &Jinja| {
        value.is_undefined() || (!value.is_none() && value.try_iter().is_ok())
    });
    environment.add_filter("wordcount", |text: &str| text.split_whitespace().count());
    environment.add_test("sequence", |value: &Jinja| {
        let kind = value.kind();
        value.is_undefined() || matches!(kind, ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
    for name in ["length", "count"] {
        environment.add_filter(name, |value: &Jinja| match value.len() {
            _ if value.is_undefined() => Ok(0),
            Some(length) => Ok(length),
            None => Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("cannot calculate length of value of type {}", value.kind()),
            )),
        });
    }
}

/// Steps that a rendering may take; a conversation of a thousand turns takes about a hundred thousand.
const FUEL: u64 = 50_000_000;

/// Jinja2's `indent`, with a width that a hostile template cannot make larger than memory.
fn indent(
    text: &str,
    width: Option<Jinja>,
    first: Option<bool>,
    blank: Option<bool>,
    options: &Kwargs,
) -> Result<String, Error> {
    let width = match options.get::<Option<Jinja>>("width")?.or(width) {
        None => " ".repeat(4),
        Some(value) => match (value.as_str(), value.as_usize()) {
            (Some(text), _) => text.to_owned(),
            (None, Some(width)) if width <= MOST_INDENT => " ".repeat(width),
            _ => {
                let message = format!("indent: the width must be a text or at most {MOST_INDENT}");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        },
    };
    let first = options.get::<Option<bool>>("first")?.or(first);
    let blank = options.get::<Option<bool>>("blank")?.or(blank);
    options.assert_all_used()?;
    let mut out = String::new();
    for (at, line) in text.split('\n').enumerate() {
        if at > 0 {
            out.push('\n');
        }
        let wanted = at > 0 || first == Some(true);
        if wanted && (blank == Some(true) || !line.is_empty()) {
            out.push_str(&width);
        }
        out.push_str(line);
    }
    Ok(out)
}

const MOST_INDENT: usize = 1000;

/// Whether a value is undefined or holds one that is; Python's JSON refuses those.
pub(super) fn has_undefined(value: &Jinja) -> bool {
    any_within(value, &|value| value.is_undefined())
}

/// Whether a value or one that it holds is such a one.
fn any_within(value: &Jinja, such: &dyn Fn(&Jinja) -> bool) -> bool {
    such(value)
        || match value.kind() {
            ValueKind::Seq => value
                .try_iter()
                .is_ok_and(|mut items| items.any(|item| any_within(&item, such))),
            ValueKind::Map => value.try_iter().is_ok_and(|mut keys| {
                keys.any(|key| {
                    value
                        .get_item(&key)
                        .is_ok_and(|item| any_within(&item, such))
                })
            }),
            _ => false,
        }
}

/// A value as Python prints it, where that differs: a number so large or small that Python writes it with an exponent.
fn python_text(value: &Jinja) -> Option<String> {
    any_within(value, &|value| float_of(value).is_some()).then(|| python_repr(value))
}

fn python_repr(value: &Jinja) -> String {
    match value.kind() {
        ValueKind::Number => float_of(value).unwrap_or_else(|| value.to_string()),
        ValueKind::Seq => {
            let items = value.try_iter().into_iter().flatten();
            let items: Vec<String> = items.map(|item| python_repr(&item)).collect();
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let keys = value.try_iter().into_iter().flatten();
            let items: Vec<String> = keys
                .map(|key| {
                    let item = value.get_item(&key).unwrap_or_default();
                    format!("{}: {}", python_repr(&key), python_repr(&item))
                })
                .collect();
            format!("{{{}}}", items.join(", "))
        }
        // As the engine writes it within a list.
        _ => {
            let list = Jinja::from(vec![value.clone()]).to_string();
            list[1..list.len() - 1].to_owned()
        }
    }
}

/// A float that Python writes with an exponent, as it does.
fn float_of(value: &Jinja) -> Option<String> {
    if value.kind() != ValueKind::Number || value.is_integer() {
        return None;
    }
    let number = f64::try_from(value.clone()).ok()?;
    let size = number.abs();
    let plain = size == 0.0 || (1e-4..1e16).contains(&size) || !number.is_finite();
    (!plain).then(|| pyjson::dumps(&serde_json::json!(number), &pyjson::Style::default()))
}

/// Python's methods on texts that `pycompat` lacks, then all that it has.
fn unknown_method(
    state: &mut State,
    value: &Jinja,
    method: &str,
    args: &[Jinja],
) -> Result<Jinja, Error> {
    let Some(text) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, method, args);
    };
    match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let is_last = method == "rpartition";
            let parts = match if is_last {
                text.rsplit_once(separator)
            } else {
                text.split_once(separator)
            } {
                Some((before, after)) => [before, separator, after],
                None if is_last => ["", "", text],
                None => [text, "", ""],
            };
            Ok(parts.into_iter().collect())
        }
        "rsplit" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most = most.and_then(|most| usize::try_from(most).ok());
            let most = most.map_or(usize::MAX, |most| most.saturating_add(1));
            let mut parts: Vec<&str> = match separator {
                Some(separator) => text.rsplitn(most, separator).collect(),
                None => split_words_from_the_end(text, most),
            };
            parts.reverse();
            Ok(parts.into_iter().collect())
        }
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// `str.rsplit()` of Python without a separator: at runs of white space, the last word first.
fn split_words_from_the_end(text: &str, most: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_end();
    while !rest.is_empty() {
        if parts.len() + 1 == most {
            parts.push(rest);
            break;
        }
        let at = rest
            .char_indices()
            .rfind(|(_, c)| c.is_whitespace())
            .map_or(0, |(at, c)| at + c.len_utf8());
        parts.push(&rest[at..]);
        rest = rest[..at].trim_end();
    }
    parts
}

//! Where the template engine differs from Jinja2: tests and filters that say something else of an undefined value, of none or
//! of a text, and Python's methods.

use minijinja::value::{Value as Jinja, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat;

/// Gives an environment what templates written for Jinja2 and Python expect.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(unknown_method);
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

//! JSON as Python's `json.dumps` writes it, which is what chat templates were written against.
//!
//! Python puts a space after `,` and `:`; floats are written by `repr`. A template that prints tools with `tojson`
//! gives other tokens if one space differs.

use std::fmt::Write as _;

use serde_json::Value;

/// How to write; the defaults are those of `transformers`' `tojson`.
#[derive(Debug, Clone, Default)]
pub(super) struct Style {
    /// The text of one level of indentation; none: everything on one line.
    pub(super) indent: Option<String>,
    /// Escape what is not ASCII.
    pub(super) ensure_ascii: bool,
    /// Order keys by their text.
    pub(super) sort_keys: bool,
    /// Between items and after a key; none: Python's defaults for the indentation.
    pub(super) separators: Option<(String, String)>,
}

/// Writes `value` as Python would.
pub(super) fn dumps(value: &Value, style: &Style) -> String {
    let (item, key) = style.separators.clone().unwrap_or_else(|| {
        let item = if style.indent.is_some() { "," } else { ", " };
        (item.to_owned(), ": ".to_owned())
    });
    let mut out = String::new();
    Writer {
        style,
        item: &item,
        key: &key,
    }
    .write(value, 0, &mut out);
    out
}

struct Writer<'a> {
    style: &'a Style,
    item: &'a str,
    key: &'a str,
}

impl Writer<'_> {
    fn write(&self, value: &Value, depth: usize, out: &mut String) {
        match value {
            Value::Null => out.push_str("null"),
            Value::Bool(true) => out.push_str("true"),
            Value::Bool(false) => out.push_str("false"),
            Value::Number(number) => match number.as_f64() {
                Some(float) if number.is_f64() => out.push_str(&float_repr(float)),
                _ => out.push_str(&number.to_string()),
            },
            Value::String(text) => self.string(text, out),
            Value::Array(items) => {
                self.container(('[', ']'), items.iter(), depth, out, |item, out| {
                    self.write(item, depth + 1, out);
                });
            }
            Value::Object(map) => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.style.sort_keys {
                    entries.sort_by_key(|(key, _)| key.as_str());
                }
                self.container(
                    ('{', '}'),
                    entries.into_iter(),
                    depth,
                    out,
                    |(key, item), out| {
                        self.string(key, out);
                        out.push_str(self.key);
                        self.write(item, depth + 1, out);
                    },
                );
            }
        }
    }

    fn container<T>(
        &self,
        (open, close): (char, char),
        items: impl ExactSizeIterator<Item = T>,
        depth: usize,
        out: &mut String,
        mut write: impl FnMut(T, &mut String),
    ) {
        out.push(open);
        let empty = items.len() == 0;
        for (at, item) in items.enumerate() {
            if at > 0 {
                out.push_str(self.item);
            }
            self.line(depth + 1, out);
            write(item, out);
        }
        if !empty {
            self.line(depth, out);
        }
        out.push(close);
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.style.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20
                    || (self.style.ensure_ascii && !(' '..='~').contains(&c)) =>
                {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a String cannot fail.
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// A float as Python's `repr`: the shortest digits, an exponent below 1e-4 and from 1e16 on.
fn float_repr(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() {
            "NaN".into()
        } else if value > 0.0 {
            "Infinity".into()
        } else {
            "-Infinity".into()
        };
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{digits}e{sign}{:02}", exponent.abs())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn as_python_writes() {
        let value = json!({"b": [1, 2.5, "é\n\"<&>"], "a": {}, "n": null, "t": true, "e": []});
        assert_eq!(
            dumps(&value, &Style::default()),
            r#"{"b": [1, 2.5, "é\n\"<&>"], "a": {}, "n": null, "t": true, "e": []}"#
        );
        let style = Style {
            indent: Some("  ".into()),
            sort_keys: true,
            ensure_ascii: true,
            separators: None,
        };
        assert_eq!(
            dumps(&json!({"b": ["é😀\u{7f}"], "a": {}}), &style),
            "{\n  \"a\": {},\n  \"b\": [\n    \"\\u00e9\\ud83d\\ude00\\u007f\"\n  ]\n}"
        );
    }

    #[test]
    fn floats_as_repr() {
        for (value, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (1e-4, "0.0001"),
            (-2.5e22, "-2.5e+22"),
            (1e100, "1e+100"),
        ] {
            assert_eq!(float_repr(value), text);
        }
    }
}

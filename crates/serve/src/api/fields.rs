//! The fields of request bodies: declared once, from which bodies are checked and `/openapi.json` is made.
//!
//! A null is a field that is absent. A field that nobody knows is an error, as at OpenAI; one that OpenAI knows and this server does nothing
//! with is ignored and counted.

use std::ops::RangeInclusive;

use lowrank::fields::nearest;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::server::Caps;

/// What a field may hold.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// True or false.
    Bool,
    /// A whole number.
    Integer(RangeInclusive<i64>),
    /// A whole number from here to what the server's limits say.
    Limited(i64, fn(&Caps) -> usize),
    /// A number.
    Number(RangeInclusive<f64>),
    /// A text.
    Text,
    /// Whatever this schema says; what reads it checks it.
    Other(&'static str),
    /// What OpenAI takes and this server does nothing with.
    Ignored,
}

impl Kind {
    /// The range of a whole number.
    fn whole(&self, caps: &Caps) -> Option<RangeInclusive<i64>> {
        match self {
            Self::Integer(range) => Some(range.clone()),
            Self::Limited(least, most) => {
                Some(*least..=i64::try_from(most(caps)).unwrap_or(i64::MAX))
            }
            _ => None,
        }
    }
}

/// A field of a body.
#[derive(Clone, Debug)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) about: &'static str,
}

/// A field of a table.
pub(crate) const fn field(name: &'static str, kind: Kind, about: &'static str) -> Field {
    Field { name, kind, about }
}

/// A body whose fields have been checked.
#[derive(Debug, Default)]
pub(crate) struct Body(Map<String, Value>);

impl Body {
    /// Reads a body with these fields, none of which is [`Kind::Limited`].
    pub(crate) fn read(bytes: &[u8], tables: &[&[Field]]) -> Result<Self, ApiError> {
        Self::read_within(bytes, tables, &Caps::default())
    }

    /// Reads a body with these fields.
    pub(crate) fn read_within(
        bytes: &[u8],
        tables: &[&[Field]],
        caps: &Caps,
    ) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| {
            ApiError::bad_request("invalid_json", format!("the body is not JSON: {error}"))
        })?;
        Self::of(value, tables, caps)
    }

    /// The same of a value.
    pub(crate) fn of(value: Value, tables: &[&[Field]], caps: &Caps) -> Result<Self, ApiError> {
        let Value::Object(mut map) = value else {
            return Err(ApiError::bad_request(
                "invalid_json",
                format!("the body must be an object, not {}", kind_of(&value)),
            ));
        };
        map.retain(|_, value| !value.is_null());
        let known = || tables.iter().flat_map(|table| table.iter());
        for (name, value) in &mut map {
            let Some(field) = known().find(|field| field.name == name) else {
                return Err(unknown(name, known().map(|field| field.name)));
            };
            if field.kind.whole(caps).is_some() {
                write_as_whole(value);
            }
            check(field, value, caps)?;
        }
        Ok(Self(map))
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(Value::as_str)
    }

    pub(crate) fn bool(&self, name: &str) -> Option<bool> {
        self.get(name).and_then(Value::as_bool)
    }

    /// A whole number that is not negative.
    pub(crate) fn count(&self, name: &str) -> Option<usize> {
        let value = self.get(name).and_then(Value::as_i64)?;
        usize::try_from(value).ok()
    }

    pub(crate) fn integer(&self, name: &str) -> Option<i64> {
        self.get(name).and_then(Value::as_i64)
    }

    pub(crate) fn number(&self, name: &str) -> Option<f64> {
        self.get(name).and_then(Value::as_f64)
    }

    /// The text of a field that must be there.
    pub(crate) fn require_text(&self, name: &'static str) -> Result<&str, ApiError> {
        self.text(name).ok_or_else(|| missing(name))
    }
}

/// A whole number; some languages write 16 as 16.0 or 1.6e1.
pub(crate) fn whole(value: &Value) -> Option<i64> {
    // Each whole f64 within these is an i64, too.
    const ALL: std::ops::Range<f64> = -9_223_372_036_854_775_808.0..9_223_372_036_854_775_808.0;
    value.as_i64().or_else(|| {
        let number = value.as_f64().filter(|_| value.is_f64())?;
        (number.fract() == 0.0 && ALL.contains(&number)).then_some(number as i64)
    })
}

/// Writes a whole number as one, so that whoever reads it finds it so.
pub(crate) fn write_as_whole(value: &mut Value) {
    if let Some(number) = whole(value) {
        *value = number.into();
    }
}

/// What a body without a field that must be there is answered with.
pub(crate) fn missing(name: &'static str) -> ApiError {
    ApiError {
        code: "missing_required_parameter",
        ..ApiError::invalid(name, format!("{name} is missing"))
    }
}

fn unknown(name: &str, known: impl Iterator<Item = &'static str>) -> ApiError {
    let near = nearest(name, known);
    let near = near.map_or(String::new(), |known| format!("; did you mean {known}?"));
    ApiError {
        code: "unknown_parameter",
        ..ApiError::invalid(name, format!("there is no parameter {name:?}{near}"))
    }
}

fn check(field: &Field, value: &Value, caps: &Caps) -> Result<(), ApiError> {
    let name = field.name;
    let wrong = |expected: String| {
        let message = format!("{name} must be {expected}, not {}", shown(value));
        Err(ApiError::invalid(name, message))
    };
    if let Some(range) = field.kind.whole(caps) {
        return match value.as_i64() {
            Some(number) if range.contains(&number) => Ok(()),
            // A number that is too large for any field is told how large it may be.
            None if value.as_f64().is_some_and(|number| number > 9e18) => {
                let (least, most) = range.into_inner();
                wrong(format!("a whole number from {least} to {most}"))
            }
            _ => wrong(format!("a whole number {}", between(&range, &i64::MAX))),
        };
    }
    match &field.kind {
        Kind::Bool if !value.is_boolean() => wrong("true or false".to_owned()),
        Kind::Text if !value.is_string() => wrong("a text".to_owned()),
        Kind::Number(range) => match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(()),
            _ => wrong(format!("a number {}", between(range, &f64::MAX))),
        },
        Kind::Ignored => {
            metrics::counter!("lowrank_ignored_parameters_total", "name" => name).increment(1);
            Ok(())
        }
        _ => Ok(()),
    }
}

fn between<T: PartialOrd + std::fmt::Display>(range: &RangeInclusive<T>, most: &T) -> String {
    if range.end() >= most {
        format!("from {} on", range.start())
    } else {
        format!("from {} to {}", range.start(), range.end())
    }
}

/// A value in a message, cut where it is long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

/// What a value is, in a word.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The JSON schema of a body with these fields.
pub(crate) fn schema(tables: &[&[Field]], required: &[&str], caps: &Caps) -> Value {
    let mut properties = Map::new();
    for field in tables.iter().flat_map(|table| table.iter()) {
        let mut schema = match &field.kind {
            Kind::Bool => json!({"type": ["boolean", "null"]}),
            kind @ (Kind::Integer(_) | Kind::Limited(..)) => {
                let range = kind.whole(caps).unwrap_or(0..=i64::MAX);
                json!({"type": ["integer", "null"], "minimum": range.start(), "maximum": range.end()})
            }
            Kind::Number(range) => {
                json!({"type": ["number", "null"], "minimum": range.start(), "maximum": range.end()})
            }
            Kind::Text if required.contains(&field.name) => json!({"type": "string"}),
            Kind::Text => json!({"type": ["string", "null"]}),
            Kind::Other(text) => serde_json::from_str(text).unwrap_or_default(),
            Kind::Ignored => json!({}),
        };
        if let Value::Object(schema) = &mut schema {
            schema.insert("description".to_owned(), field.about.into());
        }
        properties.insert(field.name.to_owned(), schema);
    }
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::api::wanted::{COMMON, Wanted};
    use crate::api::{chat, completions};

    const TABLE: &[Field] = &[
        field("model", Kind::Text, "a model"),
        field("n", Kind::Integer(1..=8), "how many"),
        field("temperature", Kind::Number(0.0..=2.0), "how varied"),
        field("user", Kind::Ignored, "ignored"),
        field(
            "stop",
            Kind::Other(r#"{"type": ["string", "array", "null"]}"#),
            "ends",
        ),
    ];

    fn read(text: &str) -> Result<Body, ApiError> {
        Body::read(text.as_bytes(), &[TABLE])
    }

    #[test]
    fn nulls_are_absent_and_errors_name_the_field() {
        let body = read(r#"{"model": "a", "n": null, "user": 5, "temperature": 1}"#).expect("good");
        assert_eq!((body.text("model"), body.count("n")), (Some("a"), None));
        assert_eq!(body.number("temperature"), Some(1.0));
        for (text, param, part) in [
            (r#"{"n": 9}"#, "n", "from 1 to 8, not 9"),
            (r#"{"n": 1.5}"#, "n", "a whole number"),
            (
                r#"{"temperatur": 1}"#,
                "temperatur",
                "did you mean temperature?",
            ),
            (r#"{"model": []}"#, "model", "must be a text"),
            (
                r#"{"temperature": "hot"}"#,
                "temperature",
                "a number from 0 to 2",
            ),
        ] {
            let error = read(text).expect_err("bad");
            assert_eq!(error.param.as_deref(), Some(param), "{text}");
            assert!(error.message.contains(part), "{text}: {}", error.message);
        }
        assert_eq!(read("[1]").expect_err("a list").code, "invalid_json");
        assert_eq!(read("{").expect_err("half").code, "invalid_json");
    }

    #[test]
    fn whole_numbers_may_be_written_as_floats() {
        const LARGE: &[Field] = &[
            field("most", Kind::Integer(0..=i64::MAX), "a large number"),
            field(
                "n",
                Kind::Limited(1, |caps| caps.n),
                "a number that the server limits",
            ),
        ];
        let caps = Caps {
            n: 3,
            ..Caps::default()
        };
        let read = |text: &str| Body::read_within(text.as_bytes(), &[LARGE], &caps);
        for (text, most) in [
            ("16.0", 16),
            ("1e3", 1000),
            ("1e18", 1_000_000_000_000_000_000),
            ("-0.0", 0),
        ] {
            let body = read(&format!("{{\"most\": {text}}}")).expect("good");
            assert_eq!(body.integer("most"), Some(most), "{text}");
        }
        for (text, part) in [
            (
                r#"{"most": 1e300}"#,
                "most must be a whole number from 0 to 9223372036854775807",
            ),
            (
                r#"{"most": 9223372036854775808}"#,
                "from 0 to 9223372036854775807",
            ),
            (
                r#"{"most": 0.5}"#,
                "most must be a whole number from 0 on, not 0.5",
            ),
            (r#"{"n": 0}"#, "n must be a whole number from 1 to 3, not 0"),
            (
                r#"{"n": 4.0}"#,
                "n must be a whole number from 1 to 3, not 4",
            ),
        ] {
            let error = read(text).expect_err("bad");
            assert!(error.message.contains(part), "{text}: {}", error.message);
        }
        let schema = schema(&[LARGE], &[], &caps);
        assert_eq!(schema["properties"]["n"]["maximum"], 3);
    }

    /// Any JSON, of which objects have names that mean something.
    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            (-9.0..9.0).prop_map(Value::from),
            (-2_i64..9).prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        let name = prop_oneof![
            "[a-z_]{1,6}",
            Just("id".to_owned()),
            Just("weight".to_owned())
        ];
        leaf.prop_recursive(3, 24, 5, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec((name.clone(), inner), 0..5)
                    .prop_map(|items| Value::Object(items.into_iter().collect())),
            ]
        })
    }

    /// A body with some of the fields of a table.
    fn any_body(tables: &'static [&'static [Field]]) -> impl Strategy<Value = Map<String, Value>> {
        let names: Vec<&str> = tables
            .iter()
            .flat_map(|table| table.iter())
            .map(|f| f.name)
            .collect();
        let name = prop_oneof![9 => prop::sample::select(names), 1 => Just("nonsense")];
        prop::collection::vec((name, any_json()), 0..6).prop_map(|items| {
            items
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect()
        })
    }

    proptest! {
        #[test]
        fn any_body_is_read_or_an_error_that_names_a_field(
            body in prop_oneof![
                any_body(&[chat::FIELDS, COMMON]),
                any_body(&[completions::FIELDS, COMMON]),
            ],
        ) {
            let tables: &[&[Field]] = if body.contains_key("messages") || body.contains_key("tools") {
                &[chat::FIELDS, COMMON]
            } else {
                &[completions::FIELDS, COMMON]
            };
            let read = Body::of(Value::Object(body.clone()), tables, &Caps::default())
                .and_then(|read| Wanted::read(&read, &Caps::default()));
            match read {
                Ok(wanted) => {
                    prop_assert!((1..=16).contains(&wanted.n));
                    let sampling = &wanted.options.sampling;
                    prop_assert!((0.0..=2.0).contains(&sampling.temperature) && sampling.top_p > 0.0);
                }
                Err(error) => {
                    let param = error.param.expect("a field");
                    prop_assert!(body.contains_key(&param), "{param}");
                    prop_assert!(error.message.contains(&param) || param == "adapters", "{}", error.message);
                    prop_assert!(error.status.is_client_error());
                }
            }
        }

        #[test]
        fn any_bytes_are_read_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..64), text in "[{}\\[\\]:,\"a0-9.eE+-]{0,40}") {
            for bytes in [&bytes[..], text.as_bytes()] {
                if let Err(error) = Body::read(bytes, &[TABLE]) {
                    prop_assert!(error.status.is_client_error());
                }
            }
        }
    }

    #[test]
    fn every_schema_of_the_tables_is_json() {
        let schema = schema(&[TABLE], &["model"], &Caps::default());
        assert_eq!(schema["properties"]["stop"]["type"][1], "array");
        assert_eq!(schema["properties"]["n"]["maximum"], 8);
    }
}

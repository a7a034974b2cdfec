//! Rows that have labels: texts, pairs of texts, words with tags, and texts with marked passages.

use serde_json::{Map, Value};

use super::{RowKind, RowProblem, string};
use crate::data::describe::{names, shown, type_name};

/// Fields of a text by itself, in the order in which they are looked for.
const TEXTS: [&str; 2] = ["text", "sentence"];
/// Fields of two texts: ours, and those of GLUE's tasks.
const PAIRS: [[&str; 2]; 5] = [
    ["text", "text_pair"],
    ["sentence1", "sentence2"],
    ["premise", "hypothesis"],
    ["question1", "question2"],
    ["question", "sentence"],
];
const LABELS: [&str; 2] = ["label", "labels"];
const TAGS: [&str; 3] = ["tags", "ner_tags", "labels"];

/// A row's text as a classifier reads it, and its label.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::data) struct LabelledRow {
    pub(in crate::data) input: Input,
    pub(in crate::data) label: Given,
}

/// What a classifier reads.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::data) enum Input {
    Text {
        text: String,
        pair: Option<String>,
    },
    /// A text that is split into words.
    Words(Vec<String>),
    /// A text whose passages are marked; its words are found later.
    Passages(String),
}

/// A label as a row writes it.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::data) enum Given {
    One(Scalar),
    Many(Vec<Scalar>),
    /// A label a word.
    Tags(Vec<Scalar>),
    Spans(Vec<Span>),
}

#[derive(Debug, Clone, PartialEq)]
pub(in crate::data) enum Scalar {
    Name(String),
    Integer(i64),
    Number(f64),
    Bool(bool),
}

/// A marked passage of a text.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::data) struct Span {
    /// Its bytes.
    pub(in crate::data) range: std::ops::Range<usize>,
    pub(in crate::data) label: String,
}

impl RowKind {
    /// The kind of a row that has a label, by the fields that are there.
    pub(super) fn detect_labelled(row: &Map<String, Value>) -> Option<Self> {
        let has_label = first(row, &LABELS).is_some();
        if row.contains_key("tokens") && first(row, &TAGS).is_some() {
            Some(Self::Tagged)
        } else if row.contains_key("text") && row.contains_key("spans") {
            Some(Self::Passages)
        } else if has_label && pair_of(row).is_some() {
            Some(Self::LabelledPair)
        } else if has_label && first(row, &TEXTS).is_some() {
            Some(Self::Labelled)
        } else {
            None
        }
    }

    /// The fields of a row with a label that are read.
    pub(super) fn labelled_fields(self, row: &Map<String, Value>) -> Vec<&'static str> {
        let label = first(row, &LABELS);
        match self {
            Self::Labelled => first(row, &TEXTS).into_iter().chain(label).collect(),
            Self::LabelledPair => pair_of(row).into_iter().flatten().chain(label).collect(),
            Self::Tagged => Some("tokens")
                .into_iter()
                .chain(first(row, &TAGS))
                .collect(),
            Self::Passages => vec!["text", "spans"],
            _ => Vec::new(),
        }
    }
}

/// Reads a row of the expected kind.
pub(super) fn read_labelled(
    kind: RowKind,
    row: &Map<String, Value>,
) -> Result<LabelledRow, RowProblem> {
    let found = RowKind::detect_labelled(row);
    if found != Some(kind) {
        if let Some(other) = found {
            return Err(RowProblem::OtherKind(other.to_string()));
        }
        let reason = format!("the row has {}, and the file's rows are {kind}", names(row));
        let missing = match kind {
            RowKind::Tagged if row.contains_key("tokens") => "; its \"tags\" are missing",
            RowKind::Tagged => "; its \"tokens\" are missing",
            RowKind::Passages if row.contains_key("text") => "; its \"spans\" are missing",
            _ if first(row, &LABELS).is_none() => "; its \"label\" is missing",
            _ => "; a text is missing",
        };
        return Err(RowProblem::Bad(reason + missing));
    }
    let input = read_input(kind, row)?;
    let label = match (kind, &input) {
        (RowKind::Tagged, Input::Words(words)) => read_tags(row, words)?,
        (RowKind::Passages, Input::Passages(text)) => Given::Spans(read_spans(row, text)?),
        _ => read_label(row)?,
    };
    Ok(LabelledRow { input, label })
}

/// What the classifier reads of a row of this kind.
fn read_input(kind: RowKind, row: &Map<String, Value>) -> Result<Input, String> {
    Ok(match kind {
        RowKind::Tagged => Input::Words(read_words(&row["tokens"])?),
        RowKind::Passages => Input::Passages(full(row, "text")?),
        RowKind::LabelledPair => {
            let [one, two] = pair_of(row).unwrap_or(PAIRS[0]);
            Input::Text {
                text: full(row, one)?,
                pair: Some(full(row, two)?),
            }
        }
        _ => Input::Text {
            text: full(row, first(row, &TEXTS).unwrap_or(TEXTS[0]))?,
            pair: None,
        },
    })
}

/// What a classifier reads of a row whose label does not matter, or the reason why there is nothing to read.
pub(in crate::data) fn read_unlabelled(row: &Map<String, Value>) -> Result<Input, String> {
    let kind = if row.contains_key("tokens") {
        RowKind::Tagged
    } else if pair_of(row).is_some() {
        RowKind::LabelledPair
    } else if first(row, &TEXTS).is_some() {
        RowKind::Labelled
    } else {
        return Err(format!(
            "the row has {}; rows to classify have {{\"text\"}}, a pair such as {{\"text\", \"text_pair\"}}, or {{\"tokens\"}}",
            names(row)
        ));
    };
    read_input(kind, row)
}

/// The label of a row that need not have one, as it stands.
pub(in crate::data) fn own_label(row: &Map<String, Value>) -> Option<&Value> {
    let name = if row.contains_key("tokens") {
        first(row, &TAGS)
    } else if row.contains_key("spans") {
        Some("spans")
    } else {
        first(row, &LABELS)
    };
    row.get(name?).filter(|label| !label.is_null())
}

fn first(row: &Map<String, Value>, names: &[&'static str]) -> Option<&'static str> {
    names.iter().find(|name| row.contains_key(**name)).copied()
}

fn pair_of(row: &Map<String, Value>) -> Option<[&'static str; 2]> {
    let pair = PAIRS
        .iter()
        .find(|pair| pair.iter().all(|name| row.contains_key(*name)));
    pair.copied()
}

/// A text that is not empty.
fn full(row: &Map<String, Value>, name: &str) -> Result<String, String> {
    let text = string(row, name)?;
    if text.is_empty() {
        return Err(format!("{name:?} is empty"));
    }
    Ok(text)
}

fn read_words(value: &Value) -> Result<Vec<String>, String> {
    let Value::Array(items) = value else {
        return Err(format!(
            "\"tokens\" must be a list of words, but is {}",
            type_name(value)
        ));
    };
    if items.is_empty() {
        return Err("\"tokens\" is empty".into());
    }
    let word = |(at, item): (usize, &Value)| match item {
        Value::String(word) => Ok(word.clone()),
        other => Err(format!(
            "tokens[{at}] must be a text, but is {}",
            shown(other)
        )),
    };
    items.iter().enumerate().map(word).collect()
}

fn read_tags(row: &Map<String, Value>, words: &[String]) -> Result<Given, String> {
    let name = first(row, &TAGS).unwrap_or(TAGS[0]);
    let value = row.get(name).unwrap_or(&Value::Null);
    let Value::Array(items) = value else {
        return Err(format!(
            "{name:?} must be a list with a tag for each of \"tokens\", but is {}",
            type_name(value)
        ));
    };
    if items.len() != words.len() {
        return Err(format!(
            "\"tokens\" has {} words and {name:?} has {}; each word needs one tag",
            words.len(),
            items.len()
        ));
    }
    let tag = |(at, item): (usize, &Value)| {
        read_scalar(item).map_err(|found| {
            format!("{name}[{at}] must be a name or a whole number, but is {found}")
        })
    };
    let tags = items.iter().enumerate().map(tag);
    Ok(Given::Tags(tags.collect::<Result<_, _>>()?))
}

fn read_label(row: &Map<String, Value>) -> Result<Given, String> {
    let name = first(row, &LABELS).unwrap_or(LABELS[0]);
    let wanted = "must be a name, a number, true or false, or a list of these";
    match row.get(name).unwrap_or(&Value::Null) {
        Value::Null => Err(format!(
            "{name:?} is null, so the row has no label; write one, or leave the row out"
        )),
        Value::Array(items) => {
            let item = |(at, item): (usize, &Value)| {
                read_scalar(item).map_err(|found| {
                    format!("{name}[{at}] must be a name, a number, true or false, but is {found}")
                })
            };
            let items = items.iter().enumerate().map(item);
            Ok(Given::Many(items.collect::<Result<_, _>>()?))
        }
        value => read_scalar(value)
            .map(Given::One)
            .map_err(|found| format!("{name:?} {wanted}, but is {found}")),
    }
}

/// A name or a number, or what was found in its place.
fn read_scalar(value: &Value) -> Result<Scalar, String> {
    match value {
        Value::String(name) if name.trim().is_empty() => Err("empty".into()),
        Value::String(name) => Ok(Scalar::Name(name.clone())),
        Value::Bool(value) => Ok(Scalar::Bool(*value)),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => Ok(Scalar::Integer(whole)),
            (None, Some(value)) if value.is_finite() && !number.is_u64() => {
                Ok(Scalar::Number(value))
            }
            _ => Err(format!("{number}, which is too large")),
        },
        other => Err(shown(other)),
    }
}

/// `spans`: passages by their characters, the end exclusive, in the order of the text.
fn read_spans(row: &Map<String, Value>, text: &str) -> Result<Vec<Span>, String> {
    let value = row.get("spans").unwrap_or(&Value::Null);
    let Value::Array(items) = value else {
        return Err(format!(
            "\"spans\" must be a list of {{\"start\", \"end\", \"label\"}}, but is {}",
            type_name(value)
        ));
    };
    let mut bytes: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    bytes.push(text.len());
    let mut spans = Vec::with_capacity(items.len());
    for (at, item) in items.iter().enumerate() {
        let place = |name: &str| {
            let number = item.get(name).and_then(Value::as_u64);
            let number = number.and_then(|number| usize::try_from(number).ok());
            number.ok_or_else(|| {
                let found = item.get(name).map_or("missing".to_owned(), shown);
                format!("spans[{at}].{name} must be the number of a character, but is {found}")
            })
        };
        let (start, end) = (place("start")?, place("end")?);
        let characters = bytes.len() - 1;
        if start >= end || end > characters {
            return Err(format!(
                "spans[{at}] goes from character {start} to before {end}, and the text has {characters}; ends are exclusive"
            ));
        }
        let label = match item.get("label") {
            Some(Value::String(label)) if !label.trim().is_empty() => label.clone(),
            Some(Value::Number(number)) => number.to_string(),
            other => {
                let found = other.map_or("missing".to_owned(), shown);
                return Err(format!("spans[{at}].label must be a name, but is {found}"));
            }
        };
        let range = bytes[start]..bytes[end];
        spans.push((at, Span { range, label }));
    }
    spans.sort_by_key(|(_, span)| span.range.start);
    if let Some(two) = spans
        .windows(2)
        .find(|two| two[1].1.range.start < two[0].1.range.end)
    {
        return Err(format!(
            "spans[{}] and spans[{}] overlap, and a word has one tag; leave one of them out",
            two[0].0, two[1].0
        ));
    }
    Ok(spans.into_iter().map(|(_, span)| span).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::TaskType;

    fn read(row: &Value) -> Result<LabelledRow, String> {
        let row = row.as_object().unwrap();
        let kind = RowKind::detect_labelled(row).ok_or("no kind")?;
        read_labelled(kind, row).map_err(|problem| match problem {
            RowProblem::Bad(reason) | RowProblem::OtherKind(reason) => reason,
        })
    }

    #[test]
    fn kinds_are_told_by_their_fields() {
        for (row, kind, fields) in [
            (
                json!({"text": "a", "label": 1, "idx": 1}),
                RowKind::Labelled,
                vec!["text", "label"],
            ),
            (
                json!({"sentence": "a", "label": 1}),
                RowKind::Labelled,
                vec!["sentence", "label"],
            ),
            (
                json!({"text": "a", "labels": []}),
                RowKind::Labelled,
                vec!["text", "labels"],
            ),
            (
                json!({"text": "a", "text_pair": "b", "label": 1}),
                RowKind::LabelledPair,
                vec!["text", "text_pair", "label"],
            ),
            (
                json!({"sentence1": "a", "sentence2": "b", "label": 1}),
                RowKind::LabelledPair,
                vec!["sentence1", "sentence2", "label"],
            ),
            (
                json!({"premise": "a", "hypothesis": "b", "label": 1}),
                RowKind::LabelledPair,
                vec!["premise", "hypothesis", "label"],
            ),
            (
                json!({"question1": "a", "question2": "b", "label": 1}),
                RowKind::LabelledPair,
                vec!["question1", "question2", "label"],
            ),
            (
                json!({"question": "a", "sentence": "b", "label": 1}),
                RowKind::LabelledPair,
                vec!["question", "sentence", "label"],
            ),
            (
                json!({"tokens": ["a"], "ner_tags": [1], "id": 1}),
                RowKind::Tagged,
                vec!["tokens", "ner_tags"],
            ),
            (
                json!({"tokens": ["a"], "labels": [1]}),
                RowKind::Tagged,
                vec!["tokens", "labels"],
            ),
            (
                json!({"text": "a", "spans": [], "label": 1}),
                RowKind::Passages,
                vec!["text", "spans"],
            ),
        ] {
            let row = row.as_object().unwrap();
            assert_eq!(RowKind::detect(row, None), Some(kind));
            assert_eq!(kind.labelled_fields(row), fields);
            assert!(!kind.uses(row, "idx") && kind.uses(row, fields[1]));
            let task = Some(TaskType::CausalLm);
            assert_ne!(RowKind::detect(row, task), Some(kind));
        }
        let text = json!({"text": "a"});
        let text = text.as_object().unwrap();
        assert_eq!(RowKind::detect(text, None), Some(RowKind::Text));
        assert_eq!(RowKind::detect(text, Some(TaskType::SeqCls)), None);
        let tagged = json!({"tokens": ["a"], "tags": ["b"]});
        let tagged = tagged.as_object().unwrap();
        assert_eq!(RowKind::detect(tagged, Some(TaskType::SeqCls)), None);
    }

    #[test]
    fn labels_are_names_numbers_or_lists() {
        let label = |label: Value| {
            let row = read(&json!({"text": "a", "label": label})).unwrap();
            row.label
        };
        assert_eq!(
            label(json!("good")),
            Given::One(Scalar::Name("good".into()))
        );
        assert_eq!(label(json!(-1)), Given::One(Scalar::Integer(-1)));
        assert_eq!(label(json!(1.0)), Given::One(Scalar::Number(1.0)));
        assert_eq!(label(json!(true)), Given::One(Scalar::Bool(true)));
        assert_eq!(
            label(json!([1, "a"])),
            Given::Many(vec![Scalar::Integer(1), Scalar::Name("a".into())])
        );
        assert_eq!(label(json!([])), Given::Many(Vec::new()));
    }

    #[test]
    fn spans_are_counted_in_characters() {
        let row = json!({"text": "né in Köln.", "spans": [
            {"start": 6, "end": 10, "label": "CITY"}, {"start": 0, "end": 2, "label": "X"}]});
        let Given::Spans(spans) = read(&row).unwrap().label else {
            panic!()
        };
        let text = row["text"].as_str().unwrap();
        let found: Vec<&str> = spans.iter().map(|span| &text[span.range.clone()]).collect();
        assert_eq!(found, ["né", "Köln"]);
    }

    #[test]
    fn what_is_wrong_with_a_row_is_named() {
        let spans = |spans: Value| json!({"text": "héllo", "spans": spans});
        for (row, expected) in [
            (
                json!({"text": "a", "label": null}),
                "\"label\" is null, so the row has no label; write one",
            ),
            (
                json!({"text": "a", "label": ""}),
                "\"label\" must be a name, a number, true or false, or a list of these, but is empty",
            ),
            (json!({"text": "a", "label": {}}), "but is an object"),
            (
                json!({"text": "a", "label": [[1]]}),
                "label[0] must be a name, a number, true or false, but is a list",
            ),
            (
                json!({"text": "a", "label": u64::MAX}),
                "but is 18446744073709551615, which is too large",
            ),
            (json!({"text": "", "label": 1}), "\"text\" is empty"),
            (
                json!({"text": 7, "label": 1}),
                "\"text\" must be a text, but is a number (7)",
            ),
            (
                json!({"premise": "a", "hypothesis": "", "label": 1}),
                "\"hypothesis\" is empty",
            ),
            (
                json!({"tokens": "a b", "tags": []}),
                "\"tokens\" must be a list of words, but is a text",
            ),
            (json!({"tokens": [], "tags": []}), "\"tokens\" is empty"),
            (
                json!({"tokens": ["a", 1], "tags": [0, 0]}),
                "tokens[1] must be a text, but is a number (1)",
            ),
            (
                json!({"tokens": ["a", "b"], "ner_tags": [0]}),
                "\"tokens\" has 2 words and \"ner_tags\" has 1; each word needs one tag",
            ),
            (
                json!({"tokens": ["a"], "tags": "O"}),
                "\"tags\" must be a list with a tag for each of \"tokens\", but is a text",
            ),
            (
                json!({"tokens": ["a"], "tags": [null]}),
                "tags[0] must be a name or a whole number, but is null",
            ),
            (spans(json!({})), "\"spans\" must be a list of"),
            (
                spans(json!([{"start": 0, "label": "a"}])),
                "spans[0].end must be the number of a character, but is missing",
            ),
            (
                spans(json!([{"start": -1, "end": 2, "label": "a"}])),
                "spans[0].start must be the number of a character, but is a number (-1)",
            ),
            (
                spans(json!([{"start": 3, "end": 6, "label": "a"}])),
                "spans[0] goes from character 3 to before 6, and the text has 5",
            ),
            (
                spans(json!([{"start": 3, "end": 3, "label": "a"}])),
                "ends are exclusive",
            ),
            (
                spans(json!([{"start": 0, "end": 3}])),
                "spans[0].label must be a name, but is missing",
            ),
            (
                spans(
                    json!([{"start": 2, "end": 4, "label": "a"}, {"start": 0, "end": 3, "label": "b"}]),
                ),
                "spans[1] and spans[0] overlap",
            ),
        ] {
            let error = read(&row).unwrap_err();
            assert!(error.contains(expected), "{row}: {error}");
        }
    }

    #[test]
    fn a_row_of_another_kind_is_told_from_one_that_lacks_a_field() {
        let of = |kind, row: Value| read_labelled(kind, row.as_object().unwrap()).unwrap_err();
        let pair = json!({"text": "a", "text_pair": "b", "label": 1});
        assert_eq!(
            of(RowKind::Labelled, pair),
            RowProblem::OtherKind("two texts and a label".into())
        );
        let single = json!({"text": "a", "label": 1});
        assert_eq!(
            of(RowKind::LabelledPair, single),
            RowProblem::OtherKind("text and label".into())
        );
        for (kind, row, expected) in [
            (
                RowKind::Labelled,
                json!({"text": "a"}),
                "the row has \"text\", and the file's rows are text and label; its \"label\" is missing",
            ),
            (
                RowKind::LabelledPair,
                json!({"label": 1}),
                "a text is missing",
            ),
            (
                RowKind::Tagged,
                json!({"tokens": []}),
                "its \"tags\" are missing",
            ),
            (
                RowKind::Passages,
                json!({"text": "a"}),
                "its \"spans\" are missing",
            ),
        ] {
            let RowProblem::Bad(error) = of(kind, row) else {
                panic!("{kind}")
            };
            assert!(error.contains(expected), "{error}");
        }
    }
}

//! The labels that a file's rows have: what they mean, their names and their numbers.
//!
//! Names are sorted as texts, as `class_encode_column` of Hugging Face's datasets and transformers' examples sort them, so that a
//! file has the same map whatever the order of its rows. Whole numbers are sorted as numbers: 0, 1, … keep their number as their
//! place, and 10 does not come before 9. A number's name is the number itself, so that a label is read back as it was written.

use std::collections::BTreeSet;
use std::fmt;

use super::rows::{Given, Scalar};
use super::task::{Label, Labels, ProblemType};

mod counts;

pub use counts::LabelCounts;

/// A row's label as it is written, and whose it is.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) line: usize,
    /// Of a row of an array its number there.
    pub(super) row: Option<usize>,
    pub(super) label: Given,
    /// For each word's tag the token that it falls on; none for a word that was cut, or has no token of its own.
    pub(super) tokens: Vec<Option<u32>>,
}

/// What transformers leaves out of a loss.
const IGNORED: i64 = -100;

/// What kind of thing labels are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Name,
    Whole,
    Fraction,
    Bool,
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Name => "a name",
            Self::Whole => "a whole number",
            Self::Fraction => "a number with a fraction",
            Self::Bool => "true or false",
        })
    }
}

impl Scalar {
    fn form(&self) -> Form {
        match self {
            Self::Name(_) => Form::Name,
            Self::Integer(_) => Form::Whole,
            Self::Number(_) => Form::Fraction,
            Self::Bool(_) => Form::Bool,
        }
    }

    /// What it is called where labels have names.
    fn name(&self) -> String {
        match self {
            Self::Name(name) => name.clone(),
            Self::Integer(number) => number.to_string(),
            Self::Number(number) => number.to_string(),
            Self::Bool(value) => value.to_string(),
        }
    }

    fn value(&self) -> Option<f64> {
        match self {
            Self::Integer(number) => Some(*number as f64),
            Self::Number(number) => Some(*number),
            Self::Bool(value) => Some(f64::from(u8::from(*value))),
            Self::Name(_) => None,
        }
    }

    fn is_bit(&self) -> bool {
        matches!(self.value(), Some(0.0 | 1.0))
    }
}

impl Given {
    fn scalars(&self) -> &[Scalar] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(list) | Self::Tags(list) => list,
            Self::Spans(_) => &[],
        }
    }
}

/// Why a row's label cannot be used: its place in the list, and the reason.
pub(super) type Refused = (usize, String);

/// The labels that rows have, found by looking at all of them. In a table every label is a text; where all of them are numbers
/// they become numbers.
///
/// # Errors
/// For the first row whose label is not like those before it.
pub(super) fn find(rows: &mut [Written], is_table: bool) -> Result<Labels, Refused> {
    if is_table {
        read_numbers(rows)?;
    }
    let lists = |row: &Written| matches!(row.label, Given::Many(_));
    if let Some(at) = rows.iter().position(|row| lists(row) != lists(&rows[0])) {
        let (found, expected) = if lists(&rows[at]) {
            ("a list", "one label")
        } else {
            ("one label", "a list of labels")
        };
        return Err((at, mixed(found, expected, rows[0].line)));
    }
    let is_list = rows.first().is_some_and(lists);
    let form = form_of(rows)?;
    if is_list
        && form != Some(Form::Name)
        && let Some(count) = count_of_bits(rows)
    {
        return Ok(numbered(count, ProblemType::MultiLabelClassification));
    }
    if form == Some(Form::Fraction) {
        let count = rows.first().map_or(1, |row| row.label.scalars().len());
        let other = |row: &Written| row.label.scalars().len() != count;
        if matches!(rows.first(), Some(row) if matches!(row.label, Given::Tags(_))) {
            return Err((
                0,
                "a tag has a fraction; tags are names or whole numbers".into(),
            ));
        }
        if let Some(at) = rows.iter().position(other) {
            return Err((
                at,
                format!(
                    "the label has {} numbers and that of line {} has {count}; numbers to be learned are the same for all rows",
                    rows[at].label.scalars().len(),
                    rows[0].line
                ),
            ));
        }
        return Ok(numbered(count, ProblemType::Regression));
    }
    let all = rows.iter().flat_map(|row| row.label.scalars());
    let names = if form == Some(Form::Whole) {
        let numbers: BTreeSet<i64> = all
            .filter_map(|scalar| match scalar {
                Scalar::Integer(number) => Some(*number),
                _ => None,
            })
            .collect();
        let is_tag = matches!(rows.first(), Some(row) if matches!(row.label, Given::Tags(_)));
        let numbers = numbers.into_iter();
        let numbers = numbers.filter(|number| !is_tag || *number != IGNORED);
        numbers.map(|number| number.to_string()).collect()
    } else {
        let names: BTreeSet<String> = all.map(Scalar::name).collect();
        names.into_iter().collect()
    };
    Ok(Labels {
        names,
        problem_type: if is_list {
            ProblemType::MultiLabelClassification
        } else {
            ProblemType::SingleLabelClassification
        },
    })
}

/// Adds to tags of passages those that a passage of another length would have: every label has a tag that a passage begins with
/// and one that it goes on with, and `O` is outside of all.
pub(super) fn complete_marks(labels: &mut Labels) {
    let mut names = BTreeSet::from(["O".to_owned()]);
    for name in &labels.names {
        if let Some((_, label)) = name.split_once('-') {
            names.extend([format!("B-{label}"), format!("I-{label}")]);
        }
    }
    labels.names = names.into_iter().collect();
}

/// Labels of a table as numbers, where all of them are.
fn read_numbers(rows: &mut [Written]) -> Result<(), Refused> {
    let number = |scalar: &Scalar| match scalar {
        Scalar::Name(text) => number_of(text),
        _ => None,
    };
    let scalars = |rows: &[Written]| -> Vec<Option<Scalar>> {
        let all = rows.iter().flat_map(|row| row.label.scalars());
        all.map(number).collect()
    };
    let read = scalars(rows);
    let numbers = read.iter().flatten().count();
    if numbers == 0 || numbers * 2 < read.len() || are_codes(rows) {
        return Ok(());
    }
    for (at, row) in rows.iter_mut().enumerate() {
        let Given::One(scalar) = &mut row.label else {
            continue;
        };
        match number(scalar) {
            Some(Scalar::Number(value)) if !value.is_finite() => {
                return Err((
                    at,
                    format!(
                        "the label is {}, which is no number; leave the row out",
                        scalar.name()
                    ),
                ));
            }
            Some(value) => *scalar = value,
            // The names among numbers are found by whoever compares labels.
            None => {}
        }
    }
    Ok(())
}

/// Whether some labels are whole numbers that are not written as numbers are, such as 007: as numbers 7 and 007 would be one.
fn are_codes(rows: &[Written]) -> bool {
    let mut scalars = rows.iter().flat_map(|row| row.label.scalars());
    scalars.any(|scalar| match scalar {
        Scalar::Name(text) => {
            let digits = text.trim().trim_start_matches('-');
            digits.len() > 1
                && digits.starts_with('0')
                && digits.bytes().all(|byte| byte.is_ascii_digit())
        }
        _ => false,
    })
}

/// A text of a table as a number, if it is one; NaN and infinities are.
fn number_of(text: &str) -> Option<Scalar> {
    let text = text.trim();
    let whole = text.parse::<i64>().map(Scalar::Integer);
    whole.or_else(|_| text.parse().map(Scalar::Number)).ok()
}

/// What kind of thing all labels are; whole numbers among fractions are fractions.
fn form_of(rows: &[Written]) -> Result<Option<Form>, Refused> {
    let mut known: Option<(Form, usize)> = None;
    for (at, row) in rows.iter().enumerate() {
        for scalar in row.label.scalars() {
            let form = scalar.form();
            known = match known {
                None => Some((form, row.line)),
                Some((Form::Whole, line)) if form == Form::Fraction => Some((form, line)),
                Some((Form::Fraction, _)) if form == Form::Whole => known,
                Some((other, _)) if other == form => known,
                Some((other, line)) => {
                    let found = format!("{form} ({})", scalar.name());
                    return Err((at, mixed(&found, &other.to_string(), line)));
                }
            };
        }
    }
    Ok(known.map(|(form, _)| form))
}

fn mixed(found: &str, expected: &str, line: usize) -> String {
    format!(
        "the label is {found}, and that of line {line} is {expected}; write the labels of all rows in the same way"
    )
}

/// How many numbers each list has, where all have as many, and nothing but 0 and 1.
fn count_of_bits(rows: &[Written]) -> Option<usize> {
    let count = rows.first()?.label.scalars().len();
    let bits = |row: &Written| {
        let scalars = row.label.scalars();
        scalars.len() == count && scalars.iter().all(Scalar::is_bit)
    };
    (count > 1 && rows.iter().all(bits)).then_some(count)
}

/// Labels without names, called as transformers calls them.
fn numbered(count: usize, problem_type: ProblemType) -> Labels {
    Labels {
        names: (0..count).map(|at| format!("LABEL_{at}")).collect(),
        problem_type,
    }
}

/// Reads labels by a map.
pub(super) struct Reader<'a> {
    labels: &'a Labels,
    /// The labels have the names that transformers gives to labels without one.
    is_numbered: bool,
    is_table: bool,
}

impl<'a> Reader<'a> {
    pub(super) fn new(labels: &'a Labels, is_table: bool) -> Self {
        Self {
            labels,
            is_numbered: labels.are_unnamed(),
            is_table,
        }
    }

    /// What a row teaches, or why its label is none of these.
    pub(super) fn read(&self, row: &Written) -> Result<Label, String> {
        match (&row.label, self.labels.problem_type) {
            (Given::Tags(tags), ProblemType::SingleLabelClassification) => {
                let pairs = tags.iter().zip(&row.tokens);
                let mut read = Vec::new();
                for (tag, token) in pairs {
                    let ignored = *tag == Scalar::Integer(IGNORED);
                    let number = if ignored {
                        None
                    } else {
                        Some(self.number(tag)?)
                    };
                    read.extend(token.zip(number));
                }
                Ok(Label::Tags(read))
            }
            (Given::One(one), ProblemType::SingleLabelClassification) => {
                Ok(Label::Class(self.number(one)?))
            }
            (Given::Many(list), ProblemType::MultiLabelClassification) => {
                let count = self.labels.names.len();
                let is_bits = list.len() == count && list.iter().all(Scalar::is_bit);
                if self.is_numbered && count > 1 && is_bits {
                    let bits = list.iter().map(|bit| bit.value().unwrap_or(0.0) as f32);
                    return Ok(Label::Classes(bits.collect()));
                }
                let mut classes = vec![0.0; count];
                for scalar in list {
                    classes[self.number(scalar)? as usize] = 1.0;
                }
                Ok(Label::Classes(classes))
            }
            (Given::One(_) | Given::Many(_), ProblemType::Regression) => self.values(&row.label),
            (label, problem) => {
                let found = match label {
                    Given::Many(_) => "a list of labels",
                    Given::Tags(_) | Given::Spans(_) => "tags of words",
                    Given::One(_) => "one label",
                };
                let wanted = match problem {
                    ProblemType::SingleLabelClassification => "one label a row",
                    ProblemType::MultiLabelClassification => "a list of labels a row",
                    ProblemType::Regression => "numbers",
                };
                Err(format!(
                    "the row has {found}, and the classifier's labels are {wanted}"
                ))
            }
        }
    }

    fn values(&self, label: &Given) -> Result<Label, String> {
        let scalars = label.scalars();
        let count = self.labels.names.len();
        if scalars.len() != count {
            return Err(format!(
                "the label has {} numbers, and the model gives {count}",
                scalars.len()
            ));
        }
        let value = |scalar: &Scalar| {
            let value = match scalar {
                Scalar::Name(text) if self.is_table => {
                    number_of(text).and_then(|read| read.value())
                }
                Scalar::Bool(_) => None,
                other => other.value(),
            };
            // A number that f32 has no place for would make the loss infinite.
            let value = value.map(|value| value as f32);
            value.filter(|value| value.is_finite()).ok_or_else(|| {
                format!(
                    "the label must be a finite number, since the other rows' are, but is {}",
                    scalar.name()
                )
            })
        };
        let values = scalars.iter().map(value);
        Ok(Label::Values(values.collect::<Result<_, _>>()?))
    }

    /// The number of a label: by its name, or by the number itself where labels have no names.
    fn number(&self, scalar: &Scalar) -> Result<u32, String> {
        let names = &self.labels.names;
        let name = scalar.name();
        if let Some(at) = names.iter().position(|known| *known == name) {
            return Ok(at as u32);
        }
        let as_number = match scalar {
            Scalar::Integer(number) => Some(*number),
            Scalar::Bool(value) => Some(i64::from(*value)),
            Scalar::Name(text) if self.is_table => text.trim().parse().ok(),
            _ => None,
        };
        if let (true, Some(number)) = (self.is_numbered, as_number) {
            let at = u32::try_from(number).ok();
            return at.filter(|at| (*at as usize) < names.len()).ok_or_else(|| {
                format!(
                    "the label is {number}, and labels are 0 to {}{}",
                    names.len().saturating_sub(1),
                    unlabelled(number)
                )
            });
        }
        let hint = as_number.map_or("", unlabelled);
        Err(format!(
            "the label {name:?} is unknown; known are {}{hint}",
            listed(names)
        ))
    }
}

/// What a number may stand for where it is no label.
fn unlabelled(number: i64) -> &'static str {
    if number == -1 {
        " (GLUE's test rows have -1 where the label is kept secret: take rows that have labels)"
    } else {
        ""
    }
}

/// Names for a message: the first of them.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 20;
    let mut list: Vec<String> = names
        .iter()
        .take(SHOWN)
        .map(|name| format!("{name:?}"))
        .collect();
    if names.len() > SHOWN {
        list.push(format!("{} more", names.len() - SHOWN));
    }
    list.join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn written(labels: &[Given]) -> Vec<Written> {
        let row = |(at, label): (usize, &Given)| {
            let tokens = (0..label.scalars().len() as u32).map(Some).collect();
            Written {
                line: at + 1,
                row: None,
                label: label.clone(),
                tokens,
            }
        };
        labels.iter().enumerate().map(row).collect()
    }

    fn scalar(value: &serde_json::Value) -> Scalar {
        match value {
            serde_json::Value::String(text) => Scalar::Name(text.clone()),
            serde_json::Value::Bool(value) => Scalar::Bool(*value),
            value if value.is_i64() => Scalar::Integer(value.as_i64().unwrap()),
            value => Scalar::Number(value.as_f64().unwrap()),
        }
    }

    /// One label a row, or a list where the value is one.
    fn given(values: &serde_json::Value) -> Vec<Written> {
        let label = |value: &serde_json::Value| match value {
            serde_json::Value::Array(list) => Given::Many(list.iter().map(scalar).collect()),
            one => Given::One(scalar(one)),
        };
        written(
            &values
                .as_array()
                .unwrap()
                .iter()
                .map(label)
                .collect::<Vec<_>>(),
        )
    }

    /// The labels that rows have, and each row read by them.
    pub(super) fn read_all(values: &serde_json::Value) -> (Labels, Vec<Label>) {
        let mut rows = given(values);
        let labels = find(&mut rows, false).unwrap();
        let reader = Reader::new(&labels, false);
        let read = rows.iter().map(|row| reader.read(row).unwrap()).collect();
        (labels, read)
    }

    fn labels(names: &[&str], problem_type: ProblemType) -> Labels {
        Labels {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            problem_type,
        }
    }

    use ProblemType::{
        MultiLabelClassification as Many, Regression, SingleLabelClassification as One,
    };

    #[test]
    fn what_labels_mean_is_told_by_their_form() {
        for (rows, names, problem) in [
            (json!(["pos", "neg", "Pos"]), vec!["Pos", "neg", "pos"], One),
            (json!([1, 0, 1]), vec!["0", "1"], One),
            (json!([10, 9, 1]), vec!["1", "9", "10"], One),
            (json!([-1, 1]), vec!["-1", "1"], One),
            (json!([true, false]), vec!["false", "true"], One),
            (json!(["1", "0"]), vec!["0", "1"], One),
            (json!([1, 2.5]), vec!["LABEL_0"], Regression),
            (json!([1.0, 0.0]), vec!["LABEL_0"], Regression),
            (
                json!([[0.5, 2.0], [1, 3]]),
                vec!["LABEL_0", "LABEL_1"],
                Regression,
            ),
            (json!([["b", "a"], []]), vec!["a", "b"], Many),
            (json!([[0, 1], [1, 1]]), vec!["LABEL_0", "LABEL_1"], Many),
            (
                json!([[0.0, 1.0], [1.0, 1.0]]),
                vec!["LABEL_0", "LABEL_1"],
                Many,
            ),
            (json!([[0, 1], [1]]), vec!["0", "1"], Many),
            (json!([[0, 4], [27, 4]]), vec!["0", "4", "27"], Many),
        ] {
            let found = find(&mut given(&rows), false).unwrap();
            assert_eq!(found, labels(&names, problem), "{rows}");
        }
    }

    #[test]
    fn labels_of_a_table_are_numbers_where_all_are() {
        for (rows, names, problem) in [
            (json!(["1", "0"]), vec!["0", "1"], One),
            (json!(["10", "9"]), vec!["9", "10"], One),
            (json!(["1", "2.5"]), vec!["LABEL_0"], Regression),
            (json!(["1", "b", "c"]), vec!["1", "b", "c"], One),
        ] {
            let found = find(&mut given(&rows), true).unwrap();
            assert_eq!(found, labels(&names, problem), "{rows}");
        }
        let (at, error) = find(&mut given(&json!(["1", "0", "nan"])), true).unwrap_err();
        assert_eq!(
            (at, error.as_str()),
            (2, "the label is nan, which is no number; leave the row out")
        );
        let (at, error) = find(&mut given(&json!(["1", "0", "x"])), true).unwrap_err();
        assert!(
            at == 2 && error.contains("is a name (x), and that of line 1 is a whole number"),
            "{error}"
        );
    }

    #[test]
    fn a_mix_names_the_first_row_that_differs() {
        for (rows, at, expected) in [
            (
                json!(["a", "b", 1]),
                2,
                "the label is a whole number (1), and that of line 1 is a name",
            ),
            (
                json!([1, true]),
                1,
                "the label is true or false (true), and that of line 1 is a whole number",
            ),
            (
                json!([0.5, "a"]),
                1,
                "the label is a name (a), and that of line 1 is a number with a fraction",
            ),
            (
                json!(["a", ["a"]]),
                1,
                "the label is a list, and that of line 1 is one label",
            ),
            (
                json!([["a"], "a"]),
                1,
                "the label is one label, and that of line 1 is a list of labels",
            ),
            (
                json!([[0.5, 1], [0.5]]),
                1,
                "the label has 1 numbers and that of line 1 has 2",
            ),
        ] {
            let (found, error) = find(&mut given(&rows), false).unwrap_err();
            assert!(found == at && error.contains(expected), "{rows}: {error}");
        }
    }

    #[test]
    fn rows_are_read_by_name_or_by_number() {
        let names = labels(&["NEG", "POS"], One);
        let numbered = labels(&["LABEL_0", "LABEL_1", "LABEL_2"], One);
        let many = labels(&["LABEL_0", "LABEL_1"], Many);
        let named_many = labels(&["0", "1"], Many);
        let value = labels(&["LABEL_0"], Regression);
        let read = |labels: &Labels, is_table: bool, value: serde_json::Value| {
            let rows = given(&json!([value]));
            Reader::new(labels, is_table).read(&rows[0])
        };
        assert_eq!(read(&names, false, json!("POS")), Ok(Label::Class(1)));
        assert_eq!(read(&numbered, false, json!(2)), Ok(Label::Class(2)));
        assert_eq!(
            read(&numbered, false, json!("LABEL_2")),
            Ok(Label::Class(2))
        );
        assert_eq!(read(&numbered, true, json!("2")), Ok(Label::Class(2)));
        assert_eq!(
            read(&many, false, json!([0, 1])),
            Ok(Label::Classes(vec![0.0, 1.0]))
        );
        assert_eq!(
            read(&many, false, json!([1])),
            Ok(Label::Classes(vec![0.0, 1.0]))
        );
        assert_eq!(
            read(&many, false, json!([])),
            Ok(Label::Classes(vec![0.0, 0.0]))
        );
        assert_eq!(
            read(&named_many, false, json!([0, 1])),
            Ok(Label::Classes(vec![1.0, 1.0]))
        );
        assert_eq!(read(&value, false, json!(2)), Ok(Label::Values(vec![2.0])));
        assert_eq!(
            read(&value, true, json!("2.5")),
            Ok(Label::Values(vec![2.5]))
        );
        for (labels, is_table, value, expected) in [
            (
                &names,
                false,
                json!("pos"),
                "the label \"pos\" is unknown; known are \"NEG\", \"POS\"",
            ),
            (&names, false, json!(1), "the label \"1\" is unknown"),
            (&names, false, json!(-1), "GLUE's test rows have -1"),
            (
                &numbered,
                false,
                json!(3),
                "the label is 3, and labels are 0 to 2",
            ),
            (&numbered, false, json!("2"), "the label \"2\" is unknown"),
            (
                &names,
                false,
                json!(["POS"]),
                "the row has a list of labels, and the classifier's labels are one label a row",
            ),
            (
                &many,
                false,
                json!(1),
                "the row has one label, and the classifier's labels are a list of labels a row",
            ),
            (
                &many,
                false,
                json!([2]),
                "the label is 2, and labels are 0 to 1",
            ),
            (
                &value,
                false,
                json!("good"),
                "the label must be a finite number, since the other rows' are, but is good",
            ),
            (&value, false, json!(1e300), "must be a finite number"),
            (&value, true, json!("NaN"), "must be a finite number"),
            (
                &value,
                false,
                json!([1, 2]),
                "the label has 2 numbers, and the model gives 1",
            ),
        ] {
            let error = read(labels, is_table, value.clone()).unwrap_err();
            assert!(error.contains(expected), "{value}: {error}");
        }
    }

    #[test]
    fn tags_fall_on_the_tokens_that_words_begin_with() {
        let tags = [-100, 3, 1].map(Scalar::Integer).to_vec();
        let mut rows = written(&[Given::Tags(tags)]);
        rows[0].tokens = vec![Some(1), None, Some(4)];
        let labels = find(&mut rows, false).unwrap();
        assert_eq!(labels.names, ["1", "3"]);
        let read = Reader::new(&labels, false).read(&rows[0]).unwrap();
        assert_eq!(read, Label::Tags(vec![(4, 0)]));
    }
}

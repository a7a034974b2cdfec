//! The table for programs: a row for the base model, then a row a method (RFC 4180).

use crate::compare::{BaseResult, Comparison, MethodResult, Spread};

use super::{added_latency, finite};

/// The table as CSV: plain names of columns, numbers in full precision, nothing where there is no number. The base
/// model is the row of kind `base`.
pub fn csv(comparison: &Comparison) -> String {
    let columns = columns(comparison);
    let mut out = String::new();
    line(columns.iter().map(|column| column.name.clone()), &mut out);
    line(
        columns.iter().map(|column| (column.base)(comparison)),
        &mut out,
    );
    for method in &comparison.methods {
        line(
            columns.iter().map(|column| (column.method)(method)),
            &mut out,
        );
    }
    out
}

/// A column: its name, and its field of the base and of a method.
struct Column<'a> {
    name: String,
    base: Box<dyn Fn(&Comparison) -> String + 'a>,
    method: Box<dyn Fn(&MethodResult) -> String + 'a>,
}

fn columns(comparison: &Comparison) -> Vec<Column<'_>> {
    let mut columns = vec![
        column(
            "method",
            |_| "base model".to_owned(),
            |method| method.name.clone(),
        ),
        column(
            "kind",
            |_| "base".to_owned(),
            |method| match serde_json::to_value(method.method) {
                Ok(serde_json::Value::String(name)) => name,
                _ => method.method.title().to_owned(),
            },
        ),
        of_methods("trainable_parameters", |method| {
            method.trainable_parameters.to_string()
        }),
        of_methods("trainable_percent", |method| {
            number(Some(
                method.trainable_parameters as f64 / comparison.base_parameters as f64 * 100.0,
            ))
        }),
        of_methods("checkpoint_bytes", |method| whole(method.checkpoint_bytes)),
        of_methods("learning_rate", |method| number(method.learning_rate)),
        of_methods("runs", |method| method.runs.len().to_string()),
        of_methods("missing_runs", |method| method.missing_runs.to_string()),
    ];
    columns.extend(spread("loss", |base| base.loss, |method| method.loss));
    for metric in &comparison.metrics {
        columns.extend(spread(
            &plain(metric),
            |base| base.metrics.get(metric).copied(),
            |method| method.scores.get(metric).copied(),
        ));
    }
    columns.extend([
        of_methods("tokens_per_second", |method| {
            number(method.cost.map(|cost| cost.tokens_per_second))
        }),
        of_methods("peak_memory_bytes", |method| {
            whole(method.cost.map(|cost| cost.peak_memory))
        }),
        column(
            "milliseconds_per_token",
            |comparison| number(comparison.base.milliseconds_per_token),
            |method| number(method.cost.map(|cost| cost.milliseconds_per_token)),
        ),
        of_methods("base_milliseconds_per_token", |method| {
            number(method.cost.map(|cost| cost.base_milliseconds_per_token))
        }),
        of_methods("added_latency_percent", |method| {
            number(added_latency(method))
        }),
        of_methods("mergeable", |method| {
            method
                .cost
                .map_or(String::new(), |cost| cost.mergeable.to_string())
        }),
        of_methods("positions_taken", |method| {
            whole(method.cost.map(|cost| cost.positions_taken))
        }),
        of_methods("switch_bytes", |method| {
            whole(method.cost.map(|cost| cost.switch_bytes))
        }),
        of_methods("switch_milliseconds", |method| {
            number(method.cost.map(|cost| cost.switch_milliseconds))
        }),
    ]);
    columns
}

fn column<'a>(
    name: &str,
    base: impl Fn(&Comparison) -> String + 'a,
    method: impl Fn(&MethodResult) -> String + 'a,
) -> Column<'a> {
    Column {
        name: name.to_owned(),
        base: Box::new(base),
        method: Box::new(method),
    }
}

/// A column that the base has nothing for.
fn of_methods<'a>(name: &str, method: impl Fn(&MethodResult) -> String + 'a) -> Column<'a> {
    column(name, |_| String::new(), method)
}

/// Mean, deviation and number of seeds.
fn spread<'a>(
    name: &str,
    base: impl Fn(&BaseResult) -> Option<f64> + 'a,
    method: impl Fn(&MethodResult) -> Option<Spread> + Copy + 'a,
) -> [Column<'a>; 3] {
    [
        column(
            &format!("{name}_mean"),
            move |comparison| number(base(&comparison.base)),
            move |result| number(method(result).map(|spread| spread.mean)),
        ),
        of_methods(&format!("{name}_deviation"), move |result| {
            number(method(result).and_then(|spread| spread.deviation))
        }),
        of_methods(&format!("{name}_seeds"), move |result| {
            whole(method(result).map(|spread| spread.seeds))
        }),
    ]
}

/// The shortest digits that give the same number again.
fn number(value: Option<f64>) -> String {
    value
        .and_then(finite)
        .map_or(String::new(), |value| value.to_string())
}

fn whole<T: ToString>(value: Option<T>) -> String {
    value.map_or(String::new(), |value| value.to_string())
}

/// A metric's name as that of a column: `ROUGE-L` is `rouge_l`.
fn plain(name: &str) -> String {
    name.chars()
        .map(|c| {
            if c.is_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '_'
            }
        })
        .collect()
}

/// One line; a field with a comma, a quote or a line break is quoted.
fn line(fields: impl Iterator<Item = String>, out: &mut String) {
    for (index, field) in fields.enumerate() {
        if index > 0 {
            out.push(',');
        }
        if field.contains([',', '"', '\r', '\n']) {
            out.push('"');
            out.push_str(&field.replace('"', "\"\""));
            out.push('"');
        } else {
            out.push_str(&field);
        }
    }
    out.push_str("\r\n");
}

//! Methods side by side as one page that needs no network and no script, and as CSV for whoever wants to plot more.
//!
//! Both are pure functions of a [`Comparison`]. A number that is not there, or that is none, is shown as a dash on the
//! page and left empty in the CSV.

mod csv;
mod plots;
mod table;

use std::fmt::Write;

use serde_json::Value;

use super::page::{self, escape};
use crate::compare::{Comparison, MethodResult, Unit};
use crate::units::grouped;

pub use csv::csv;

const STYLE: &str = include_str!("comparison.css");

/// What stands for a number that is not there.
const NONE: &str = "–";

/// The page.
pub fn html(comparison: &Comparison) -> String {
    let mut page = page::begin(&comparison.title, &summary(comparison), STYLE);
    page.push_str(&table::results(comparison));
    notes(comparison, &mut page);
    section("Quality", "large", &plots::quality(comparison), &mut page);
    section("Cost", "", &plots::cost(comparison), &mut page);
    page.push_str(&table::sweep(&comparison.methods));
    page.push_str(&table::options(&comparison.methods));
    page::end(&mut page, "comparison.json, which holds every run");
    page
}

/// What was compared, and what came out best, in one sentence.
fn summary(comparison: &Comparison) -> String {
    let count = comparison.methods.len();
    let mut text = format!(
        "{count} {} on {}",
        if count == 1 { "method" } else { "methods" },
        comparison.model
    );
    if comparison.base_parameters > 0 {
        let _ = write!(
            text,
            " ({} parameters)",
            grouped(comparison.base_parameters)
        );
    }
    if !comparison.held_out.is_empty() {
        let _ = write!(text, ", measured on {}", comparison.held_out);
    }
    let losses = comparison.methods.iter().filter_map(|method| {
        let loss = finite(method.loss?.mean)?;
        Some((loss, method))
    });
    if let Some((loss, method)) = losses.min_by(|one, other| one.0.total_cmp(&other.0)) {
        let decimals = table::decimals(loss);
        let _ = write!(
            text,
            "; the lowest held-out loss is {loss:.decimals$}, with {}",
            method.name
        );
        if let Some(base) = comparison.base.loss.and_then(finite) {
            let _ = write!(text, ", against {base:.decimals$} before training");
        }
    }
    text.push('.');
    text
}

/// How to read the table, and how its numbers came about.
fn notes(comparison: &Comparison, page: &mut String) {
    let missing = comparison.missing_runs();
    if missing > 0 {
        let (runs, are) = if missing == 1 {
            ("run", "is")
        } else {
            ("runs", "are")
        };
        let _ = writeln!(
            page,
            "<p class=\"warning\">{missing} {runs} {are} not finished: the table shows what there is.</p>"
        );
    }
    page.push_str(
        "<p class=\"note\"><strong>Marked</strong>: the best of its column. \
         ± is the sample standard deviation over seeds, (n) their number. ",
    );
    if !comparison.decoding.is_empty() {
        let _ = write!(page, "Texts: {}. ", escape(&comparison.decoding));
    }
    if comparison.has_costs() {
        if !comparison.machine.is_empty() {
            let _ = write!(
                page,
                "Speed, memory, latency and task switch: {}. ",
                escape(&comparison.machine)
            );
        }
        let timed = match comparison.unit {
            Unit::Token => "a generated token",
            Unit::Row => "a row that is classified",
        };
        let _ = write!(
            page,
            "Added latency is that of {timed} at batch 1, with the adapter beside the base, in % of the \
             base’s own; once merged there is none."
        );
    } else {
        page.push_str("Speed, memory and latency were not measured.");
    }
    page.push_str("</p>\n");
}

/// Plots under a heading, if there are any.
fn section(title: &str, class: &str, plots: &str, page: &mut String) {
    if !plots.is_empty() {
        let _ = writeln!(
            page,
            "<h2>{title}</h2>\n<section class=\"charts {class}\">\n{plots}</section>"
        );
    }
}

/// The number, if it is one.
fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

/// What a method adds to the time of a token, in % of the base's.
fn added_latency(method: &MethodResult) -> Option<f64> {
    finite(100.0 * method.cost?.added_latency())
}

/// A percentage with its sign: `+4.2 %`.
fn signed_percent(value: f64) -> String {
    let text = format!("{value:+.1}");
    match text.as_str() {
        "+0.0" | "-0.0" => "0.0 %".to_owned(),
        _ => format!("{} %", text.replace('-', "−")),
    }
}

/// An option's value: `4`, `all-linear`, `q_proj, v_proj`.
fn option_value(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => {
            let values: Vec<String> = values.iter().map(option_value).collect();
            values.join(", ")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;

//! The tables of a comparison's page.

use std::fmt::Write;
use std::time::Duration;

use super::{NONE, added_latency, finite, option_value, signed_percent};
use crate::compare::{Comparison, Cost, MethodResult, Spread, Unit};
use crate::metrics;
use crate::report::page::escape;
use crate::report::svg::colour;
use crate::units::{bytes, duration, grouped, short};

/// A column of the table of results; its first cell is the base model's.
struct Column {
    head: String,
    note: &'static str,
    cells: Vec<Cell>,
}

/// What a cell says, and what it says below that in small.
#[derive(Default)]
struct Cell {
    text: Option<String>,
    small: String,
    best: bool,
}

impl Cell {
    fn new(text: impl Into<String>) -> Self {
        Self {
            text: Some(text.into()),
            ..Self::default()
        }
    }

    fn with(text: impl Into<String>, small: impl Into<String>) -> Self {
        Self {
            small: small.into(),
            ..Self::new(text)
        }
    }
}

/// Which end of a column is the better one.
#[derive(Clone, Copy)]
enum Better {
    Lower,
    Higher,
}

/// The table of results.
pub(super) fn results(comparison: &Comparison) -> String {
    let columns = columns(comparison);
    let mut out = String::from(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Results\">\n<table class=\"matrix results\">\n\
         <thead><tr><th scope=\"col\">Method</th>",
    );
    for column in &columns {
        let _ = write!(out, "<th scope=\"col\">{}", escape(&column.head));
        small(column.note, &mut out);
        out.push_str("</th>");
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    // A new classifier says nothing before it is trained.
    if comparison.unit == Unit::Token {
        out.push_str("<tr class=\"base\"><th scope=\"row\">Base model</th>");
        row(&columns, 0, &mut out);
    }
    for (index, method) in comparison.methods.iter().enumerate() {
        out.push_str("<tr>");
        name(index, method, &mut out);
        row(&columns, index + 1, &mut out);
    }
    out.push_str("</tbody>\n</table>\n</div>\n");
    out
}

/// The cells of one row after its name.
fn row(columns: &[Column], index: usize, out: &mut String) {
    for column in columns {
        let none = Cell::default();
        let cell = column.cells.get(index).unwrap_or(&none);
        let text = escape(cell.text.as_deref().unwrap_or(NONE));
        if cell.best {
            let _ = write!(out, "<td class=\"best\"><strong>{text}</strong>");
        } else {
            let _ = write!(out, "<td>{text}");
        }
        small(&cell.small, out);
        out.push_str("</td>");
    }
    out.push_str("</tr>\n");
}

fn small(text: &str, out: &mut String) {
    if !text.is_empty() {
        let _ = write!(out, "<small>{}</small>", escape(text));
    }
}

/// The head of a method's row, with its colour of the plots and the runs that it lacks.
fn name(index: usize, method: &MethodResult, out: &mut String) {
    let _ = write!(
        out,
        "<th scope=\"row\"><i class=\"dot {}\"></i>{}",
        colour(index),
        escape(&method.name)
    );
    let done = method.runs.len();
    let text = match (done, method.missing_runs) {
        (0, 0) => "no runs".to_owned(),
        (_, 0) => String::new(),
        (0, _) => "no run is finished".to_owned(),
        (_, missing) => format!("{done} of {} runs finished", done + missing),
    };
    if !text.is_empty() {
        let _ = write!(out, "<small class=\"warning\">{text}</small>");
    }
    out.push_str("</th>");
}

fn columns(comparison: &Comparison) -> Vec<Column> {
    let base = &comparison.base;
    let methods = &comparison.methods;
    let of_methods = |head: &str, note: &'static str, cell: &dyn Fn(&MethodResult) -> Cell| {
        let cells = std::iter::once(Cell::default()).chain(methods.iter().map(cell));
        Column {
            head: head.to_owned(),
            note,
            cells: cells.collect(),
        }
    };
    let of_costs = |head: &str, note: &'static str, cell: &dyn Fn(Cost) -> Cell| {
        of_methods(head, note, &|method| {
            method.cost.map_or_else(Cell::default, cell)
        })
    };
    let mut columns = vec![
        of_methods("Trainable", "parameters, % of base", &|method| {
            let share = method.trainable_parameters as f64 / comparison.base_parameters as f64;
            Cell::with(
                grouped(method.trainable_parameters),
                finite(share).map_or(String::new(), percent),
            )
        }),
        of_methods("Checkpoint", "", &|method| Cell {
            text: method.checkpoint_bytes.map(bytes),
            ..Cell::default()
        }),
        of_methods("Learning rate", "", &|method| Cell {
            text: method.learning_rate.and_then(finite).map(short),
            ..Cell::default()
        }),
        quality(
            "Held-out loss".to_owned(),
            comparison.unit.of_loss(),
            Better::Lower,
            base.loss,
            methods.iter().map(|method| method.loss),
        ),
    ];
    for metric in &comparison.metrics {
        columns.push(quality(
            metrics::title(metric).to_owned(),
            "",
            if metrics::is_error(metric) {
                Better::Lower
            } else {
                Better::Higher
            },
            base.metrics.get(metric).copied(),
            methods
                .iter()
                .map(|method| method.scores.get(metric).copied()),
        ));
    }
    let timed = match comparison.unit {
        Unit::Token => "a token, batch 1",
        Unit::Row => "a row, batch 1",
    };
    let mut latency = of_methods("Added latency", timed, &|method| {
        let Some(cost) = method.cost else {
            return Cell::default();
        };
        let merged = if cost.mergeable { "merged: none" } else { "" };
        Cell {
            text: added_latency(method).map(signed_percent),
            small: merged.to_owned(),
            best: false,
        }
    });
    if let Some(time) = base.milliseconds_per_token.and_then(finite) {
        latency.cells[0].small = format!("{} ms", short(time));
    }
    columns.extend([
        of_costs("Training speed", "tokens a second", &|cost| Cell {
            text: finite(cost.tokens_per_second).map(speed),
            ..Cell::default()
        }),
        of_costs("Peak memory", "of training", &|cost| {
            Cell::new(bytes(cost.peak_memory))
        }),
        latency,
        of_costs("Context taken", "positions", &|cost| {
            Cell::new(grouped(cost.positions_taken as u64))
        }),
        of_costs("Task switch", "", &|cost| {
            let time = finite(cost.switch_milliseconds);
            let time = time.and_then(|time| Duration::try_from_secs_f64(time / 1e3).ok());
            Cell::with(
                bytes(cost.switch_bytes),
                time.map_or(String::new(), duration),
            )
        }),
    ]);
    columns
}

/// A column of means over seeds, with the best one marked. All have as many decimals as suit the middle one.
fn quality(
    head: String,
    note: &'static str,
    better: Better,
    base: Option<f64>,
    methods: impl Iterator<Item = Option<Spread>>,
) -> Column {
    let base = base.map(|mean| Spread {
        mean,
        deviation: None,
        seeds: 0,
    });
    let spreads: Vec<Option<Spread>> = std::iter::once(base)
        .chain(methods)
        .map(|spread| spread.filter(|spread| spread.mean.is_finite()))
        .collect();
    let mut sorted: Vec<f64> = spreads.iter().flatten().map(|spread| spread.mean).collect();
    sorted.sort_by(f64::total_cmp);
    let decimals = sorted
        .get(sorted.len() / 2)
        .map_or(0, |value| decimals(*value));
    let text = |value: f64| format!("{value:.decimals$}");
    let best = match better {
        Better::Lower => sorted.first(),
        Better::Higher => sorted.last(),
    };
    // What looks the same is equally good; a lone value, or one that all methods share, is not the best of anything.
    let best = best.map(|best| text(*best)).filter(|best| {
        let methods = || spreads.iter().skip(1).flatten();
        let shared = methods().all(|spread| text(spread.mean) == *best);
        sorted.len() > 1 && !(shared && methods().count() > 1)
    });
    let cells = spreads.into_iter().map(|spread| {
        let Some(Spread {
            mean,
            deviation,
            seeds,
        }) = spread
        else {
            return Cell::default();
        };
        let mean = text(mean);
        let small = match deviation.and_then(finite) {
            Some(deviation) => format!("± {} ({seeds})", text(deviation)),
            None if seeds > 0 => format!("({seeds})"),
            None => String::new(),
        };
        Cell {
            best: best.as_ref() == Some(&mean),
            text: Some(mean),
            small,
        }
    });
    Column {
        head,
        note,
        cells: cells.collect(),
    }
}

/// Decimals that give a value four digits, and at most four decimals.
pub(super) fn decimals(value: f64) -> usize {
    let whole = value.abs().max(1e-1).log10().floor() as i32;
    usize::try_from(3 - whole).unwrap_or(0).min(4)
}

/// A share of the base's parameters: `0.34 %`.
fn percent(share: f64) -> String {
    let value = share * 100.0;
    match value {
        0.01..9.995 => format!("{value:.2} %"),
        9.995..99.95 => format!("{value:.1} %"),
        0.0001..0.01 => format!("{value:.4} %"),
        _ => format!("{} %", short(value)),
    }
}

/// Tokens a second.
pub(super) fn speed(value: f64) -> String {
    if value >= 100.0 {
        grouped(value.round() as u64)
    } else {
        short(value)
    }
}

/// Learning rates tried, with the losses that they gave; empty if none were.
pub(super) fn sweep(methods: &[MethodResult]) -> String {
    let mut rates: Vec<f64> = methods
        .iter()
        .flat_map(|method| method.sweep.iter().map(|(rate, _)| *rate))
        .filter(|rate| rate.is_finite())
        .collect();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    if rates.is_empty() {
        return String::new();
    }
    let mut out = String::from(
        "<h2>Learning rates tried</h2>\n<p class=\"note\">Loss on the validation rows; <strong>marked</strong> is the \
         rate that was used.</p>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Learning rates tried\">\n\
         <table class=\"matrix\">\n<thead><tr><th scope=\"col\">Method</th>",
    );
    for rate in &rates {
        let _ = write!(out, "<th scope=\"col\">{}</th>", short(*rate));
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for (index, method) in methods.iter().enumerate() {
        if method.sweep.is_empty() {
            continue;
        }
        let _ = write!(
            out,
            "<tr><th scope=\"row\"><i class=\"dot {}\"></i>{}</th>",
            colour(index),
            escape(&method.name)
        );
        for rate in &rates {
            let tried = method.sweep.iter().rfind(|(other, _)| other == rate);
            let text = match tried {
                Some((_, Some(loss))) if loss.is_finite() => format!("{loss:.0$}", decimals(*loss)),
                Some(_) => "diverged".to_owned(),
                None => NONE.to_owned(),
            };
            if tried.is_some() && method.learning_rate == Some(*rate) {
                let _ = write!(out, "<td class=\"best\"><strong>{text}</strong></td>");
            } else {
                let _ = write!(out, "<td>{text}</td>");
            }
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody>\n</table>\n</div>\n");
    out
}

/// What each method is, its options, and its runs.
pub(super) fn options(methods: &[MethodResult]) -> String {
    if methods.is_empty() {
        return String::new();
    }
    let mut out = String::from(
        "<h2>Methods</h2>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Methods\">\n\
         <table class=\"matrix words\">\n<thead><tr><th scope=\"col\">Name</th><th scope=\"col\">Method</th>\
         <th scope=\"col\">Options</th><th scope=\"col\">Runs</th></tr></thead>\n<tbody>\n",
    );
    for (index, method) in methods.iter().enumerate() {
        let options: Vec<String> = method
            .options
            .iter()
            .map(|(key, value)| {
                format!(
                    "<code>{}: {}</code>",
                    escape(key),
                    escape(&option_value(value))
                )
            })
            .collect();
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\"><i class=\"dot {}\"></i>{}</th><td>{}</td><td class=\"options\">{}</td><td>{}</td></tr>",
            colour(index),
            escape(&method.name),
            method.method.title(),
            if options.is_empty() {
                NONE.to_owned()
            } else {
                options.join(" ")
            },
            runs(method)
        );
    }
    out.push_str("</tbody>\n</table>\n</div>\n");
    out
}

/// The seeds of a method's runs and the time that one took: `seeds 1, 2, 3; 12 min 4 s each`.
fn runs(method: &MethodResult) -> String {
    let seeds: Vec<String> = method.runs.iter().map(|run| run.seed.to_string()).collect();
    let time = method.runs.iter().map(|run| run.seconds).sum::<f64>() / seeds.len() as f64;
    let time = Duration::try_from_secs_f64(time).ok().map(duration);
    match (seeds.len(), time) {
        (0, _) => NONE.to_owned(),
        (1, None) => format!("seed {}", seeds[0]),
        (1, Some(time)) => format!("seed {}; {time}", seeds[0]),
        (_, None) => format!("seeds {}", seeds.join(", ")),
        (_, Some(time)) => format!("seeds {}; {time} each", seeds.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_decimals() {
        let shares = [0.0034, 0.5, 1.0, 0.000_021_4, 1.2e-8].map(percent);
        assert_eq!(
            shares,
            ["0.34 %", "50.0 %", "100 %", "0.0021 %", "1.2e-6 %"]
        );
        let places = [1.2043, 66.13, 0.4623, 0.0, 1500.0].map(decimals);
        assert_eq!(places, [3, 2, 4, 4, 0]);
    }
}

//! Figures as text: names and values, and tables whose columns line up.

use std::collections::HashSet;

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::LabelScores;
use crate::metrics::title;
use crate::units::{grouped, short};

/// Labels that a table shows at most.
pub(super) const MOST_LABELS: usize = 12;
/// Terminal columns of a label's name in a table.
pub(super) const NAME_WIDTH: usize = 30;
/// Terminal columns between two columns of a table.
pub(super) const GAP: usize = 2;

/// Lines of a name and a value: the number of `what`, and figures under their titles.
pub(super) fn figures(what: &str, count: u64, figures: &[(&'static str, Option<f64>)]) -> String {
    let mut rows = vec![vec![what.to_owned(), grouped(count)]];
    for &(name, value) in figures {
        let text = match value {
            // Errors have the unit of the data, so four decimals could be far too few.
            Some(value) if name.ends_with("_error") && name.starts_with("mean_") => short(value),
            value => figure_or_undefined(value),
        };
        rows.push(vec![title(name).to_owned(), text]);
    }
    columns(&rows, 2)
}

/// A line a label: all in their order, or those with the lowest F1 where they are more than a terminal shows.
pub(super) fn label_table(what: &str, labels: &[LabelScores]) -> String {
    let head = [what, "precision", "recall", "F1", "gold"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut shown: Vec<&LabelScores> = labels.iter().collect();
    let mut heading = String::new();
    if labels.len() > MOST_LABELS {
        // A label that occurs nowhere has F1 0, and nothing to look at.
        shown.retain(|label| label.support > 0);
        shown.sort_by(|a, b| a.f1.total_cmp(&b.f1));
        shown.truncate(MOST_LABELS);
        heading = format!(
            "The {} of {} {what}s with the lowest F1:\n",
            shown.len(),
            grouped(labels.len() as u64)
        );
    }
    rows.extend(shown.into_iter().map(|label| {
        vec![
            shortened(&label.label, NAME_WIDTH),
            figure(label.precision),
            figure(label.recall),
            figure(label.f1),
            grouped(label.support),
        ]
    }));
    heading + &columns(&rows, 1)
}

/// A figure between −1 and 1.
pub(super) fn figure(value: f64) -> String {
    format!("{value:.4}")
}

/// A figure, or that there is none.
pub(super) fn figure_or_undefined(value: Option<f64>) -> String {
    value.map_or_else(|| "undefined".to_owned(), figure)
}

/// Rows as lines. The first `left` columns are text, the others numbers, which line up at their right.
pub(super) fn columns(rows: &[Vec<String>], left: usize) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cells = |column: usize| rows.iter().filter_map(move |row| row.get(column));
    let widths: Vec<usize> = (0..count)
        .map(|column| cells(column).map(|cell| cell.width()).max().unwrap_or(0))
        .collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            if column > 0 {
                line.push_str(&" ".repeat(GAP));
            }
            let padding = " ".repeat(widths[column] - cell.width());
            if column < left {
                line.extend([cell.as_str(), &padding]);
            } else {
                line.extend([padding.as_str(), cell]);
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// A name in at most `width` terminal columns, `…` standing for its end.
pub(super) fn shortened(name: &str, width: usize) -> String {
    let name = escaped(name);
    if name.width() <= width {
        return name;
    }
    let mut kept = fitting(name.chars(), width);
    kept.push('…');
    kept.into_iter().collect()
}

/// A name in at most `width` terminal columns, `…` standing for its beginning.
fn shortened_at_start(name: &str, width: usize) -> String {
    let name = escaped(name);
    if name.width() <= width {
        return name;
    }
    let mut kept = fitting(name.chars().rev(), width);
    kept.push('…');
    kept.into_iter().rev().collect()
}

/// Names in at most `width` terminal columns each: without their ends, or without their beginnings where they share these. Nothing
/// if they cannot be told apart either way.
pub(super) fn told_apart(names: &[String], width: usize) -> Option<Vec<String>> {
    [shortened, shortened_at_start]
        .into_iter()
        .find_map(|shorten| {
            let short: Vec<String> = names.iter().map(|name| shorten(name, width)).collect();
            let different: HashSet<&String> = short.iter().collect();
            (different.len() == names.len()).then_some(short)
        })
}

/// The first of `chars` that fit in `width` terminal columns beside a `…`.
fn fitting(chars: impl Iterator<Item = char>, width: usize) -> Vec<char> {
    let mut used = 1;
    let kept = chars.take_while(|c| {
        used += c.width().unwrap_or(0);
        used <= width
    });
    kept.collect()
}

/// A name with its control characters escaped: names come from data, and must not move the cursor.
fn escaped(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_by_what_a_terminal_shows() {
        assert_eq!(shortened("positive", 8), "positive");
        assert_eq!(shortened("positive", 7), "positi…");
        assert_eq!(shortened("模型模型", 6), "模型…");
        assert_eq!(shortened("a\u{1b}[2Jb\n", 20), "a\\u{1b}[2Jb\\n");
    }

    #[test]
    fn names_stay_different() {
        let names = |names: &[&str]| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        };
        let apart = |list: &[&str], width| told_apart(&names(list), width);
        assert_eq!(
            apart(&["negative", "neutral"], 4),
            Some(names(&["neg…", "neu…"]))
        );
        assert_eq!(
            apart(&["card lost", "card late"], 5),
            Some(names(&["…lost", "…late"]))
        );
        assert_eq!(apart(&["a cat sat", "a dog sat"], 3), None);
    }

    #[test]
    fn many_labels_show_the_worst() {
        let labels: Vec<LabelScores> = (0..40)
            .map(|index| LabelScores {
                label: format!("intent {index}"),
                precision: 0.5,
                recall: 0.5,
                f1: if index == 0 {
                    0.0
                } else {
                    1.0 / f64::from(index)
                },
                support: u64::from(index > 0) * 1000,
            })
            .collect();
        let table = label_table("label", &labels);
        assert_eq!(table.lines().count(), 2 + MOST_LABELS, "{table}");
        assert!(table.starts_with("The 12 of 40 labels with the lowest F1:\n"));
        assert!(
            table.contains("\nintent 39     0.5000  0.5000  0.0256  1,000\n"),
            "{table}"
        );
        assert!(!table.contains("intent 0 "), "{table}");
    }
}

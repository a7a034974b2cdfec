//! Tables for a terminal: columns line up by what the terminal shows, and narrow terminals get something readable.

use console::{measure_text_width, style};
use unicode_width::UnicodeWidthChar;

/// How a column lines up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Rows under headings. Cells may hold colours (they count nothing) but no line breaks.
#[derive(Debug, Clone)]
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

/// Columns between two columns.
const GAP: usize = 2;
/// Text is not cut to fewer columns than this.
const LEAST_WIDTH: usize = 12;

impl Table {
    /// A table without rows.
    pub fn new<'a>(columns: impl IntoIterator<Item = (&'a str, Align)>) -> Self {
        Self {
            columns: columns
                .into_iter()
                .map(|(title, align)| (title.to_string(), align))
                .collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; missing cells are empty and cells without a column are dropped.
    pub fn row(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        let mut row: Vec<String> = cells
            .into_iter()
            .map(Into::into)
            .take(self.columns.len())
            .collect();
        row.resize(self.columns.len(), String::new());
        self.rows.push(row);
    }

    /// The table in at most `width` columns. Text columns are cut from the left, where names share their beginnings;
    /// where that is not enough, each row becomes a paragraph of `heading: cell` lines.
    pub fn render(&self, width: usize, color: bool) -> String {
        let widths = self.widths();
        let spare = (GAP * widths.len().saturating_sub(1)) + widths.iter().sum::<usize>();
        let Some(widths) = self.shrink(widths, spare.saturating_sub(width)) else {
            return self.render_paragraphs(color);
        };
        let mut out = String::new();
        let titles = self.columns.iter().map(|(title, _)| title.as_str());
        let heading = self.line(titles, &widths);
        out.push_str(&bold(&heading, color));
        out.push('\n');
        for row in &self.rows {
            out.push_str(&self.line(row.iter().map(String::as_str), &widths));
            out.push('\n');
        }
        out
    }

    fn widths(&self) -> Vec<usize> {
        (0..self.columns.len())
            .map(|column| {
                let cells = self.rows.iter().map(|row| measure_text_width(&row[column]));
                cells
                    .chain([measure_text_width(&self.columns[column].0)])
                    .max()
                    .unwrap_or(0)
            })
            .collect()
    }

    /// Takes `excess` columns from the widest text columns, or gives up.
    fn shrink(&self, mut widths: Vec<usize>, excess: usize) -> Option<Vec<usize>> {
        for _ in 0..excess {
            let widest = (0..widths.len())
                .filter(|&column| {
                    self.columns[column].1 == Align::Left && widths[column] > LEAST_WIDTH
                })
                .max_by_key(|&column| widths[column])?;
            widths[widest] -= 1;
        }
        Some(widths)
    }

    fn line<'a>(&self, cells: impl Iterator<Item = &'a str>, widths: &[usize]) -> String {
        let mut line = String::new();
        for (column, (cell, &width)) in cells.zip(widths).enumerate() {
            if column > 0 {
                line.push_str(&" ".repeat(GAP));
            }
            let cell = cut_left(cell, width);
            let padding = " ".repeat(width - measure_text_width(&cell).min(width));
            match self.columns[column].1 {
                Align::Left => line.extend([cell.as_str(), &padding]),
                Align::Right => line.extend([padding.as_str(), &cell]),
            }
        }
        line.truncate(line.trim_end().len());
        line
    }

    fn render_paragraphs(&self, color: bool) -> String {
        let paragraphs = self.rows.iter().map(|row| {
            let lines = self.columns.iter().zip(row).map(|((title, _), cell)| {
                let label = if title.is_empty() {
                    String::new()
                } else {
                    format!("{}: ", bold(title, color))
                };
                format!("{label}{cell}\n")
            });
            lines.collect::<String>()
        });
        paragraphs.collect::<Vec<_>>().join("\n")
    }
}

/// Lines of a name and a value each, the values below each other.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    lines: Vec<(String, String)>,
}

impl Facts {
    /// Adds a line.
    pub fn add(&mut self, name: &str, value: impl Into<String>) {
        self.lines.push((name.to_string(), value.into()));
    }

    /// The lines under a heading, which may be empty.
    pub fn render(&self, heading: &str, color: bool) -> String {
        let width = self
            .lines
            .iter()
            .map(|(name, _)| measure_text_width(name))
            .max()
            .unwrap_or(0);
        let mut out = String::new();
        if !heading.is_empty() {
            out.extend([bold(heading, color).as_str(), "\n"]);
        }
        for (name, value) in &self.lines {
            let padding = " ".repeat(width - measure_text_width(name) + GAP);
            out.extend([name, &padding, value, "\n"]);
        }
        out
    }
}

/// Bold where the terminal shows it.
pub fn bold(text: &str, color: bool) -> String {
    style(text).bold().force_styling(color).to_string()
}

/// Pale where the terminal shows it.
pub fn dim(text: &str, color: bool) -> String {
    style(text).dim().force_styling(color).to_string()
}

/// The end of `text` in at most `width` columns. Coloured text that must be cut loses its colours.
fn cut_left(text: &str, width: usize) -> String {
    if measure_text_width(text) <= width {
        return text.to_string();
    }
    let plain = console::strip_ansi_codes(text);
    let mut used = 1;
    let kept: Vec<char> = plain
        .chars()
        .rev()
        .take_while(|c| {
            used += c.width().unwrap_or(0);
            used <= width
        })
        .collect();
    std::iter::once('…').chain(kept.into_iter().rev()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new([
            ("Module", Align::Left),
            ("r", Align::Right),
            ("Ratio", Align::Right),
        ]);
        table.row(["model.layers.0.self_attn.q_proj", "8", "0.0123"]);
        table.row(["模型.层.1", "16", "1.5"]);
        table
    }

    #[test]
    fn columns_line_up_by_what_is_seen() {
        insta::assert_snapshot!(table().render(80, false), @r#"
        Module                            r   Ratio
        model.layers.0.self_attn.q_proj   8  0.0123
        模型.层.1                        16     1.5
        "#);
    }

    #[test]
    fn narrow_terminals_cut_names_from_the_left() {
        let text = table().render(30, false);
        assert!(
            text.lines().all(|line| measure_text_width(line) <= 30),
            "{text}"
        );
        insta::assert_snapshot!(text, @r#"
        Module               r   Ratio
        ….self_attn.q_proj   8  0.0123
        模型.层.1           16     1.5
        "#);
    }

    #[test]
    fn very_narrow_terminals_get_paragraphs() {
        insta::assert_snapshot!(table().render(20, false), @r#"
        Module: model.layers.0.self_attn.q_proj
        r: 8
        Ratio: 0.0123

        Module: 模型.层.1
        r: 16
        Ratio: 1.5
        "#);
    }

    #[test]
    fn facts_line_up() {
        let mut facts = Facts::default();
        facts.add("r", "8");
        facts.add("α/√r", "2.8");
        assert_eq!(facts.render("LoRA", false), "LoRA\nr     8\nα/√r  2.8\n");
        assert_eq!(Facts::default().render("", false), "");
    }

    #[test]
    fn colours_take_no_room() {
        let mut table = Table::new([("A", Align::Left), ("B", Align::Left)]);
        table.row([
            style("x").green().force_styling(true).to_string(),
            "y".to_string(),
        ]);
        assert_eq!(
            console::strip_ansi_codes(&table.render(80, true)),
            "A  B\nx  y\n"
        );
    }

    #[test]
    fn rows_of_the_wrong_length_are_evened_out() {
        let mut table = Table::new([("A", Align::Left), ("B", Align::Left)]);
        table.row(["x"]);
        table.row(["x", "y", "z"]);
        assert_eq!(table.render(80, false), "A  B\nx\nx  y\n");
    }
}

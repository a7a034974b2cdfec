//! Plots as inline SVG, coloured by the page's style sheet: curves over steps, points with error bars, bars.
//!
//! Every plot is a [`Frame`](axes::Frame) with two axes, inside a figure that has a title and a legend. A series that
//! has a colour of its own names it by a class of [`colour`].

mod axes;
mod bars;
mod labels;
mod lines;
mod scatter;

use std::fmt::Write;

use unicode_width::UnicodeWidthStr;

use super::page::escape;

pub(super) use axes::range;
pub(super) use bars::{Bar, Bars};
pub(super) use lines::{Chart, Series};
pub(super) use scatter::{Point, Scatter};

/// Colours that comparison.css has, and kinds of dashes. They have no common factor: 30 pairs are different.
const COLOURS: usize = 10;
const DASHES: usize = 3;

/// The class of the `index`th of many series: a colour and a kind of dash.
pub(super) fn colour(index: usize) -> String {
    format!("k{} d{}", index % COLOURS, index % DASHES)
}

/// The words around a plot.
struct Figure<'a> {
    title: &'a str,
    /// What is counted, or another remark; may be empty.
    unit: &'a str,
    /// Class and name of each series; a legend of one is left out.
    legend: Vec<(&'a str, &'a str)>,
    /// The plot in a sentence, for readers who do not see it.
    description: String,
    size: Size,
}

/// Sizes that a plot is drawn in.
#[derive(Debug, Clone, Copy)]
enum Size {
    /// One for all screens.
    Any(f64, f64),
    /// The style sheet shows one of the two: letters keep their size on a phone and on a wide screen.
    Two {
        wide: (f64, f64),
        narrow: (f64, f64),
    },
}

/// The size of plots in which many series have to find room.
const LARGE: Size = Size::Two {
    wide: (620.0, 380.0),
    narrow: (400.0, 340.0),
};

impl Figure<'_> {
    /// The figure; `full` lets it span the page, `draw` fills a picture of a width and a height.
    fn render(&self, full: bool, draw: impl Fn(f64, f64, &mut String)) -> String {
        let class = if full { " class=\"full\"" } else { "" };
        let mut out = format!("<figure{class}>\n<figcaption><b>{}</b>", escape(self.title));
        if !self.unit.is_empty() {
            let _ = write!(out, "<span>{}</span>", escape(self.unit));
        }
        if self.legend.len() > 1 {
            for (class, name) in &self.legend {
                let _ = write!(
                    out,
                    "<span><i class=\"{class}\"></i>{}</span>",
                    escape(name)
                );
            }
        }
        out.push_str("</figcaption>\n");
        let mut picture = |width: f64, height: f64, class: &str| {
            let _ = writeln!(
                out,
                "<svg class=\"{class}\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">",
                escape(&self.description)
            );
            draw(width, height, &mut out);
            out.push_str("</svg>\n");
        };
        match self.size {
            Size::Any(width, height) => picture(width, height, "any"),
            Size::Two { wide, narrow } => {
                picture(wide.0, wide.1, "wide");
                picture(narrow.0, narrow.1, "narrow");
            }
        }
        out.push_str("</figure>\n");
        out
    }
}

/// About how wide a text is in a plot; fonts differ, so rather too much than too little.
fn text_width(text: &str) -> f64 {
    text.width() as f64 * 6.8
}

/// The text, or as much of its beginning as fits into `width`.
fn fitted(text: &str, width: f64) -> String {
    if text_width(text) <= width {
        return text.to_owned();
    }
    let mut out = String::new();
    for c in text.chars() {
        out.push(c);
        if text_width(&out) > width - text_width("…") {
            out.pop();
            break;
        }
    }
    out.truncate(out.trim_end().len());
    out.push('…');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_where_they_would_not_fit() {
        assert_eq!(fitted("LoRA", 40.0), "LoRA");
        let cut = fitted("adapter layers with a long name", 100.0);
        assert!(cut.ends_with('…') && cut.starts_with("adapter") && text_width(&cut) <= 100.0);
        assert_eq!(fitted("abc", 0.0), "…");
    }

    #[test]
    fn many_series_have_classes_of_their_own() {
        let classes: std::collections::HashSet<String> = (0..30).map(colour).collect();
        assert_eq!(classes.len(), 30);
    }
}

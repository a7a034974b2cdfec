//! Horizontal bars, one a name.

use std::fmt::Write;

use super::axes::{Axis, Frame, Margins, range};
use super::{Figure, Size, fitted, text_width};
use crate::report::page::escape;

const WIDTH: f64 = 420.0;
/// From one bar to the next, and a bar's own height.
const STEP: f64 = 24.0;
const THICKNESS: f64 = 14.0;
/// Names are cut at this width.
const LONGEST_NAME: f64 = 140.0;

/// One bar.
#[derive(Debug)]
pub(in crate::report) struct Bar {
    pub(in crate::report) name: String,
    /// The CSS class that colours it.
    pub(in crate::report) class: String,
    /// Its length; `None` where nothing was measured.
    pub(in crate::report) value: Option<f64>,
    /// The value in words, beside the bar.
    pub(in crate::report) label: String,
}

/// Bars from zero.
#[derive(Debug)]
pub(in crate::report) struct Bars {
    title: String,
    unit: String,
    rows: Vec<Bar>,
}

impl Bars {
    /// A plot; `unit` is a remark beside the title and may be empty.
    pub(in crate::report) fn new(title: &str, unit: &str, mut bars: Vec<Bar>) -> Self {
        for bar in &mut bars {
            bar.value = bar.value.filter(|value| value.is_finite());
        }
        Self {
            title: title.to_string(),
            unit: unit.to_string(),
            rows: bars,
        }
    }

    /// The plot as a `<figure>`; empty if no bar has a value.
    pub(in crate::report) fn render(&self) -> String {
        let Some(frame) = self.frame() else {
            return String::new();
        };
        let figure = Figure {
            title: &self.title,
            unit: &self.unit,
            legend: Vec::new(),
            description: self.describe(),
            size: Size::Any(frame.width, frame.height),
        };
        figure.render(false, |_, _, out| {
            frame.draw_axes(out);
            let zero = frame.x(0.0);
            for (index, bar) in self.rows.iter().enumerate() {
                let middle = frame.y(index as f64 + 0.5);
                let end = bar.value.map_or(zero, |value| frame.x(value));
                let _ = write!(
                    out,
                    "<g class=\"{}\"><title>{}: {}</title>",
                    bar.class,
                    escape(&bar.name),
                    escape(&bar.label)
                );
                if bar.value.is_some() {
                    let _ = write!(
                        out,
                        "<rect class=\"bar\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{THICKNESS}\" rx=\"2\"/>",
                        end.min(zero),
                        middle - THICKNESS / 2.0,
                        (end - zero).abs().max(1.0)
                    );
                }
                let _ = writeln!(
                    out,
                    "<text class=\"value\" x=\"{:.1}\" y=\"{:.1}\">{}</text></g>",
                    end.max(zero) + 5.0,
                    middle + 4.0,
                    escape(&bar.label)
                );
            }
        })
    }

    /// Axes with room for the longest name and the longest label.
    fn frame(&self) -> Option<Frame> {
        let (low, high) = range(self.rows.iter().filter_map(|bar| bar.value))?;
        let widest = |widths: &mut dyn Iterator<Item = f64>| widths.fold(0.0, f64::max);
        let names = || self.rows.iter().map(|bar| fitted(&bar.name, LONGEST_NAME));
        let left = widest(&mut names().map(|name| text_width(&name))) + 12.0;
        let right = widest(&mut self.rows.iter().map(|bar| text_width(&bar.label))) + 10.0;
        let margins = Margins {
            left,
            right,
            top: 2.0,
            ..Margins::default()
        };
        Some(Frame {
            width: WIDTH,
            height: margins.top + margins.bottom + STEP * self.rows.len() as f64,
            margins,
            x: Axis::round((low.min(0.0), high.max(0.0)), 4.0),
            y: Axis::names(names()),
        })
    }

    /// The plot in a sentence, for readers who do not see it.
    fn describe(&self) -> String {
        let bars: Vec<String> = self
            .rows
            .iter()
            .map(|bar| format!("{} {}", bar.name, bar.label))
            .collect();
        format!("{}; {}", self.title, bars.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(name: &str, value: Option<f64>) -> Bar {
        Bar {
            name: name.to_owned(),
            class: super::super::colour(0),
            value,
            label: value.map_or("–".to_owned(), |value| format!("{value} %")),
        }
    }

    #[test]
    fn bars_go_from_zero_both_ways() {
        let bars = Bars::new(
            "Latency",
            "",
            vec![
                bar("a & b", Some(4.0)),
                bar("b", Some(-2.0)),
                bar("c", None),
            ],
        );
        let frame = bars.frame().unwrap();
        assert_eq!(frame.x.range, (-2.0, 4.0));
        let page = bars.render();
        assert!(page.contains("a &amp; b: 4 %") && page.contains("c: –"));
        assert_eq!(page.matches("class=\"bar\"").count(), 2);
        let third = (frame.right() - frame.left()) / 3.0;
        let (left, zero) = (frame.left(), frame.left() + third);
        assert!(page.contains(&format!(
            "x=\"{zero:.1}\" y=\"7.0\" width=\"{:.1}\"",
            2.0 * third
        )));
        assert!(page.contains(&format!("x=\"{left:.1}\" y=\"31.0\" width=\"{third:.1}\"")));
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        let bars = Bars::new("Memory", "", vec![bar("a", None), bar("b", Some(f64::NAN))]);
        assert_eq!(bars.render(), "");
    }
}

//! Points with names and error bars over a logarithmic axis.

use std::fmt::Write;

use super::axes::{Axis, Frame, Margins, range};
use super::labels::{self, Area};
use super::{Figure, LARGE, fitted, text_width};
use crate::report::page::escape;
use crate::units::short;

/// Names are cut at this width.
const LONGEST_NAME: f64 = 150.0;
/// Half the width of the caps of an error bar.
const CAP: f64 = 4.0;

/// One point.
#[derive(Debug)]
pub(in crate::report) struct Point {
    pub(in crate::report) name: String,
    /// The CSS class that colours it.
    pub(in crate::report) class: String,
    /// Positive, or the point has no place on the axis.
    pub(in crate::report) x: f64,
    pub(in crate::report) y: f64,
    /// Half the length of its error bar.
    pub(in crate::report) deviation: Option<f64>,
}

impl Point {
    /// The least and the greatest that its error bar reaches.
    fn extent(&self) -> (f64, f64) {
        let deviation = self.deviation.unwrap_or(0.0);
        (self.y - deviation, self.y + deviation)
    }
}

/// Named points.
#[derive(Debug)]
pub(in crate::report) struct Scatter {
    title: String,
    unit: String,
    x_title: &'static str,
    points: Vec<Point>,
}

impl Scatter {
    /// A plot; `unit` is a remark beside the title and may be empty. Points that have no place on the axes are left out.
    pub(in crate::report) fn new(
        title: &str,
        unit: &str,
        x_title: &'static str,
        mut points: Vec<Point>,
    ) -> Self {
        points.retain(|point| point.x.is_finite() && point.x > 0.0 && point.y.is_finite());
        for point in &mut points {
            point.deviation = point.deviation.filter(|deviation| deviation.is_finite());
        }
        Self {
            title: title.to_string(),
            unit: unit.to_string(),
            x_title,
            points,
        }
    }

    /// The plot as a `<figure>`; empty if there are no points.
    pub(in crate::report) fn render(&self) -> String {
        if self.points.is_empty() {
            return String::new();
        }
        let figure = Figure {
            title: &self.title,
            unit: &self.unit,
            legend: Vec::new(),
            description: self.describe(),
            size: LARGE,
        };
        figure.render(false, |width, height, out| {
            let Some(frame) = self.frame(width, height) else {
                return;
            };
            frame.draw_axes(out);
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                f64::midpoint(frame.left(), frame.right()),
                height - 5.0,
                escape(self.x_title)
            );
            self.draw(&frame, out);
        })
    }

    fn frame(&self, width: f64, height: f64) -> Option<Frame> {
        let ends = self.points.iter().flat_map(|point| {
            let (low, high) = point.extent();
            [low, high]
        });
        Some(Frame {
            width,
            height,
            margins: Margins {
                bottom: 42.0,
                ..Margins::default()
            },
            x: Axis::logarithmic(range(self.points.iter().map(|point| point.x))?),
            y: Axis::round(range(ends)?, 6.0),
        })
    }

    fn draw(&self, frame: &Frame, out: &mut String) {
        let places: Vec<(f64, f64)> = self
            .points
            .iter()
            .map(|point| (frame.x(point.x), frame.y(point.y)))
            .collect();
        let names: Vec<String> = self
            .points
            .iter()
            .map(|point| fitted(&point.name, LONGEST_NAME))
            .collect();
        let widths: Vec<f64> = names.iter().map(|name| text_width(name)).collect();
        let error_bars: Vec<Area> = self
            .points
            .iter()
            .zip(&places)
            .filter(|(point, _)| point.deviation.is_some())
            .map(|(point, (x, _))| Area {
                left: x - CAP,
                top: frame.y(point.extent().1),
                right: x + CAP,
                bottom: frame.y(point.extent().0),
            })
            .collect();
        let bounds = Area {
            left: frame.left(),
            top: 0.0,
            right: frame.width,
            bottom: frame.bottom(),
        };
        let labels = labels::place(&places, &widths, &error_bars, &bounds);
        for (((point, (x, y)), name), label) in
            self.points.iter().zip(&places).zip(&names).zip(&labels)
        {
            let _ = write!(
                out,
                "<g class=\"{}\"><title>{}</title>",
                point.class,
                escape(&self.words(point))
            );
            if let Some((to_x, to_y)) = label.leader {
                let _ = write!(
                    out,
                    "<path class=\"leader\" d=\"M{x:.1} {y:.1}L{to_x:.1} {to_y:.1}\"/>"
                );
            }
            if point.deviation.is_some() {
                let (low, high) = point.extent();
                let (low, high) = (frame.y(low), frame.y(high));
                let (left, width) = (x - CAP, 2.0 * CAP);
                let _ = write!(
                    out,
                    "<path class=\"error\" d=\"M{x:.1} {low:.1}V{high:.1}M{left:.1} {low:.1}h{width}M{left:.1} {high:.1}h{width}\"/>"
                );
            }
            // Anchored on the side of its point, so that a font of another width does not run into it.
            let area = &label.area;
            let (at, anchor) = if area.left >= *x {
                (area.left, "start")
            } else if area.right <= *x {
                (area.right, "end")
            } else {
                (f64::midpoint(area.left, area.right), "middle")
            };
            let _ = writeln!(
                out,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\"/>\
                 <text class=\"name\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text></g>",
                area.bottom - 4.0,
                escape(name)
            );
        }
    }

    /// A point in words: `LoRA: 1.204 ± 0.003 at 460.8k`.
    fn words(&self, point: &Point) -> String {
        let mut text = format!("{}: {}", point.name, short(point.y));
        if let Some(deviation) = point.deviation {
            let _ = write!(text, " ± {}", short(deviation));
        }
        let _ = write!(text, " at {} {}", short(point.x), self.x_title);
        text
    }

    /// The plot in a sentence, for readers who do not see it.
    fn describe(&self) -> String {
        let points: Vec<String> = self.points.iter().map(|point| self.words(point)).collect();
        format!("{}; {}", self.title, points.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(name: &str, x: f64, y: f64, deviation: Option<f64>) -> Point {
        Point {
            name: name.to_owned(),
            class: super::super::colour(0),
            x,
            y,
            deviation,
        }
    }

    #[test]
    fn points_lie_where_their_values_are() {
        let plot = Scatter::new(
            "Loss",
            "nats",
            "parameters",
            vec![
                point("a<", 1e4, 1.0, Some(0.5)),
                point("b", 1e6, 2.0, Some(f64::NAN)),
                point("no place", 0.0, 2.0, None),
                point("no value", 1e5, f64::NAN, None),
            ],
        );
        let frame = plot.frame(400.0, 300.0).unwrap();
        // The axis goes from 1e4 / 1.7 to 1e6 · 1.7, so that both are equally far from their ends.
        let (a, b) = (frame.x(1e4) - frame.left(), frame.right() - frame.x(1e6));
        assert!((a - b).abs() < 1e-9 && a > 20.0);
        assert_eq!(frame.y.range, (0.5, 2.0));
        let page = plot.render();
        assert!(page.contains("a&lt;: 1 ± 0.5 at 10k parameters"), "{page}");
        assert!(!page.contains("no ") && !page.contains("NaN"));
        assert_eq!(page.matches("class=\"error\"").count(), 2, "one a size");
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        let plot = Scatter::new("Loss", "", "x", vec![point("a", 1.0, f64::NAN, None)]);
        assert_eq!(plot.render(), "");
    }
}

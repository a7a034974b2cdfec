//! The overlap of two adapters' subspaces as one picture: a heat map a module, φ(i, j) from pale to dark.

use std::fmt::Write;
use std::path::Path;

use lowrank_formats::atomic;

use super::page::escape;
use crate::Error;
use crate::diff::{DiffReport, ModuleDiff, Of};

/// Side of a map.
const SIDE: f64 = 104.0;
/// From one map to the next.
const STEP_X: f64 = 130.0;
const STEP_Y: f64 = 134.0;
/// Maps beside each other, at most.
const ACROSS: usize = 8;
const MARGIN: f64 = 24.0;
/// Maps are thinned to so many rows and columns.
const CELLS: usize = 32;
/// Shades, from 0 to 1.
const SHADES: usize = 50;
const HEAD: f64 = 108.0;
/// The picture is at least this wide, for its words.
const LEAST_WIDTH: f64 = 620.0;

/// Writes the picture, whole or not at all.
///
/// # Errors
/// A file that cannot be written.
pub fn write(path: &Path, report: &DiffReport) -> Result<(), Error> {
    let picture = render(report);
    atomic::write_file(path, |out| out.write_all(picture.as_bytes()))?;
    Ok(())
}

/// The picture, an SVG that needs nothing else.
pub fn render(report: &DiffReport) -> String {
    let groups = group(&report.modules);
    let across = groups.iter().map(|(_, maps)| maps.len()).max().unwrap_or(1);
    let across = across.min(ACROSS);
    let width = (2.0 * MARGIN + across as f64 * STEP_X).max(LEAST_WIDTH);
    let mut body = String::new();
    let mut y = HEAD;
    for (kind, maps) in &groups {
        let _ = writeln!(
            body,
            "<text class=\"h\" x=\"{MARGIN}\" y=\"{:.1}\">{}</text>",
            y + 16.0,
            escape(kind)
        );
        y += 30.0;
        for row in maps.chunks(across) {
            for (column, (layer, module)) in row.iter().enumerate() {
                draw(&mut body, MARGIN + column as f64 * STEP_X, y, layer, module);
            }
            y += STEP_Y;
        }
    }
    let height = y + MARGIN - 10.0;
    let mut out = String::with_capacity(body.len() + 4096);
    // Writing to a String cannot fail, so the results of `write!` are dropped throughout.
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height:.0}\" width=\"{width}\" height=\"{height:.0}\" role=\"img\">\n\
         <title>Subspace similarity of {} and {}</title>\n<style>{STYLE}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>",
        escape(&report.first),
        escape(&report.second)
    );
    head(&mut out, report);
    out.push_str(&body);
    out.push_str("</svg>\n");
    out
}

const STYLE: &str = "text{font:12px system-ui,sans-serif;fill:#333}text.t{font-size:16px;font-weight:600}\
                     text.h{font-size:14px;font-weight:600}text.s{font-size:11px;fill:#666}";

/// Title, axes and the scale of shades.
fn head(out: &mut String, report: &DiffReport) {
    let of = match report.of {
        Of::A => "right singular vectors of A",
        Of::B => "left singular vectors of B",
        Of::Delta => "right singular vectors of ΔW",
    };
    let mut line = |class: &str, y: f64, text: &str| {
        let _ = writeln!(
            out,
            "<text class=\"{class}\" x=\"{MARGIN}\" y=\"{y}\">{}</text>",
            escape(text)
        );
    };
    line("t", 34.0, "Subspace similarity φ(i, j)");
    line(
        "",
        54.0,
        &format!("{of}; 1: one span holds the other, 0: orthogonal"),
    );
    line(
        "s",
        72.0,
        &format!("↓ i: {}   → j: {}", report.first, report.second),
    );
    for step in 0..SHADES {
        let _ = write!(
            out,
            "<rect x=\"{:.1}\" y=\"84\" width=\"3.2\" height=\"10\" fill=\"{}\"/>",
            MARGIN + 14.0 + 3.0 * step as f64,
            color(step)
        );
    }
    let _ = writeln!(
        out,
        "\n<text class=\"s\" x=\"{MARGIN}\" y=\"93\">0</text><text class=\"s\" x=\"{:.1}\" y=\"93\">1</text>",
        MARGIN + 20.0 + 3.0 * SHADES as f64
    );
}

/// Modules of one kind under each other, each with the name of its layer.
fn group(modules: &[ModuleDiff]) -> Vec<(String, Vec<(String, &ModuleDiff)>)> {
    let mut groups: Vec<(String, Vec<_>)> = Vec::new();
    for module in modules {
        let words: Vec<&str> = module.module.split('.').collect();
        let layer = words.iter().position(|word| word.parse::<usize>().is_ok());
        let (name, kind) = match layer {
            Some(at) => (format!("layer {}", words[at]), words[at + 1..].join(".")),
            None => (String::new(), module.module.clone()),
        };
        match groups.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, maps)) => maps.push((name, module)),
            None => groups.push((kind, vec![(name, module)])),
        }
    }
    groups
}

fn draw(out: &mut String, x: f64, y: f64, layer: &str, module: &ModuleDiff) {
    let rows = module.similarity.len();
    let cols = module.similarity.first().map_or(0, Vec::len);
    let (whole, short) = match module.whole() {
        Some(whole) => (
            format!("φ({rows}, {cols}) = {whole:.3}"),
            format!("φ {whole:.2}"),
        ),
        None => ("no direction".to_owned(), "no direction".to_owned()),
    };
    let _ = writeln!(
        out,
        "<g transform=\"translate({x:.1} {y:.1})\"><title>{0} {whole}, {1:.3} at random</title>\
         <text class=\"s\" y=\"{2:.1}\">{3}</text><text class=\"s\" x=\"{SIDE}\" y=\"{2:.1}\" text-anchor=\"end\">{short}</text>",
        escape(&module.module),
        module.random_similarity,
        SIDE + 14.0,
        escape(layer),
    );
    if rows > 0 && cols > 0 {
        let (is, js) = (thinned(rows), thinned(cols));
        let _ = write!(
            out,
            "<g transform=\"scale({:.5} {:.5})\" shape-rendering=\"crispEdges\">",
            SIDE / js.len() as f64,
            SIDE / is.len() as f64
        );
        for (shade, path) in shades(module, &is, &js).iter().enumerate() {
            if !path.is_empty() {
                let _ = write!(out, "<path fill=\"{}\" d=\"{path}\"/>", color(shade));
            }
        }
        out.push_str("</g>");
    }
    let _ = writeln!(
        out,
        "<rect width=\"{SIDE}\" height=\"{SIDE}\" fill=\"none\" stroke=\"#999\" stroke-width=\".7\"/></g>"
    );
}

/// For each shade the runs of cells that have it.
fn shades(module: &ModuleDiff, is: &[usize], js: &[usize]) -> Vec<String> {
    let mut paths = vec![String::new(); SHADES];
    for (y, &i) in is.iter().enumerate() {
        let shade = |j: usize| {
            let value = module.similarity[i][j];
            ((value * SHADES as f64) as usize).min(SHADES - 1)
        };
        let mut start = 0;
        while start < js.len() {
            let this = shade(js[start]);
            let run = js[start..]
                .iter()
                .take_while(|j| shade(**j) == this)
                .count();
            let _ = write!(paths[this], "M{start} {y}h{run}v1h-{run}z");
            start += run;
        }
    }
    paths
}

/// Indices that are drawn of `count`: all, or every so many up to the last.
fn thinned(count: usize) -> Vec<usize> {
    let stride = count.div_ceil(CELLS).max(1);
    let mut kept: Vec<usize> = (0..count).rev().step_by(stride).collect();
    kept.reverse();
    kept
}

/// From a pale yellow over green to a dark blue.
fn color(shade: usize) -> String {
    const STOPS: [(f64, f64, f64); 4] = [
        (255.0, 251.0, 214.0),
        (127.0, 205.0, 187.0),
        (44.0, 127.0, 184.0),
        (16.0, 34.0, 90.0),
    ];
    let place = shade as f64 / (SHADES - 1) as f64 * (STOPS.len() - 1) as f64;
    let from = (place as usize).min(STOPS.len() - 2);
    let share = place - from as f64;
    let (a, b) = (STOPS[from], STOPS[from + 1]);
    let mix = |a: f64, b: f64| (a + (b - a) * share).round() as u8;
    format!(
        "#{:02x}{:02x}{:02x}",
        mix(a.0, b.0),
        mix(a.1, b.1),
        mix(a.2, b.2)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::Change;

    fn module(name: &str, similarity: Vec<Vec<f64>>) -> ModuleDiff {
        let change = Change {
            r: 2,
            norm: 1.0,
            singular_values: vec![1.0],
            effective_rank: 1.0,
            weight: None,
        };
        ModuleDiff {
            module: name.to_owned(),
            shape: (4, 4),
            similarity,
            random_similarity: 0.5,
            cosine: None,
            first: change.clone(),
            second: change,
        }
    }

    #[test]
    fn every_module_has_a_map_and_cells_of_one_shade_are_one_run() {
        let report = DiffReport {
            first: "a&b".to_owned(),
            second: "c".to_owned(),
            of: Of::A,
            model: None,
            same_base: None,
            modules: vec![
                module("m.layers.0.q_proj", vec![vec![1.0, 1.0], vec![0.0, 1.0]]),
                module("m.layers.1.q_proj", Vec::new()),
                module("m.layers.0.v_proj", vec![vec![0.3]]),
            ],
            only_first: Vec::new(),
            only_second: Vec::new(),
        };
        let picture = render(&report);
        assert!(picture.contains("a&amp;b") && !picture.contains("NaN"));
        assert_eq!(picture.matches("<g transform=\"translate").count(), 3);
        let dark = color(SHADES - 1);
        let runs = format!("<path fill=\"{dark}\" d=\"M0 0h2v1h-2zM1 1h1v1h-1z\"/>");
        assert!(picture.contains(&runs), "{picture}");
        assert_eq!(picture.matches(">q_proj</text>").count(), 1);
        assert!(picture.contains("no direction"));
    }

    #[test]
    fn large_maps_are_thinned_up_to_the_last() {
        assert_eq!(thinned(3), [0, 1, 2]);
        let kept = thinned(64);
        assert_eq!((kept.len(), kept[0], kept[31]), (32, 1, 63));
        assert_eq!(thinned(33).len(), 17);
    }

    #[test]
    fn shades_go_from_pale_to_dark() {
        assert_eq!(
            (color(0), color(SHADES - 1)),
            ("#fffbd6".to_owned(), "#10225a".to_owned())
        );
    }
}

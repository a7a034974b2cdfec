//! What every page has: its head, its style sheets, its heading, its foot, and text made safe for HTML.

use std::fmt::Write;

/// The page up to its contents: head, heading and one sentence under it, which may be empty. `style` is a style sheet
/// beside the common one.
pub(super) fn begin(title: &str, summary: &str, style: &str) -> String {
    let title = escape(title);
    let mut page = String::with_capacity(64 << 10);
    // Writing to a String cannot fail, so the results of `write!` are dropped throughout.
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>{STYLE}{style}</style>\n\
         </head>\n<body>\n<main>\n<h1>{title}</h1>\n"
    );
    if !summary.is_empty() {
        let _ = writeln!(page, "<p class=\"summary\">{}</p>", escape(summary));
    }
    page
}

/// Ends the page with a line that says what it was made from.
pub(super) fn end(page: &mut String, source: &str) {
    let _ = writeln!(
        page,
        "<footer>Made by lowrank {} from {}.</footer>\n</main>\n</body>\n</html>",
        env!("CARGO_PKG_VERSION"),
        escape(source)
    );
}

/// `text` with the characters that HTML gives a meaning replaced.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            _ => out.push(c),
        }
    }
    out
}

/// What no page may hold: it stands alone, and shows no number that is none.
#[cfg(test)]
pub(super) fn assert_stands_alone(page: &str) {
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    for forbidden in [
        "http://", "https://", "<script", "<link", "@import", "url(", "NaN", "inf",
    ] {
        assert!(!page.contains(forbidden), "the page contains {forbidden}");
    }
}

const STYLE: &str = include_str!("report.css");

//! Where a command's results go: text or one JSON object on standard output, everything else on standard error.

use std::io::{self, Write};
use std::path::Path;

use console::Term;
use serde::Serialize;

use crate::failure::StdoutClosed;

/// A path as an argument of a command line that a POSIX shell reads.
pub fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_./-+:=@%,".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Standard output as the command's results see it.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// Whether the result is one JSON object.
    pub json: bool,
    /// Whether results may be coloured: a terminal, and no `NO_COLOR`.
    pub color: bool,
    /// Columns that fit a line.
    pub width: usize,
}

/// Columns where there is no terminal to ask, and the most that text is spread over.
const DEFAULT_WIDTH: usize = 100;
const GREATEST_WIDTH: usize = 160;

impl Output {
    /// What standard output is now. `NO_COLOR`, `CLICOLOR` and `CLICOLOR_FORCE` are respected.
    pub fn detect(json: bool) -> Self {
        let width = Term::stdout()
            .size_checked()
            .map_or(DEFAULT_WIDTH, |(_, columns)| usize::from(columns));
        Self {
            json,
            color: !json && console::colors_enabled(),
            width: width.clamp(20, GREATEST_WIDTH),
        }
    }

    /// Prints the result: `value` as one JSON object with `--json`, otherwise what `text` makes of it.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn result<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(&Self) -> String,
    ) -> anyhow::Result<()> {
        if self.json {
            let mut line = serde_json::to_string_pretty(value)?;
            line.push('\n');
            self.write(&line)
        } else {
            let mut text = text(self);
            if !text.ends_with('\n') {
                text.push('\n');
            }
            self.write(&text)
        }
    }

    /// Writes text to standard output as it is and flushes it, for text that appears bit by bit.
    ///
    /// # Errors
    /// [`StdoutClosed`] when the reader has gone, the system's error otherwise.
    pub fn write(&self, text: &str) -> anyhow::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.flush())
            .map_err(not_written)
    }
}

/// Why standard output could not be written: [`StdoutClosed`] when the reader has gone, the system's error otherwise.
pub fn not_written(error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return StdoutClosed.into();
    }
    anyhow::Error::from(error).context("cannot write to standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_words_as_they_were() {
        let word = |text: &str| shell_word(Path::new(text));
        assert_eq!(word("runs/a-1.b"), "runs/a-1.b");
        assert_eq!(word("a b"), "'a b'");
        assert_eq!(word("a'b \"c\" $d;e"), r#"'a'\''b "c" $d;e'"#);
        assert_eq!(word("~x"), "'~x'");
        assert_eq!(word(""), "''");
    }
}

//! Where a command's results go: text or one JSON object on standard output, everything else on standard error.

use std::io::{self, Write};

use console::Term;
use serde::Serialize;

use crate::failure::StdoutClosed;

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
        match stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.flush())
        {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(StdoutClosed.into()),
            Err(error) => {
                Err(anyhow::Error::from(error).context("cannot write to standard output"))
            }
        }
    }
}

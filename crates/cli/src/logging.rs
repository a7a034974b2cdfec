//! Log messages on standard error, above any progress bar.

use std::io::{self, Write};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Starts logging. `verbosity` is the number of `-v` less the number of `-q`: errors alone below 0, then warnings and
/// notes, then details, then everything. `RUST_LOG` decides where neither flag was given.
pub fn init(verbosity: i16) {
    let level = match verbosity {
        ..0 => "error",
        0 => "warn,lowrank=info,lowrank_cli=info",
        1 => "info,lowrank=debug,lowrank_cli=debug",
        _ => "trace",
    };
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(rules) if verbosity == 0 && !rules.is_empty() => EnvFilter::new(rules),
        _ => EnvFilter::new(level),
    };
    // Only fails where a logger was set before, as in tests that run several commands.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(AboveBars)
        .with_ansi(console::colors_enabled_stderr())
        .with_target(verbosity > 0)
        .without_time()
        .try_init();
}

/// Standard error with progress bars out of the way.
struct AboveBars;

impl<'a> MakeWriter<'a> for AboveBars {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        Self
    }
}

impl Write for AboveBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        crate::progress::suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

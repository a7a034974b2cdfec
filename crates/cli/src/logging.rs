//! Log messages on standard error, above any progress bar.

use std::fmt;
use std::io::{self, Write};

use console::Style;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

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
        // Where nobody reads standard error any more there is nobody to tell, and a server must go on.
        .log_internal_errors(false)
        .event_format(Plain)
        .try_init();
}

/// Notes as they are, other messages with their level in front, as compilers write them.
struct Plain;

impl<S: Subscriber + for<'a> LookupSpan<'a>, N: for<'a> FormatFields<'a> + 'static>
    FormatEvent<S, N> for Plain
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let style = Style::new().for_stderr();
        let target = event.metadata().target();
        match *event.metadata().level() {
            Level::ERROR => write!(writer, "{} ", style.red().bold().apply_to("error:"))?,
            Level::WARN => write!(writer, "{} ", style.yellow().bold().apply_to("warning:"))?,
            Level::INFO => {}
            Level::DEBUG | Level::TRACE => write!(writer, "{}: ", style.dim().apply_to(target))?,
        }
        context
            .field_format()
            .format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
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

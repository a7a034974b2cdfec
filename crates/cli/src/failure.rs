//! How a command fails: what is printed and which exit code follows.
//!
//! | code | meaning |
//! | --- | --- |
//! | 0 | done |
//! | 1 | failed: the command was fine, something that it met was not |
//! | 2 | misuse: a flag, a setting or a combination of them cannot be used |
//! | 3 | training diverged: its loss or gradients are no longer finite |
//! | 128 + n | stopped by signal n: 130 with Ctrl-C, 143 by SIGTERM, 129 by SIGHUP |

use std::fmt;

use console::Style;

use crate::interrupt;

/// The exit code of a training that diverged.
pub const DIVERGED: u8 = 3;

/// The command as given cannot be run. Every problem is listed, so that one more try is enough.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Misuse {
    problems: Vec<String>,
}

impl Misuse {
    /// One problem.
    pub fn new(problem: impl Into<String>) -> Self {
        Self {
            problems: vec![problem.into()],
        }
    }

    /// Adds a problem.
    pub fn push(&mut self, problem: impl Into<String>) {
        self.problems.push(problem.into());
    }

    /// Adds the problem where `fine` does not hold.
    pub fn require(&mut self, fine: bool, problem: impl FnOnce() -> String) {
        if !fine {
            self.problems.push(problem());
        }
    }

    /// The problems so far.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// `value` if there is no problem.
    ///
    /// # Errors
    /// With all problems, if there are any.
    pub fn or<T>(self, value: T) -> Result<T, Self> {
        if self.problems.is_empty() {
            Ok(value)
        } else {
            Err(self)
        }
    }
}

impl fmt::Display for Misuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.as_slice() {
            [problem] => f.write_str(problem),
            problems => {
                write!(f, "{} problems with the settings:", problems.len())?;
                problems
                    .iter()
                    .try_for_each(|problem| write!(f, "\n  - {problem}"))
            }
        }
    }
}

impl std::error::Error for Misuse {}

/// Whoever read our standard output has gone, as `head` does: nothing went wrong and nobody wants to hear of it.
#[derive(Debug, Clone, Copy)]
pub struct StdoutClosed;

impl fmt::Display for StdoutClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("standard output was closed")
    }
}

impl std::error::Error for StdoutClosed {}

/// Ctrl-C or another signal stopped the command, and it ended in good order.
#[derive(Debug, Clone)]
pub struct Interrupted {
    /// What was saved and how to go on.
    pub message: String,
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Interrupted {}

/// Another rank of the job says what went wrong.
#[derive(Debug, Clone, Copy)]
pub struct SaidElsewhere {
    /// The exit code.
    pub code: u8,
}

impl fmt::Display for SaidElsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("another rank of the job says what went wrong")
    }
}

impl std::error::Error for SaidElsewhere {}

/// Prints what went wrong, if anything did, and chooses the exit code.
pub fn conclude(result: anyhow::Result<()>) -> u8 {
    let Err(error) = result else {
        return 0;
    };
    if error.is::<StdoutClosed>() {
        return 0;
    }
    if let Some(SaidElsewhere { code }) = error.downcast_ref() {
        return *code;
    }
    if error.is::<Interrupted>() {
        let by = interrupt::signal_name().map_or_else(String::new, |name| format!(" by {name}"));
        crate::progress::stderr_line(&format!("stopped{by}: {error}"));
        return interrupt::exit_code();
    }
    print_error(&paragraph(&error));
    let diverged = matches!(error.downcast_ref(), Some(lowrank::Error::Diverged(_)));
    match (error.is::<Misuse>(), diverged) {
        (true, _) => 2,
        (_, true) => DIVERGED,
        _ => 1,
    }
}

/// The error and its causes in one text. Many errors name their cause themselves; it is then not said again.
pub fn paragraph(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.extend([": ", &cause]);
        }
    }
    text
}

/// `error: …` on standard error, the first word in red where the terminal shows colours.
pub fn print_error(message: &str) {
    let label = Style::new().for_stderr().red().bold().apply_to("error:");
    crate::progress::stderr_line(&format!("{label} {message}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_listed_together() {
        let mut misuse = Misuse::new("a is wrong");
        assert_eq!(misuse.to_string(), "a is wrong");
        misuse.require(true, || unreachable!());
        misuse.require(false, || "b is wrong".to_string());
        assert_eq!(
            misuse.to_string(),
            "2 problems with the settings:\n  - a is wrong\n  - b is wrong"
        );
        assert!(misuse.or(()).is_err() && Misuse::default().or(()).is_ok());
    }

    #[test]
    fn causes_are_named_once() {
        let disk = || anyhow::anyhow!("the disk is full");
        assert_eq!(
            paragraph(&disk().context("cannot write a")),
            "cannot write a: the disk is full"
        );
        assert_eq!(
            paragraph(&disk().context("a: the disk is full")),
            "a: the disk is full"
        );
    }

    #[test]
    fn exit_codes() {
        let code = |error: anyhow::Error| conclude(Err(error));
        assert_eq!(code(StdoutClosed.into()), 0);
        assert_eq!(code(Misuse::new("x").into()), 2);
        assert_eq!(code(anyhow::anyhow!("x")), 1);
        let diverged = lowrank::Error::Diverged("x".to_string());
        assert_eq!(code(diverged.into()), 3);
        assert_eq!(code(anyhow::Error::from(Misuse::new("x")).context("y")), 2);
        assert_eq!(code(SaidElsewhere { code: 3 }.into()), 3);
    }
}

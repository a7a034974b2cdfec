//! `lowrank` run by `lowrank compare`: each training and evaluation is a process of its own, whose memory is its own.

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, bail};
use lowrank::lock::FolderLock;
use lowrank::report::{MetricsLine, read_metrics};
use serde_json::Value;

use crate::failure::{DIVERGED, Interrupted};
use crate::interrupt;
use crate::progress::{Mode, TrainProgress, stderr_line};

/// How often a training's metrics are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What a child is told beside its own arguments.
#[derive(Debug, Clone, Copy)]
pub(super) struct Children<'a> {
    /// The command that starts trainings and losses as ranks, such as `mpirun -n 4`; empty: each is one process.
    pub launcher: &'a [String],
    /// Threads of each.
    pub threads: Option<usize>,
    /// How progress is shown.
    pub progress: Mode,
    /// Set by Ctrl-C, which a terminal sends to the children, too, and by signals that it does not.
    pub stop: &'a AtomicBool,
}

impl Children<'_> {
    /// Runs `lowrank ARGS --json` and reads the object that it prints. What it says otherwise goes to `log`.
    ///
    /// # Errors
    /// [`Interrupted`] when it was stopped; its own message when it failed, [`Diverged`](lowrank::Error::Diverged) where it did.
    pub(super) fn run(&self, args: &[String], log: &Path) -> anyhow::Result<Value> {
        self.watch(&[], args, log, || {})
    }

    /// The same with the launcher, for what ranks can share out.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(super) fn run_on_ranks(&self, args: &[String], log: &Path) -> anyhow::Result<Value> {
        self.watch(self.launcher, args, log, || {})
    }

    /// The same for a training that writes `folder`, of `total_steps`, whose steps are shown.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(super) fn train(
        &self,
        args: &[String],
        log: &Path,
        folder: &Path,
        total_steps: u64,
    ) -> anyhow::Result<Value> {
        self.wait_for(folder);
        let mut shown = TrainProgress::new(self.progress);
        let (metrics, mut seen) = (folder.join("metrics.jsonl"), 0);
        shown.start(total_steps, 0);
        self.watch(self.launcher, args, log, || {
            let lines = read_metrics(&metrics).unwrap_or_default().lines;
            for line in lines.iter().skip(seen) {
                if let MetricsLine::Step(step) = line {
                    shown.step(step);
                }
            }
            seen = lines.len();
        })
    }

    /// Waits until no other process writes the folder: a child of a comparison that was killed may be about to end.
    fn wait_for(&self, folder: &Path) {
        let mut told = false;
        while let Err(busy) = FolderLock::refuse_busy(folder) {
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            if !told && self.progress != Mode::Quiet {
                stderr_line(&format!("waiting: {busy}"));
            }
            told = true;
            sleep(LOOK_EVERY);
        }
    }

    fn watch(
        &self,
        launcher: &[String],
        args: &[String],
        log: &Path,
        mut look: impl FnMut(),
    ) -> anyhow::Result<Value> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let said = open_log(log)?;
        let before = said.metadata().map_or(0, |data| data.len());
        // Standard output goes to a file, too: nobody reads a pipe while the child works.
        let mut printed = tempfile::NamedTempFile::new()
            .context("cannot make a temporary file for a child's output")?;
        let mut command = match launcher {
            [] => Command::new(program),
            [launcher, options @ ..] => {
                let mut command = Command::new(launcher);
                command.args(options).arg(program);
                command
            }
        };
        command.args(args).arg("--json");
        if let Some(threads) = self.threads {
            command.arg(format!("--threads={threads}"));
        }
        let mut child = command
            .env(interrupt::WITH_PARENT, "1")
            .stdin(Stdio::piped())
            .stdout(printed.reopen().context("cannot open a temporary file")?)
            .stderr(said)
            .spawn()
            .with_context(|| match launcher {
                [] => "cannot start a process".to_owned(),
                [launcher, ..] => format!("cannot start {launcher}"),
            })?;
        let mut asked = false;
        let status = loop {
            if let Some(status) = child.try_wait().context("cannot wait for a process")? {
                break status;
            }
            if !asked && self.stop.load(Ordering::SeqCst) {
                interrupt::ask_to_stop(&child);
                asked = true;
            }
            look();
            sleep(LOOK_EVERY);
        };
        look();
        let stopped = !status.success() && self.stop.load(Ordering::SeqCst);
        if stopped || status.code().is_some_and(interrupt::is_exit_code) {
            return Err(interrupted());
        }
        if !status.success() {
            let message = last_words(log, before, &format!("it ended with {status}"));
            if status.code() == Some(DIVERGED.into()) {
                return Err(lowrank::Error::Diverged(message).into());
            }
            bail!("{message}");
        }
        let mut text = String::new();
        std::io::Read::read_to_string(printed.as_file_mut(), &mut text)
            .context("cannot read a child's output")?;
        serde_json::from_str(&text).context("a child's output is not JSON")
    }
}

/// That Ctrl-C or another signal ended the comparison.
pub(super) fn interrupted() -> anyhow::Error {
    let message = "what is finished is kept; the same command goes on with the rest".to_owned();
    Interrupted { message }.into()
}

fn open_log(path: &Path) -> anyhow::Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The error that a child printed: from its last line that begins one.
fn last_words(log: &Path, before: u64, otherwise: &str) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let new = bytes.get(before as usize..).unwrap_or_default();
    let text = String::from_utf8_lossy(new);
    // Launchers put what they say between lines of dashes, behind what the program says.
    let is_rule = |line: &&str| line.len() > 20 && line.bytes().all(|byte| byte == b'-');
    let words = if let Some(start) = text.rfind("error: ") {
        let words = &text[start + "error: ".len()..];
        let rule = words.lines().find(is_rule);
        rule.and_then(|rule| words.split(rule).next())
            .unwrap_or(words)
    } else {
        let lines = text.lines().rev().filter(|line| !is_rule(line));
        let mut said = lines.filter(|line| !line.trim().is_empty());
        said.next().unwrap_or_default()
    };
    let words = words.trim();
    if !text.contains("error: ") && !words.is_empty() {
        return format!("{words}; {} says more", log.display());
    }
    if words.is_empty() {
        format!("{otherwise}; {} may say more", log.display())
    } else {
        words.to_owned()
    }
}

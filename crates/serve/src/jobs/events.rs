//! What a job tells: messages, and the figures of each step.
//!
//! Events are lines of a file, added as they happen. A job that goes on after a crash takes some steps again; they have the ids that they had,
//! and are not told twice.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Something that a job told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Event {
    id: String,
    created_at: u64,
    level: Level,
    message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    data: Option<Figures>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    Info,
    Warn,
    Error,
}

/// The figures of a step or of an evaluation after it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Figures {
    pub(super) step: u64,
    pub(super) total_steps: u64,
    pub(super) train_loss: Option<f64>,
    pub(super) valid_loss: Option<f64>,
    pub(super) learning_rate: Option<f64>,
    pub(super) tokens_per_second: Option<f64>,
}

impl Event {
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn object(&self) -> Value {
        json!({
            "id": self.id,
            "object": "fine_tuning.job.event",
            "created_at": self.created_at,
            "level": self.level,
            "message": self.message,
            "type": if self.data.is_some() { "metrics" } else { "message" },
            "data": self.data,
        })
    }
}

/// The events of a job. In memory are those of a job that is not over.
pub(super) struct Log {
    path: PathBuf,
    /// What ids begin with.
    prefix: String,
    all: Option<Vec<Event>>,
    /// The last step that figures were told of, and the last evaluation.
    last: (Option<u64>, Option<u64>),
}

impl Log {
    pub(super) fn new(path: PathBuf, prefix: String) -> Self {
        Self {
            path,
            prefix,
            all: None,
            last: (None, None),
        }
    }

    /// The events, oldest first.
    pub(super) fn all(&mut self) -> &[Event] {
        self.load()
    }

    /// Gives up what is in memory.
    pub(super) fn close(&mut self) {
        self.all = None;
    }

    pub(super) fn tell(&mut self, level: Level, message: String, now: u64) {
        let number = self.load().len();
        let id = format!("{}-m{number}", self.prefix);
        self.push(Event {
            id,
            created_at: now,
            level,
            message,
            data: None,
        });
    }

    /// Tells figures, unless they were told before.
    pub(super) fn measure(&mut self, figures: Figures, now: u64) {
        self.load();
        let (kind, last) = if figures.train_loss.is_some() {
            ("s", &mut self.last.0)
        } else {
            ("e", &mut self.last.1)
        };
        if last.is_some_and(|last| figures.step <= last) {
            return;
        }
        *last = Some(figures.step);
        let message = match (figures.train_loss, figures.valid_loss) {
            (Some(loss), _) => format!(
                "Step {}/{}: training loss={loss:.4}",
                figures.step, figures.total_steps
            ),
            (None, loss) => format!(
                "Step {}/{}: validation loss={:.4}",
                figures.step,
                figures.total_steps,
                loss.unwrap_or(f64::NAN)
            ),
        };
        let id = format!("{}-{kind}{}", self.prefix, figures.step);
        self.push(Event {
            id,
            created_at: now,
            level: Level::Info,
            message,
            data: Some(figures),
        });
    }

    fn push(&mut self, event: Event) {
        if let Err(error) = append(&self.path, &event) {
            tracing::warn!("{}: {error}", self.path.display());
        }
        self.load();
        self.all.get_or_insert_default().push(event);
    }

    fn load(&mut self) -> &[Event] {
        if self.all.is_none() {
            let all = read(&self.path);
            for figures in all.iter().filter_map(|event| event.data) {
                let last = if figures.train_loss.is_some() {
                    &mut self.last.0
                } else {
                    &mut self.last.1
                };
                *last = (*last).max(Some(figures.step));
            }
            self.all = Some(all);
        }
        self.all.as_deref().unwrap_or_default()
    }
}

fn append(path: &Path, event: &Event) -> std::io::Result<()> {
    let line = serde_json::to_string(event)? + "\n";
    let mut file = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)?;
    file.write_all(line.as_bytes())
}

/// The events of a file. What a crash left by halves is dropped from it, so that the next line begins anew.
fn read(path: &Path) -> Vec<Event> {
    let Ok(text) = fs::read(path) else {
        return Vec::new();
    };
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<Option<Event>> = text
        .lines()
        .map(|line| serde_json::from_str(line).ok())
        .collect();
    let is_whole = text.is_empty() || text.ends_with('\n');
    let is_damaged = !is_whole || lines.iter().any(Option::is_none);
    let all: Vec<Event> = lines.into_iter().flatten().collect();
    if is_damaged {
        let lines = all
            .iter()
            .filter_map(|event| serde_json::to_string(event).ok());
        let text: String = lines.map(|line| line + "\n").collect();
        if let Err(error) = lowrank::write_text(path, &text) {
            tracing::warn!("{error}");
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(step: u64, train_loss: Option<f64>) -> Figures {
        Figures {
            step,
            total_steps: 9,
            train_loss,
            valid_loss: train_loss.is_none().then_some(2.5),
            learning_rate: Some(1e-4),
            tokens_per_second: Some(10.0),
        }
    }

    #[test]
    fn a_log_goes_on_after_a_crash_and_tells_nothing_twice() {
        let place = tempfile::tempdir().expect("a folder");
        let path = place.path().join("events.jsonl");
        let mut log = Log::new(path.clone(), "ftevent-x".to_owned());
        log.tell(Level::Info, "begun".to_owned(), 1);
        log.measure(figures(1, Some(3.0)), 2);
        log.measure(figures(1, None), 3);
        log.measure(figures(2, Some(2.0)), 4);
        let before = log.all().to_vec();
        // Half a line is what a kill leaves.
        let mut text = fs::read_to_string(&path).expect("the file");
        text.push_str(r#"{"id": "ftevent-x-s3", "cre"#);
        fs::write(&path, text).expect("the file");
        let mut log = Log::new(path.clone(), "ftevent-x".to_owned());
        log.measure(figures(2, Some(2.0)), 9);
        log.measure(figures(1, None), 9);
        assert_eq!(log.all(), before);
        log.measure(figures(3, Some(1.0)), 9);
        log.tell(Level::Warn, "a warning".to_owned(), 9);
        let after = log.all().to_vec();
        assert_eq!(read(&path), after);
        let ids: Vec<&str> = after.iter().map(Event::id).collect();
        let ends = ["-m0", "-s1", "-e1", "-s2", "-s3", "-m5"];
        assert_eq!(ids, ends.map(|end| format!("ftevent-x{end}")));
        assert_eq!(after[1].object()["type"], "metrics");
        assert_eq!(after[5].object()["level"], "warn");
        assert_eq!(after[0].object()["data"], Value::Null);
    }
}

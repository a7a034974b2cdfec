//! `metrics.jsonl`: one JSON object a line, one line an optimizer step or an evaluation.
//!
//! The file is appended to while a run goes on and each line reaches the operating system in one write, so a killed
//! run loses at most the line it was writing. The reader accepts such a torn last line; a damaged line anywhere else
//! is left out and reported, since nothing but figures depends on it. A resumed run first cuts what was written after its
//! checkpoint, so that the file reads as if the run had never stopped.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

/// Damaged lines that a message lists.
const LISTED: usize = 10;

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Optimizer steps taken so far, this one included; the first line says 1.
    pub step: u64,
    /// Passes over the training data so far, with a fraction.
    pub epoch: f64,
    /// Mean loss of the step, in nats a supervised token.
    #[serde(deserialize_with = "number_or_nan")]
    pub loss: f64,
    /// The learning rate that this step used.
    pub learning_rate: f64,
    /// Euclidean norm of all gradients of the step before clipping.
    #[serde(deserialize_with = "number_or_nan")]
    pub grad_norm: f64,
    /// Real tokens of the step, prompt and completion; there is no padding to count.
    pub tokens: u64,
    /// Tokens of the step that carried loss.
    pub supervised_tokens: u64,
    /// `tokens` over the wall time of this step with its optimizer, never smoothed.
    pub tokens_per_second: f64,
    /// Largest resident memory of the process so far, in bytes.
    pub peak_rss: u64,
}

/// One evaluation on held-out data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Optimizer steps taken before this evaluation; 0 is the untrained model.
    pub step: u64,
    /// Passes over the training data so far, with a fraction.
    pub epoch: f64,
    /// Mean loss on the held-out rows, in nats a supervised token.
    #[serde(deserialize_with = "number_or_nan")]
    pub eval_loss: f64,
    /// Share of supervised tokens that the model ranks first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_accuracy: Option<f64>,
    /// Supervised tokens that were evaluated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_supervised_tokens: Option<u64>,
}

/// A line of `metrics.jsonl`. A line with `eval_loss` is an evaluation, any other a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum MetricsLine {
    /// An evaluation.
    Eval(EvalMetrics),
    /// An optimizer step.
    Step(StepMetrics),
}

impl MetricsLine {
    /// The optimizer step that the line belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Self::Eval(eval) => eval.step,
            Self::Step(step) => step.step,
        }
    }
}

impl From<StepMetrics> for MetricsLine {
    fn from(step: StepMetrics) -> Self {
        Self::Step(step)
    }
}

impl From<EvalMetrics> for MetricsLine {
    fn from(eval: EvalMetrics) -> Self {
        Self::Eval(eval)
    }
}

/// Why `metrics.jsonl` could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The file system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "open", "read", "write" or "replace".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
}

/// What a `metrics.jsonl` holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    /// Its lines, in order.
    pub lines: Vec<MetricsLine>,
    /// Which lines were left out, and why, in words.
    pub damage: Option<String>,
}

/// Appends lines to `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    /// Starts an empty file, replacing one that exists.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, MetricsError> {
        let path = path.into();
        match File::create(&path) {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(MetricsError::Io {
                action: "open",
                path,
                source,
            }),
        }
    }

    /// Goes on with the file of a run that stopped: lines after `step`, the checkpoint's, and a torn last line are
    /// cut, and everything before stays byte for byte, but for damaged lines: they are dropped, and the text says which.
    /// A file that does not exist is started.
    ///
    /// # Errors
    /// When the file cannot be read or replaced.
    pub fn resume(
        path: impl Into<PathBuf>,
        step: u64,
    ) -> Result<(Self, Option<String>), MetricsError> {
        let path = path.into();
        let text = match std::fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((Self::create(path)?, None));
            }
            Err(source) => {
                return Err(MetricsError::Io {
                    action: "read",
                    path,
                    source,
                });
            }
        };
        let mut kept = String::with_capacity(text.len());
        let (lines, damaged) = parse(&text);
        for (raw, line) in lines {
            if line.step() <= step {
                kept.push_str(raw);
                kept.push('\n');
            }
        }
        replace(&path, kept.as_bytes()).map_err(|source| MetricsError::Io {
            action: "replace",
            path: path.clone(),
            source,
        })?;
        let damage = describe(&path, &damaged);
        match OpenOptions::new().append(true).open(&path) {
            Ok(file) => Ok((Self { path, file }, damage)),
            Err(source) => Err(MetricsError::Io {
                action: "open",
                path,
                source,
            }),
        }
    }

    /// Whether what is written still goes to the file of that name.
    pub fn is_in_place(&self) -> bool {
        crate::lock::is_at(&self.file, &self.path)
    }

    /// Appends one line and hands it to the operating system at once.
    ///
    /// # Errors
    /// When the line cannot be written, for example because the disk is full.
    pub fn write(&mut self, line: &MetricsLine) -> Result<(), MetricsError> {
        let result = serde_json::to_vec(line)
            .map_err(io::Error::from)
            .and_then(|mut bytes| {
                bytes.push(b'\n');
                self.file.write_all(&bytes)
            });
        result.map_err(|source| MetricsError::Io {
            action: "write",
            path: self.path.clone(),
            source,
        })
    }
}

/// Reads a whole `metrics.jsonl`; a torn last line, left by a run that was killed, is dropped.
///
/// # Errors
/// When the file cannot be read.
pub fn read(path: &Path) -> Result<Metrics, MetricsError> {
    let bytes = std::fs::read(path).map_err(|source| MetricsError::Io {
        action: "read",
        path: path.to_path_buf(),
        source,
    })?;
    let text = String::from_utf8_lossy(&bytes);
    let (lines, damaged) = parse(&text);
    Ok(Metrics {
        lines: lines.into_iter().map(|(_, line)| line).collect(),
        damage: describe(path, &damaged),
    })
}

/// A line's number, from 1, and what is wrong with it.
type Damaged = (usize, String);

/// The lines of `text` with what they say, and those that say nothing. The last line may be torn; blank lines are skipped.
fn parse(text: &str) -> (Vec<(&str, MetricsLine)>, Vec<Damaged>) {
    let (mut lines, mut damaged) = (Vec::new(), Vec::new());
    let mut rows = text.split('\n').enumerate().peekable();
    while let Some((index, raw)) = rows.next() {
        if raw.trim().is_empty() {
            continue;
        }
        // A line without its newline is torn even where it happens to parse: `"step":12` may have been `"step":123`.
        if rows.peek().is_none() {
            break;
        }
        match serde_json::from_str(raw) {
            Ok(line) => lines.push((raw, line)),
            // After a power cut the last line may hold anything and still end in a newline.
            Err(_) if rows.clone().all(|(_, rest)| rest.trim().is_empty()) => break,
            Err(error) => damaged.push((index + 1, error.to_string())),
        }
    }
    (lines, damaged)
}

/// "runs/x/metrics.jsonl, line 5 is not a line of metrics: expected value at line 1 column 1".
fn describe(path: &Path, damaged: &[Damaged]) -> Option<String> {
    let (first, reason) = damaged.first()?;
    let shown = path.display();
    if damaged.len() == 1 {
        return Some(format!(
            "{shown}, line {first} is not a line of metrics: {reason}"
        ));
    }
    let numbers: Vec<String> = damaged
        .iter()
        .take(LISTED)
        .map(|(number, _)| number.to_string())
        .collect();
    let more = match damaged.len().saturating_sub(LISTED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Some(format!(
        "{shown}, lines {}{more} are not lines of metrics; line {first}: {reason}",
        numbers.join(", ")
    ))
}

/// Replaces a file through a temporary one in the same folder.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    // Made by hand because the crate's own default lets only the owner read the file.
    let mut file = tempfile::Builder::new().make_in(folder, |path| File::create_new(path))?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

/// JSON has no NaN; a non-finite figure is written as `null` and read back as NaN.
fn number_or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> MetricsLine {
        StepMetrics {
            step,
            epoch: step as f64 / 10.0,
            loss: 2.5,
            learning_rate: 2e-4,
            grad_norm: 0.75,
            tokens: 640,
            supervised_tokens: 320,
            tokens_per_second: 1234.5,
            peak_rss: 1 << 30,
        }
        .into()
    }

    fn eval(step: u64) -> MetricsLine {
        EvalMetrics {
            step,
            epoch: 0.5,
            eval_loss: 2.25,
            eval_accuracy: None,
            eval_supervised_tokens: Some(99),
        }
        .into()
    }

    #[test]
    fn lines_have_the_documented_fields() {
        insta::assert_snapshot!(
            serde_json::to_string(&step(1)).unwrap(),
            @r#"{"step":1,"epoch":0.1,"loss":2.5,"learning_rate":0.0002,"grad_norm":0.75,"tokens":640,"supervised_tokens":320,"tokens_per_second":1234.5,"peak_rss":1073741824}"#
        );
        insta::assert_snapshot!(
            serde_json::to_string(&eval(5)).unwrap(),
            @r#"{"step":5,"epoch":0.5,"eval_loss":2.25,"eval_supervised_tokens":99}"#
        );
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let lines = [eval(0), step(1), step(2), eval(2)];
        let mut writer = MetricsWriter::create(&path).unwrap();
        for line in &lines {
            writer.write(line).unwrap();
        }
        assert_eq!(read(&path).unwrap().lines, lines);
    }

    #[test]
    fn a_torn_last_line_is_dropped_and_cut_on_resume() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        writer.write(&step(1)).unwrap();
        let whole = std::fs::read_to_string(&path).unwrap();
        for torn in [&whole[..20], &whole[..whole.len() - 1], "\0\0\0\n"] {
            std::fs::write(&path, format!("{whole}{torn}")).unwrap();
            assert_eq!(read(&path).unwrap().lines, [step(1)], "{torn:?}");
        }
        let (mut writer, damage) = MetricsWriter::resume(&path, 9).unwrap();
        assert_eq!(damage, None);
        writer.write(&step(2)).unwrap();
        assert_eq!(read(&path).unwrap().lines, [step(1), step(2)]);
    }

    #[test]
    fn resume_cuts_what_came_after_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        for line in [step(1), eval(1), step(2), eval(2), step(3)] {
            writer.write(&line).unwrap();
        }
        MetricsWriter::resume(&path, 2).unwrap();
        let kept = [step(1), eval(1), step(2), eval(2)];
        assert_eq!(read(&path).unwrap().lines, kept);
        let fresh = folder.path().join("none.jsonl");
        MetricsWriter::resume(&fresh, 2).unwrap();
        assert_eq!(read(&fresh).unwrap(), Metrics::default());
    }

    #[test]
    fn damaged_lines_are_named_and_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let line = |number| serde_json::to_string(&step(number)).unwrap();
        let (first, second, third) = (line(1), line(2), line(3));
        let mut bytes = format!("{first}\n\nnot json\n{second}\n{{}}\n").into_bytes();
        bytes.extend(b"\xff\xfe\n");
        bytes.extend(format!("{}\n{third}\n", &second[..30]).into_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let found = read(&path).unwrap();
        assert_eq!(found.lines, [step(1), step(2), step(3)]);
        let damage = found.damage.unwrap();
        assert!(
            damage.contains("metrics.jsonl, lines 3, 5, 6, 7 are not lines of metrics"),
            "{damage}"
        );
        let (_, damage) = MetricsWriter::resume(&path, 2).unwrap();
        assert!(damage.unwrap().contains("lines 3, 5, 6, 7"));
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, format!("{first}\n{second}\n"));

        std::fs::write(&path, "x\n".repeat(13) + &first + "\n").unwrap();
        let damage = read(&path).unwrap().damage.unwrap();
        assert!(damage.contains(", 10 and 3 more are not"), "{damage}");
        std::fs::write(&path, format!("x\n{first}\n")).unwrap();
        let damage = read(&path).unwrap().damage.unwrap();
        assert!(damage.contains("line 1 is not a line of metrics: "));
    }

    #[test]
    fn a_non_finite_loss_survives_the_file() {
        let MetricsLine::Step(mut bad) = step(1) else {
            unreachable!("step() makes steps")
        };
        bad.loss = f64::NAN;
        let text = serde_json::to_string(&MetricsLine::Step(bad)).unwrap();
        let MetricsLine::Step(back) = serde_json::from_str(&text).unwrap() else {
            panic!("read as an evaluation")
        };
        assert!(back.loss.is_nan());
    }
}

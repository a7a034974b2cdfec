//! Texts that a command reads without labels: typed, of a file, or of standard input.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use clap::Args;
use lowrank::data::{
    BadRow, DataError, TaskType, Tokenizer, Unlabelled, UnlabelledOptions, UnlabelledRow,
    is_read_once,
};
use lowrank::train::split_columns;

/// Rows that are read at a time.
const BATCH_ROWS: usize = 256;

/// Which texts.
#[derive(Debug, Args)]
pub struct TextsArgs {
    /// A text; may be repeated
    #[arg(
        long,
        value_name = "TEXT",
        conflicts_with = "data",
        allow_hyphen_values = true
    )]
    pub text: Vec<String>,

    /// Rows: JSONL, CSV or TSV, a text a line (.txt), or - for standard input, which is read where neither is given
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub data: Option<PathBuf>,

    /// Names of the columns of a CSV or TSV file without a header, such as text,label
    #[arg(long, value_name = "NAMES", help_heading = "Data")]
    pub columns: Option<String>,

    /// Cut longer rows to so many tokens; a pair loses those of its longer text [default: what the model can read]
    #[arg(long, value_name = "TOKENS", help_heading = "Data")]
    pub max_seq_length: Option<usize>,
}

impl TextsArgs {
    /// Gives the rows to `each`, a batch at a time; `most` is how many tokens the model can read.
    ///
    /// # Errors
    /// A row that cannot be read; what `each` fails with.
    pub fn for_each_batch(
        &self,
        tokenizer: &Arc<Tokenizer>,
        task: TaskType,
        most: usize,
        mut each: impl FnMut(Vec<UnlabelledRow>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let options = UnlabelledOptions {
            task,
            max_seq_length: self.max_seq_length.map_or(most, |length| length.min(most)),
            columns: self.columns.as_deref().map(split_columns),
            batch_rows: BATCH_ROWS,
        };
        let (mut cut, length) = (0, options.max_seq_length);
        let mut each = |rows: Vec<UnlabelledRow>| {
            cut += rows.iter().filter(|row| row.example.truncated > 0).count();
            each(rows)
        };
        self.read(tokenizer, options, &mut each)?;
        if cut > 0 {
            tracing::warn!("{cut} rows had more than {length} tokens and were cut");
        }
        Ok(())
    }

    fn read(
        &self,
        tokenizer: &Arc<Tokenizer>,
        options: UnlabelledOptions,
        each: &mut impl FnMut(Vec<UnlabelledRow>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        if !self.text.is_empty() {
            let rows = self.text.iter().enumerate().map(|(n, text)| {
                let mut row = UnlabelledRow::of_text(tokenizer, text, None, &options)?;
                row.example.line = n + 1;
                Ok(row)
            });
            return each(rows.collect::<Result<_, DataError>>()?);
        }
        let data = self.data.as_deref().unwrap_or(Path::new("-"));
        let mut each = |batch: Batch| {
            let rows: Result<Vec<_>, _> = batch.into_iter().collect();
            each(rows.map_err(|bad| {
                anyhow::anyhow!("{}, line {}: {}", data.display(), bad.line, bad.reason)
            })?)
        };
        if is_read_once(data) {
            return for_each_waiting(data, tokenizer, options, each);
        }
        for batch in Unlabelled::open(data, tokenizer, options)? {
            each(batch?)?;
        }
        Ok(())
    }
}

/// Rows, and of some the reason why they are none.
type Batch = Vec<Result<UnlabelledRow, BadRow>>;

/// Gives `each` the rows of a pipe as they come: those that are there, without waiting for more to fill a batch.
///
/// They are read by a thread of their own, which is left behind where `each` fails: it may wait for a row that never comes.
fn for_each_waiting(
    data: &Path,
    tokenizer: &Arc<Tokenizer>,
    options: UnlabelledOptions,
    mut each: impl FnMut(Batch) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (sender, receiver) = sync_channel(BATCH_ROWS);
    let (data, tokenizer) = (data.to_owned(), Arc::clone(tokenizer));
    let one_by_one = UnlabelledOptions {
        batch_rows: 1,
        ..options
    };
    std::thread::spawn(move || {
        let send = |batch| sender.send(batch).is_ok();
        match Unlabelled::open(&data, &tokenizer, one_by_one) {
            Ok(mut rows) => drop(rows.all(send)),
            Err(error) => drop(send(Err(error))),
        }
    });
    while let Ok(first) = receiver.recv() {
        let mut batch = first?;
        let more = std::iter::from_fn(|| receiver.try_recv().ok()).take(BATCH_ROWS - 1);
        let mut failed = None;
        for rows in more {
            match rows {
                Ok(rows) => batch.extend(rows),
                Err(error) => failed = Some(error),
            }
        }
        each(batch)?;
        if let Some(error) = failed {
            return Err(error.into());
        }
    }
    Ok(())
}

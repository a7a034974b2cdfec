//! Texts that a command reads without labels: typed, of a file, or of standard input.

use std::path::{Path, PathBuf};

use clap::Args;
use lowrank::data::{DataError, TaskType, Tokenizer, Unlabelled, UnlabelledOptions, UnlabelledRow};
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
        tokenizer: &Tokenizer,
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
        if !self.text.is_empty() {
            let rows = self.text.iter().enumerate().map(|(n, text)| {
                let mut row = UnlabelledRow::of_text(tokenizer, text, None, &options)?;
                row.example.line = n + 1;
                Ok(row)
            });
            return each(rows.collect::<Result<_, DataError>>()?);
        }
        let data = self.data.as_deref().unwrap_or(Path::new("-"));
        for batch in Unlabelled::open(data, tokenizer, options)? {
            let rows: Result<Vec<_>, _> = batch?.into_iter().collect();
            each(rows.map_err(|bad| {
                anyhow::anyhow!("{}, line {}: {}", data.display(), bad.line, bad.reason)
            })?)?;
        }
        Ok(())
    }
}

//! `lowrank eval` of classifiers.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use lowrank::Workspace;
use lowrank::classify::{predict, probabilities};
use lowrank::data::{Example, Label, Labels, ProblemType, Split};
use lowrank::metrics::classification::{
    MultiLabel, MultiLabelMetrics, Regression, RegressionMetrics, SingleLabel, SingleLabelMetrics,
    TagMetrics, Tags, top_label,
};
use lowrank::objective::LossSum;
use lowrank::train::Scoring;
use lowrank::units;
use serde::Serialize;

use super::common::BaseArgs;
use super::eval::EvalArgs;
use super::with_adapter::{self, Plan};
use crate::failure::Misuse;
use crate::progress::{self, Mode};
use crate::table::Facts;

/// What was measured.
#[derive(Debug, Serialize)]
pub struct ClassesReport {
    /// The task.
    task_type: &'static str,
    /// Mean loss of a label.
    loss: f64,
    /// How well the labels are met.
    #[serde(flatten)]
    figures: Figures,
    /// The file that the rows came from.
    data: PathBuf,
    /// Rows of it that were cut at the greatest length.
    truncated_rows: usize,
    /// Rows of it that could not be used.
    skipped_rows: usize,
    /// Rows a second.
    rows_per_second: f64,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Figures {
    One(SingleLabelMetrics),
    Several(MultiLabelMetrics),
    Values(RegressionMetrics),
    Tags(TagMetrics),
}

/// What is counted up while rows are classified.
enum Counting {
    One(Box<SingleLabel>),
    Several(MultiLabel),
    Values(Regression),
    Tags(Tags),
}

/// Whether what is evaluated is a classifier.
///
/// # Errors
/// A model or adapter that cannot be used.
pub fn is_for(args: &EvalArgs) -> anyhow::Result<bool> {
    let Some(base) = &args.base else {
        return Ok(false);
    };
    let plan = plan_for(base, args)?;
    Ok(plan.task().is_some() && plan.labels.is_some())
}

fn plan_for(base: &BaseArgs, args: &EvalArgs) -> anyhow::Result<Plan> {
    let plan = with_adapter::plan_of(base.source()?, args.adapter.as_deref())?;
    if plan.is_bare_encoder() {
        return Err(plan.no_classifier().into());
    }
    Ok(plan)
}

/// Evaluates a classifier; `None` where the model and its adapter are none.
///
/// # Errors
/// A model, adapter or data that cannot be used.
pub fn evaluate(args: &EvalArgs, progress: Mode) -> anyhow::Result<Option<ClassesReport>> {
    let (Some(base), Some(rows)) = (&args.base, &args.rows) else {
        return Ok(None);
    };
    let plan = plan_for(base, args)?;
    let (Some(task), Some(labels)) = (plan.task(), plan.labels.clone()) else {
        return Ok(None);
    };
    let tokenizer = plan.tokenizer()?;
    let classifier = plan.load(base.base_dtype, args.adapter.as_deref())?;
    let rows = super::common::RowsArgs {
        max_seq_length: rows.max_seq_length.min(classifier.max_length),
        ..rows.clone()
    };
    let splits = [Split::Test, Split::Valid];
    let data = rows.load_for(&tokenizer, &splits, Some(task), Some(labels.clone()))?;
    tracing::info!("{}", data.report);
    let (model, ws) = (&classifier.network.decoder, Workspace::new());
    let mut counting = Counting::new(&labels, &data.examples);
    let bar = progress::counter(progress, data.examples.len() as u64, "rows");
    let begun = Instant::now();
    let (mut failed, mut sums) = (None, LossSum::default());
    let scoring = Scoring::default();
    predict(
        model,
        classifier.trained(),
        &data.examples,
        &ws,
        |rows, outputs| {
            bar.inc(rows.len() as u64);
            if let Some(classes) = scoring.classes(&rows.iter().collect::<Vec<_>>()) {
                sums.add(classes.score_logits(&mut outputs.concat(), labels.names.len()));
            }
            for (row, mut logits) in rows.iter().zip(outputs) {
                if let Err(error) = counting.add(&labels, row, &mut logits) {
                    failed = Some(error);
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        },
    );
    let seconds = begun.elapsed().as_secs_f64();
    bar.finish_and_clear();
    if let Some(error) = failed {
        return Err(error);
    }
    let loss = sums.mean();
    if !loss.is_finite() {
        anyhow::bail!(
            "the loss is not finite (NaN or infinite); the values of the model or of the adapter are damaged"
        );
    }
    Ok(Some(ClassesReport {
        task_type: match task {
            lowrank::data::TaskType::TokenCls => "TOKEN_CLS",
            _ => "SEQ_CLS",
        },
        loss,
        figures: counting.metrics()?,
        data: data.report.path,
        truncated_rows: data.report.truncated_rows,
        skipped_rows: data.report.skipped.len(),
        rows_per_second: data.examples.len() as f64 / seconds,
    }))
}

impl Counting {
    fn new(labels: &Labels, rows: &[Example]) -> Self {
        let names = labels.names.clone();
        let has_tags = matches!(
            rows.first().and_then(|row| row.label.as_ref()),
            Some(Label::Tags(_))
        );
        match labels.problem_type {
            _ if has_tags => Self::Tags(Tags::new()),
            ProblemType::SingleLabelClassification => Self::One(Box::new(SingleLabel::new(names))),
            ProblemType::MultiLabelClassification => Self::Several(MultiLabel::new(names)),
            ProblemType::Regression => Self::Values(Regression::new(names)),
        }
    }

    fn add(&mut self, labels: &Labels, row: &Example, logits: &mut [f32]) -> anyhow::Result<()> {
        let names = &labels.names;
        match (self, &row.label) {
            (Self::One(one), Some(Label::Class(label))) => {
                probabilities(labels.problem_type, logits);
                one.add(&[*label], logits)?;
            }
            (Self::Several(several), Some(Label::Classes(classes))) => {
                probabilities(labels.problem_type, logits);
                let gold: Vec<bool> = classes.iter().map(|class| *class > 0.5).collect();
                several.add(&gold, logits)?;
            }
            (Self::Values(values), Some(Label::Values(gold))) => values.add(gold, logits)?,
            (Self::Tags(tags), Some(Label::Tags(gold))) => {
                let found = logits.chunks_exact(names.len()).map(top_label);
                let found: Vec<&str> = found.map(|label| names[label].as_str()).collect();
                let gold = gold.iter().map(|(_, tag)| names[*tag as usize].as_str());
                tags.add(&gold.collect::<Vec<_>>(), &found)?;
            }
            _ => {
                return Err(Misuse::new(format!(
                    "line {}: the row has no label that this classifier gives",
                    row.line
                ))
                .into());
            }
        }
        Ok(())
    }

    fn metrics(&self) -> anyhow::Result<Figures> {
        Ok(match self {
            Self::One(one) => Figures::One(one.metrics()?),
            Self::Several(several) => Figures::Several(several.metrics()?),
            Self::Values(values) => Figures::Values(values.metrics()?),
            Self::Tags(tags) => Figures::Tags(tags.metrics()?),
        })
    }
}

/// The report as text.
pub fn text(report: &ClassesReport, width: usize) -> String {
    let mut facts = Facts::default();
    facts.add("loss", format!("{:.4}", report.loss));
    facts.add("data", report.data.display().to_string());
    if report.truncated_rows > 0 {
        facts.add("cut rows", units::grouped(report.truncated_rows as u64));
    }
    if report.skipped_rows > 0 {
        facts.add("skipped rows", units::grouped(report.skipped_rows as u64));
    }
    let figures = match &report.figures {
        Figures::One(one) => format!("{one}\n{}", one.confusion.render(width)),
        Figures::Several(several) => several.to_string(),
        Figures::Values(values) => values.to_string(),
        Figures::Tags(tags) => tags.to_string(),
    };
    format!("{}\n{figures}", facts.render("", false))
}

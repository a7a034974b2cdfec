//! The text metrics of `lowrank eval --metrics`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};
use lowrank::Workspace;
use lowrank::data::{Prompt, Split, load_prompts};
use lowrank::fields::finite;
use lowrank::generate::{Finish, PromptIds};
use lowrank::metrics::{
    self, Corpus, Prediction, Tokenization, read_predictions, write_predictions,
};
use serde::Serialize;
use serde_json::{Map, Value};

use super::common::{adapter_set, check_length, choose_split, load_adapter};
use super::eval::EvalArgs;
use super::generate::{BeamArgs, SamplingArgs, continue_all, together};
use crate::failure::Misuse;
use crate::progress::{self, Mode};
use crate::settings::values::at_most;
use crate::table::Facts;

/// Arguments of text metrics.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Text metrics")]
pub struct TextArgs {
    /// Continue each distinct prompt and score the texts instead, against the answers of all rows with that prompt
    #[arg(
        long,
        value_name = "METRICS",
        value_delimiter = ',',
        conflicts_with_all = ["max_seq_length", "train_on_prompt", "on_bad_row", "completion_boundary"]
    )]
    pub metrics: Vec<Metric>,

    /// How texts are cut into tokens for all metrics: 13a as sacrebleu, none at white space alone [default: 13a]
    #[arg(long, value_name = "HOW", requires = "metrics")]
    pub tokenize: Option<Tokenize>,

    /// Score texts in lower case
    #[arg(long, requires = "metrics")]
    pub lowercase: bool,

    /// Only the first so many prompts
    #[arg(long, value_name = "N", requires = "metrics")]
    pub limit: Option<usize>,

    /// New tokens at most [default: 256]
    #[arg(long, value_name = "N", requires = "metrics")]
    pub max_new_tokens: Option<usize>,

    /// Search with so many beams [default: 1, which takes the likeliest token each time]
    #[arg(long, value_name = "N", requires = "metrics", value_parser = at_most::<1024>)]
    pub num_beams: Option<usize>,

    /// A beam's score is divided by its length to this power [default: 1]
    #[arg(
        long,
        value_name = "X",
        requires = "num_beams",
        allow_negative_numbers = true,
        value_parser = finite::<f32>
    )]
    pub length_penalty: Option<f32>,

    /// Let no run of N tokens come twice, the prompt's included [default: 0, any may]
    #[arg(long, value_name = "N", requires = "metrics")]
    pub no_repeat_ngram_size: Option<usize>,

    /// Write prompts, texts and references to this file, a line of JSON each
    #[arg(long, value_name = "FILE", requires = "metrics")]
    pub predictions: Option<PathBuf>,

    /// Score such a file; no model is needed
    #[arg(
        long,
        value_name = "FILE",
        requires = "metrics",
        conflicts_with_all = [
            "BaseArgs", "RowsArgs", "adapter", "predictions", "max_new_tokens", "num_beams",
            "no_repeat_ngram_size"
        ]
    )]
    pub from_predictions: Option<PathBuf>,
}

/// A text metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Metric {
    /// sacrebleu's corpus BLEU, 0 to 100
    Bleu,
    /// nltk's corpus NIST
    Nist,
    /// pycocoevalcap's ROUGE-L, 0 to 1
    RougeL,
    /// nltk's METEOR without WordNet: words and stems, no synonyms; 0 to 1
    Meteor,
    /// pycocoevalcap's CIDEr, 0 to 10
    Cider,
}

/// How texts are cut into tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tokenize {
    /// That of mteval-v13a
    #[value(name = "13a")]
    Mteval13a,
    /// At white space
    None,
}

/// What the texts scored.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TextReport {
    /// Each metric's name and score.
    pub metrics: Map<String, Value>,
    /// Distinct prompts.
    pub meanings: usize,
    /// References of all of them.
    pub references: usize,
    /// How texts were cut into tokens, by sacrebleu's name.
    pub tokenize: &'static str,
    /// Whether they were scored in lower case.
    pub lowercase: bool,
    /// How METEOR matches words, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub meteor_matches: Option<&'static str>,
    /// Texts that did not end by themselves; unknown for a file of predictions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unfinished: Option<usize>,
    /// The file that the rows or predictions came from.
    pub data: PathBuf,
}

/// Generates, where a model is given, and scores.
///
/// # Errors
/// A model, adapter, data or file of predictions that cannot be used.
pub fn evaluate(args: &EvalArgs, progress: Mode) -> anyhow::Result<TextReport> {
    let text = &args.text;
    let (predictions, unfinished, data) = if let Some(file) = &text.from_predictions {
        if !file.is_file() {
            let problem = format!("--from-predictions: there is no file {}", file.display());
            return Err(Misuse::new(problem).into());
        }
        let mut predictions = read_predictions(file)?;
        predictions.truncate(text.limit.unwrap_or(usize::MAX));
        (predictions, None, file.clone())
    } else {
        let (predictions, unfinished, data) = predict(args, progress)?;
        (predictions, Some(unfinished), data)
    };
    if let Some(file) = &text.predictions {
        write_predictions(file, &predictions)?;
    }
    let tokenization = match text.tokenize {
        Some(Tokenize::None) => Tokenization::Whitespace,
        _ => Tokenization::Mteval13a,
    };
    let corpus = Corpus::from_predictions(&predictions, tokenization, text.lowercase)
        .with_context(|| format!("cannot score the texts of {}", data.display()))?;
    let mut scores = Map::new();
    for metric in &text.metrics {
        let (name, score) = match metric {
            Metric::Bleu => ("bleu", metrics::bleu(&corpus).score),
            Metric::Nist => ("nist", metrics::nist(&corpus)),
            Metric::RougeL => ("rouge-l", metrics::rouge_l(&corpus)),
            Metric::Meteor => ("meteor", metrics::meteor(&corpus)),
            Metric::Cider => ("cider", metrics::cider(&corpus)),
        };
        scores.insert(name.to_owned(), score.into());
    }
    Ok(TextReport {
        metrics: scores,
        meanings: corpus.len(),
        references: corpus.references(),
        tokenize: tokenization.name(),
        lowercase: text.lowercase,
        meteor_matches: (text.metrics.contains(&Metric::Meteor))
            .then_some("words and Porter stems, without WordNet's synonyms"),
        unfinished,
        data,
    })
}

/// Rows with the same prompt, as one.
struct Meaning {
    prompt: Prompt,
    references: Vec<String>,
}

/// Continues every distinct prompt; also says how many did not end by themselves, and which file the rows came from.
fn predict(args: &EvalArgs, progress: Mode) -> anyhow::Result<(Vec<Prediction>, usize, PathBuf)> {
    let text = &args.text;
    let (Some(base), Some(rows)) = (&args.base, &args.rows) else {
        return Err(
            Misuse::new("--metrics needs --model and --data, or --from-predictions").into(),
        );
    };
    let sampling = SamplingArgs {
        max_new_tokens: text.max_new_tokens.unwrap_or(256),
        no_repeat_ngram_size: text.no_repeat_ngram_size.unwrap_or(0),
        ..SamplingArgs::greedy()
    };
    let beams = BeamArgs {
        num_beams: text.num_beams.unwrap_or(1),
        length_penalty: text.length_penalty,
    };
    beams.resolve(&sampling.resolve(&[])?)?;
    if text.limit == Some(0) {
        return Err(Misuse::new("--limit must be 1 or greater").into());
    }
    if let Some(file) = &text.predictions {
        check_writable(file)?;
    }
    let split = choose_split(&rows.data, rows.split, &[Split::Test, Split::Valid])?;
    let base = base.load(args.adapter.as_deref().as_slice())?;
    let options = sampling.resolve(base.tokenizer.stop_ids())?;
    let beams = beams.resolve(&options)?;
    let adapter = args.adapter.as_ref();
    let adapter = adapter
        .map(|folder| load_adapter(folder, &base))
        .transpose()?;
    let file = lowrank::data::split_file(&rows.data, split)?.unwrap_or_else(|| rows.data.clone());
    let meanings = meanings(
        load_prompts(&rows.data, split, &base.tokenizer)?,
        text,
        &file,
    )?;
    let adapters: Vec<_> = adapter.iter().map(|loaded| &loaded.adapter).collect();
    let lengths = meanings.iter().map(|meaning| meaning.prompt.ids.len());
    let longest = lengths.max().unwrap_or(0);
    check_length(
        (&base.source, base.decoder.config()),
        &adapters,
        longest + 1,
        "shorten the prompts",
    )?;

    let bar = progress::counter(progress, meanings.len() as u64, "texts");
    let ws = Workspace::new();
    let names: Vec<String> = (args.adapter.iter())
        .map(|folder| folder.display().to_string())
        .collect();
    let mut predictions = Vec::with_capacity(meanings.len());
    let mut unfinished = 0;
    for part in meanings.chunks(together(beams.as_ref())) {
        let ids: Vec<PromptIds> = part
            .iter()
            .map(|meaning| PromptIds {
                ids: meaning.prompt.ids.clone(),
                adapter: adapter.as_ref().map(|_| 0),
            })
            .collect();
        let set = adapter_set(&adapters);
        let made = continue_all(&base, set, &names, &ids, &options, beams.as_ref(), &ws)?;
        for (meaning, continuation) in part.iter().zip(made) {
            unfinished += usize::from(continuation.finish != Finish::Stop);
            let text = base.tokenizer.decode(&continuation.ids, true)?;
            predictions.push(Prediction {
                prompt: meaning.prompt.text.clone(),
                prediction: text.trim().to_owned(),
                references: meaning.references.clone(),
            });
        }
        bar.inc(part.len() as u64);
    }
    bar.finish_and_clear();
    Ok((predictions, unfinished, file))
}

/// The distinct prompts in the order of their first rows.
fn meanings(prompts: Vec<Prompt>, text: &TextArgs, file: &Path) -> anyhow::Result<Vec<Meaning>> {
    let mut places = std::collections::HashMap::new();
    let mut meanings: Vec<Meaning> = Vec::new();
    for mut prompt in prompts {
        let Some(reference) = prompt.reference.take() else {
            anyhow::bail!(
                "{}, line {}: the row has no answer to compare a text with; metrics need rows with one",
                file.display(),
                prompt.line
            );
        };
        let place = *places.entry(prompt.ids.clone()).or_insert(meanings.len());
        if place == meanings.len() {
            meanings.push(Meaning {
                prompt,
                references: Vec::new(),
            });
        }
        meanings[place].references.push(reference.trim().to_owned());
    }
    meanings.truncate(text.limit.unwrap_or(usize::MAX));
    Ok(meanings)
}

/// Refuses early what could not be written in the end, and what would replace a file.
fn check_writable(file: &Path) -> Result<(), Misuse> {
    if file.exists() {
        return Err(Misuse::new(format!(
            "--predictions: {} is there already; give another name",
            file.display()
        )));
    }
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() && !folder.is_dir() => Err(Misuse::new(
            format!("--predictions: there is no folder {}", folder.display()),
        )),
        _ => Ok(()),
    }
}

/// The report as lines.
pub fn text(report: &TextReport) -> String {
    let mut facts = Facts::default();
    for (name, score) in &report.metrics {
        let note = if name == "meteor" {
            report.meteor_matches.map(|how| format!("  ({how})"))
        } else {
            None
        };
        let score = score.as_f64().unwrap_or(f64::NAN);
        facts.add(
            metrics::title(name),
            format!("{score:.4}{}", note.unwrap_or_default()),
        );
    }
    let case = if report.lowercase { ", lower case" } else { "" };
    facts.add("tokens", format!("{}{case}", report.tokenize));
    facts.add(
        "texts",
        format!(
            "{} with {} references, of {}",
            report.meanings,
            report.references,
            report.data.display()
        ),
    );
    if let Some(unfinished) = report.unfinished.filter(|&count| count > 0) {
        facts.add(
            "cut off",
            format!("{unfinished}, which did not end by themselves"),
        );
    }
    facts.render("", false)
}

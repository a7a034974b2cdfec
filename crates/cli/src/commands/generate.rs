//! `lowrank generate`, and the sampling flags that `lowrank chat` shares.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Context;
use clap::{ArgGroup, Args};
use lowrank::Workspace;
use lowrank::base::Base;
use lowrank::data::{Message, Prompt, Split, load_prompts};
use lowrank::fields::finite;
use lowrank::generate::{
    self as engine, BeamOptions, Continuation, Finish, GenerateOptions, Penalties, PromptIds,
    Sampling,
};
use lowrank::model::AdapterSet;
use serde::Serialize;

use super::common::{
    AdapterArg, Adapters, BaseArgs, ExactArgs, adapter_set, check_length, choose_split, not_finite,
};
use crate::failure::Misuse;
use crate::output::Output;
use crate::progress::{self, Mode};
use crate::settings::values::at_most;
use crate::table::{bold, dim};

/// Continuations that are computed together; each holds a cache.
const TOGETHER: usize = 16;
/// Beams that are computed together.
const BEAMS_TOGETHER: usize = 64;

/// Arguments of `lowrank generate`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("source").required(true).args(["prompt", "data"]))]
pub struct GenerateArgs {
    /// The model
    #[command(flatten)]
    pub base: BaseArgs,

    /// How exactly tokens are generated
    #[command(flatten)]
    pub exact: ExactArgs,

    /// An adapter's folder, with a name if wanted; may be repeated, and every prompt is continued with each
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<AdapterArg>,

    /// The text to continue, as it is; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Vec<String>,

    /// Write the prompt as a user's message through the model's chat template
    #[arg(long, requires = "prompt")]
    pub chat_template: bool,

    /// A system message before it
    #[arg(
        long,
        value_name = "TEXT",
        requires = "chat_template",
        allow_hyphen_values = true
    )]
    pub system: Option<String>,

    /// Continue the prompt of every row of a file, or of a folder's test.jsonl, else valid.jsonl
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,

    /// Which file of the folder
    #[arg(long, value_name = "SPLIT", requires = "data")]
    pub split: Option<Split>,

    /// Only the first so many rows
    #[arg(long, value_name = "N", requires = "data")]
    pub limit: Option<usize>,

    /// How tokens are drawn
    #[command(flatten)]
    pub sampling: SamplingArgs,

    /// Whether several continuations are searched
    #[command(flatten)]
    pub beams: BeamArgs,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// How tokens are drawn.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// New tokens at most
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_new_tokens: usize,

    /// 0 takes the likeliest token each time; greater is more varied
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = finite::<f32>)]
    pub temperature: f32,

    /// Draw from the k likeliest tokens; 0 means all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,

    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = finite::<f32>)]
    pub top_p: f32,

    /// Draw from tokens whose probability is at least P times that of the most likely one; 0 means all
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = finite::<f32>)]
    pub min_p: f32,

    /// Divide the logits of tokens that the prompt or the text has by this; 1 does nothing
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = finite::<f32>)]
    pub repetition_penalty: f32,

    /// The same seed draws the same tokens
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,

    /// Let no run of N tokens come twice, the prompt's included; 0 means any may
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub no_repeat_ngram_size: usize,
}

impl SamplingArgs {
    /// The defaults.
    pub fn greedy() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 42,
            no_repeat_ngram_size: 0,
        }
    }

    /// The library's options.
    ///
    /// # Errors
    /// With every value that is out of range.
    pub fn resolve(&self, stop_ids: &[u32]) -> Result<GenerateOptions, Misuse> {
        let mut problems = Misuse::default();
        problems.require(self.max_new_tokens > 0, || {
            "--max-new-tokens must be 1 or greater".to_string()
        });
        problems.require(
            self.temperature >= 0.0 && self.temperature.is_finite(),
            || {
                format!(
                    "--temperature must be 0 or greater, not {}",
                    self.temperature
                )
            },
        );
        problems.require(self.top_p > 0.0 && self.top_p <= 1.0, || {
            format!(
                "--top-p must be greater than 0 and at most 1, not {}",
                self.top_p
            )
        });
        problems.require((0.0..=1.0).contains(&self.min_p), || {
            format!("--min-p must be from 0 to 1, not {}", self.min_p)
        });
        problems.require(self.repetition_penalty > 0.0, || {
            format!(
                "--repetition-penalty must be greater than 0, not {}",
                self.repetition_penalty
            )
        });
        let narrowed = self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0;
        problems.require(self.temperature > 0.0 || !narrowed, || {
            "--top-k, --top-p and --min-p do nothing without a --temperature above 0".to_string()
        });
        problems.or(GenerateOptions {
            max_new_tokens: self.max_new_tokens,
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                seed: self.seed,
            },
            penalties: Penalties {
                repetition: self.repetition_penalty,
                ..Penalties::NONE
            },
            logit_bias: Vec::new(),
            no_repeat_ngram_size: self.no_repeat_ngram_size,
            stop_ids: stop_ids.to_vec(),
        })
    }
}

/// Whether several continuations are searched.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Beam search")]
pub struct BeamArgs {
    /// Let so many continuations go on together and take the best; 1 searches none
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_most::<1024>)]
    pub num_beams: usize,

    /// A beam's score is divided by its length to this power [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = finite::<f32>)]
    pub length_penalty: Option<f32>,
}

impl BeamArgs {
    /// The library's options, or none for one beam.
    ///
    /// # Errors
    /// With every value that is out of range or does nothing.
    pub fn resolve(&self, options: &GenerateOptions) -> Result<Option<BeamOptions>, Misuse> {
        let mut problems = Misuse::default();
        problems.require(self.num_beams > 0, || {
            "--num-beams must be 1 or greater".to_string()
        });
        problems.require(self.num_beams < 2 || options.sampling.is_greedy(), || {
            "--num-beams takes the best continuation and --temperature draws one; leave one of them out"
                .to_string()
        });
        problems.require(self.num_beams != 1 || self.length_penalty.is_none(), || {
            "--length-penalty does nothing without --num-beams of 2 or more".to_string()
        });
        let length_penalty = self.length_penalty.unwrap_or(1.0);
        problems.require(length_penalty.is_finite(), || {
            format!("--length-penalty must be a number, not {length_penalty}")
        });
        problems.or((self.num_beams > 1).then(|| BeamOptions {
            num_beams: self.num_beams,
            length_penalty,
            max_new_tokens: options.max_new_tokens,
            no_repeat_ngram_size: options.no_repeat_ngram_size,
            stop_ids: options.stop_ids.clone(),
        }))
    }
}

/// Prompts that are continued together.
pub fn together(beams: Option<&BeamOptions>) -> usize {
    beams.map_or(TOGETHER, |beams| {
        (BEAMS_TOGETHER / beams.num_beams).clamp(1, TOGETHER)
    })
}

/// Continues prompts with beams, or a token at a time. `names` are those of the adapters.
///
/// # Errors
/// When the model's numbers are not finite.
pub fn continue_all(
    base: &Base,
    adapters: AdapterSet,
    names: &[String],
    prompts: &[PromptIds],
    options: &GenerateOptions,
    beams: Option<&BeamOptions>,
    ws: &Workspace,
) -> anyhow::Result<Vec<Continuation>> {
    let made = match beams {
        Some(beams) => engine::beam_search(&base.decoder, adapters, prompts, beams, ws),
        None => engine::generate(&base.decoder, adapters, prompts, options, ws, |_, _| true),
    };
    for (prompt, one) in prompts.iter().zip(&made) {
        check_finite(one.finish, base, names, prompt.adapter)?;
    }
    Ok(made)
}

fn check_finite(
    finish: Finish,
    base: &Base,
    names: &[String],
    adapter: Option<usize>,
) -> anyhow::Result<()> {
    if finish != Finish::NotFinite {
        return Ok(());
    }
    let name = adapter.map(|index| names[index].as_str());
    Err(not_finite("the output", base, name))
}

/// The result of `lowrank generate`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GenerateReport {
    /// Prompt by prompt, and for each prompt adapter by adapter.
    pub generations: Vec<Generation>,
    /// New tokens a second over all of them.
    pub new_tokens_per_second: f64,
}

/// One continuation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Generation {
    /// The text that the model read, template and all.
    pub prompt: String,
    /// The adapter's name; `null` is the base alone.
    pub adapter: Option<String>,
    /// The continuation.
    pub text: String,
    /// What the data holds as the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the continuation.
    pub new_tokens: usize,
    /// Why it ended.
    pub finish: Finish,
}

/// Runs the command.
///
/// # Errors
/// A model, adapter, prompt or data that cannot be used.
pub fn run(args: &GenerateArgs, progress: Mode) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    args.beams.resolve(&args.sampling.resolve(&[])?)?;
    let base = args.base.load(&AdapterArg::paths(&args.adapter))?;
    args.exact.apply(&base)?;
    let options = args.sampling.resolve(base.tokenizer.stop_ids())?;
    let beams = args.beams.resolve(&options)?;
    let adapters = Adapters::load(&args.adapter, &base)?;
    let prompts = prompts(args, &base)?;
    let longest = prompts
        .iter()
        .map(|prompt| prompt.ids.len())
        .max()
        .unwrap_or(0);
    check_length(
        (&base.source, base.decoder.config()),
        &adapters.all(),
        longest + 1,
        "shorten the prompt",
    )?;
    let screen = !args.json && beams.is_none();
    if let ([prompt], ..=1, true) = (prompts.as_slice(), args.adapter.len(), screen) {
        return stream(prompt, &base, &adapters, &options, &output);
    }
    // Texts are shown as they are made, so that an end in between loses none of them; one JSON object is whole or not there.
    let mut shown = Shown::default();
    let report = generate(
        &prompts,
        &base,
        &adapters,
        &options,
        beams.as_ref(),
        progress,
        &mut |generations| {
            if args.json {
                return Ok(());
            }
            output.write(&shown.text(generations, &output))
        },
    )?;
    if args.json {
        return output.result(&report, |_| String::new());
    }
    Ok(())
}

fn prompts(args: &GenerateArgs, base: &Base) -> anyhow::Result<Vec<Prompt>> {
    let tokenizer = &base.tokenizer;
    if let Some(data) = &args.data {
        let split = choose_split(data, args.split, &[Split::Test, Split::Valid])?;
        let mut prompts = load_prompts(data, split, tokenizer)?;
        prompts.truncate(args.limit.unwrap_or(usize::MAX));
        return Ok(prompts);
    }
    let prompt = |text: &String| {
        if text.is_empty() {
            return Err(Misuse::new("--prompt is empty, so there is nothing to continue").into());
        }
        if !args.chat_template {
            return Ok(Prompt::from_text(tokenizer, text)?);
        }
        let mut messages: Vec<Message> = args
            .system
            .iter()
            .map(|text| Message::new("system", text))
            .collect();
        messages.push(Message::new("user", text));
        Ok(Prompt::from_messages(tokenizer, &messages)?)
    };
    args.prompt.iter().map(prompt).collect()
}

/// One continuation, shown while it is made.
fn stream(
    prompt: &Prompt,
    base: &Base,
    adapters: &Adapters,
    options: &GenerateOptions,
    output: &Output,
) -> anyhow::Result<()> {
    let adapter = (!adapters.names.is_empty()).then_some(0);
    let never = AtomicBool::new(false);
    continue_on_screen(
        prompt.ids.clone(),
        adapter,
        base,
        adapters,
        options,
        &never,
        &mut |text| output.write(text),
    )?;
    output.write("\n")
}

/// Continues a prompt and hands the text on as it comes, until it is done or `stop` turns true.
///
/// # Errors
/// Those of `show`, and of the tokenizer's decoder; or when the model's numbers are not finite.
pub fn continue_on_screen(
    ids: Vec<u32>,
    adapter: Option<usize>,
    base: &Base,
    adapters: &Adapters,
    options: &GenerateOptions,
    stop: &AtomicBool,
    show: &mut dyn FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<(String, Finish)> {
    let mut whole = String::new();
    let mut pieces = base.tokenizer.decode_stream(true);
    let mut failure = None;
    // Without an adapter the set is empty: replaced weights would act on every row.
    let all = adapter.map_or_else(Vec::new, |_| adapters.all());
    let prompt = PromptIds { ids, adapter };
    let mut made = engine::generate(
        &base.decoder,
        adapter_set(&all),
        std::slice::from_ref(&prompt),
        options,
        &Workspace::new(),
        |_, id| {
            let shown = pieces
                .push(id)
                .context("cannot write tokens as text")
                .and_then(|text| {
                    whole.push_str(&text);
                    if text.is_empty() { Ok(()) } else { show(&text) }
                });
            failure = shown.err();
            failure.is_none() && !stop.load(Ordering::Relaxed)
        },
    );
    if let Some(error) = failure {
        return Err(error);
    }
    let finish = made.pop().map_or(Finish::Length, |one| one.finish);
    let rest = pieces.finish().context("cannot write tokens as text")?;
    if !rest.is_empty() {
        show(&rest)?;
        whole.push_str(&rest);
    }
    check_finite(finish, base, &adapters.names, adapter)?;
    Ok((whole, finish))
}

/// Every prompt with every adapter, some at a time, each of which `show` is given when they are made.
fn generate(
    prompts: &[Prompt],
    base: &Base,
    adapters: &Adapters,
    options: &GenerateOptions,
    beams: Option<&BeamOptions>,
    progress: Mode,
    show: &mut dyn FnMut(&[Generation]) -> anyhow::Result<()>,
) -> anyhow::Result<GenerateReport> {
    let choices: Vec<Option<usize>> = if adapters.names.is_empty() {
        vec![None]
    } else {
        (0..adapters.names.len()).map(Some).collect()
    };
    let jobs: Vec<(&Prompt, Option<usize>)> = prompts
        .iter()
        .flat_map(|prompt| choices.iter().map(move |&adapter| (prompt, adapter)))
        .collect();
    let all = adapters.all();
    let workspace = Workspace::new();
    let bar = progress::counter(progress, jobs.len() as u64, "texts");
    let begun = Instant::now();
    let mut generations = Vec::with_capacity(jobs.len());
    for part in jobs.chunks(together(beams)) {
        let ids: Vec<PromptIds> = part
            .iter()
            .map(|(prompt, adapter)| PromptIds {
                ids: prompt.ids.clone(),
                adapter: *adapter,
            })
            .collect();
        let set = adapter_set(&all);
        let names = &adapters.names;
        let made = continue_all(base, set, names, &ids, options, beams, &workspace)?;
        let first = generations.len();
        for ((prompt, adapter), continuation) in part.iter().zip(made) {
            generations.push(Generation {
                prompt: prompt.text.clone(),
                adapter: adapter.map(|index| adapters.names[index].clone()),
                text: base.tokenizer.decode(&continuation.ids, true)?,
                reference: prompt.reference.clone(),
                prompt_tokens: prompt.ids.len(),
                new_tokens: continuation.ids.len(),
                finish: continuation.finish,
            });
        }
        bar.inc(part.len() as u64);
        bar.suspend(|| show(&generations[first..]))?;
    }
    bar.finish_and_clear();
    let new_tokens: usize = generations.iter().map(|one| one.new_tokens).sum();
    let new_tokens_per_second = new_tokens as f64 / begun.elapsed().as_secs_f64();
    Ok(GenerateReport {
        generations,
        new_tokens_per_second,
    })
}

/// What was shown last, so that texts of one prompt stand below it.
#[derive(Default)]
struct Shown {
    prompt: Option<String>,
}

impl Shown {
    fn text(&mut self, generations: &[Generation], output: &Output) -> String {
        let mut out = String::new();
        for one in generations {
            if self.prompt.as_ref() != Some(&one.prompt) {
                if self.prompt.is_some() {
                    out.push('\n');
                }
                out.push_str(&dim(&one.prompt, output.color));
                out.push('\n');
            }
            self.prompt = Some(one.prompt.clone());
            let name = one.adapter.as_deref().unwrap_or("base");
            out.extend([
                bold(&format!("{name}:"), output.color).as_str(),
                " ",
                one.text.trim(),
                "\n",
            ]);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_is_checked_as_a_whole() {
        let args = SamplingArgs {
            max_new_tokens: 0,
            temperature: 0.0,
            top_k: 5,
            top_p: 2.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 1,
            no_repeat_ngram_size: 0,
        };
        assert_eq!(args.resolve(&[]).unwrap_err().problems().len(), 3);
        let args = SamplingArgs {
            max_new_tokens: 4,
            temperature: 0.7,
            top_k: 5,
            top_p: 0.9,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 1,
            no_repeat_ngram_size: 3,
        };
        let options = args.resolve(&[7]).unwrap();
        assert_eq!(
            (
                options.max_new_tokens,
                options.stop_ids,
                options.sampling.top_k
            ),
            (4, vec![7], 5)
        );
    }

    #[test]
    fn beams_are_checked_as_a_whole() {
        let greedy = SamplingArgs::greedy().resolve(&[7]).unwrap();
        let resolve = |num_beams, length_penalty, options: &GenerateOptions| {
            let beams = BeamArgs {
                num_beams,
                length_penalty,
            };
            beams.resolve(options)
        };
        assert_eq!(resolve(1, None, &greedy), Ok(None));
        let beams = resolve(4, Some(0.9), &greedy).unwrap().unwrap();
        assert_eq!((beams.num_beams, beams.stop_ids), (4, vec![7]));
        let mut drawn = greedy.clone();
        drawn.sampling.temperature = 0.7;
        let problems = |result: Result<_, Misuse>| result.unwrap_err().problems().len();
        assert_eq!(problems(resolve(2, Some(f32::NAN), &drawn)), 2);
        assert_eq!(problems(resolve(1, Some(0.9), &greedy)), 1);
        assert_eq!(problems(resolve(0, None, &greedy)), 1);
        assert_eq!(
            (
                together(None),
                together(Some(&BeamOptions {
                    num_beams: 100,
                    ..resolve(2, None, &greedy).unwrap().unwrap()
                }))
            ),
            (16, 1)
        );
    }

    #[test]
    fn texts_are_grouped_by_prompt() {
        let one = |prompt: &str, adapter: Option<&str>, text: &str| Generation {
            prompt: prompt.to_string(),
            adapter: adapter.map(String::from),
            text: text.to_string(),
            reference: None,
            prompt_tokens: 1,
            new_tokens: 2,
            finish: Finish::Stop,
        };
        let all = [
            one("Once", Some("formal"), " upon a time\n"),
            one("Once", Some("short"), " more"),
            one("Twice", None, " told"),
        ];
        let output = Output {
            json: false,
            color: false,
            width: 80,
        };
        let mut shown = Shown::default();
        let text = shown.text(&all[..1], &output) + &shown.text(&all[1..], &output);
        insta::assert_snapshot!(text, @r#"
        Once
        formal: upon a time
        short: more

        Twice
        base: told
        "#);
    }
}

//! The command line's shape: global flags and one subcommand.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, ArgMatches, Command, CommandFactory, Parser, Subcommand};

use crate::commands::{
    adapter, bench, chat, compare, data, demo, eval, generate, merge, model, plan, train,
};
use crate::settings::peers;

/// Train, use, compare and merge LoRA adapters of transformer models, on the CPU.
#[derive(Debug, Parser)]
#[command(
    name = "lowrank",
    version,
    propagate_version = true,
    max_term_width = 110
)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Commands,

    /// Say more on standard error; twice for everything
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = "Messages")]
    pub verbose: u8,

    /// Say nothing but errors on standard error, and show no progress
    #[arg(
        short,
        long,
        global = true,
        conflicts_with = "verbose",
        help_heading = "Messages"
    )]
    pub quiet: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Commands {
    /// Adapt the built-in model to two tasks and show what came of it; nothing is downloaded
    Demo(demo::DemoArgs),
    /// Train an adapter, or a whole model, on rows of text
    Train(Box<train::TrainArgs>),
    /// Say what a run would take, before it runs: parameters, bytes, operations and memory, beside full fine-tuning
    Plan(Box<plan::PlanArgs>),
    /// Train several methods on the same rows and put them side by side: quality, parameters, speed, memory
    Compare(compare::CompareArgs),
    /// Measure loss, perplexity and token accuracy, or score generated texts, with or without an adapter
    Eval(Box<eval::EvalArgs>),
    /// Continue prompts, with any number of adapters
    Generate(generate::GenerateArgs),
    /// Talk with a model in the terminal and swap adapters while talking
    Chat(chat::ChatArgs),
    /// Fold an adapter into its model, and report how far the result's logits are
    Merge(merge::MergeArgs),
    /// Import or fetch a model, or look at one
    #[command(subcommand)]
    Model(model::ModelCommands),
    /// Look at training data as the model will see it
    #[command(subcommand)]
    Data(data::DataCommands),
    /// Look at an adapter
    #[command(subcommand)]
    Adapter(adapter::AdapterCommands),
    /// Measure speed and memory against what this machine can do
    #[command(subcommand)]
    Bench(bench::BenchCommands),
}

/// Parses the command line. The matches of the chosen subcommand tell which flags were typed.
///
/// # Errors
/// clap's error, which also stands for `--help` and `--version`.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<(Cli, ArgMatches), clap::Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    let matches = Cli::command()
        .try_get_matches_from(&args)
        .map_err(|error| advise(error, &args))?;
    let cli = <Cli as clap::FromArgMatches>::from_arg_matches(&matches)?;
    let mut innermost = matches;
    while let Some((_, inner)) = innermost.remove_subcommand() {
        innermost = inner;
    }
    Ok((cli, innermost))
}

/// Adds our own name to the error about a flag that another program has.
fn advise(mut error: clap::Error, args: &[OsString]) -> clap::Error {
    if error.kind() != ErrorKind::UnknownArgument {
        return error;
    }
    let Some(ContextValue::String(typed)) = error.get(ContextKind::InvalidArg) else {
        return error;
    };
    let command = chosen(&Cli::command(), args);
    let known = |key: &str| command.get_arguments().any(|arg| arg.get_id() == key);
    if let Some(advice) = peers::advice(typed, known) {
        error.remove(ContextKind::SuggestedArg);
        error.insert(
            ContextKind::Suggested,
            ContextValue::StyledStrs(vec![advice.for_flag().into()]),
        );
    } else if let Some(ContextValue::StyledStrs(tips)) = error.get(ContextKind::Suggested) {
        // That an unknown flag could be the name of a settings file helps nobody.
        let tips = tips
            .iter()
            .filter(|tip| !tip.to_string().contains("as a value"))
            .cloned()
            .collect();
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(tips));
    }
    error
}

/// The subcommand that the words before the first flag choose.
fn chosen(command: &Command, args: &[OsString]) -> Command {
    let mut command = command.clone();
    for word in args
        .iter()
        .skip(1)
        .take_while(|word| !word.to_string_lossy().starts_with('-'))
    {
        match command.find_subcommand(word) {
            Some(inner) => command = inner.clone(),
            None => break,
        }
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(args: &[&str]) -> String {
        parse(args.iter().map(OsString::from))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn the_definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_of_other_programs_are_answered_with_ours() {
        let text = message(&["lowrank", "train", "--iters", "100"]);
        assert!(
            text.contains("this setting is called --max-steps here; it counts optimizer steps"),
            "{text}"
        );
        let text = message(&["lowrank", "train", "--adapter-path", "x"]);
        assert!(text.contains("called --output here"), "{text}");
        let text = message(&["lowrank", "generate", "--adapter-path", "x"]);
        assert!(text.contains("called --adapter here"), "{text}");
        let text = message(&["lowrank", "train", "--learning-rat", "1"]);
        assert!(text.contains("'--learning-rate'"), "{text}");
        let text = message(&["lowrank", "train", "--xyzzy", "1"]);
        assert!(!text.contains("tip:"), "{text}");
    }

    /// Every flag that takes a number with a fraction, of every command, with the words that lead to it.
    fn number_flags(command: &Command, words: &[String], found: &mut Vec<Vec<String>>) {
        use std::any::TypeId;
        let numbers = [
            TypeId::of::<f64>(),
            TypeId::of::<f32>(),
            TypeId::of::<(String, f64)>(),
        ];
        for arg in command.get_arguments() {
            let kind = arg.get_value_parser().type_id();
            if let (true, Some(long)) = (numbers.iter().any(|one| kind == *one), arg.get_long()) {
                let value = if kind == TypeId::of::<(String, f64)>() {
                    "x="
                } else {
                    ""
                };
                found.push([words, &[format!("--{long}={value}")]].concat());
            }
        }
        for inner in command.get_subcommands() {
            let words = [words, &[inner.get_name().to_string()]].concat();
            number_flags(inner, &words, found);
        }
    }

    #[test]
    fn no_number_is_nan_or_infinite() {
        let mut flags = Vec::new();
        number_flags(&Cli::command(), &["lowrank".to_string()], &mut flags);
        assert!(flags.len() > 15, "{flags:?}");
        for words in flags {
            for value in ["nan", "NaN", "inf", "-inf", "infinity", "1e999", "-1e999"] {
                let mut words = words.clone();
                let flag = words.pop().unwrap();
                let typed = [words.as_slice(), &[format!("{flag}{value}")]].concat();
                let error = parse(typed.iter().map(OsString::from)).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ValueValidation, "{typed:?}");
                let text = error.to_string();
                let name = flag.split('=').next().unwrap();
                assert!(text.contains(name), "{text}");
                assert!(text.contains("expected a finite number"), "{text}");
            }
        }
    }
}

//! The command line's shape: global flags and one subcommand.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, ArgMatches, Command, CommandFactory, Parser, Subcommand};

use crate::commands::{
    adapter, bench, chat, classify, compare, data, demo, embed, eval, generate, merge, model, plan,
    serve, shell, train,
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
    /// Say which class each text is of, or each word of it, with a classifier that was trained
    Classify(classify::ClassifyArgs),
    /// Give each text a vector
    Embed(embed::EmbedArgs),
    /// Continue prompts, with any number of adapters
    Generate(generate::GenerateArgs),
    /// Talk with a model in the terminal and swap adapters while talking
    Chat(chat::ChatArgs),
    /// Serve the model and its adapters over HTTP, with OpenAI's API
    Serve(Box<serve::ServeArgs>),
    /// Fold an adapter into its model, and report how far the result's logits are
    Merge(merge::MergeArgs),
    /// Import, export or fetch a model, or look at one
    #[command(subcommand)]
    Model(model::ModelCommands),
    /// Look at training data as the model will see it
    #[command(subcommand)]
    Data(data::DataCommands),
    /// Look at adapters, combine and prune them, and carry them to other programs and back
    #[command(subcommand)]
    Adapter(adapter::AdapterCommands),
    /// Measure speed and memory against what this machine can do
    #[command(subcommand)]
    Bench(bench::BenchCommands),
    /// Print the script that lets a shell complete commands and flags
    Completions(shell::CompletionsArgs),
    /// Print the manual page, or write one for every command
    Man(shell::ManArgs),
}

/// The definitions of all commands and their arguments.
pub fn command() -> Command {
    with_negative_numbers(Cli::command())
}

/// Parses the command line. The matches of the chosen subcommand tell which flags were typed.
///
/// # Errors
/// clap's error, which also stands for `--help` and `--version`.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<(Cli, ArgMatches), clap::Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    let command = command();
    if let Some(error) = forgotten_text(command.clone(), &args) {
        return Err(error);
    }
    let matches = command
        .try_get_matches_from(&args)
        .map_err(|error| advise(error, &args))?;
    // These keep their settings in files of text.
    if matches!(matches.subcommand_name(), Some("train" | "compare"))
        && let Some(error) = not_utf8(&args)
    {
        return Err(error);
    }
    let cli = <Cli as clap::FromArgMatches>::from_arg_matches(&matches)?;
    let mut innermost = matches;
    while let Some((_, inner)) = innermost.remove_subcommand() {
        innermost = inner;
    }
    Ok((cli, innermost))
}

/// Lets every flag have a negative number for its value, so that whoever reads the value says what it must be.
fn with_negative_numbers(command: Command) -> Command {
    let names: Vec<String> = command
        .get_subcommands()
        .map(|inner| inner.get_name().to_owned())
        .collect();
    let command = command.mut_args(|arg| {
        let flag = arg.get_long().is_some() && arg.get_action().takes_values();
        if flag && !arg.is_allow_hyphen_values_set() {
            arg.allow_negative_numbers(true)
        } else {
            arg
        }
    });
    names.into_iter().fold(command, |command, name| {
        command.mut_subcommand(name, with_negative_numbers)
    })
}

/// The error about a text that was forgotten. A text may begin with a dash, so clap takes whatever follows for it.
fn forgotten_text(mut command: Command, args: &[OsString]) -> Option<clap::Error> {
    command.build();
    let mut command = chosen(&command, args);
    let is_flag = |word: &OsString| {
        let word = word.to_string_lossy();
        let long = word.strip_prefix("--");
        let long = long.map(|long| long.split_once('=').map_or(long, |(name, _)| name));
        let short = word
            .strip_prefix('-')
            .filter(|short| short.chars().count() == 1);
        command.get_arguments().any(|arg| {
            long.is_some_and(|long| arg.get_long() == Some(long))
                || short.is_some_and(|short| arg.get_short() == short.chars().next())
        })
    };
    let takes_text = |word: &OsString| {
        let word = word.to_str().and_then(|word| word.strip_prefix("--"));
        let mut texts = command
            .get_arguments()
            .filter(|arg| arg.is_allow_hyphen_values_set());
        word.is_some() && texts.any(|arg| arg.get_long() == word)
    };
    let (flag, next) = args
        .windows(2)
        .map(|pair| (&pair[0], &pair[1]))
        .find(|(flag, next)| takes_text(flag) && is_flag(next))?;
    let (flag, next) = (flag.to_string_lossy(), next.to_string_lossy());
    Some(command.error(
        ErrorKind::InvalidValue,
        format!(
            "{flag} needs a text, and {next} is a flag; to mean it as the text, write {flag}={next}"
        ),
    ))
}

/// The error about words that are not UTF-8, with the flag before each.
fn not_utf8(args: &[OsString]) -> Option<clap::Error> {
    let mut problems = Vec::new();
    for (at, word) in args.iter().enumerate().skip(1) {
        if word.to_str().is_some() {
            continue;
        }
        let shown = word.to_string_lossy();
        let before = args[at - 1].to_string_lossy();
        problems.push(match shown.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => {
                format!("the value `{value}` of {flag} is not UTF-8")
            }
            _ if before.starts_with('-') => format!("the value `{shown}` of {before} is not UTF-8"),
            _ => format!("argument {at}, `{shown}`, is not UTF-8"),
        });
    }
    if problems.is_empty() {
        return None;
    }
    let mend = "set the terminal, or what writes the command, to UTF-8, and give files such names";
    let text = format!("{}; {mend}", problems.join("; "));
    Some(built(args).error(ErrorKind::InvalidUtf8, text))
}

/// The error about a value that is no whole number, in the words that other numbers have.
fn not_whole(error: &clap::Error, args: &[OsString]) -> Option<clap::Error> {
    let cause = std::error::Error::source(error)?.to_string();
    let expected = match cause.as_str() {
        "invalid digit found in string" | "cannot parse integer from empty string" => {
            "expected a whole number, 0 or greater"
        }
        "number too large to fit in target type" => "this number is too large",
        _ => return None,
    };
    let shown = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let (value, flag) = (
        shown(ContextKind::InvalidValue)?,
        shown(ContextKind::InvalidArg)?,
    );
    let text = format!("invalid value '{value}' for '{flag}': {expected}");
    Some(built(args).error(ErrorKind::ValueValidation, text))
}

/// Puts errors into our own words, and adds our own name to the error about a flag that another program has.
fn advise(mut error: clap::Error, args: &[OsString]) -> clap::Error {
    match error.kind() {
        ErrorKind::InvalidUtf8 => return not_utf8(args).unwrap_or(error),
        ErrorKind::ValueValidation => return not_whole(&error, args).unwrap_or(error),
        _ => {}
    }
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

/// The subcommand that was typed, under its whole name.
fn built(args: &[OsString]) -> Command {
    let mut command = Cli::command();
    command.build();
    chosen(&command, args)
}

/// The subcommand that the first words choose; flags that may stand before it have no values.
fn chosen(command: &Command, args: &[OsString]) -> Command {
    let mut command = command.clone();
    for word in args
        .iter()
        .skip(1)
        .filter(|word| !word.to_string_lossy().starts_with('-'))
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

    #[test]
    fn what_is_no_whole_number_is_answered_like_other_numbers() {
        for flag in [
            "--top-k",
            "--seed",
            "--limit",
            "--max-new-tokens",
            "--threads",
        ] {
            for value in ["nan", "inf", "-1", "1e3", "1.5", "", "x"] {
                let word = format!("{flag}={value}");
                let text = message(&["lowrank", "generate", "--model=m", "--data=d", &word]);
                assert!(
                    text.contains(&format!("invalid value '{value}' for '{flag} <"))
                        && text.contains(": expected a whole number, 0 or greater"),
                    "{text}"
                );
            }
            let word = format!("{flag}=99999999999999999999999");
            let text = message(&["lowrank", "generate", "--model=m", "--data=d", &word]);
            assert!(text.contains("this number is too large"), "{text}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn words_that_are_not_utf_8_are_named() {
        use std::os::unix::ffi::OsStringExt;
        let message = |words: &[&[u8]]| {
            let words = words.iter().map(|word| OsString::from_vec(word.to_vec()));
            parse(words).unwrap_err().to_string()
        };
        let text = message(&[
            b"lowrank",
            b"generate",
            b"--model",
            b"m",
            b"--prompt",
            b"caf\xe9",
        ]);
        assert!(
            text.contains("the value `caf\u{fffd}` of --prompt is not UTF-8"),
            "{text}"
        );
        let text = message(&[b"lowrank", b"generate", b"--model=m", b"--prompt=caf\xe9"]);
        assert!(
            text.contains("the value `caf\u{fffd}` of --prompt is not UTF-8"),
            "{text}"
        );
        let text = message(&[b"lowrank", b"train", b"--output", b"b\xe9d"]);
        assert!(
            text.contains("the value `b\u{fffd}d` of --output is not UTF-8"),
            "{text}"
        );
        // A path that is only opened may have any name.
        let words: [&[u8]; 5] = [b"lowrank", b"generate", b"--model=m", b"--data", b"b\xe9d"];
        assert!(parse(words.map(|word| OsString::from_vec(word.to_vec()))).is_ok());
    }

    fn prompt(args: &[&str]) -> String {
        let typed = ["lowrank", "generate", "--model=m"].iter().chain(args);
        match parse(typed.map(OsString::from)).unwrap().0.command {
            Commands::Generate(generate) => generate.prompt.concat(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_text_may_begin_with_a_dash() {
        for text in [
            "- milk",
            "-",
            "--",
            "---\ntitle: x",
            "-1 is",
            "--no such flag",
            "-5",
        ] {
            assert_eq!(prompt(&["--prompt", text]), text);
        }
        assert_eq!(prompt(&["--prompt=- milk"]), "- milk");
    }

    #[test]
    fn a_text_that_was_forgotten_is_no_flag() {
        for flag in [
            "--max-new-tokens",
            "--json",
            "--seed=1",
            "--quiet",
            "-v",
            "--help",
        ] {
            let text = message(&[
                "lowrank",
                "-q",
                "generate",
                "--model=m",
                "--prompt",
                flag,
                "5",
            ]);
            assert!(
                text.contains(&format!("--prompt needs a text, and {flag} is a flag")),
                "{text}"
            );
            assert_eq!(prompt(&[&format!("--prompt={flag}")]), flag);
        }
        let text = message(&["lowrank", "chat", "--model=m", "--system", "--seed", "1"]);
        assert!(text.contains("--system needs a text"), "{text}");
    }

    #[test]
    fn negative_numbers_reach_the_reader_of_the_value() {
        let text = message(&[
            "lowrank",
            "generate",
            "--model=m",
            "--prompt=a",
            "--max-new-tokens",
            "-1",
        ]);
        assert!(
            text.contains("invalid value '-1' for '--max-new-tokens <N>'"),
            "{text}"
        );
        assert!(parse(["lowrank", "train", "--learning-rate", "-1"].map(OsString::from)).is_ok());
        let text = message(&["lowrank", "train", "-1"]);
        assert!(text.contains("unexpected argument '-1'"), "{text}");
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

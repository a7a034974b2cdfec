//! One file a command: its arguments, the call into the library, and what it prints.

pub mod adapter;
pub mod bench;
pub mod chat;
pub mod classify;
pub mod common;
pub mod compare;
pub mod data;
pub mod demo;
pub mod embed;
pub mod eval;
pub mod eval_classes;
pub mod eval_text;
pub mod generate;
pub mod merge;
pub mod model;
pub mod modelfile;
pub mod plan;
pub mod serve;
pub mod shell;
pub mod texts;
pub mod train;
pub mod with_adapter;

use clap::ArgMatches;

use crate::args::Commands;
use crate::progress::Mode;
use crate::threads::set_threads;

/// Runs a command. `matches` are those of the innermost subcommand.
///
/// # Errors
/// Whatever went wrong; [`failure::conclude`](crate::failure::conclude) turns it into a message and an exit code.
pub fn run(command: Commands, matches: &ArgMatches, progress: Mode) -> anyhow::Result<()> {
    let is_one_process = matches!(
        command,
        Commands::Demo(_)
            | Commands::Compare(_)
            | Commands::Classify(_)
            | Commands::Embed(_)
            | Commands::Generate(_)
            | Commands::Chat(_)
            | Commands::Serve(_)
            | Commands::Merge(_)
            | Commands::Model(_)
            | Commands::Adapter(_)
            | Commands::Plan(_)
    );
    if is_one_process {
        crate::ranks::refuse_several()?;
    }
    // A training's settings file may say how many, and ranks of a job share the processors, so these start them themselves.
    if !matches!(command, Commands::Train(_) | Commands::Eval(_)) {
        let threads = matches.try_get_one::<usize>("threads").ok().flatten();
        set_threads(threads.copied())?;
    }
    // These save what they have, in their own way.
    let saves = matches!(
        command,
        Commands::Demo(_)
            | Commands::Train(_)
            | Commands::Compare(_)
            | Commands::Chat(_)
            | Commands::Serve(_)
    );
    if !saves {
        crate::interrupt::clean_up();
    }
    let result = match command {
        Commands::Demo(args) => demo::run(&args, progress),
        Commands::Train(args) => train::run(*args, matches, progress),
        Commands::Plan(args) => plan::run(&args, matches),
        Commands::Compare(args) => compare::run(&args, progress),
        Commands::Eval(args) => eval::run(&args, matches, progress),
        Commands::Classify(args) => classify::run(&args),
        Commands::Embed(args) => embed::run(&args),
        Commands::Generate(args) => generate::run(&args, progress),
        Commands::Chat(args) => chat::run(&args),
        Commands::Serve(args) => serve::run(*args),
        Commands::Merge(args) => merge::run(&args),
        Commands::Model(command) => model::run(command, progress),
        Commands::Data(command) => data::run(command),
        Commands::Adapter(command) => adapter::run(command),
        Commands::Bench(command) => bench::run(command, matches),
        Commands::Completions(args) => shell::completions(&args),
        Commands::Man(args) => shell::man(&args),
    };
    result.map_err(common::as_misuse)
}

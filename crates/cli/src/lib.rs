//! The `lowrank` command line: arguments become settings, settings become one command of [`commands`].
//!
//! The library half exists so that the binary stays one line and other tools can ask for the argument definitions
//! ([`args::Cli`]) and the settings' schema.

pub mod args;
pub mod commands;
pub mod failure;
pub mod interrupt;
pub mod logging;
pub mod output;
pub mod progress;
pub mod ranks;
pub mod settings;
pub mod table;
pub mod threads;

use std::process::ExitCode;

/// Runs the program on the process's arguments.
pub fn main() -> ExitCode {
    let (cli, matches) = match args::parse(std::env::args_os()) {
        Ok(parsed) => parsed,
        // Also --help and --version, which are no failures and go to standard output.
        Err(error) => {
            if error.use_stderr() {
                ranks::shorten_on_others(&error.to_string());
            }
            error.exit()
        }
    };
    ranks::no_terminal_of_launcher();
    // What a server says of settings is for its clients, who give them by their keys.
    if !matches!(cli.command, args::Commands::Serve(_)) {
        lowrank::names::call_settings_by(&settings::Flags);
    }
    // What all ranks of a job would say, rank 0 says.
    let joins = matches!(
        cli.command,
        args::Commands::Train(_) | args::Commands::Eval(_)
    );
    let is_other = joins && ranks::is_other_rank();
    let quiet = cli.quiet || is_other;
    logging::init(if quiet { -1 } else { i16::from(cli.verbose) });
    interrupt::no_end_by_file_size();
    interrupt::end_with_parent();
    let progress = progress::Mode::detect(quiet);
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        failure::conclude(commands::run(cli.command, &matches, progress))
    }));
    match done {
        Ok(code) => ExitCode::from(ranks::leave(code)),
        Err(panic) => {
            ranks::end_the_others();
            std::panic::resume_unwind(panic)
        }
    }
}

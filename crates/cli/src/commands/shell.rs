//! `lowrank completions` and `lowrank man`: what a shell and the manual reader need, made from the definitions of the arguments.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::args;
use crate::output::Output;

/// Arguments of `lowrank completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

/// Arguments of `lowrank man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Write a page for every command into this folder, such as ~/.local/share/man/man1
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// Prints the script that completes the command line.
///
/// # Errors
/// When standard output cannot be written.
pub fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut args::command(), "lowrank", &mut script);
    Output::detect(false).write(&String::from_utf8(script)?)
}

/// Prints the page of the program, or writes those of all commands.
///
/// # Errors
/// When standard output or the folder cannot be written.
pub fn man(args: &ManArgs) -> anyhow::Result<()> {
    let mut command = args::command();
    command.build();
    match &args.output {
        None => Output::detect(false).write(&page(&command)?),
        Some(folder) => {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
            write_pages(&command, folder)
        }
    }
}

/// The pages of a command and of those below it.
fn write_pages(command: &Command, folder: &Path) -> anyhow::Result<()> {
    let name = command
        .get_display_name()
        .unwrap_or_else(|| command.get_name());
    lowrank::write_text(&folder.join(format!("{name}.1")), &page(command)?)?;
    command
        .get_subcommands()
        .filter(|inner| inner.get_name() != "help" && !inner.is_hide_set())
        .try_for_each(|inner| write_pages(inner, folder))
}

fn page(command: &Command) -> anyhow::Result<String> {
    let mut page = Vec::new();
    let source = concat!("lowrank ", env!("CARGO_PKG_VERSION"));
    Man::new(command.clone()).source(source).render(&mut page)?;
    Ok(String::from_utf8(page)?)
}

//! The method, and the options that decide which values it trains.
//!
//! `lowrank plan` and `lowrank bench train` take these of the settings of `lowrank train`.

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};
use lowrank::settings::TrainConfig;
use lowrank::tuning::{Method, MethodOptions};

use super::flag;
use super::train::command;
use crate::failure::Misuse;

/// A method with its options.
#[derive(Debug, Clone, PartialEq)]
pub struct MethodArgs {
    /// What is trained.
    pub method: Method,
    /// The options of all methods.
    pub options: Box<MethodOptions>,
}

/// The flags, as `lowrank train` declares them.
fn flags() -> Vec<Arg> {
    let keys = Method::shape_keys();
    let is_taken = |arg: &&Arg| arg.get_id() == "method" || keys.contains(&arg.get_id().as_str());
    command()
        .get_arguments()
        .filter(is_taken)
        .cloned()
        .collect()
}

impl Args for MethodArgs {
    fn augment_args(command: Command) -> Command {
        command.args(flags())
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for MethodArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut typed = vec!["train".into()];
        for arg in flags() {
            let id = arg.get_id().as_str();
            if matches.value_source(id) != Some(ValueSource::CommandLine) {
                continue;
            }
            for value in matches.get_raw(id).into_iter().flatten() {
                let mut flag = std::ffi::OsString::from(format!("{}=", flag(id)));
                flag.push(value);
                typed.push(flag);
            }
        }
        let matches = command().try_get_matches_from(typed)?;
        let TrainConfig {
            method, options, ..
        } = TrainConfig::from_arg_matches(&matches)?;
        Ok(Self {
            method,
            options: Box::new(options),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl MethodArgs {
    /// A run's settings with these, and all others as they are by default.
    ///
    /// # Errors
    /// When a flag of one method stands beside another, which would do nothing.
    pub fn train_config(&self, model: &str, matches: &ArgMatches) -> Result<TrainConfig, Misuse> {
        let mut problems = Misuse::default();
        for id in matches.ids() {
            let typed = matches.value_source(id.as_str()) == Some(ValueSource::CommandLine);
            problems.require(!typed || self.method.reads(id.as_str()), || {
                format!(
                    "{} does nothing with the method {}; leave it out",
                    flag(id.as_str()),
                    self.method.title()
                )
            });
        }
        problems.or(TrainConfig {
            options: MethodOptions::clone(&self.options),
            ..TrainConfig::new(self.method, model, "", "")
        })
    }
}

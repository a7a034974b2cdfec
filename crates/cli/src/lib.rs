//! The `lowrank` command line: arguments become settings, settings become one command of [`commands`].
//!
//! The library half exists so that the binary stays one line and other tools can ask for the argument definitions
//! ([`args::Cli`]) and the settings' schema.

pub mod failure;
pub mod interrupt;
pub mod logging;
pub mod output;
pub mod progress;
pub mod settings;
pub mod table;

//! How messages call settings.
//!
//! The library calls a setting by its key, which is the field's name: `max_seq_length`. A program whose users know it by another
//! name says so once, with [`call_settings_by`]; the command line calls it `--max-seq-length`.

use std::fmt::Display;
use std::sync::OnceLock;

/// How a message calls a setting.
pub trait Names {
    /// The setting as it was given: `r (in run.yaml)`.
    fn given(&self, key: &str) -> String;

    /// The setting as it would be given: `--r`.
    fn to_give(&self, key: &str) -> String;

    /// The setting as it would be given with a value: `--r 8`.
    fn to_give_as(&self, key: &str, value: &str) -> String {
        format!("{} {value}", self.to_give(key))
    }
}

/// Settings are called by their keys.
#[derive(Clone, Copy, Debug)]
pub struct Keys;

impl Names for Keys {
    fn given(&self, key: &str) -> String {
        key.to_owned()
    }

    fn to_give(&self, key: &str) -> String {
        key.to_owned()
    }

    fn to_give_as(&self, key: &str, value: &str) -> String {
        format!("{key}: {value}")
    }
}

static NAMES: OnceLock<&'static (dyn Names + Sync)> = OnceLock::new();

/// Lets all messages of this process call settings so. The first call counts; it says whether it was this one.
pub fn call_settings_by(names: &'static (dyn Names + Sync)) -> bool {
    NAMES.set(names).is_ok()
}

/// A setting as it would be given.
pub(crate) fn named(key: &str) -> String {
    names().to_give(key)
}

/// A setting as it would be given with a value.
pub(crate) fn valued(key: &str, value: impl Display) -> String {
    names().to_give_as(key, &value.to_string())
}

fn names() -> &'static dyn Names {
    match NAMES.get() {
        Some(names) => *names,
        None => &Keys,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_called_by_their_keys() {
        assert_eq!(named("max_seq_length"), "max_seq_length");
        assert_eq!(valued("max_seq_length", 40), "max_seq_length: 40");
    }
}

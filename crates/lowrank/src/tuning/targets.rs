//! Which modules a method adapts, as PEFT says it: `target_modules` and `exclude_modules`.

use std::convert::Infallible;
use std::str::FromStr;

pub use lowrank_formats::peft::{ModuleNames, TargetModules};
use serde::{Deserialize, Deserializer, Serialize};

use crate::fields::{Names, fields};
use crate::model::{Family, families};

fields! {
    /// Modules that are adapted.
    pub struct Settings {
        /// Modules to adapt: names (q_proj,v_proj), a regular expression for the whole name, or all-linear; GPT-2's fused
        /// c_attn also goes in parts (c_attn.q,c_attn.v) [default: PEFT's for the method; LoRA's are the family's q and v]
        #[arg(value_name = "MODULES", help_heading = "LoRA")]
        #[fixes(Shape)]
        pub target_modules: Option<Targets>,

        /// Modules to leave out: names, or a regular expression
        #[arg(value_name = "MODULES", help_heading = "LoRA")]
        #[fixes(Shape)]
        pub exclude_modules: Option<Targets>,
    }
}

impl Settings {
    /// Adds lists that name nothing to `problems`.
    pub(super) fn check(&self, names: &dyn Names, problems: &mut Vec<String>) {
        for (key, targets) in [
            ("target_modules", &self.target_modules),
            ("exclude_modules", &self.exclude_modules),
        ] {
            if targets.as_ref().is_some_and(Targets::is_empty) {
                problems.push(format!("{} names no module", names.given(key)));
            }
        }
    }

    /// The modules to adapt; where nothing is said, the family's q and v.
    pub(super) fn target_modules(&self, family: Family) -> TargetModules {
        let defaults = || {
            let names = families::default_targets(family).iter();
            TargetModules::List(names.map(ToString::to_string).collect())
        };
        let given = self.target_modules.as_ref();
        given.map_or_else(defaults, Targets::to_target_modules)
    }

    /// The modules to leave out.
    pub(super) fn exclude_modules(&self) -> Option<ModuleNames> {
        self.exclude_modules.as_ref().map(Targets::to_module_names)
    }
}

/// Which modules a list of targets names (`target_modules`, `exclude_modules`).
///
/// A text with a character that names do not hold, such as `*` or `(`, is a regular expression; `all-linear` is a
/// pattern too; anything else is a list of names between commas.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Targets {
    /// `"all-linear"`, or a regular expression that matches a whole module name.
    Pattern(String),
    /// Names: a module matches an entry that it equals or ends in, after a dot.
    Names(Vec<String>),
}

impl Targets {
    fn is_empty(&self) -> bool {
        match self {
            Self::Pattern(pattern) => pattern.is_empty(),
            Self::Names(names) => names.is_empty(),
        }
    }

    /// As PEFT's `target_modules`.
    pub fn to_target_modules(&self) -> TargetModules {
        match self {
            Self::Pattern(text) if text == "all-linear" => TargetModules::AllLinear,
            Self::Pattern(text) => TargetModules::Regex(text.clone()),
            Self::Names(names) => TargetModules::List(names.clone()),
        }
    }

    /// As PEFT's `exclude_modules`.
    pub fn to_module_names(&self) -> ModuleNames {
        match self {
            Self::Pattern(text) => ModuleNames::Regex(text.clone()),
            Self::Names(names) => ModuleNames::List(names.clone()),
        }
    }
}

impl FromStr for Targets {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let text = text.trim();
        if text == "all-linear" || text.contains(|c| r"*+?()[]{}|^$\".contains(c)) {
            return Ok(Self::Pattern(text.to_owned()));
        }
        let names = text
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty());
        Ok(Self::Names(names.map(str::to_owned).collect()))
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "expected a list of names, a regular expression or all-linear"
        )]
        enum Raw {
            One(String),
            Many(Vec<String>),
        }
        Ok(match Raw::deserialize(deserializer)? {
            Raw::One(text) => text
                .parse()
                .unwrap_or_else(|never: Infallible| match never {}),
            Raw::Many(names) => Self::Names(names),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_names_or_a_pattern() {
        let names =
            |list: &[&str]| Targets::Names(list.iter().map(|name| (*name).to_owned()).collect());
        let cases = [
            ("q_proj,v_proj", names(&["q_proj", "v_proj"])),
            ("q_proj, v_proj ,", names(&["q_proj", "v_proj"])),
            ("c_attn.q", names(&["c_attn.q"])),
            ("all-linear", Targets::Pattern("all-linear".to_owned())),
            (
                r".*\.(q|v)_proj",
                Targets::Pattern(r".*\.(q|v)_proj".to_owned()),
            ),
        ];
        for (text, targets) in cases {
            assert_eq!(text.parse(), Ok(targets.clone()), "{text}");
            let written = serde_json::to_value(&targets).unwrap();
            assert_eq!(
                serde_json::from_value::<Targets>(written).unwrap(),
                targets,
                "{text}"
            );
        }
    }
}

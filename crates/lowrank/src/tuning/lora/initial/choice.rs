//! The values of `init_lora_weights`, as flags and files write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How A and B begin (`init_lora_weights`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// A ~ N(0, 1/r²), B = 0.
    #[default]
    Gaussian,
    /// `true`: A ~ Kaiming uniform with a = √5, B = 0.
    KaimingUniform,
    /// `false`: both at random, each drawn as `true` draws A, so that the adapter changes the model from the start. For tests.
    Random,
    /// The r largest singular values of the weight and their vectors, which are taken off it (Meng et al., "`PiSSA`", 2024).
    Pissa,
    /// `pissa_niter_N`: the same, found faster and less exactly from random directions with N iterations (Halko et al., 2011).
    PissaNiter(usize),
    /// Q and R of the weight, the first r columns and rows, which are taken off it (Büyükakyüz, "`OLoRA`", 2024).
    Olora,
    /// What is nearest to what a quantized base has lost (Li et al., "`LoftQ`", 2023).
    Loftq,
}

/// Before the number of iterations.
const NITER: &str = "pissa_niter_";
/// Iterations at most; each is two products with the weight, and a few are enough.
const MOST_ITERATIONS: usize = 1000;
const EXPECTED: &str =
    "expected gaussian, true, false, pissa, pissa_niter_N (such as pissa_niter_4), olora or loftq";

impl InitLoraWeights {
    /// The value that `adapter_config.json` records. What is saved is a LoRA beside the base as it is, however it began.
    pub fn to_json(self) -> serde_json::Value {
        match self {
            Self::Gaussian => "gaussian".into(),
            Self::Random => false.into(),
            Self::KaimingUniform
            | Self::Pissa
            | Self::PissaNiter(_)
            | Self::Olora
            | Self::Loftq => true.into(),
        }
    }
}

impl fmt::Display for InitLoraWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gaussian => "gaussian",
            Self::KaimingUniform => "true",
            Self::Random => "false",
            Self::Pissa => "pissa",
            Self::PissaNiter(iterations) => return write!(f, "{NITER}{iterations}"),
            Self::Olora => "olora",
            Self::Loftq => "loftq",
        })
    }
}

impl FromStr for InitLoraWeights {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "gaussian" => Self::Gaussian,
            "true" => Self::KaimingUniform,
            "false" => Self::Random,
            "pissa" => Self::Pissa,
            "olora" => Self::Olora,
            "loftq" => Self::Loftq,
            _ => {
                let wrong = || format!("got \"{text}\", {EXPECTED}");
                let number = text.strip_prefix(NITER).ok_or_else(wrong)?;
                match number.parse() {
                    Ok(iterations) if iterations <= MOST_ITERATIONS => Self::PissaNiter(iterations),
                    _ => {
                        return Err(format!(
                            "got \"{text}\"; N of {NITER}N is a number from 0 to {MOST_ITERATIONS}"
                        ));
                    }
                }
            }
        })
    }
}

impl Serialize for InitLoraWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    /// A word, or a boolean as in YAML's `init_lora_weights: true`.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a word, true or false")]
        enum Raw {
            Bool(bool),
            Text(String),
        }
        let text = match Raw::deserialize(deserializer)? {
            Raw::Bool(value) => value.to_string(),
            Raw::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// How a flag is read: the words, of which one has a number in it.
#[cfg(feature = "clap")]
mod flag {
    use clap::builder::{
        PossibleValue, PossibleValuesParser, StringValueParser, TypedValueParser,
        ValueParserFactory,
    };
    use clap::error::ErrorKind;

    use super::InitLoraWeights;

    /// Reads [`InitLoraWeights`].
    #[derive(Clone)]
    pub struct Parser;

    impl ValueParserFactory for InitLoraWeights {
        type Parser = Parser;

        fn value_parser() -> Parser {
            Parser
        }
    }

    fn values() -> [PossibleValue; 7] {
        [
            ("gaussian", "A ~ N(0, 1/r²), B = 0"),
            ("true", "A ~ Kaiming uniform, B = 0"),
            (
                "false",
                "Both at random, so that the adapter changes the model from the start",
            ),
            (
                "pissa",
                "The weight's largest singular values, which are taken off it",
            ),
            (
                "pissa_niter_N",
                "The same, faster and less exactly, with N iterations",
            ),
            ("olora", "Q and R of the weight, which are taken off it"),
            (
                "loftq",
                "What a quantized base has lost; needs load_in or loftq_weights",
            ),
        ]
        .map(|(name, help)| PossibleValue::new(name).help(help))
    }

    impl TypedValueParser for Parser {
        type Value = InitLoraWeights;

        fn parse_ref(
            &self,
            command: &clap::Command,
            arg: Option<&clap::Arg>,
            value: &std::ffi::OsStr,
        ) -> Result<InitLoraWeights, clap::Error> {
            let text = StringValueParser::new().parse_ref(command, arg, value)?;
            let parsed = text.parse();
            if parsed.is_err() && !text.starts_with(super::NITER) {
                // Its message lists the words.
                PossibleValuesParser::new(values()).parse_ref(command, arg, value)?;
            }
            parsed.map_err(|message: String| {
                clap::Error::raw(ErrorKind::ValueValidation, message + "\n").with_cmd(command)
            })
        }

        fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
            Some(Box::new(values().into_iter()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_is_a_word_or_a_boolean() {
        let read = |text: &str| {
            serde_json::from_str::<InitLoraWeights>(text).map_err(|error| error.to_string())
        };
        assert_eq!(read("true"), Ok(InitLoraWeights::KaimingUniform));
        assert_eq!(read("\"false\""), Ok(InitLoraWeights::Random));
        assert_eq!(read("\"gaussian\""), Ok(InitLoraWeights::Gaussian));
        assert_eq!(
            read("\"pissa_niter_16\""),
            Ok(InitLoraWeights::PissaNiter(16))
        );
        let refused = read("\"eva\"").unwrap_err();
        assert!(refused.contains("pissa_niter_N"), "{refused}");
        for text in [
            "\"pissa_niter_\"",
            "\"pissa_niter_-1\"",
            "\"pissa_niter_1001\"",
        ] {
            let refused = read(text).unwrap_err();
            assert!(refused.contains("from 0 to 1000"), "{refused}");
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        for text in [
            "gaussian",
            "true",
            "false",
            "pissa",
            "pissa_niter_0",
            "olora",
            "loftq",
        ] {
            let init: InitLoraWeights = text.parse().unwrap();
            assert_eq!(init.to_string(), text);
            assert_eq!(serde_json::to_value(init).unwrap(), text);
        }
    }
}

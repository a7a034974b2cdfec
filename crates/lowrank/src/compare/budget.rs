//! A budget of trained values, and the size of a method that comes closest to it.

use std::fmt;
use std::str::FromStr;

use crate::Error;
use crate::model::ModelConfig;
use crate::settings::TrainConfig;

/// How many values may be trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// So many.
    Values(u64),
    /// A share of the base's parameters, from 0 to 1.
    Share(f64),
}

impl Budget {
    /// The number of values for a base of `parameters`.
    pub fn values(self, parameters: u64) -> u64 {
        match self {
            Self::Values(values) => values,
            Self::Share(share) => (share * parameters as f64).round() as u64,
        }
    }
}

impl FromStr for Budget {
    type Err = String;

    /// `0.2%`, `460800`, `350k` or `1.5M`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "a budget is a share such as 0.2% or a number of values such as 350k or 1.5M, not `{text}`"
            )
        };
        let (number, unit) = text.trim().split_at(
            text.trim()
                .trim_end_matches(|c: char| c.is_alphabetic() || c == '%' || c == ' ')
                .len(),
        );
        let number: f64 = number.trim().parse().map_err(|_| wrong())?;
        if !(number.is_finite() && number > 0.0) {
            return Err(wrong());
        }
        let values = |scale: f64| Self::Values((number * scale).round().max(1.0) as u64);
        match unit.trim() {
            "%" if number <= 100.0 => Ok(Self::Share(number / 100.0)),
            "" => Ok(values(1.0)),
            "k" | "K" => Ok(values(1e3)),
            "m" | "M" => Ok(values(1e6)),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Values(values) => write!(f, "{values} values"),
            Self::Share(share) => write!(f, "{} % of the base", 100.0 * share),
        }
    }
}

/// The size, at least 1, with which `config` trains as near to `values` values as it can on `model`. The other
/// settings of `config` stay as they are.
///
/// # Errors
/// Settings that do not fit the model; a method without a size; a size that the model has no room for.
pub fn solve(config: &TrainConfig, model: &ModelConfig, values: u64) -> Result<usize, Error> {
    let Some(size) = config.method.size() else {
        return Err(Error::Settings(format!(
            "a budget decides nothing for {}, which trains what it trains; leave it out for this method",
            config.method.title()
        )));
    };
    let count = |value: usize| -> Result<u64, Error> {
        let mut tried = config.clone();
        size.set(&mut tried.options, value);
        Ok(tried.lay_out(model)?.parameters() as u64)
    };
    // The number of values is a linear function of the size, but for rank patterns, which only add a constant.
    let (one, two) = (count(1)?, count(2)?);
    let each = two.saturating_sub(one);
    if each == 0 {
        return Err(Error::Settings(format!(
            "{} changes nothing here: patterns or an adapter to start from decide the size",
            size.key
        )));
    }
    let steps = values.saturating_sub(one) as f64 / each as f64;
    let value = 1 + steps.round() as usize;
    let limit = size.most(model);
    if value > limit {
        return Err(Error::Settings(format!(
            "a budget of {values} values asks for {} {value} with {}, and {limit} is the most for this model; lower the budget",
            size.key,
            config.method.title()
        )));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::presets;
    use crate::tuning::targets::Targets;
    use crate::tuning::{Method, MethodOptions, adapter, prefix};

    #[test]
    fn budgets_are_shares_or_numbers() {
        let parse = |text: &str| text.parse::<Budget>();
        assert_eq!(parse("0.2%"), Ok(Budget::Share(0.002)));
        assert_eq!(parse("0.2 %"), Ok(Budget::Share(0.002)));
        assert_eq!(parse("460800"), Ok(Budget::Values(460_800)));
        assert_eq!(parse("350k"), Ok(Budget::Values(350_000)));
        assert_eq!(parse(" 1.5M "), Ok(Budget::Values(1_500_000)));
        for wrong in ["", "%", "-1%", "101%", "1G", "k", "nan", "inf", "0"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!(Budget::Share(0.002).values(134_515_008), 269_030);
    }

    #[test]
    fn the_nearest_size_is_found() {
        let model = presets::config("gpt2-medium").unwrap();
        let with = |method, change: fn(&mut MethodOptions)| {
            TrainConfig::new(method, "m", "", "").with_options(change)
        };
        let lora = with(Method::Lora, |options| {
            let names = Targets::Names(vec!["c_attn.q".into(), "c_attn.v".into()]);
            options.targets.target_modules = Some(names);
        });
        // 98,304 values a rank.
        assert_eq!(solve(&lora, &model, 393_216).unwrap(), 4);
        assert_eq!(solve(&lora, &model, 350_000).unwrap(), 4);
        assert_eq!(solve(&lora, &model, 340_000).unwrap(), 3);
        assert_eq!(solve(&lora, &model, 1).unwrap(), 1);
        let error = solve(&lora, &model, 1 << 40).unwrap_err().to_string();
        assert!(error.contains("lower the budget"), "{error}");

        // The nearest of all sizes, tried one by one.
        let others = [
            with(Method::Adapter, |options| {
                options.adapter.adapter_kind = adapter::Kind::Lin;
            }),
            with(Method::Adapter, |_| {}),
            with(Method::Prefix, |options| {
                options.prefix.prefix_kind = prefix::Kind::Embedding;
                options.prefix.infix_tokens = 3;
            }),
            with(Method::Prefix, |_| {}),
        ];
        for config in others {
            let size = config.method.size().unwrap();
            let count = |value: usize| {
                let mut tried = config.clone();
                size.set(&mut tried.options, value);
                tried.lay_out(&model).unwrap().parameters() as u64
            };
            for values in [1, 20_000, 350_000, 360_001] {
                let found = solve(&config, &model, values).unwrap();
                let nearest = (1..=512)
                    .min_by_key(|&n| count(n).abs_diff(values))
                    .unwrap();
                if nearest < 512 {
                    assert_eq!(
                        count(found).abs_diff(values),
                        count(nearest).abs_diff(values)
                    );
                }
            }
        }
    }

    #[test]
    fn methods_without_a_size_say_so() {
        let model = presets::config("gpt2").unwrap();
        for method in [Method::Full, Method::Top, Method::Bitfit] {
            let config = TrainConfig::new(method, "m", "", "");
            let error = solve(&config, &model, 1000).unwrap_err().to_string();
            assert!(error.contains("a budget decides nothing for"), "{error}");
        }
    }
}

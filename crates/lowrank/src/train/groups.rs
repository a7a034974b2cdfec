//! Learning rates and weight decays of some of the trained tensors: `lr_pattern`, `weight_decay_pattern`, and LoRA+.
//!
//! LoRA+ (Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024) gives B a learning rate that is
//! `loraplus_lr_ratio` times A's. As in PEFT's `create_loraplus_optimizer`, everything with one dimension has B's, which are magnitudes,
//! biases and the weights of norms. Where a pattern matches a tensor, that alone decides.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use lowrank_formats::peft::NamePattern;
use lowrank_kernels::{AdamW, Arena};

use super::step::StepOptions;
use crate::Error;
use crate::model::Adapter;
use crate::names::named;
use crate::settings::TrainConfig;
use crate::tuning::Method;
use crate::units::grouped;

/// How a tensor's steps differ from the run's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Times the learning rate.
    pub factor: f64,
    /// The weight decay; `None`: the run's.
    pub weight_decay: Option<f64>,
}

impl Rate {
    /// As the run says.
    const PLAIN: Self = Self {
        factor: 1.0,
        weight_decay: None,
    };

    /// The settings of a step as they are for tensors of this rate.
    pub(super) fn of(&self, step: &AdamW, options: &StepOptions<'_>) -> AdamW {
        AdamW {
            lr: (options.learning_rate * self.factor) as f32,
            weight_decay: self.weight_decay.unwrap_or(options.weight_decay) as f32,
            ..*step
        }
    }
}

/// The rates of an adapter's slots.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Groups {
    /// Of each slot; empty: all of them have the run's.
    of_slot: Arc<[Rate]>,
}

impl Groups {
    /// What the settings say of an adapter's tensors.
    ///
    /// # Errors
    /// A pattern that matches no trained tensor, or that is no regular expression; all are named.
    pub fn of(config: &TrainConfig, adapter: &Adapter) -> Result<Self, Error> {
        let mut problems = Vec::new();
        let rates = matched("lr_pattern", &config.lr_pattern, adapter, &mut problems);
        let key = "weight_decay_pattern";
        let decays = matched(key, &config.weight_decay_pattern, adapter, &mut problems);
        if !problems.is_empty() {
            return Err(Error::Settings(problems.join("\n")));
        }
        let ratio = config.options.lora.loraplus_lr_ratio;
        let ratio = ratio.filter(|_| config.method == Method::Lora);
        let fast = ratio.map(|ratio| (ratio, of_b(adapter)));
        let rate = |slot: usize| {
            let of_b = fast.as_ref().filter(|(_, slots)| slots.contains(&slot));
            Rate {
                factor: rates[slot].unwrap_or_else(|| of_b.map_or(1.0, |(ratio, _)| *ratio)),
                weight_decay: decays[slot],
            }
        };
        let all: Vec<Rate> = (0..adapter.names.len()).map(rate).collect();
        if all.iter().all(|rate| *rate == Rate::PLAIN) {
            return Ok(Self::default());
        }
        Ok(Self {
            of_slot: all.into(),
        })
    }

    /// Parts of a range of an arena's values, each with the rate of its slots; neighbours of one rate are one part.
    pub(super) fn parts(&self, arena: &Arena, range: &Range<usize>) -> Vec<(Range<usize>, Rate)> {
        if self.of_slot.is_empty() {
            return vec![(range.clone(), Rate::PLAIN)];
        }
        let mut parts: Vec<(Range<usize>, Rate)> = Vec::new();
        for (slot, &rate) in self.of_slot.iter().enumerate() {
            let own = arena.range(slot);
            let (start, end) = (own.start.max(range.start), own.end.min(range.end));
            if start >= end {
                continue;
            }
            match parts.last_mut() {
                Some((last, same)) if *same == rate => last.end = end,
                _ => parts.push((start..end, rate)),
            }
        }
        parts
    }

    /// What each group has, in words; nothing where there is one group alone.
    pub(super) fn words(&self, config: &TrainConfig, adapter: &Adapter) -> Vec<String> {
        let mut groups: Vec<(Rate, usize, usize, &str)> = Vec::new();
        for (slot, &rate) in self.of_slot.iter().enumerate() {
            let (rows, columns) = adapter.params.shape(slot);
            match groups.iter_mut().find(|(known, ..)| *known == rate) {
                Some((_, tensors, values, _)) => {
                    *tensors += 1;
                    *values += rows * columns;
                }
                None => groups.push((rate, 1, rows * columns, &adapter.names[slot])),
            }
        }
        let words = groups.into_iter().map(|(rate, tensors, values, first)| {
            format!(
                "learning rate {:e} and weight decay {}: {tensors} tensors with {} values, {first} the first of them",
                config.learning_rate * rate.factor,
                rate.weight_decay.unwrap_or(config.weight_decay),
                grouped(values as u64)
            )
        });
        words.collect()
    }
}

/// The slots that have B's learning rate.
fn of_b(adapter: &Adapter) -> HashSet<usize> {
    let branches = adapter.low_rank.values().flatten();
    let mut slots: HashSet<usize> = branches.map(|branch| branch.b).collect();
    slots.extend(adapter.vectors());
    slots
}

/// For each slot the number of the first pattern that matches its name.
fn matched(
    key: &str,
    patterns: &[(String, f64)],
    adapter: &Adapter,
    problems: &mut Vec<String>,
) -> Vec<Option<f64>> {
    let mut found = vec![None; adapter.names.len()];
    for (text, number) in patterns {
        let pattern = match NamePattern::new(text) {
            Ok(pattern) => pattern,
            Err(problem) => {
                problems.push(format!("{}: `{text}` is {problem}", named(key)));
                continue;
            }
        };
        let mut any = false;
        for (name, found) in adapter.names.iter().zip(&mut found) {
            if pattern.matches(name) {
                any = true;
                *found = found.or(Some(*number));
            }
        }
        if !any {
            let first = adapter.names.first().map_or("none", String::as_str);
            let last = adapter.names.last().map_or("none", String::as_str);
            problems.push(format!(
                "{}: `{text}` matches no trained tensor; these are {first} to {last}",
                named(key)
            ));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::presets;

    fn config(lr: &[(&str, f64)], decay: &[(&str, f64)]) -> TrainConfig {
        let owned = |pairs: &[(&str, f64)]| {
            let pairs = pairs.iter();
            pairs.map(|(key, x)| ((*key).to_owned(), *x)).collect()
        };
        TrainConfig {
            lr_pattern: owned(lr),
            weight_decay_pattern: owned(decay),
            ..TrainConfig::new(Method::Lora, "", "", "")
        }
    }

    #[test]
    fn patterns_and_the_ratio_make_groups_of_slots() {
        let model = presets::config("smollm2-135m").unwrap();
        let mut config = config(
            &[("q_proj.lora_B", 3.0)],
            &[("layers.0", 0.5), ("v_proj", 0.25)],
        );
        let adapter = config.lay_out(&model).unwrap();
        let rate = |config: &TrainConfig, end: &str| {
            let slot = adapter.names.iter().position(|name| name.ends_with(end));
            Groups::of(config, &adapter).unwrap().of_slot[slot.unwrap()]
        };
        let [of_b, of_a] = [
            "layers.1.self_attn.q_proj.lora_B.weight",
            "layers.1.self_attn.q_proj.lora_A.weight",
        ];
        assert_eq!(
            (rate(&config, of_b).factor, rate(&config, of_a).factor),
            (3.0, 1.0)
        );
        assert_eq!(rate(&config, of_a).weight_decay, None);
        // The first that matches wins, and layer 10 is not layer 1.
        assert_eq!(
            rate(&config, "layers.0.self_attn.v_proj.lora_A.weight").weight_decay,
            Some(0.5)
        );
        assert_eq!(
            rate(&config, "layers.10.self_attn.v_proj.lora_A.weight").weight_decay,
            Some(0.25)
        );
        config.options.lora.loraplus_lr_ratio = Some(16.0);
        assert_eq!(rate(&config, of_b).factor, 3.0);
        assert_eq!(
            rate(&config, "layers.1.self_attn.v_proj.lora_B.weight").factor,
            16.0
        );
        let groups = Groups::of(&config, &adapter).unwrap();
        let length = adapter.params.len();
        let parts = groups.parts(&adapter.params, &(5..length - 7));
        assert_eq!(
            (parts[0].0.start, parts[parts.len() - 1].0.end),
            (5, length - 7)
        );
        assert!(
            parts
                .windows(2)
                .all(|two| two[0].0.end == two[1].0.start && two[0].1 != two[1].1)
        );
        assert!(groups.words(&config, &adapter).len() > 3);
        let plain = Groups::of(&TrainConfig::new(Method::Lora, "", "", ""), &adapter).unwrap();
        assert_eq!(plain, Groups::default());
        assert_eq!(plain.parts(&adapter.params, &(3..9)), [(3..9, Rate::PLAIN)]);
    }

    #[test]
    fn a_pattern_without_a_tensor_is_an_error() {
        let model = presets::config("smollm2-135m").unwrap();
        let config = config(&[("qproj", 2.0)], &[("(", 0.0), ("k_proj", 0.0)]);
        let adapter = config.lay_out(&model).unwrap();
        let message = Groups::of(&config, &adapter).unwrap_err().to_string();
        for words in [
            "lr_pattern: `qproj` matches no trained tensor",
            "weight_decay_pattern: `(` is not a valid regular expression",
            "weight_decay_pattern: `k_proj` matches no",
        ] {
            assert!(message.contains(words), "{words} is not in {message}");
        }
    }
}

//! What Hu et al. (2021) say of GPT-3, GPT-2 medium and RoBERTa, and which of it follows from shapes.
//!
//! The formulas of section 5.1: LoRA L·r·(d_in + d_out) for each kind of matrix; adapter layers
//! L_a·(2·d·r + r + d) + 2·L_ln·d; prefix in every layer L·d·(l_p + l_i). Heads of classifiers are not counted.

use serde::Serialize;

use super::presets;
use crate::model::{ModelConfig, Purpose};
use crate::settings::TrainConfig;
use crate::tuning::targets::Targets;
use crate::tuning::{Method, adapter, bitfit, prefix, top};

/// Where a figure of the paper comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// It follows from the model's shapes.
    Arithmetic,
    /// The paper's own formula gives another figure.
    DoesNotAddUp,
    /// It was measured, and depends on the paper's software and machines.
    Software,
}

/// A figure of the paper.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Claim {
    /// What it is about.
    pub what: String,
    /// What the paper says.
    pub paper: String,
    /// What its formula gives for the model's shapes; where the figure was measured, what can be said of it.
    pub here: String,
    /// Whether the one follows from the other.
    pub origin: Origin,
}

/// The paper's figures for a preset; most have none.
pub fn claims(preset: &str) -> Vec<Claim> {
    let Ok(model) = presets::config(preset) else {
        return Vec::new();
    };
    match preset {
        "gpt3-175b" => gpt3(&model),
        "gpt2-medium" => gpt2_medium(&model),
        "roberta-base" => roberta(preset, "125.0 M", "0.3 M"),
        "roberta-large" => roberta(preset, "355.0 M", "0.8 M"),
        _ => Vec::new(),
    }
}

fn claim(what: &str, paper: &str, here: String, origin: Origin) -> Claim {
    Claim {
        what: what.to_owned(),
        paper: paper.to_owned(),
        here,
        origin,
    }
}

fn gpt3(model: &ModelConfig) -> Vec<Claim> {
    use Origin::{Arithmetic, DoesNotAddUp, Software};
    let all = model.parameters() as f64;
    let lora = lora(model, &["q_proj", "v_proj"], 4) as f64;
    vec![
        claim(
            "LoRA, r 4 on q and v",
            "18.9 M parameters",
            millions(lora),
            Arithmetic,
        ),
        claim(
            "fewer trained parameters",
            "10,000 times",
            format!("{:.0} times", all / lora),
            DoesNotAddUp,
        ),
        claim(
            "checkpoint of everything, 16 bit",
            "350 GB",
            format!("{:.0} GB", 2.0 * all / 1e9),
            Arithmetic,
        ),
        claim(
            "checkpoint of that LoRA, 16 bit",
            "35 MB",
            format!("{:.1} MB", 2.0 * lora / 1e6),
            DoesNotAddUp,
        ),
        claim(
            "training, everything and LoRA",
            "1.2 TB and 350 GB",
            format!("{:.0} GB for the weights at 16 bit", 2.0 * all / 1e9),
            Software,
        ),
        claim(
            "speed of training",
            "25 % faster",
            "at most 50 %: 4 operations, not 6".to_owned(),
            Software,
        ),
    ]
}

fn gpt2_medium(model: &ModelConfig) -> Vec<Claim> {
    use Origin::{Arithmetic, DoesNotAddUp};
    let layers = |kind, bottleneck| {
        let options = adapter::Options { kind, bottleneck };
        adapter::parameters(model, &options) as f64
    };
    let virtual_tokens = |prefix| {
        let options = prefix::Options {
            kind: prefix::Kind::Layer,
            prefix,
            infix: 0,
        };
        prefix::paper_parameters(model, &options) as f64
    };
    let lin = adapter::Kind::Lin;
    vec![
        claim(
            "everything",
            "354.92 M",
            millions(model.parameters() as f64),
            DoesNotAddUp,
        ),
        claim(
            "Adapter-L, small",
            "0.37 M",
            format!("{} (r 6)", millions(layers(lin, 6))),
            Arithmetic,
        ),
        claim(
            "Adapter-L, large",
            "11.09 M",
            format!("{} (r 224)", millions(layers(lin, 224))),
            Arithmetic,
        ),
        claim(
            "Adapter-H",
            "11.09 M",
            format!("{} (r 112)", millions(layers(adapter::Kind::Houlsby, 112))),
            DoesNotAddUp,
        ),
        claim(
            "the last two blocks",
            "25.19 M",
            millions(top::parameters(model, &top::Options::Layers(2)) as f64),
            Arithmetic,
        ),
        claim(
            "prefix in every layer",
            "0.35 M",
            format!(
                "{} or {} (14 or 15 virtual tokens)",
                millions(virtual_tokens(14)),
                millions(virtual_tokens(15))
            ),
            DoesNotAddUp,
        ),
        claim(
            "LoRA, r 4 on q and v",
            "0.35 M",
            millions(lora(model, &["c_attn.q", "c_attn.v"], 4) as f64),
            DoesNotAddUp,
        ),
    ]
}

/// Table 2: LoRA with rank 8 on q and v; of the base model also biases and the adapter layers that are compared with it.
fn roberta(preset: &str, everything: &str, of_lora: &str) -> Vec<Claim> {
    use Origin::{Arithmetic, DoesNotAddUp};
    let tenths = |count: usize| format!("{:.1} M", count as f64 / 1e6);
    let classifier = Purpose::SequenceClassifier { labels: 2 };
    // Without the classifier, which the formulas leave out, and with it.
    let (Ok(model), Ok(whole)) = (
        presets::config(preset),
        presets::config_for(preset, classifier),
    ) else {
        return Vec::new();
    };
    let model = &model;
    let mut claims = vec![
        claim(
            "everything",
            everything,
            tenths(whole.parameters()),
            DoesNotAddUp,
        ),
        claim(
            "LoRA, r 8 on q and v",
            of_lora,
            tenths(lora(model, &["query", "value"], 8)),
            Arithmetic,
        ),
    ];
    if preset == "roberta-base" {
        let layers = |bottleneck| {
            let kind = adapter::Kind::Pfeiffer;
            adapter::parameters(model, &adapter::Options { kind, bottleneck })
        };
        claims.extend([
            claim(
                "BitFit",
                "0.1 M",
                tenths(bitfit::parameters(model)),
                Arithmetic,
            ),
            claim(
                "Adapter-D, small",
                "0.3 M",
                format!("{} (r 16)", tenths(layers(16))),
                Arithmetic,
            ),
            claim(
                "Adapter-D, large",
                "0.9 M",
                format!("{} (r 48)", tenths(layers(48))),
                Arithmetic,
            ),
        ]);
    }
    claims
}

/// LoRA's values with rank r on these modules; 0 where the model has no such module.
fn lora(model: &ModelConfig, targets: &[&str], r: usize) -> usize {
    let names = targets.iter().map(ToString::to_string).collect();
    let mut train = TrainConfig::new(Method::Lora, "", "", "");
    train.options.lora.r = r;
    train.options.targets.target_modules = Some(Targets::Names(names));
    train
        .lay_out(model)
        .map_or(0, |adapter| adapter.parameters())
}

fn millions(count: f64) -> String {
    format!("{:.2} M", count / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpt3s_budget_is_the_same_for_every_choice_of_matrices() {
        let model = presets::config("gpt3-175b").unwrap();
        for (targets, r) in [
            (&["q_proj"][..], 8),
            (&["k_proj"], 8),
            (&["v_proj"], 8),
            (&["o_proj"], 8),
            (&["q_proj", "k_proj"], 4),
            (&["q_proj", "v_proj"], 4),
            (&["q_proj", "k_proj", "v_proj", "o_proj"], 2),
        ] {
            assert_eq!(lora(&model, targets, r), 18_874_368, "{targets:?}");
        }
    }

    #[test]
    fn gpt2_mediums_table_is_what_the_formulas_give() {
        use Origin::{Arithmetic, DoesNotAddUp};
        let all = claims("gpt2-medium");
        let here: Vec<_> = all
            .iter()
            .map(|claim| (claim.here.as_str(), claim.origin))
            .collect();
        assert_eq!(
            here,
            [
                ("354.82 M", DoesNotAddUp),
                ("0.37 M (r 6)", Arithmetic),
                ("11.09 M (r 224)", Arithmetic),
                ("11.06 M (r 112)", DoesNotAddUp),
                ("25.19 M", Arithmetic),
                ("0.34 M or 0.37 M (14 or 15 virtual tokens)", DoesNotAddUp),
                ("0.39 M", DoesNotAddUp),
            ]
        );
    }

    #[test]
    fn what_is_called_arithmetic_rounds_to_the_papers_figure() {
        for preset in presets::NAMES {
            for claim in claims(preset) {
                if claim.origin == Origin::Arithmetic && claim.paper.ends_with(" M") {
                    assert!(claim.here.starts_with(&claim.paper), "{claim:?}");
                }
            }
        }
        let gpt3 = claims("gpt3-175b");
        assert_eq!(
            (gpt3[0].here.as_str(), gpt3[3].here.as_str()),
            ("18.87 M", "37.7 MB")
        );
        assert_eq!(gpt3[2].here, "349 GB");
    }
}

//! IA3 (Liu et al., 2022): a factor for each column of a linear's output, or of its input, in PEFT's files and words.
//!
//! ```text
//! y = (x Wᵀ + b) ⊙ l             target_modules
//! y = (x ⊙ l) Wᵀ + b             those of them that are feedforward_modules
//! ```
//!
//! The factors begin at one, so that training starts from the base itself. They fold into the weight's rows and the bias, or
//! into the weight's columns.

use std::collections::HashMap;
use std::path::Path;

use lowrank_formats::hf_config::HfConfig;
use lowrank_formats::peft::{LoraConfig, TargetModules};
use lowrank_kernels::{Layout, fill_normal};
use serde_json::{Map, Value, json};

use super::files::{check_keys, finish, write_config, write_values};
use super::lora::Candidate;
use super::lora::inject::{choose, coverage};
use super::lora::load::matched;
use super::saved;
use super::targets::{self, Targets};
use super::{
    AdapterConfig, BaseMark, Loaded, MethodConfig, MethodOptions, MethodSpec, Started, Starting,
};
use crate::Error;
use crate::fields::{Field, Fields, fields};
use crate::model::{Adapter, Family, ModelConfig, ScaleSite, families};
use crate::random::mix;

/// `peft_type` in adapter_config.json.
const PEFT_TYPE: &str = "IA3";

/// Keys of PEFT's config beside those of every method.
const KEYS: &[&str] = &[
    "exclude_modules",
    "fan_in_fan_out",
    "feedforward_modules",
    "init_ia3_weights",
    "target_modules",
];

fields! {
    /// IA3's options.
    pub struct Settings {
        /// Modules of target_modules whose input is scaled in place of the output (method ia3) [default: the MLP's last
        /// linear]
        #[arg(value_name = "MODULES", help_heading = "Other methods")]
        #[fixes(Shape)]
        pub feedforward_modules: Option<Targets>,

        /// Begin with factors of one, which change nothing, and not at random (method ia3)
        #[switch(help_heading = "Other methods")]
        #[absent(true)]
        pub init_ia3_weights: bool = true,
    }
}

/// What its files say.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `target_modules` and `exclude_modules`. PEFT chooses IA3's modules as it chooses LoRA's.
    modules: Box<LoraConfig>,
    /// `feedforward_modules`: ends of names, or a regular expression for the whole name.
    feedforward: Targets,
    /// `init_ia3_weights`
    from_one: bool,
}

impl Config {
    /// # Errors
    /// Modules that cannot be read, in words.
    fn new(
        targets: Value,
        excluded: Value,
        feedforward: Targets,
        from_one: bool,
    ) -> Result<Self, Vec<String>> {
        Ok(Self {
            modules: Box::new(rules(targets, excluded)?),
            feedforward,
            from_one,
        })
    }

    /// Whether a module's factors are its input's.
    ///
    /// As in PEFT, a name is any end of the module's, also within a word, where `target_modules` asks for a whole one.
    fn is_feedforward(&self, module: &str) -> bool {
        match &self.feedforward {
            Targets::Names(names) => names.iter().any(|name| module.ends_with(name.as_str())),
            Targets::Pattern(pattern) => matches_whole(pattern, module),
        }
    }
}

/// PEFT's rules for these modules.
fn rules(targets: Value, excluded: Value) -> Result<LoraConfig, Vec<String>> {
    let map = Map::from_iter([
        ("peft_type".to_owned(), "LORA".into()),
        // No linear is too small for it.
        ("r".to_owned(), 1.into()),
        ("target_modules".to_owned(), targets),
        ("exclude_modules".to_owned(), excluded),
    ]);
    LoraConfig::from_json(&map)
}

fn matches_whole(pattern: &str, module: &str) -> bool {
    let only = LoraConfig {
        target_modules: TargetModules::Regex(pattern.to_owned()),
        ..LoraConfig::default()
    };
    only.matches(module)
}

/// The modules that PEFT scales by default.
fn default_targets(family: Family) -> &'static [&'static str] {
    match family {
        Family::Llama
        | Family::Mistral
        // PEFT has none for these.
        | Family::SmolLm3
        | Family::Granite
        | Family::Olmo2
        | Family::Olmo3
        | Family::Ministral3
        | Family::Glm4 => &["k_proj", "v_proj", "down_proj"],
        Family::Qwen2 | Family::Qwen3 | Family::Gemma2 | Family::Gemma3 => {
            &["q_proj", "v_proj", "down_proj"]
        }
        Family::Gpt2 => &["c_attn", "mlp.c_proj"],
        Family::Bert | Family::Roberta | Family::XlmRoberta => &["key", "value", "output.dense"],
        // PEFT has none for these.
        Family::DistilBert => &["k_lin", "v_lin", "lin2"],
        Family::ModernBert => &["Wqkv", "mlp.Wo"],
        Family::DebertaV2 => &["key_proj", "value_proj", "output.dense"],
        Family::Phi3 => &["qkv_proj", "down_proj"],
    }
}

/// The module whose input PEFT scales by default.
fn default_feedforward(family: Family) -> &'static str {
    match family {
        Family::Gpt2 => "mlp.c_proj",
        Family::Llama
        | Family::Mistral
        | Family::Qwen2
        | Family::Qwen3
        | Family::Gemma2
        | Family::Gemma3
        | Family::SmolLm3
        | Family::Granite
        | Family::Olmo2
        | Family::Olmo3
        | Family::Phi3
        | Family::Ministral3
        | Family::Glm4 => "down_proj",
        Family::Bert | Family::Roberta | Family::XlmRoberta | Family::DebertaV2 => "output.dense",
        Family::DistilBert => "lin2",
        Family::ModernBert => "mlp.Wo",
    }
}

/// What the options come to for a model, with the modules that are adapted.
///
/// # Errors
/// Modules that match nothing, or that PEFT could not read again.
fn resolve(
    options: &MethodOptions,
    model: &ModelConfig,
) -> Result<(Config, Vec<Candidate>), Error> {
    let targets = match &options.targets.target_modules {
        Some(targets) => json!(targets),
        None => json!(default_targets(model.family)),
    };
    let excluded = json!(options.targets.exclude_modules);
    let settings = &options.ia3;
    let refuse = |problems: Vec<String>| Error::Settings(problems.join("\n"));
    let none = Targets::Names(Vec::new());
    let mut config =
        Config::new(targets, excluded, none, settings.init_ia3_weights).map_err(refuse)?;
    let chosen = choose(model, &config.modules)?;
    if let Some(part) = chosen.iter().find(|place| place.part.is_some()) {
        return Err(Error::Settings(format!(
            "target_modules: IA3 scales {} whole, and not in the part {}",
            part.module, part.name
        )));
    }
    config.feedforward = match &settings.feedforward_modules {
        None => default_names(&config, model, &chosen),
        Some(given) => {
            check_feedforward(given, &config, &chosen).map_err(|text| refuse(vec![text]))?;
            given.clone()
        }
    };
    Ok((config, chosen))
}

/// `feedforward_modules` by default: of a list of targets, those that are the MLP's last linear, since PEFT asks for a part
/// of the list.
fn default_names(config: &Config, model: &ModelConfig, chosen: &[Candidate]) -> Targets {
    let name = default_feedforward(model.family);
    let is_last = |place: &&Candidate| place.name.ends_with(name);
    let TargetModules::List(targets) = &config.modules.target_modules else {
        return Targets::Names(vec![name.to_owned()]);
    };
    let means = |entry: &str, place: &Candidate| {
        let rest = place.name.strip_suffix(entry);
        rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let entries: Vec<String> = targets
        .iter()
        .filter(|entry| {
            let mut meant = chosen.iter().filter(|place| means(entry, place));
            meant.all(|place| is_last(&place))
        })
        .cloned()
        .collect();
    let is_covered = |place: &Candidate| entries.iter().any(|entry| means(entry, place));
    if chosen.iter().filter(is_last).all(is_covered) {
        return Targets::Names(entries);
    }
    // An entry such as c_proj means other modules, too.
    Targets::Pattern(format!(r".*\.{}", name.replace('.', r"\.")))
}

/// # Errors
/// Names that are not among the targets, where both are lists, or that match none of them.
fn check_feedforward(given: &Targets, config: &Config, chosen: &[Candidate]) -> Result<(), String> {
    let unmatched =
        |entry: &str| format!("feedforward_modules: `{entry}` matches no adapted module");
    match given {
        Targets::Names(names) => {
            for name in names {
                if let TargetModules::List(targets) = &config.modules.target_modules
                    && !targets.contains(name)
                {
                    return Err(format!(
                        "feedforward_modules: `{name}` is not in target_modules ({}); add it there, or leave it out",
                        targets.join(", ")
                    ));
                }
                if !chosen
                    .iter()
                    .any(|place| place.name.ends_with(name.as_str()))
                {
                    return Err(unmatched(name));
                }
            }
        }
        Targets::Pattern(pattern) => {
            rules(json!(pattern), Value::Null).map_err(|problems| {
                let text = problems.join("\n");
                text.replace("target_modules", "feedforward_modules")
            })?;
            if !chosen
                .iter()
                .any(|place| matches_whole(pattern, &place.name))
            {
                return Err(unmatched(pattern));
            }
        }
    }
    Ok(())
}

/// The factors of these modules, all zero: those of module i are slot i.
fn lay_out(model: &ModelConfig, config: &Config, chosen: &[Candidate]) -> Adapter {
    let mut slots = Vec::new();
    let mut scaled = HashMap::new();
    for (slot, place) in chosen.iter().enumerate() {
        let (input, output) = model.linear_shape(place.id.kind);
        let is_feedforward = config.is_feedforward(&place.name);
        let width = if is_feedforward { input } else { output };
        slots.push((
            format!("base_model.model.{}.ia3_l", place.module),
            (1, width),
        ));
        let site = ScaleSite {
            input: is_feedforward.then_some(slot),
            output: (!is_feedforward).then_some(slot),
        };
        scaled.insert(place.id, site);
    }
    Adapter {
        scaled,
        ..Adapter::new(slots)
    }
}

/// What PEFT's files say of a model's adapter.
///
/// # Errors
/// A field that asks for something that is not done here.
fn read(raw: &HfConfig, model: &ModelConfig) -> Result<Config, Error> {
    check_keys(raw, KEYS)?;
    // How the base lies in memory is known; the field says nothing more.
    raw.opt_bool("fan_in_fan_out")?;
    let field = |key: &str| raw.get(key).cloned().unwrap_or(Value::Null);
    let targets = match field("target_modules") {
        Value::Null => json!(default_targets(model.family)),
        given => given,
    };
    let feedforward = match field("feedforward_modules") {
        Value::Null => Targets::Names(vec![default_feedforward(model.family).to_owned()]),
        // A text is a regular expression, also where it looks like a name.
        Value::String(pattern) => Targets::Pattern(pattern),
        list => Targets::Names(
            serde_json::from_value(list)
                .map_err(|_| raw.unsupported("feedforward_modules", "names, or one pattern"))?,
        ),
    };
    let from_one = raw.opt_bool("init_ia3_weights")?.unwrap_or(true);
    let config = Config::new(targets, field("exclude_modules"), feedforward, from_one);
    config.map_err(|problems| {
        raw.unsupported("target_modules", problems.join("; "))
            .into()
    })
}

/// IA3 in the table of methods.
pub(super) struct Spec;

impl MethodSpec for Spec {
    fn title(&self) -> &'static str {
        "IA3"
    }

    fn help(&self) -> &'static str {
        "Factors of what linears read or write"
    }

    fn learning_rate(&self) -> f64 {
        3e-3
    }

    fn fields(&self) -> Vec<Field> {
        Settings::fields()
    }

    fn shared_fields(&self) -> Vec<Field> {
        let shared = targets::Settings::fields().into_iter();
        shared.chain(saved::Settings::fields()).collect()
    }

    fn saved_prefix(&self) -> &'static str {
        "base_model.model."
    }

    fn label(&self, _: &MethodOptions) -> String {
        "IA3".to_owned()
    }

    fn lay_out(&self, options: &MethodOptions, model: &ModelConfig) -> Result<Adapter, Error> {
        let (config, chosen) = resolve(options, model)?;
        Ok(lay_out(model, &config, &chosen))
    }

    fn start(&self, options: &MethodOptions, with: &Starting) -> Result<Started, Error> {
        let model = with.decoder.config();
        let (config, chosen) = resolve(options, model)?;
        let mut adapter = lay_out(model, &config, &chosen);
        for slot in 0..adapter.params.slots() {
            let mut factors = adapter.params.view_mut(slot);
            if config.from_one {
                factors.fill(1.0);
            } else {
                fill_normal(factors, 1.0, mix(with.seed, slot as u64));
            }
        }
        let coverage = coverage(&config.modules, &chosen, adapter.parameters());
        Ok(Started {
            adapter,
            coverage: Some(coverage.to_string()),
            config: Some(AdapterConfig::Ia3(config)),
        })
    }

    fn peft_types(&self) -> &'static [&'static str] {
        &[PEFT_TYPE]
    }

    fn load(&self, folder: &Path, raw: &HfConfig, model: &ModelConfig) -> Result<Loaded, Error> {
        let config = read(raw, model)?;
        let chosen = matched(model, &config.modules);
        if chosen.is_empty() {
            return Err(Error::Tensors {
                path: folder.to_path_buf(),
                problems: vec![format!(
                    "the adapter is for another model: target_modules: {} matches no module",
                    config.modules.target_modules
                )],
            });
        }
        let adapter = lay_out(model, &config, &chosen);
        let coverage = coverage(&config.modules, &chosen, adapter.parameters());
        let config = AdapterConfig::Ia3(config);
        finish(folder, model, adapter, config, coverage.to_string())
    }
}

impl MethodConfig for Config {
    fn save(
        &self,
        folder: &Path,
        model: &ModelConfig,
        adapter: &Adapter,
        base: BaseMark,
    ) -> Result<(), Error> {
        write_values(folder, adapter, base)?;
        let mut modules = self.modules.to_json();
        let mut taken = |key: &'static str| (key, modules.remove(key).unwrap_or(Value::Null));
        let options = vec![
            taken("target_modules"),
            taken("exclude_modules"),
            taken("peft_version"),
            ("feedforward_modules", json!(self.feedforward)),
            (
                "fan_in_fan_out",
                (families::layout(model.family) == Layout::InOut).into(),
            ),
            ("init_ia3_weights", self.from_one.into()),
        ];
        write_config(folder, PEFT_TYPE, base.name, (model, adapter), options)
    }

    fn options(&self) -> Vec<(&'static str, Value)> {
        let feedforward = match &self.feedforward {
            Targets::Names(names) => names.join(", "),
            Targets::Pattern(pattern) => format!("/{pattern}/"),
        };
        let targets = self.modules.target_modules.to_string();
        vec![
            ("target_modules", targets.into()),
            ("feedforward_modules", feedforward.into()),
        ]
    }

    fn is_pefts(&self, _model: &ModelConfig) -> bool {
        true
    }
}

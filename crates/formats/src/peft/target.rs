//! Which modules an adapter covers, with which rank and scale, and what its tensors are called.
//!
//! The rules are PEFT's: a string matches a module's whole name as a regular expression; a list entry matches the name
//! itself or its end after a dot; a pattern of ranks or alphas matches `(.*\.)?(KEY)$` and the first that does wins.

use std::fmt;

use regex::Regex;
use serde_json::{Value, json};

use super::LoraConfig;

/// The prefix that PEFT puts before a module's name.
const PREFIX: &str = "base_model.model.";

/// PEFT's `target_modules`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// Names, or ends of names after a dot.
    List(Vec<String>),
    /// A regular expression for the whole name.
    Regex(String),
    /// Every linear module but the output head. Only the model knows which these are: ask
    /// [`matches`](LoraConfig::matches) about those alone.
    AllLinear,
}

impl TargetModules {
    pub(super) fn to_json(&self) -> Value {
        match self {
            TargetModules::List(list) => json!(list),
            TargetModules::Regex(regex) => json!(regex),
            TargetModules::AllLinear => json!("all-linear"),
        }
    }
}

impl fmt::Display for TargetModules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TargetModules::List(list) => f.write_str(&list.join(", ")),
            TargetModules::Regex(regex) => write!(f, "/{regex}/"),
            TargetModules::AllLinear => f.write_str("all-linear"),
        }
    }
}

/// PEFT's `exclude_modules`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModuleNames {
    /// Names, or ends of names after a dot.
    List(Vec<String>),
    /// A regular expression for the whole name.
    Regex(String),
}

impl ModuleNames {
    pub(super) fn to_json(&self) -> Value {
        match self {
            ModuleNames::List(list) => json!(list),
            ModuleNames::Regex(regex) => json!(regex),
        }
    }

    fn matches(&self, module: &str) -> bool {
        match self {
            ModuleNames::List(list) => list.iter().any(|entry| ends_with_entry(module, entry)),
            ModuleNames::Regex(regex) => matches_whole(regex, module),
        }
    }
}

impl LoraConfig {
    /// Whether PEFT would adapt `module`, a dotted name such as `model.layers.0.self_attn.q_proj`.
    ///
    /// A regular expression that does not compile matches nothing; [`read`](LoraConfig::read) and
    /// [`write`](LoraConfig::write) refuse it.
    pub fn matches(&self, module: &str) -> bool {
        if self
            .exclude_modules
            .as_ref()
            .is_some_and(|excluded| excluded.matches(module))
        {
            return false;
        }
        match &self.target_modules {
            TargetModules::AllLinear => true,
            TargetModules::Regex(regex) => matches_whole(regex, module),
            // PEFT looks at the layer only where a name matched by its end.
            TargetModules::List(list) => {
                list.iter().any(|entry| entry == module)
                    || (list.iter().any(|entry| ends_with_entry(module, entry))
                        && self.layer_is_covered(module))
            }
        }
    }

    /// The rank of `module`.
    pub fn rank_of(&self, module: &str) -> usize {
        first_match(&self.rank_pattern, module)
            .copied()
            .unwrap_or(self.r)
    }

    /// The alpha of `module`.
    pub fn alpha_of(&self, module: &str) -> f64 {
        first_match(&self.alpha_pattern, module)
            .copied()
            .unwrap_or(self.lora_alpha)
    }

    /// What B·A is multiplied with in `module`: alpha/r, or alpha/sqrt(r) with rank-stabilised LoRA.
    pub fn scale_of(&self, module: &str) -> f64 {
        let rank = self.rank_of(module) as f64;
        let denominator = if self.use_rslora { rank.sqrt() } else { rank };
        self.alpha_of(module) / denominator
    }

    fn layer_is_covered(&self, module: &str) -> bool {
        let Some(layers) = self
            .layers_to_transform
            .as_deref()
            .filter(|layers| !layers.is_empty())
        else {
            return true;
        };
        let layer = if self.layers_pattern.is_empty() {
            layer_index(r"^.*?\.[^.]*\.(\d+)\.", module)
        } else {
            self.layers_pattern
                .iter()
                .find_map(|p| layer_index(&format!(r"^(?:.*?\.)?{p}\.(?P<layer>\d+)\."), module))
        };
        layer.is_some_and(|layer| layers.contains(&layer))
    }
}

/// The last group's number: a pattern may bring groups of its own before it.
fn layer_index(pattern: &str, module: &str) -> Option<usize> {
    let captures = Regex::new(pattern).ok()?.captures(module)?;
    captures.get(captures.len() - 1)?.as_str().parse().ok()
}

fn ends_with_entry(module: &str, entry: &str) -> bool {
    module
        .strip_suffix(entry)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn matches_whole(regex: &str, module: &str) -> bool {
    compile(regex).is_ok_and(|regex| regex.is_match(module))
}

fn first_match<'a, T>(patterns: &'a [(String, T)], module: &str) -> Option<&'a T> {
    patterns
        .iter()
        .find(|(key, _)| compile_pattern(key).is_ok_and(|regex| regex.is_match(module)))
        // PEFT falls back to the name itself as a key.
        .or_else(|| patterns.iter().find(|(key, _)| key == module))
        .map(|(_, value)| value)
}

/// A regular expression for a whole name; the error says what to do about it.
pub(super) fn compile(regex: &str) -> Result<Regex, String> {
    build(&format!("^(?:{regex})$"), regex)
}

/// A key of `rank_pattern` or `alpha_pattern`.
pub(super) fn compile_pattern(key: &str) -> Result<Regex, String> {
    build(&format!(r"^(?:.*\.)?(?:{key})$"), key)
}

fn build(whole: &str, given: &str) -> Result<Regex, String> {
    // On its own first: `a)(b` is well-formed only inside our brackets.
    Regex::new(given).and_then(|_| Regex::new(whole)).map_err(|e| match e {
        regex::Error::Syntax(text) if text.contains("look-around") => {
            "look-ahead and look-behind are not supported in regular expressions; use `exclude_modules` or list the \
             modules"
                .to_string()
        }
        regex::Error::Syntax(text) => {
            // The crate draws the expression and a marker over several lines; the last one holds the reason.
            let reason = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
            format!("not a valid regular expression: {reason}")
        }
        other => format!("not a usable regular expression: {other}"),
    })
}

/// A pattern that means tensors by their names: a regular expression for the whole name, or for some of its parts between dots.
#[derive(Clone, Debug)]
pub struct NamePattern(Regex);

impl NamePattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// What is wrong with the regular expression.
    pub fn new(pattern: &str) -> Result<Self, String> {
        build(&format!(r"^(?:.*\.)?(?:{pattern})(?:\..*)?$"), pattern).map(Self)
    }

    /// Whether it means this tensor.
    pub fn matches(&self, name: &str) -> bool {
        self.0.is_match(name)
    }
}

/// Which of a module's two matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LoraPart {
    /// `lora_A`, [r, in].
    A,
    /// `lora_B`, [out, r].
    B,
}

impl LoraPart {
    fn suffix(self) -> &'static str {
        match self {
            LoraPart::A => ".lora_A.weight",
            LoraPart::B => ".lora_B.weight",
        }
    }
}

/// The name of a module's matrix in `adapter_model.safetensors`.
///
/// ```
/// use lowrank_formats::peft::{LoraPart, lora_key, parse_lora_key};
///
/// let key = lora_key("model.layers.0.self_attn.q_proj", LoraPart::A);
/// assert_eq!(key, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
/// assert_eq!(parse_lora_key(&key), Some(("model.layers.0.self_attn.q_proj", LoraPart::A)));
/// ```
pub fn lora_key(module: &str, part: LoraPart) -> String {
    format!("{PREFIX}{module}{}", part.suffix())
}

/// The module and part that a name in `adapter_model.safetensors` stands for; `None` for every other kind of tensor.
pub fn parse_lora_key(key: &str) -> Option<(&str, LoraPart)> {
    let rest = key.strip_prefix(PREFIX)?;
    [LoraPart::A, LoraPart::B].into_iter().find_map(|part| {
        let module = rest.strip_suffix(part.suffix())?;
        (!module.is_empty()).then_some((module, part))
    })
}

/// What stands behind a module's name where its magnitudes are.
const MAGNITUDE: &str = ".lora_magnitude_vector";

/// The name of a module's magnitudes `[out]` in `adapter_model.safetensors`, where `use_dora` is true.
pub fn magnitude_key(module: &str) -> String {
    format!("{PREFIX}{module}{MAGNITUDE}")
}

/// The module whose magnitudes a name in `adapter_model.safetensors` stands for; `None` for every other kind of tensor.
pub fn parse_magnitude_key(key: &str) -> Option<&str> {
    let module = key.strip_prefix(PREFIX)?.strip_suffix(MAGNITUDE)?;
    (!module.is_empty()).then_some(module)
}

#[cfg(test)]
mod tests {
    use super::*;

    const Q0: &str = "model.layers.0.self_attn.q_proj";
    const Q11: &str = "model.layers.11.self_attn.q_proj";

    fn list(entries: &[&str]) -> LoraConfig {
        let entries = entries.iter().map(ToString::to_string).collect();
        LoraConfig {
            target_modules: TargetModules::List(entries),
            ..LoraConfig::default()
        }
    }

    #[test]
    fn a_list_matches_whole_names_and_ends_after_a_dot() {
        assert!(list(&["q_proj"]).matches(Q0));
        assert!(list(&["q_proj"]).matches("q_proj"));
        assert!(list(&["self_attn.q_proj"]).matches(Q0));
        assert!(list(&[Q0]).matches(Q0));
        for other in ["proj", "q_pro", "attn.q_proj", ".q_proj", "model", ""] {
            assert!(!list(&[other]).matches(Q0), "{other}");
        }
        // A list entry is no regular expression.
        assert!(!list(&["q.proj"]).matches(Q0));
    }

    #[test]
    fn a_string_matches_the_whole_name_as_a_regular_expression() {
        let regex = |text: &str| LoraConfig {
            target_modules: TargetModules::Regex(text.into()),
            ..LoraConfig::default()
        };
        assert!(regex(r".*\.(q|v)_proj").matches(Q0));
        assert!(!regex("q_proj").matches(Q0));
        assert!(!regex(r".*\.q_pro").matches(Q0));
        // The alternatives are bracketed: neither end is loose.
        assert!(!regex("x|.*q").matches(Q0));
        assert!(!regex("(").matches(Q0));
    }

    #[test]
    fn exclusion_wins() {
        let mut config = list(&["q_proj"]);
        config.exclude_modules = Some(ModuleNames::List(vec!["layers.0.self_attn.q_proj".into()]));
        assert!(!config.matches(Q0) && config.matches(Q11));
        config.exclude_modules = Some(ModuleNames::Regex(r".*\.11\..*".into()));
        assert!(config.matches(Q0) && !config.matches(Q11));
        config.target_modules = TargetModules::AllLinear;
        assert!(config.matches(Q0) && !config.matches(Q11));
    }

    #[test]
    fn layers_are_chosen_by_number() {
        let mut config = list(&["q_proj"]);
        config.layers_to_transform = Some(vec![11]);
        assert!(!config.matches(Q0) && config.matches(Q11));
        // The layer's number comes first, an expert's later.
        assert!(config.matches("model.layers.11.experts.3.q_proj"));
        assert!(!config.matches("model.layers.3.experts.11.q_proj"));
        assert!(!config.matches("q_proj_without.a.layer.q_proj"));
        config.layers_pattern = vec!["h".into()];
        assert!(!config.matches(Q11));
        config.layers_pattern.push("layers".into());
        assert!(config.matches(Q11) && !config.matches(Q0));
        // A whole name is taken whatever its layer, as PEFT does.
        config.target_modules = TargetModules::List(vec![Q0.into()]);
        assert!(config.matches(Q0));
        config.layers_to_transform = Some(Vec::new());
        config.target_modules = TargetModules::List(vec!["q_proj".into()]);
        assert!(config.matches(Q0));
    }

    #[test]
    fn the_first_pattern_that_matches_gives_rank_and_alpha() {
        let mut config = list(&["q_proj", "v_proj"]);
        config.rank_pattern = vec![(r"layers\.0\..*".into(), 4), ("q_proj".into(), 2)];
        config.alpha_pattern = vec![("self_attn.q_proj".into(), 24.0)];
        assert_eq!((config.rank_of(Q0), config.rank_of(Q11)), (4, 2));
        assert_eq!(config.rank_of("model.layers.1.self_attn.v_proj"), 8);
        // `q_proj` is no end of `xq_proj` after a dot.
        assert_eq!(config.rank_of("model.layers.1.xq_proj"), 8);
        assert_eq!(config.alpha_of(Q0), 24.0);
        assert_eq!(config.alpha_of("model.layers.1.self_attn.v_proj"), 8.0);
        assert_eq!(config.scale_of(Q0), 6.0);
        config.use_rslora = true;
        assert_eq!(config.scale_of(Q0), 12.0);
    }

    #[test]
    fn a_name_is_meant_by_its_parts() {
        let pattern = |text: &str| NamePattern::new(text).unwrap();
        let key = lora_key(Q11, LoraPart::B);
        for text in [
            "lora_B",
            "q_proj",
            "layers.11",
            "lora_B.weight",
            ".*_proj.lora_B",
            &key,
        ] {
            assert!(pattern(text).matches(&key), "{text}");
        }
        for text in ["layers.1", "lora", "lora_A", "proj.lora_B"] {
            assert!(!pattern(text).matches(&key), "{text}");
        }
        assert!(NamePattern::new("a)(b").is_err());
    }

    #[test]
    fn only_lora_s_own_tensors_have_keys() {
        for part in [LoraPart::A, LoraPart::B] {
            let key = lora_key(Q0, part);
            assert_eq!(parse_lora_key(&key), Some((Q0, part)));
            assert_eq!(parse_magnitude_key(&key), None);
        }
        let key = magnitude_key(Q0);
        assert_eq!(parse_magnitude_key(&key), Some(Q0));
        assert_eq!(
            parse_magnitude_key("base_model.model..lora_magnitude_vector"),
            None
        );
        for other in [
            "base_model.model.lm_head.weight",
            "base_model.model.x.lora_embedding_A",
            "base_model.model.x.lora_magnitude_vector",
            "base_model.model.x.lora_A.default.weight",
            "base_model.model.x.lora_B.bias",
            "base_model.model..lora_A.weight.x",
            "base_model.model.lora_A.weight",
            "model.x.lora_A.weight",
            "",
        ] {
            assert_eq!(parse_lora_key(other), None, "{other}");
        }
    }
}

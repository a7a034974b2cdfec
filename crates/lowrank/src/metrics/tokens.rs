//! How a text becomes the tokens that metrics count.

use std::sync::LazyLock;

use regex::Regex;

/// How texts are cut into tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tokenization {
    /// That of mteval-v13a, sacrebleu's default: punctuation stands alone, except for points and commas between digits.
    #[default]
    Mteval13a,
    /// Tokens are what stands between white space, for texts that are cut already.
    Whitespace,
}

/// The replacements of mteval-v13a, one after the other.
static RULES: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    [
        (r"([{-~\[-` -&(-+:-@/])", " $1 "),
        (r"([^0-9])([.,])", "$1 $2 "),
        (r"([.,])([^0-9])", " $1 $2"),
        (r"([0-9])(-)", "$1 $2 "),
    ]
    .into_iter()
    .filter_map(|(pattern, replacement)| Some((Regex::new(pattern).ok()?, replacement)))
    .collect()
});

impl Tokenization {
    /// The tokens of a text.
    pub fn split(self, text: &str) -> Vec<String> {
        match self {
            Self::Mteval13a => words(&mteval(text)),
            Self::Whitespace => words(text),
        }
    }

    /// Its name in sacrebleu.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mteval13a => "13a",
            Self::Whitespace => "none",
        }
    }
}

fn mteval(text: &str) -> String {
    let mut text = text
        .trim_end_matches(is_space)
        .replace("<skipped>", "")
        .replace("-\n", "")
        .replace('\n', " ");
    // In this order: what `&amp;` becomes can be the beginning of another.
    for (entity, character) in [
        ("&quot;", "\""),
        ("&amp;", "&"),
        ("&lt;", "<"),
        ("&gt;", ">"),
    ] {
        text = text.replace(entity, character);
    }
    text = format!(" {text} ");
    for (pattern, replacement) in RULES.iter() {
        text = pattern.replace_all(&text, *replacement).into_owned();
    }
    text
}

/// White space as Python's `split` sees it.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn words(text: &str) -> Vec<String> {
    text.split(is_space)
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_is_there() {
        assert_eq!(RULES.len(), 4);
        let split = |text| Tokenization::Mteval13a.split(text).join(" ");
        assert_eq!(
            split("Costs £1,000.50 (or so), at 5-star \"Café\".\n"),
            "Costs £1,000.50 ( or so ) , at 5 - star \" Café \" ."
        );
        assert_eq!(split("a &amp;lt; b{c}d"), "a < b { c } d");
        assert_eq!(
            Tokenization::Whitespace.split("a,b\u{a0}c\u{1f}d "),
            ["a,b", "c", "d"]
        );
    }
}

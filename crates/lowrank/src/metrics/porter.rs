//! Porter's stemmer (Porter, 1980, "An algorithm for suffix stripping") with nltk's changes, its default.
//!
//! The measure m of a stem counts how often a vowel is followed by a consonant; `y` is a vowel after a consonant. A step's
//! rules are tried in order, and the first whose suffix fits is the only one, whether its condition holds or not. nltk adds a few
//! irregular words, keeps `ie` in words of four letters, turns `y` into `i` after any consonant, counts a vowel and a consonant
//! as a short syllable, and strips `alli`, `fulli` and `logi` in its own way.

/// What a rule asks of the stem.
type Condition = fn(&[char]) -> bool;

/// Words that no rule gets right.
const IRREGULAR: [(&str, &str); 16] = [
    ("sky", "sky"),
    ("skies", "sky"),
    ("dying", "die"),
    ("lying", "lie"),
    ("tying", "tie"),
    ("news", "news"),
    ("innings", "inning"),
    ("inning", "inning"),
    ("outings", "outing"),
    ("outing", "outing"),
    ("cannings", "canning"),
    ("canning", "canning"),
    ("howe", "howe"),
    ("proceed", "proceed"),
    ("exceed", "exceed"),
    ("succeed", "succeed"),
];

/// Step 2, for stems with m > 0.
const DOUBLE_SUFFIXES: [(&str, &str); 21] = [
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),
];

/// Step 3, for stems with m > 0.
const ENDINGS: [(&str, &str); 7] = [
    ("icate", "ic"),
    ("ative", ""),
    ("alize", "al"),
    ("iciti", "ic"),
    ("ical", "ic"),
    ("ful", ""),
    ("ness", ""),
];

/// Step 4, for stems with m > 1; `ion` asks for an s or t before it, too.
const LAST_SUFFIXES: [&str; 19] = [
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou",
    "ism", "ate", "iti", "ous", "ive", "ize",
];

/// The stem of a word, which is taken in lower case.
pub fn stem(word: &str) -> String {
    let lower = word.to_lowercase();
    if let Some((_, stem)) = IRREGULAR.iter().find(|(word, _)| *word == lower) {
        return (*stem).to_owned();
    }
    if word.chars().nth(2).is_none() {
        return lower;
    }
    let mut word: Vec<char> = lower.chars().collect();
    plural(&mut word);
    past(&mut word);
    if without(&word, "y").is_some_and(|stem| stem.len() > 1 && ends_in_consonant(stem)) {
        replace(&mut word, "y", "i");
    }
    double_suffix(&mut word);
    first_rule(&mut word, &ENDINGS, |stem| measure(stem) > 0);
    let last = LAST_SUFFIXES.map(|suffix| (suffix, ""));
    let is_ion = word.ends_with(&['i', 'o', 'n']);
    first_rule(
        &mut word,
        &last,
        if is_ion {
            |stem| measure(stem) > 1 && matches!(stem.last(), Some('s' | 't'))
        } else {
            |stem| measure(stem) > 1
        },
    );
    if let Some(stem) = without(&word, "e") {
        let m = measure(stem);
        if m > 1 || (m == 1 && !ends_short(stem)) {
            word.pop();
        }
    }
    if without(&word, "ll").is_some() && measure(&word[..word.len() - 1]) > 1 {
        word.pop();
    }
    word.into_iter().collect()
}

/// Step 1a.
fn plural(word: &mut Vec<char>) {
    if word.len() == 4 && replace(word, "ies", "ie") {
        return;
    }
    let rules = [("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")];
    first_rule(word, &rules, |_| true);
}

/// Step 1b.
fn past(word: &mut Vec<char>) {
    let short = word.len() == 4;
    if replace(word, "ied", if short { "ie" } else { "i" }) {
        return;
    }
    if let Some(stem) = without(word, "eed") {
        if measure(stem) > 0 {
            word.pop();
        }
        return;
    }
    let suffixes = ["ed", "ing"];
    let stripped = suffixes.into_iter().any(|suffix| {
        let vowel = |stem: &[char]| vowels(stem).contains(&true);
        without(word, suffix).is_some_and(vowel) && replace(word, suffix, "")
    });
    if !stripped {
        return;
    }
    let mends = [("at", "ate"), ("bl", "ble"), ("iz", "ize")];
    if mends
        .into_iter()
        .any(|(end, mend)| replace(word, end, mend))
    {
        return;
    }
    if let [.., a, b] = word.as_slice()
        && a == b
        && ends_in_consonant(word)
    {
        if !matches!(b, 'l' | 's' | 'z') {
            word.pop();
        }
    } else if measure(word) == 1 && ends_short(word) {
        word.push('e');
    }
}

/// Step 2.
fn double_suffix(word: &mut Vec<char>) {
    // `alli` comes first, and what it leaves is looked at again.
    while without(word, "alli").is_some_and(|stem| measure(stem) > 0) {
        replace(word, "alli", "al");
    }
    if !first_rule(word, &DOUBLE_SUFFIXES, |stem| measure(stem) > 0)
        && without(word, "logi").is_some()
        && measure(&word[..word.len() - 3]) > 0
    {
        word.pop();
    }
}

/// Applies the first rule whose suffix fits, if its condition holds; says whether one fitted.
fn first_rule(word: &mut Vec<char>, rules: &[(&str, &str)], condition: Condition) -> bool {
    for (suffix, replacement) in rules {
        if let Some(stem) = without(word, suffix) {
            if condition(stem) {
                replace(word, suffix, replacement);
            }
            return true;
        }
    }
    false
}

/// What stands before a suffix, if the word has it.
fn without<'a>(word: &'a [char], suffix: &str) -> Option<&'a [char]> {
    let (stem, end) = word.split_at_checked(word.len().checked_sub(suffix.len())?)?;
    end.iter().copied().eq(suffix.chars()).then_some(stem)
}

/// Replaces a suffix; says whether the word had it.
fn replace(word: &mut Vec<char>, suffix: &str, replacement: &str) -> bool {
    let Some(length) = without(word, suffix).map(<[char]>::len) else {
        return false;
    };
    word.truncate(length);
    word.extend(replacement.chars());
    true
}

/// Which letters are vowels.
fn vowels(word: &[char]) -> Vec<bool> {
    let mut flags = Vec::with_capacity(word.len());
    for letter in word {
        let vowel = match letter {
            'a' | 'e' | 'i' | 'o' | 'u' => true,
            'y' => flags.last() == Some(&false),
            _ => false,
        };
        flags.push(vowel);
    }
    flags
}

/// m: how often a vowel is followed by a consonant.
fn measure(stem: &[char]) -> usize {
    let pairs = vowels(stem);
    pairs.windows(2).filter(|two| two[0] && !two[1]).count()
}

fn ends_in_consonant(word: &[char]) -> bool {
    vowels(word).last() == Some(&false)
}

/// Whether the word ends with consonant, vowel, consonant, the last not w, x or y, or is a vowel and a consonant.
fn ends_short(word: &[char]) -> bool {
    match vowels(word).as_slice() {
        [.., false, true, false] => !matches!(word.last(), Some('w' | 'x' | 'y')),
        [true, false] => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stems_are_nltks() {
        let golden: Vec<(String, String)> =
            serde_json::from_str(include_str!("../../tests/goldens/stems.json")).unwrap();
        assert!(golden.len() > 300);
        let wrong: Vec<_> = golden
            .iter()
            .map(|(word, expected)| (word, stem(word), expected))
            .filter(|(_, ours, expected)| ours != *expected)
            .collect();
        assert!(wrong.is_empty(), "{wrong:?}");
    }
}

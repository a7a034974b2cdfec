//! The corpus of the built-in model: simple English from a grammar.
//!
//! A model of two million parameters cannot learn English in minutes, but it can learn a small world whose sentences
//! are few in kind and many in number: children, animals, things and places that keep their names, colors and
//! pronouns throughout a story. The words and sentences stand in the text files beside this module; the language they
//! are written in is described in `grammar.rs`.
//!
//! A document is one of
//! - a story in the past tense (two in five), sometimes of two stories;
//! - a description in the present tense;
//! - a few sentences with a question and its answer;
//! - a conversation in ChatML, often about a story and then about what happened in it;
//! - a list of words or a few sentences, said twice;
//! - a list of lines of fields, such as `name: Tom | animal: red fox | place: river`, some with a question and answer.
//!
//! The last kind and the quotations of the stories make the [tasks](crate::tasks) easy to adapt to, without solving
//! them: nothing here turns fields into sentences, or a quotation into reported speech.

mod grammar;

use std::sync::LazyLock;

use grammar::finish;
pub(crate) use grammar::{Grammar, Kind, Text};

use crate::random::Random;

/// The words, stories, facts and tasks.
pub(crate) static GRAMMAR: LazyLock<Grammar> = LazyLock::new(|| {
    let sources = [
        include_str!("words.txt"),
        include_str!("stories.txt"),
        include_str!("stories_more.txt"),
        include_str!("facts.txt"),
        include_str!("tasks.txt"),
    ];
    Grammar::parse(&sources).expect("the grammar's own files are checked by the tests")
});

/// The token that ends a document.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// The token that begins a turn of a conversation.
pub const TURN_START: &str = "<|im_start|>";
/// The token that ends a turn of a conversation.
pub const TURN_END: &str = "<|im_end|>";

/// The story number `seed`.
pub fn story(seed: u64) -> String {
    tell_story(&mut Random::new(seed, 0)).told
}

/// The first `count` documents of the corpus number `seed`, without the end tokens between them.
///
/// A document depends on `seed` and its own number alone.
pub fn corpus(seed: u64, count: u64) -> impl Iterator<Item = String> {
    (0..count).map(move |index| document(&mut Random::new(seed, index.wrapping_add(1))))
}

fn document(random: &mut Random) -> String {
    match random.below(100) {
        0..38 => tell_story(random).told,
        38..41 => format!("{}\n\n{}", tell_story(random).told, tell_story(random).told),
        41..49 => tell_any(Kind::Describe, random),
        49..58 => several(2, random, |random| tell_any(Kind::Bit, random)),
        58..80 => conversation(random),
        80..90 => echo(random),
        _ => {
            let text = any(Kind::Cards, random);
            several(3, random, |random| tell(text, random))
        }
    }
}

/// A story, its topic, and a question about it with the answer.
struct Story {
    told: String,
    about: String,
    question: String,
    answer: String,
}

fn tell_story(random: &mut Random) -> Story {
    let text = any(Kind::Story, random);
    let scene = GRAMMAR.cast(text, random);
    let mut told = GRAMMAR.tell(text, &scene, random);
    if text.about.contains("{h}") && random.chance(30) {
        told.insert(0, GRAMMAR.say("{#live}", &scene, random));
    }
    let (question, answer) = &text.asks[random.below(text.asks.len())];
    Story {
        told: told.join(" "),
        about: GRAMMAR.expand(&text.about, &scene, random),
        question: GRAMMAR.say(question, &scene, random),
        answer: GRAMMAR.say(answer, &scene, random),
    }
}

/// One text of a kind.
fn any(kind: Kind, random: &mut Random) -> &'static Text {
    let texts: Vec<_> = GRAMMAR.texts(kind).collect();
    texts[random.below(texts.len())]
}

/// Any text of a kind, told from beginning to end.
fn tell_any(kind: Kind, random: &mut Random) -> String {
    tell(any(kind, random), random)
}

fn tell(text: &Text, random: &mut Random) -> String {
    let scene = GRAMMAR.cast(text, random);
    GRAMMAR.tell(text, &scene, random).join(" ")
}

fn several(least: usize, random: &mut Random, line: impl Fn(&mut Random) -> String) -> String {
    (0..least + random.below(3))
        .map(|_| line(random))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Something that is said again word for word. To look back and copy is what a small model learns last, and what both
/// tasks and consistent stories need; a few documents of nothing else bring it forward.
fn echo(random: &mut Random) -> String {
    let words = match random.below(4) {
        0 => tell_any(Kind::Describe, random),
        1 => tell_any(Kind::Bit, random),
        _ => tell_any(Kind::List, random),
    };
    let request = match random.below(6) {
        0 => "Say this: ",
        1 => "Say after me: ",
        2 => "Repeat this: ",
        _ => return format!("{words}\n{words}"),
    };
    turns(&[format!("{request}{words}"), words])
}

fn conversation(random: &mut Random) -> String {
    let told = if random.chance(45) {
        let Story {
            told,
            about,
            question,
            answer,
        } = tell_story(random);
        let request = match random.below(4) {
            0 => format!("Tell me a story about {about}."),
            1 => format!("Can you tell me a story about {about}?"),
            2 => format!("Write a short story about {about}."),
            _ => "Tell me a story.".into(),
        };
        let mut turns = vec![finish(&request), told];
        if random.chance(60) {
            turns.extend([question, answer]);
        }
        turns
    } else {
        let text = any(Kind::Chat, random);
        let scene = GRAMMAR.cast(text, random);
        let mut turns = GRAMMAR.tell(text, &scene, random);
        if random.chance(40) {
            turns.truncate(2);
        }
        turns
    };
    turns(&told)
}

/// The turns of a user and an assistant, in ChatML.
fn turns(told: &[String]) -> String {
    let roles = ["user", "assistant"].iter().cycle();
    let mut document = String::new();
    for (turn, role) in told.iter().zip(roles) {
        document.extend([TURN_START, role, "\n", turn, TURN_END, "\n"]);
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn fnv1a(text: &str, hash: u64) -> u64 {
        text.bytes().fold(hash, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
        })
    }

    /// Fields, or words to say again.
    fn is_list(document: &str) -> bool {
        document.lines().any(|line| {
            !line.starts_with(TURN_START) && !line.contains(['.', '!', '?']) || line.contains(" | ")
        })
    }

    #[test]
    fn the_same_on_every_machine() {
        let stories = (0..100)
            .map(story)
            .fold(0xCBF2_9CE4_8422_2325, |hash, text| fnv1a(&text, hash));
        let documents =
            corpus(42, 100).fold(0xCBF2_9CE4_8422_2325, |hash, text| fnv1a(&text, hash));
        // They change whenever a word of the corpus does; then the built-in model should be trained anew.
        assert_eq!(
            (stories, documents),
            (0xE562_FFEC_63DD_910F, 0xDAC4_9F86_6066_D002),
            "{stories:#018X}, {documents:#018X}"
        );
    }

    #[test]
    fn a_document_depends_on_its_number_alone() {
        assert_eq!(
            corpus(7, 5).collect::<Vec<_>>(),
            corpus(7, 50).take(5).collect::<Vec<_>>()
        );
        assert_ne!(
            corpus(7, 5).collect::<Vec<_>>(),
            corpus(8, 5).collect::<Vec<_>>()
        );
    }

    #[test]
    fn spaces_quotes_and_ends_of_sentences_are_right() {
        for (number, document) in corpus(1, 4000).enumerate() {
            let fields = is_list(&document);
            for line in document
                .lines()
                .filter(|line| !line.is_empty() && !line.starts_with(TURN_START))
            {
                let line = line.strip_suffix(TURN_END).unwrap_or(line);
                assert!(
                    !line.contains("  ") && line == line.trim(),
                    "{number}: spaces: {line}"
                );
                for bad in [
                    " .", " ,", "..", ",,", "[", "]", "{", "}", "\" .", "?.", "!.",
                ] {
                    assert!(!line.contains(bad), "{number}: `{bad}`: {line}");
                }
                assert_eq!(line.matches('"').count() % 2, 0, "{number}: quotes: {line}");
                assert!(
                    fields || line.ends_with(['.', '!', '?', '"']),
                    "{number}: end: {line}"
                );
                assert!(
                    fields || line.starts_with(|c: char| c.is_uppercase() || c == '"'),
                    "{number}: begin: {line}"
                );
            }
        }
    }

    #[test]
    fn articles_and_sentence_starts_agree() {
        for document in corpus(2, 4000).filter(|document| !is_list(document)) {
            let words: Vec<&str> = document.split_whitespace().collect();
            for pair in words.windows(2) {
                let article = pair[0].trim_start_matches('"').to_lowercase();
                let an = grammar::takes_an(pair[1]);
                assert!(article != "a" || !an, "a {}: {document}", pair[1]);
                assert!(article != "an" || an, "an {}: {document}", pair[1]);
                assert_ne!(
                    pair[0].to_lowercase(),
                    pair[1].to_lowercase(),
                    "twice: {document}"
                );
                let ends = pair[0].ends_with(['.', '!', '?']);
                assert!(
                    !ends || !pair[1].starts_with(char::is_lowercase),
                    "{} {}: {document}",
                    pair[0],
                    pair[1]
                );
            }
        }
    }

    #[test]
    fn stories_are_short_and_many() {
        let mut sentences = BTreeSet::new();
        let mut words = BTreeSet::new();
        let mut stories = BTreeSet::new();
        for seed in 0..3000 {
            let story = story(seed);
            let own: Vec<_> = story
                .split_inclusive(['.', '!', '?'])
                .map(|sentence| sentence.trim().to_string())
                .collect();
            assert!(
                (4..=24).contains(&own.len()),
                "{} sentences: {story}",
                own.len()
            );
            sentences.extend(own);
            words.extend(
                story
                    .split(|c: char| !c.is_alphabetic())
                    .map(str::to_lowercase),
            );
            stories.insert(story);
        }
        assert_eq!(stories.len(), 3000);
        assert!(sentences.len() > 8000, "{} sentences", sentences.len());
        assert!((1000..2000).contains(&words.len()), "{} words", words.len());
    }

    #[test]
    fn pronouns_follow_the_name() {
        for seed in 0..2000 {
            let random = &mut Random::new(seed, 9);
            let scene = GRAMMAR.cast(any(Kind::Story, random), random);
            let he = scene["h.gender"] == "m";
            assert_eq!(
                (
                    scene["h.he"] == "he",
                    scene["h.his"] == "his",
                    scene["h.boy"] == "boy"
                ),
                (he, he, he)
            );
            assert_ne!(scene["h"], scene["f"]);
        }
    }
}

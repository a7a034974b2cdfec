//! A row that has a label, or that is to be given one, as tokens.
//!
//! A word's tag falls on the word's first token, as in transformers' examples. Where passages of a text are marked, the text is
//! encoded as it is, since that is how a text is read that is to be tagged, and its words are runs of letters and digits, or of other
//! characters that are no spaces; a character of a script without spaces is a word of its own. The first word of a passage has the
//! tag `B-`, the others `I-`, and words outside of all passages `O`.

use std::ops::Range;

use super::example::{Example, RowNotes, WordNotes};
use super::files::RawRow;
use super::labels::Written;
use super::rows::{Given, Input, LabelledRow, Scalar, Span};
use super::tokenizer::{Encoded, Tokenizer};

/// A row's example, without its label yet, and the label as it is written.
pub(super) fn encode_labelled(
    tokenizer: &Tokenizer,
    row: LabelledRow,
    raw: &RawRow,
    max_length: usize,
) -> Result<(Example, RowNotes, Written), String> {
    let input = encode_input(tokenizer, &row.input, max_length)?;
    let mut notes = RowNotes {
        words: input.notes,
        ..RowNotes::default()
    };
    let label = match row.label {
        Given::Spans(spans) => Given::Tags(tags(&spans, &input.words, &mut notes.words)),
        label => label,
    };
    let written = Written {
        line: raw.line,
        row: raw.number,
        label,
        tokens: input.first,
    };
    Ok((example_of(input.encoded, raw.line), notes, written))
}

/// What a classifier reads, as tokens.
pub(super) struct EncodedInput {
    pub(super) encoded: Encoded,
    /// The bytes of the words of a text whose words were found here.
    pub(super) words: Vec<Range<usize>>,
    /// The first token of each word, of those of `words` or of those given; none for a word that was cut or has no token.
    pub(super) first: Vec<Option<u32>>,
    notes: WordNotes,
}

/// Encodes what a classifier reads.
pub(super) fn encode_input(
    tokenizer: &Tokenizer,
    input: &Input,
    max_length: usize,
) -> Result<EncodedInput, String> {
    let whole = |text: &str, pair| {
        let encoded = tokenizer.encode_classified(text, pair, max_length);
        let encoded = encoded.map_err(|error| error.to_string())?;
        if encoded.ids.len() == encoded.added {
            return Err(
                "the text becomes no token: it has nothing that the tokenizer keeps".to_owned(),
            );
        }
        Ok(encoded)
    };
    let mut notes = WordNotes::default();
    match input {
        Input::Text { text, pair } => Ok(EncodedInput {
            encoded: whole(text, pair.as_deref())?,
            words: Vec::new(),
            first: Vec::new(),
            notes,
        }),
        Input::Words(words) => {
            let encoded = tokenizer.encode_words(words, max_length);
            let encoded = encoded.map_err(|error| error.to_string())?;
            let first = first_of_words(&encoded, words, &mut notes)?;
            Ok(EncodedInput {
                encoded,
                words: Vec::new(),
                first,
                notes,
            })
        }
        Input::Passages(text) => {
            let encoded = whole(text, None)?;
            let words = words_of(text);
            let first = first_of_passages(&encoded, &words, &mut notes);
            Ok(EncodedInput {
                encoded,
                words,
                first,
                notes,
            })
        }
    }
}

/// An example without a label.
pub(super) fn example_of(encoded: Encoded, line: usize) -> Example {
    Example {
        prompt_len: encoded.ids.len(),
        ids: encoded.ids,
        token_types: encoded.token_types,
        truncated: encoded.truncated,
        line,
        ..Example::default()
    }
}

/// The first token of each given word.
fn first_of_words(
    encoded: &Encoded,
    words: &[String],
    notes: &mut WordNotes,
) -> Result<Vec<Option<u32>>, String> {
    let mut first: Vec<Option<u32>> = vec![None; words.len()];
    for (token, word) in (0..).zip(&encoded.words) {
        if let Some(first) = word.and_then(|word| first.get_mut(word as usize)) {
            first.get_or_insert(token);
        }
    }
    // What was cut lies at one end; a word without a token between others, or where nothing was cut, has none at all.
    let has = |word: &usize| first[*word].is_some();
    let kept = (0..words.len()).find(has).zip((0..words.len()).rfind(has));
    let inside = match kept {
        Some((begin, end)) if encoded.truncated > 0 => begin..end,
        _ => 0..words.len(),
    };
    if let Some(word) = inside.into_iter().find(|word| !has(word)) {
        return Err(format!(
            "tokens[{word}] ({:?}) becomes no token: it has nothing that the tokenizer keeps; leave it out, and its tag",
            words[word]
        ));
    }
    notes.cut = first.iter().filter(|token| token.is_none()).count();
    Ok(first)
}

/// The first token of each word of a text. A token that covers several words is the first one's.
fn first_of_passages(
    encoded: &Encoded,
    words: &[Range<usize>],
    notes: &mut WordNotes,
) -> Vec<Option<u32>> {
    let own = (0_u32..).zip(encoded.offsets.iter().zip(&encoded.words));
    let own: Vec<(u32, &(usize, usize))> = own
        .filter(|(_, (_, word))| word.is_some())
        .map(|(token, (offsets, _))| (token, offsets))
        .collect();
    let mut from = 0;
    let mut last = None;
    let mut first = Vec::with_capacity(words.len());
    for word in words {
        while own
            .get(from)
            .is_some_and(|(_, (_, end))| *end <= word.start)
        {
            from += 1;
        }
        let found = own.get(from).filter(|(_, (begin, _))| *begin < word.end);
        let token = found.map(|(token, _)| *token);
        if token.is_none() {
            notes.cut += usize::from(encoded.truncated > 0);
        } else if token == last {
            notes.joined += 1;
        }
        first.push(token.filter(|token| Some(*token) != last));
        last = token.or(last);
    }
    first
}

/// The words of a text, in bytes.
fn words_of(text: &str) -> Vec<Range<usize>> {
    #[derive(PartialEq, Clone, Copy)]
    enum Class {
        Space,
        Letter,
        Alone,
        Other,
    }
    let class = |c: char| {
        if c.is_whitespace() {
            Class::Space
        } else if is_written_without_spaces(c) {
            Class::Alone
        } else if c.is_alphanumeric() || is_mark(c) {
            Class::Letter
        } else {
            Class::Other
        }
    };
    let mut words: Vec<Range<usize>> = Vec::new();
    let mut before = Class::Space;
    for (at, c) in text.char_indices() {
        let now = class(c);
        let end = at + c.len_utf8();
        match words.last_mut() {
            Some(word) if now == before && matches!(now, Class::Letter | Class::Other) => {
                word.end = end;
            }
            _ if now == Class::Space => {}
            _ => words.push(at..end),
        }
        before = now;
    }
    words
}

/// Chinese characters, kana, Thai, Lao, Burmese and Khmer.
fn is_written_without_spaces(c: char) -> bool {
    matches!(c, '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}'
        | '\u{20000}'..='\u{3134f}' | '\u{e00}'..='\u{eff}' | '\u{1000}'..='\u{109f}' | '\u{1780}'..='\u{17ff}')
}

/// Accents that stand behind their letter.
fn is_mark(c: char) -> bool {
    matches!(c, '\u{300}'..='\u{36f}' | '\u{591}'..='\u{5bd}' | '\u{64b}'..='\u{65f}' | '\u{93a}'..='\u{94d}')
}

/// The tags of words by the passages that they lie in.
fn tags(spans: &[Span], words: &[Range<usize>], notes: &mut WordNotes) -> Vec<Scalar> {
    let mut next = 0;
    let mut begun = false;
    let mut lost = |begun: bool| notes.lost_marks += usize::from(!begun);
    let mut cut = vec![false; spans.len()];
    let mut tags = Vec::with_capacity(words.len());
    for word in words {
        while spans
            .get(next)
            .is_some_and(|span| span.range.end <= word.start)
        {
            lost(begun);
            next += 1;
            begun = false;
        }
        let tag = match spans.get(next).filter(|span| span.range.start < word.end) {
            None => "O".to_owned(),
            Some(span) => {
                let inside = span.range.start > word.start || span.range.end < word.end;
                cut[next] |= inside;
                let mark = if begun { "I" } else { "B" };
                begun = true;
                format!("{mark}-{}", span.label)
            }
        };
        tags.push(Scalar::Name(tag));
    }
    for _ in next..spans.len() {
        lost(begun);
        begun = false;
    }
    notes.cut_marks += cut.into_iter().filter(|cut| *cut).count();
    tags
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixture;

    fn words(text: &str) -> Vec<&str> {
        words_of(text).into_iter().map(|word| &text[word]).collect()
    }

    #[test]
    fn words_are_runs_of_letters_or_of_signs() {
        assert_eq!(
            words(" Don't go to  New-York (e\u{301}te\u{301}), 3.5!"),
            [
                "Don",
                "'",
                "t",
                "go",
                "to",
                "New",
                "-",
                "York",
                "(",
                "e\u{301}te\u{301}",
                "),",
                "3",
                ".",
                "5",
                "!"
            ]
        );
        assert_eq!(words("在Köln東京"), ["在", "Köln", "東", "京"]);
        assert!(words(" \n").is_empty());
    }

    fn tagged(text: &str, spans: &[(usize, usize, &str)]) -> (Vec<String>, WordNotes) {
        let spans: Vec<Span> = spans
            .iter()
            .map(|(start, end, label)| Span {
                range: *start..*end,
                label: (*label).to_owned(),
            })
            .collect();
        let mut notes = WordNotes::default();
        let tags = tags(&spans, &words_of(text), &mut notes);
        let name = |tag: Scalar| match tag {
            Scalar::Name(name) => name,
            other => panic!("{other:?}"),
        };
        (tags.into_iter().map(name).collect(), notes)
    }

    #[test]
    fn passages_become_tags_of_words() {
        let (tags, notes) = tagged("in New York, Ann", &[(3, 11, "LOC"), (13, 16, "PER")]);
        assert_eq!(tags, ["O", "B-LOC", "I-LOC", "O", "B-PER"]);
        assert_eq!(notes, WordNotes::default());
        // Two passages side by side, and one that covers a space alone.
        let (tags, notes) = tagged("Ann Bob c", &[(0, 3, "P"), (3, 4, "X"), (4, 7, "P")]);
        assert_eq!(tags, ["B-P", "B-P", "O"]);
        assert_eq!((notes.cut_marks, notes.lost_marks), (0, 1));
        let (tags, notes) = tagged("Berliner Luft", &[(0, 6, "LOC"), (6, 8, "X")]);
        assert_eq!(tags, ["B-LOC", "O"]);
        assert_eq!((notes.cut_marks, notes.lost_marks), (1, 1));
    }

    #[test]
    fn a_tag_falls_on_the_first_token_of_its_word() {
        let tokenizer = fixture::tokenizer();
        let encode = |input: &Input, length| encode_input(&tokenizer, input, length).unwrap();
        // " hello" is one token, and the other words are a token a byte; every word begins with a space.
        let given = Input::Words(["hello", "ab", "hello"].map(str::to_owned).to_vec());
        let whole = encode(&given, 64);
        assert_eq!(whole.first, [Some(0), Some(1), Some(4)]);
        assert_eq!(whole.encoded.ids.len(), 5);
        let cut = encode(&given, 4);
        assert_eq!(cut.first, [Some(0), Some(1), None]);
        assert_eq!((cut.notes.cut, cut.encoded.truncated), (1, 1));
        let text = Input::Passages("ab, hello hello".into());
        let whole = encode(&text, 64);
        assert_eq!(whole.first, [Some(0), Some(2), Some(3), Some(4)]);
        let cut = encode(&text, 3);
        assert_eq!(cut.first, [Some(0), Some(2), None, None]);
        assert_eq!(cut.notes.cut, 2);
    }

    #[test]
    fn a_token_of_several_words_is_the_first_ones() {
        let tokenizer = fixture::sentence_piece();
        // The words are cut from one another, and the token covers both.
        let encoded = tokenizer.encode_classified("Hello you", None, 64).unwrap();
        let mut notes = WordNotes::default();
        let first = first_of_passages(&encoded, &[0..2, 2..5, 6..9], &mut notes);
        assert_eq!(first, [Some(1), None, Some(2)]);
        assert_eq!((notes.joined, notes.cut), (1, 0));
    }

    #[test]
    fn words_and_texts_that_become_no_token_are_errors() {
        let tokenizer = fixture::tokenizer();
        let error = |input: Input| {
            let encoded = encode_input(&tokenizer, &input, 64);
            encoded.map(|_| ()).unwrap_err()
        };
        let words = Input::Words(["a", "", "b"].map(str::to_owned).to_vec());
        assert_eq!(
            error(words),
            "tokens[1] (\"\") becomes no token: it has nothing that the tokenizer keeps; leave it out, and its tag"
        );
        let text = Input::Text {
            text: String::new(),
            pair: None,
        };
        assert!(error(text).starts_with("the text becomes no token"));
    }

    proptest::proptest! {
        #[test]
        fn words_are_all_that_is_no_space(text in proptest::string::string_regex("[ \nab\u{301}é-—東ก1.,]{0,30}").unwrap()) {
            let words = words_of(&text);
            let shown: String = words.iter().map(|word| &text[word.clone()]).collect();
            let expected: String = text.chars().filter(|c| !c.is_whitespace()).collect();
            proptest::prop_assert_eq!(shown, expected);
            proptest::prop_assert!(words.windows(2).all(|two| two[0].end <= two[1].start));
        }
    }
}

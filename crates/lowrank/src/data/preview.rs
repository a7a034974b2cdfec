//! The exact tokens, labels and mask of examples, to be read before any training.

use std::fmt::Write as _;

use serde_json::{Value, json};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::example::Example;
use super::task::{Label, Labels};
use super::tokenizer::Tokenizer;

/// Green and underlined, so that it can be told without seeing colours.
const MARK: &str = "\x1b[32;4m";
const FAINT: &str = "\x1b[2m";
const BOLD: &str = "\x1b[1m";
const PLAIN: &str = "\x1b[0m";

/// Tokens of an example that are listed one by one: all, if it has at most twice as many.
const LISTED: usize = 128;
const NARROWEST: usize = 24;

/// Shows examples on a terminal `width` columns wide: first the text, with what is supervised marked, then every token
/// with its position, its id and its label (`-` where the loss does not fall). Of rows that have labels, which are `labels`, it shows
/// the row's label, or for each token its tag; of pairs, which text each token belongs to.
///
/// What is supervised is green and underlined with `colour`, and stands in `[[` and `]]` without. Control characters
/// of the data are written out, so that a file cannot play with the terminal.
pub fn render_preview(
    examples: &[Example],
    tokenizer: &Tokenizer,
    labels: Option<&Labels>,
    colour: bool,
    width: usize,
) -> String {
    let mut out = String::new();
    for (at, example) in examples.iter().enumerate() {
        if at > 0 {
            out.push('\n');
        }
        let mut page = Page {
            out: &mut out,
            colour,
            width: width.max(NARROWEST),
            column: 0,
            marked: false,
        };
        let shown = Shown::of(example, labels);
        page.heading(example, &shown);
        page.text(example, tokenizer, &shown);
        page.tokens(example, tokenizer, &shown);
    }
    out
}

/// The same as JSON: a list with an object for each example. `labels` has -100 where the loss does not fall, as in
/// PyTorch. Of a row that has a label, it is under `label`, and the tags of its tokens are under `tags`.
pub fn preview_json(examples: &[Example], tokenizer: &Tokenizer, labels: Option<&Labels>) -> Value {
    let of_example = |example: &Example| {
        let tokens: Vec<String> = example
            .ids
            .iter()
            .map(|id| tokenizer.token_text(*id))
            .collect();
        let Some(label) = &example.label else {
            let labels: Vec<i64> = example
                .ids
                .iter()
                .zip(&example.supervised)
                .map(|(id, label)| if *label { i64::from(*id) } else { -100 })
                .collect();
            return json!({
                "line": example.line,
                "ids": example.ids,
                "labels": labels,
                "tokens": tokens,
                "truncated": example.truncated,
                "prompt_len": example.prompt_len,
                "supervised_tokens": example.supervised_tokens(),
            });
        };
        let mut row = json!({
            "line": example.line,
            "ids": example.ids,
            "token_type_ids": types_of(example),
            "tokens": tokens,
            "truncated": example.truncated,
        });
        match label {
            Label::Class(class) => row["label"] = name_of(labels, *class).into(),
            Label::Classes(classes) => row["label"] = right(labels, classes).into(),
            Label::Values(values) => row["label"] = values.as_slice().into(),
            Label::Tags(_) => row["tags"] = tags_of(example, labels).into(),
        }
        row
    };
    examples.iter().map(of_example).collect()
}

/// The name of a label, or its number where there is none.
fn name_of(labels: Option<&Labels>, class: u32) -> String {
    let name = labels.and_then(|labels| labels.names.get(class as usize));
    name.cloned().unwrap_or_else(|| class.to_string())
}

/// The names of the labels that are right.
fn right(labels: Option<&Labels>, classes: &[f32]) -> Vec<String> {
    let right = (0..).zip(classes).filter(|(_, bit)| **bit > 0.0);
    right.map(|(class, _)| name_of(labels, class)).collect()
}

/// For each token the tag that falls on it.
fn tags_of(example: &Example, labels: Option<&Labels>) -> Vec<Option<String>> {
    let mut list = vec![None; example.ids.len()];
    if let Some(Label::Tags(tags)) = &example.label {
        for (token, class) in tags {
            if let Some(tag) = list.get_mut(*token as usize) {
                *tag = Some(name_of(labels, *class));
            }
        }
    }
    list
}

/// For each token which text it belongs to.
fn types_of(example: &Example) -> Vec<u8> {
    let mut types = example.token_types.clone();
    types.resize(example.ids.len(), 0);
    types
}

/// What is shown of an example's label.
struct Shown {
    /// For the heading.
    label: String,
    /// For each token, what stands in the column of labels; empty where there is no such column.
    column: Vec<String>,
    /// For each token whether it is marked.
    marked: Vec<bool>,
}

impl Shown {
    fn of(example: &Example, labels: Option<&Labels>) -> Self {
        let dash = || "-".to_owned();
        let count = example.ids.len();
        let by_token = |text: String, column: Vec<String>, marked| Self {
            label: visible(&text),
            column: column.iter().map(|label| visible(label)).collect(),
            marked,
        };
        let label = match &example.label {
            None => {
                let labels = example.ids.iter().zip(&example.supervised);
                let label =
                    |(id, label): (&u32, &bool)| if *label { id.to_string() } else { dash() };
                let text = format!("{} supervised", example.supervised_tokens());
                return by_token(
                    text,
                    labels.map(label).collect(),
                    example.supervised.clone(),
                );
            }
            Some(Label::Tags(tags)) => {
                let column = tags_of(example, labels);
                let marked = column.iter().map(Option::is_some).collect();
                let column = column.into_iter().map(|tag| tag.unwrap_or_else(dash));
                return by_token(format!("{} tags", tags.len()), column.collect(), marked);
            }
            Some(Label::Class(class)) => format!("label {}", name_of(labels, *class)),
            Some(Label::Classes(classes)) => {
                let names = right(labels, classes);
                if names.is_empty() {
                    "no label".to_owned()
                } else {
                    format!("labels {}", names.join(", "))
                }
            }
            Some(Label::Values(values)) => {
                let values: Vec<String> = values.iter().map(f32::to_string).collect();
                format!("label {}", values.join(", "))
            }
        };
        let types = if example.token_types.is_empty() {
            Vec::new()
        } else {
            types_of(example).iter().map(u8::to_string).collect()
        };
        by_token(label, types, vec![false; count])
    }
}

/// A name without what would play with a terminal.
fn visible(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if c == ' ' {
            out.push(' ');
        } else {
            push_visible(c, &mut out);
        }
    }
    out
}

struct Page<'a> {
    out: &'a mut String,
    colour: bool,
    width: usize,
    /// Columns of the current line that are taken.
    column: usize,
    /// Whether what comes next is supervised.
    marked: bool,
}

impl Page<'_> {
    fn heading(&mut self, example: &Example, shown: &Shown) {
        let mut parts = vec![
            format!("line {}", example.line),
            format!("{} tokens", example.ids.len()),
            shown.label.clone(),
        ];
        if example.truncated > 0 {
            let place = if example.label.is_none() {
                " from the end"
            } else {
                ""
            };
            parts.push(format!("{} cut{place}", example.truncated));
        }
        self.style(BOLD);
        // Narrow terminals break between the parts.
        for (at, part) in parts.iter().enumerate() {
            let separator = if at + 1 < parts.len() { ", " } else { "" };
            if self.column > 0 && self.column + part.width() + separator.len() > self.width {
                self.line_break();
            }
            self.out.push_str(part);
            self.out.push_str(separator);
            self.column += part.width() + separator.len();
        }
        self.style(PLAIN);
        self.line_break();
    }

    fn text(&mut self, example: &Example, tokenizer: &Tokenizer, shown: &Shown) {
        let mut stream = tokenizer.decode_stream(false);
        for (id, marked) in example.ids.iter().zip(&shown.marked) {
            self.mark(*marked);
            let piece = stream.push(*id).unwrap_or_default();
            self.write(&piece);
        }
        let rest = stream.finish().unwrap_or_default();
        self.write(&rest);
        self.mark(false);
        if self.column > 0 {
            self.line_break();
        }
    }

    /// Begins or ends what is supervised.
    fn mark(&mut self, marked: bool) {
        if marked == self.marked {
            return;
        }
        self.marked = marked;
        if self.colour {
            self.style(if marked { MARK } else { PLAIN });
        } else {
            self.put(if marked { "[[" } else { "]]" });
        }
    }

    fn write(&mut self, text: &str) {
        for c in text.chars() {
            if c == '\n' {
                self.put("↵");
                self.line_break();
            } else if c == ' ' {
                self.put(" ");
            } else {
                let mut shown = String::new();
                push_visible(c, &mut shown);
                self.put(&shown);
            }
        }
    }

    fn put(&mut self, piece: &str) {
        let columns = piece.width();
        if self.column + columns > self.width {
            self.line_break();
        }
        self.out.push_str(piece);
        self.column += columns;
    }

    /// Marks do not run on to the terminal's edge.
    fn line_break(&mut self) {
        let again = self.colour && self.marked;
        if again {
            self.style(PLAIN);
        }
        self.out.push('\n');
        self.column = 0;
        if again {
            self.style(MARK);
        }
    }

    fn style(&mut self, code: &str) {
        if self.colour {
            self.out.push_str(code);
        }
    }

    /// As many columns of tokens as the terminal is wide.
    fn tokens(&mut self, example: &Example, tokenizer: &Tokenizer, shown: &Shown) {
        let numbers = example.ids.len().to_string().len();
        let largest = example.ids.iter().max().copied().unwrap_or(0);
        let ids = largest.to_string().len();
        // Tags have names, which a narrow terminal has no room for; other labels are as wide as ids.
        let widest = shown.column.iter().map(|label| label.width()).max();
        let most = (self.width / 3).max(ids);
        let labels = match (widest, &example.label) {
            (Some(_), None) => ids,
            (widest, _) => widest.unwrap_or(0).min(most),
        };
        // A position, an id, a label and a token, with spaces between.
        let label_and_space = if shown.column.is_empty() {
            0
        } else {
            labels + 1
        };
        let fixed = numbers + 1 + ids + 1 + label_and_space;
        let token = 14.min(self.width.saturating_sub(fixed)).max(4);
        let across = ((self.width + 2) / (fixed + token + 2)).max(1);
        let count = example.ids.len();
        let hidden = if count > 2 * LISTED {
            LISTED..count - LISTED
        } else {
            0..0
        };
        let mut in_line = 0;
        for at in 0..count {
            if hidden.contains(&at) {
                if at == hidden.start {
                    if in_line > 0 {
                        self.line_break();
                    }
                    self.style(FAINT);
                    self.write(&format!("… {} more …", hidden.len()));
                    self.style(PLAIN);
                    self.line_break();
                    in_line = 0;
                }
                continue;
            }
            let id = example.ids[at];
            let mut label = String::new();
            if let Some(text) = shown.column.get(at) {
                let text = fitted(text, labels);
                // Names may be wider than they have characters.
                label.push_str(&" ".repeat(labels.saturating_sub(text.width())));
                label.push_str(&text);
                label.push(' ');
            }
            let mut text = fitted(&tokenizer.token_text(id), token);
            let last = in_line + 1 == across || at + 1 == count || at + 1 == hidden.start;
            if !last {
                text.push_str(&" ".repeat(token + 2 - text.width()));
            }
            let (begin, end) = match (self.colour, shown.marked[at]) {
                (false, _) => ("", ""),
                (true, true) => ("\x1b[32m", PLAIN),
                (true, false) => (FAINT, PLAIN),
            };
            // Writing to a String cannot fail.
            let _ = write!(
                self.out,
                "{begin}{at:>numbers$} {id:>ids$} {label}{text}{end}"
            );
            in_line += 1;
            if last {
                self.line_break();
                in_line = 0;
            }
        }
    }
}

/// A token's text in at most `columns` columns, with spaces to be seen.
fn fitted(text: &str, columns: usize) -> String {
    let mut out = String::new();
    for c in text.chars() {
        let mut shown = String::new();
        match c {
            ' ' => shown.push('·'),
            '\n' => shown.push('↵'),
            c => push_visible(c, &mut shown),
        }
        if out.width() + shown.width() > columns {
            while out.width() + 1 > columns {
                out.pop();
            }
            out.push('…');
            break;
        }
        out.push_str(&shown);
    }
    out
}

/// A character, or its escape if it would move the cursor, change the terminal or not be seen.
fn push_visible(c: char, out: &mut String) {
    let unseen = c.width().unwrap_or(0) == 0 && !is_joining(c);
    let reordering = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if c == '\t' {
        out.push_str("\\t");
    } else if c == '\r' {
        out.push_str("\\r");
    } else if c.is_control() || unseen || reordering {
        out.extend(c.escape_unicode());
    } else {
        out.push(c);
    }
}

/// Marks and joiners that change the look of their neighbours.
fn is_joining(c: char) -> bool {
    matches!(c, '\u{200c}' | '\u{200d}' | '\u{fe00}'..='\u{fe0f}')
        || (c.width() == Some(0) && c.is_alphanumeric())
        || matches!(c, '\u{300}'..='\u{36f}' | '\u{1ab0}'..='\u{1aff}' | '\u{1dc0}'..='\u{1dff}' | '\u{20d0}'..='\u{20ff}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixture;

    fn example(prompt: &str, completion: &str) -> (Tokenizer, Example) {
        let tokenizer = fixture::tokenizer();
        let mut ids = tokenizer.encode(prompt, false).unwrap();
        let prompt_len = ids.len();
        ids.extend(tokenizer.encode(completion, false).unwrap());
        ids.push(tokenizer.eos_id());
        let supervised = (0..ids.len()).map(|at| at >= prompt_len).collect();
        let example = Example {
            ids,
            supervised,
            line: 3,
            truncated: 0,
            prompt_len,
            ..Example::default()
        };
        (tokenizer, example)
    }

    fn without_styles(text: &str) -> String {
        let mut out = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('\x1b') {
            out.push_str(before);
            rest = after.split_once('m').unwrap().1;
        }
        out + rest
    }

    #[test]
    fn what_is_learned_stands_in_brackets() {
        let (tokenizer, example) = example("Say hi:\n", " hi");
        let shown = render_preview(&[example], &tokenizer, None, false, 60);
        insta::assert_snapshot!(shown, @r"
        line 3, 12 tokens, 4 supervised
        Say hi:↵
        [[ hi<|im_end|>]]
         0  87   - S                1 101   - a
         2 125   - y                3  36   - ·
         4 108   - h                5 109   - i
         6  62   - :                7  14   - ↵
         8  36  36 ·                9 108 108 h
        10 109 109 i               11   2   2 <|im_end|>
        ");
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        let (tokenizer, example) = example(
            "日本語の長い文章 and a long word: ",
            "überlängenwörterbuch 👍🏽 e\u{301}",
        );
        for width in [0, 30, 47, 80, 200] {
            for colour in [false, true] {
                let shown = render_preview(
                    std::slice::from_ref(&example),
                    &tokenizer,
                    None,
                    colour,
                    width,
                );
                for line in without_styles(&shown).lines() {
                    assert!(
                        line.width() <= width.max(NARROWEST),
                        "{} > {width}: {line}",
                        line.width()
                    );
                }
            }
        }
    }

    #[test]
    fn colours_are_closed_on_every_line_and_data_cannot_bring_its_own() {
        let (tokenizer, example) = example("a\x1b[31mred\u{202e}", "one\ntwo");
        let shown = render_preview(&[example], &tokenizer, None, true, 40);
        for line in shown.lines() {
            assert!(!line.contains('\x1b') || line.ends_with(PLAIN), "{line:?}");
        }
        assert!(shown.contains("a\\u{1b}[31mred\\u{202e}"));
    }

    #[test]
    fn long_examples_are_shortened_in_the_list_only() {
        let (tokenizer, example) = example(&"z".repeat(300), "end");
        let shown = render_preview(std::slice::from_ref(&example), &tokenizer, None, false, 80);
        assert!(shown.contains("more …"));
        assert_eq!(
            shown.matches('z').count(),
            300 + LISTED + (LISTED - (example.ids.len() - 300))
        );
    }

    #[test]
    fn json_has_labels_as_pytorch_has_them() {
        let (tokenizer, example) = example("ab", "c");
        let value = preview_json(std::slice::from_ref(&example), &tokenizer, None);
        let [a, b, c, end] = example.ids[..] else {
            panic!("{example:?}")
        };
        assert_eq!(
            value,
            json!([{"line": 3, "ids": [a, b, c, end], "labels": [-100, -100, c, end],
                    "tokens": ["a", "b", "c", "<|im_end|>"], "truncated": 0, "prompt_len": 2, "supervised_tokens": 2}])
        );
    }

    fn labelled(label: Label) -> (Tokenizer, Example, Labels) {
        let tokenizer = fixture::tokenizer();
        let example = Example {
            ids: tokenizer.encode("ab hello", false).unwrap(),
            label: Some(label),
            line: 3,
            ..Example::default()
        };
        let labels = Labels {
            names: ["B-\x1bx", "O"].map(str::to_owned).to_vec(),
            problem_type: crate::data::ProblemType::SingleLabelClassification,
        };
        (tokenizer, example, labels)
    }

    #[test]
    fn rows_with_a_label_show_it() {
        let (tokenizer, mut example, labels) = labelled(Label::Class(1));
        let of = |example: &Example| {
            let example = std::slice::from_ref(example);
            (
                render_preview(example, &tokenizer, Some(&labels), false, 60),
                preview_json(example, &tokenizer, Some(&labels)),
            )
        };
        let (shown, json) = of(&example);
        insta::assert_snapshot!(shown, @r"
        line 3, 3 tokens, label O
        ab hello
        0 101 a               1 102 b
        2 264 ·hello
        ");
        assert_eq!(json[0]["label"], "O");
        assert_eq!(json[0]["token_type_ids"], json!([0, 0, 0]));
        example.token_types = vec![0, 0, 1];
        example.label = Some(Label::Classes(vec![0.0, 0.0]));
        example.truncated = 2;
        let (shown, json) = of(&example);
        insta::assert_snapshot!(shown, @r"
        line 3, 3 tokens, no label, 2 cut
        ab hello
        0 101 0 a               1 102 0 b
        2 264 1 ·hello
        ");
        assert_eq!(json[0]["label"], json!([]));
        example.label = Some(Label::Values(vec![2.5]));
        assert!(of(&example).0.contains("label 2.5"));
    }

    #[test]
    fn tags_stand_beside_their_tokens() {
        let (tokenizer, example, labels) = labelled(Label::Tags(vec![(0, 0), (2, 1)]));
        let example = std::slice::from_ref(&example);
        let shown = render_preview(example, &tokenizer, Some(&labels), false, 60);
        insta::assert_snapshot!(shown, @r"
        line 3, 3 tokens, 2 tags
        [[a]]b[[ hello]]
        0 101 B-\u{1b}x a
        1 102         - b
        2 264         O ·hello
        ");
        let json = preview_json(example, &tokenizer, Some(&labels));
        assert_eq!(json[0]["tags"], json!(["B-\x1bx", null, "O"]));
        for width in [0, 30, 47, 80] {
            let shown = render_preview(example, &tokenizer, Some(&labels), true, width);
            let wide = |line: &str| line.width() > width.max(NARROWEST);
            assert!(!without_styles(&shown).lines().any(wide), "{shown}");
        }
    }
}

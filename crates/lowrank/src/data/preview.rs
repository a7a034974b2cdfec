//! The exact tokens, labels and mask of examples, to be read before any training.

use std::fmt::Write as _;

use serde_json::{Value, json};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::example::Example;
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
/// with its position, its id and its label (`-` where the loss does not fall).
///
/// What is supervised is green and underlined with `colour`, and stands in `[[` and `]]` without. Control characters
/// of the data are written out, so that a file cannot play with the terminal.
pub fn render_preview(
    examples: &[Example],
    tokenizer: &Tokenizer,
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
        page.heading(example);
        page.text(example, tokenizer);
        page.tokens(example, tokenizer);
    }
    out
}

/// The same as JSON: a list with an object for each example. `labels` has -100 where the loss does not fall, as in
/// PyTorch.
pub fn preview_json(examples: &[Example], tokenizer: &Tokenizer) -> Value {
    let of_example = |example: &Example| {
        let labels: Vec<i64> = example
            .ids
            .iter()
            .zip(&example.supervised)
            .map(|(id, label)| if *label { i64::from(*id) } else { -100 })
            .collect();
        let tokens: Vec<String> = example
            .ids
            .iter()
            .map(|id| tokenizer.token_text(*id))
            .collect();
        json!({
            "line": example.line,
            "ids": example.ids,
            "labels": labels,
            "tokens": tokens,
            "truncated": example.truncated,
            "prompt_len": example.prompt_len,
            "supervised_tokens": example.supervised_tokens(),
        })
    };
    examples.iter().map(of_example).collect()
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
    fn heading(&mut self, example: &Example) {
        let mut parts = vec![
            format!("line {}", example.line),
            format!("{} tokens", example.ids.len()),
            format!("{} supervised", example.supervised_tokens()),
        ];
        if example.truncated > 0 {
            parts.push(format!("{} cut from the end", example.truncated));
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

    fn text(&mut self, example: &Example, tokenizer: &Tokenizer) {
        let mut stream = tokenizer.decode_stream(false);
        for (id, label) in example.ids.iter().zip(&example.supervised) {
            self.mark(*label);
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
    fn tokens(&mut self, example: &Example, tokenizer: &Tokenizer) {
        let numbers = example.ids.len().to_string().len();
        let largest = example.ids.iter().max().copied().unwrap_or(0);
        let ids = largest.to_string().len();
        // A position, an id, a label and a token, with spaces between.
        let fixed = numbers + 1 + ids + 1 + ids + 1;
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
            let label = if example.supervised[at] {
                id.to_string()
            } else {
                "-".to_owned()
            };
            let mut text = fitted(&tokenizer.token_text(id), token);
            let last = in_line + 1 == across || at + 1 == count || at + 1 == hidden.start;
            if !last {
                text.push_str(&" ".repeat(token + 2 - text.width()));
            }
            let (begin, end) = match (self.colour, example.supervised[at]) {
                (false, _) => ("", ""),
                (true, true) => ("\x1b[32m", PLAIN),
                (true, false) => (FAINT, PLAIN),
            };
            // Writing to a String cannot fail.
            let _ = write!(
                self.out,
                "{begin}{at:>numbers$} {id:>ids$} {label:>ids$} {text}{end}"
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
        let shown = render_preview(&[example], &tokenizer, false, 60);
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
                let shown =
                    render_preview(std::slice::from_ref(&example), &tokenizer, colour, width);
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
        let shown = render_preview(&[example], &tokenizer, true, 40);
        for line in shown.lines() {
            assert!(!line.contains('\x1b') || line.ends_with(PLAIN), "{line:?}");
        }
        assert!(shown.contains("a\\u{1b}[31mred\\u{202e}"));
    }

    #[test]
    fn long_examples_are_shortened_in_the_list_only() {
        let (tokenizer, example) = example(&"z".repeat(300), "end");
        let shown = render_preview(std::slice::from_ref(&example), &tokenizer, false, 80);
        assert!(shown.contains("more …"));
        assert_eq!(
            shown.matches('z').count(),
            300 + LISTED + (LISTED - (example.ids.len() - 300))
        );
    }

    #[test]
    fn json_has_labels_as_pytorch_has_them() {
        let (tokenizer, example) = example("ab", "c");
        let value = preview_json(std::slice::from_ref(&example), &tokenizer);
        let [a, b, c, end] = example.ids[..] else {
            panic!("{example:?}")
        };
        assert_eq!(
            value,
            json!([{"line": 3, "ids": [a, b, c, end], "labels": [-100, -100, c, end],
                    "tokens": ["a", "b", "c", "<|im_end|>"], "truncated": 0, "prompt_len": 2, "supervised_tokens": 2}])
        );
    }
}

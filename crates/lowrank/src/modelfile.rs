//! Ollama's Modelfile: a model, an adapter, the chat template in Go's language, and the texts that end an answer.
//!
//! A chat template is a program in Jinja, which nobody can rewrite in general. Its output for conversations of system, user and assistant is probed
//! here instead: what stands before each message depends, in nearly every template, on the role before it alone. What was found is compared with the template on
//! longer conversations, and where it differs, no template is written.

use std::fmt::Write as _;

use crate::data::{Message, Tokenizer};

/// What stands before each message of a conversation, and behind the last one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Turns {
    /// Before a system message, which is the first.
    system: String,
    /// Before a user's message that is the first, behind a system's, and behind an assistant's.
    user: [String; 3],
    /// Before an assistant's message, behind a user's.
    assistant: String,
    /// Behind the last message, a user's: what makes the assistant speak.
    answer: String,
    /// Whether conversations may begin with a system message.
    has_system: bool,
}

/// Contents that no template holds, which are not changed by a template that strips blanks.
const PROBES: [&str; 5] = ["Qprobe0Q", "Qprobe1Q", "Qprobe2Q", "Qprobe3Q", "Qprobe4Q"];

/// A Modelfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Modelfile {
    /// The file's text.
    pub text: String,
    /// Whether it has the model's chat template.
    pub has_template: bool,
}

/// A Modelfile for `from`, a path or the name of a model, with the tokenizer's template and ends, and with an adapter's path.
pub fn modelfile(from: &str, adapter: Option<&str>, tokenizer: &Tokenizer) -> Modelfile {
    let mut text = format!("FROM {from}\n");
    if let Some(adapter) = adapter {
        let _ = writeln!(text, "ADAPTER {adapter}");
    }
    let turns = Turns::of(tokenizer);
    match &turns {
        Some(turns) => {
            let _ = writeln!(text, "TEMPLATE \"\"\"{}\"\"\"", turns.in_go());
        }
        None if tokenizer.has_chat_template() => text.push_str(
            "# The model's chat template cannot be written in Ollama's language from its answers alone. Ollama knows many templates of models\n\
             # by itself; otherwise write a TEMPLATE here.\n",
        ),
        None => text.push_str("TEMPLATE \"\"\"{{ .Prompt }}\"\"\"\n"),
    }
    for id in tokenizer.stop_ids() {
        let _ = writeln!(
            text,
            "PARAMETER stop {}",
            quoted(&tokenizer.token_text(*id))
        );
    }
    Modelfile {
        text,
        has_template: turns.is_some(),
    }
}

impl Turns {
    /// Those of a tokenizer's template, where they say all of it.
    fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let bos = tokenizer.bos_id().filter(|_| tokenizer.adds_bos());
        let bos = bos.map(|id| tokenizer.token_text(id));
        let render = |roles: &[&str]| {
            let messages: Vec<Message> = roles
                .iter()
                .zip(PROBES)
                .map(|(role, probe)| Message::new(role, probe))
                .collect();
            let text = tokenizer.render_chat(&messages, None, true).ok()?;
            // Ollama puts the token in front that the tokenizer puts there.
            let stripped = bos.as_ref().and_then(|bos| text.strip_prefix(bos.as_str()));
            Some(stripped.map_or_else(|| text.clone(), str::to_owned))
        };
        let [first, answer] = between(&render(&["user"])?, 1)?.try_into().ok()?;
        let long = render(&["user", "assistant", "user"])?;
        let [_, assistant, user, _] = between(&long, 3)?.try_into().ok()?;
        let system = render(&["system", "user"]).and_then(|text| between(&text, 2));
        let system: Option<[String; 3]> = system.and_then(|parts| parts.try_into().ok());
        let has_system = system.is_some();
        let [system, behind, _] = system.unwrap_or_default();
        let turns = Self {
            system,
            user: [first, behind, user],
            assistant,
            answer,
            has_system,
        };
        let mut tests: Vec<&[&str]> = vec![
            &["user"],
            &["user", "assistant", "user"],
            &["user", "assistant", "user", "assistant", "user"],
        ];
        if has_system {
            tests.push(&["system", "user"]);
            tests.push(&["system", "user", "assistant", "user"]);
        }
        let says_all = tests
            .iter()
            .all(|roles| render(roles).is_some_and(|text| text == turns.write(roles)));
        says_all.then_some(turns)
    }

    /// A conversation of the probes.
    fn write(&self, roles: &[&str]) -> String {
        let mut text = String::new();
        let mut before = "";
        for (role, probe) in roles.iter().zip(PROBES) {
            text.push_str(match (*role, before) {
                ("system", _) => &self.system,
                ("user", "system") => &self.user[1],
                ("user", "assistant") => &self.user[2],
                ("user", _) => &self.user[0],
                _ => &self.assistant,
            });
            text.push_str(probe);
            before = role;
        }
        text + &self.answer
    }

    /// Go's `text/template`, as Ollama runs it.
    fn in_go(&self) -> String {
        let put = |text: &str| {
            if text.is_empty() {
                String::new()
            } else {
                format!("{{{{ {} }}}}", quoted(text))
            }
        };
        let mut go = "{{ $before := \"\" }}{{ range .Messages }}".to_owned();
        if self.has_system {
            let _ = write!(
                go,
                "{{{{ if eq .Role \"system\" }}}}{}{{{{ .Content }}}}{{{{ end }}}}",
                put(&self.system)
            );
        }
        let _ = write!(
            go,
            "{{{{ if eq .Role \"user\" }}}}{{{{ if eq $before \"assistant\" }}}}{}{{{{ else if eq $before \"system\" }}}}{}{{{{ else }}}}{}{{{{ end }}}}\
             {{{{ .Content }}}}{{{{ end }}}}{{{{ if eq .Role \"assistant\" }}}}{}{{{{ .Content }}}}{{{{ end }}}}{{{{ $before = .Role }}}}{{{{ end }}}}{}",
            put(&self.user[2]),
            put(&self.user[1]),
            put(&self.user[0]),
            put(&self.assistant),
            put(&self.answer),
        );
        go
    }
}

/// What stands before each of so many probes, and behind the last; `None` where one is missing or out of order.
fn between(text: &str, probes: usize) -> Option<Vec<String>> {
    let mut parts = Vec::new();
    let mut rest = text;
    for probe in &PROBES[..probes] {
        let (before, after) = rest.split_once(probe)?;
        parts.push(before.to_owned());
        rest = after;
    }
    parts.push(rest.to_owned());
    Some(parts)
}

/// A string of Go's, and of a Modelfile. Quotes are written as numbers, since three of them end a template.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for char in text.chars() {
        match char {
            '"' => quoted.push_str("\\u0022"),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            '\r' => quoted.push_str("\\r"),
            char => quoted.push(char),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixture;

    #[test]
    fn a_template_is_written_in_go() {
        let made = modelfile("./model.gguf", Some("./mine.gguf"), &fixture::tokenizer());
        assert!(made.has_template);
        assert_eq!(
            made.text,
            "FROM ./model.gguf\nADAPTER ./mine.gguf\n\
             TEMPLATE \"\"\"{{ $before := \"\" }}{{ range .Messages }}{{ if eq .Role \"system\" }}{{ \"<|im_start|>system\\n\" }}{{ .Content }}{{ end }}\
             {{ if eq .Role \"user\" }}{{ if eq $before \"assistant\" }}{{ \"<|im_end|>\\n<|im_start|>user\\n\" }}\
             {{ else if eq $before \"system\" }}{{ \"<|im_end|>\\n<|im_start|>user\\n\" }}\
             {{ else }}{{ \"<|im_start|>system\\nBe kind.<|im_end|>\\n<|im_start|>user\\n\" }}{{ end }}{{ .Content }}{{ end }}\
             {{ if eq .Role \"assistant\" }}{{ \"<|im_end|>\\n<|im_start|>assistant\\n\" }}{{ .Content }}{{ end }}{{ $before = .Role }}{{ end }}\
             {{ \"<|im_end|>\\n<|im_start|>assistant\\n\" }}\"\"\"\n\
             PARAMETER stop \"<|im_end|>\"\n"
        );
    }

    #[test]
    fn without_a_template_the_prompt_is_all() {
        let made = modelfile("m", None, &fixture::with_template(None));
        assert!(!made.has_template);
        assert!(
            made.text.contains("TEMPLATE \"\"\"{{ .Prompt }}\"\"\"\n"),
            "{}",
            made.text
        );
    }

    #[test]
    fn a_template_that_counts_is_not_guessed() {
        let counting =
            "{% for message in messages %}[{{ loop.index }}]{{ message['content'] }}{% endfor %}";
        let made = modelfile("m", None, &fixture::with_template(Some(counting)));
        assert!(
            !made.has_template && !made.text.contains("TEMPLATE \""),
            "{}",
            made.text
        );
        assert!(made.text.contains("cannot be written"), "{}", made.text);
    }

    #[test]
    fn a_template_without_a_system_s_turn_is_written() {
        let plain = "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}\
                     {{ '\"' + message['role'] + '\": ' + message['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}";
        let made = modelfile("m", None, &fixture::with_template(Some(plain)));
        assert!(
            made.has_template && !made.text.contains("\"system\\\""),
            "{}",
            made.text
        );
        assert!(
            made.text.contains("{{ \"\\u0022user\\u0022: \" }}"),
            "{}",
            made.text
        );
    }
}

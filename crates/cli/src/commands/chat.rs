//! `lowrank chat`: a conversation in the terminal.

use std::io::{BufRead, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use lowrank::base::Base;
use lowrank::data::{Message, Prompt};
use lowrank::generate::{Finish, GenerateOptions};

use super::common::{AdapterArg, Adapters, BaseArgs, ExactArgs};
use super::generate::{SamplingArgs, continue_on_screen};
use crate::failure::Misuse;
use crate::interrupt;
use crate::output::Output;
use crate::table::{bold, dim};

/// Arguments of `lowrank chat`.
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// The model
    #[command(flatten)]
    pub base: BaseArgs,

    /// How exactly tokens are generated
    #[command(flatten)]
    pub exact: ExactArgs,

    /// An adapter's folder, with a name if wanted; may be repeated, and the first is in use at the start
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<AdapterArg>,

    /// A system message before the conversation
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,

    /// How tokens are drawn
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// What a line that was typed means.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Line<'a> {
    /// Something said to the model.
    Say(&'a str),
    /// Use another adapter; `None` is the base alone.
    Adapter(Option<&'a str>),
    /// List the adapters.
    Adapters,
    /// Replace the system message; empty takes it away.
    System(&'a str),
    /// Forget the conversation.
    Reset,
    /// List the commands.
    Help,
    /// End.
    Quit,
    /// Nothing was typed.
    Nothing,
    /// A command that does not exist.
    Unknown(&'a str),
}

const HELP: &str = "\
/adapter NAME   answer with another adapter (none: the model alone)
/adapters       list the adapters
/system TEXT    set the system message and start over
/reset          start over
/quit           leave (or Ctrl-D, or Ctrl-C); during an answer, Ctrl-C ends the answer";

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Self {
        let line = line.trim();
        let Some(command) = line.strip_prefix('/') else {
            return if line.is_empty() {
                Self::Nothing
            } else {
                Self::Say(line)
            };
        };
        let (word, rest) = command
            .split_once(char::is_whitespace)
            .unwrap_or((command, ""));
        match (word, rest.trim()) {
            ("adapter", "") | ("adapters", _) => Self::Adapters,
            ("adapter", "none" | "base") => Self::Adapter(None),
            ("adapter", name) => Self::Adapter(Some(name)),
            ("system", text) => Self::System(text),
            ("reset" | "clear" | "new", _) => Self::Reset,
            ("help" | "?", _) => Self::Help,
            ("quit" | "exit" | "q", _) => Self::Quit,
            _ => Self::Unknown(word),
        }
    }
}

/// Answers a conversation; the library behind it, or a test.
trait Answer {
    /// The answer to `messages` with the adapter of that index, handed to `show` as it comes; true where Ctrl-C ended it.
    fn answer(
        &mut self,
        messages: &[Message],
        adapter: Option<usize>,
        show: &mut dyn FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<(String, Finish)>;
}

/// Runs the command.
///
/// # Errors
/// A model or adapter that cannot be used, or a model without a chat template.
pub fn run(args: &ChatArgs) -> anyhow::Result<()> {
    args.sampling.resolve(&[])?;
    let base = args.base.load(&AdapterArg::paths(&args.adapter))?;
    args.exact.apply(&base)?;
    if !base.tokenizer.has_chat_template() {
        return Err(Misuse::new(format!(
            "{} has no chat template, so it cannot hold a conversation; use lowrank generate --prompt",
            base.source
        ))
        .into());
    }
    let options = args.sampling.resolve(base.tokenizer.stop_ids())?;
    let adapters = Adapters::load(&args.adapter, &base)?;
    let names = adapters.names.clone();
    let stop = interrupt::install("ending this answer")?;
    // While there is no answer to end, a signal ends the program, as a second one during an answer does.
    stop.store(true, Ordering::SeqCst);
    let mut model = Model {
        base: &base,
        adapters: &adapters,
        options: &options,
        stop,
    };
    let output = Output::detect(false);
    let prompting = std::io::stdin().is_terminal();
    converse(
        std::io::stdin().lock(),
        &names,
        args.system.as_deref(),
        &mut model,
        &output,
        prompting,
        &mut |text| output.write(text),
    )
}

struct Model<'a> {
    base: &'a Base,
    adapters: &'a Adapters,
    options: &'a GenerateOptions,
    stop: &'static AtomicBool,
}

impl Answer for Model<'_> {
    fn answer(
        &mut self,
        messages: &[Message],
        adapter: Option<usize>,
        show: &mut dyn FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<(String, Finish)> {
        let prompt = Prompt::from_messages(&self.base.tokenizer, messages)?;
        let limit = self.base.decoder.config().max_position_embeddings;
        let taken = adapter.map_or(0, |index| {
            let all = self.adapters.all();
            all[index].virtual_tokens().total()
        });
        if prompt.ids.len() + taken >= limit {
            show("the conversation is longer than the model can take; start over with /reset")?;
            return Ok((String::new(), Finish::ContextFull));
        }
        self.stop.store(false, Ordering::SeqCst);
        let answer = continue_on_screen(
            prompt.ids,
            adapter,
            self.base,
            self.adapters,
            self.options,
            self.stop,
            show,
        );
        self.stop.store(true, Ordering::SeqCst);
        answer
    }
}

/// Reads lines until there are no more and answers them.
fn converse(
    mut input: impl BufRead,
    names: &[String],
    system: Option<&str>,
    model: &mut dyn Answer,
    output: &Output,
    prompting: bool,
    show: &mut dyn FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut adapter = (!names.is_empty()).then_some(0);
    let mut system = system.map(String::from);
    let mut messages = opening(system.as_deref());
    let note = |text: &str| format!("{}\n", dim(text, output.color));
    if prompting {
        show(&note("type a message, or /help"))?;
    }
    let mut bytes = Vec::new();
    loop {
        if prompting {
            let name = adapter.map_or("", |index| names[index].as_str());
            show(&bold(&format!("{name}> "), output.color))?;
        }
        bytes.clear();
        if input.read_until(b'\n', &mut bytes)? == 0 {
            break;
        }
        let line = match std::str::from_utf8(&bytes) {
            Ok(line) => line,
            Err(error) => {
                show(&note(&not_text(&bytes, error.valid_up_to())))?;
                continue;
            }
        };
        match Line::parse(line) {
            Line::Nothing => {}
            Line::Quit => break,
            Line::Help => show(&note(HELP))?,
            Line::Reset => messages = opening(system.as_deref()),
            Line::System(text) => {
                system = (!text.is_empty()).then(|| text.to_string());
                messages = opening(system.as_deref());
            }
            Line::Adapters => {
                let used = adapter.map_or("none", |index| names[index].as_str());
                let list = if names.is_empty() {
                    "none were given with --adapter".to_string()
                } else {
                    names.join(", ")
                };
                show(&note(&format!("adapters: {list}; in use: {used}")))?;
            }
            Line::Adapter(None) => adapter = None,
            Line::Adapter(Some(name)) => match names.iter().position(|known| known == name) {
                Some(index) => adapter = Some(index),
                None => show(&note(&format!(
                    "there is no adapter {name}; /adapters lists them"
                )))?,
            },
            Line::Unknown(word) => show(&note(&format!(
                "there is no command /{word}; /help lists them"
            )))?,
            Line::Say(text) => {
                messages.push(Message::new("user", text));
                let (answer, _) = model.answer(&messages, adapter, show)?;
                show("\n")?;
                messages.push(Message::new("assistant", &answer));
            }
        }
    }
    if prompting { show("\n") } else { Ok(()) }
}

/// About a line that is no text, as a terminal that is set to another encoding sends it.
fn not_text(line: &[u8], at: usize) -> String {
    // Characters before it, since a column is what an editor shows.
    let before = String::from_utf8_lossy(&line[..at]).chars().count();
    format!(
        "this line is not UTF-8 (byte 0x{:02X} at column {}) and was not sent; set the terminal, or what writes the lines, to UTF-8",
        line[at],
        before + 1
    )
}

fn opening(system: Option<&str>) -> Vec<Message> {
    system
        .map(|text| Message::new("system", text))
        .into_iter()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with the number of messages, the adapter and the last message in capitals.
    struct Echo;

    impl Answer for Echo {
        fn answer(
            &mut self,
            messages: &[Message],
            adapter: Option<usize>,
            show: &mut dyn FnMut(&str) -> anyhow::Result<()>,
        ) -> anyhow::Result<(String, Finish)> {
            let last = messages
                .last()
                .and_then(Message::content)
                .unwrap_or_default()
                .to_uppercase();
            let text = format!(
                "{}/{}/{last}",
                messages.len(),
                adapter.map_or(-1, |index| index as i32)
            );
            show(&text)?;
            Ok((text, Finish::Stop))
        }
    }

    fn talk(input: &str) -> String {
        talk_bytes(input.as_bytes())
    }

    fn talk_bytes(input: &[u8]) -> String {
        let names = ["formal".to_string(), "short".to_string()];
        let output = Output {
            json: false,
            color: false,
            width: 80,
        };
        let mut shown = String::new();
        converse(
            input,
            &names,
            Some("be kind"),
            &mut Echo,
            &output,
            false,
            &mut |text| {
                shown.push_str(text);
                Ok(())
            },
        )
        .unwrap();
        shown
    }

    #[test]
    fn lines_are_messages_or_commands() {
        assert_eq!(Line::parse("  hello "), Line::Say("hello"));
        assert_eq!(Line::parse("/adapter short"), Line::Adapter(Some("short")));
        assert_eq!(Line::parse("/adapter none"), Line::Adapter(None));
        assert_eq!(Line::parse("/adapter"), Line::Adapters);
        assert_eq!(Line::parse("/system be brief "), Line::System("be brief"));
        assert_eq!(Line::parse("/nope x"), Line::Unknown("nope"));
        assert_eq!(Line::parse(""), Line::Nothing);
    }

    #[test]
    fn a_conversation_goes_on_and_swaps_adapters() {
        insta::assert_snapshot!(
            talk("hi\n/adapter short\nagain\n/adapter none\nbare\n/adapter what\n/adapters\n/reset\nnew\n/system\nfree\n/quit\nnever\n"),
            @r#"
        2/0/HI
        4/1/AGAIN
        6/-1/BARE
        there is no adapter what; /adapters lists them
        adapters: formal, short; in use: none
        2/-1/NEW
        1/-1/FREE
        "#
        );
    }

    #[test]
    fn a_line_that_is_not_utf_8_is_refused_and_the_chat_goes_on() {
        let said = talk_bytes(b"\xc3\xa9t\xe9\nagain\r\nlast");
        insta::assert_snapshot!(said, @"
        this line is not UTF-8 (byte 0xE9 at column 3) and was not sent; set the terminal, or what writes the lines, to UTF-8
        2/0/AGAIN
        4/0/LAST
        ");
    }
}

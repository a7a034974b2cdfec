//! Finding calls in a text that comes in pieces.

use std::collections::HashSet;
use std::mem;

use serde_json::Value;

use super::{CalledFunction, Parsed, Tool, ToolCall, ToolForm, ToolKind};

/// Letters and digits, of which ids are made.
const SIGNS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Splits a text that comes in pieces into content and calls. What may still become a part of a call is held back.
#[derive(Debug)]
pub struct ToolStream {
    form: ToolForm,
    names: HashSet<String>,
    seed: u64,
    /// How many calls were found.
    found: u64,
    /// The text that is not yet content or a call.
    held: String,
    state: State,
    out: Out,
}

#[derive(Debug)]
enum State {
    /// Nothing but white space was there.
    Start,
    /// Content, up to the next marker.
    Text,
    /// The held text begins with the marker.
    Marked,
    /// The held text has JSON from `json` on that may be a call; what stands before it belongs to the call.
    Json { json: usize, scan: Scan },
    /// Behind a call.
    Behind,
}

impl ToolStream {
    /// A stream for a text of a model with this form. `seed` is what the calls' ids are made of.
    pub fn new(form: ToolForm, tools: &[Tool], seed: u64) -> Self {
        let names = tools.iter().map(|tool| tool.function.name.clone());
        Self {
            form,
            names: names.collect(),
            seed,
            found: 0,
            held: String::new(),
            state: State::Start,
            out: Out::default(),
        }
    }

    /// Takes the next piece of the text, and gives the content and the calls that are certain by now.
    pub fn push(&mut self, piece: &str) -> Parsed {
        self.held.push_str(piece);
        while self.step(false) {}
        self.out.take()
    }

    /// The rest, at the end of the text.
    pub fn finish(mut self) -> Parsed {
        while self.step(true) {}
        self.out.finish()
    }

    /// Goes one state on. False where that needs more text, or at the end of it.
    fn step(&mut self, is_last: bool) -> bool {
        match mem::replace(&mut self.state, State::Text) {
            State::Start => self.start(is_last),
            State::Text => self.text(is_last),
            State::Marked => self.marked(is_last),
            State::Json { json, scan } => self.json(json, scan, is_last),
            State::Behind => self.behind(is_last),
        }
    }

    /// Stays in a state until there is more text.
    fn wait(&mut self, state: State) -> bool {
        self.state = state;
        false
    }

    fn scan(&mut self, json: usize) -> bool {
        let scan = Scan::new(json);
        self.state = State::Json { json, scan };
        true
    }

    /// Makes the first bytes of the held text content.
    fn reject(&mut self, bytes: usize) -> bool {
        self.out.content(&self.held[..bytes]);
        self.held.drain(..bytes);
        true
    }

    fn start(&mut self, is_last: bool) -> bool {
        let text = self.held.trim_start();
        let json = self.held.len() - text.len();
        let marker = self.form.marker();
        if text.is_empty() || text.len() < marker.len() && marker.starts_with(text) {
            return is_last || self.wait(State::Start);
        }
        match self.form {
            ToolForm::Llama if text.starts_with('{') => self.scan(json),
            ToolForm::Mistral if text.starts_with('[') && !text.starts_with(marker) => {
                self.scan(json)
            }
            _ => true,
        }
    }

    fn text(&mut self, is_last: bool) -> bool {
        let marker = self.form.marker();
        if let Some(at) = self.held.find(marker) {
            self.reject(at);
            self.state = State::Marked;
            return true;
        }
        let kept = if is_last {
            0
        } else {
            let may_begin = |length: &usize| self.held.ends_with(&marker[..*length]);
            (1..marker.len()).rev().find(may_begin).unwrap_or(0)
        };
        self.reject(self.held.len() - kept);
        false
    }

    fn marked(&mut self, is_last: bool) -> bool {
        let marker = self.form.marker();
        let text = self.held[marker.len()..].trim_start();
        match text.bytes().next() {
            Some(b'{') => self.scan(self.held.len() - text.len()),
            Some(b'[') if self.form == ToolForm::Mistral => self.scan(self.held.len() - text.len()),
            None if !is_last => self.wait(State::Marked),
            _ => self.reject(marker.len()),
        }
    }

    fn json(&mut self, json: usize, mut scan: Scan, is_last: bool) -> bool {
        match scan.go_on(&self.held) {
            Scanned::Whole(end) => {
                let text = self.held[json..end].to_owned();
                let is_call = if text.starts_with('[') {
                    self.list(&text)
                } else {
                    self.call(&text)
                };
                if is_call {
                    self.held.drain(..end);
                    self.state = State::Behind;
                    true
                } else {
                    self.reject(end)
                }
            }
            Scanned::Open if !is_last => self.wait(State::Json { json, scan }),
            // What stands behind the first sign of it may still be a call.
            Scanned::Open | Scanned::Damaged => {
                let marker = self.form.marker();
                let is_marked = self.held.starts_with(marker);
                self.reject(if is_marked { marker.len() } else { json + 1 })
            }
        }
    }

    fn behind(&mut self, is_last: bool) -> bool {
        const CLOSE: &str = "</tool_call>";
        let text = self.held.trim_start();
        let space = self.held.len() - text.len();
        match self.form {
            ToolForm::Hermes if text.starts_with(CLOSE) => {
                self.held.drain(..space + CLOSE.len());
                true
            }
            ToolForm::Hermes if CLOSE.starts_with(text) => {
                if is_last {
                    self.held.clear();
                }
                is_last || self.wait(State::Behind)
            }
            ToolForm::Llama => {
                let next = text.strip_prefix(';').unwrap_or(text).trim_start();
                if next.starts_with('{') {
                    return self.scan(self.held.len() - next.len());
                }
                if next.is_empty() {
                    if is_last {
                        self.held.clear();
                    }
                    return is_last || self.wait(State::Behind);
                }
                true
            }
            ToolForm::Hermes | ToolForm::Mistral => true,
        }
    }

    /// Takes an object as a call, if it is one.
    fn call(&mut self, object: &str) -> bool {
        let Some(function) = self.function(object) else {
            return false;
        };
        let id = self.id();
        self.found += 1;
        self.out.call(ToolCall {
            id,
            kind: ToolKind::Function,
            function,
        });
        true
    }

    /// Takes the calls of a list, if one of its values is a call; the others become content.
    fn list(&mut self, list: &str) -> bool {
        if serde_json::from_str::<Vec<Value>>(list).is_err() {
            return false;
        }
        let values = parts(&list[1..list.len() - 1], b',');
        if !values.iter().any(|value| self.function(value).is_some()) {
            return false;
        }
        for value in values {
            if !self.call(value) {
                self.out.content(value);
            }
        }
        true
    }

    fn function(&self, object: &str) -> Option<CalledFunction> {
        let Ok(Value::Object(map)) = serde_json::from_str(object) else {
            return None;
        };
        let name = map.get("name")?.as_str()?;
        if !self.names.contains(name) {
            return None;
        }
        // Models that were trained on one key sometimes write the other.
        let own = self.form.arguments();
        let key = [own, "arguments", "parameters"]
            .into_iter()
            .find(|key| map.contains_key(*key));
        let arguments = match key.and_then(|key| Some((key, map.get(key)?))) {
            None | Some((_, Value::Null)) => "{}".to_owned(),
            Some((key, Value::Object(_))) => written(object, key)?.to_owned(),
            // Arguments that are text already, as in OpenAI's answers.
            Some((_, Value::String(text))) => {
                serde_json::from_str::<serde_json::Map<String, Value>>(text).ok()?;
                text.trim().to_owned()
            }
            Some(_) => return None,
        };
        Some(CalledFunction {
            name: name.to_owned(),
            arguments,
        })
    }

    /// The id of the next call. Mistral's templates refuse ids that are not nine letters and digits.
    fn id(&self) -> String {
        let (before, length) = match self.form {
            ToolForm::Mistral => ("", 9),
            ToolForm::Hermes | ToolForm::Llama => ("call_", 24),
        };
        let signs = (0..length).map(|at| {
            let drawn = mix(mix(self.seed, self.found), at);
            char::from(SIGNS[(drawn % SIGNS.len() as u64) as usize])
        });
        before.chars().chain(signs).collect()
    }
}

/// What was found since it was last taken.
#[derive(Debug, Default)]
struct Out {
    parsed: Parsed,
    /// White space that is content only if more content comes behind it.
    space: String,
    has_content: bool,
    /// Nothing but white space was there since the last call.
    is_behind_call: bool,
    /// White space behind the last call is left out, since some before it is kept or no content is there to keep apart.
    skips_space: bool,
}

impl Out {
    fn content(&mut self, text: &str) {
        let mut text = text;
        if self.skips_space {
            text = text.trim_start();
        }
        let solid = text.trim_end();
        if !solid.is_empty() {
            let content = self.parsed.content.get_or_insert_default();
            content.push_str(&self.space);
            content.push_str(solid);
            self.space.clear();
            self.has_content = true;
            self.is_behind_call = false;
            self.skips_space = false;
        }
        self.space.push_str(&text[solid.len()..]);
    }

    fn call(&mut self, call: ToolCall) {
        if !self.has_content {
            self.space.clear();
        }
        self.is_behind_call = true;
        self.skips_space = !self.has_content || !self.space.is_empty();
        self.parsed.calls.push(call);
    }

    fn take(&mut self) -> Parsed {
        mem::take(&mut self.parsed)
    }

    fn finish(mut self) -> Parsed {
        if !self.space.is_empty() && !self.is_behind_call {
            let content = self.parsed.content.get_or_insert_default();
            content.push_str(&self.space);
        }
        self.parsed
    }
}

/// How far an object or a list was read.
#[derive(Debug)]
struct Scan {
    at: usize,
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Scanned {
    /// It ends before this byte.
    Whole(usize),
    /// Its end is still to come.
    Open,
    /// It cannot be JSON.
    Damaged,
}

impl Scan {
    fn new(at: usize) -> Self {
        Self {
            at,
            depth: 0,
            in_string: false,
            is_escaped: false,
        }
    }

    /// Reads on from where it stopped. It sees brackets, strings and signs that JSON does not have; all else shows when the whole
    /// is parsed.
    fn go_on(&mut self, text: &str) -> Scanned {
        for byte in text.as_bytes()[self.at..].iter().copied() {
            self.at += 1;
            if self.in_string {
                match byte {
                    _ if self.is_escaped => self.is_escaped = false,
                    b'\\' => self.is_escaped = true,
                    b'"' => self.in_string = false,
                    0..0x20 => return Scanned::Damaged,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Scanned::Whole(self.at);
                    }
                }
                b' ' | b'\n' | b'\r' | b'\t' | b',' | b':' | b'+' | b'-' | b'.' => {}
                _ if byte.is_ascii_alphanumeric() => {}
                _ => return Scanned::Damaged,
            }
        }
        Scanned::Open
    }
}

/// The parts of a valid list's or object's inside, without white space around them.
fn parts(inside: &str, separator: u8) -> Vec<&str> {
    let (mut parts, mut from, mut depth) = (Vec::new(), 0, 0_usize);
    let (mut in_string, mut is_escaped) = (false, false);
    for (at, byte) in inside.bytes().enumerate() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ if byte == separator && depth == 0 => {
                parts.push(inside[from..at].trim());
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(inside[from..].trim());
    parts
}

/// The value of a key as a valid object has it; of two with the same key the last one, as a parser takes it.
fn written<'a>(object: &'a str, key: &str) -> Option<&'a str> {
    let inside = object.strip_prefix('{')?.strip_suffix('}')?;
    let value = parts(inside, b',').into_iter().rev().find_map(|pair| {
        let name = parts(pair, b':').first().copied()?;
        let is_key = serde_json::from_str::<String>(name).is_ok_and(|name| name == key);
        let value = pair[name.len()..].trim_start().strip_prefix(':')?;
        is_key.then_some(value)
    });
    value.map(str::trim)
}

/// SplitMix64's finaliser over both numbers.
fn mix(key: u64, place: u64) -> u64 {
    let mut z = key
        .wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

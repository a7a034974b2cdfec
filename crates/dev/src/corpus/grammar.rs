//! The little language that the text files beside this module are written in.
//!
//! A file holds tables of words, rules, and texts. A text has a cast, which binds each role to a row of a table, and
//! beats, each with several ways to say it. A way is a template: `[a|b]` chooses, `{n}` is the name in the first
//! column of role `n`, `{n.adj}` another of its columns, and `{#rule}` one of the ways of a rule. A row's own cells
//! are templates too, chosen once, so that a red ball stays red. People have the columns he, him, his, himself and boy.
//!
//! [`Grammar::parse`] checks every template against the cast it can meet, so that telling a text cannot fail.

use std::collections::BTreeMap;

use crate::random::Random;

/// What kind of document a text becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A story in the past tense.
    Story,
    /// A description in the present tense.
    Describe,
    /// A sentence or two, a question and its answer.
    Bit,
    /// Turns of a user and an assistant.
    Chat,
    /// A list of words to say again.
    List,
    /// One line of named fields.
    Cards,
    /// A prompt and its completion, for a task.
    Pair,
}

const KINDS: [(&str, Kind); 7] = [
    ("story", Kind::Story),
    ("describe", Kind::Describe),
    ("bit", Kind::Bit),
    ("chat", Kind::Chat),
    ("list", Kind::List),
    ("cards", Kind::Cards),
    ("pair", Kind::Pair),
];

/// Pronouns of a person, by the column's name.
const PRONOUNS: [(&str, &str, &str); 5] = [
    ("he", "she", "he"),
    ("him", "her", "him"),
    ("his", "her", "his"),
    ("himself", "herself", "himself"),
    ("boy", "girl", "boy"),
];

/// The roles that every text has without naming them.
const ALWAYS: [(&str, &str); 3] = [("h", "child"), ("f", "child"), ("g", "adult")];

/// One part of a text, and the ways to say it.
#[derive(Debug)]
pub(crate) struct Beat {
    optional: bool,
    ways: Vec<String>,
}

impl Beat {
    /// One of the ways.
    pub(crate) fn way(&self, random: &mut Random) -> &str {
        self.ways
            .get(random.below(self.ways.len()))
            .map_or("", String::as_str)
    }
}

#[derive(Debug)]
struct Role {
    slot: String,
    table: String,
    tags: Vec<String>,
}

/// A text: a cast and the beats that are told one after another.
#[derive(Debug)]
pub(crate) struct Text {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    /// The topic of a story, as in "tell me a story about …"; empty where there is none.
    pub(crate) about: String,
    /// Questions that the text answers, with the answers.
    pub(crate) asks: Vec<(String, String)>,
    cast: Vec<Role>,
    pub(crate) beats: Vec<Beat>,
}

#[derive(Debug)]
struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column == name)
    }

    fn has(&self, row: &[String], tags: &[String]) -> bool {
        let own = self
            .column("tags")
            .and_then(|at| row.get(at))
            .map_or("", String::as_str);
        tags.iter()
            .all(|tag| own.split_whitespace().any(|word| word == tag))
    }
}

/// The words that the roles of one text have been given, by slot (`n`, `n.adj`).
pub(crate) type Scene = BTreeMap<String, String>;

/// Tables, rules and texts.
#[derive(Debug, Default)]
pub(crate) struct Grammar {
    tables: BTreeMap<String, Table>,
    rules: BTreeMap<String, Vec<String>>,
    texts: Vec<Text>,
}

impl Grammar {
    /// Reads the files in the order given.
    ///
    /// # Errors
    /// The line, or the text, that is wrong, and why.
    pub(crate) fn parse(sources: &[&str]) -> Result<Self, String> {
        let mut grammar = Self::default();
        let mut section = Section::None;
        for line in sources.iter().flat_map(|source| source.lines()) {
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            section = match line.strip_prefix("  ") {
                Some(item) => grammar.item(section, item),
                None => grammar.heading(section, line.trim()),
            }
            .map_err(|why| format!("{why}: {line}"))?;
        }
        grammar.check()?;
        Ok(grammar)
    }

    /// The texts of one kind.
    pub(crate) fn texts(&self, kind: Kind) -> impl Iterator<Item = &Text> {
        self.texts.iter().filter(move |text| text.kind == kind)
    }

    /// What the rows of a table are called: the cells of its first column.
    pub(crate) fn nouns(&self, table: &str) -> impl Iterator<Item = &str> {
        let rows = self.tables.get(table).into_iter();
        rows.flat_map(|table| table.rows.iter().map(|row| row[0].as_str()))
    }

    fn heading(&mut self, section: Section, line: &str) -> Result<Section, String> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        if let Some(&(_, kind)) = KINDS.iter().find(|(name, _)| *name == word) {
            let cast = ALWAYS.map(|(slot, table)| Role {
                slot: slot.into(),
                table: table.into(),
                tags: vec![],
            });
            self.texts.push(Text {
                kind,
                name: rest.into(),
                about: String::new(),
                asks: vec![],
                cast: cast.into(),
                beats: vec![],
            });
            return Ok(Section::Text);
        }
        match word {
            "table" => {
                let (name, columns) = rest
                    .split_once(": ")
                    .ok_or("a table needs `name: column; column`")?;
                let columns = columns.split("; ").map(String::from).collect();
                self.tables.insert(
                    name.into(),
                    Table {
                        columns,
                        rows: vec![],
                    },
                );
                return Ok(Section::Table(name.into()));
            }
            "rule" => {
                self.rules.insert(rest.into(), vec![]);
                return Ok(Section::Rule(rest.into()));
            }
            _ => {}
        }
        let (Section::Text, Some(text)) = (&section, self.texts.last_mut()) else {
            return Err("this belongs to a text, and none has begun".into());
        };
        match word {
            "cast" => {
                for role in rest.split_whitespace() {
                    let (slot, table) = role.split_once('=').ok_or("a role is `slot=table`")?;
                    let (table, tags) = table.split_once('/').unwrap_or((table, ""));
                    let tags = tags
                        .split('+')
                        .filter(|tag| !tag.is_empty())
                        .map(String::from)
                        .collect();
                    text.cast.push(Role {
                        slot: slot.into(),
                        table: table.into(),
                        tags,
                    });
                }
            }
            "about" => text.about = rest.into(),
            "ask" => {
                let (question, answer) = rest
                    .split_once(" => ")
                    .ok_or("an ask is `question => answer`")?;
                text.asks.push((question.into(), answer.into()));
            }
            "beat" => text.beats.push(Beat {
                optional: false,
                ways: vec![],
            }),
            "maybe" => text.beats.push(Beat {
                optional: true,
                ways: vec![],
            }),
            _ => return Err("unknown word".into()),
        }
        Ok(section)
    }

    fn item(&mut self, section: Section, item: &str) -> Result<Section, String> {
        let outside = "an indented line outside of a table, a rule and a beat";
        match &section {
            Section::Table(name) => {
                let table = self.tables.get_mut(name).ok_or(outside)?;
                let mut row: Vec<String> =
                    item.split("; ").map(|cell| cell.trim().into()).collect();
                if row.len() > table.columns.len() {
                    return Err("more cells than columns".into());
                }
                row.resize(table.columns.len(), String::new());
                table.rows.push(row);
            }
            Section::Rule(name) => self.rules.get_mut(name).ok_or(outside)?.push(item.into()),
            Section::Text => {
                let beat = self
                    .texts
                    .last_mut()
                    .and_then(|text| text.beats.last_mut())
                    .ok_or(outside)?;
                beat.ways.push(item.trim_end().into());
            }
            Section::None => return Err(outside.into()),
        }
        Ok(section)
    }

    /// Gives every role of a text its words; no two roles share a row.
    pub(crate) fn cast(&self, text: &Text, random: &mut Random) -> Scene {
        let mut scene = Scene::new();
        let mut taken: Vec<&str> = vec![];
        for role in &text.cast {
            let Some(table) = self.tables.get(&role.table) else {
                continue;
            };
            let free: Vec<_> = table
                .rows
                .iter()
                .filter(|row| table.has(row, &role.tags) && !taken.contains(&row[0].as_str()))
                .collect();
            let Some(row) = free.get(random.below(free.len())) else {
                continue;
            };
            taken.push(&row[0]);
            for (column, cell) in table.columns.iter().zip(row.iter()) {
                let cell = self.expand(cell, &Scene::new(), random);
                if column == "gender" {
                    for (name, female, male) in PRONOUNS {
                        let word = if cell == "f" { female } else { male };
                        scene.insert(format!("{}.{name}", role.slot), word.into());
                    }
                }
                scene.insert(format!("{}.{column}", role.slot), cell);
            }
            scene.insert(role.slot.clone(), row[0].clone());
        }
        scene
    }

    /// The beats of a text, each told in one of its ways, as finished sentences.
    pub(crate) fn tell(&self, text: &Text, scene: &Scene, random: &mut Random) -> Vec<String> {
        let mut told = vec![];
        for beat in &text.beats {
            if !beat.optional || random.chance(50) {
                let way = beat.way(random);
                // A list is no sentence: it begins with a small letter.
                told.push(match text.kind {
                    Kind::List | Kind::Cards => self.expand(way, scene, random),
                    _ => self.say(way, scene, random),
                });
            }
        }
        told
    }

    /// One template as finished sentences.
    pub(crate) fn say(&self, template: &str, scene: &Scene, random: &mut Random) -> String {
        finish(&self.expand(template, scene, random))
    }

    /// One template with its choices made and its slots filled, and nothing else done to it.
    pub(crate) fn expand(&self, template: &str, scene: &Scene, random: &mut Random) -> String {
        let mut out = String::with_capacity(template.len());
        let mut rest = template;
        while let Some(at) = rest.find(['[', '{']) {
            out.push_str(&rest[..at]);
            let (inside, after) = split_bracket(&rest[at..]).unwrap_or((&rest[at..], ""));
            if rest[at..].starts_with('[') {
                let ways = split_choices(inside);
                out.push_str(&self.expand(ways[random.below(ways.len())], scene, random));
            } else if let Some(ways) = inside
                .strip_prefix('#')
                .and_then(|rule| self.rules.get(rule))
            {
                out.push_str(&self.expand(&ways[random.below(ways.len())], scene, random));
            } else if let Some(word) = scene.get(inside) {
                out.push_str(word);
            }
            rest = after;
        }
        out.push_str(rest);
        out
    }

    /// Every template of every text can be told with the cast that the text has.
    fn check(&self) -> Result<(), String> {
        for (name, table) in &self.tables {
            for cell in table.rows.iter().flatten() {
                self.check_template(cell, &[])
                    .map_err(|why| format!("table {name}: {why}"))?;
            }
        }
        for text in &self.texts {
            let fail = |why| format!("text {}: {why}", text.name);
            let mut slots = vec![];
            for (at, role) in text.cast.iter().enumerate() {
                let table = self
                    .tables
                    .get(&role.table)
                    .ok_or_else(|| fail(format!("no table {}", role.table)))?;
                let rivals = text.cast[..at]
                    .iter()
                    .filter(|other| other.table == role.table)
                    .count();
                if table
                    .rows
                    .iter()
                    .filter(|row| table.has(row, &role.tags))
                    .count()
                    <= rivals
                {
                    return Err(fail(format!("too few rows for the role {}", role.slot)));
                }
                slots.push(role.slot.clone());
                slots.extend(
                    table
                        .columns
                        .iter()
                        .map(|column| format!("{}.{column}", role.slot)),
                );
                if table.column("gender").is_some() {
                    slots.extend(
                        PRONOUNS
                            .iter()
                            .map(|(name, ..)| format!("{}.{name}", role.slot)),
                    );
                }
            }
            if text.beats.is_empty() || text.beats.iter().any(|beat| beat.ways.is_empty()) {
                return Err(fail(
                    "a text needs beats, and a beat needs ways to say it".into(),
                ));
            }
            let asks = text
                .asks
                .iter()
                .flat_map(|(question, answer)| [question, answer]);
            for template in text
                .beats
                .iter()
                .flat_map(|beat| &beat.ways)
                .chain(asks)
                .chain([&text.about])
            {
                self.check_template(template, &slots).map_err(fail)?;
            }
        }
        Ok(())
    }

    fn check_template(&self, template: &str, slots: &[String]) -> Result<(), String> {
        let mut rest = template;
        while let Some(at) = rest.find(['[', '{']) {
            let (inside, after) = split_bracket(&rest[at..])
                .ok_or_else(|| format!("an open bracket in `{template}`"))?;
            if rest[at..].starts_with('[') {
                for way in split_choices(inside) {
                    self.check_template(way, slots)?;
                }
            } else if let Some(rule) = inside.strip_prefix('#') {
                let ways = self.rules.get(rule).filter(|ways| !ways.is_empty());
                for way in ways.ok_or_else(|| format!("no rule {rule}"))? {
                    self.check_template(way, slots)?;
                }
            } else if !slots.iter().any(|slot| slot == inside) {
                return Err(format!("no slot {{{inside}}} for `{template}`"));
            }
            rest = after;
        }
        if rest.contains([']', '}']) {
            Err(format!("a stray bracket in `{template}`"))
        } else {
            Ok(())
        }
    }
}

/// Where the lines that follow belong.
enum Section {
    None,
    Table(String),
    Rule(String),
    Text,
}

/// Splits `[inside]after` or `{inside}after`, minding nested brackets.
fn split_bracket(text: &str) -> Option<(&str, &str)> {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '[' | '{' => depth += 1,
            ']' | '}' => {
                depth -= 1;
                if depth == 0 {
                    return Some((&text[1..at], &text[at + 1..]));
                }
            }
            _ => {}
        }
    }
    None
}

/// Splits at the bars that are not inside an inner bracket.
fn split_choices(text: &str) -> Vec<&str> {
    let mut ways = vec![];
    let (mut depth, mut start) = (0, 0);
    for (at, c) in text.char_indices() {
        match c {
            '[' | '{' => depth += 1,
            ']' | '}' => depth -= 1,
            '|' if depth == 0 => {
                ways.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    ways.push(&text[start..]);
    ways
}

/// Sets the spaces right, writes `an` where it belongs and capital letters where a sentence or a quotation begins.
pub(crate) fn finish(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut out = String::with_capacity(text.len() + 8);
    let mut quoted = false;
    for (at, word) in words.iter().enumerate() {
        let begins = at == 0 || out.ends_with(['.', '!', '?']);
        if at > 0 {
            out.push(' ');
        }
        let article = word.trim_start_matches('"');
        let an = article.eq_ignore_ascii_case("a")
            && words.get(at + 1).is_some_and(|next| takes_an(next));
        let mut capital = begins;
        for c in word.chars() {
            if c == '"' {
                quoted = !quoted;
                capital |= quoted;
                out.push(c);
            } else if capital && c.is_alphabetic() {
                out.extend(c.to_uppercase());
                capital = false;
            } else {
                out.push(c);
                capital = false;
            }
        }
        if an {
            out.push('n');
        }
    }
    out
}

/// Whether the article before this word is `an`.
pub(crate) fn takes_an(word: &str) -> bool {
    let word = word.to_lowercase();
    let sounds_like_a_consonant = ["one", "use", "uni"]
        .iter()
        .any(|start| word.starts_with(start));
    let silent = ["hour", "honest"]
        .iter()
        .any(|start| word.starts_with(start));
    silent || word.starts_with(['a', 'e', 'i', 'o', 'u']) && !sounds_like_a_consonant
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: &str = "table child: name; gender\n  Ann; f\n  Bob; m\ntable adult: name; gender\n  Dad; m\n\
                         table thing: noun; tags; adj\n  ball; toy; [red|old]\n  hat; wear; odd\n";

    fn told(beats: &str, seed: u64) -> Result<String, String> {
        let grammar = Grammar::parse(&[WORDS, "story test\ncast o=thing/toy\n", beats])?;
        let random = &mut Random::new(seed, 0);
        let text = grammar.texts(Kind::Story).next().ok_or("no story")?;
        let scene = grammar.cast(text, random);
        Ok(grammar.tell(text, &scene, random).join(" "))
    }

    #[test]
    fn slots_choices_and_articles() -> Result<(), String> {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..40 {
            seen.insert(told(
                "beat\n  {h.he} has a {o.adj} {o}[, and |, ]{h} said, \"{o.adj}!\"\n",
                seed,
            )?);
        }
        assert!(
            seen.contains("She has an old ball, and Ann said, \"Old!\""),
            "{seen:?}"
        );
        assert!(
            seen.contains("He has a red ball, Bob said, \"Red!\""),
            "{seen:?}"
        );
        assert_eq!(seen.len(), 8);
        Ok(())
    }

    #[test]
    fn mistakes_are_named() {
        for (beats, why) in [
            ("beat\n  {x} is here.\n", "no slot {x}"),
            ("beat\n  {#none}\n", "no rule none"),
            ("beat\n  [a|b\n", "open bracket"),
            ("beat\n  a]\n", "stray bracket"),
            ("beat\n", "ways to say it"),
            ("cast q=nothing\nbeat\n  a\n", "no table nothing"),
            ("cast q=thing/toy\nbeat\n  a\n", "too few rows"),
            ("bend\n", "unknown word"),
        ] {
            let message = told(beats, 0).expect_err(beats);
            assert!(message.contains(why), "{beats}: {message}");
        }
    }

    #[test]
    fn articles_follow_the_sound() {
        assert_eq!(
            finish("a owl saw a useful thing for a hour"),
            "An owl saw a useful thing for an hour"
        );
        assert_eq!(
            finish("it said,  \"a apple\" . and"),
            "It said, \"An apple\" . And"
        );
    }
}

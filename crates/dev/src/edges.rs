//! Which module of a crate uses which other, and whether ARCHITECTURE.md says so.
//!
//! A table there follows a line that begins with ``Inside the crate `NAME` ``. Its first column names modules in backticks, and its last one
//! lists what they know of: other modules of the crate, and crates of the workspace. A row whose list ends with `(known to all)`
//! is of modules that everybody may use without saying so. What the sources use and the table does not say is a complaint, so is the
//! reverse, and so is a circle.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result};

/// The document with the tables.
pub const DOCUMENT: &str = "ARCHITECTURE.md";
/// What the crates of the workspace are called in code, without the part that they share.
const CRATE: &str = "lowrank_";
const KNOWN_TO_ALL: &str = "(known to all)";

type Edges = BTreeMap<String, BTreeSet<String>>;

/// A table of modules.
#[derive(Debug, Default, PartialEq)]
struct Table {
    /// The folder's name below `crates/`.
    folder: String,
    knows: Edges,
    known_to_all: BTreeSet<String>,
}

/// What is wrong with the edges between modules, one line each.
///
/// # Errors
/// When a file cannot be read.
pub fn complaints(root: &Path) -> Result<Vec<String>> {
    let path = root.join(DOCUMENT);
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {DOCUMENT}"))?;
    let mut complaints = Vec::new();
    for table in tables(&text) {
        let source = root.join("crates").join(&table.folder).join("src");
        let found = sources(&source)?;
        complaints.extend(compare(&table, &used(&found)));
    }
    Ok(complaints)
}

/// The tables of the document.
fn tables(text: &str) -> Vec<Table> {
    let mut tables = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(name) = line
            .strip_prefix("Inside the crate `")
            .and_then(|rest| rest.split('`').next())
        else {
            continue;
        };
        let mut table = Table {
            folder: name.strip_prefix("lowrank-").unwrap_or(name).to_owned(),
            ..Table::default()
        };
        let rows = lines
            .by_ref()
            .skip_while(|line| !line.starts_with('|'))
            .take_while(|line| line.starts_with('|'))
            .skip(2);
        for row in rows {
            let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
            let (Some(modules), Some(known)) = (cells.first(), cells.last()) else {
                continue;
            };
            let to_all = known.ends_with(KNOWN_TO_ALL);
            let known: BTreeSet<String> = known
                .trim_end_matches(KNOWN_TO_ALL)
                .split(',')
                .map(|name| name.trim().trim_matches('`').to_owned())
                .filter(|name| !["", "nothing"].contains(&name.as_str()))
                .collect();
            for module in modules.split('`').skip(1).step_by(2) {
                let module = module.trim_end_matches('/').to_owned();
                if to_all {
                    table.known_to_all.insert(module.clone());
                }
                table.knows.insert(module, known.clone());
            }
        }
        tables.push(table);
    }
    tables
}

/// The path of each source file below `folder`, as modules, and its text.
fn sources(folder: &Path) -> Result<Vec<(Vec<String>, String)>> {
    let mut found = Vec::new();
    let mut folders = vec![(folder.to_path_buf(), Vec::new())];
    while let Some((folder, modules)) = folders.pop() {
        let entries = std::fs::read_dir(&folder);
        for entry in entries.with_context(|| format!("reading {}", folder.display()))? {
            let path = entry?.path();
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            let mut of_entry = modules.clone();
            if path.is_dir() {
                of_entry.push(name.into_owned());
                folders.push((path, of_entry));
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                if !["lib", "main", "mod"].contains(&&*name) {
                    of_entry.push(name.into_owned());
                }
                let text = std::fs::read_to_string(&path)
                    .with_context(|| format!("reading {}", path.display()))?;
                found.push((of_entry, text));
            }
        }
    }
    Ok(found)
}

/// Which module uses which, in sources outside of tests.
fn used(sources: &[(Vec<String>, String)]) -> Edges {
    let modules: BTreeSet<&str> = sources
        .iter()
        .filter_map(|(path, _)| path.first().map(String::as_str))
        .collect();
    let mut edges: Edges = modules
        .iter()
        .map(|module| ((*module).to_owned(), BTreeSet::new()))
        .collect();
    for (path, text) in sources {
        let is_test = path.last().is_some_and(|name| name == "tests");
        let Some(own) = path.first().filter(|_| !is_test) else {
            continue;
        };
        for name in names(path, &code(text)) {
            let other = name.strip_prefix(CRATE).map(ToOwned::to_owned);
            let other = other.or_else(|| modules.contains(&*name).then_some(name));
            if let Some(other) = other.filter(|other| other != own) {
                edges.entry(own.clone()).or_default().insert(other);
            }
        }
    }
    edges
}

/// A source without its comments and without its tests, which stand at the end.
fn code(text: &str) -> String {
    let before_tests = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    let lines = before_tests.lines();
    let lines = lines.filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Names at the root of the crate, and crates of the workspace, that code in the module of this path mentions.
fn names(path: &[String], code: &str) -> Vec<String> {
    let mut names = Vec::new();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    for (at, _) in code.match_indices("crate::") {
        if code[..at].chars().next_back().is_some_and(is_word) {
            continue;
        }
        names.extend(first_names(&code[at + "crate::".len()..]));
    }
    // A chain of `super::` may lead up to the root.
    let up = "super::".repeat(path.len());
    for (at, _) in code.match_indices(&up).filter(|_| !path.is_empty()) {
        let longer = code[..at].ends_with("super::");
        if !longer && !code[..at].chars().next_back().is_some_and(is_word) {
            names.extend(first_names(&code[at + up.len()..]));
        }
    }
    for (at, _) in code.match_indices(CRATE) {
        let rest = &code[at..];
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        if rest[end..].starts_with("::") {
            names.push(rest[..end].to_owned());
        }
    }
    names
}

/// The first name of a path, or of each path of a group in braces.
fn first_names(rest: &str) -> Vec<String> {
    let word = |text: &str| -> String {
        let word = text.trim_start().chars();
        word.take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    let Some(group) = rest.strip_prefix('{') else {
        return vec![word(rest)];
    };
    let (mut depth, mut names, mut start) = (1, Vec::new(), 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 || (depth == 1 && c == ',') {
            names.push(word(&group[start..at]));
            start = at + 1;
        }
        if depth == 0 {
            break;
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// What the table says otherwise than the sources, and circles.
fn compare(table: &Table, used: &Edges) -> Vec<String> {
    let nothing = BTreeSet::new();
    let folder = &table.folder;
    let mut complaints = Vec::new();
    for (module, others) in used {
        let Some(known) = table.knows.get(module) else {
            complaints.push(format!(
                "{DOCUMENT}: the table of {folder} has no row for the module {module}"
            ));
            continue;
        };
        for other in others.difference(known) {
            if !table.known_to_all.contains(other) {
                complaints.push(format!(
                    "{DOCUMENT}: {folder}/{module} uses {other}, which its row does not list"
                ));
            }
        }
    }
    for (module, known) in &table.knows {
        if !used.contains_key(module) {
            complaints.push(format!("{DOCUMENT}: {folder} has no module {module}"));
            continue;
        }
        for other in known.difference(used.get(module).unwrap_or(&nothing)) {
            complaints.push(format!(
                "{DOCUMENT}: {folder}/{module} does not use {other}, which its row lists"
            ));
        }
    }
    if let Some(circle) = circle(used) {
        complaints.push(format!(
            "{folder}: modules use each other in a circle: {}",
            circle.join(" → ")
        ));
    }
    complaints
}

/// Modules that use each other in a circle, if any do.
fn circle(edges: &Edges) -> Option<Vec<String>> {
    fn walk<'e>(edges: &'e Edges, path: &mut Vec<&'e str>, done: &mut BTreeSet<&'e str>) -> bool {
        let Some(&last) = path.last() else {
            return false;
        };
        for other in edges.get(last).into_iter().flatten() {
            if let Some(at) = path.iter().position(|name| name == other) {
                path.drain(..at);
                path.push(other);
                return true;
            }
            if !done.contains(other.as_str()) {
                path.push(other);
                if walk(edges, path, done) {
                    return true;
                }
                path.pop();
            }
        }
        done.insert(last);
        false
    }
    let mut done = BTreeSet::new();
    for module in edges.keys() {
        let mut path = vec![module.as_str()];
        if !done.contains(module.as_str()) && walk(edges, &mut path, &mut done) {
            return Some(path.into_iter().map(ToOwned::to_owned).collect());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
Inside the crate `lowrank-house`:

| Module | What it does | Knows of |
| --- | --- | --- |
| `roof/` | keeps rain out | wall, kernels |
| `wall` | carries | nothing |
| `error`, `units` | | formats (known to all) |

Inside no crate.
";

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(ToString::to_string).collect()
    }

    fn source(path: &[&str], text: &str) -> (Vec<String>, String) {
        (
            path.iter().map(ToString::to_string).collect(),
            text.to_owned(),
        )
    }

    #[test]
    fn a_table_is_read() {
        let [table] = &tables(TEXT)[..] else {
            panic!("one table")
        };
        assert_eq!(table.folder, "house");
        assert_eq!(table.knows["roof"], set(&["wall", "kernels"]));
        assert_eq!(table.knows["units"], set(&["formats"]));
        assert_eq!(table.known_to_all, set(&["error", "units"]));
    }

    #[test]
    fn uses_are_found_and_compared() {
        let roof = "//! [`x`](crate::cellar)\nuse lowrank_kernels::View;\nuse crate::{error::Error, wall::{self, Brick}};\n\
                    #[cfg(test)]\nmod tests {\n    use crate::cellar::X;\n}\n";
        let sources = [
            source(&[], "pub mod roof;"),
            source(&["roof"], roof),
            source(
                &["roof", "tile"],
                "use super::Slope; use crate::units::Metre;",
            ),
            source(&["wall"], ""),
            source(&["wall", "tests"], "use crate::roof::X;"),
            source(&["error"], "use lowrank_formats::E;"),
            source(&["units"], "fn f() -> lowrank_formats::E {}"),
            source(&["cellar"], ""),
        ];
        let mut used = used(&sources);
        assert_eq!(used["roof"], set(&["error", "kernels", "units", "wall"]));
        let table = &tables(TEXT)[0];
        assert_eq!(
            compare(table, &used),
            ["ARCHITECTURE.md: the table of house has no row for the module cellar"]
        );
        used.remove("cellar");
        used.insert("wall".to_owned(), set(&["roof"]));
        used.insert("roof".to_owned(), set(&["wall"]));
        assert_eq!(
            compare(table, &used),
            [
                "ARCHITECTURE.md: house/wall uses roof, which its row does not list",
                "ARCHITECTURE.md: house/roof does not use kernels, which its row lists",
                "house: modules use each other in a circle: roof → wall → roof"
            ]
        );
    }

    #[test]
    fn super_may_lead_to_the_root() {
        let sources = [
            source(&["a"], "use super::b::X;"),
            source(&["b", "c"], "use super::super::d::{X, Y}; use super::a::X;"),
            source(&["d"], ""),
        ];
        let used = used(&sources);
        assert_eq!(used["a"], set(&["b"]));
        assert_eq!(used["b"], set(&["d"]));
    }
}

//! Which module knows of which, held against what ARCHITECTURE.md says.
//!
//! The document's table of the crate `lowrank` has a row for modules and, in its last column, the names that they know of: other
//! modules, and the crates `kernels` and `formats`. Its line "Edges: a → b → {c, d}." says the same of the crates.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result};

/// Who knows of whom.
type Edges = BTreeMap<String, BTreeSet<String>>;

/// Below this heading stands the table of modules.
const TABLE: &str = "Inside the crate `lowrank`:";

/// Edges of the code that the document does not have, and edges of the document that the code does not have.
///
/// # Errors
/// A file that cannot be read.
pub fn complaints(root: &Path) -> Result<Vec<String>> {
    let read = |path: &Path| {
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let document = read(&root.join("ARCHITECTURE.md"))?;
    let source = root.join("crates/lowrank/src");
    let modules = declared(&read(&source.join("lib.rs"))?);
    let mut found = Edges::new();
    for module in &modules {
        found.entry(module.clone()).or_default();
    }
    for file in rust_files(&source)? {
        let inside = file.strip_prefix(&source)?;
        let Some(module) = module_of(inside).filter(|module| modules.contains(module)) else {
            continue;
        };
        let known = known_of(&read(&file)?, inside, &modules);
        found.entry(module).or_default().extend(known);
    }
    let mut complaints = compare("module", &found, &table(&document));
    let mut crates = Edges::new();
    for entry in std::fs::read_dir(root.join("crates"))? {
        let manifest = entry?.path().join("Cargo.toml");
        if manifest.is_file() {
            let text = read(&manifest)?;
            crates.extend([dependencies(&text)]);
        }
    }
    complaints.extend(compare("crate", &crates, &chains(&document)));
    Ok(complaints
        .into_iter()
        .map(|complaint| format!("ARCHITECTURE.md: {complaint}"))
        .collect())
}

fn compare(what: &str, found: &Edges, listed: &Edges) -> Vec<String> {
    let mut complaints = Vec::new();
    let none = BTreeSet::new();
    for (one, known) in found {
        if !listed.contains_key(one) && (what == "module" || !known.is_empty()) {
            complaints.push(format!("the {what} {one} is not listed"));
            continue;
        }
        let says = listed.get(one).unwrap_or(&none);
        for other in known.difference(says) {
            complaints.push(format!("{one} knows of {other}, which is not listed"));
        }
    }
    for (one, says) in listed {
        let Some(known) = found.get(one) else {
            complaints.push(format!("there is no {what} {one}"));
            continue;
        };
        for other in says.difference(known) {
            complaints.push(format!("{one} does not know of {other}, which is listed"));
        }
    }
    complaints
}

/// The rows of the table of modules. A row may be of several, which then know of the same.
fn table(document: &str) -> Edges {
    let after = document.split_once(TABLE).map_or("", |(_, after)| after);
    let rows = after.lines().skip_while(|line| !line.starts_with('|'));
    let mut edges = Edges::new();
    for row in rows.take_while(|line| line.starts_with('|')).skip(2) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let (Some(first), Some(last)) = (cells.first(), cells.last()) else {
            continue;
        };
        let known: BTreeSet<String> = names(last).filter(|name| name != "nothing").collect();
        for module in names(first) {
            // Modules of one row may know of each other.
            let others = known.iter().filter(|other| **other != module);
            edges
                .entry(module.clone())
                .or_insert_with(|| others.cloned().collect());
        }
    }
    edges
}

/// `a/`, b, c: the names alone.
fn names(cell: &str) -> impl Iterator<Item = String> + '_ {
    cell.split(',')
        .map(|name| name.trim().trim_matches('`').trim_end_matches('/'))
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
}

/// The edges of "Edges: a → b → {c, d}, and e → b."
fn chains(document: &str) -> Edges {
    let mut edges = Edges::new();
    let sentence = document
        .split_once("Edges: ")
        .and_then(|(_, after)| after.split_once('.'))
        .map_or("", |(sentence, _)| sentence);
    for chain in sentence.split(", and ") {
        let groups: Vec<Vec<String>> = chain
            .split('→')
            .map(|group| names(group.trim().trim_matches(['{', '}'])).collect())
            .collect();
        for pair in groups.windows(2) {
            for one in &pair[0] {
                edges
                    .entry(one.clone())
                    .or_default()
                    .extend(pair[1].iter().cloned());
            }
        }
    }
    edges
}

/// A crate and those of the workspace that it depends on, but for tests.
fn dependencies(manifest: &str) -> (String, BTreeSet<String>) {
    let short = |name: &str| name.trim_start_matches("lowrank-").to_owned();
    let mut name = String::new();
    let mut known = BTreeSet::new();
    let mut section = "";
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line;
        } else if section == "[package]"
            && name.is_empty()
            && let Some(text) = line.strip_prefix("name = ")
        {
            name = short(text.trim_matches('"'));
        } else if section == "[dependencies]" && line.starts_with("lowrank") {
            let end = line.find([' ', '=', '.']).unwrap_or(line.len());
            known.insert(short(&line[..end]));
        }
    }
    (name, known)
}

/// The modules that a lib.rs declares.
fn declared(lib: &str) -> BTreeSet<String> {
    lib.lines()
        .filter_map(|line| {
            let line = line.strip_prefix("pub ").unwrap_or(line);
            Some(line.strip_prefix("mod ")?.strip_suffix(';')?.to_owned())
        })
        .collect()
}

/// The module of a file below src.
fn module_of(inside: &Path) -> Option<String> {
    let first = inside.components().next()?.as_os_str().to_str()?;
    Some(first.trim_end_matches(".rs").to_owned())
}

fn rust_files(folder: &Path) -> Result<Vec<std::path::PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|end| end == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The modules and crates that a file names outside of its tests.
fn known_of(text: &str, inside: &Path, modules: &BTreeSet<String>) -> BTreeSet<String> {
    if inside.file_name().is_some_and(|name| name == "tests.rs") {
        return BTreeSet::new();
    }
    let code = code_of(text);
    let own = module_of(inside).unwrap_or_default();
    let mut known = BTreeSet::new();
    for name in ["kernels", "formats"] {
        if code.contains(&format!("lowrank_{name}::")) || code.contains(&format!("lowrank_{name};"))
        {
            known.insert(name.to_owned());
        }
    }
    let to_root = "super::".repeat(depth(inside));
    for root in ["crate::", to_root.as_str()] {
        for (at, _) in code.match_indices(root) {
            // `super::super::` holds `super::`, and belongs to a deeper file.
            let longer =
                code[..at].ends_with("super::") || code[at + root.len()..].starts_with("super::");
            if !longer {
                known.extend(first_names(&code[at + root.len()..]));
            }
        }
    }
    known.retain(|name| {
        *name != own && (modules.contains(name) || ["kernels", "formats"].contains(&name.as_str()))
    });
    known
}

/// How many `super::` lead from a file's module to the root of its crate.
fn depth(inside: &Path) -> usize {
    let parts = inside.components().count();
    let is_folder = inside.file_name().is_some_and(|name| name == "mod.rs");
    parts - usize::from(is_folder)
}

/// A file without its comments and without the tests at its end.
fn code_of(text: &str) -> String {
    let end = text.find("#[cfg(test)]\nmod ").unwrap_or(text.len());
    text[..end]
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| [line, "\n"])
        .collect()
}

/// The name that a path goes on with, or those of `{a::…, b}`.
fn first_names(path: &str) -> BTreeSet<String> {
    let name = |text: &str| -> String {
        text.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    let Some(group) = path.strip_prefix('{') else {
        return BTreeSet::from([name(path)]);
    };
    let mut found = BTreeSet::new();
    let (mut level, mut start) = (0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => level += 1,
            '}' if level == 0 => {
                found.insert(name(group[start..at].trim_start()));
                break;
            }
            '}' => level -= 1,
            ',' if level == 0 => {
                found.insert(name(group[start..at].trim_start()));
                start = at + 1;
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(ToString::to_string).collect()
    }

    const DOCUMENT: &str = "Edges: cli → lowrank → {kernels, formats}, and dev → lowrank. Nothing points back.\n\n\
        Inside the crate `lowrank`:\n\n| Module | What it does | Knows of |\n| --- | --- | --- |\n\
        | `model/` | the decoder | kernels, formats |\n| `base`, `hub` | what it is | model |\n| `fields/` | a, b | nothing |\n\nMore.\n";

    #[test]
    fn the_document_is_read() {
        let edges = table(DOCUMENT);
        assert_eq!(edges["model"], set(&["formats", "kernels"]));
        assert_eq!(
            (&edges["base"], &edges["hub"]),
            (&set(&["model"]), &set(&["model"]))
        );
        assert_eq!(edges["fields"], set(&[]));
        let crates = chains(DOCUMENT);
        assert_eq!(crates["cli"], set(&["lowrank"]));
        assert_eq!(crates["lowrank"], set(&["formats", "kernels"]));
        assert_eq!(crates["dev"], set(&["lowrank"]));
    }

    #[test]
    fn paths_of_code_are_found_and_those_of_tests_and_comments_are_not() {
        let modules = set(&["model", "train", "data", "plan", "report"]);
        let text = "//! See [`crate::plan`].\nuse crate::{Error, model::{A, B}, data};\nuse super::super::report::x;\n\
                    use super::near;\nuse lowrank_kernels::View;\n\n#[cfg(test)]\nmod tests {\n    use crate::plan::x;\n}\n";
        let found = |file: &str| known_of(text, Path::new(file), &modules);
        assert_eq!(
            found("train/step.rs"),
            set(&["data", "kernels", "model", "report"])
        );
        // There, super::super is train itself.
        assert_eq!(
            found("train/deep/step.rs"),
            set(&["data", "kernels", "model"])
        );
        assert_eq!(found("train/tests.rs"), set(&[]));
        let own = known_of(
            "use crate::model::A;\nuse super::plan;",
            Path::new("model/mod.rs"),
            &modules,
        );
        assert_eq!(own, set(&["plan"]));
    }

    #[test]
    fn both_directions_are_compared() {
        let edges = |list: &[(&str, &[&str])]| -> Edges {
            list.iter()
                .map(|(one, known)| ((*one).to_owned(), set(known)))
                .collect()
        };
        let found = edges(&[
            ("model", &["kernels"]),
            ("train", &["model", "plan"]),
            ("new", &[]),
        ]);
        let listed = edges(&[
            ("model", &["kernels"]),
            ("train", &["model", "data"]),
            ("old", &[]),
        ]);
        assert_eq!(
            compare("module", &found, &listed),
            [
                "the module new is not listed",
                "train knows of plan, which is not listed",
                "there is no module old",
                "train does not know of data, which is listed",
            ]
        );
    }

    #[test]
    fn manifests_are_read() {
        let manifest = "[package]\nname = \"lowrank-cli\"\n[dependencies]\nlowrank = { workspace = true }\nclap = \"4\"\n\
                        [dev-dependencies]\nlowrank-kernels = { workspace = true }\n[[test]]\nname = \"x\"\n";
        assert_eq!(
            dependencies(manifest),
            ("cli".to_owned(), set(&["lowrank"]))
        );
    }
}

//! Checks of the repository that no compiler makes.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// The most lines of a source file.
const LINES: usize = 800;

/// What is wrong with the tracked files below `root`, one line each; empty when nothing is.
///
/// # Errors
/// When git cannot list the files, or one cannot be read.
pub fn complaints(root: &Path) -> Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root)
        .output()
        .context("cannot run git")?;
    if !output.status.success() {
        bail!(
            "git ls-files failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let names = String::from_utf8(output.stdout).context("a file's name is not UTF-8")?;
    let mut complaints = vec![];
    for name in names.split('\0').filter(|name| !name.is_empty()) {
        let path = root.join(name);
        // A tracked file that was deleted but not yet committed is no matter of ours.
        let Ok(bytes) = std::fs::read(&path) else {
            continue;
        };
        if let Ok(text) = String::from_utf8(bytes) {
            complaints.extend(file(name, &text));
        }
    }
    Ok(complaints)
}

/// What is wrong with one text file.
fn file(name: &str, text: &str) -> Vec<String> {
    let extension = Path::new(name)
        .extension()
        .and_then(|extension| extension.to_str())
        .unwrap_or_default();
    let mut complaints = vec![];
    for (number, line) in (1..).zip(text.lines()) {
        let mut complain = |what: String| complaints.push(format!("{name}:{number}: {what}"));
        if let Some(path) = machine_path(line) {
            complain(format!(
                "a path of one machine ({path}); use a relative path or an environment variable"
            ));
        }
        if extension == "rs" {
            for mark in unfinished() {
                if line.contains(&mark) {
                    complain(format!("unfinished work ({mark})"));
                }
            }
        }
    }
    let count = text.lines().count();
    if ["rs", "py", "md"].contains(&extension) && count > LINES {
        complaints.push(format!(
            "{name}: {count} lines; split what has more than {LINES}"
        ));
    }
    if name == "Cargo.toml" {
        complaints.extend(
            unexplained(text)
                .into_iter()
                .map(|what| format!("{name}: {what}")),
        );
    } else if name.ends_with("/Cargo.toml") && !text.lines().any(|line| line == "[workspace]") {
        // A manifest that is a workspace of its own, as the fuzz targets', has no other place for its versions.
        complaints.extend(
            own_versions(text)
                .into_iter()
                .map(|what| format!("{name}: {what}")),
        );
    }
    complaints
}

/// The beginnings of paths that exist on one machine only. They are put together here, so that this file is tidy.
fn machine_path(line: &str) -> Option<String> {
    let folders = [
        "home", "root", "Users", "work", "tmp", "private", "mnt", "scratch",
    ];
    folders
        .iter()
        .map(|folder| format!("/{folder}/"))
        .find(|path| {
            line.match_indices(path.as_str()).any(|(at, _)| {
                // A folder of that name inside a relative path or a URL is no path of a machine.
                let before = line[..at].chars().next_back();
                !before.is_some_and(|c| c.is_alphanumeric() || "._-~*)}]>$".contains(c))
            })
        })
}

fn unfinished() -> Vec<String> {
    let macros = ["todo", "unimplemented", "dbg"].map(|name| format!("{name}!("));
    let words = [["FIX", "ME"], ["TO", "DO"], ["XX", "X"]].map(|halves| halves.concat());
    let ignored = ["#[ign", "ore"].concat();
    macros.into_iter().chain(words).chain([ignored]).collect()
}

/// Dependencies of the workspace without a reason: a comment behind or directly above. Crates of one family that stand
/// together share one, as do the crates below a heading that says they are for tests.
fn unexplained(manifest: &str) -> Vec<String> {
    let mut complaints = vec![];
    let (mut inside, mut tests, mut explained, mut family) = (false, false, false, String::new());
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            inside = line == "[workspace.dependencies]";
        } else if !inside || line.is_empty() {
            (tests, explained, family) = (false, false, String::new());
        } else if let Some(comment) = line.strip_prefix('#') {
            tests |= comment.contains("test");
            explained = true;
        } else {
            let name = line.split([' ', '=', '.']).next().unwrap_or_default();
            let own = line.contains("path =");
            let stem = name.split('-').next().unwrap_or_default();
            explained |= line.contains(" #") || stem == family;
            if !explained && !tests && !own {
                complaints.push(format!("{name} has no comment that says why it is there"));
            }
            family = if explained {
                stem.into()
            } else {
                String::new()
            };
            explained = false;
        }
    }
    complaints
}

/// Dependencies of a crate that do not take their version from the workspace.
fn own_versions(manifest: &str) -> Vec<String> {
    let mut complaints = vec![];
    let mut inside = false;
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            inside = line.ends_with("dependencies]");
        } else if inside
            && !line.is_empty()
            && !line.starts_with('#')
            && !line.contains("workspace = true")
        {
            complaints.push(format!(
                "`{line}`: versions belong into the root Cargo.toml"
            ));
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_a_machine_are_found_and_others_are_not() {
        let path = |folder: &str| format!("see \"/{folder}/x\"");
        for folder in ["home", "tmp", "work", "root", "Users"] {
            assert_eq!(file("a.md", &path(folder)).len(), 1, "{folder}");
        }
        let fine = format!("docs/{0}/x https://host.org/{0}/x ./{0}/x", "work");
        assert_eq!(file("a.md", &fine), [""; 0]);
    }

    #[test]
    fn unfinished_work_is_found_in_code_only() {
        for mark in unfinished() {
            assert_eq!(file("a.rs", &mark).len(), 1, "{mark}");
            assert_eq!(file("a.txt", &mark).len(), 0, "{mark}");
        }
    }

    #[test]
    fn long_files_are_found() {
        assert_eq!(file("a.rs", &"\n".repeat(LINES)).len(), 0);
        assert_eq!(file("a.rs", &"\n".repeat(LINES + 1)).len(), 1);
        assert_eq!(file("a.json", &"\n".repeat(LINES + 1)).len(), 0);
    }

    #[test]
    fn a_dependency_needs_a_reason() {
        let manifest = "[workspace.dependencies]\nown = { path = \"x\" }\n\n# products\ngemm-f32 = \"1\"\ngemm-common = \"1\"\n\
                        clap = \"4\"\nregex = \"1\" # patterns\n\n# tests\ninsta = \"1\"\nproptest = \"1\"\n\n[profile.dev]\na = 1\n";
        let found = file("Cargo.toml", manifest);
        assert!(found.len() == 1 && found[0].contains("clap"), "{found:?}");
    }

    #[test]
    fn versions_come_from_the_workspace() {
        let manifest =
            "[package]\nname = \"x\"\n[dependencies]\nclap = { workspace = true }\nregex = \"1\"\n";
        let found = file("crates/x/Cargo.toml", manifest);
        assert!(found.len() == 1 && found[0].contains("regex"), "{found:?}");
        let apart = format!("[workspace]\n{manifest}");
        assert_eq!(file("crates/x/fuzz/Cargo.toml", &apart), [""; 0]);
    }
}

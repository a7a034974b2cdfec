//! Completions and manual pages: made of the definitions of the arguments, so that they know every command and flag.

use std::fs;

use predicates::str::contains;

use crate::support::{Lab, lowrank, stderr_of};

#[test]
fn every_shell_gets_completions() {
    for (shell, expected) in [
        ("bash", "complete -F _lowrank"),
        ("zsh", "#compdef lowrank"),
        ("fish", "complete -c lowrank"),
        ("elvish", "edit:completion:arg-completer[lowrank]"),
        ("powershell", "Register-ArgumentCompleter"),
    ] {
        let assert = lowrank().args(["completions", shell]).assert();
        assert
            .success()
            .stderr("")
            .stdout(contains(expected))
            .stdout(contains("lora-alpha"))
            .stdout(contains("share-prompts"));
    }
    let error = stderr_of(&["completions", "tcsh"], 2);
    assert!(error.contains("bash") && error.contains("zsh"), "{error}");
}

#[test]
fn every_command_has_a_page() {
    let page = lowrank().arg("man").assert().success().stderr("");
    page.stdout(contains(".TH lowrank 1"))
        .stdout(contains("lowrank\\-train(1)"));
    let lab = Lab::new();
    let (folder, argument) = (lab.path("man/man1"), lab.arg("man/man1"));
    let write = || lowrank().args(["man", "--output", &argument]).assert();
    write().success().stdout("");
    for name in [
        "lowrank",
        "lowrank-train",
        "lowrank-model-import",
        "lowrank-man",
    ] {
        let page = fs::read_to_string(folder.join(format!("{name}.1"))).expect(name);
        assert!(page.contains(&format!(".TH {name} 1")), "{page}");
    }
    let train = fs::read_to_string(folder.join("lowrank-train.1")).expect("a page");
    assert!(train.contains("lora\\-alpha"), "{train}");
    // A second time replaces them.
    write().success();
}

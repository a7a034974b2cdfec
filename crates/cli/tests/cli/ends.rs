//! Signals, two runs in one folder, and machines that give no threads.
#![cfg(unix)]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::support::{Lab, lowrank, stderr_of, strs, write};

/// A training that goes on for longer than a test waits, once it has taken a step.
fn long_run(lab: &Lab, output: &str, wrap: &[&str]) -> Child {
    let program = assert_cmd::cargo::cargo_bin("lowrank");
    let mut args: Vec<String> = wrap.iter().map(ToString::to_string).collect();
    args.push(program.display().to_string());
    let six = lab.train(output, &[]);
    args.extend(six.into_iter().map(|arg| match arg.as_str() {
        "6" => "1000000".to_owned(),
        _ => arg,
    }));
    let child = Command::new(&args[0])
        .args(&args[1..])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    wait_for_steps(&lab.path(output), 2);
    child
}

fn wait_for_steps(folder: &Path, lines: usize) {
    let begun = Instant::now();
    let metrics = folder.join("metrics.jsonl");
    while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < lines {
        assert!(begun.elapsed() < Duration::from_secs(60), "no step");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn send(signal: &str, child: &Child) {
    let id = child.id().to_string();
    let sent = Command::new("kill").args([signal, &id]).status();
    assert!(sent.expect("kill can be run").success());
}

/// The exit code and what was said.
fn end(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().expect("it ends");
    let text = String::from_utf8(output.stderr).expect("messages are UTF-8");
    (output.status.code(), text)
}

/// Whether this process was started to ignore SIGHUP, as by `nohup`, which its children inherit.
fn ignores_hangups() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 != 0)
}

#[test]
fn a_signal_ends_a_run_in_good_order() {
    let lab = Lab::new();
    for (signal, code, name) in [
        ("-TERM", 143, "SIGTERM"),
        ("-HUP", 129, "SIGHUP"),
        ("-USR1", 138, "SIGUSR1"),
        ("-USR2", 140, "SIGUSR2"),
        ("-XCPU", 152, "SIGXCPU"),
    ] {
        if name == "SIGHUP" && ignores_hangups() {
            eprintln!(
                "skipped: these tests were started to ignore SIGHUP (nohup), and so is the program then"
            );
            continue;
        }
        let run = long_run(&lab, name, &[]);
        send(signal, &run);
        let (found, text) = end(run);
        assert_eq!(found, Some(code), "{text}");
        assert!(text.contains(&format!("stopped by {name}: ")), "{text}");
        assert!(text.contains("--resume"), "{text}");
        let checkpoints = lab.path(name).join("checkpoints");
        assert_eq!(fs::read_dir(checkpoints).expect("checkpoints").count(), 1);
        assert!(!lab.path(name).join(".lock").exists());
    }
}

#[test]
fn the_way_on_is_a_command_that_a_shell_reads() {
    let lab = Lab::new();
    let name = "a'b \"c\" $d;e";
    let run = long_run(&lab, name, &[]);
    send("-TERM", &run);
    let (_, text) = end(run);
    let (_, command) = text.split_once("go on with: lowrank").expect("a hint");
    let output = Command::new("sh")
        .args(["-c", &format!("printf '%s|' {command}")])
        .output()
        .expect("a shell");
    let words = String::from_utf8(output.stdout).expect("words");
    assert_eq!(words, format!("train|--output|{}|--resume|", lab.arg(name)));
}

#[test]
fn a_command_that_saves_nothing_ends_at_the_first_signal() {
    let lab = Lab::new();
    let program = assert_cmd::cargo::cargo_bin("lowrank");
    let mut eval = Command::new(&program)
        .args(["eval", "--model", &lab.arg("model"), "--data=-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let pipe = eval.stdin.take();
    std::thread::sleep(Duration::from_millis(700));
    send("-TERM", &eval);
    let (code, text) = end(eval);
    drop(pipe);
    assert_eq!(code, Some(143), "{text}");
    assert!(text.contains("stopped by SIGTERM"), "{text}");

    // A demonstration that was stopped is not in the way of the next.
    let folder = lab.path("demo");
    let demo = Command::new(&program)
        .args(["demo", "--quiet", "--output", &lab.arg("demo")])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let begun = Instant::now();
    while !folder.join("cards/metrics.jsonl").exists()
        && !folder.join("report/metrics.jsonl").exists()
    {
        assert!(begun.elapsed() < Duration::from_secs(60), "no training");
        std::thread::sleep(Duration::from_millis(10));
    }
    send("-TERM", &demo);
    let (code, text) = end(demo);
    assert_eq!(code, Some(143), "{text}");
    assert!(!folder.exists(), "{text}");
}

#[test]
fn a_limit_on_the_size_of_files_is_an_error() {
    let lab = Lab::new();
    let output = Command::new("bash")
        .args(["-c", "ulimit -f 2; exec \"$0\" \"$@\""])
        .arg(assert_cmd::cargo::cargo_bin("lowrank"))
        .args(lab.train("run", &["--save-steps=1"]))
        .output()
        .expect("bash can be run");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("error: ") && text.contains("File too large"),
        "{text}"
    );
}

#[test]
fn a_run_that_lost_its_lock_stops() {
    let lab = Lab::new();
    let first = long_run(&lab, "run", &[]);
    fs::remove_file(lab.path("run/.lock")).expect("a lock");
    lowrank()
        .args(lab.train("run", &["--overwrite"]))
        .assert()
        .success();
    let (code, text) = end(first);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("another run may be writing"), "{text}");
    let lines = fs::read_to_string(lab.path("run/metrics.jsonl")).expect("metrics");
    assert_eq!(lines.lines().count(), 8, "six steps and two evaluations");
}

#[test]
fn what_is_deleted_during_a_run_is_noticed() {
    let lab = Lab::new();
    let run = long_run(&lab, "gone", &[]);
    fs::rename(lab.path("gone"), lab.path("moved")).expect("moved");
    let (code, text) = end(run);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("was deleted or moved away"), "{text}");
    assert!(!lab.path("gone").exists());

    let run = long_run(&lab, "run", &[]);
    fs::remove_file(lab.path("run/metrics.jsonl")).expect("metrics");
    wait_for_steps(&lab.path("run"), 2);
    send("-TERM", &run);
    let (code, text) = end(run);
    assert_eq!(code, Some(143), "{text}");
    assert!(
        text.contains("metrics.jsonl was deleted or moved away"),
        "{text}"
    );
    assert!(lab.path("run/report.html").exists());
}

#[test]
fn nohup_keeps_its_promise() {
    let lab = Lab::new();
    let ignore = ["sh", "-c", "trap '' HUP; exec \"$0\" \"$@\""];
    let run = long_run(&lab, "kept", &ignore);
    send("-HUP", &run);
    let lines = fs::read_to_string(lab.path("kept/metrics.jsonl"))
        .expect("metrics")
        .lines()
        .count();
    wait_for_steps(&lab.path("kept"), lines + 50);
    send("-TERM", &run);
    assert_eq!(end(run).0, Some(143));
}

#[test]
fn a_folder_has_one_run() {
    let lab = Lab::new();
    let first = long_run(&lab, "run", &[]);
    std::os::unix::fs::symlink(lab.path("run"), lab.path("link")).expect("a link");
    let before = fs::read(lab.path("run/config.yaml")).expect("config.yaml");
    for output in ["run", "link"] {
        for more in [&["--overwrite", "--r=4"][..], &["--resume"], &[]] {
            let text = stderr_of(&strs(&lab.train(output, more)), 2);
            let said = format!("another run (process {}) is writing to", first.id());
            assert!(text.contains(&said), "{text}");
        }
    }
    assert_eq!(
        fs::read(lab.path("run/config.yaml")).expect("config.yaml"),
        before
    );
    // Killed, it leaves the file, but no lock.
    send("-KILL", &first);
    end(first);
    assert!(lab.path("run/.lock").exists());
    let args = lab.train("run", &["--overwrite"]);
    lowrank().args(&args).assert().success();
    assert!(!lab.path("run/.lock").exists());
    assert!(lab.path("run/adapter_config.json").exists());
}

#[test]
fn a_comparison_passes_a_signal_on() {
    let lab = Lab::new();
    let yaml = format!(
        "model: {}\ndata: {}\ntrain: {{max_steps: 1000000}}\nmethods: [{{method: lora, r: 2, learning_rate: 1e-3}}]\n",
        lab.arg("model"),
        lab.arg("data")
    );
    let config = write(&lab.path(""), "compare.yaml", yaml);
    let output = lab.arg("compared");
    let compare = Command::new(assert_cmd::cargo::cargo_bin("lowrank"))
        .args(["compare", &config, "--output", &output, "--stages=train"])
        .args(["--threads=1", "--quiet"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let run = lab.path("compared/runs/lora-r-2/seed-42");
    wait_for_steps(&run, 3);
    send("-TERM", &compare);
    let (code, text) = end(compare);
    assert_eq!(code, Some(143), "{text}");
    assert!(text.contains("what is finished is kept"), "{text}");
    // The training has saved what it had, and has ended.
    let checkpoints = fs::read_dir(run.join("checkpoints")).expect("checkpoints");
    assert_eq!(checkpoints.count(), 1);
    assert!(!run.join(".lock").exists());
}

#[test]
fn more_threads_than_processors_are_not_started() {
    let lab = Lab::new();
    let args = ["--model", &lab.arg("model"), "--data", &lab.arg("data")];
    let assert = lowrank()
        .arg("eval")
        .args(args)
        .arg("--threads=1000000")
        .assert()
        .success();
    let text = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(text.contains("--threads is 1000000"), "{text}");
    for rubbish in ["x", "-3", "0"] {
        let mut eval = lowrank();
        eval.env("RAYON_NUM_THREADS", rubbish);
        eval.arg("eval").args(args).assert().success();
    }
    let text = stderr_of(&[&["eval"][..], &args, &["--threads=0"]].concat(), 2);
    assert!(text.contains("--threads must be 1 or greater"), "{text}");
}

#[test]
fn the_environment_may_name_a_lesser_processor() {
    let lab = Lab::new();
    let args = ["--model", &lab.arg("model"), "--data", &lab.arg("data")];
    let eval = |name: &str| {
        let mut eval = lowrank();
        eval.env("LOWRANK_CPU", name).arg("eval").args(args);
        eval.assert()
    };
    // Unset, or any processor's least.
    for name in ["", "portable"] {
        eval(name).success();
    }
    let refused = eval("z80").code(2);
    let text = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
    let expected = "LOWRANK_CPU=z80: this processor can be portable";
    assert!(text.contains(expected), "{text}");
}

#[test]
fn ctrl_c_ends_a_chat_that_waits_for_a_message() {
    use std::io::{BufRead, BufReader, Write};
    let lab = Lab::new();
    let mut chat = Command::new(assert_cmd::cargo::cargo_bin("lowrank"))
        .args([
            "chat",
            "--model",
            &lab.arg("model"),
            "--max-new-tokens",
            "3",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut input = chat.stdin.take().expect("a pipe");
    input.write_all(b"/adapters\n").expect("it reads");
    let mut answer = String::new();
    let mut output = BufReader::new(chat.stdout.take().expect("a pipe"));
    output.read_line(&mut answer).expect("it answers");
    send("-INT", &chat);
    let begun = Instant::now();
    while chat.try_wait().expect("a state").is_none() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
    let (code, text) = end(chat);
    assert_eq!(code, Some(130), "{text}");
    assert!(!text.contains("ending this answer"), "{text}");
    drop(input);
}

#[test]
fn a_training_ends_with_the_comparison_that_started_it() {
    let lab = Lab::new();
    let text = format!(
        "model: {}\ndata: {}\ntrain: {{max_steps: 1000000, batch_size: 4}}\nmethods:\n  - {{method: lora, r: 2}}\n",
        lab.arg("model"),
        lab.arg("data")
    );
    let config = write(&lab.path("."), "long.yaml", text);
    let compare = || {
        Command::new(assert_cmd::cargo::cargo_bin("lowrank"))
            .args([
                "compare",
                &config,
                "--output",
                &lab.arg("out"),
                "--stages=train",
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts")
    };
    let run = lab.path("out/runs/lora-r-2/seed-42");
    let first = compare();
    wait_for_steps(&run, 2);
    send("-KILL", &first);
    end(first);
    // Its lock goes when it has saved what it has.
    let begun = Instant::now();
    while run.join(".lock").exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
    let steps = fs::read_dir(run.join("checkpoints")).expect("checkpoints");
    assert_eq!(steps.count(), 1);
    let lines = fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    // The same command goes on with it.
    let second = compare();
    wait_for_steps(&run, lines.lines().count() + 1);
    send("-TERM", &second);
    let (code, text) = end(second);
    assert_eq!(code, Some(143), "{text}");
}

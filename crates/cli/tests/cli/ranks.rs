//! Training on several ranks, under each MPI that is installed: the bits of one rank, and what ends a job.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::support::{Lab, lowrank, strs, write};

/// The launcher of an MPI, and the library that belongs to it.
#[derive(Clone, Copy)]
struct Mpi {
    launcher: &'static str,
    flags: &'static [&'static str],
    library: &'static str,
}

const MPIS: [Mpi; 2] = [
    Mpi {
        launcher: "mpirun.openmpi",
        flags: &["--oversubscribe", "--bind-to", "none"],
        library: "libmpi.so.40",
    },
    Mpi {
        launcher: "mpirun.mpich",
        flags: &["-bind-to", "none"],
        library: "libmpich.so.12",
    },
];

/// Those of which the launcher is there, under the names that Debian gives them.
fn installed() -> Vec<Mpi> {
    let is_there = |mpi: &Mpi| {
        let version = Command::new(mpi.launcher).arg("--version").output();
        version.is_ok_and(|output| output.status.success())
    };
    let found: Vec<Mpi> = MPIS.into_iter().filter(is_there).collect();
    if found.is_empty() {
        eprintln!("skipped: there is neither mpirun.openmpi nor mpirun.mpich");
    }
    found
}

/// A launcher with its ranks. They are gone when it goes out of scope, whatever became of them.
struct Job {
    launcher: Child,
    output: PathBuf,
    folder: PathBuf,
}

/// What a job came to.
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
    after: Duration,
}

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(90);

impl Job {
    /// Starts so many ranks of a training.
    fn start(mpi: Mpi, lab: &Lab, ranks: usize, args: &[String]) -> Self {
        Self::of_groups(mpi, lab, &[(ranks, args)], &[])
    }

    /// Starts groups of ranks, each with arguments of its own, and more variables in the environment.
    fn of_groups(
        mpi: Mpi,
        lab: &Lab,
        groups: &[(usize, &[String])],
        variables: &[(&str, &str)],
    ) -> Self {
        let mut args: Vec<String> = mpi.flags.iter().map(ToString::to_string).collect();
        for (group, (ranks, of_group)) in groups.iter().enumerate() {
            if group > 0 {
                args.push(":".to_owned());
            }
            let program = assert_cmd::cargo::cargo_bin("lowrank");
            args.extend(["-n".to_owned(), ranks.to_string()]);
            args.push(program.display().to_string());
            args.extend(of_group.iter().cloned());
        }
        let given = groups[0].1;
        let at = given.iter().position(|arg| arg == "--output");
        let output = PathBuf::from(&given[at.expect("a run has a folder") + 1]);
        let folder = lab.path("");
        let stream = |name: &str| File::create(folder.join(name)).expect("a file can be made");
        let launcher = Command::new(mpi.launcher)
            .args(args)
            .env_remove("RUST_LOG")
            .env_remove("LOWRANK_MPI")
            // Containers are where tests run as root.
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .env("OMPI_MCA_btl_vader_single_copy_mechanism", "none")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(stream("stdout"))
            .stderr(stream("stderr"))
            .spawn()
            .expect("the launcher starts");
        Self {
            launcher,
            output,
            folder,
        }
    }

    /// The processes of the ranks: their numbers, and their ids.
    fn ranks(&self) -> Vec<(usize, u32)> {
        let output = self.output.display().to_string();
        let processes = fs::read_dir("/proc").expect("/proc").flatten();
        let rank = |folder: &Path| {
            let read = |name: &str| fs::read(folder.join(name)).unwrap_or_default();
            let command = String::from_utf8_lossy(&read("cmdline")).into_owned();
            let mut words = command.split('\0');
            // The launcher has the same arguments behind its own.
            if !words.next()?.ends_with("lowrank") || !words.any(|word| word == output) {
                return None;
            }
            let environment = String::from_utf8_lossy(&read("environ")).into_owned();
            let rank = environment.split('\0').find_map(|variable| {
                variable
                    .strip_prefix("OMPI_COMM_WORLD_RANK=")
                    .or_else(|| variable.strip_prefix("PMI_RANK="))
            });
            let id = folder.file_name()?.to_str()?.parse().ok()?;
            Some((rank?.parse().ok()?, id))
        };
        processes.filter_map(|entry| rank(&entry.path())).collect()
    }

    /// Waits until metrics.jsonl has so many lines.
    fn wait_for_steps(&mut self, lines: usize) {
        let begun = Instant::now();
        let metrics = self.output.join("metrics.jsonl");
        while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < lines {
            let ended = self.launcher.try_wait().expect("a child").is_some();
            assert!(!ended && begun.elapsed() < DEADLINE, "{}", self.stderr());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn signal_rank(&self, signal: &str, rank: usize) {
        let ranks = self.ranks();
        let (_, id) = ranks
            .iter()
            .find(|(number, _)| *number == rank)
            .unwrap_or_else(|| panic!("no rank {rank} among {ranks:?}"));
        send(signal, *id);
    }

    fn stderr(&self) -> String {
        fs::read_to_string(self.folder.join("stderr")).unwrap_or_default()
    }

    /// Waits for the launcher, and sees that no rank is left behind.
    fn end(mut self) -> Ended {
        let begun = Instant::now();
        let code = loop {
            if let Some(status) = self.launcher.try_wait().expect("a child") {
                break status.code();
            }
            assert!(begun.elapsed() < DEADLINE, "{}", self.stderr());
            std::thread::sleep(Duration::from_millis(10));
        };
        let after = begun.elapsed();
        // A rank that is killed with its launcher needs a moment.
        while !self.ranks().is_empty() {
            assert!(begun.elapsed() < DEADLINE, "left: {:?}", self.ranks());
            std::thread::sleep(Duration::from_millis(10));
        }
        let stdout = fs::read_to_string(self.folder.join("stdout"));
        Ended {
            code,
            stdout: stdout.expect("UTF-8"),
            stderr: self.stderr(),
            after,
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // The launcher first, which would report the others' end.
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
        for (_, id) in self.ranks() {
            let _ = Command::new("kill")
                .args(["-KILL", &id.to_string()])
                .status();
        }
    }
}

fn send(signal: &str, id: u32) {
    let sent = Command::new("kill")
        .args([signal, &id.to_string()])
        .status();
    assert!(sent.expect("kill can be run").success());
}

/// Eight micro-batches a step.
const SHARED: [&str; 4] = [
    "--batch-size=2",
    "--gradient-accumulation-steps=8",
    "--recompute=none",
    "--lora-dropout=0.1",
];

fn shared<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&SHARED, more].concat()
}

/// The same with another number of steps than six.
fn steps(args: Vec<String>, count: &str) -> Vec<String> {
    let change = |arg: String| match arg.as_str() {
        "6" => count.to_owned(),
        _ => arg,
    };
    args.into_iter().map(change).collect()
}

/// Losses and norms of a run, and the bytes of what it trained.
fn bits(run: &Path, last: &str) -> (Vec<Value>, Vec<Vec<u8>>) {
    let text = fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    let without_times = |line: &str| {
        let mut line: Value = serde_json::from_str(line).expect("a line of JSON");
        let fields = line.as_object_mut().expect("an object");
        fields.retain(|name, _| name != "tokens_per_second" && name != "peak_rss");
        line
    };
    let state = format!("checkpoints/{last}/training_state.safetensors");
    let files = ["adapter_model.safetensors", &state];
    let read =
        |name: &str| fs::read(run.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    (
        text.lines().map(without_times).collect(),
        files.map(read).to_vec(),
    )
}

#[test]
fn any_number_of_ranks_ends_with_the_bits_of_one() {
    let lab = Lab::new();
    let args = |name: &str, more: &[&str]| {
        lab.train(
            name,
            &shared(&[&["--eval-steps=4", "--save-steps=3"], more].concat()),
        )
    };
    let installed = installed();
    if installed.is_empty() {
        return;
    }
    lowrank().args(args("one", &[])).assert().success();
    let one = bits(&lab.path("one"), "step-6");
    assert_eq!(one.0.len(), 9, "six steps and three evaluations");
    for mpi in installed {
        for (ranks, stages) in [(1, 1), (2, 1), (3, 1), (4, 2)] {
            let name = format!("{}-{ranks}-{stages}", mpi.launcher);
            let stages = format!("--pipeline-stages={stages}");
            let args = args(&name, &[&stages, "--json"]);
            let ended = Job::start(mpi, &lab, ranks, &args).end();
            assert_eq!(ended.code, Some(0), "{name}: {}", ended.stderr);
            let outcome: Value = serde_json::from_str(&ended.stdout)
                .unwrap_or_else(|error| panic!("{name}: {error} in {}", ended.stdout));
            assert_eq!(outcome["steps"], 6);
            assert!(bits(&lab.path(&name), "step-6") == one, "{name}");
        }
    }
}

#[test]
fn a_run_goes_on_with_other_ranks_to_the_same_bits() {
    let lab = Lab::new();
    let installed = installed();
    if installed.is_empty() {
        return;
    }
    let args = |name: &str| steps(lab.train(name, &shared(&["--save-steps=20"])), "200");
    lowrank().args(args("one")).assert().success();
    let one = bits(&lab.path("one"), "step-200");
    for mpi in installed {
        // Stopped on four ranks, it goes on on one.
        let name = format!("{}-stopped", mpi.launcher);
        let mut job = Job::start(mpi, &lab, 4, &args(&name));
        job.wait_for_steps(5);
        send("-USR1", job.launcher.id());
        let ended = job.end();
        assert_eq!(ended.code, Some(138), "{}", ended.stderr);
        let said = "stopped by SIGUSR1: ";
        assert_eq!(ended.stderr.matches(said).count(), 1, "{}", ended.stderr);
        assert!(!lab.path(&name).join(".lock").exists());
        let resumed = ["train", "--resume", "--output", &lab.arg(&name)].map(str::to_owned);
        lowrank().args(&resumed).assert().success();
        assert!(bits(&lab.path(&name), "step-200") == one, "{name}");

        // Killed on two, it goes on on two.
        let name = format!("{}-killed", mpi.launcher);
        let mut job = Job::start(mpi, &lab, 2, &args(&name));
        job.wait_for_steps(30);
        job.signal_rank("-KILL", 1);
        let ended = job.end();
        assert!(ended.code.is_some_and(|code| code != 0), "{:?}", ended.code);
        assert!(ended.after < Duration::from_secs(30), "{:?}", ended.after);
        let resumed = ["train", "--resume", "--output", &lab.arg(&name)].map(str::to_owned);
        let ended = Job::start(mpi, &lab, 2, &resumed).end();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(
            ended.stderr.contains("resuming after step "),
            "{}",
            ended.stderr
        );
        assert!(bits(&lab.path(&name), "step-200") == one, "{name}");
    }
}

#[test]
fn a_rank_that_stops_is_named_and_ends_the_job() {
    for mpi in installed() {
        let lab = Lab::new();
        let args = lab.train("run", &shared(&["--network-timeout=3", "--save-steps=2"]));
        let mut job = Job::start(mpi, &lab, 2, &steps(args, "1000000"));
        job.wait_for_steps(4);
        job.signal_rank("-STOP", 1);
        let ended = job.end();
        assert!(ended.code.is_some_and(|code| code != 0), "{:?}", ended.code);
        // A second more of the launcher's, and the rest for a machine that is busy.
        assert!(ended.after < Duration::from_secs(20), "{:?}", ended.after);
        for words in [
            "rank 0 on ",
            "waited 3 s for rank 1",
            "the last good checkpoint is",
        ] {
            assert!(ended.stderr.contains(words), "{words} in {}", ended.stderr);
        }
    }
}

#[test]
fn ranks_that_would_train_different_things_are_refused() {
    for mpi in installed() {
        let lab = Lab::new();
        fs::create_dir(lab.path("other")).expect("a folder can be made");
        for name in ["train.jsonl", "valid.jsonl"] {
            let rows = fs::read_to_string(lab.path("data").join(name)).expect("rows");
            write(&lab.path("other"), name, rows.replacen("odd", "even", 1));
        }
        let first = lab.train("run", &shared(&[]));
        let second = lab.train("run", &shared(&["--learning-rate=1e-3"]));
        let third = first.iter().map(|arg| match arg {
            data if *data == lab.arg("data") => lab.arg("other"),
            _ => arg.clone(),
        });
        let third: Vec<String> = third.collect();
        let groups = [(1, &first[..]), (1, &second[..]), (1, &third[..])];
        let ended = Job::of_groups(mpi, &lab, &groups, &[]).end();
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        for words in [
            "rank 1 on ",
            "learning_rate 0.001 here, and 0.0002 on rank 0",
            "rank 2 on ",
            "training data (32 rows",
        ] {
            assert!(ended.stderr.contains(words), "{words} in {}", ended.stderr);
        }
        assert!(!lab.path("run").exists());
    }
}

#[test]
fn what_all_ranks_find_is_said_once() {
    for mpi in installed() {
        let lab = Lab::new();
        // Gradients that are not finite, found by the ranks together.
        let more = [
            "--method=full",
            "--learning-rate=1e30",
            "--max-grad-norm=0",
            "--batch-size=2",
            "--gradient-accumulation-steps=8",
        ];
        let ended = Job::start(mpi, &lab, 3, &lab.train("run", &more)).end();
        assert_eq!(ended.code, Some(3), "{}", ended.stderr);
        assert_eq!(
            ended.stderr.matches("error: ").count(),
            1,
            "{}",
            ended.stderr
        );
        assert!(
            ended.stderr.contains("first bad gradient"),
            "{}",
            ended.stderr
        );

        fs::remove_dir_all(lab.path("data")).expect("data");
        let ended = Job::start(mpi, &lab, 3, &lab.train("none", &[])).end();
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert_eq!(
            ended.stderr.matches("error: ").count(),
            1,
            "{}",
            ended.stderr
        );
        assert!(!ended.stderr.contains("rank"), "{}", ended.stderr);
        assert!(!lab.path("none").exists());
    }
}

#[test]
fn the_library_of_another_mpi_is_refused() {
    let installed = installed();
    if installed.len() < MPIS.len() {
        eprintln!("skipped: this needs both Open MPI and MPICH");
        return;
    }
    for (mpi, other) in [(0, 1), (1, 0)].map(|(a, b)| (installed[a], installed[b])) {
        let lab = Lab::new();
        let args = lab.train("run", &shared(&[]));
        let variables = [("LOWRANK_MPI", other.library)];
        let ended = Job::of_groups(mpi, &lab, &[(2, &args)], &variables).end();
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        for words in ["started 2 ranks", "sees only itself", "LOWRANK_MPI"] {
            assert!(ended.stderr.contains(words), "{words} in {}", ended.stderr);
        }
        assert!(!lab.path("run").exists());
    }
}

#[test]
fn a_launcher_without_its_library_is_an_error() {
    let lab = Lab::new();
    let args = lab.train("run", &[]);
    let assert = lowrank()
        .args(strs(&args))
        .env("OMPI_COMM_WORLD_SIZE", "2")
        .env("OMPI_COMM_WORLD_RANK", "0")
        .env("LOWRANK_MPI", lab.path("libmpi.so"))
        .assert()
        .code(2);
    let text = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    for words in [
        "Open MPI's mpirun",
        "no MPI library can be loaded",
        "libmpi.so",
        "LOWRANK_MPI",
    ] {
        assert!(text.contains(words), "{words} in {text}");
    }
    assert!(!lab.path("run").exists());
}

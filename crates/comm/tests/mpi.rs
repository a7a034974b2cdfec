//! Ranks under every MPI launcher that this machine has: `mpirun.openmpi`, `mpirun.mpich` and `mpirun`, those whose paths `LOWRANK_TEST_MPIRUN`
//! lists, separated by colons, and `srun` where `LOWRANK_TEST_SRUN` is a command that ends with it.
#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// A way to start ranks.
#[derive(Clone, Debug)]
struct Way {
    words: Vec<String>,
    /// Open MPI refuses more ranks than cores, if it is not told otherwise.
    is_open_mpi: bool,
}

/// All that there are.
fn ways() -> Vec<Way> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = |name: &str| {
        let mut found = std::env::split_paths(&path).map(|folder| folder.join(name));
        found.find(|file| file.is_file())
    };
    let mut programs: Vec<PathBuf> = ["mpirun.openmpi", "mpirun.mpich"]
        .into_iter()
        .filter_map(in_path)
        .collect();
    if programs.is_empty() {
        programs.extend(in_path("mpirun"));
    }
    if let Some(more) = std::env::var_os("LOWRANK_TEST_MPIRUN") {
        programs.extend(std::env::split_paths(&more));
    }
    let mut ways: Vec<Way> = programs.iter().filter_map(|program| way(program)).collect();
    if let Ok(srun) = std::env::var("LOWRANK_TEST_SRUN") {
        ways.push(Way {
            words: srun.split_whitespace().map(str::to_owned).collect(),
            is_open_mpi: false,
        });
    }
    if ways.is_empty() {
        eprintln!("skipped: there is no MPI launcher; install openmpi-bin or mpich");
    }
    ways
}

fn way(program: &Path) -> Option<Way> {
    let version = Command::new(program).arg("--version").output().ok()?;
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    Some(Way {
        words: vec![program.to_str()?.to_owned()],
        is_open_mpi: ["Open MPI", "OpenRTE", "prte"]
            .iter()
            .any(|name| version.contains(name)),
    })
}

impl Way {
    /// The command that runs so many ranks, and has a minute.
    fn command(&self, ranks: usize) -> Command {
        // What a test waits for in vain ends by itself, even where its launcher does not listen.
        let mut command = Command::new("timeout");
        command.args(["-k", "5", "60"]).args(&self.words);
        if self.is_open_mpi {
            command.arg("--oversubscribe");
            command.env("OMPI_ALLOW_RUN_AS_ROOT", "1");
            command.env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        }
        command.args(["-n", &ranks.to_string()]).arg(example());
        command
    }

    fn run(&self, ranks: usize, set: &[(&str, &str)]) -> (Output, String) {
        let mut command = self.command(ranks);
        command.envs(set.iter().copied());
        let output = command.output().expect("the launcher starts");
        let text = [&output.stdout[..], &output.stderr].concat();
        (output, String::from_utf8_lossy(&text).into_owned())
    }
}

/// The program whose ranks talk. Cargo builds it together with this test, and puts it beside it.
fn example() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let target = test.parent().and_then(Path::parent).expect("target/debug");
    let example = target.join("examples/ranks");
    assert!(example.is_file(), "{} is not built", example.display());
    example
}

#[test]
fn one_process_needs_no_mpi() {
    let output = Command::new(example()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.starts_with("ok: 1 ranks, none"), "{said}");
}

#[test]
fn ranks_say_everything_to_each_other() {
    for way in ways() {
        for ranks in 1..=4 {
            let (output, said) = way.run(ranks, &[]);
            let ok = format!("ok: {ranks} ranks, ");
            assert!(
                output.status.success() && said.contains(&ok),
                "{way:?}: {said}"
            );
            assert_eq!(said.matches("ok:").count(), 1, "{way:?}: {said}");
        }
    }
}

#[test]
fn large_messages_go_in_pieces() {
    for way in ways() {
        let (output, said) = way.run(2, &[("RANKS_MIB", "65")]);
        assert!(
            output.status.success() && said.contains("ok: 2"),
            "{way:?}: {said}"
        );
    }
}

#[test]
fn ranks_end_soon_after_one_of_them_died_or_stopped() {
    for way in ways() {
        let began = Instant::now();
        way.run(3, &[]);
        let usual = began.elapsed();
        for fault in ["kill", "stop"] {
            let (seconds, began) = (3, Instant::now());
            let set = [
                ("RANKS_FAULT", fault),
                ("RANKS_TIMEOUT", &seconds.to_string()),
            ];
            let (output, said) = way.run(3, &set);
            let took = began.elapsed();
            assert!(!output.status.success(), "{way:?}, {fault}: {said}");
            if fault == "stop" {
                assert!(said.contains("waited 3 s for rank 2"), "{way:?}: {said}");
            }
            // A second, and some more where other tests keep the cores busy.
            let most = usual + Duration::from_secs(seconds + 1 + 2);
            assert!(took < most, "{way:?}, {fault}: {took:?}, usually {usual:?}");
        }
    }
}

#[test]
fn a_message_of_another_length_is_an_error() {
    for way in ways() {
        for (fault, came) in [("short", "999"), ("long", "more")] {
            let (output, said) = way.run(2, &[("RANKS_FAULT", fault)]);
            let error = format!("expected 1000 bytes from rank 1, and {came} came");
            assert!(
                !output.status.success() && said.contains(&error),
                "{way:?}: {said}"
            );
        }
    }
}

#[test]
fn the_library_of_another_mpi_is_refused() {
    let ways = ways();
    let open_mpi = ways.iter().find(|way| way.is_open_mpi);
    let mpich = ways.iter().find(|way| !way.is_open_mpi);
    if !cfg!(target_os = "linux") || open_mpi.is_none() || mpich.is_none() {
        eprintln!("skipped: not both of Open MPI and MPICH are here");
        return;
    }
    let others = [(open_mpi, "libmpich.so.12"), (mpich, "libmpi.so.40")];
    for (way, library) in others {
        let way = way.unwrap();
        let (output, said) = way.run(2, &[("LOWRANK_MPI", library)]);
        assert!(!output.status.success(), "{way:?}: {said}");
        for part in ["started 2 ranks, but", "sees only itself", "LOWRANK_MPI"] {
            assert!(said.contains(part), "{way:?}: {said}");
        }
    }
}

#[test]
fn a_library_that_is_not_there_stops_several_ranks_but_not_one() {
    for way in ways() {
        let set = [("LOWRANK_MPI", "/nowhere/libmpi.so.0")];
        let (output, said) = way.run(2, &set);
        assert!(!output.status.success(), "{way:?}: {said}");
        assert!(said.contains("/nowhere/libmpi.so.0"), "{way:?}: {said}");
        let (output, said) = way.run(1, &set);
        let ok = output.status.success() && said.contains("ok: 1 ranks, none");
        assert!(ok, "{way:?}: {said}");
    }
}

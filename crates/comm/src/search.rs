//! Where an MPI library may be.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::launcher::LauncherKind;

/// A place to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The user has named this library, so no other one will do.
    Named(PathBuf),
    /// It may be here.
    Guessed(PathBuf),
}

/// The environment variable that names the library.
pub(crate) const VARIABLE: &str = "LOWRANK_MPI";

/// All places in the order in which they are tried. `library` is what the user has named, `variable` looks into the environment, and `launchers`
/// are programs that run above this process.
pub(crate) fn places(
    library: Option<&Path>,
    kind: LauncherKind,
    variable: &dyn Fn(&str) -> Option<OsString>,
    launchers: &[PathBuf],
) -> Vec<Place> {
    let from_variable = || variable(VARIABLE).filter(|path| !path.is_empty());
    let named = library.map(Path::to_owned);
    if let Some(path) = named.or_else(|| from_variable().map(PathBuf::from)) {
        return vec![Place::Named(path)];
    }
    let pmix = ["PMIX_NAMESPACE", "PMIX_RANK"];
    let pmix = pmix.iter().any(|name| variable(name).is_some());
    let names = names(kind, pmix);
    let mut folders = Vec::new();
    for launcher in launchers {
        folders.extend(beside(launcher));
    }
    for home in ["OPAL_PREFIX", "MPI_HOME", "I_MPI_ROOT"] {
        folders.extend(variable(home).map(PathBuf::from));
    }
    let path = variable("PATH").unwrap_or_default();
    for program in ["mpiexec", "mpirun"] {
        let mut programs = std::env::split_paths(&path).map(|folder| folder.join(program));
        if let Some(program) = programs.find(|program| program.is_file()) {
            folders.extend(beside(&program));
            // It may be a link into the folder where all of the installation is.
            folders.extend(program.canonicalize().iter().filter_map(|to| beside(to)));
        }
    }
    let mut places = Vec::new();
    let mut add = |place| {
        if !places.contains(&place) {
            places.push(place);
        }
    };
    for folder in folders {
        for library in ["lib", "lib64", "lib/release"] {
            let found = names.iter().map(|name| folder.join(library).join(name));
            for path in found.filter(|path| path.is_file()) {
                add(Place::Guessed(path));
            }
        }
    }
    for name in names {
        add(Place::Guessed(name.into()));
    }
    places
}

/// The folder of the installation that a program belongs to: `/opt/mpi` for `/opt/mpi/bin/mpirun`.
fn beside(program: &Path) -> Option<PathBuf> {
    Some(program.parent()?.parent()?.to_owned())
}

/// Names of libraries, the likeliest first.
fn names(kind: LauncherKind, pmix: bool) -> Vec<&'static str> {
    // The last number is that of the binary interface: 40 for Open MPI 4 and 5, 12 for MPICH and what is compatible with it.
    let [open_mpi, mpich, standard]: [&[&str]; 3] = if cfg!(target_os = "macos") {
        [
            &["libmpi.40.dylib", "libmpi.80.dylib", "libmpi.dylib"],
            &["libmpi.12.dylib", "libmpich.12.dylib", "libmpi.dylib"],
            &["libmpi_abi.1.dylib"],
        ]
    } else {
        [
            &["libmpi.so.40", "libmpi.so.80", "libmpi.so"],
            &[
                "libmpich.so.12",
                "libmpi.so.12",
                "libmpi_cray.so.12",
                "libmpi.so.0",
                "libmpi.so",
            ],
            &["libmpi_abi.so.1"],
        ]
    };
    let order = match kind {
        LauncherKind::OpenMpi => [open_mpi, standard, &[]],
        LauncherKind::Hydra => [mpich, standard, &[]],
        // Open MPI speaks PMIx, and MPICH rather the older PMI.
        LauncherKind::Slurm if !pmix => [mpich, standard, open_mpi],
        LauncherKind::Slurm | LauncherKind::Pmix => [open_mpi, standard, mpich],
    };
    order.concat()
}

/// Programs that started this process, directly or through others such as a shell, as far as they look like launchers; the nearest first.
pub(crate) fn launchers_above() -> Vec<PathBuf> {
    let mut launchers = Vec::new();
    let mut process = std::process::id();
    for _ in 0..6 {
        let Some(parent) = parent_of(process).filter(|&parent| parent > 1) else {
            break;
        };
        process = parent;
        let Ok(program) = std::fs::read_link(format!("/proc/{process}/exe")) else {
            continue;
        };
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        let launches = ["mpirun", "mpiexec", "hydra", "orte", "prte", "prun"];
        if launches.iter().any(|word| name.contains(word)) {
            launchers.push(program);
        }
    }
    launchers
}

/// The parent of a process, where the system has `/proc`.
fn parent_of(process: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name of the program, in parentheses, may contain anything; after it come the state and the parent.
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(
        library: Option<&str>,
        kind: LauncherKind,
        set: &[(&str, &str)],
        launchers: &[PathBuf],
    ) -> Vec<Place> {
        let variable = |name: &str| {
            let value = set.iter().find(|one| one.0 == name);
            value.map(|one| OsString::from(one.1))
        };
        places(library.map(Path::new), kind, &variable, launchers)
    }

    #[test]
    fn a_named_library_is_the_only_one() {
        let kind = LauncherKind::Hydra;
        let set = [(VARIABLE, "/a/libmpi.so"), ("MPI_HOME", "/b")];
        let named = |path: &str| vec![Place::Named(path.into())];
        assert_eq!(of(None, kind, &set, &[]), named("/a/libmpi.so"));
        assert_eq!(of(Some("c.so"), kind, &set, &[]), named("c.so"));
        let none = of(None, kind, &[(VARIABLE, "")], &[]);
        assert!(none.iter().all(|place| matches!(place, Place::Guessed(_))));
    }

    #[cfg(unix)]
    #[test]
    fn what_belongs_to_the_launcher_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let [own, other, standard] = if cfg!(target_os = "macos") {
            ["libmpi.40.dylib", "libmpich.12.dylib", "libmpi_abi.1.dylib"]
        } else {
            ["libmpi.so.40", "libmpich.so.12", "libmpi_abi.so.1"]
        };
        for folder in ["real/bin", "real/lib", "home/lib", "bin"] {
            std::fs::create_dir_all(root.join(folder)).unwrap();
        }
        for file in ["real/bin/mpirun", "running/bin/mpirun"] {
            std::fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
            std::fs::write(root.join(file), "").unwrap();
        }
        for folder in ["real/lib", "home/lib", "running/lib"] {
            std::fs::create_dir_all(root.join(folder)).unwrap();
            for name in [own, other] {
                std::fs::write(root.join(folder).join(name), "").unwrap();
            }
        }
        std::os::unix::fs::symlink(root.join("real/bin/mpirun"), root.join("bin/mpirun")).unwrap();
        let (path, home) = (root.join("bin"), root.join("home"));
        let set = [
            ("PATH", path.to_str().unwrap()),
            ("MPI_HOME", home.to_str().unwrap()),
        ];
        let running = [root.join("running/bin/mpirun")];
        let found = of(None, LauncherKind::OpenMpi, &set, &running);
        let canonical = root.canonicalize().unwrap();
        let expected = [
            root.join("running/lib").join(own),
            root.join("home/lib").join(own),
            canonical.join("real/lib").join(own),
            own.into(),
        ];
        assert_eq!(found[..4], expected.map(Place::Guessed));
        assert!(found.contains(&Place::Guessed(standard.into())));
        assert!(!found.contains(&Place::Guessed(other.into())));
        let found = of(None, LauncherKind::Hydra, &set, &[]);
        assert_eq!(found[0], Place::Guessed(home.join("lib").join(other)));
    }

    #[test]
    fn slurm_may_start_any_library() {
        let first = |set: &[(&str, &str)]| of(None, LauncherKind::Slurm, set, &[]).remove(0);
        let name = |place: &Place| format!("{place:?}");
        assert!(name(&first(&[("PMIX_RANK", "0")])).contains("40"));
        assert!(name(&first(&[])).contains("12"));
        let all = of(None, LauncherKind::Slurm, &[], &[]);
        let count = |word: &str| {
            all.iter()
                .filter(|place| name(place).contains(word))
                .count()
        };
        assert!(count("40") == 1 && count("12") >= 2 && count("abi") == 1);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_process_has_a_parent() {
        let parent = std::os::unix::process::parent_id();
        assert_eq!(parent_of(std::process::id()), Some(parent));
        assert_eq!(parent_of(u32::MAX), None);
    }
}

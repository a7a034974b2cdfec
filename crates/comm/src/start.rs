//! Chooses the engine.

use std::path::PathBuf;
use std::time::Duration;

use super::launcher::{Launcher, script_without_step};
use super::{Alone, Communicator, Error};

/// How ranks find each other, and how patient they are.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long a rank waits for another one.
    pub timeout: Duration,
    /// The MPI library; otherwise the environment variable `LOWRANK_MPI` names it, or it is searched for.
    pub library: Option<PathBuf>,
}

/// What this process is: a rank under MPI where a launcher started several, and otherwise [`Alone`]. Nothing is loaded in the latter case: a
/// shell that `srun` started is a job of one task, too, and whatever runs in it has nobody to speak to.
///
/// Call it while no other thread reads or changes the environment: Open MPI is told something there. Where MPI has not started by the timeout, the process ends, since
/// MPI cannot be called off.
///
/// # Errors
/// There is no MPI library, it does not start, or it is not that of the launcher.
pub fn start(options: &Options) -> Result<Box<dyn Communicator>, Error> {
    let Some(launcher) = Launcher::from_environment() else {
        if let Some(warning) = script_without_step(&|name| std::env::var_os(name)) {
            tracing::warn!("{warning}");
        }
        return Ok(Box::new(Alone));
    };
    if launcher.size == Some(1) {
        tracing::debug!("{} started one rank, which is alone", launcher.kind.name());
        return Ok(Box::new(Alone));
    }
    under(&launcher, options)
}

#[cfg(not(unix))]
fn under(launcher: &Launcher, _: &Options) -> Result<Box<dyn Communicator>, Error> {
    Err(Error::Failed(format!(
        "{} started this process, and MPI is not supported on this system; Linux and macOS have it",
        launcher.kind.name()
    )))
}

#[cfg(unix)]
fn under(launcher: &Launcher, options: &Options) -> Result<Box<dyn Communicator>, Error> {
    let opened = unix::find(launcher, options).map_err(Error::Failed)?;
    let mpi = super::Mpi::start(opened, options.timeout)?;
    match unix::disagreement(launcher, mpi.rank(), mpi.size(), &mpi.engine()) {
        Some(message) => Err(Error::Failed(message)),
        None => Ok(Box::new(mpi)),
    }
}

#[cfg(unix)]
mod unix {
    use std::path::Path;

    use super::super::launcher::{Launcher, LauncherKind};
    use super::super::mpi::{Identity, Opened, open};
    use super::super::search::{Place, VARIABLE, launchers_above, places};
    use super::Options;

    /// Loads the first library that can be, and that the launcher may be for.
    pub(super) fn find(launcher: &Launcher, options: &Options) -> Result<Opened, String> {
        let variable = |name: &str| std::env::var_os(name);
        let library = options.library.as_deref();
        let places = places(library, launcher.kind, &variable, &launchers_above());
        let mut tried = Vec::new();
        for place in &places {
            let (path, opened) = match place {
                Place::Named(path) => (path, open(path, |_| Ok(()))),
                Place::Guessed(path) => (path, open(path, |library| suits(launcher.kind, library))),
            };
            match opened {
                Ok(opened) => {
                    tracing::debug!("{} from {}", opened.engine, path.display());
                    return Ok(opened);
                }
                Err(why) => tried.push(attempt(path, &why)),
            }
        }
        let mend = match places.first() {
            Some(Place::Named(_)) => format!(
                "name another one in {VARIABLE}, or none, and the library that belongs to the launcher is searched for"
            ),
            _ => format!(
                "install the MPI whose launcher this is (on Debian: openmpi-bin or mpich), or name its library in {VARIABLE}"
            ),
        };
        Err(format!(
            "{} started this process, and no MPI library can be loaded; {mend}. Tried:\n{}",
            launcher.kind.name(),
            tried.join("\n")
        ))
    }

    fn attempt(path: &Path, why: &str) -> String {
        let name = path.display().to_string();
        // The system's message begins with the name, mostly.
        let why = why.strip_prefix(&name).unwrap_or(why);
        format!("  {name}: {}", why.trim_start_matches([':', ' ']))
    }

    /// Whether a library that nobody has named may belong to the launcher. Slurm starts ranks of any.
    fn suits(kind: LauncherKind, library: &Identity) -> Result<(), String> {
        let suits = match kind {
            LauncherKind::OpenMpi => library.is_open_mpi(),
            LauncherKind::Hydra => !library.is_open_mpi(),
            LauncherKind::Slurm | LauncherKind::Pmix => true,
        };
        if suits {
            return Ok(());
        }
        let engine = library.engine();
        Err(format!("it is {engine}, and not for this launcher"))
    }

    /// What is wrong where MPI does not see the ranks that the launcher started: each then believes itself to be the only one.
    pub(super) fn disagreement(
        launcher: &Launcher,
        rank: usize,
        size: usize,
        engine: &str,
    ) -> Option<String> {
        let started = launcher.size?;
        let name = launcher.kind.name();
        if started > 1 && size == 1 {
            let slurm = match launcher.kind {
                LauncherKind::Slurm => {
                    "; with srun, choose how MPI finds the ranks (srun --mpi=list shows the ways; pmix for Open MPI, pmi2 for MPICH)"
                }
                _ => "",
            };
            return Some(format!(
                "{name} started {started} ranks, but {engine} sees only itself: use the launcher of the same MPI, or name the launcher's library in {VARIABLE}{slurm}"
            ));
        }
        if (rank, size) != (launcher.rank, started) {
            tracing::warn!(
                "{name} calls this rank {} of {started}, and {engine} calls it {rank} of {size}, which counts",
                launcher.rank
            );
        }
        None
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn launcher(kind: LauncherKind, size: Option<usize>) -> Launcher {
            Launcher {
                kind,
                rank: 0,
                size,
                local_rank: None,
                local_size: None,
            }
        }

        #[test]
        fn a_library_of_another_mpi_is_refused() {
            let found = |kind, started, size| {
                disagreement(&launcher(kind, started), 0, size, "MPICH 4.0.2")
            };
            let error = found(LauncherKind::OpenMpi, Some(2), 1).unwrap();
            for part in ["Open MPI's mpirun started 2", "MPICH 4.0.2", "LOWRANK_MPI"] {
                assert!(error.contains(part), "{error}");
            }
            assert!(!error.contains("srun"), "{error}");
            let error = found(LauncherKind::Slurm, Some(2), 1).unwrap();
            assert!(error.contains("srun --mpi=list"), "{error}");
            assert_eq!(found(LauncherKind::OpenMpi, Some(2), 2), None);
            assert_eq!(found(LauncherKind::OpenMpi, Some(1), 1), None);
            assert_eq!(found(LauncherKind::Pmix, None, 1), None);
        }

        #[test]
        fn what_was_tried_is_named() {
            let options = Options {
                timeout: std::time::Duration::from_secs(1),
                library: Some("/nowhere/libmpi.so.40".into()),
            };
            let error = find(&launcher(LauncherKind::OpenMpi, Some(2)), &options).err();
            let error = error.unwrap();
            for part in ["/nowhere/libmpi.so.40", "Open MPI's mpirun", "LOWRANK_MPI"] {
                assert!(error.contains(part), "{error}");
            }
        }
    }
}

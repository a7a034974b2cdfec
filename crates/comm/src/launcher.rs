//! What a launcher says to the processes that it starts, in their environment.

use std::ffi::OsString;

/// Which program started the ranks, as far as the environment tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LauncherKind {
    /// `mpirun` of Open MPI, with or without PRRTE.
    OpenMpi,
    /// `mpiexec` of MPICH, Intel MPI, or MVAPICH: Hydra. Others speak PMI, too.
    Hydra,
    /// `srun` of Slurm.
    Slurm,
    /// Another one that speaks PMIx.
    Pmix,
}

impl LauncherKind {
    /// The name that messages use.
    pub fn name(self) -> &'static str {
        match self {
            Self::OpenMpi => "Open MPI's mpirun",
            Self::Hydra => "mpiexec (Hydra or another PMI launcher)",
            Self::Slurm => "Slurm's srun",
            Self::Pmix => "a PMIx launcher",
        }
    }
}

/// The place of this process in a job, as its launcher says it. MPI itself has the last word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launcher {
    /// Which launcher.
    pub kind: LauncherKind,
    /// The number of this rank, from 0.
    pub rank: usize,
    /// Number of ranks. PMIx alone does not tell.
    pub size: Option<usize>,
    /// The number of this rank among those on the same machine.
    pub local_rank: Option<usize>,
    /// Number of ranks on this machine.
    pub local_size: Option<usize>,
}

impl Launcher {
    /// The launcher that started this process; `None` where none did.
    pub fn from_environment() -> Option<Self> {
        Self::find(&|name| std::env::var_os(name))
    }

    /// What these variables say. A variable that is not a number counts as not set: launchers may start programs that are no ranks.
    pub fn find(variable: &dyn Fn(&str) -> Option<OsString>) -> Option<Self> {
        let number = |name: &str| variable(name)?.to_str()?.trim().parse::<usize>().ok();
        let job = |kind, [rank, size, local_rank, local_size]: [&str; 4]| {
            let (rank, size) = (number(rank)?, number(size)?);
            (rank < size).then_some(Self {
                kind,
                rank,
                size: Some(size),
                local_rank: number(local_rank),
                local_size: number(local_size),
            })
        };
        let open_mpi = [
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ];
        let hydra = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"];
        // SLURM_PROCID is set in a batch script too, which is one process; a step's number is not enough either, because a batch script inherits
        // it where it was submitted from within a step.
        let slurm = || {
            number("SLURM_STEP_ID")?;
            let names = ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""];
            let mut job = job(LauncherKind::Slurm, names)?;
            let tasks = variable("SLURM_STEP_TASKS_PER_NODE");
            let node = number("SLURM_NODEID");
            job.local_size = tasks
                .zip(node)
                .and_then(|(tasks, node)| tasks_on(tasks.to_str()?, node));
            Some(job)
        };
        let pmix = || {
            Some(Self {
                kind: LauncherKind::Pmix,
                rank: number("PMIX_RANK")?,
                size: None,
                local_rank: None,
                local_size: None,
            })
        };
        // `mpirun` may run within a step of Slurm, whose variables its ranks then inherit; so Slurm comes after it. But srun's PMI plugins set
        // PMI_RANK, too, without the numbers on the machine.
        job(LauncherKind::OpenMpi, open_mpi)
            .or_else(|| job(LauncherKind::Hydra, hydra).filter(|job| job.local_size.is_some()))
            .or_else(slurm)
            .or_else(|| job(LauncherKind::Hydra, hydra))
            .or_else(pmix)
    }
}

/// The warning for a job of several tasks whose script was not started with `srun`: it runs once, whatever was asked for.
pub(crate) fn script_without_step(
    variable: &dyn Fn(&str) -> Option<OsString>,
) -> Option<&'static str> {
    let tasks = variable("SLURM_NTASKS")?.to_str()?.parse::<usize>().ok()?;
    (tasks > 1 && Launcher::find(variable).is_none()).then_some(
        "Slurm has given this job several tasks, but only one process runs: start it with srun to have a rank for each task",
    )
}

/// Number of tasks on a node, from what Slurm writes: `4(x2),3` is 4 on two nodes each, then 3 on one.
fn tasks_on(tasks: &str, node: usize) -> Option<usize> {
    let mut before = 0;
    for group in tasks.split(',') {
        let (count, nodes) = match group.split_once("(x") {
            Some((count, nodes)) => (count, nodes.strip_suffix(')')?.parse().ok()?),
            None => (group, 1),
        };
        before += nodes;
        if node < before {
            return count.parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(set: &[(&str, &str)]) -> impl Fn(&str) -> Option<OsString> {
        let set: Vec<(String, OsString)> = set
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.into()))
            .collect();
        move |name| {
            set.iter()
                .find(|one| one.0 == name)
                .map(|one| one.1.clone())
        }
    }

    fn find(set: &[(&str, &str)]) -> Option<Launcher> {
        Launcher::find(&variables(set))
    }

    #[expect(clippy::unnecessary_wraps, reason = "compared with what find returns")]
    fn job(kind: LauncherKind, numbers: [usize; 4]) -> Option<Launcher> {
        Some(Launcher {
            kind,
            rank: numbers[0],
            size: Some(numbers[1]),
            local_rank: Some(numbers[2]),
            local_size: Some(numbers[3]),
        })
    }

    const STEP: [(&str, &str); 6] = [
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "9"),
        ("SLURM_STEP_NUM_TASKS", "11"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NODEID", "2"),
        ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3"),
    ];

    #[test]
    fn every_launcher_is_known() {
        let open_mpi = [
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_SIZE", "8"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("PMIX_RANK", "3"),
        ];
        let expected = job(LauncherKind::OpenMpi, [3, 8, 1, 2]);
        assert_eq!(find(&open_mpi), expected);
        // Within an allocation of Slurm it is still mpirun that counts.
        assert_eq!(find(&[&open_mpi[..], &STEP].concat()), expected);
        let hydra = [
            ("PMI_RANK", "0"),
            ("PMI_SIZE", "2"),
            ("MPI_LOCALRANKID", "0"),
            ("MPI_LOCALNRANKS", "2"),
        ];
        let expected = job(LauncherKind::Hydra, [0, 2, 0, 2]);
        assert_eq!(find(&hydra), expected);
        assert_eq!(find(&[&hydra[..], &STEP].concat()), expected);
        let expected = job(LauncherKind::Slurm, [9, 11, 1, 3]);
        assert_eq!(find(&STEP), expected);
        let pmi = [("PMI_RANK", "9"), ("PMI_SIZE", "11")];
        assert_eq!(find(&[&pmi[..], &STEP].concat()), expected);
        assert_eq!(find(&pmi).map(|job| job.kind), Some(LauncherKind::Hydra));
        let pmix = find(&[("PMIX_RANK", "1")]).unwrap();
        assert_eq!(
            (pmix.kind, pmix.rank, pmix.size),
            (LauncherKind::Pmix, 1, None)
        );
    }

    #[test]
    fn what_is_no_number_is_no_launcher() {
        assert_eq!(find(&[]), None);
        let rank = |rank, size| find(&[("PMI_RANK", rank), ("PMI_SIZE", size)]);
        assert_eq!(rank("", "2"), None);
        assert_eq!(rank("x", "2"), None);
        assert_eq!(rank("-1", "2"), None);
        assert_eq!(rank("2", "2"), None);
        assert!(rank("1", "2").is_some());
        assert_eq!(find(&[("OMPI_COMM_WORLD_SIZE", "2")]), None);
    }

    #[test]
    fn a_batch_script_is_one_process() {
        let script = [
            ("SLURM_NTASKS", "4"),
            ("SLURM_PROCID", "0"),
            ("SLURM_LOCALID", "0"),
        ];
        assert_eq!(find(&script), None);
        assert!(script_without_step(&variables(&script)).is_some());
        let one = [("SLURM_NTASKS", "1"), ("SLURM_PROCID", "0")];
        assert_eq!(script_without_step(&variables(&one)), None);
        let step = [&script[..1], &STEP].concat();
        assert_eq!(script_without_step(&variables(&step)), None);
    }

    #[test]
    fn tasks_of_a_node_are_read_from_groups() {
        let on = |node| tasks_on("4(x2),3", node);
        assert_eq!(
            [on(0), on(1), on(2), on(3)],
            [Some(4), Some(4), Some(3), None]
        );
        assert_eq!(tasks_on("", 0), None);
        assert_eq!(tasks_on("4(x", 0), None);
    }
}

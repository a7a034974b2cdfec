//! The ranks of a job that an MPI launcher started: how one joins, how many threads each has, and how they leave.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use lowrank::comm::{Communicator, Launcher, Options, start};
use lowrank::ranks::Ranks;
use serde::{Deserialize, Serialize};

use crate::failure::{Misuse, SaidElsewhere, paragraph};
use crate::interrupt;
use crate::threads::set_threads;

thread_local! {
    /// What this process joined, until it leaves. MPI is called from the main thread alone.
    static JOINED: RefCell<Option<Rc<dyn Communicator>>> = const { RefCell::new(None) };
    /// Whether the other ranks do not know that this one has failed.
    static FAILED_ALONE: Cell<bool> = const { Cell::new(false) };
}

/// How a training is shared out among ranks. None of it changes the result, so a run's settings do not hold it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Several machines")]
pub struct RanksArgs {
    /// Share the model's blocks out among so many ranks, for models that are too large for one machine
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub pipeline_stages: u32,

    /// Seconds that a rank waits for another one before it gives the job up
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    pub network_timeout: u64,

    /// Ranks on each machine: a number, or auto for one a NUMA node; without a launcher, mpirun is started here
    #[arg(long, value_name = "N|auto")]
    pub ranks_per_node: Option<RanksPerNode>,
}

/// Ranks that one processor may have, for trying things out.
const MOST_A_PROCESSOR: usize = 16;

/// How many ranks a machine is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RanksPerNode {
    /// One a NUMA node.
    Auto,
    /// So many.
    Count(usize),
}

impl Default for RanksArgs {
    fn default() -> Self {
        Self {
            pipeline_stages: 1,
            network_timeout: 600,
            ranks_per_node: None,
        }
    }
}

impl std::str::FromStr for RanksPerNode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<usize>() {
            Ok(count) if count > 0 => Ok(Self::Count(count)),
            _ if text == "auto" => Ok(Self::Auto),
            _ => Err("give a number of 1 or more, or auto".to_owned()),
        }
    }
}

impl RanksPerNode {
    /// The number on this machine.
    fn count(self) -> usize {
        match self {
            Self::Auto => numa_nodes(Path::new("/sys/devices/system/node")),
            Self::Count(count) => count,
        }
    }
}

/// NUMA nodes with memory and processors; 1 where the system does not tell.
fn numa_nodes(folder: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 1;
    };
    let is_node = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let number = name.strip_prefix("node");
        number.is_some_and(|number| number.parse::<u32>().is_ok())
            && std::fs::read_to_string(path.join("cpulist"))
                .is_ok_and(|list| !list.trim().is_empty())
    };
    let paths = entries.flatten().map(|entry| entry.path());
    paths.filter(|path| is_node(path)).count().max(1)
}

/// Whether a launcher calls this process another rank than 0.
pub fn is_other_rank() -> bool {
    Launcher::from_environment().is_some_and(|launcher| launcher.rank > 0)
}

/// On another rank than 0, says the first line of what is wrong with the command line and ends the program: rank 0 says the rest.
pub fn shorten_on_others(problem: &str) {
    if let Some(launcher) = Launcher::from_environment()
        && launcher.rank > 0
    {
        let line = problem.lines().next().unwrap_or_default();
        crate::progress::stderr_line(&format!("rank {}: {line}", launcher.rank));
        std::process::exit(2);
    }
}

/// Refuses to run as several ranks what would then be done several times.
///
/// # Errors
/// A launcher has started more than one rank; rank 0 alone says it.
pub fn refuse_several() -> anyhow::Result<()> {
    let Some(launcher) = Launcher::from_environment().filter(|launcher| launcher.size != Some(1))
    else {
        return Ok(());
    };
    if launcher.rank > 0 {
        return Err(SaidElsewhere { code: 2 }.into());
    }
    Err(Misuse::new(format!(
        "{} started this several times, and each would do all of it; start it without the launcher. The work of train, eval and bench comm is shared out among \
         ranks; compare starts its trainings as ranks itself, with --launcher",
        launcher.kind.name()
    ))
    .into())
}

/// Open MPI gives rank 0 a pseudo-terminal as its standard output, whatever the output of `mpirun` is: there are no colours there.
pub fn no_terminal_of_launcher() {
    if Launcher::from_environment().is_some() && std::env::var_os("CLICOLOR_FORCE").is_none() {
        console::set_colors_enabled(false);
    }
}

/// The job that this process is a part of; it may be the only one.
pub struct Job {
    comm: Rc<dyn Communicator>,
    stages: usize,
}

impl Job {
    /// Joins the ranks that a launcher started, or is alone. With `--ranks-per-node` and no launcher the process becomes `mpirun`, which starts it
    /// again. `command` is what this rank is about to do, which must be the same on all ranks.
    ///
    /// # Errors
    /// No MPI library, or one that is not the launcher's; another command on a rank; other ranks on a machine than asked for.
    pub fn join(args: &RanksArgs, command: &str) -> anyhow::Result<Self> {
        let wanted = args.ranks_per_node;
        if let Some(wanted) = wanted
            && Launcher::from_environment().is_none()
            && wanted.count() > 1
        {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            if wanted.count() > MOST_A_PROCESSOR * processors {
                return Err(Misuse::new(format!(
                    "--ranks-per-node {} is far more than the {processors} processors of this machine can serve; give {} at most",
                    wanted.count(),
                    MOST_A_PROCESSOR * processors
                ))
                .into());
            }
            return Err(become_launcher(wanted));
        }
        let options = Options {
            timeout: Duration::from_secs(args.network_timeout),
            library: None,
        };
        let comm: Rc<dyn Communicator> = start(&options)
            .map_err(|error| match Launcher::from_environment() {
                Some(launcher) if launcher.rank > 0 => {
                    Misuse::new(format!("rank {}: {error}", launcher.rank))
                }
                _ => Misuse::new(error.to_string()),
            })?
            .into();
        JOINED.set(Some(Rc::clone(&comm)));
        let job = Self {
            comm,
            stages: args.pipeline_stages as usize,
        };
        let mut words = vec![command.to_owned()];
        if args.pipeline_stages > 1 {
            words.push(format!("--pipeline-stages {}", args.pipeline_stages));
        }
        match wanted {
            Some(RanksPerNode::Auto) => words.push("--ranks-per-node auto".to_owned()),
            Some(RanksPerNode::Count(count)) => words.push(format!("--ranks-per-node {count}")),
            None => {}
        }
        // Before they speak of anything else, of which others may not know.
        let command = [("command".to_owned(), words.join(" "))];
        job.everybody().same(&command).map_err(quietly)?;
        if let Some(wanted) = wanted {
            job.check_ranks_per_node(wanted)?;
        }
        Ok(job)
    }

    /// The ranks, without the stages of a pipeline.
    fn everybody(&self) -> Ranks<'_> {
        Ranks::of(&*self.comm)
    }

    /// What the ranks say things through.
    pub fn comm(&self) -> &dyn Communicator {
        &*self.comm
    }

    /// The ranks as the library sees them.
    ///
    /// # Errors
    /// Ranks that are no multiple of the pipeline's stages.
    pub fn ranks(&self) -> anyhow::Result<Ranks<'_>> {
        Ranks::new(&*self.comm, self.stages)
            .map_err(|error| self.said_by_first(Misuse::new(error.to_string())))
    }

    /// Starts the threads: as many as are asked for, or this rank's share of the processors that it may use.
    ///
    /// # Errors
    /// As [`set_threads`]; ranks that do not answer.
    pub fn start_threads(&self, asked: Option<usize>) -> anyhow::Result<()> {
        if Launcher::from_environment().is_none() {
            return set_threads(asked);
        }
        let own = Processors::of_this_process(self.comm.host());
        let all = self.everybody().gather_all(&own)?;
        if self.comm.rank() == 0
            && let Some(warning) = idle_processors(&all)
        {
            tracing::warn!("{warning}");
        }
        let threads = asked.unwrap_or_else(|| own.share(&all));
        if all.len() > 1 && self.comm.rank() == 0 {
            let hosts: BTreeSet<&str> = all.iter().map(|rank| rank.host.as_str()).collect();
            let engine = self.comm.engine();
            tracing::info!(
                "{}",
                summary(all.len(), hosts.len(), self.stages, &engine, threads)
            );
        }
        set_threads(Some(threads))
    }

    /// Refuses another number of ranks on a machine.
    fn check_ranks_per_node(&self, wanted: RanksPerNode) -> anyhow::Result<()> {
        if self.comm.size() == 1 && wanted.count() == 1 {
            return Ok(());
        }
        let own = (self.comm.host().to_owned(), wanted.count());
        let all = self.everybody().gather_all(&own)?;
        let hosts: BTreeSet<&(String, usize)> = all.iter().collect();
        for (host, wanted) in hosts {
            let found = all.iter().filter(|(other, _)| other == host).count();
            if found != *wanted {
                let problem = format!(
                    "{host} has {found} rank{}, and --ranks-per-node asks for {wanted}; start as many there (mpirun --map-by ppr:{wanted}:node, srun --ntasks-per-node={wanted})",
                    if found == 1 { "" } else { "s" }
                );
                return Err(self.said_by_first(Misuse::new(problem)));
            }
        }
        Ok(())
    }

    /// An error that every rank has found.
    pub fn said_by_first(&self, problem: Misuse) -> anyhow::Error {
        if self.comm.rank() == 0 {
            problem.into()
        } else {
            SaidElsewhere { code: 2 }.into()
        }
    }

    /// What came of something that every rank has done by itself: where any of them failed, all end, and rank 0 says which and why.
    ///
    /// # Errors
    /// That; ranks that do not answer.
    pub fn agree<T>(&self, own: anyhow::Result<T>) -> anyhow::Result<T> {
        let own = own.map_err(|error| match error.downcast::<lowrank::Error>() {
            Ok(error) => error,
            Err(error) if error.is::<Misuse>() => lowrank::Error::Settings(error.to_string()),
            Err(error) => lowrank::Error::Training(paragraph(&error)),
        });
        self.everybody().agree(own).map_err(quietly)
    }

    /// Lets every rank that was stopped end with the same signal's exit code.
    ///
    /// # Errors
    /// Ranks that do not answer.
    pub fn share_signal(&self) -> anyhow::Result<()> {
        if self.comm.size() > 1 {
            let told = self.everybody().gather_all(&interrupt::signal())?;
            interrupt::take_signal(told.into_iter().max().unwrap_or(0));
        }
        Ok(())
    }

    /// Notes that this rank fails with an error that the others do not know of, so that [`leave`] ends them, too.
    pub fn note_failure(&self, error: &lowrank::Error) {
        if self.comm.size() > 1 && !error.is_agreed() {
            FAILED_ALONE.set(true);
        }
    }
}

/// Ends the other ranks where this one has panicked, and says so before.
pub fn end_the_others() {
    if let Some(comm) = JOINED.take()
        && comm.size() > 1
    {
        comm.abort(101);
    }
}

/// An error that rank 0 says is not said again.
pub fn quietly(error: lowrank::Error) -> anyhow::Error {
    if matches!(error, lowrank::Error::OtherRank { .. }) {
        let code = if error.is_misuse() { 2 } else { 1 };
        return SaidElsewhere { code }.into();
    }
    error.into()
}

/// Leaves the job, if this process is a part of one, after everything was printed: launchers end all ranks with the first one that fails. The
/// exit code.
pub fn leave(code: u8) -> u8 {
    let Some(comm) = JOINED.take() else {
        return code;
    };
    if comm.size() > 1 {
        if FAILED_ALONE.get() {
            comm.abort(i32::from(code.max(1)));
        }
        if comm.barrier().is_err() {
            comm.abort(i32::from(code.max(1)));
        }
    }
    code
}

/// What a rank may compute on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Processors {
    host: String,
    /// Processors that the process may use, as Linux lists them.
    allowed: String,
    /// How many these are, and not more than its share of time allows.
    count: usize,
    /// Processors of the machine.
    online: usize,
}

impl Processors {
    fn of_this_process(host: &str) -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let allowed = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let online = std::fs::read_to_string("/sys/devices/system/cpu/online");
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            host: host.to_owned(),
            allowed: allowed.unwrap_or_default().trim().to_owned(),
            count,
            online: online.map_or(count, |list| listed(&list)),
        }
    }

    /// The threads of a rank, when those that may use the same processors share them.
    fn share(&self, all: &[Self]) -> usize {
        let sharing = all
            .iter()
            .filter(|other| other.host == self.host && other.allowed == self.allowed);
        (self.count / sharing.count().max(1)).max(1)
    }
}

/// What the ranks are, in a line.
fn summary(ranks: usize, hosts: usize, stages: usize, engine: &str, threads: usize) -> String {
    let counted = |count: usize, what: &str| {
        let plural = if count == 1 { "" } else { "s" };
        format!("{count} {what}{plural}")
    };
    let pipelines = if stages > 1 {
        let pipelines = counted(ranks / stages, "pipeline");
        format!(", {pipelines} of {stages} stages")
    } else {
        String::new()
    };
    format!(
        "{} on {}{pipelines}, {engine}; {} here",
        counted(ranks, "rank"),
        counted(hosts, "machine"),
        counted(threads, "thread")
    )
}

/// How many numbers there are in a list like `0-3,8`.
fn listed(list: &str) -> usize {
    let number = |text: &str| text.trim().parse::<usize>().ok();
    let ranges = list.split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(number(last)?.saturating_sub(number(first)?) + 1)
    });
    ranges.sum()
}

/// The warning where ranks are bound to one processor each and others of their machine are idle.
fn idle_processors(all: &[Processors]) -> Option<String> {
    let (rank, bound) = all.iter().enumerate().find(|(_, of_rank)| {
        let same_host = all.iter().filter(|other| other.host == of_rank.host);
        let lists: BTreeSet<&str> = same_host.map(|other| other.allowed.as_str()).collect();
        let used: usize = lists.into_iter().map(listed).sum();
        listed(&of_rank.allowed) == 1 && used < of_rank.online
    })?;
    Some(format!(
        "rank {rank} on {} is bound to one of its {} processors, and others are idle; start the ranks with --bind-to none (Open MPI), -bind-to none (MPICH) or --cpus-per-task (Slurm)",
        bound.host, bound.online
    ))
}

/// Becomes `mpirun`, which starts this program again as ranks; returns where that fails.
fn become_launcher(wanted: RanksPerNode) -> anyhow::Error {
    let Ok(program) = std::env::current_exe() else {
        return anyhow::anyhow!("the program's own file cannot be found");
    };
    let Some(is_open_mpi) = mpirun_is_open_mpi() else {
        return Misuse::new(
            "--ranks-per-node starts the ranks with mpirun, and there is none; install an MPI (on Debian: openmpi-bin or mpich), or leave the flag out",
        )
        .into();
    };
    let arguments = launcher_arguments(wanted, is_open_mpi, is_root());
    let mut command = std::process::Command::new("mpirun");
    command
        .args(arguments)
        .arg(program)
        .args(std::env::args_os().skip(1));
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        let error = command.exec();
        anyhow::Error::from(error).context("mpirun cannot be started")
    }
    #[cfg(not(unix))]
    {
        drop(command);
        Misuse::new("several ranks need MPI, which is supported on Linux and macOS").into()
    }
}

#[cfg(unix)]
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[cfg(not(unix))]
fn is_root() -> bool {
    false
}

/// Whether the `mpirun` that is found is Open MPI's; `None` where there is none.
fn mpirun_is_open_mpi() -> Option<bool> {
    let output = std::process::Command::new("mpirun")
        .arg("--version")
        .output()
        .context("mpirun")
        .ok()?;
    Some(String::from_utf8_lossy(&output.stdout).contains("Open MPI"))
}

fn launcher_arguments(wanted: RanksPerNode, is_open_mpi: bool, is_root: bool) -> Vec<OsString> {
    let count = wanted.count().to_string();
    let mut arguments = vec!["-n", &count];
    match (is_open_mpi, wanted) {
        (true, RanksPerNode::Auto) => {
            arguments.extend(["--map-by", "ppr:1:numa", "--bind-to", "numa"]);
        }
        (true, RanksPerNode::Count(_)) => {
            arguments.extend(["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]);
        }
        (false, RanksPerNode::Auto) => arguments.extend(["-bind-to", "numa"]),
        (false, RanksPerNode::Count(_)) => arguments.extend(["-bind-to", "none"]),
    }
    // Whoever starts this program as root, as in a container, means it; Open MPI's mpirun asks again.
    if is_open_mpi && is_root {
        arguments.push("--allow-run-as-root");
    }
    arguments.into_iter().map(OsString::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(host: &str, allowed: &str) -> Processors {
        Processors {
            host: host.to_owned(),
            allowed: allowed.to_owned(),
            count: listed(allowed),
            online: 8,
        }
    }

    #[test]
    fn ranks_share_the_processors_of_their_machine() {
        assert_eq!(listed("0-3,8, 10-11\n"), 7);
        let all = [
            rank("a", "0-7"),
            rank("a", "0-7"),
            rank("b", "0-7"),
            rank("c", "0-3"),
            rank("c", "4-7"),
        ];
        let shares: Vec<usize> = all.iter().map(|rank| rank.share(&all)).collect();
        assert_eq!(shares, [4, 4, 8, 4, 4]);
        let crowd = vec![rank("a", "0-7"); 20];
        assert_eq!(crowd[0].share(&crowd), 1);
    }

    #[test]
    fn ranks_are_summed_up() {
        assert_eq!(
            summary(8, 4, 2, "MPICH 4.0.2", 1),
            "8 ranks on 4 machines, 4 pipelines of 2 stages, MPICH 4.0.2; 1 thread here"
        );
        assert_eq!(
            summary(2, 1, 1, "Open MPI 4.1.4", 16),
            "2 ranks on 1 machine, Open MPI 4.1.4; 16 threads here"
        );
    }

    #[test]
    fn a_rank_that_is_bound_to_one_processor_is_named() {
        assert_eq!(idle_processors(&[rank("a", "0-3"), rank("a", "4-7")]), None);
        let all: Vec<_> = (0..8).map(|n| rank("a", &n.to_string())).collect();
        assert_eq!(idle_processors(&all), None, "all are used");
        let warning = idle_processors(&[rank("a", "0-7"), rank("b", "0"), rank("b", "1")]).unwrap();
        assert!(
            warning.contains("rank 1 on b is bound to one of its 8"),
            "{warning}"
        );
    }

    #[test]
    fn the_launcher_is_told_where_ranks_go() {
        let words = |wanted, is_open_mpi, is_root| -> String {
            let all = launcher_arguments(wanted, is_open_mpi, is_root);
            let all: Vec<_> = all.iter().map(|word| word.to_string_lossy()).collect();
            all.join(" ")
        };
        let two = RanksPerNode::Count(2);
        assert_eq!(
            words(two, true, false),
            "-n 2 --map-by :OVERSUBSCRIBE --bind-to none"
        );
        assert_eq!(words(two, false, true), "-n 2 -bind-to none");
        assert!(
            words(RanksPerNode::Auto, true, true)
                .ends_with("ppr:1:numa --bind-to numa --allow-run-as-root")
        );
        assert_eq!("auto".parse(), Ok(RanksPerNode::Auto));
        assert!("0".parse::<RanksPerNode>().is_err() && "two".parse::<RanksPerNode>().is_err());
    }

    #[test]
    fn nodes_without_processors_do_not_count() {
        let folder = tempfile::tempdir().unwrap();
        for (name, list) in [
            ("node0", "0-3"),
            ("node1", "4-7"),
            ("node2", "\n"),
            ("power", "1"),
        ] {
            let node = folder.path().join(name);
            std::fs::create_dir(&node).unwrap();
            std::fs::write(node.join("cpulist"), list).unwrap();
        }
        assert_eq!(numa_nodes(folder.path()), 2);
        assert_eq!(numa_nodes(&folder.path().join("none")), 1);
    }
}

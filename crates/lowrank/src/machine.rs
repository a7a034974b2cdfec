//! The memory that the machine has free, as the kernel, the process's control group and its own limits count it.

use std::fs;
use std::path::{Path, PathBuf};

/// What bounds the memory of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bound {
    /// What the system could give to programs.
    Machine,
    /// The limit of a control group, such as a container's or a job's.
    Group,
    /// The limit on addresses.
    Addresses,
    /// The limit on data.
    Data,
}

impl Bound {
    /// Who has so much free, as the beginning of "… has 12 MiB free".
    pub fn whose(self) -> &'static str {
        match self {
            Self::Machine => "the machine",
            Self::Group => "the control group of this process (a container's or a job's limit)",
            Self::Addresses => "this process under its limit on addresses (ulimit -v)",
            Self::Data => "this process under its limit on data (ulimit -d)",
        }
    }
}

/// Bytes that this process could still get: what the system could give to programs now, or what its control group or its
/// limits (`ulimit -v`, `ulimit -d`) have left where that is less; `None` where the system doesn't tell.
pub fn available_memory() -> Option<u64> {
    let process = Process::read();
    let left = [
        machine_left(),
        group_room(0),
        process.address_space.map(Limit::left),
        process.data.map(Limit::left),
    ];
    left.into_iter().flatten().min()
}

/// Bytes that this process could hold in all, in the sense of a plan's total: what it could still get, and what it holds
/// of what a plan counts. `mapped` bytes of weights are mapped: a limit on addresses counts them at once, while memory
/// counts the pages that were read. `to_map` bytes are going to be. A limit on data counts neither. Also what bounds it.
pub fn memory_room(mapped: u64, to_map: u64) -> Option<(u64, Bound)> {
    let process = Process::read();
    // Pages of files, such as the program's own, are given back where they are wanted, so they are among what is left.
    let machine = machine_left().map(|left| left + process.anonymous);
    let group = group_room(process.anonymous);
    // Stacks and the allocator's reserves are addresses, too, but nothing that a plan counts.
    let space = process
        .address_space
        .map(|limit| limit.left() + mapped + process.anonymous);
    let data = process
        .data
        .map(|limit| limit.left() + mapped + to_map + process.anonymous);
    let all = [
        (machine, Bound::Machine),
        (group, Bound::Group),
        (space, Bound::Addresses),
        (data, Bound::Data),
    ];
    all.into_iter()
        .filter_map(|(room, bound)| Some((room?, bound)))
        .min()
}

/// Whether addresses are limited, so that a file counts as a whole once it is mapped.
pub fn addresses_are_limited() -> bool {
    Process::read().address_space.is_some()
}

/// Whether `mapped` bytes of files and `allocated` bytes of memory fit in what the process's own limits have left. An
/// allocation beyond a limit would end the program.
///
/// # Errors
/// Where they don't: the bytes that are needed, those that are left, and by which limit.
pub fn check_limits(mapped: u64, allocated: u64) -> Result<(), (u64, u64, Bound)> {
    let process = Process::read();
    let limits = [
        (process.address_space, mapped + allocated, Bound::Addresses),
        (process.data, allocated, Bound::Data),
    ];
    for (limit, needed, bound) in limits {
        if let Some(left) = limit.map(Limit::left)
            && needed > left
        {
            return Err((needed, left, bound));
        }
    }
    Ok(())
}

/// What the system could give to programs now.
fn machine_left() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    field(&text, "MemAvailable:")
}

/// What the process's control group has room for beside what others hold, where the process holds `held` bytes.
fn group_room(held: u64) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    group_room_in(&text, Path::new("/sys/fs/cgroup"), held)
}

/// A limit of the process, and what counts against it, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit {
    most: u64,
    used: u64,
}

impl Limit {
    fn left(self) -> u64 {
        self.most.saturating_sub(self.used)
    }
}

/// What the process holds and may hold, in bytes; zero and `None` where the system doesn't tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Process {
    anonymous: u64,
    address_space: Option<Limit>,
    data: Option<Limit>,
}

impl Process {
    fn read() -> Self {
        let read = |name| fs::read_to_string(name).unwrap_or_default();
        Self::parse(&read("/proc/self/status"), &read("/proc/self/limits"))
    }

    fn parse(status: &str, limits: &str) -> Self {
        let bytes = |name| field(status, name).unwrap_or(0);
        let limit = |name: &str, used| {
            let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
            // The soft limit comes first; "unlimited" is no number.
            let most = line.split_whitespace().next()?.parse().ok()?;
            Some(Limit { most, used })
        };
        Self {
            anonymous: bytes("RssAnon:"),
            address_space: limit("Max address space", bytes("VmSize:")),
            data: limit("Max data size", bytes("VmData:")),
        }
    }
}

/// "NAME: 12 kB" in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let kib = text.lines().find_map(|line| {
        let value = line.strip_prefix(name)?.trim();
        value.strip_suffix(" kB")?.trim().parse::<u64>().ok()
    })?;
    Some(kib * 1024)
}

/// The least that the control groups of a process have left, from the root down to its own, and `held` bytes with it, but never
/// more than a group's limit; both versions. `text` is /proc/self/cgroup: lines of `id:controllers:path`.
fn group_room_in(text: &str, root: &Path, held: u64) -> Option<u64> {
    let groups = text.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        match controllers {
            "" => Some((root.to_path_buf(), path, "memory.max", "memory.current")),
            _ if controllers.split(',').any(|name| name == "memory") => {
                let (limit, usage) = ("memory.limit_in_bytes", "memory.usage_in_bytes");
                Some((root.join("memory"), path, limit, usage))
            }
            _ => None,
        }
    });
    groups
        .flat_map(|(mount, path, limit, usage)| {
            folders(&mount, path)
                .into_iter()
                .filter_map(move |folder| room_in(&folder, limit, usage, held))
        })
        .min()
}

/// A group's folder and those above it. Inside a container the path may not be visible; the mount itself is then the group.
fn folders(mount: &Path, path: &str) -> Vec<PathBuf> {
    let own = mount.join(path.trim_start_matches('/'));
    own.ancestors()
        .take_while(|folder| folder.starts_with(mount))
        .map(Path::to_path_buf)
        .collect()
}

fn room_in(folder: &Path, limit: &str, usage: &str, held: u64) -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        let text = fs::read_to_string(folder.join(name)).ok()?;
        text.trim().parse().ok()
    };
    // "max" is no number; version 1 says it with one that no machine has.
    let limit = number(limit).filter(|limit| *limit < 1 << 60)?;
    let used = number(usage)?;
    // Pages of files are given back where they are wanted.
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let value = |wanted: &str| -> Option<u64> {
        let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
        let (_, value) = lines.find(|(name, _)| *name == wanted)?;
        value.trim().parse().ok()
    };
    // Version 1 counts the groups below under other names.
    let reclaimable: u64 = ["inactive_file", "active_file"]
        .iter()
        .filter_map(|name| value(&format!("total_{name}")).or_else(|| value(name)))
        .sum();
    let charged = used.saturating_sub(reclaimable);
    Some(
        limit
            .saturating_sub(charged)
            .saturating_add(held)
            .min(limit),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:  100 kB\nMemFree:  10 kB\nMemAvailable:   64 kB\n";
        assert_eq!(field(text, "MemAvailable:"), Some(65536));
        assert_eq!(field("MemTotal: 100 kB\n", "MemAvailable:"), None);
    }

    #[test]
    fn the_limits_of_the_process_are_read() {
        let status = "VmSize:\t  2000 kB\nRssAnon:\t   300 kB\nVmData:\t   400 kB\n";
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                      Max data size             unlimited            unlimited            bytes\n\
                      Max address space         3072000              unlimited            bytes\n";
        let process = Process::parse(status, limits);
        assert_eq!(process.anonymous, 307_200);
        assert_eq!(process.data, None);
        let space = process.address_space.unwrap();
        assert_eq!((space.most, space.left()), (3_072_000, 1_024_000));
        assert_eq!(Limit { most: 1, used: 2 }.left(), 0);
        assert_eq!(Process::parse("", ""), Process::default());
    }

    #[test]
    fn the_tightest_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |folder: &str, files: &[(&str, &str)]| {
            let folder = root.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            for (name, text) in files {
                fs::write(folder.join(name), text).unwrap();
            }
        };
        write(
            "a",
            &[("memory.max", "1000\n"), ("memory.current", "900\n")],
        );
        write(
            "a/b",
            &[("memory.max", "max\n"), ("memory.current", "800\n")],
        );
        let room = |text, held| group_room_in(text, root.path(), held);
        assert_eq!(room("0::/a/b\n", 0), Some(100));
        write("a", &[("memory.stat", "anon 5\ninactive_file 250\n")]);
        assert_eq!(room("0::/a/b\n", 0), Some(350));
        let stat = "anon 5\ninactive_file 250\nactive_file 50\n";
        write("a", &[("memory.stat", stat)]);
        assert_eq!(room("0::/a/b\n", 0), Some(400));
        assert_eq!(room("0::/a/b\n", 500), Some(900));
        assert_eq!(
            room("0::/a/b\n", 5000),
            Some(1000),
            "never more than the limit"
        );
        assert_eq!(room("0::/\n", 0), None);
        let first = [
            ("memory.limit_in_bytes", "500"),
            ("memory.usage_in_bytes", "600"),
        ];
        write("memory/x", &first);
        let text = "3:cpu,cpuacct:/x\n2:memory:/x\n";
        assert_eq!(room(text, 0), Some(0));
        let stat = "inactive_file 1\ntotal_inactive_file 200\ntotal_active_file 100\n";
        write("memory/x", &[("memory.stat", stat)]);
        assert_eq!(room(text, 0), Some(200));
    }
}

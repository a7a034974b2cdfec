//! The memory that the machine has free, as the kernel and the process's control group count it.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that this process could still get: what the system could give to programs now, or what its control group has left
/// where that is less; `None` where the system doesn't tell.
pub fn available_memory() -> Option<u64> {
    let system = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| meminfo_available(&text));
    let group = fs::read_to_string("/proc/self/cgroup")
        .ok()
        .and_then(|text| group_left(&text, Path::new("/sys/fs/cgroup")));
    match (system, group) {
        (Some(system), Some(group)) => Some(system.min(group)),
        (one, other) => one.or(other),
    }
}

fn meminfo_available(text: &str) -> Option<u64> {
    let kib = text.lines().find_map(|line| {
        let value = line.strip_prefix("MemAvailable:")?.trim();
        value.strip_suffix(" kB")?.trim().parse::<u64>().ok()
    })?;
    Some(kib * 1024)
}

/// The least that the control groups of a process have left, from the root down to its own; both versions. `text` is
/// /proc/self/cgroup: lines of `id:controllers:path`.
fn group_left(text: &str, root: &Path) -> Option<u64> {
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
                .filter_map(move |folder| left_in(&folder, limit, usage))
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

fn left_in(folder: &Path, limit: &str, usage: &str) -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        let text = fs::read_to_string(folder.join(name)).ok()?;
        text.trim().parse().ok()
    };
    // "max" is no number; version 1 says it with one that no machine has.
    let limit = number(limit).filter(|limit| *limit < 1 << 60)?;
    let used = number(usage)?;
    // Pages of files are given back where they are wanted.
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let reclaimable = stat.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        let is_file = matches!(name, "inactive_file" | "total_inactive_file");
        is_file.then(|| value.trim().parse::<u64>().ok())?
    });
    Some(limit.saturating_sub(used.saturating_sub(reclaimable.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:  100 kB\nMemFree:  10 kB\nMemAvailable:   64 kB\n";
        assert_eq!(meminfo_available(text), Some(65536));
        assert_eq!(meminfo_available("MemTotal: 100 kB\n"), None);
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
        assert_eq!(group_left("0::/a/b\n", root.path()), Some(100));
        write("a", &[("memory.stat", "anon 5\ninactive_file 250\n")]);
        assert_eq!(group_left("0::/a/b\n", root.path()), Some(350));
        assert_eq!(group_left("0::/\n", root.path()), None);
        let first = [
            ("memory.limit_in_bytes", "500"),
            ("memory.usage_in_bytes", "600"),
        ];
        write("memory/x", &first);
        let text = "3:cpu,cpuacct:/x\n2:memory:/x\n";
        assert_eq!(group_left(text, root.path()), Some(0));
    }
}

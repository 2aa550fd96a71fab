//! What the machine has: memory, also within the limits of control groups (containers, systemd), processor, disks.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Where control groups are mounted.
const CONTROL_GROUPS: &str = "/sys/fs/cgroup";

/// Memory of the machine, and what this process may have of it, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// All of it.
    pub total: Option<u64>,
    /// What the kernel would give without swapping.
    pub available: Option<u64>,
    /// The tightest limit of a control group that the process is in.
    pub limit: Option<Limit>,
}

/// The limit of a control group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Limit {
    /// Bytes that its processes may take together.
    pub bytes: u64,
    /// What is left of them. Files that the kernel caches for them are given up first and count as left.
    pub left: u64,
}

impl Memory {
    /// Of this machine and this process, as far as it says.
    pub fn now() -> Self {
        let (meminfo, groups) = (meminfo(), control_groups());
        Self {
            total: kib(&meminfo, "MemTotal"),
            available: kib(&meminfo, "MemAvailable"),
            limit: tightest(limits(Path::new(CONTROL_GROUPS), &groups)),
        }
    }

    /// What a process can still have: the least of what the kernel and the limit leave.
    pub fn free(&self) -> Option<u64> {
        [self.available, self.limit.map(|limit| limit.left)].into_iter().flatten().min()
    }
}

/// What this process could have if no other had any, in bytes: all memory of the machine, or the smallest limit of a
/// control group. None if the machine does not say.
pub fn capacity() -> Option<u64> {
    let (meminfo, groups) = (meminfo(), control_groups());
    let limits = limits(Path::new(CONTROL_GROUPS), &groups).into_iter().map(|limit| limit.bytes);
    limits.chain(kib(&meminfo, "MemTotal")).min()
}

/// What this process could have, with what it has already: memory that it freed and keeps for its next use is not free for
/// others. None if the machine does not say.
pub fn obtainable() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    Some(Memory::now().free()? + kib(&status, "VmRSS").unwrap_or(0))
}

fn meminfo() -> String {
    fs::read_to_string("/proc/meminfo").unwrap_or_default()
}

/// The groups of this process, as the kernel lists them.
fn control_groups() -> String {
    fs::read_to_string("/proc/self/cgroup").unwrap_or_default()
}

/// A value of `/proc/meminfo`, or of another file like it, in bytes.
fn kib(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// The limits of the groups that `/proc/self/cgroup` names, and of those that they are in. `root` is where control groups
/// are mounted: of version 2, or of version 1, which has a directory for each controller.
fn limits(root: &Path, groups: &str) -> Vec<Limit> {
    let mut limits = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (top, files) = match controllers {
            "" => (root.to_owned(), ["memory.max", "memory.current", "inactive_file"]),
            all if all.split(',').any(|one| one == "memory") => {
                let v1 = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"];
                (root.join("memory"), v1)
            }
            _ => continue,
        };
        // In a container the path is that of the host, and its own group is mounted at the top.
        let own = top.join(path.trim_start_matches('/'));
        let within = own.ancestors().take_while(|dir| dir.starts_with(&top)).map(Path::to_owned);
        limits.extend(within.filter_map(|dir: PathBuf| limit_of(&dir, files)));
    }
    limits
}

/// The one that leaves least.
fn tightest(limits: Vec<Limit>) -> Option<Limit> {
    limits.into_iter().min_by_key(|limit| limit.left)
}

fn limit_of(dir: &Path, [max, current, cached]: [&str; 3]) -> Option<Limit> {
    let number = |file: &str| fs::read_to_string(dir.join(file)).ok()?.trim().parse::<u64>().ok();
    let bytes = number(max).filter(|bytes| *bytes < 1 << 60)?; // version 1 says "none" by a huge number
    let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let cached = stat.lines().find_map(|line| line.strip_prefix(cached)?.trim().parse::<u64>().ok());
    let used = number(current).unwrap_or(0).saturating_sub(cached.unwrap_or(0));
    Some(Limit { bytes, left: bytes.saturating_sub(used) })
}

/// The processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Processor {
    /// As it calls itself.
    pub name: Option<String>,
    /// Threads that the process may use at once.
    pub threads: usize,
    /// The instructions that matter here and are there.
    pub features: Vec<&'static str>,
    /// The instructions that this program was built for and that are not there: it may end with SIGILL.
    pub missing: Vec<&'static str>,
}

impl Processor {
    /// Of this machine.
    pub fn now() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let all = features();
        Self {
            name: name.map(|(_, name)| name.trim().to_owned()),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            features: all.iter().filter(|(.., there)| *there).map(|(name, ..)| *name).collect(),
            missing: all
                .iter()
                .filter(|(_, needed, there)| *needed && !there)
                .map(|(name, ..)| *name)
                .collect(),
        }
    }
}

/// Instructions: their name, whether the program was built for them, whether they are there.
#[cfg(target_arch = "x86_64")]
fn features() -> Vec<(&'static str, bool, bool)> {
    vec![
        ("avx2", cfg!(target_feature = "avx2"), is_x86_feature_detected!("avx2")),
        ("fma", cfg!(target_feature = "fma"), is_x86_feature_detected!("fma")),
        ("f16c", cfg!(target_feature = "f16c"), is_x86_feature_detected!("f16c")),
        ("avx512f", false, is_x86_feature_detected!("avx512f")),
    ]
}

#[cfg(not(target_arch = "x86_64"))]
fn features() -> Vec<(&'static str, bool, bool)> {
    Vec::new()
}

/// Bytes that are free where `path` lies, or will lie: of the nearest directory that is there.
pub fn disk_free(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("."));
    let there = if there.as_os_str().is_empty() { Path::new(".") } else { there };
    fs4::available_space(there).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(dir).unwrap();
        files.iter().for_each(|(name, text)| fs::write(dir.join(name), text).unwrap());
    }

    #[test]
    fn the_tightest_of_nested_groups_decides_and_cached_files_count_as_left() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), &[("memory.max", "max\n")]);
        write(&root.path().join("a"), &[("memory.max", "1000\n"), ("memory.current", "900\n")]);
        write(
            &root.path().join("a/b"),
            &[
                ("memory.max", "500\n"),
                ("memory.current", "480\n"),
                ("memory.stat", "anon 100\ninactive_file 300\n"),
            ],
        );
        let found = limits(root.path(), "0::/a/b\n");
        let (outer, inner) = (Limit { bytes: 1000, left: 100 }, Limit { bytes: 500, left: 320 });
        assert_eq!((found.as_slice(), tightest(found.clone())), (&[inner, outer][..], Some(outer)));
        assert_eq!(tightest(limits(root.path(), "0::/elsewhere\n")), None);
        write(root.path(), &[("memory.max", "50\n"), ("memory.current", "20\n")]);
        assert_eq!(tightest(limits(root.path(), "0::/elsewhere\n")), Some(Limit { bytes: 50, left: 30 }));
    }

    #[test]
    fn version_one_has_a_directory_for_memory_and_a_huge_number_for_no_limit() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("memory/jobs");
        write(
            &group,
            &[("memory.limit_in_bytes", "9223372036854771712\n"), ("memory.usage_in_bytes", "5\n")],
        );
        let groups = "5:cpu,cpuacct:/jobs\n4:memory:/jobs\n";
        assert_eq!(tightest(limits(root.path(), groups)), None);
        write(&group, &[("memory.limit_in_bytes", "100\n")]);
        assert_eq!(tightest(limits(root.path(), groups)), Some(Limit { bytes: 100, left: 95 }));
    }

    #[test]
    fn the_kernel_s_figures_are_read_in_bytes() {
        let meminfo = "MemTotal:       24082468 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(kib(meminfo, "MemAvailable"), Some(23_000_000 << 10));
        assert_eq!(kib(meminfo, "SwapFree"), None);
        let memory = Memory::now();
        assert!(memory.free().is_some() && memory.free() <= memory.total, "{memory:?}");
        assert!(capacity() <= memory.total && capacity() >= memory.free(), "{memory:?}");
    }

    #[test]
    fn a_directory_that_is_not_there_yet_has_the_space_of_the_one_that_it_will_lie_in() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(disk_free(&dir.path().join("not/there")).is_some(), disk_free(dir.path()).is_some());
        assert!(disk_free(Path::new("relative")).is_some());
    }
}

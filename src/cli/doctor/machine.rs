//! The program, the processor, memory, disks and the clock.

use std::path::{Path, PathBuf};

use jiff::Timestamp;

use super::{Doctor, Finding};
use crate::blobs::Place;
use crate::engine::memory::gib;
use crate::machine::{Memory, Processor, disk_free};
use crate::{clock, config};

/// With less space than this on a disk, not even small files are safe.
const DISK_LEAST: u64 = 1 << 30;

/// A clock that is before this is wrong: the program is younger.
const EARLIEST: &str = "2026-01-01T00:00:00Z";

pub(super) fn check(args: &Doctor) -> Vec<Finding> {
    let mut findings = vec![program(), processor(), memory(), clock()];
    let data = &args.storage.data;
    findings.push(disk("disk of DATA", "HYPNOS_DATA", data, DISK_LEAST));
    if let Some(dir) = args.storage.objects.is_some().then(|| args.storage.place())
        && let Ok(Place::Directory(dir)) = dir
    {
        findings.push(disk("disk of objects", "HYPNOS_OBJECTS", &dir, DISK_LEAST));
    }
    // The cache of weights may fill it, and a training writes checkpoints beside that.
    let cache = (args.working.weights_gb.clamp(0.0, 1e6) * f64::from(1 << 30)) as u64;
    findings.push(disk("disk of scratch files", "HYPNOS_SCRATCH", &scratch(args), cache));
    // Checkpoints in one file become bundles there.
    findings.push(disk("disk of the cache", "XDG_CACHE_HOME", &config::cache(), DISK_LEAST));
    findings
}

/// Where workers write their temporary files.
pub(super) fn scratch(args: &Doctor) -> PathBuf {
    args.working.scratch.clone().unwrap_or_else(|| args.storage.scratch())
}

fn program() -> Finding {
    let build = if cfg!(debug_assertions) { "dev" } else { "release" };
    let cuda = match (cfg!(feature = "cuda"), cfg!(feature = "cudnn")) {
        (true, true) => "with CUDA and cuDNN",
        (true, false) => "with CUDA, without cuDNN",
        _ => "without CUDA",
    };
    let found = format!("hypnos {}, {build} build, {cuda}", env!("CARGO_PKG_VERSION"));
    if cfg!(debug_assertions) {
        return Finding::warning("program", found, "a release build is faster: cargo build --release");
    }
    Finding::ok("program", found)
}

fn processor() -> Finding {
    let Processor { name, threads, features, missing } = Processor::now();
    let found = format!(
        "{}, {threads} threads, {}",
        name.as_deref().unwrap_or("unknown"),
        if features.is_empty() { "no vector instructions known here".into() } else { features.join(" ") }
    );
    if missing.is_empty() {
        return Finding::ok("processor", found);
    }
    let advice = format!("this program was built for {}; build it for this machine", missing.join(" and "));
    Finding::error("processor", found, advice)
}

fn memory() -> Finding {
    let memory = Memory::now();
    let of = |bytes: Option<u64>| bytes.map_or("unknown".into(), gib);
    let limit = memory.limit.map_or(String::new(), |limit| {
        format!("; the control group allows {}, {} left", gib(limit.bytes), gib(limit.left))
    });
    let found = format!("{}, {} available{limit}", of(memory.total), of(memory.available));
    match memory.limit.zip(memory.available) {
        Some((limit, available)) if limit.left < available => {
            let advice =
                "the limit of the container or of systemd decides what fits: raise it if models need more";
            Finding::warning("memory", found, advice)
        }
        _ => Finding::ok("memory", found),
    }
}

fn clock() -> Finding {
    let now = clock::timestamp();
    let found = format!("{now:.0}");
    match EARLIEST.parse::<Timestamp>() {
        Ok(earliest) if now < earliest => {
            Finding::error("clock", found, "the machine's clock is wrong: set it, by NTP for instance")
        }
        _ => Finding::ok("clock", found),
    }
}

fn disk(check: &str, setting: &str, dir: &Path, wanted: u64) -> Finding {
    let name = dir.display();
    match disk_free(dir) {
        Some(free) if free < DISK_LEAST => {
            let advice = format!("free space, or set {setting} to a directory on another disk");
            Finding::error(check, format!("{name}: {} free", gib(free)), advice)
        }
        Some(free) if free < wanted => {
            let found = format!("{name}: {} free, the cache of weights may take {}", gib(free), gib(wanted));
            Finding::warning(check, found, "lower HYPNOS_WEIGHTS_GB, or use another disk by HYPNOS_SCRATCH")
        }
        Some(free) => Finding::ok(check, format!("{name}: {} free", gib(free))),
        None => Finding::warning(
            check,
            format!("{name}: its free space is unknown"),
            "look whether it can be read",
        ),
    }
}

/// What can be said of a GPU's driver, for whoever wonders why there is none.
pub(super) fn driver() -> String {
    let version = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let version = version.split_whitespace().find(|word| {
        word.contains('.')
            && word.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
    });
    version.map_or_else(|| "no NVIDIA driver is loaded".into(), |version| format!("NVIDIA driver {version}"))
}

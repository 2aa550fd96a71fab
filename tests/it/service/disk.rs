//! A disk on which SQLite's log is synced slowly or not at all when a test says so: a preloaded library, with which the
//! test starts itself again in a process of its own.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The variable with the directory that the library and the test share.
const DIRECTORY: &str = "HYPNOS_TEST_DISK";

/// The disk under the databases of this process.
pub(crate) struct Disk(PathBuf);

impl Disk {
    /// In the process that has such a disk: that disk. In any other: runs the test `name` again in one that has, and
    /// gives none when it has passed.
    pub(crate) fn under(name: &str) -> Option<Self> {
        if let Some(directory) = std::env::var_os(DIRECTORY) {
            return Some(Self(directory.into()));
        }
        let directory = tempfile::tempdir().unwrap();
        let library = directory.path().join("disk.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/service/disk.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).arg("-ldl");
        assert!(compiler.status().expect("a C compiler, which Rust links with").success());
        let again = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env("LD_PRELOAD", &library)
            .env(DIRECTORY, directory.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&again.stdout);
        assert!(
            again.status.success() && said.contains("1 passed"),
            "{said}{}",
            String::from_utf8_lossy(&again.stderr)
        );
        None
    }

    /// From now on a sync waits.
    pub(crate) fn hold(&self) {
        std::fs::write(self.0.join("hold"), "").unwrap();
    }

    /// From now on a sync fails, with what was to be synced in the file.
    pub(crate) fn fail(&self) {
        std::fs::write(self.0.join("fail"), "").unwrap();
    }

    /// From now on nothing more can be written.
    pub(crate) fn fill(&self) {
        std::fs::write(self.0.join("full"), "").unwrap();
    }

    /// The disk works again.
    pub(crate) fn mend(&self) {
        for what in ["hold", "fail", "full"] {
            let _ = std::fs::remove_file(self.0.join(what)); // it may not be there
        }
    }
}

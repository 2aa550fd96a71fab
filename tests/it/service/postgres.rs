//! A real Postgres for tests.
//!
//! Every test runs in a process of its own, and a cluster takes most of a second to make. So the first test that wants
//! one makes it, and all share it, each with a database of its own. Who uses a cluster holds a shared lock on a file,
//! which the kernel drops however the test ends; beside the server sleeps a watchdog that wants the same lock for
//! itself alone. It gets it when no test is left, and then stops the server and removes its files. (`flock` is a
//! program of util-linux, which every Linux has.)

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;

use sqlx::{AssertSqlSafe, ConnectOptions, Connection, postgres::PgConnectOptions};

/// A running server, for as long as this process lives.
pub(crate) struct Postgres {
    bin: PathBuf,
    /// Holds its data and its socket. Short, for a socket's path has at most 107 bytes.
    dir: PathBuf,
    /// The user that it runs as: the programs refuse root.
    user: Option<(u32, u32)>,
    settings: &'static str,
    _used: File,
}

/// For speed: the power never goes.
const QUICK: &str = "-c fsync=off -c full_page_writes=off -c synchronous_commit=off";
/// As in production.
const DURABLE: &str = "-c fsync=on";

impl Postgres {
    /// A fresh, empty database on the server that all tests share: its address.
    pub(crate) async fn database() -> String {
        static SHARED: OnceLock<Postgres> = OnceLock::new();
        SHARED.get_or_init(Self::shared).fresh().await
    }

    /// A server of this test's own, which it may stop.
    pub(crate) fn own() -> Self {
        let lock = tempfile::NamedTempFile::new().expect("a lock file");
        let name = uuid::Uuid::now_v7().simple().to_string();
        Self::used(&name, DURABLE, lock.path())
    }

    fn shared() -> Self {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let starting = File::create(target.join("postgres.starting")).expect("a lock file");
        starting.lock().expect("a lock");
        let name = format!("{:08x}", crc32fast::hash(env!("CARGO_TARGET_TMPDIR").as_bytes()));
        Self::used(&name, QUICK, &target.join("postgres.lock"))
    }

    /// A fresh, empty database: its address.
    pub(crate) async fn fresh(&self) -> String {
        let name = format!("t{}", uuid::Uuid::now_v7().simple());
        let mut server = PgConnectOptions::new().socket(&self.dir).username("postgres").database("postgres");
        server = server.disable_statement_logging();
        let mut connection = server.connect().await.expect("the server answers");
        let create = AssertSqlSafe(format!("create database {name}"));
        sqlx::raw_sql(create).execute(&mut connection).await.expect("a database");
        connection.close().await.expect("it lets go");
        format!("postgres://postgres@localhost/{name}?host={}", self.dir.display())
    }

    /// As if the power went.
    pub(crate) fn cut_power(&self) {
        self.program("pg_ctl", &["stop", "-w", "-m", "immediate", "-D", &self.data()]);
    }

    /// Starts it, again.
    pub(crate) fn start(&self) {
        let settings = format!(
            "{} -c listen_addresses= -c max_connections=300 -k {}",
            self.settings,
            self.dir.display()
        );
        let log = self.dir.join("log").display().to_string();
        self.program("pg_ctl", &["start", "-w", "-D", &self.data(), "-l", &log, "-o", &settings]);
    }

    /// The server of that name, started unless it runs.
    fn used(name: &str, settings: &'static str, lock: &Path) -> Self {
        let used = File::create(lock).expect("a lock file");
        used.lock_shared().expect("a lock"); // waits for a watchdog that is just tidying up
        let dir = std::env::temp_dir().join(format!("hypnos-postgres-{name}"));
        let user = user_to_be(&used);
        let server = Self { bin: find_programs(), dir, user, settings, _used: used };
        if !server.command("pg_ctl", &["status", "-D", &server.data()]).success() {
            server.make();
            server.watch(lock);
            server.start();
        }
        server
    }

    fn make(&self) {
        let _ = fs::remove_dir_all(&self.dir); // what a machine that went down left
        fs::create_dir(&self.dir).expect("a directory for the server");
        if let Some((uid, gid)) = self.user {
            chown(&self.dir, Some(uid), Some(gid)).expect("root may");
        }
        self.program(
            "initdb",
            &["-N", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8", "-D", &self.data()],
        );
    }

    /// Leaves a watchdog behind, in a process group of its own, that outlives the last test by a moment.
    fn watch(&self, lock: &Path) {
        let lock = File::open(lock).expect("our lock file");
        let stop =
            "exec 3<&0; (flock --exclusive 3; \"$0\" stop -m immediate -D \"$1/data\"; rm -rf \"$1\") &";
        let mut watchdog = Command::new("sh");
        watchdog.args(["-c", stop]).arg(self.bin.join("pg_ctl")).arg(&self.dir).process_group(0);
        self.lower(&mut watchdog);
        assert!(watchdog.stdin(lock).status().expect("a shell").success());
    }

    fn data(&self) -> String {
        self.dir.join("data").display().to_string()
    }

    /// Runs one of its programs, which must do its work.
    fn program(&self, name: &str, args: &[&str]) {
        let status = self.command(name, args);
        let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        assert!(status.success(), "{name} {args:?}: {status}\n{log}");
    }

    /// Runs one of its programs to its end.
    fn command(&self, name: &str, args: &[&str]) -> ExitStatus {
        let mut command = Command::new(self.bin.join(name));
        self.lower(command.args(args));
        command.status().expect("a program of Postgres")
    }

    /// Without our privileges, our terminal and our directory.
    fn lower(&self, command: &mut Command) {
        command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
    }
}

/// The directory with Postgres' programs: of those on the path, or of Debian's newest.
pub(crate) fn find_programs() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .map(|versions| versions.flatten().map(|version| version.path().join("bin")).collect())
        .unwrap_or_default();
    places.sort();
    places.reverse();
    places.extend(std::env::split_paths(&path));
    let found = places.into_iter().find(|bin| bin.join("initdb").exists() && bin.join("pg_ctl").exists());
    found.expect("Postgres is not installed: apt-get install postgresql")
}

/// Root steps down to `postgres` or `nobody`; anybody else stays.
fn user_to_be(own: &File) -> Option<(u32, u32)> {
    if own.metadata().expect("our own lock file").uid() != 0 {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").expect("the users of this machine");
    let find = |name: &str| {
        let fields: Vec<&str> =
            users.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|f| f[0] == name)?;
        Some((fields[2].parse().ok()?, fields[3].parse().ok()?))
    };
    Some(find("postgres").or_else(|| find("nobody")).expect("a user to run Postgres as"))
}

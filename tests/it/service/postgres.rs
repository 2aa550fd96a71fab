//! A real Postgres for tests, and a real PgBouncer in front of it.
//!
//! Every test runs in a process of its own, and a cluster takes most of a second to make. So the first test that wants
//! one makes it, and all share it, each with a database of its own. Who uses a cluster holds a shared lock on a file,
//! which the kernel drops however the test ends; beside the server sleeps a watchdog that wants the same lock for
//! itself alone. It gets it when no test is left, and then stops the server and removes its files. (`flock` is a
//! program of util-linux, which every Linux has.)

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;

use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};

use super::test_workers::eventually;

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

/// For speed: power failures are not simulated.
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

    /// The address of the maintenance database.
    pub(crate) fn maintenance(&self) -> String {
        format!("postgres://postgres@localhost/postgres?host={}", self.dir.display())
    }

    /// Sets a parameter of the whole server, for sessions that run as well. None: as it was.
    pub(crate) async fn set(&self, name: &str, value: Option<&str>) {
        let mut connection = self.admin().await;
        let alter = match value {
            Some(value) => format!("alter system set {name} = '{value}'"),
            None => format!("alter system reset {name}"),
        };
        sqlx::raw_sql(AssertSqlSafe(alter)).execute(&mut connection).await.unwrap();
        sqlx::raw_sql("select pg_reload_conf()").execute(&mut connection).await.unwrap();
        let show = format!("select current_setting('{name}') as value");
        eventually("the parameter is heard", async || {
            let mut other = PgConnection::connect(&self.maintenance()).await.unwrap();
            let found: String =
                sqlx::query_scalar(AssertSqlSafe(show.clone())).fetch_one(&mut other).await.unwrap();
            (found == value.unwrap_or_default() || value.is_none()).then_some(())
        })
        .await;
    }

    /// From now on commits wait for a standby that is not there.
    pub(crate) async fn lose_standby(&self) {
        self.set("synchronous_standby_names", Some("nobody")).await;
        // Another process tells the sessions of it: a commit of our own shows when they know.
        let mut probe = PgConnection::connect(&self.maintenance()).await.unwrap();
        let probing = tokio::spawn(async move {
            loop {
                let write = "create table if not exists probe (); drop table probe";
                sqlx::raw_sql(write).execute(&mut probe).await.unwrap();
            }
        });
        let pid = eventually("a commit waits", async || self.waiting_for_standby().await).await;
        probing.abort();
        let mut admin = self.admin().await;
        sqlx::query("select pg_terminate_backend($1)").bind(pid).execute(&mut admin).await.unwrap();
        let over = async || self.waiting_for_standby().await.is_none().then_some(());
        eventually("it waits no more", over).await;
    }

    /// The standby is not awaited any more.
    pub(crate) async fn find_standby(&self) {
        self.set("synchronous_standby_names", None).await;
    }

    /// A session whose commit waits for a standby.
    pub(crate) async fn waiting_for_standby(&self) -> Option<i32> {
        let select = "select pid from pg_stat_activity where wait_event = 'SyncRep' limit 1";
        sqlx::query_scalar(select).fetch_optional(&mut self.admin().await).await.unwrap()
    }

    /// A session that waits for no standby and may write, whatever the server's parameters say.
    pub(crate) async fn admin(&self) -> PgConnection {
        let options: PgConnectOptions = self.maintenance().parse().unwrap();
        let options = options
            .disable_statement_logging()
            .options([("default_transaction_read_only", "off"), ("synchronous_commit", "local")]);
        options.connect().await.unwrap()
    }

    /// Simulates a power failure.
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
        used.lock_shared().expect("a lock"); // waits for a watchdog that is just maintaining up
        let dir = std::env::temp_dir().join(format!("hypnos-postgres-{name}"));
        let user = user_to_be();
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
        lower(command, self.user);
    }
}

fn lower(command: &mut Command, user: Option<(u32, u32)>) {
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if let Some((uid, gid)) = user {
        command.uid(uid).gid(gid);
    }
}

/// A PgBouncer in front of the server of a database, for as long as this lives, however the test ends.
pub(crate) struct Bouncer {
    dir: PathBuf,
    /// The shell that ends it when its standard input does.
    keeper: Child,
}

impl Bouncer {
    /// One in transaction mode with few sessions, handed round, so that no client gets the same one for long; `more`
    /// are further lines of its settings.
    pub(crate) fn start(server: &Path, more: &str) -> Self {
        let name = uuid::Uuid::now_v7().simple();
        let dir = std::env::temp_dir().join(format!("hypnos-bouncer-{name}"));
        fs::create_dir(&dir).expect("a directory for PgBouncer");
        let user = user_to_be();
        if let Some((uid, gid)) = user {
            chown(&dir, Some(uid), Some(gid)).expect("root may");
        }
        let (server, here) = (server.display(), dir.display());
        let settings = format!(
            "[databases]\n* = host={server} user=postgres\n[pgbouncer]\npool_mode = transaction\n\
             default_pool_size = 4\nserver_round_robin = 1\nmax_client_conn = 500\nauth_type = any\n\
             listen_port = 5432\nunix_socket_dir = {here}\nlogfile = {here}/log\n{more}\n"
        );
        fs::write(dir.join("settings.ini"), settings).expect("its settings");
        let mut keeper = Command::new("sh");
        lower(&mut keeper, user);
        let keep = "pgbouncer -q \"$0/settings.ini\" & cat >&2; kill -INT $!; wait $!; rm -rf \"$0\"";
        let keeper = keeper.args(["-c", keep]).arg(&dir).stdin(Stdio::piped()).process_group(0);
        let mut path = std::env::var_os("PATH").unwrap_or_default();
        path.push(":/usr/sbin"); // where Debian has it
        let keeper = keeper.env("PATH", path).spawn().expect("a shell");
        let bouncer = Self { dir, keeper };
        let socket = bouncer.dir.join(".s.PGSQL.5432");
        for _ in 0..1000 {
            if UnixStream::connect(&socket).is_ok() {
                return bouncer;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let log = fs::read_to_string(bouncer.dir.join("log")).unwrap_or_default();
        panic!("PgBouncer does not start (apt-get install pgbouncer): {log}");
    }

    /// The same database through it.
    pub(crate) fn through(&self, url: &str) -> String {
        let (database, _) = url.split_once("?host=").expect("an address of ours");
        format!("{database}?host={}", self.dir.display())
    }
}

impl Drop for Bouncer {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// Where the server of an address listens.
pub(crate) fn socket_of(url: &str) -> &Path {
    Path::new(url.split_once("?host=").expect("an address of ours").1)
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

/// The user to run as: `postgres` or `nobody` instead of root, else the current one.
fn user_to_be() -> Option<(u32, u32)> {
    if fs::metadata("/proc/self").expect("a process knows itself").uid() != 0 {
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

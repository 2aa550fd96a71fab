//! Makes a bundle of everything that HYPNOS needs, from the places where its parts are published.
//!
//! A pull plans first: which parts are wanted, which of them are there, how much has to come. Then it fetches a few
//! files at once (`download.rs`, or [`local`] without a network) into `.pull` ([`staging`]), and puts each part into the
//! bundle when all its files are there ([`bundle_dir`]). A pull that was stopped goes on where it was: within a file that
//! comes over the network, and with the first byte of one that is copied.

mod bundle_dir;
mod download;
mod error;
mod hashes;
mod hub;
mod local;
mod local_file;
mod partial;
mod sources;
mod staging;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::try_join_all;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use bundle_dir::BundleDir;
use download::download;
use local_file::LocalFile;
use staging::Staging;

use crate::machine::disk_free;

pub(crate) use error::Error;
pub(crate) use hub::Hub;
pub(crate) use sources::{File, Licence, Part, SD15, Sources, WeightType};

/// Files that are fetched at once.
const FILES_AT_ONCE: usize = 4;

/// Hears how a pull gets on.
pub(crate) trait Listener: Send + Sync {
    /// So many more bytes have to come than were known of.
    fn expect(&self, n_bytes: u64);
    /// So many bytes came, or have to come again if this is negative.
    fn moved(&self, n_bytes: i64);
    /// So many bytes were there already.
    fn resumed(&self, n_bytes: u64);
    /// Something went wrong, and is tried again.
    fn say(&self, line: &str);
    /// A part is in the bundle.
    fn finished(&self, part: &str);
}

/// What is wanted.
#[derive(Clone, Debug)]
pub(crate) struct Pull {
    /// The directory of the bundle.
    pub(crate) out: PathBuf,
    pub(crate) sources: Sources,
    /// Names of parts, which bring those along that they need; all if there is none.
    pub(crate) only: Vec<String>,
    pub(crate) dtype: WeightType,
    /// Directories that have the files; nothing is fetched then.
    pub(crate) from: Vec<PathBuf>,
}

/// What has to be done.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    /// Licences that were accepted before.
    accepted: BTreeSet<String>,
}

/// A part that is wanted.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) part: Part,
    pub(crate) files: Vec<File>,
    /// Whether it is in the bundle already.
    pub(crate) is_there: bool,
}

impl Plan {
    /// The parts that are not there.
    pub(crate) fn missing(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().filter(|step| !step.is_there)
    }

    /// The licences that have to be accepted.
    pub(crate) fn licences<'a>(&'a self, sources: &'a Sources) -> Vec<(&'a str, &'a Licence)> {
        let mut licences = bundle_dir::licences(sources, self.missing().flat_map(|step| &step.files));
        licences.retain(|(name, _)| !self.accepted.contains(*name));
        licences
    }
}

impl Pull {
    /// Looks at what is there. Reads every file of the bundle that is wanted.
    pub(crate) fn plan(&self) -> Result<Plan, Error> {
        let names: Vec<&str> = self.sources.parts.iter().map(|part| part.name.as_str()).collect();
        if let Some(unknown) = self.only.iter().find(|name| !names.contains(&name.as_str())) {
            return Err(Error::Input(format!(
                "--only: there is no part `{unknown}`; there are {}",
                names.join(", ")
            )));
        }
        let bundle = BundleDir::open(&self.out, &self.sources)?;
        let parts = &self.sources.parts;
        let is_asked_for = |part: &Part| self.only.is_empty() || self.only.contains(&part.name);
        let needed: BTreeSet<&String> =
            parts.iter().filter(|part| is_asked_for(part)).flat_map(|part| &part.needs).collect();
        let wanted = parts.iter().filter(|part| is_asked_for(part) || needed.contains(&part.name));
        let steps = wanted.map(|part| {
            let files = part.files(self.dtype);
            Step { part: part.clone(), is_there: bundle.has(part, &files), files }
        });
        Ok(Plan { steps: steps.collect(), accepted: bundle.accepted().clone() })
    }

    /// Fetches and converts what is missing. `hub` is not asked where the files are on this machine. When this is dropped,
    /// copies end within a piece of a file.
    pub(crate) async fn run(
        &self,
        plan: &Plan,
        hub: &Hub,
        listener: &Arc<dyn Listener>,
    ) -> Result<(), Error> {
        let staging = Arc::new(Staging::open(&self.out)?);
        let bundle = BundleDir::open(&self.out, &self.sources)?;
        let places = plan.missing().map(|step| {
            let staged = staging.part(&step.part.name);
            Ok((step, bundle.in_place(&step.part, &step.files, &staged)?))
        });
        let places = places.collect::<Result<Vec<_>, Error>>()?;
        self.check_space(&places, &staging, listener.as_ref())?;
        let bundle = Arc::new(Mutex::new(bundle));
        let permits = Semaphore::new(FILES_AT_ONCE);
        let stop = CancellationToken::new();
        let _stopped_when_dropped = stop.clone().drop_guard();
        let to = Fetching { pull: self, hub, listener, staging: &staging, stop: &stop };
        let (staging, permits, to) = (&staging, &permits, &to);
        let parts = places.into_iter().map(|(step, there)| {
            let bundle = Arc::clone(&bundle);
            async move {
                let staged = staging.part(&step.part.name);
                let fetched = step.files.iter().zip(there).map(|(file, there)| {
                    let path = fetched_path(&staged, file);
                    async move {
                        let _permit = permits.acquire().await; // it is never closed
                        Ok::<_, Error>((file.clone(), to.fetch(file, there, &path).await?))
                    }
                });
                let got = try_join_all(fetched).await?;
                self.install(step, got, bundle, Arc::clone(staging)).await?;
                listener.finished(&step.part.name);
                Ok::<_, Error>(())
            }
        });
        try_join_all(parts).await?;
        Ok(())
    }

    /// Bytes that are free on the disk of the bundle, which need not be there yet.
    pub(crate) fn free(&self) -> Result<u64, Error> {
        let unknown =
            || Error::Failed(format!("{}: the free space on its disk is unknown", self.out.display()));
        disk_free(&self.out).ok_or_else(unknown)
    }

    async fn install(
        &self,
        step: &Step,
        got: Vec<(File, LocalFile)>,
        bundle: Arc<Mutex<BundleDir>>,
        staging: Arc<Staging>,
    ) -> Result<(), Error> {
        let (sources, part) = (self.sources.clone(), step.part.clone());
        let work = move || {
            let mut bundle = bundle.lock().unwrap_or_else(PoisonError::into_inner); // one after the other
            bundle.install(&sources, &part, &got, &staging.part(&part.name))?;
            staging.finish(&part.name);
            Ok(())
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|error| Error::Failed(format!("{}: {error}", step.part.name)))?
    }

    /// Tells the listener how much has to come, and whether the disk has room for it: the files, and the largest part
    /// that is converted once more.
    fn check_space(
        &self,
        places: &[(&Step, Vec<Option<LocalFile>>)],
        staging: &Staging,
        listener: &dyn Listener,
    ) -> Result<(), Error> {
        let (mut wanted, mut largest) = (0, 0);
        for (step, there) in places {
            let staged = staging.part(&step.part.name);
            let missing = step.files.iter().zip(there).filter(|(_, there)| there.is_none());
            let mut all = 0;
            for (file, _) in missing {
                let size = file.expected_size().unwrap_or(0);
                let begun = fs::metadata(fetched_path(&staged, file)).map_or(0, |about| about.len());
                all += size;
                wanted += size.saturating_sub(begun);
            }
            listener.expect(all);
            largest = if step.part.into.is_some() { all.max(largest) } else { largest };
        }
        let free = self.free()?;
        if free < wanted + largest {
            let what =
                format!("{} are wanted on its disk, {} are free", bytes(wanted + largest), bytes(free));
            return Err(Error::Failed(format!("{}: {what}", self.out.display())));
        }
        Ok(())
    }
}

/// From where files come.
struct Fetching<'a> {
    pull: &'a Pull,
    hub: &'a Hub,
    listener: &'a Arc<dyn Listener>,
    staging: &'a Arc<Staging>,
    /// Ends copies.
    stop: &'a CancellationToken,
}

impl Fetching<'_> {
    /// One file: where it is already, from this machine, or from its source.
    async fn fetch(&self, file: &File, there: Option<LocalFile>, path: &Path) -> Result<LocalFile, Error> {
        match there {
            Some(got) => Ok(got),
            None if self.pull.from.is_empty() => download(self.hub, file, path, self.listener.as_ref()).await,
            None => self.copy(file.clone(), path.to_owned()).await,
        }
    }

    async fn copy(&self, file: File, path: PathBuf) -> Result<LocalFile, Error> {
        let (from, listener) = (self.pull.from.clone(), Arc::clone(self.listener));
        let (staging, stop, source) = (Arc::clone(self.staging), self.stop.clone(), file.place.source());
        let copying = tokio::task::spawn_blocking(move || {
            let _locked = staging; // as long as something is written there
            local::copy(&from, &file, &path, listener.as_ref(), &stop)
        });
        copying.await.map_err(|error| Error::Failed(format!("{source}: {error}")))?
    }
}

/// Where a file is on its way, in the directory of its part.
fn fetched_path(staged: &Path, file: &File) -> PathBuf {
    staged.join("fetched").join(&file.to)
}

/// A number of bytes for people.
pub(crate) fn bytes(n: u64) -> String {
    let n = n as f64;
    match n {
        _ if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        _ if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        _ if n >= 1e3 => format!("{:.1} kB", n / 1e3),
        _ => format!("{n} B"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Condvar;
    use std::time::Duration;

    use tokio::runtime::{Builder, Runtime};
    use tokio::sync::Notify;

    use super::*;

    /// Holds up the first piece of each copy.
    #[derive(Default)]
    struct Gate {
        /// Pieces that came, and whether they may go on.
        state: Mutex<(usize, bool)>,
        changed: Condvar,
        first: Notify,
    }

    impl Gate {
        /// Waits at most 20 s for a state, and gives the number of pieces.
        fn wait(&self, until: impl Fn(&(usize, bool)) -> bool) -> usize {
            let state = self.state.lock().unwrap();
            let waited =
                self.changed.wait_timeout_while(state, Duration::from_secs(20), |state| !until(state));
            waited.unwrap().0.0
        }

        fn open(&self) {
            self.state.lock().unwrap().1 = true;
            self.changed.notify_all();
        }
    }

    impl Listener for Gate {
        fn expect(&self, _: u64) {}

        fn moved(&self, _: i64) {
            self.state.lock().unwrap().0 += 1;
            self.changed.notify_all();
            self.first.notify_one();
            self.wait(|(_, is_open)| *is_open);
        }

        fn resumed(&self, _: u64) {}

        fn say(&self, _: &str) {}

        fn finished(&self, _: &str) {}
    }

    const PIECES: usize = 4;

    /// Two files of a few pieces each, and a pull that copies them.
    fn two_files(dir: &Path) -> (Pull, Hub) {
        let table = r#"{"name": "n", "kind": "k", "licences": {"MIT": {"url": "u"}}, "parts": [{"name": "base", "about": "a",
            "licence": "MIT", "revision": "r", "files": [{"url": "https://h/a", "to": "a"}, {"url": "https://h/b", "to": "b"}]}]}"#;
        let from = dir.join("from");
        fs::create_dir(&from).unwrap();
        for name in ["a", "b"] {
            fs::write(from.join(name), vec![b'x'; PIECES << 20]).unwrap();
        }
        let pull = Pull {
            out: dir.join("out"),
            sources: Sources::parse(table, Path::new("t")).unwrap(),
            only: Vec::new(),
            dtype: WeightType::F32,
            from: vec![from],
        };
        (pull, Hub::new("https://h", None).unwrap())
    }

    fn runtime() -> Runtime {
        Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
    }

    #[test]
    fn files_are_copied_side_by_side() {
        let dir = tempfile::tempdir().unwrap();
        let (pull, hub) = two_files(dir.path());
        let gate = Arc::new(Gate::default());
        let watching = std::thread::spawn({
            let gate = Arc::clone(&gate);
            move || {
                let n = gate.wait(|(n, _)| *n == 2);
                gate.open();
                n
            }
        });
        let listener: Arc<dyn Listener> = Arc::clone(&gate) as _;
        runtime().block_on(async { pull.run(&pull.plan().unwrap(), &hub, &listener).await.unwrap() });
        assert_eq!(watching.join().unwrap(), 2, "the second began before the first went on");
        assert_eq!(fs::read(pull.out.join("b")).unwrap().len(), PIECES << 20);
        assert!(!pull.out.join(".pull").exists());
    }

    #[test]
    fn a_copy_ends_within_a_piece_when_its_pull_is_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let (pull, hub) = two_files(dir.path());
        let gate = Arc::new(Gate::default());
        let runtime = runtime();
        let listener: Arc<dyn Listener> = Arc::clone(&gate) as _;
        runtime.block_on(async {
            let plan = pull.plan().unwrap();
            tokio::select! {
                done = pull.run(&plan, &hub, &listener) => panic!("it ended: {done:?}"),
                () = gate.first.notified() => {}
            }
        });
        gate.open();
        drop(runtime); // waits for what still runs
        let n = gate.state.lock().unwrap().0;
        assert!((1..=2).contains(&n), "{n} pieces of {} were copied", 2 * PIECES);
        assert!(!pull.out.join("a").exists());
        // It goes on, from the first byte.
        self::runtime().block_on(async { pull.run(&pull.plan().unwrap(), &hub, &listener).await.unwrap() });
        assert!(fs::read(pull.out.join("a")).unwrap() == vec![b'x'; PIECES << 20]);
    }
}

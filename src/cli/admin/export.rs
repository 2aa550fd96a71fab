//! Export of a tenant as a directory:
//!
//! ```text
//! tenant.json            the tenant, and when this was written
//! keys.jsonl             its API keys, without secrets
//! jobs.jsonl             its jobs with all their fields and artifacts, newest first
//! class_images.jsonl     its class images
//! objects/t/...          every object that one of these references, by its key
//! SHA256SUMS             their hashes, for `sha256sum --check`
//! INCOMPLETE             exists until the export is complete
//! ```
//!
//! An object is verified when it is fetched, and synced before anything names it. The same command resumes an
//! interrupted export.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use futures_util::{StreamExt, TryStreamExt, stream};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::failed;
use super::jobs::described;
use super::text::time;
use crate::blobs::{self, Blobs, Key};
use crate::cli::error::CliError;
use crate::cli::output::{print_error, print_line, print_warning, progress_bar};
use crate::job::{JobId, Object};
use crate::ml::bundle::hash_file;
use crate::store::{AdminFilter, AdminJob, Store, Tenant, TenantState};

/// Objects fetched at once.
const AT_ONCE: usize = 4;
/// Rows read at once.
const PAGE: u32 = 200;
/// Number of attempts to export a job that changes meanwhile.
const TRIES: usize = 3;

const INCOMPLETE: &str = "INCOMPLETE";
const ABOUT: &str = "tenant.json";
const SUMS: &str = "SHA256SUMS";

/// Exports everything of `tenant` into `out`.
pub(super) async fn export(
    store: &Store,
    blobs: &Blobs,
    tenant: &Tenant,
    out: &Path,
    stop: &CancellationToken,
) -> Result<ExitCode, CliError> {
    if tenant.state == TenantState::Active {
        print_warning(
            "the tenant is active: jobs accepted from now on may be missing; `hypnos admin tenants disable` prevents that",
        );
    }
    prepare(out, tenant)?;
    let bytes = store.bytes_of(tenant.id).await.map_err(failed)?;
    let bar = progress_bar("{bar:32} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left, {msg}", bytes);
    let mut export = Export { store, blobs, out, bar, sums: BTreeMap::new(), missing: 0 };
    let whole = async {
        let n_jobs = export.jobs(tenant).await?;
        export.class_images(tenant).await?;
        export.keys(tenant).await?;
        Ok::<_, CliError>(n_jobs)
    };
    let n_jobs = tokio::select! {
        done = whole => done?,
        () = stop.cancelled() => return Err(CliError::Failed(format!(
            "stopped: {} is incomplete; the same command resumes it", out.display()
        ))),
    };
    export.bar.finish_and_clear();
    export.finish(tenant, n_jobs)
}

/// Creates the directory, or checks that it holds an interrupted export of the same tenant.
fn prepare(out: &Path, tenant: &Tenant) -> Result<(), CliError> {
    let marker = out.join(INCOMPLETE);
    let is_empty = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            fs::create_dir_all(out).map_err(|error| cannot_write(out, &error))?;
            true
        }
        Err(error) => return Err(CliError::Input(format!("--out: {}: {}", out.display(), error.kind()))),
    };
    let line = format!("tenant {}", tenant.id);
    match fs::read_to_string(&marker) {
        Ok(text) if text.lines().next() == Some(&line) => Ok(()),
        Ok(_) => Err(CliError::Input(format!("--out: {} holds an export of another tenant", out.display()))),
        Err(_) if is_empty => {
            let text = format!("{line}\nThis export is not complete. The same command resumes it.\n");
            write(&marker, text.as_bytes())
        }
        Err(_) => Err(CliError::Input(format!(
            "--out: wanted a new directory or an interrupted export, got {}, which has other contents",
            out.display()
        ))),
    }
}

/// Why an object of a job is missing.
enum Missing {
    /// The job was deleted meanwhile.
    Job,
    /// The job has changed meanwhile; its current row.
    Changed(Box<AdminJob>),
    /// The object store has lost or damaged the object.
    Object(String),
}

struct Export<'a> {
    store: &'a Store,
    blobs: &'a Blobs,
    out: &'a Path,
    bar: ProgressBar,
    /// Hashes by key.
    sums: BTreeMap<String, String>,
    /// Keys of objects that the object store has lost or damaged.
    missing: usize,
}

impl Export<'_> {
    /// Exports all jobs; their number.
    async fn jobs(&mut self, tenant: &Tenant) -> Result<usize, CliError> {
        let filter = AdminFilter { tenant: Some(tenant.id), ..AdminFilter::default() };
        let mut lines = Lines::create(self.out, "jobs.jsonl")?;
        let (mut before, mut n_jobs) = (None::<JobId>, 0);
        loop {
            let page = self.store.all_jobs(&filter, before, PAGE).await.map_err(failed)?;
            let Some(last) = page.last() else { break };
            before = Some(last.job.id);
            for job in page {
                if !job.deleting
                    && let Some(line) = self.job(job).await?
                {
                    lines.push(&line)?;
                    n_jobs += 1;
                }
                self.bar.set_message(format!("{n_jobs} jobs"));
            }
        }
        lines.finish()?;
        Ok(n_jobs)
    }

    /// Exports a job with its objects; none if it was deleted meanwhile.
    async fn job(&mut self, mut job: AdminJob) -> Result<Option<Value>, CliError> {
        for _ in 0..TRIES {
            let artifacts = self.store.artifacts(job.job.tenant, job.job.id).await.map_err(failed)?;
            let checkpoint = job.job.checkpoint.as_ref().map(|checkpoint| &checkpoint.object);
            let uncounted = job.job.photos.iter().chain(checkpoint).map(|object| object.size);
            self.bar.inc_length(uncounted.sum());
            let named = job.job.photos.iter().chain(&artifacts).chain(checkpoint);
            let absent = self.fetch_all(named).await?;
            match self.look_again(&job, &artifacts, absent).await? {
                None => return Ok(Some(line(&job, &artifacts))),
                Some(Missing::Job) => return Ok(None),
                Some(Missing::Changed(now)) => job = *now,
                Some(Missing::Object(keys)) => {
                    self.missing += 1;
                    print_error(&format!("{}: missing or damaged in the store: {keys}", job.job.id));
                    return Ok(Some(line(&job, &artifacts)));
                }
            }
        }
        self.missing += 1;
        print_error(&format!("{}: it changes faster than it can be exported", job.job.id));
        Ok(None)
    }

    /// Why objects of a job are missing; none if none is.
    async fn look_again(
        &self,
        job: &AdminJob,
        artifacts: &[Object],
        absent: Vec<String>,
    ) -> Result<Option<Missing>, CliError> {
        if absent.is_empty() {
            return Ok(None);
        }
        let now = self.store.any_job(job.job.id).await.map_err(failed)?;
        let Some(now) = now.filter(|now| !now.deleting) else { return Ok(Some(Missing::Job)) };
        let named = self.store.artifacts(now.job.tenant, now.job.id).await.map_err(failed)?;
        if named != artifacts || now.job.checkpoint != job.job.checkpoint {
            return Ok(Some(Missing::Changed(Box::new(now))));
        }
        Ok(Some(Missing::Object(absent.join(", "))))
    }

    async fn class_images(&mut self, tenant: &Tenant) -> Result<(), CliError> {
        let mut lines = Lines::create(self.out, "class_images.jsonl")?;
        let images = self.store.class_images_of(tenant.id).await.map_err(failed)?;
        for image in &images {
            lines.push(&json!(image))?;
        }
        let absent = self.fetch_all(images.iter()).await?;
        for key in &absent {
            self.missing += 1;
            print_error(&format!("class image: missing or damaged in the store: {key}"));
        }
        lines.finish()
    }

    async fn keys(&self, tenant: &Tenant) -> Result<(), CliError> {
        let mut lines = Lines::create(self.out, "keys.jsonl")?;
        let keys = self.store.list_keys().await.map_err(failed)?;
        for key in keys.iter().filter(|key| key.tenant == tenant.id) {
            lines.push(&json!({
                "id": key.id, "name": key.name, "scope": key.scope, "created_at": time(key.created_ms),
                "expires_at": key.expires_ms.map(time), "revoked_at": key.revoked_ms.map(time),
            }))?;
        }
        lines.finish()
    }

    /// Fetches objects into the directory; the keys of those that the object store has lost or damaged.
    async fn fetch_all(&mut self, objects: impl Iterator<Item = &Object>) -> Result<Vec<String>, CliError> {
        let objects: Vec<Object> = objects.cloned().collect();
        let (blobs, out, bar) = (self.blobs, self.out, &self.bar);
        let fetched = stream::iter(objects.iter().map(|object| fetch(blobs, out, bar, object)));
        let there: Vec<bool> = fetched.buffered(AT_ONCE).try_collect().await?;
        let mut absent = Vec::new();
        for (object, there) in objects.into_iter().zip(there) {
            if there {
                self.sums.insert(object.key, object.sha256);
            } else {
                absent.push(object.key);
            }
        }
        Ok(absent)
    }

    /// Writes the hashes and the tenant's file, and marks the export as complete.
    fn finish(self, tenant: &Tenant, n_jobs: usize) -> Result<ExitCode, CliError> {
        let mut sums = String::new();
        for (key, sha256) in &self.sums {
            let _ = writeln!(sums, "{sha256}  objects/{key}"); // a string takes all
        }
        write(&self.out.join(SUMS), sums.as_bytes())?;
        let about = json!({
            "id": tenant.id, "name": tenant.name, "state": tenant.state, "created_at": time(tenant.created_ms),
            "exported_at": jiff::Timestamp::now().to_string(), "hypnos": env!("CARGO_PKG_VERSION"),
            "jobs": n_jobs, "objects": self.sums.len(), "missing": self.missing,
        });
        write(&self.out.join(ABOUT), format!("{about:#}\n").as_bytes())?;
        let shown = self.out.display();
        let said = format!("{n_jobs} jobs, {} objects, each verified: {shown}", self.sums.len());
        if self.missing > 0 {
            print_line(&said);
            return Err(CliError::Failed(format!(
                "{shown} is incomplete: objects that {} jobs or class images name are missing in the store",
                self.missing
            )));
        }
        fs::remove_file(self.out.join(INCOMPLETE)).map_err(|error| cannot_write(self.out, &error))?;
        sync(self.out)?;
        print_line(&said);
        Ok(ExitCode::SUCCESS)
    }
}

/// All fields and artifacts of a job.
fn line(job: &AdminJob, artifacts: &[Object]) -> Value {
    let mut line = described(job);
    line["spec"] = serde_json::from_str(&job.job.spec_json).unwrap_or(Value::Null);
    line["photos"] = json!(job.job.photos);
    line["checkpoint"] = json!(job.job.checkpoint);
    line["artifacts"] = json!(artifacts);
    line
}

/// Fetches an object into the directory, verified and synced. Whether the object store has it undamaged. A file with
/// the right hash is kept.
async fn fetch(blobs: &Blobs, out: &Path, bar: &ProgressBar, object: &Object) -> Result<bool, CliError> {
    let Some(key) = Key::parse(&object.key) else { return Ok(false) }; // nothing else is ever written
    let file = out.join("objects").join(key.as_str());
    if !is_there(&file, object) {
        let dir = file.parent().unwrap_or(out);
        fs::create_dir_all(dir).map_err(|error| cannot_write(dir, &error))?;
        match blobs.get_to_file(object, &file).await {
            Ok(()) => {}
            Err(blobs::Error::Missing | blobs::Error::Damaged) => return Ok(false),
            Err(error) => {
                return Err(CliError::Failed(format!(
                    "interrupted: {error}; {} is incomplete, and the same command resumes it",
                    out.display()
                )));
            }
        }
        sync(&file)?;
        sync(dir)?;
    }
    bar.inc(object.size);
    Ok(true)
}

/// Whether a file holds the object undamaged.
fn is_there(file: &Path, object: &Object) -> bool {
    fs::metadata(file).is_ok_and(|found| found.len() == object.size)
        && hash_file(file).is_ok_and(|sha256| sha256 == object.sha256)
}

/// A file of JSON lines that appears when it is complete.
struct Lines {
    file: PathBuf,
    part: PathBuf,
    writer: BufWriter<File>,
}

impl Lines {
    fn create(out: &Path, name: &str) -> Result<Self, CliError> {
        let (file, part) = (out.join(name), out.join(format!("{name}.part")));
        let writer = File::create(&part).map_err(|error| cannot_write(&part, &error))?;
        Ok(Self { file, part, writer: BufWriter::new(writer) })
    }

    fn push(&mut self, line: &Value) -> Result<(), CliError> {
        writeln!(self.writer, "{line}").map_err(|error| cannot_write(&self.part, &error))
    }

    fn finish(self) -> Result<(), CliError> {
        let Self { file, part, writer } = self;
        let written = writer.into_inner().map_err(std::io::IntoInnerError::into_error);
        let placed = written.and_then(|written| written.sync_all()).and_then(|()| fs::rename(&part, &file));
        placed.map_err(|error| cannot_write(&part, &error))
    }
}

fn write(file: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let written = File::create(file).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|error| cannot_write(file, &error))
}

/// Syncs a file or a directory to the disk.
fn sync(path: &Path) -> Result<(), CliError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| cannot_write(path, &error))
}

fn cannot_write(path: &Path, error: &std::io::Error) -> CliError {
    CliError::Failed(format!("{} cannot be written: {}", path.display(), error.kind()))
}

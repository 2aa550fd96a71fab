//! The eraser: removes deleted jobs and tenants, first their objects, then their rows.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use tracing::info;

use super::checkpoints::{PAGE, remove_checkpoint};
use super::error::{Error, RemovalError};
use crate::blobs::{Blobs, Scope};
use crate::clock;
use crate::job::{JobId, TenantId};
use crate::store::Store;

/// Jobs erased at once.
const JOBS_AT_ONCE: usize = 8;
/// If this many jobs of one page fail and none succeeds, the object store itself is unavailable.
const UNAVAILABLE_FROM: usize = 8;
/// First wait before a job that could not be erased is tried again; doubled each time, up to one of the next two.
const WAIT: Duration = Duration::from_secs(15);
const WAIT_MAX: Duration = Duration::from_hours(1);
/// The same after transient errors.
const TRANSIENT_WAIT_MAX: Duration = Duration::from_mins(2);

/// Erases a deleted job: its objects, then its row. Failure is harmless: the row still says that it is to be erased.
pub async fn erase(store: &Store, blobs: &Blobs, tenant: TenantId, job: JobId) -> Result<(), Error> {
    blobs.delete_all(&Scope::job(tenant, job)).await?;
    Ok(store.remove_erased(&[job]).await?)
}

/// Once a deleted tenant has no jobs left, erases the rest: class images, unreferenced objects, rows.
async fn erase_tenant(store: &Store, blobs: &Blobs, tenant: TenantId) -> Result<(), RemovalError> {
    if store.holdings(tenant).await?.jobs > 0 {
        return Ok(());
    }
    blobs.delete_all(&Scope::tenant(tenant)).await?;
    if store.remove_tenant(tenant).await? {
        info!(%tenant, "deleted tenant erased");
    }
    Ok(())
}

/// Erases deleted jobs and tenants. One that cannot be erased is retried with growing waits and delays no other.
#[derive(Debug)]
pub struct Eraser {
    store: Store,
    blobs: Blobs,
    failing: HashMap<Target, Failure>,
}

/// What is erased.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Target {
    Job(JobId),
    Tenant(TenantId),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Job(job) => write!(f, "job {job}"),
            Self::Tenant(tenant) => write!(f, "tenant {tenant}"),
        }
    }
}

/// The last failure to erase a target.
#[derive(Debug)]
struct Failure {
    wait: Duration,
    retry_at: Instant,
    error: String,
}

impl Eraser {
    /// An eraser without known failures.
    pub fn new(store: Store, blobs: Blobs) -> Self {
        Self { store, blobs, failing: HashMap::new() }
    }

    /// Erases everything that can be erased now, and the checkpoints of ended jobs. Returns a summary of what could not
    /// be erased, if anything. Fails if database or object store is unavailable; then only a part was tried.
    pub async fn round(&mut self) -> Result<Option<String>, Error> {
        let mut seen = HashSet::new();
        self.remove_checkpoints(&mut seen).await?;
        let tenants = self.store.deleting_tenants().await?;
        for &tenant in &tenants {
            while self.store.delete_jobs_of(tenant, PAGE).await? > 0 {}
        }
        loop {
            let mut n_erased = 0;
            let mut after = None;
            loop {
                let page = self.store.erasable(after, PAGE).await?;
                let Some(&(_, last)) = page.last() else { break };
                after = Some(last);
                seen.extend(page.iter().map(|(_, job)| Target::Job(*job)));
                n_erased += self.erase_page(page).await?;
            }
            if n_erased == 0 {
                break; // another pass, because a training is erased after its samples
            }
        }
        for tenant in tenants {
            let target = Target::Tenant(tenant);
            seen.insert(target);
            if self.is_due(target, clock::now())
                && let Err(error) = erase_tenant(&self.store, &self.blobs, tenant).await
            {
                self.record_failures(vec![(target, error)], 0)?;
            }
        }
        self.failing.retain(|target, _| seen.contains(target));
        let first = self.failing.iter().min_by_key(|(target, _)| **target);
        Ok(first.map(|(target, failure)| {
            format!(
                "{} jobs or tenants cannot be erased; the first: {target}: {}",
                self.failing.len(),
                failure.error
            )
        }))
    }

    async fn erase_page(&mut self, page: Vec<(TenantId, JobId)>) -> Result<usize, Error> {
        let now = clock::now();
        let due = page.into_iter().filter(|(_, job)| self.is_due(Target::Job(*job), now));
        let blobs = self.blobs.clone();
        let each = due.map(|(tenant, job)| {
            let blobs = blobs.clone();
            async move { (job, blobs.delete_all(&Scope::job(tenant, job)).await.map_err(RemovalError::from)) }
        });
        let done: Vec<_> = stream::iter(each).buffer_unordered(JOBS_AT_ONCE).collect().await;
        let erased: Vec<JobId> = done.iter().filter(|(_, done)| done.is_ok()).map(|(job, _)| *job).collect();
        self.store.remove_erased(&erased).await?;
        metrics::counter!("hypnos_erased_total").increment(erased.len() as u64);
        for job in &erased {
            self.failing.remove(&Target::Job(*job));
        }
        let failed =
            done.into_iter().filter_map(|(job, done)| Some((Target::Job(job), done.err()?))).collect();
        self.record_failures(failed, erased.len())?;
        Ok(erased.len())
    }

    async fn remove_checkpoints(&mut self, seen: &mut HashSet<Target>) -> Result<(), Error> {
        let mut after = None;
        loop {
            let page = self.store.obsolete_checkpoints(after, PAGE).await?;
            let Some((last, _)) = page.last() else { return Ok(()) };
            after = Some(*last);
            seen.extend(page.iter().map(|(job, _)| Target::Job(*job)));
            let now = clock::now();
            let (mut failed, mut n_removed) = (Vec::new(), 0);
            for (job, checkpoint) in page.into_iter().filter(|(job, _)| self.is_due(Target::Job(*job), now)) {
                match remove_checkpoint(&self.store, &self.blobs, job, &checkpoint).await {
                    Ok(()) => n_removed += 1,
                    Err(error) => failed.push((Target::Job(job), error)),
                }
            }
            self.record_failures(failed, n_removed)?;
        }
    }

    fn is_due(&self, target: Target, now: Instant) -> bool {
        self.failing.get(&target).is_none_or(|failure| failure.retry_at <= now)
    }

    /// Schedules the retry of what failed. Fails, which ends the round, if nothing succeeded and many failed without an
    /// answer.
    fn record_failures(
        &mut self,
        failed: Vec<(Target, RemovalError)>,
        n_succeeded: usize,
    ) -> Result<(), Error> {
        metrics::counter!("hypnos_erase_failures_total").increment(failed.len() as u64);
        let n_transient = failed.iter().filter(|(_, error)| error.is_transient()).count();
        let is_unavailable = n_succeeded == 0 && n_transient >= UNAVAILABLE_FROM;
        let mut last = None;
        for (target, error) in failed {
            let wait_max = if error.is_transient() { TRANSIENT_WAIT_MAX } else { WAIT_MAX };
            let wait = self.failing.get(&target).map_or(WAIT, |failure| failure.wait * 2).min(wait_max);
            let failure = Failure { wait, retry_at: clock::now() + wait, error: error.to_string() };
            self.failing.insert(target, failure);
            last = Some(error);
        }
        match last {
            Some(error) if is_unavailable => Err(error.into()),
            _ => Ok(()),
        }
    }
}

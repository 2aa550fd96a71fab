//! What must happen sooner or later, whoever is up: jobs of dead workers go back to the queue, deleted jobs lose their
//! objects, the deployment's marker is kept up. Any number of processes may do it at once; every statement checks again
//! what it relies on.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::blobs::{self, Blobs, Key, Scope};
use crate::clock;
use crate::deployment;
use crate::job::{Checkpoint, JobId, TenantId};
use crate::store::{self, Rescued, Store};

/// Rows that are read at once.
const PAGE: u32 = 100;
/// Jobs that are erased at once.
const JOBS_AT_ONCE: usize = 8;
/// Where so many jobs of one page fail and none goes well, the store itself is away.
const AWAY_FROM: usize = 8;
/// First wait before a job that could not be erased is tried again; doubled each time, up to one of the next two.
const WAIT: Duration = Duration::from_secs(15);
const WAIT_MAX: Duration = Duration::from_hours(1);
/// Where the store did not answer, rather than refuse.
const WAIT_AWAY_MAX: Duration = Duration::from_mins(2);
/// First wait before the same trouble is said again; doubled each time, up to the second.
const SAY: Duration = Duration::from_mins(1);
const SAY_MAX: Duration = Duration::from_hours(6);

/// What kept something from being tidied.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Tidies every `pause` until `stop`; what a client of this process deletes goes at once.
pub async fn run(store: Store, blobs: Blobs, pause: Duration, stop: CancellationToken) {
    let rescuing = async {
        let mut said = Said::default();
        loop {
            said.hear(
                "jobs of lost workers cannot be looked for",
                whole(rescue(&store).boxed()).await.err().map(|error| error.to_string()),
            );
            clock::sleep(pause).await;
        }
    };
    let erasing = async {
        let mut eraser = Eraser::new(store.clone(), blobs.clone());
        let mut said = Said::default();
        loop {
            said.hear(
                "what was deleted stays for now",
                whole(eraser.round().boxed()).await.unwrap_or_else(|error| Some(error.to_string())),
            );
            tokio::select! {
                biased;
                () = store.deletion() => {}
                () = clock::sleep(pause) => {}
            }
        }
    };
    let marking = async {
        let mut said = Said::default();
        loop {
            clock::sleep(pause).await;
            let marking = async { Ok(deployment::mark(&store, &blobs, false).await?) };
            let marked = whole(marking.boxed()).await;
            said.hear(
                "the deployment's marker cannot be kept up",
                marked.err().map(|error| error.to_string()),
            );
        }
    };
    let all = async { tokio::join!(biased; rescuing, erasing, marking) };
    stop.run_until_cancelled(all.boxed()).await;
}

/// A round that panics is one that failed: the next one comes all the same.
async fn whole<T>(round: BoxFuture<'_, Result<T, Error>>) -> Result<T, Error> {
    AssertUnwindSafe(round).catch_unwind().await.unwrap_or_else(|_| {
        error!("a round of tidying panicked");
        Err("it panicked".into())
    })
}

/// Takes jobs from workers that are not heard of.
pub async fn rescue(store: &Store) -> Result<(), Error> {
    let Rescued { requeued, failed, canceled } = store.rescue().await?;
    if requeued + failed + canceled > 0 {
        info!(requeued, failed, canceled, "jobs whose worker was not heard of");
        metrics::counter!("hypnos_rescued_total").increment(requeued + failed + canceled);
    }
    Ok(())
}

/// Removes the checkpoints of jobs that have ended, as many as one look shows. Goes on past those that cannot be removed;
/// the first error.
pub async fn remove_spent_checkpoints(store: &Store, blobs: &Blobs) -> Result<(), Error> {
    let mut first = None;
    for (job, checkpoint) in store.spent_checkpoints(None, PAGE).await? {
        if let Err(error) = remove_checkpoint(store, blobs, job, &checkpoint).await {
            first.get_or_insert(error);
        }
    }
    first.map_or(Ok(()), |error| Err(error.into()))
}

async fn remove_checkpoint(
    store: &Store,
    blobs: &Blobs,
    job: JobId,
    checkpoint: &Checkpoint,
) -> Result<(), Trouble> {
    if let Some(key) = Key::parse(&checkpoint.object.key) {
        blobs.delete(&key).await?;
    }
    Ok(store.forget_checkpoint(job).await?)
}

/// Erases a deleted job: its objects, then its row. Fails without harm: the row still says that it is to be erased.
pub async fn erase(store: &Store, blobs: &Blobs, tenant: TenantId, job: JobId) -> Result<(), Error> {
    blobs.delete_all(&Scope::job(tenant, job)).await?;
    Ok(store.erased(&[job]).await?)
}

/// Erases what is left of a deleted tenant when its last job is gone: class images, whatever no row names, its rows.
async fn finish_tenant(store: &Store, blobs: &Blobs, tenant: TenantId) -> Result<(), Trouble> {
    if store.holdings(tenant).await?.jobs > 0 {
        return Ok(());
    }
    blobs.delete_all(&Scope::tenant(tenant)).await?;
    if store.forget_tenant(tenant).await? {
        info!(%tenant, "a deleted tenant is erased");
    }
    Ok(())
}

/// Why one thing was not erased.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
}

impl Trouble {
    /// Whether nobody need change anything for it to go well.
    fn is_of_the_moment(&self) -> bool {
        match self {
            Self::Store(_) => true,
            Self::Blobs(error) => error.is_of_the_moment(),
        }
    }
}

/// Erases deleted jobs and tenants: their objects, then their rows. One that cannot be erased is tried again later, and
/// later each time, and holds up no other.
#[derive(Debug)]
pub struct Eraser {
    store: Store,
    blobs: Blobs,
    failing: HashMap<Of, Failing>,
}

/// Whose objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Of {
    Job(JobId),
    Tenant(TenantId),
}

impl fmt::Display for Of {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Job(job) => write!(f, "job {job}"),
            Self::Tenant(tenant) => write!(f, "tenant {tenant}"),
        }
    }
}

#[derive(Debug)]
struct Failing {
    wait: Duration,
    until: Instant,
    why: String,
}

impl Eraser {
    /// One that has not tried anything yet.
    pub fn new(store: Store, blobs: Blobs) -> Self {
        Self { store, blobs, failing: HashMap::new() }
    }

    /// Erases all that there is to erase now, and the checkpoints of ended jobs. What stays behind, in words, if anything
    /// does. Fails where database or object store are away, and then has tried a part only.
    pub async fn round(&mut self) -> Result<Option<String>, Error> {
        let mut seen = HashSet::new();
        self.checkpoints(&mut seen).await?;
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
                seen.extend(page.iter().map(|(_, job)| Of::Job(*job)));
                n_erased += self.erase(page).await?;
            }
            if n_erased == 0 {
                break; // a training goes after its samples
            }
        }
        for tenant in tenants {
            seen.insert(Of::Tenant(tenant));
            if self.is_due(Of::Tenant(tenant), clock::now())
                && let Err(trouble) = finish_tenant(&self.store, &self.blobs, tenant).await
            {
                self.note(vec![(Of::Tenant(tenant), trouble)], 0)?;
            }
        }
        self.failing.retain(|of, _| seen.contains(of));
        let first = self.failing.iter().min_by_key(|(of, _)| **of);
        Ok(first.map(|(of, failing)| {
            format!(
                "{} jobs or tenants cannot be erased; the first: {of}: {}",
                self.failing.len(),
                failing.why
            )
        }))
    }

    async fn erase(&mut self, page: Vec<(TenantId, JobId)>) -> Result<usize, Error> {
        let now = clock::now();
        let due = page.into_iter().filter(|(_, job)| self.is_due(Of::Job(*job), now));
        let blobs = self.blobs.clone();
        let each = due.map(|(tenant, job)| {
            let blobs = blobs.clone();
            async move { (job, blobs.delete_all(&Scope::job(tenant, job)).await.map_err(Trouble::from)) }
        });
        let done: Vec<_> = stream::iter(each).buffer_unordered(JOBS_AT_ONCE).collect().await;
        let gone: Vec<JobId> = done.iter().filter(|(_, done)| done.is_ok()).map(|(job, _)| *job).collect();
        self.store.erased(&gone).await?;
        metrics::counter!("hypnos_erased_total").increment(gone.len() as u64);
        for job in &gone {
            self.failing.remove(&Of::Job(*job));
        }
        let failed = done.into_iter().filter_map(|(job, done)| Some((Of::Job(job), done.err()?))).collect();
        self.note(failed, gone.len())?;
        Ok(gone.len())
    }

    async fn checkpoints(&mut self, seen: &mut HashSet<Of>) -> Result<(), Error> {
        let mut after = None;
        loop {
            let page = self.store.spent_checkpoints(after, PAGE).await?;
            let Some((last, _)) = page.last() else { return Ok(()) };
            after = Some(*last);
            seen.extend(page.iter().map(|(job, _)| Of::Job(*job)));
            let now = clock::now();
            let (mut failed, mut n_gone) = (Vec::new(), 0);
            for (job, checkpoint) in page.into_iter().filter(|(job, _)| self.is_due(Of::Job(*job), now)) {
                match remove_checkpoint(&self.store, &self.blobs, job, &checkpoint).await {
                    Ok(()) => n_gone += 1,
                    Err(trouble) => failed.push((Of::Job(job), trouble)),
                }
            }
            self.note(failed, n_gone)?;
        }
    }

    fn is_due(&self, of: Of, now: Instant) -> bool {
        self.failing.get(&of).is_none_or(|failing| failing.until <= now)
    }

    /// Puts off what failed. Where all of many failed without an answer, no more is tried in this round.
    fn note(&mut self, failed: Vec<(Of, Trouble)>, n_gone: usize) -> Result<(), Error> {
        metrics::counter!("hypnos_erase_failures_total").increment(failed.len() as u64);
        let away = failed.iter().filter(|(_, trouble)| trouble.is_of_the_moment()).count();
        let is_away = n_gone == 0 && away >= AWAY_FROM;
        let mut last = None;
        for (of, trouble) in failed {
            let wait_max = if trouble.is_of_the_moment() { WAIT_AWAY_MAX } else { WAIT_MAX };
            let wait = self.failing.get(&of).map_or(WAIT, |failing| failing.wait * 2).min(wait_max);
            let failing = Failing { wait, until: clock::now() + wait, why: trouble.to_string() };
            self.failing.insert(of, failing);
            last = Some(trouble);
        }
        match last {
            Some(trouble) if is_away => Err(trouble.into()),
            _ => Ok(()),
        }
    }
}

/// Trouble that goes on is said at once, and then ever less often.
#[derive(Debug, Default)]
struct Said {
    last: Option<(Instant, Duration)>,
}

impl Said {
    fn hear(&mut self, what: &str, trouble: Option<String>) {
        let Some(why) = trouble else {
            if self.last.take().is_some() {
                info!("resolved: {what}");
            }
            return;
        };
        let wait = match self.last {
            Some((at, wait)) if clock::since(at) < wait => return,
            Some((_, wait)) => (wait * 2).min(SAY_MAX),
            None => SAY,
        };
        self.last = Some((clock::now(), wait));
        warn!("{what}: {why}");
    }
}

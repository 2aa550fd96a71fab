//! Objects that no row names, left by processes that were killed between the two, or by rows that were lost.
//!
//! What a row names is read from the rows, object by object; what a claim that is under way wrote is kept, for it may
//! name it yet. Everything else that is old enough is an orphan. Before it is removed the rows are asked again. What looks
//! like a wrong database rather than like orphans is a [`Doubt`], which whoever removes has to answer.

use std::collections::{BTreeMap, HashSet};

use jiff::Timestamp;

use crate::blobs::{self, Blobs, Entry, Key, Scope};
use crate::deployment;
use crate::job::{JobId, TenantId};
use crate::store::{self, Kept, Store};

/// What kept a sweep from going on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Database and object store do not belong together.
    #[error(transparent)]
    Deployment(#[from] deployment::Error),
    /// The database said no.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The object store said no.
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Objects that no row names, by key.
    pub orphans: Vec<Entry>,
    /// Keys that we cannot have written. They are left alone.
    pub foreign: Vec<String>,
    /// All our objects.
    pub n_objects: usize,
    /// Why the rows may be wrong, rather than the objects nobody's.
    pub doubts: Vec<Doubt>,
}

/// Why the rows may be the wrong ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// More than half of all objects would go.
    MostObjects,
    /// So many orphans are of jobs younger than every row, or were written after the backup that the database was
    /// restored from.
    NewerThanRows(usize),
}

/// What became of a removal.
#[derive(Clone, Debug, Default)]
pub struct Removed {
    /// Objects that are gone.
    pub n_removed: usize,
    /// Orphans that meanwhile were somebody's.
    pub n_kept: usize,
    /// Objects that could not be removed, and why.
    pub failed: Vec<(Key, blobs::Error)>,
}

/// Objects that no row names and that were written before `before`, which must be further back than an upload can take.
/// Removes nothing. Fails if database and object store do not belong together.
pub async fn find(store: &Store, blobs: &Blobs, before: Timestamp) -> Result<Found, Error> {
    let deployment = deployment::check(store, blobs).await?;
    let listing = blobs.look(&Scope::all()).await?;
    let mut found = Found { n_objects: listing.entries.len(), foreign: listing.foreign, ..Found::default() };
    let old = listing.entries.into_iter().filter(|entry| entry.modified_ms < before.as_millisecond());
    let (newest, mut n_newer) = (store.newest_job().await?, 0);
    for (owner, entries) in by_owner(old) {
        let rows = rows(store, &owner).await?;
        let orphans: Vec<Entry> = entries.into_iter().filter(|entry| !rows.keep(&entry.key)).collect();
        // Of a job that is younger than every row: ids sort by time.
        let job_is_newer = match (&owner, &rows) {
            (Owner::Job(_, job), Rows::Job(None)) => newest.is_none_or(|newest| *job > newest),
            _ => false,
        };
        let is_newer = |orphan: &&Entry| {
            let lost = |(from, until): (i64, i64)| (from..=until).contains(&orphan.modified_ms);
            job_is_newer || deployment.restored.is_some_and(lost)
        };
        n_newer += orphans.iter().filter(is_newer).count();
        found.orphans.extend(orphans);
    }
    if found.orphans.len() * 2 > found.n_objects {
        found.doubts.push(Doubt::MostObjects);
    }
    if n_newer > 0 {
        found.doubts.push(Doubt::NewerThanRows(n_newer));
    }
    found.orphans.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(found)
}

/// Removes orphans, after the rows were asked again: what was nobody's when the list was made may be somebody's now. Goes
/// on past what cannot be removed.
pub async fn remove(store: &Store, blobs: &Blobs, orphans: &[Entry]) -> Result<Removed, Error> {
    let mut removed = Removed::default();
    for (owner, entries) in by_owner(orphans.iter().cloned()) {
        if let Owner::Job(_, job) = owner {
            store.named(job).await?; // waits until no write to its row is under way
        }
        let rows = rows(store, &owner).await?;
        let (kept, gone): (Vec<Key>, Vec<Key>) =
            entries.into_iter().map(|entry| entry.key).partition(|key| rows.keep(key));
        let failed = blobs.delete_each(&gone).await;
        removed.n_kept += kept.len();
        removed.n_removed += gone.len() - failed.len();
        removed.failed.extend(failed);
    }
    Ok(removed)
}

/// After all orphans written before `before` were removed: what was lost with a restored backup before that is settled.
pub async fn settled(store: &Store, before: Timestamp) -> Result<(), Error> {
    let deployment = store.deployment().await?;
    let lost = deployment.and_then(|deployment| deployment.restored);
    if lost.is_some_and(|(_, until)| until < before.as_millisecond()) {
        store.forget_restored().await?;
    }
    Ok(())
}

/// Whose objects are: one question to the rows for all of them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Job(TenantId, JobId),
    ClassImages(TenantId, String),
}

fn by_owner(entries: impl Iterator<Item = Entry>) -> BTreeMap<Owner, Vec<Entry>> {
    let mut owners: BTreeMap<Owner, Vec<Entry>> = BTreeMap::new();
    for entry in entries {
        let owner = match (entry.key.owner(), entry.key.class_image_of()) {
            (Some((tenant, job, _)), _) => Owner::Job(tenant, job),
            (None, Some((tenant, settings))) => Owner::ClassImages(tenant, settings.to_owned()),
            (None, None) => continue, // there is no such key
        };
        owners.entry(owner).or_default().push(entry);
    }
    owners
}

/// What the rows say of an owner's objects.
enum Rows {
    Job(Option<Kept>),
    ClassImages(HashSet<String>),
}

async fn rows(store: &Store, owner: &Owner) -> Result<Rows, Error> {
    Ok(match owner {
        Owner::Job(tenant, job) => Rows::Job(store.kept(*job).await?.filter(|kept| kept.tenant == *tenant)),
        Owner::ClassImages(tenant, settings) => {
            Rows::ClassImages(store.class_image_keys(*tenant, settings).await?)
        }
    })
}

impl Rows {
    fn keep(&self, key: &Key) -> bool {
        match self {
            Self::Job(None) => false,
            Self::Job(Some(kept)) => {
                let lease = key.owner().and_then(|(_, _, lease)| lease);
                kept.deleting || kept.keys.contains(key.as_str()) || lease.is_some() && lease == kept.running
            }
            Self::ClassImages(keys) => keys.contains(key.as_str()),
        }
    }
}

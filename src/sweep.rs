//! The sweep: finds and removes orphaned objects, which no row references, left by killed processes or lost rows.
//!
//! References are read from the rows, owner by owner. What a current claim has written is kept, since it may still be
//! referenced. Everything else that is old enough is an orphan. Before it is removed the rows are read again. What
//! looks like a wrong database rather than like orphans is a [`Doubt`], which the caller has to confirm.

use std::collections::{BTreeMap, HashSet};

use jiff::Timestamp;

use crate::blobs::{self, Blobs, Entry, Key, Scope};
use crate::deployment;
use crate::job::{JobId, TenantId};
use crate::store::{self, References, Store};

/// Why a sweep failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Database and object store do not belong together.
    #[error(transparent)]
    Deployment(#[from] deployment::Error),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The object store failed.
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
}

/// What a sweep has found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Objects that no row references, sorted by key.
    pub orphans: Vec<Entry>,
    /// Keys that this program cannot have written. They are never removed.
    pub foreign: Vec<String>,
    /// Number of all objects with valid keys.
    pub n_objects: usize,
    /// Reasons to doubt the rows rather than the objects.
    pub doubts: Vec<Doubt>,
}

/// A reason to doubt the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// More than half of all objects would be removed.
    MostObjects,
    /// This many orphans belong to jobs newer than every row, or were written after the backup that the database was
    /// restored from.
    NewerThanRows(usize),
}

/// The outcome of a removal.
#[derive(Clone, Debug, Default)]
pub struct Removed {
    /// Number of removed objects.
    pub n_removed: usize,
    /// Number of orphans that are referenced meanwhile.
    pub n_kept: usize,
    /// Objects that could not be removed, and why.
    pub failed: Vec<(Key, blobs::Error)>,
}

/// Finds objects that no row references and that were written before `before`, which must be longer ago than an upload
/// can take. Removes nothing. Fails if database and object store do not belong together.
pub async fn find(store: &Store, blobs: &Blobs, before: Timestamp) -> Result<Found, Error> {
    let deployment = deployment::check(store, blobs).await?;
    let listing = blobs.list_all(&Scope::all()).await?;
    let mut found = Found { n_objects: listing.entries.len(), foreign: listing.foreign, ..Found::default() };
    let old = listing.entries.into_iter().filter(|entry| entry.modified_ms < before.as_millisecond());
    let (newest, mut n_newer) = (store.newest_job().await?, 0);
    for (owner, entries) in by_owner(old) {
        let rows = rows(store, &owner).await?;
        let orphans: Vec<Entry> = entries.into_iter().filter(|entry| !rows.contain(&entry.key)).collect();
        // The job is newer than every row: ids sort by time.
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

/// Removes orphans. The rows are read again first, since an orphan may be referenced meanwhile. Continues past objects
/// that cannot be removed.
pub async fn remove(store: &Store, blobs: &Blobs, orphans: &[Entry]) -> Result<Removed, Error> {
    let mut removed = Removed::default();
    for (owner, entries) in by_owner(orphans.iter().cloned()) {
        if let Owner::Job(_, job) = owner {
            store.referenced_keys(job).await?; // waits until no write to its row is in progress
        }
        let rows = rows(store, &owner).await?;
        let (kept, gone): (Vec<Key>, Vec<Key>) =
            entries.into_iter().map(|entry| entry.key).partition(|key| rows.contain(key));
        let failed = blobs.delete_each(&gone).await;
        removed.n_kept += kept.len();
        removed.n_removed += gone.len() - failed.len();
        removed.failed.extend(failed);
    }
    Ok(removed)
}

/// Clears the mark of a restored backup, if all orphans of its lost rows were written before `before` and removed.
pub async fn clear_restored(store: &Store, before: Timestamp) -> Result<(), Error> {
    let deployment = store.deployment().await?;
    let lost = deployment.and_then(|deployment| deployment.restored);
    if lost.is_some_and(|(_, until)| until < before.as_millisecond()) {
        store.clear_restored().await?;
    }
    Ok(())
}

/// An owner of objects, whose rows are read together.
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
            (None, None) => continue, // no valid key
        };
        owners.entry(owner).or_default().push(entry);
    }
    owners
}

/// The references of an owner.
enum Rows {
    Job(Option<References>),
    ClassImages(HashSet<String>),
}

async fn rows(store: &Store, owner: &Owner) -> Result<Rows, Error> {
    Ok(match owner {
        Owner::Job(tenant, job) => {
            Rows::Job(store.references(*job).await?.filter(|references| references.tenant == *tenant))
        }
        Owner::ClassImages(tenant, settings) => {
            Rows::ClassImages(store.class_image_keys(*tenant, settings).await?)
        }
    })
}

impl Rows {
    fn contain(&self, key: &Key) -> bool {
        match self {
            Self::Job(None) => false,
            Self::Job(Some(references)) => {
                let lease = key.owner().and_then(|(_, _, lease)| lease);
                references.deleting
                    || references.keys.contains(key.as_str())
                    || lease.is_some() && lease == references.running
            }
            Self::ClassImages(keys) => keys.contains(key.as_str()),
        }
    }
}

//! Pairing of a database with its object store.
//!
//! Both are marked with the same random id, the database in a row and the object store in an object. So a wrong
//! address, an empty database or another deployment's bucket is detected before anything is written or removed: a
//! missing row alone does not prove that an object is orphaned. Beside the id stands when the two were last seen
//! together. The database is updated first: if the object store has a later time than the database, the database was
//! restored from a backup.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::warn;
use uuid::Uuid;

use crate::blobs::{self, Blobs};
use crate::store::{self, Deployment, Store};

/// How often both are updated with the time. A backup that is no older than this is not recognised as one.
const SEEN_EVERY: Duration = Duration::from_mins(10);

/// Number of rows whose objects are looked up before unmarked ones are paired.
const SAMPLE: u32 = 100;

/// Why database and object store are not paired.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The object store failed.
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
    /// They do not belong together, or nothing shows that they do; the text says why.
    #[error("{0}")]
    Mismatch(String),
}

/// The object store's marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Marker {
    deployment: Uuid,
    seen_ms: i64,
}

/// Checks that database and object store belong together, as every program does at its start. Unmarked ones are marked
/// if the objects of sampled rows are found, or if both are empty.
pub async fn pair(store: &Store, blobs: &Blobs) -> Result<Deployment, Error> {
    if let Some(own) = marked(store, blobs).await? {
        return Ok(own);
    }
    if let Err(error) = evidence(store, blobs).await {
        // Another process may have marked them meanwhile, and accepted jobs.
        return marked(store, blobs).await?.ok_or(error);
    }
    let marker = marker(blobs).await?;
    let is_first = store.deployment().await?.is_none();
    let own = store.create_deployment(marker.map_or_else(Uuid::now_v7, |marker| marker.deployment)).await?;
    if is_first && marker.is_some() && store.newest_job().await?.is_some() {
        // A backup from before there were markers.
        store.note_lost_since_newest_job().await?;
    }
    put_marker(blobs, &own).await?;
    Ok(store.deployment().await?.unwrap_or(own))
}

/// Fails unless both have the same marker. Writes nothing.
pub async fn check(store: &Store, blobs: &Blobs) -> Result<Deployment, Error> {
    // The object store first: it is updated after the database.
    let marker = marker(blobs).await?;
    match (store.deployment().await?, marker) {
        (Some(own), Some(marker)) => {
            check_same(&own, marker)?;
            let until = own.restored.map_or(marker.seen_ms, |(_, until)| until.max(marker.seen_ms));
            let from = own.restored.map_or(own.seen_ms, |(from, _)| from.min(own.seen_ms));
            let is_older = marker.seen_ms > own.seen_ms;
            Ok(Deployment { restored: if is_older { Some((from, until)) } else { own.restored }, ..own })
        }
        (own, marker) => {
            let missing = match (own, marker) {
                (None, None) => "neither the database nor the object store records",
                (None, Some(_)) => "the database does not record",
                _ => "the object store does not record",
            };
            Err(Error::Mismatch(format!(
                "{missing} which deployment it belongs to; start `hypnos serve` or `hypnos work` on them, or run `hypnos pair`"
            )))
        }
    }
}

/// Records that the two were seen together, if the last record is old enough, or in any case if `now`.
pub async fn mark(store: &Store, blobs: &Blobs, now: bool) -> Result<(), Error> {
    let every = if now { Duration::ZERO } else { SEEN_EVERY };
    if !store.is_seen_due(every).await? || marked(store, blobs).await?.is_none() {
        return Ok(());
    }
    if let Some(own) = store.note_seen(every).await? {
        put_marker(blobs, &own).await?;
    }
    Ok(())
}

/// Pairs the two whatever their markers are. `replaced` must be the object store's current marker, or `none`, so that
/// nothing unknown is overwritten. Two with the same marker become a new deployment.
pub async fn replace(store: &Store, blobs: &Blobs, replaced: &str) -> Result<Deployment, Error> {
    let marker = marker(blobs).await?.map(|marker| marker.deployment);
    let found = marker.map_or_else(|| "none".to_owned(), |id| id.to_string());
    if replaced != found {
        return Err(Error::Mismatch(format!("the object store's marker is {found}, not {replaced}")));
    }
    let own = store.deployment().await?.map(|own| own.id).filter(|own| Some(*own) != marker);
    store.replace_deployment(own.unwrap_or_else(Uuid::now_v7)).await?;
    let own = store.deployment().await?;
    let own = own.ok_or_else(|| Error::Mismatch("another process has just marked the database".into()))?;
    put_marker(blobs, &own).await?;
    Ok(own)
}

/// The deployment if both are marked; records whether the database was restored from a backup.
async fn marked(store: &Store, blobs: &Blobs) -> Result<Option<Deployment>, Error> {
    // The object store first: it is updated after the database.
    let marker = marker(blobs).await?;
    let (Some(own), Some(marker)) = (store.deployment().await?, marker) else { return Ok(None) };
    check_same(&own, marker)?;
    if marker.seen_ms > own.seen_ms && store.note_restored(marker.seen_ms).await? {
        warn!(
            since_ms = own.seen_ms,
            "database older than the object store: restored from a backup, or the object store is shared with another \
             deployment; `hypnos sweep` keeps the objects written since"
        );
    }
    Ok(Some(own))
}

fn check_same(own: &Deployment, marker: Marker) -> Result<(), Error> {
    if own.id == marker.deployment {
        return Ok(());
    }
    Err(Error::Mismatch(format!(
        "the database and the object store do not belong together: the database is of deployment {}, the object store \
         of {}; look at HYPNOS_DATABASE and HYPNOS_OBJECTS, or see `hypnos pair --help`",
        own.id, marker.deployment
    )))
}

/// Fails unless the objects of sampled rows are in the object store, or both are empty.
async fn evidence(store: &Store, blobs: &Blobs) -> Result<(), Error> {
    let wrong = "look at HYPNOS_DATABASE and HYPNOS_OBJECTS, or see `hypnos pair --help`";
    let named = store.sample_objects(SAMPLE).await?;
    if named.is_empty() {
        if blobs.is_empty().await? {
            return Ok(());
        }
        return Err(Error::Mismatch(format!(
            "the object store holds objects, but the database names none: one of them is another deployment's; {wrong}"
        )));
    }
    let n_found = blobs.count(&named).await?;
    if n_found * 2 <= named.len() {
        return Err(Error::Mismatch(format!(
            "of {} objects that the database names, {n_found} are in the object store: one of them is another \
             deployment's; {wrong}",
            named.len()
        )));
    }
    if n_found < named.len() {
        warn!(
            missing = named.len() - n_found,
            of = named.len(),
            "objects that rows reference are missing in the object store"
        );
    }
    Ok(())
}

async fn marker(blobs: &Blobs) -> Result<Option<Marker>, Error> {
    let Some(bytes) = blobs.marker().await? else { return Ok(None) };
    let unreadable = || {
        Error::Mismatch(
            "the object store's marker, deployment.json, is invalid; see `hypnos pair --help`".into(),
        )
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|_| unreadable())
}

async fn put_marker(blobs: &Blobs, own: &Deployment) -> Result<(), Error> {
    let marker = Marker { deployment: own.id, seen_ms: own.seen_ms };
    let bytes = serde_json::to_vec(&marker).map_err(|error| Error::Mismatch(error.to_string()))?;
    Ok(blobs.put_marker(bytes).await?)
}

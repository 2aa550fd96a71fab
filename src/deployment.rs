//! Which database and which object store belong together.
//!
//! Both bear the same random id, the database in a row and the object store in an object. So a wrong address, an empty
//! database or another's bucket is found out before anything is written or removed: that a row is missing is no proof that
//! an object is nobody's. Beside the id stands when the two were last seen together. The database is told first; where the
//! object store knows of a later time than the database, the database was restored from a backup.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::warn;
use uuid::Uuid;

use crate::blobs::{self, Blobs};
use crate::store::{self, Deployment, Store};

/// How often the two are told that they were seen together: so much older may a backup be without being known as one.
const SEEN_EVERY: Duration = Duration::from_mins(10);

/// Rows that are looked for in the object store before the two are marked.
const SAMPLE: u32 = 100;

/// Why database and object store are not taken for each other's.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database said no.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The object store said no.
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
    /// They do not belong together, or nothing shows that they do; the line says why.
    #[error("{0}")]
    Apart(String),
}

/// What the object store bears.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Marker {
    deployment: Uuid,
    seen_ms: i64,
}

/// Sees to it that database and object store belong together, as every program does at its start. Those without markers
/// get them if the objects of sampled rows are found, or if both are empty.
pub async fn pair(store: &Store, blobs: &Blobs) -> Result<Deployment, Error> {
    if let Some(own) = marked(store, blobs).await? {
        return Ok(own);
    }
    if let Err(error) = evidence(store, blobs).await {
        // Another may have marked them meanwhile, and accepted jobs.
        return marked(store, blobs).await?.ok_or(error);
    }
    let marker = read(blobs).await?;
    let is_first = store.deployment().await?.is_none();
    let own = store.found_deployment(marker.map_or_else(Uuid::now_v7, |marker| marker.deployment)).await?;
    if is_first && marker.is_some() && store.newest_job().await?.is_some() {
        // A backup of a time before there were markers.
        store.note_lost_since_newest_job().await?;
    }
    tell(blobs, &own).await?;
    Ok(store.deployment().await?.unwrap_or(own))
}

/// Fails unless both are marked, and alike. Writes nothing.
pub async fn check(store: &Store, blobs: &Blobs) -> Result<Deployment, Error> {
    // The object store first: it is told of a time after the database was.
    let marker = read(blobs).await?;
    match (store.deployment().await?, marker) {
        (Some(own), Some(marker)) => {
            alike(&own, marker)?;
            let until = own.restored.map_or(marker.seen_ms, |(_, until)| until.max(marker.seen_ms));
            let from = own.restored.map_or(own.seen_ms, |(from, _)| from.min(own.seen_ms));
            let is_older = marker.seen_ms > own.seen_ms;
            Ok(Deployment { restored: if is_older { Some((from, until)) } else { own.restored }, ..own })
        }
        (own, marker) => {
            let bare = match (own, marker) {
                (None, None) => "neither the database nor the object store says",
                (None, Some(_)) => "the database does not say",
                _ => "the object store does not say",
            };
            Err(Error::Apart(format!(
                "{bare} which deployment it belongs to; start `hypnos serve` or `hypnos work` on them, or run `hypnos pair`"
            )))
        }
    }
}

/// Notes that the two were seen together, if that was noted a while ago; `now` if it is to be noted in any case.
pub async fn mark(store: &Store, blobs: &Blobs, now: bool) -> Result<(), Error> {
    let every = if now { Duration::ZERO } else { SEEN_EVERY };
    if !store.is_seen_due(every).await? || marked(store, blobs).await?.is_none() {
        return Ok(());
    }
    if let Some(own) = store.note_seen(every).await? {
        tell(blobs, &own).await?;
    }
    Ok(())
}

/// Says that the two belong together, whatever their markers say. `replaced` is what the object store bears now, or `none`:
/// who does not know that does not know what is overwritten. Two that bear the same become a deployment of their own.
pub async fn replace(store: &Store, blobs: &Blobs, replaced: &str) -> Result<Deployment, Error> {
    let marker = read(blobs).await?.map(|marker| marker.deployment);
    let found = marker.map_or_else(|| "none".to_owned(), |id| id.to_string());
    if replaced != found {
        return Err(Error::Apart(format!("the object store's marker is {found}, not {replaced}")));
    }
    let own = store.deployment().await?.map(|own| own.id).filter(|own| Some(*own) != marker);
    store.refound_deployment(own.unwrap_or_else(Uuid::now_v7)).await?;
    let own = store.deployment().await?;
    let own = own.ok_or_else(|| Error::Apart("the database was marked anew by another".into()))?;
    tell(blobs, &own).await?;
    Ok(own)
}

/// The deployment if both are marked; notes whether the database was restored from a backup.
async fn marked(store: &Store, blobs: &Blobs) -> Result<Option<Deployment>, Error> {
    // The object store first: it is told of a time after the database was.
    let marker = read(blobs).await?;
    let (Some(own), Some(marker)) = (store.deployment().await?, marker) else { return Ok(None) };
    alike(&own, marker)?;
    if marker.seen_ms > own.seen_ms && store.note_restored(marker.seen_ms).await? {
        warn!(
            since_ms = own.seen_ms,
            "the database is older than the object store: it was restored from a backup, or another uses the same \
             object store; objects written since are kept by `hypnos sweep`"
        );
    }
    Ok(Some(own))
}

fn alike(own: &Deployment, marker: Marker) -> Result<(), Error> {
    if own.id == marker.deployment {
        return Ok(());
    }
    Err(Error::Apart(format!(
        "the database and the object store do not belong together: the database is of deployment {}, the object store \
         of {}; look at HYPNOS_DATABASE and HYPNOS_OBJECTS, or see `hypnos pair --help`",
        own.id, marker.deployment
    )))
}

/// Whether what rows name is in the object store, or there is nothing in either.
async fn evidence(store: &Store, blobs: &Blobs) -> Result<(), Error> {
    let wrong = "look at HYPNOS_DATABASE and HYPNOS_OBJECTS, or see `hypnos pair --help`";
    let named = store.sample_objects(SAMPLE).await?;
    if named.is_empty() {
        if blobs.is_empty().await? {
            return Ok(());
        }
        return Err(Error::Apart(format!(
            "the object store holds objects, but the database names none: one of them is another deployment's; {wrong}"
        )));
    }
    let n_found = blobs.count(&named).await?;
    if n_found * 2 <= named.len() {
        return Err(Error::Apart(format!(
            "of {} objects that the database names, {n_found} are in the object store: one of them is another \
             deployment's; {wrong}",
            named.len()
        )));
    }
    if n_found < named.len() {
        warn!(
            missing = named.len() - n_found,
            of = named.len(),
            "objects that rows name are not in the object store"
        );
    }
    Ok(())
}

async fn read(blobs: &Blobs) -> Result<Option<Marker>, Error> {
    let Some(bytes) = blobs.marker().await? else { return Ok(None) };
    let unreadable = || {
        Error::Apart(
            "the object store's marker, deployment.json, is not what it should be; see `hypnos pair --help`"
                .into(),
        )
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|_| unreadable())
}

async fn tell(blobs: &Blobs, own: &Deployment) -> Result<(), Error> {
    let marker = Marker { deployment: own.id, seen_ms: own.seen_ms };
    let bytes = serde_json::to_vec(&marker).map_err(|error| Error::Apart(error.to_string()))?;
    Ok(blobs.put_marker(bytes).await?)
}

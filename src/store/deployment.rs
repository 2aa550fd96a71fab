//! The deployment that the database belongs to, and the objects that its rows reference.

use std::collections::HashSet;
use std::time::Duration;

use serde::Deserialize;
use uuid::Uuid;

use super::db::{Arg, Row, args};
use super::error::{Error, Result};
use super::handle::Store;
use super::json::parse;
use super::objects::object;
use crate::job::{Checkpoint, JobId, Object, State, TenantId};

/// Maximum number of parameters of one statement.
const PARAMETERS_MAX: usize = 500;

/// A database and an object store that belong together, as recorded in the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deployment {
    /// The id that both are marked with.
    pub id: Uuid,
    /// When the two were last seen together, in milliseconds since 1970. The object store's copy of this is never
    /// later, unless the database was restored from a backup.
    pub seen_ms: i64,
    /// The period in which objects may have been written whose rows a restored backup does not have.
    pub restored: Option<(i64, i64)>,
}

/// The objects that a job references, or may still reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct References {
    /// Its tenant.
    pub tenant: TenantId,
    /// Keys of its photos, its checkpoint and its artifacts.
    pub keys: HashSet<String>,
    /// The current claim, if any: it may still reference everything that it has written.
    pub running: Option<i64>,
    /// Whether it was deleted: then its objects are being erased.
    pub deleting: bool,
}

macro_rules! columns {
    () => {
        "id, seen_ms, restored_from_ms, restored_until_ms"
    };
}

impl Store {
    /// The deployment, if recorded.
    pub async fn deployment(&self) -> Result<Option<Deployment>> {
        let sql = concat!("select ", columns!(), " from deployment");
        self.db.row(sql, &[]).await?.as_ref().map(deployment).transpose()
    }

    /// Records the deployment unless one is recorded already; the recorded one.
    pub async fn create_deployment(&self, id: Uuid) -> Result<Deployment> {
        let insert = "insert into deployment (one, id, seen_ms) select 1, $1, ms from clock where true \
                      on conflict (one) do nothing";
        let select = concat!("select ", columns!(), " from deployment");
        let mut tx = self.db.begin().await?;
        tx.run(insert, args![id.to_string()]).await?;
        let row = tx.row(select, &[]).await?;
        tx.commit().await?;
        deployment(&row.ok_or_else(|| Error::Corrupt("a row that was just written is missing".into()))?)
    }

    /// Replaces the recorded deployment, and clears that it was restored from a backup.
    pub async fn replace_deployment(&self, id: Uuid) -> Result<()> {
        let mut tx = self.db.begin().await?;
        tx.run("delete from deployment", &[]).await?;
        let insert = "insert into deployment (one, id, seen_ms) select 1, $1, ms from clock";
        tx.run(insert, args![id.to_string()]).await?;
        tx.commit().await
    }

    /// Whether database and object store were last recorded as seen together longer than `every` ago.
    pub async fn is_seen_due(&self, every: Duration) -> Result<bool> {
        let due = "select 1 from deployment cross join clock where seen_ms <= ms - $1";
        Ok(self.db.row(due, args![every]).await?.is_some())
    }

    /// Records that they were just seen together, if that was last recorded longer than `every` ago: then the object
    /// store has to be updated. Of concurrent processes only one gets a result.
    pub async fn note_seen(&self, every: Duration) -> Result<Option<Deployment>> {
        let update = concat!(
            "update deployment set seen_ms = case when ms > seen_ms then ms else seen_ms + 1 end from clock \
             where seen_ms <= ms - $1 returning ",
            columns!()
        );
        let mut tx = self.db.begin().await?;
        let row = tx.row(update, args![every]).await?;
        tx.commit().await?;
        row.as_ref().map(deployment).transpose()
    }

    /// Records that the object store was seen together with this database at `store_seen_ms`, which this database does
    /// not know: it was restored from a backup. Whether that is new.
    pub async fn note_restored(&self, store_seen_ms: i64) -> Result<bool> {
        let update = "update deployment set restored_from_ms = case when restored_from_ms < seen_ms \
                      then restored_from_ms else seen_ms end, restored_until_ms = ms, \
                      seen_ms = case when ms > $1 then ms else $1 end from clock where seen_ms < $1";
        Ok(self.db.write(update, args![store_seen_ms]).await? > 0)
    }

    /// Records that every row since the newest job may be lost.
    pub async fn note_lost_since_newest_job(&self) -> Result<()> {
        let update = "update deployment set restored_from_ms = \
                      coalesce((select created_ms from job order by id desc limit 1), 0), restored_until_ms = ms from clock";
        self.db.write(update, &[]).await.map(drop)
    }

    /// Clears that it was restored: the objects of the lost rows are removed too.
    pub async fn clear_restored(&self) -> Result<()> {
        let update = "update deployment set restored_from_ms = null, restored_until_ms = null";
        self.db.write(update, &[]).await.map(drop)
    }

    /// A sample of objects that must be in this database's object store, at most `n`: one photo each of the oldest and
    /// of the newest trainings; class images if there are no trainings.
    pub async fn sample_objects(&self, n: u32) -> Result<Vec<Object>> {
        let mut found: Vec<Object> = Vec::new();
        for order in ["asc", "desc"] {
            let sql = format!(
                "select photos from job where kind = 'train' and deleting = 0 and photos <> '[]' order by id {order} limit $1"
            );
            for row in self.db.read(sql, args![i64::from(n.div_ceil(2))]).await? {
                let photos: Vec<Object> = parse("photos", row.text("photos")?)?;
                found.extend(photos.into_iter().next());
            }
        }
        if found.is_empty() {
            let sql = "select name, key, size, sha256, content_type, meta from class_image limit $1";
            for row in self.db.read(sql, args![i64::from(n)]).await? {
                found.push(object(&row)?);
            }
        }
        found.sort_by(|a, b| a.key.cmp(&b.key));
        found.dedup_by(|a, b| a.key == b.key);
        Ok(found)
    }

    /// The newest job, if there is any.
    pub async fn newest_job(&self) -> Result<Option<JobId>> {
        // Ids sort by time.
        let row = self.db.row("select id from job order by id desc limit 1", &[]).await?;
        row.map(|row| row.parsed("id")).transpose()
    }

    /// The objects that a job references; none if the job does not exist.
    pub async fn references(&self, id: JobId) -> Result<Option<References>> {
        // The row first: while it shows a claim, everything that the claim references later is references.
        let select = "select tenant, state, run_lease, deleting, photos, checkpoint from job where id = $1";
        let Some(row) = self.db.row(select, args![id]).await? else { return Ok(None) };
        let mut references = References {
            tenant: row.parsed("tenant")?,
            running: (row.parsed::<State>("state")? == State::Running)
                .then(|| row.int("run_lease"))
                .transpose()?,
            deleting: row.flag("deleting")?,
            keys: HashSet::new(),
        };
        let photos: Vec<ObjectKey> = parse("photos", row.text("photos")?)?;
        references.keys.extend(photos.into_iter().map(|photo| photo.key));
        if let Some(text) = row.text_or_none("checkpoint")? {
            references.keys.insert(parse::<Checkpoint>("checkpoint", text)?.object.key);
        }
        for row in self.db.read("select key from artifact where job = $1", args![id]).await? {
            references.keys.insert(row.text("key")?.to_owned());
        }
        Ok(Some(references))
    }

    /// Of these hashes, those of weights that a row references.
    pub async fn weights_in_use(&self, sha256: &[String]) -> Result<HashSet<String>> {
        let mut found = HashSet::new();
        for some in sha256.chunks(PARAMETERS_MAX) {
            let places: Vec<String> = (1..=some.len()).map(|n| format!("${n}")).collect();
            let sql = format!(
                "select distinct sha256 from artifact join job on job.id = artifact.job \
                 where artifact.name = 'weights.safetensors' and deleting = 0 and sha256 in ({})",
                places.join(", ")
            );
            let values: Vec<Arg> = some.iter().map(|hash| hash.as_str().into()).collect();
            for row in self.db.read(sql, &values).await? {
                found.insert(row.text("sha256")?.to_owned());
            }
        }
        Ok(found)
    }
}

/// The key of an object, without its other fields.
#[derive(Deserialize)]
struct ObjectKey {
    key: String,
}

fn deployment(row: &Row) -> Result<Deployment> {
    let restored = match (row.int_or_none("restored_from_ms")?, row.int_or_none("restored_until_ms")?) {
        (Some(from), Some(until)) => Some((from, until)),
        _ => None,
    };
    Ok(Deployment { id: row.parsed("id")?, seen_ms: row.int("seen_ms")?, restored })
}

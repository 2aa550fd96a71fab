//! Rows that name objects in the object store: artifacts of jobs, and class images that trainings share.

use std::collections::HashSet;

use super::db::{Row, args, locking};
use super::error::{Error, Result};
use super::handle::Store;
use super::json::{json, parse};
use crate::job::{Checkpoint, JobId, Object, TenantId};

macro_rules! artifact_select {
    () => {
        "select artifact.name, artifact.key, size, sha256, content_type, meta from artifact \
         join job on job.id = artifact.job where tenant = $1 and artifact.job = $2 and deleting = 0"
    };
}

impl Store {
    /// The artifacts of a job so far, by name.
    pub async fn artifacts(&self, tenant: TenantId, id: JobId) -> Result<Vec<Object>> {
        let sql = concat!(artifact_select!(), " order by artifact.name");
        let rows = self.db.read(sql, args![tenant, id]).await?;
        rows.iter().map(object).collect()
    }

    /// One artifact of a job.
    pub async fn artifact(&self, tenant: TenantId, id: JobId, name: &str) -> Result<Option<Object>> {
        let sql = concat!(artifact_select!(), " and artifact.name = $3");
        self.db.row(sql, args![tenant, id, name]).await?.as_ref().map(object).transpose()
    }

    /// Stored class images with these settings: seeds and images.
    pub async fn class_images(&self, tenant: TenantId, settings: &str) -> Result<Vec<(u64, Object)>> {
        let sql = "select seed, name, key, size, sha256, content_type, meta from class_image \
                   where tenant = $1 and settings = $2 order by seed";
        let rows = self.db.read(sql, args![tenant, settings]).await?;
        rows.iter().map(|row| Ok((row.int("seed")? as u64, object(row)?))).collect()
    }

    /// Adds a class image. An existing one stays, unless it is `replaces`, which the object store has lost or damaged.
    /// Returns the key of the one that is stored then.
    pub async fn add_class_image(
        &self,
        tenant: TenantId,
        settings: &str,
        seed: u64,
        object: &Object,
        replaces: Option<&Object>,
    ) -> Result<String> {
        let upsert = "insert into class_image (tenant, settings, seed, name, key, size, sha256, content_type, meta) \
                      values ($1, $2, $3, $4, $5, $6, $7, $8, $9) on conflict (tenant, settings, seed) do update \
                      set name = excluded.name, key = excluded.key, size = excluded.size, sha256 = excluded.sha256, \
                      content_type = excluded.content_type, meta = excluded.meta \
                      where class_image.key = $10 and class_image.sha256 = $11";
        let select = "select key from class_image where tenant = $1 and settings = $2 and seed = $3";
        let Object { name, key, size, sha256, content_type, meta } = object;
        let place = args![tenant, settings, seed as i64];
        let what = args![
            name.as_str(),
            key.as_str(),
            *size as i64,
            sha256.as_str(),
            content_type.as_str(),
            json(meta),
            replaces.map(|old| old.key.as_str()),
            replaces.map(|old| old.sha256.as_str()),
        ];
        let mut tx = self.db.begin().await?;
        tx.run(upsert, &[&place[..], &what[..]].concat()).await?;
        let row = tx.row(select, place).await?;
        tx.commit().await?;
        Ok(row
            .ok_or_else(|| Error::Corrupt("a row that was just written is missing".into()))?
            .text("key")?
            .to_owned())
    }

    /// Keys of the class images with these settings.
    pub async fn class_image_keys(&self, tenant: TenantId, settings: &str) -> Result<HashSet<String>> {
        let sql = "select key from class_image where tenant = $1 and settings = $2";
        let rows = self.db.read(sql, args![tenant, settings]).await?;
        rows.iter().map(|row| Ok(row.text("key")?.to_owned())).collect()
    }

    /// The keys of all objects of a job's attempts that its row references, its checkpoint included; empty if the row
    /// is gone. A locking read: when it returns, no earlier write of this job is in progress any more, and what it does
    /// not name will not be named later.
    pub async fn referenced_keys(&self, id: JobId) -> Result<HashSet<String>> {
        let lock = locking!("select checkpoint from job where id = $1"; "for no key update");
        let mut tx = self.db.begin().await?;
        let mut keys = HashSet::new();
        if let Some(row) = tx.row(lock, args![id]).await? {
            if let Some(text) = row.text_or_none("checkpoint")? {
                keys.insert(parse::<Checkpoint>("checkpoint", text)?.object.key);
            }
            for artifact in tx.rows("select key from artifact where job = $1", args![id]).await? {
                keys.insert(artifact.text("key")?.to_owned());
            }
        }
        tx.end_locking_read().await?;
        Ok(keys)
    }
}

pub(super) fn object(row: &Row) -> Result<Object> {
    Ok(Object {
        name: row.text("name")?.to_owned(),
        key: row.text("key")?.to_owned(),
        size: row.int("size")? as u64,
        sha256: row.text("sha256")?.to_owned(),
        content_type: row.text("content_type")?.to_owned(),
        meta: parse("meta", row.text("meta")?)?,
    })
}

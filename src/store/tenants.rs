//! Tenants: their names and states, and how one is erased.

use super::api::cancel_columns;
use super::db::{Row, args};
use super::error::Result;
use super::handle::Store;
use super::in_doubt::write_resolving;
use super::objects::object;
use crate::job::{Object, TenantId, string_enum};

string_enum!(
    /// Whether a tenant is served.
    TenantState {
        /// It is.
        Active = "active",
        /// Its keys are refused and its queued jobs are not claimed. Running jobs continue to their end.
        Disabled = "disabled",
        /// It is being erased, with all that it has. There is no way back.
        Deleting = "deleting",
    }
);

/// A tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Its id.
    pub id: TenantId,
    /// Its name.
    pub name: String,
    /// When it was created.
    pub created_ms: i64,
    /// Whether it is served.
    pub state: TenantState,
    /// Its share of the devices, relative to other tenants with waiting jobs.
    pub weight: u32,
}

/// Numbers of a tenant's keys and jobs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Live keys.
    pub keys: u64,
    /// Waiting jobs.
    pub queued: u64,
    /// Running jobs.
    pub running: u64,
    /// Jobs in any state, including those being erased.
    pub jobs: u64,
}

macro_rules! tenant_select {
    () => {
        "select id, name, created_ms, state, weight from tenant"
    };
}

impl Store {
    /// The tenant of that name, created if needed.
    pub async fn ensure_tenant(&self, name: &str) -> Result<TenantId> {
        write_resolving(
            || self.ensure_tenant_once(name),
            async || self.ensure_tenant_once(name).await.map(Some),
        )
        .await
    }

    async fn ensure_tenant_once(&self, name: &str) -> Result<TenantId> {
        let mut tx = self.db.begin().await?;
        tx.run(
            "insert into tenant (id, name, created_ms) select $1, $2, ms from clock where true on conflict (name) do nothing",
            args![TenantId::new(), name],
        )
        .await?;
        let row = tx.row("select id from tenant where name = $1", args![name]).await?;
        tx.commit().await?;
        row.expect("created now or before").parsed("id")
    }

    /// All tenants, oldest first.
    pub async fn tenants(&self) -> Result<Vec<Tenant>> {
        let rows = self.db.read(concat!(tenant_select!(), " order by id"), &[]).await?;
        rows.iter().map(tenant).collect()
    }

    /// The tenant of that name.
    pub async fn tenant_named(&self, name: &str) -> Result<Option<Tenant>> {
        let row = self.db.row(concat!(tenant_select!(), " where name = $1"), args![name]).await?;
        row.as_ref().map(tenant).transpose()
    }

    /// When a tenant was created, in milliseconds by the database's clock; none if it does not exist. The tenant of a
    /// server without keys keeps its id when it is erased, and is created again then: see
    /// [`Origin::tenant_created_ms`](super::Origin).
    pub async fn tenant_created_ms(&self, id: TenantId) -> Result<Option<i64>> {
        let row = self.db.row("select created_ms from tenant where id = $1", args![id]).await?;
        row.map(|row| row.int("created_ms")).transpose()
    }

    /// Numbers of a tenant's keys and jobs.
    pub async fn holdings(&self, id: TenantId) -> Result<Holdings> {
        let select = "select \
            (select count(*) from api_key where tenant = $1 and revoked_ms is null and (expires_ms is null or expires_ms > ms)) \
                as live_keys, \
            (select count(*) from job where tenant = $1 and state = 'queued') as queued, \
            (select count(*) from job where tenant = $1 and state = 'running') as running, \
            (select count(*) from job where tenant = $1) as jobs from clock";
        let row = self.db.row(select, args![id]).await?;
        let number =
            |column: &str| row.as_ref().map_or(Ok(0), |row| row.int(column)).map(|n| n.max(0) as u64);
        Ok(Holdings {
            keys: number("live_keys")?,
            queued: number("queued")?,
            running: number("running")?,
            jobs: number("jobs")?,
        })
    }

    /// Enables or disables a tenant. Whether that was done: a tenant that is being deleted stays so.
    pub async fn enable_tenant(&self, id: TenantId, enabled: bool) -> Result<bool> {
        let state = if enabled { TenantState::Active } else { TenantState::Disabled };
        let update = "update tenant set state = $2 where id = $1 and state <> 'deleting'";
        let mut tx = self.db.begin().await?;
        let done = tx.run(update, args![id, state.as_str()]).await? > 0;
        tx.notify().await?;
        tx.commit().await?;
        self.notifier.notify();
        Ok(done)
    }

    /// Marks a tenant as deleted, and removes its keys: from now on it can do nothing. It is erased in steps:
    /// [`Store::delete_jobs_of`] until there are none, each erased like any deleted job; then its objects; then
    /// [`Store::remove_tenant`].
    pub async fn delete_tenant(&self, id: TenantId) -> Result<()> {
        let mut tx = self.db.begin().await?;
        // A submission locks the tenant's row, so that none is accepted after this.
        tx.run("update tenant set state = 'deleting' where id = $1", args![id]).await?;
        tx.run("delete from api_key where tenant = $1", args![id]).await?;
        tx.commit().await
    }

    /// Deleted tenants that are not erased yet.
    pub async fn deleting_tenants(&self) -> Result<Vec<TenantId>> {
        let rows = self.db.read("select id from tenant where state = 'deleting'", &[]).await?;
        rows.iter().map(|row| row.parsed("id")).collect()
    }

    /// Deletes up to `limit` more jobs of a deleted tenant, as its owner would; how many.
    pub async fn delete_jobs_of(&self, id: TenantId, limit: u32) -> Result<u64> {
        let update = concat!(
            "update job set deleting = 1, ",
            cancel_columns!(),
            " where id in (select id from job where tenant = $1 and deleting = 0 limit $2) and exists \
             (select 1 from tenant where id = $1 and state = 'deleting')"
        );
        let mut tx = self.db.begin().await?;
        let deleted = tx.run(update, args![id, i64::from(limit)]).await?;
        if deleted > 0 {
            tx.notify().await?;
        }
        tx.commit().await?;
        self.notifier.notify();
        Ok(deleted)
    }

    /// The last step of a tenant's deletion: removes its rows if it has no jobs left. Whether they were removed. The
    /// tenant of a server without keys stays, empty.
    pub async fn remove_tenant(&self, id: TenantId) -> Result<bool> {
        let mut tx = self.db.begin().await?;
        let erasable = "select 1 from tenant where id = $1 and state = 'deleting' \
                        and not exists (select 1 from job where tenant = $1)";
        if tx.row(erasable, args![id]).await?.is_none() {
            return Ok(false);
        }
        for delete in [
            "delete from class_image where tenant = $1",
            "delete from idempotency where tenant = $1",
            "delete from api_key where tenant = $1",
            "delete from pause where tenant = $1",
            "delete from device_time where tenant = $1",
        ] {
            tx.run(delete, args![id]).await?;
        }
        let last = if id == TenantId::LOCAL {
            // Later than before, even if the clock was set back.
            "update tenant set state = 'active', \
             created_ms = (select case when ms > created_ms then ms else created_ms + 1 end from clock) where id = $1"
        } else {
            "delete from tenant where id = $1"
        };
        tx.run(last, args![id]).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Bytes of a tenant's artifacts and class images, without photos and checkpoints.
    pub async fn bytes_of(&self, id: TenantId) -> Result<u64> {
        let select = "select cast(coalesce((select sum(artifact.size) from artifact join job on job.id = artifact.job \
                      where tenant = $1), 0) + coalesce((select sum(size) from class_image where tenant = $1), 0) as bigint) as bytes";
        let row = self.db.row(select, args![id]).await?;
        Ok(row.map_or(Ok(0), |row| row.int("bytes"))?.max(0) as u64)
    }

    /// All class images of a tenant.
    pub async fn class_images_of(&self, id: TenantId) -> Result<Vec<Object>> {
        let sql = "select name, key, size, sha256, content_type, meta from class_image \
                   where tenant = $1 order by settings, seed";
        self.db.read(sql, args![id]).await?.iter().map(object).collect()
    }
}

fn tenant(row: &Row) -> Result<Tenant> {
    Ok(Tenant {
        id: row.parsed("id")?,
        name: row.text("name")?.to_owned(),
        created_ms: row.int("created_ms")?,
        state: row.parsed("state")?,
        weight: row.int("weight")? as u32,
    })
}

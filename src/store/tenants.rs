//! Tenants as an operator sees them: who they are, whether they are served, and how one is erased.

use super::api::end;
use super::db::{Row, args};
use super::objects::object;
use super::settle::settle;
use super::{Result, Store};
use crate::job::{Object, TenantId, words};

words!(
    /// Whether a tenant is served.
    TenantState {
        /// It is.
        Active = "active",
        /// Its keys open nothing, and what waits is not claimed. What runs goes on to its end.
        Disabled = "disabled",
        /// It is being erased, with all that it has. There is no way back.
        Deleting = "deleting",
    }
);

/// Whose things there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Its id.
    pub id: TenantId,
    /// What the operator calls it.
    pub name: String,
    /// When it was made.
    pub created_ms: i64,
    /// Whether it is served.
    pub state: TenantState,
    /// Its share of the devices beside others that wait.
    pub weight: u32,
}

/// How much a tenant has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Keys that open something.
    pub keys: u64,
    /// Jobs that wait.
    pub queued: u64,
    /// Jobs that run.
    pub running: u64,
    /// Jobs in whatever state, those being erased too.
    pub jobs: u64,
}

macro_rules! tenant_select {
    () => {
        "select id, name, created_ms, state, weight from tenant"
    };
}

impl Store {
    /// The tenant of that name, made if there is none.
    pub async fn ensure_tenant(&self, name: &str) -> Result<TenantId> {
        settle(|| self.ensure_tenant_once(name), async || self.ensure_tenant_once(name).await.map(Some)).await
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
        row.expect("made or there before").word("id")
    }

    /// Every tenant, the oldest first.
    pub async fn tenants(&self) -> Result<Vec<Tenant>> {
        let rows = self.db.read(concat!(tenant_select!(), " order by id"), &[]).await?;
        rows.iter().map(tenant).collect()
    }

    /// The tenant of that name.
    pub async fn tenant_named(&self, name: &str) -> Result<Option<Tenant>> {
        let row = self.db.row(concat!(tenant_select!(), " where name = $1"), args![name]).await?;
        row.as_ref().map(tenant).transpose()
    }

    /// When a tenant was made, in milliseconds by the database's clock; none if it is not there. The one of a server without
    /// keys, which is erased and goes on under its id, is made again then: see [`Origin::tenant_made_ms`](super::Origin).
    pub async fn tenant_made_ms(&self, id: TenantId) -> Result<Option<i64>> {
        let row = self.db.row("select created_ms from tenant where id = $1", args![id]).await?;
        row.map(|row| row.int("created_ms")).transpose()
    }

    /// How much a tenant has.
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

    /// Serves a tenant again, or serves it no more. Whether it is so now: one that is being deleted stays that.
    pub async fn serve_tenant(&self, id: TenantId, served: bool) -> Result<bool> {
        let state = if served { TenantState::Active } else { TenantState::Disabled };
        let update = "update tenant set state = $2 where id = $1 and state <> 'deleting'";
        let mut tx = self.db.begin().await?;
        let done = tx.run(update, args![id, state.as_str()]).await? > 0;
        tx.notify().await?;
        tx.commit().await?;
        self.wakes.wake();
        Ok(done)
    }

    /// Marks a tenant as one to be erased, and takes its keys away. From now on it can do nothing. What it has goes in
    /// pieces: [`Store::delete_jobs_of`] until there are none, each erased as any deleted job; then its objects; then
    /// [`Store::forget_tenant`].
    pub async fn delete_tenant(&self, id: TenantId) -> Result<()> {
        let mut tx = self.db.begin().await?;
        // Whoever submits a job holds the tenant's row, so that none is accepted after this.
        tx.run("update tenant set state = 'deleting' where id = $1", args![id]).await?;
        tx.run("delete from api_key where tenant = $1", args![id]).await?;
        tx.commit().await
    }

    /// Tenants that are to be erased.
    pub async fn deleting_tenants(&self) -> Result<Vec<TenantId>> {
        let rows = self.db.read("select id from tenant where state = 'deleting'", &[]).await?;
        rows.iter().map(|row| row.word("id")).collect()
    }

    /// Deletes up to `limit` more jobs of a tenant that is to be erased, as its owner would. How many.
    pub async fn delete_jobs_of(&self, id: TenantId, limit: u32) -> Result<u64> {
        let update = concat!(
            "update job set deleting = 1, ",
            end!(),
            " where id in (select id from job where tenant = $1 and deleting = 0 limit $2) and exists \
             (select 1 from tenant where id = $1 and state = 'deleting')"
        );
        let mut tx = self.db.begin().await?;
        let deleted = tx.run(update, args![id, i64::from(limit)]).await?;
        if deleted > 0 {
            tx.notify().await?;
        }
        tx.commit().await?;
        self.wakes.wake();
        Ok(deleted)
    }

    /// The last step of a tenant's deletion: its rows go, if no job of it is left. Whether they went. The tenant of a
    /// server without keys stays, with nothing.
    pub async fn forget_tenant(&self, id: TenantId) -> Result<bool> {
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
            // Later than before, whatever the clock says.
            "update tenant set state = 'active', \
             created_ms = (select case when ms > created_ms then ms else created_ms + 1 end from clock) where id = $1"
        } else {
            "delete from tenant where id = $1"
        };
        tx.run(last, args![id]).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Bytes of the artifacts and class images that a tenant's rows name; photos and checkpoints are not counted.
    pub async fn bytes_of(&self, id: TenantId) -> Result<u64> {
        let select = "select cast(coalesce((select sum(artifact.size) from artifact join job on job.id = artifact.job \
                      where tenant = $1), 0) + coalesce((select sum(size) from class_image where tenant = $1), 0) as bigint) as bytes";
        let row = self.db.row(select, args![id]).await?;
        Ok(row.map_or(Ok(0), |row| row.int("bytes"))?.max(0) as u64)
    }

    /// Every class image of a tenant.
    pub async fn class_images_of(&self, id: TenantId) -> Result<Vec<Object>> {
        let sql = "select name, key, size, sha256, content_type, meta from class_image \
                   where tenant = $1 order by settings, seed";
        self.db.read(sql, args![id]).await?.iter().map(object).collect()
    }
}

fn tenant(row: &Row) -> Result<Tenant> {
    Ok(Tenant {
        id: row.word("id")?,
        name: row.text("name")?.to_owned(),
        created_ms: row.int("created_ms")?,
        state: row.word("state")?,
        weight: row.int("weight")? as u32,
    })
}

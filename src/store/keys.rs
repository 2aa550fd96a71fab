//! API keys. A key's secret is never stored, only its public id and a hash.

use super::db::{Row, args, locking};
use super::error::Result;
use super::handle::Store;
use super::in_doubt::write_resolving;
use super::tenants::TenantState;
use crate::job::{TenantId, string_enum};

string_enum!(
    /// What a key may do.
    Scope {
        /// Look.
        Read = "read",
        /// Look, submit, cancel and delete.
        Write = "write",
        /// The same, and see what concerns all tenants: the server's metrics.
        Admin = "admin",
    }
);

impl Scope {
    /// Whether a key of this scope may do what `wanted` may.
    pub fn covers(self, wanted: Self) -> bool {
        self as u8 >= wanted as u8
    }
}

/// A key to create.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// Its public part.
    pub id: String,
    /// Its tenant.
    pub tenant: TenantId,
    /// Its name, given by the operator.
    pub name: String,
    /// SHA-256 of the secret, lower-case hexadecimal.
    pub hash: String,
    /// What it may do.
    pub scope: Scope,
    /// When it expires, in milliseconds since 1970; never if none.
    pub expires_ms: Option<i64>,
}

/// A stored key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its public part.
    pub id: String,
    /// Its tenant.
    pub tenant: TenantId,
    /// Its name, given by the operator.
    pub name: String,
    /// SHA-256 of the secret, lower-case hexadecimal.
    pub hash: String,
    /// What it may do.
    pub scope: Scope,
    /// When it was created.
    pub created_ms: i64,
    /// When it expires; never if none.
    pub expires_ms: Option<i64>,
    /// When it was revoked.
    pub revoked_ms: Option<i64>,
    /// Time to its expiry when it was read, in milliseconds by the database's clock; none if it never expires.
    pub left_ms: Option<i64>,
    /// Whether it was neither revoked nor expired when it was read, by the database's clock.
    pub live: bool,
    /// State of its tenant when it was read.
    pub tenant_state: TenantState,
}

macro_rules! key_select {
    () => {
        "select id, tenant, name, hash, scope, created_ms, expires_ms, revoked_ms, \
         expires_ms - ms as left_ms, \
         (select state from tenant where tenant.id = api_key.tenant) as tenant_state, \
         cast(case when revoked_ms is null and (expires_ms is null or expires_ms > ms) then 1 else 0 end as bigint) as live \
         from api_key cross join clock"
    };
}

impl Store {
    /// Creates a key. Its tenant must exist, and its id must be new.
    pub async fn create_key(&self, key: &NewKey) -> Result<()> {
        let insert = "insert into api_key (id, tenant, name, hash, scope, expires_ms, created_ms) \
                      select $1, $2, $3, $4, $5, $6, ms from clock";
        let NewKey { id, tenant, name, hash, scope, expires_ms } = key;
        let values = args![id.as_str(), *tenant, name.as_str(), hash.as_str(), scope.as_str(), *expires_ms];
        write_resolving(async || self.db.write(insert, values).await.map(drop), || self.find_created(key))
            .await
    }

    /// Looks up a key whose commit was not answered. Until that is resolved it holds its tenant's row, like every row
    /// with a foreign key.
    async fn find_created(&self, key: &NewKey) -> Result<Option<()>> {
        let tenant = locking!("select id from tenant where id = $1"; "for update");
        let mut tx = self.db.begin().await?;
        tx.row(tenant, args![key.tenant]).await?;
        let select = "select id from api_key where id = $1 and hash = $2";
        let row = tx.row(select, args![key.id.as_str(), key.hash.as_str()]).await?;
        tx.end_locking_read().await?;
        Ok(row.map(drop))
    }

    /// The key with that public part, live or not.
    pub async fn find_key(&self, id: &str) -> Result<Option<Key>> {
        let row = self.db.row(concat!(key_select!(), " where id = $1"), args![id]).await?;
        row.as_ref().map(key).transpose()
    }

    /// All keys, live or not, by tenant.
    pub async fn list_keys(&self) -> Result<Vec<Key>> {
        let rows = self.db.read(concat!(key_select!(), " order by tenant, created_ms, id"), &[]).await?;
        rows.iter().map(key).collect()
    }

    /// Revokes a key. Whether there was a live one.
    pub async fn revoke_key(&self, id: &str) -> Result<bool> {
        let revoke = async || {
            let update =
                "update api_key set revoked_ms = (select ms from clock) where id = $1 and revoked_ms is null";
            Ok(self.db.write(update, args![id]).await? > 0)
        };
        // When repeated, none is left that could be revoked.
        write_resolving(revoke, async || revoke().await.map(|_| Some(true))).await
    }
}

fn key(row: &Row) -> Result<Key> {
    Ok(Key {
        id: row.text("id")?.to_owned(),
        tenant: row.parsed("tenant")?,
        name: row.text("name")?.to_owned(),
        hash: row.text("hash")?.to_owned(),
        scope: row.parsed("scope")?,
        created_ms: row.int("created_ms")?,
        expires_ms: row.int_or_none("expires_ms")?,
        revoked_ms: row.int_or_none("revoked_ms")?,
        left_ms: row.int_or_none("left_ms")?,
        live: row.flag("live")?,
        tenant_state: row.parsed("tenant_state")?,
    })
}

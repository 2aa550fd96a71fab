-- Keys of operators, who may see what concerns all tenants. The same as migrations/postgres/0005_admin_keys.sql.
--
-- SQLite changes no constraint in place: the table is made anew with its rows. Nothing refers to it.
create table api_key_with_admins (
    id text not null primary key,                   -- the public part of the key
    tenant text not null references tenant (id),
    name text not null,                             -- what the operator calls it
    hash text not null,                             -- SHA-256 of the secret, lower-case hexadecimal
    scope text not null check (scope in ('read', 'write', 'admin')),
    created_ms integer not null,
    expires_ms integer,                             -- null: never
    revoked_ms integer                              -- null: not revoked
) strict;

insert into api_key_with_admins (id, tenant, name, hash, scope, created_ms, expires_ms, revoked_ms)
select id, tenant, name, hash, scope, created_ms, expires_ms, revoked_ms from api_key;

drop table api_key;
alter table api_key_with_admins rename to api_key;

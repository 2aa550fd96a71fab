-- For whoever runs the service: tenants that are not served, claims that are held back, and where a job came from.
-- The same as migrations/sqlite/0006_operators.sql, column for column.

-- Whether a tenant is served. Of one that is not, no key opens the door, nothing is accepted and nothing is claimed.
alter table tenant add column state text not null default 'active'
    check (state in ('active', 'disabled', 'deleting'));

alter table job add column retry_of text collate "C"; -- the job that this one does again, which may be gone by now
alter table job add column trace text;                -- W3C traceparent of the request that asked for it

create index job_retried on job (retry_of) where retry_of is not null;

-- What an operator holds back: nobody claims it until the row is gone.
create table pause (
    tenant text collate "C" references tenant (id) on delete cascade, -- null: every tenant
    kind text check (kind in ('train', 'sample')),  -- null: both kinds
    reason text not null,                           -- what the operator said, for other operators
    created_ms bigint not null
);

create unique index pause_once on pause (coalesce(tenant, ''), coalesce(kind, ''));

-- Of which tenant nothing of which kind is claimed.
create view held_back (tenant, kind) as
select tenant.id, kinds.kind
from tenant cross join (select 'train' as kind union all select 'sample') kinds
where tenant.state <> 'active' or exists (
    select 1 from pause
    where (pause.tenant is null or pause.tenant = tenant.id) and (pause.kind is null or pause.kind = kinds.kind)
);

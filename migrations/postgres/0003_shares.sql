-- How tenants share the devices, and which machines failed under a job. The same as migrations/sqlite/0003_shares.sql,
-- column for column.

-- Its share of the devices beside others that wait: twice the weight, twice the device time.
alter table tenant add column weight bigint not null default 1 check (weight between 1 and 1000);

-- Device time by tenant. A turn is virtual time: microseconds of device time, divided by the tenant's weight. Whoever's
-- turn is earliest is served next. Locked after every other row of a transaction.
create table device_time (
    tenant text collate "C" not null primary key references tenant (id) on delete cascade,
    turn bigint not null,                          -- when its next job's turn is
    begun bigint not null,                         -- when the turn of its last job that ended was
    train_ms bigint,                               -- device time that its trainings take, the later ones counting more
    sample_ms bigint                               -- the same of its samples
);

create index device_time_begun on device_time (begun);

alter table job add column turn bigint;                                -- its tenant's turn when it was last claimed
alter table job add column used_ms bigint not null default 0;          -- device time of the last attempt
alter table job add column fault_hosts text not null default '[]';      -- machines that failed under it: JSON

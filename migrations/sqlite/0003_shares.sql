-- How tenants share the devices, and which machines failed under a job. The same as migrations/postgres/0003_shares.sql,
-- column for column.

-- Its share of the devices beside others that wait: twice the weight, twice the device time.
alter table tenant add column weight integer not null default 1 check (weight between 1 and 1000);

-- Device time by tenant. A turn is virtual time: microseconds of device time, divided by the tenant's weight. Whoever's
-- turn is earliest is served next. Locked after every other row of a transaction.
create table device_time (
    tenant text not null primary key references tenant (id) on delete cascade,
    turn integer not null,                          -- when its next job's turn is
    begun integer not null,                         -- when the turn of its last job that ended was
    train_ms integer,                               -- device time that its trainings take, the later ones counting more
    sample_ms integer                               -- the same of its samples
) strict;

create index device_time_begun on device_time (begun);

alter table job add column turn integer;                                -- its tenant's turn when it was last claimed
alter table job add column used_ms integer not null default 0;          -- device time of the last attempt
alter table job add column fault_hosts text not null default '[]';      -- machines that failed under it: JSON

-- The models that workers hold, and which of them a job needs. The same as migrations/postgres/0008_models.sql, column for
-- column.

-- Every model that a worker has ever registered.
create table model (
    sha256 text not null primary key,               -- of its files, lower-case hexadecimal
    name text not null,                             -- what people call it
    card text not null,                             -- what it can do, and which options suit it: JSON
    words text not null,                            -- words that are one token of its vocabulary, with spaces between
    registered_ms integer not null                  -- when a worker registered it last
) strict;

-- The devices of running workers, and what each holds.
create table model_worker (
    worker text not null primary key,               -- a UUID made at its start, as in job.worker
    model text not null references model (sha256) on delete cascade,
    device text not null,                           -- cpu, cuda:0
    memory_bytes integer,                           -- the device's own; null: the machine's
    until_ms integer not null                       -- from then on it counts as gone, unless it says again that it is there
) strict;

create index model_worker_model on model_worker (model);

-- The model that a worker must hold to claim the job: its SHA-256, or its name if no worker had registered it; null: any.
alter table job add column model text;

drop index job_waiting;
create index job_waiting on job (kind, tenant, priority desc, id, not_before_ms, model) where state = 'queued';

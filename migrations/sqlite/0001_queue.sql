-- Everything Hypnos remembers. The same tables as migrations/postgres/0001_queue.sql, column for column.
--
-- In both databases: ids are UUIDs as text, documents are JSON as text, booleans are 0 and 1, and times are whole
-- milliseconds since 1970 by the database's own clock, which is the only one that leases are measured by.

-- What time it is. A view, so that every statement can say `clock` in either database.
create view clock (ms) as
select cast(round(unixepoch('subsec') * 1000) as integer);

-- Whose things there are.
create table tenant (
    id text not null primary key,
    name text not null unique,                      -- what the operator calls it
    created_ms integer not null
) strict;

-- A server without keys has one tenant.
insert into tenant (id, name, created_ms)
select '00000000-0000-0000-0000-000000000000', 'local', ms from clock;

-- What opens the door. The secret itself is never here.
create table api_key (
    id text not null primary key,                   -- the public part of the key
    tenant text not null references tenant (id),
    name text not null,                             -- what the operator calls it
    hash text not null,                             -- SHA-256 of the secret, lower-case hexadecimal
    scope text not null check (scope in ('read', 'write')),
    created_ms integer not null,
    expires_ms integer,                             -- null: never
    revoked_ms integer                              -- null: not revoked
) strict;

-- The queue: trainings and samples.
create table job (
    id text not null primary key,                   -- UUID version 7: sorts by the time it was asked for
    tenant text not null references tenant (id),
    kind text not null check (kind in ('train', 'sample')),
    parent text references job (id),                -- the training that a sample draws with
    class_name text,                                -- a training's, to be listed by
    spec text not null,                             -- what to do, complete: JSON
    photos text not null,                           -- a training's photos, in order: JSON array of objects in the bucket
    priority integer not null,                      -- which of one tenant's own goes first: the larger
    state text not null default 'queued'
        check (state in ('queued', 'running', 'succeeded', 'failed', 'canceled')),
    deleting integer not null default 0 check (deleting in (0, 1)), -- no reader sees it; its objects go, then the row
    run_lease integer not null default 0,           -- claims so far; every write of a worker names it
    worker text,                                    -- who holds the lease: a UUID made at its start, for operators only
    lease_until_ms integer,                         -- from then on anybody may take the job away
    deadline_ms integer,                            -- the same, however alive its worker looks
    attempt integer not null default 0,             -- claims that count: not those given back on purpose
    max_attempts integer not null check (max_attempts > 0),
    rescues integer not null default 0,             -- how often it was taken from a worker, for operators only
    not_before_ms integer not null,                 -- nobody claims it earlier
    claimed_ms integer,                             -- when it was last claimed: whose turn is next
    cancel_requested integer not null default 0 check (cancel_requested in (0, 1)),
    checkpoint text,                                -- where a further attempt goes on from: JSON
    progress text,                                  -- how far it is: JSON
    result text,                                    -- facts about what came out: JSON
    error text,                                     -- why it failed: JSON
    version integer not null default 1,             -- changes whenever a client could see a change
    created_ms integer not null,
    started_ms integer,                             -- when it was first claimed
    finished_ms integer,                            -- when it reached its last state

    check (attempt between 0 and max_attempts),
    check (state <> 'queued' or attempt < max_attempts),
    check ((parent is not null) = (kind = 'sample')),
    check ((class_name is not null) = (kind = 'train')),
    check ((state = 'running') = (worker is not null)),
    check ((state = 'running') = (lease_until_ms is not null)),
    check ((state = 'running') = (deadline_ms is not null)),
    check ((state in ('succeeded', 'failed', 'canceled')) = (finished_ms is not null)),
    check ((state = 'succeeded') = (result is not null)),
    check ((state = 'failed') = (error is not null)),
    check (state = 'running' or (state = 'canceled') = (cancel_requested = 1)),
    check (deleting = 0 or state <> 'queued')
) strict;

create index job_waiting on job (kind, tenant, priority desc, id, not_before_ms) where state = 'queued';
create index job_running on job (tenant) where state = 'running';
create index job_served on job (tenant, claimed_ms);
create index job_listed on job (tenant, id);
create index job_listed_by_state on job (tenant, state, id);
create index job_drawn_with on job (parent, tenant, id);
create index job_deleting on job (id) where deleting = 1;
create index job_spent on job (id) where checkpoint is not null and finished_ms is not null;

-- What a job has to show: an object in the bucket by each name.
create table artifact (
    job text not null references job (id) on delete cascade,
    name text not null,
    key text not null,                              -- where it lies
    size integer not null,                          -- bytes
    sha256 text not null,                           -- lower-case hexadecimal
    content_type text not null,
    meta text not null,                             -- what else there is to know: JSON
    primary key (job, name)
) strict;

-- Class images, which later jobs of the tenant share.
create table class_image (
    tenant text not null references tenant (id),
    settings text not null,                         -- hash of all that decides what they show, but for the seed
    seed integer not null,
    name text not null,
    key text not null,
    size integer not null,
    sha256 text not null,
    content_type text not null,
    meta text not null,
    primary key (tenant, settings, seed)
) strict;

-- Requests that were accepted, for a day, so that one sent twice is one job.
create table idempotency (
    tenant text not null references tenant (id),
    key text not null,                              -- the client's
    request_hash text not null,                     -- what was asked for
    job text not null references job (id) on delete cascade,
    created_ms integer not null,
    primary key (tenant, key)
) strict;

create index idempotency_age on idempotency (tenant, created_ms);
create index idempotency_job on idempotency (job);

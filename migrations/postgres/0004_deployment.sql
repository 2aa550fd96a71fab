-- Which database and which object store belong together. The same as migrations/sqlite/0004_deployment.sql, column for
-- column.

-- One row at most. The object store has the same id, and the time, in an object of its own.
create table deployment (
    one bigint not null primary key check (one = 1),
    id text not null,                               -- random
    seen_ms bigint not null,                        -- when the two were last seen together. The object store's is never
                                                    -- later, unless this database was restored from a backup
    restored_from_ms bigint,                       -- objects written from then on,
    restored_until_ms bigint,                      -- until then may belong to rows that a restored backup does not have
    check ((restored_from_ms is null) = (restored_until_ms is null))
);

-- Which of the weights on a worker's disk are still somebody's.
create index artifact_weights on artifact (sha256) where name = 'weights.safetensors';

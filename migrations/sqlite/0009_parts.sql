-- Workers that hold one model may have different optional parts of it. The same as migrations/postgres/0009_parts.sql, column
-- for column. Each column is a sum of 1 (segmenter), 2 (perceptual) and 4 (metrics).

-- The parts that any worker so far had; 0 if only earlier versions registered the model: its card has them then.
alter table model add column parts integer not null default 0;

-- The parts that this worker does not have.
alter table model_worker add column lacks integer not null default 0;

-- The parts that a worker must have to claim the job.
alter table job add column needs integer not null default 0;

drop index job_waiting;
create index job_waiting on job (kind, tenant, priority desc, id, not_before_ms, model, needs) where state = 'queued';

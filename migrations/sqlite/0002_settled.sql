-- Writes whose outcome is unknown, and leases that no wall clock takes away. The same as migrations/postgres/0002_settled.sql,
-- column for column.

-- The claim that its own worker ended or gave back, rather than one that was taken from it: a worker whose answer was
-- lost says it again, and sees that it was done.
alter table job add column ended_lease integer;

-- In a SQLite file a lease is measured by the time since its machine was started, which nobody sets: the start's id, and the
-- two times in milliseconds since then. After another start the lease is over. Null in Postgres, whose clock all processes
-- share, and in rows that the build before claimed: there the wall clock's lease_until_ms and deadline_ms hold.
alter table job add column boot text;
alter table job add column lease_until_boot_ms integer;
alter table job add column deadline_boot_ms integer;

-- In a SQLite file whoever has found out what became of a write says so here: its commit writes over what a commit that failed
-- may have left in the log, which a crash would else bring to life. One row; nobody reads it.
create table settled (
    looks integer not null
) strict;

insert into settled (looks) values (0);

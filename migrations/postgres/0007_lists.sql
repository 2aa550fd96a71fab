-- Lists that take no longer however many jobs there are: few trainings among many samples, or of one class among many. The
-- same as migrations/sqlite/0007_lists.sql.

create index job_listed_by_kind on job (tenant, kind, id);
create index job_listed_by_class on job (tenant, kind, class_name, id) where class_name is not null;

drop index job_listed_by_state;
create index job_listed_by_state on job (tenant, state, kind, id);

-- Whose turn it is no longer depends on when a tenant was served.
drop index job_served;

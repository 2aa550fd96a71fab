-- Keys of operators, who may see what concerns all tenants. The same as migrations/sqlite/0005_admin_keys.sql.
alter table api_key drop constraint api_key_scope_check;
alter table api_key add constraint api_key_scope_check check (scope in ('read', 'write', 'admin'));

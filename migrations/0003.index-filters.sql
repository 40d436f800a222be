-- depends: 0001.create-logs
-- transactional: false
-- A filtered window costs what its records cost, not what the table holds. Built beside running inserts
-- (CONCURRENTLY), so a large table can be upgraded while it is in use; a build that was killed half-way leaves an
-- invalid index behind, hence the DROP first.

DROP INDEX CONCURRENTLY IF EXISTS logs_method_created_idx;
CREATE INDEX CONCURRENTLY logs_method_created_idx ON logs (method, created);
DROP INDEX CONCURRENTLY IF EXISTS logs_status_code_created_idx;
CREATE INDEX CONCURRENTLY logs_status_code_created_idx ON logs (status_code, created);
DROP INDEX CONCURRENTLY IF EXISTS logs_ip_created_idx;
CREATE INDEX CONCURRENTLY logs_ip_created_idx ON logs (ip, created);

-- Nothing is lost. As in 0003: built beside running inserts, and anew if a build was killed half-way.
DROP INDEX CONCURRENTLY IF EXISTS logs_method_created_idx;
CREATE INDEX CONCURRENTLY logs_method_created_idx ON logs (method, created);
DROP INDEX CONCURRENTLY IF EXISTS logs_status_code_created_idx;
CREATE INDEX CONCURRENTLY logs_status_code_created_idx ON logs (status_code, created);
DROP INDEX CONCURRENTLY IF EXISTS logs_ip_created_idx;
CREATE INDEX CONCURRENTLY logs_ip_created_idx ON logs (ip, created);

-- depends: 0006.validate-created
-- transactional: false
-- Two indexes through which a window with one filter costs what its records cost, whatever the values and however they
-- are distributed, and a third for what is rare (bench/NOTES.md has what was measured):
--   * logs_kind_created_idx holds method and status together: kind = method_number - status_code. The rows of a status
--     are in 8 ranges of it, those of a usual method in as many as it has statuses, those of both in one; read_part_v1
--     merges the ranges. GET 200 is last: most lines are that, and an index's end costs less to append to.
--   * All other methods have the number 0. logs_other_method_created_idx has their names: usually none or a few.
--   * logs_ip_number_created_idx has a number for each address, which is compared in less time than the address: one
--     of its own for IPv4, a hash for IPv6. Addresses that share a number are told apart when they are read.
-- NULLS FIRST, though nothing is NULL, for the plan's sake: rows in the order `created NULLS FIRST` can come from these
-- indexes only, and from each only for its own column's filter. With sorting switched off one plan is left.
-- Built beside running inserts (CONCURRENTLY); a build that was killed half-way leaves an invalid index behind, hence
-- the DROP first.

-- The indexes depend on these two functions: others would need other names, and new indexes.
CREATE OR REPLACE FUNCTION method_number(method text)
RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE method
           WHEN 'GET' THEN 7000
           WHEN 'POST' THEN 6000
           WHEN 'HEAD' THEN 5000
           WHEN 'PUT' THEN 4000
           WHEN 'DELETE' THEN 3000
           WHEN 'OPTIONS' THEN 2000
           WHEN 'PATCH' THEN 1000
           ELSE 0
       END;

CREATE OR REPLACE FUNCTION ip_number(ip inet)
RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE family(ip) WHEN 4 THEN ip - '0.0.0.0'::inet ELSE hashinetextended(ip, 0) END;

DROP INDEX CONCURRENTLY IF EXISTS logs_kind_created_idx;
CREATE INDEX CONCURRENTLY logs_kind_created_idx
    ON logs ((method_number(method) - status_code), created NULLS FIRST) WITH (deduplicate_items = off);
DROP INDEX CONCURRENTLY IF EXISTS logs_other_method_created_idx;
CREATE INDEX CONCURRENTLY logs_other_method_created_idx
    ON logs (method COLLATE "C", created NULLS FIRST) WITH (deduplicate_items = off) WHERE method_number(method) = 0;
DROP INDEX CONCURRENTLY IF EXISTS logs_ip_number_created_idx;
CREATE INDEX CONCURRENTLY logs_ip_number_created_idx
    ON logs (ip_number(ip), created NULLS FIRST) WITH (deduplicate_items = off);

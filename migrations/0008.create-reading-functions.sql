-- depends: 0007.index-for-reading
-- What every GET reads through. What reading needs of a session stands in SET clauses, as poolers share sessions.
-- The planner's switches leave one plan: an index gives the order that is asked for, nothing is sorted. So the cost
-- does not depend on statistics, which a table that was just filled or restored does not have, or has wrong.

-- Where a window that was asked for really ends: at the newest record + 1 µs at most, below which nothing will ever be
-- added (see 0004), and not before its own start. `date_to` NULL: until now.
CREATE OR REPLACE FUNCTION window_end_v1(date_from timestamptz, date_to timestamptz)
RETURNS timestamptz LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET jit = off
AS $window_end_v1$
BEGIN
    PERFORM refuse_recovery();
    RETURN least(date_to, greatest(date_from, (SELECT max(created) + interval '1 microsecond' FROM logs)));
END
$window_end_v1$;

-- How many seconds the newest `created` is ahead of the clock; 0 as a rule. For health checks: it fails where nothing
-- can be stored or read.
CREATE OR REPLACE FUNCTION seconds_ahead_v1()
RETURNS float8 LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET jit = off
AS $seconds_ahead_v1$
BEGIN
    PERFORM refuse_recovery();
    RETURN coalesce(greatest(0, extract(epoch FROM (SELECT max(created) FROM logs) - clock_timestamp())), 0);
END
$seconds_ahead_v1$;

-- The kinds (see 0007) in which all rows of a status or of a usual method are, or of both, and no other rows. Those of
-- a method are the ones that it has in the table, each found by one look behind the one before.
CREATE OR REPLACE FUNCTION kinds_v1(method text, status_code smallint)
RETURNS SETOF integer LANGUAGE plpgsql STABLE AS $kinds_v1$
DECLARE
    last CONSTANT integer := method_number(method);
    kind integer := last - 1000;
BEGIN
    IF method IS NULL THEN
        RETURN QUERY SELECT n * 1000 - status_code FROM generate_series(0, 7) AS n;
    ELSIF status_code IS NOT NULL THEN
        RETURN NEXT last - status_code;
    ELSE
        LOOP
            SELECT method_number(logs.method) - logs.status_code
              INTO kind
              FROM logs
             WHERE method_number(logs.method) - logs.status_code > kind
               AND method_number(logs.method) - logs.status_code < last
             ORDER BY method_number(logs.method) - logs.status_code
             LIMIT 1;
            EXIT WHEN NOT FOUND;
            RETURN NEXT kind;
        END LOOP;
    END IF;
END
$kinds_v1$;

-- The statement that gives the rows of a window in their order: through the address if there is one, else through a
-- rare method's name, else by merging the kinds that are in the window (to plan a kind costs 0.5 ms, to look for one
-- 0.02). Its parameters: $1 date_from, $2 date_to, $3 method, $5 ip.
CREATE OR REPLACE FUNCTION rows_of_window_v1(
    date_from timestamptz, date_to timestamptz, method text, status_code smallint, ip inet
)
RETURNS text LANGUAGE plpgsql STABLE AS $rows_of_window_v1$
DECLARE
    in_window CONSTANT text :=
        'SELECT id, created, ip, method, uri, status_code FROM logs WHERE created >= $1 AND created < $2';
    in_order CONSTANT text := ' ORDER BY created NULLS FIRST';
BEGIN
    IF ip IS NOT NULL THEN
        RETURN in_window || ' AND ip_number(ip) = ip_number($5)' || in_order;
    ELSIF method IS NOT NULL AND method_number(method) = 0 THEN
        RETURN in_window || ' AND method_number(method) = 0 AND method COLLATE "C" = $3' || in_order;
    ELSIF method IS NULL AND status_code IS NULL THEN
        RETURN in_window || ' ORDER BY created';
    END IF;
    RETURN format('SELECT id, created, ip, method, uri, status_code FROM (%s) AS merged', (
        SELECT coalesce(
                   string_agg(
                       format('(%s AND method_number(method) - status_code = %s%s)', in_window, kind, in_order),
                       ' UNION ALL '
                   ),
                   in_window || ' AND FALSE'
               )
          FROM kinds_v1(method, status_code) AS kind
         WHERE (SELECT TRUE
                  FROM logs
                 WHERE method_number(logs.method) - logs.status_code = kind
                   AND logs.created >= date_from
                   AND logs.created < date_to
                 ORDER BY logs.created NULLS FIRST
                 LIMIT 1)
    )) || in_order;
END
$rows_of_window_v1$;

-- The JSON of a record, for a session whose TimeZone is UTC: to_char(created AT TIME ZONE 'UTC', ...) would look the
-- zone up for each. A method is a token and has nothing to escape, a URI may. The planner inlines it.
CREATE OR REPLACE FUNCTION record_json_v1(
    id uuid, created timestamptz, ip inet, method text, uri text, status_code smallint
)
RETURNS text LANGUAGE sql STABLE PARALLEL SAFE
RETURN '{"id":"' || id
       || '","created":"' || to_char(created, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
       || '","log":{"ip":"' || host(ip)
       || '","method":"' || method
       || '","uri":' || to_json(uri)
       || ',"status_code":' || status_code
       || '}}';

-- The records of a window in their order, from its start: at most `max_rows`, and at most those that one statement may
-- look at. `next_from` is where the next part starts; once it is `date_to`, which is to come from window_end_v1, there is
-- no more. Filters may be NULL.
-- `part` is the JSON of the records, with `separator` between them, and `bytes` its length. Where that would be more
-- than `max_bytes`, fewer records are given, but one at least. `separator` NULL: they are only counted.
--
-- Why no row is passed by: if as many rows match as were wanted, the next part starts 1 µs after the last of them. If
-- fewer do, every row that was looked at has been judged. Those are either all of the window, or as many as may be
-- looked at: then the next part starts 1 µs after the last one.
-- A scan of a materialized WITH takes its rows one by one, as they are asked for, in their order: LIMIT ends it early.
-- RETURN QUERY, because a text of 1 MB would be copied four times more on its way through variables.
CREATE OR REPLACE FUNCTION read_part_v1(
    date_from timestamptz, date_to timestamptz, method text, status_code smallint, ip inet,
    max_rows integer, separator text, max_bytes integer
)
RETURNS TABLE (count bigint, next_from timestamptz, bytes bigint, part text)
LANGUAGE plpgsql STABLE ROWS 1
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET enable_incremental_sort = off
SET max_parallel_workers_per_gather = 0
SET jit = off
SET TimeZone = 'UTC'
SET plan_cache_mode = force_generic_plan
SET work_mem = '64MB'  -- else a part of more than 4 MB would go through a temporary file
AS $read_part_v1$
#variable_conflict use_column
DECLARE
    most_looked_at CONSTANT integer := 50000;  -- where each is elsewhere on a cold disk, at 0.1 ms: 5 s
    wanted integer := least(max_rows, most_looked_at);
    looked_at text := '';
    matching text := rows_of_window_v1(date_from, date_to, method, status_code, ip);
    end_of_look text := '$2';
    text_of_part CONSTANT text := CASE WHEN separator IS NULL THEN 'NULL::text' ELSE
        'string_agg(record_json_v1(id, created, ip, method, uri, status_code), $7)' END;
    unfiltered CONSTANT boolean := method IS NULL AND status_code IS NULL AND ip IS NULL;
BEGIN
    PERFORM refuse_recovery();
    IF ip IS NOT NULL OR (method IS NOT NULL AND method_number(method) = 0) THEN  -- not all of these rows match
        looked_at := format('WITH looked_at AS MATERIALIZED (%s LIMIT %s)', matching, most_looked_at);
        matching := $matching$
            SELECT id, created, ip, method, uri, status_code
              FROM looked_at
             WHERE ($3 IS NULL OR method = $3)
               AND ($4 IS NULL OR status_code = $4)
               AND ($5 IS NULL OR ip = $5)
        $matching$;
        end_of_look := format($end_of_look$
            (SELECT CASE WHEN count(*) = %s THEN max(created) + interval '1 microsecond' ELSE $2 END FROM looked_at)
        $end_of_look$, most_looked_at);
    END IF;
    LOOP
        IF unfiltered AND separator IS NOT NULL THEN  -- as below, but planned once for a session: 7 % of an export
            RETURN QUERY
            SELECT count,
                   CASE WHEN count = wanted THEN last + interval '1 microsecond' ELSE date_to END,
                   octet_length(part)::bigint,
                   part
              FROM (SELECT count(*) AS count, max(created) AS last,
                           string_agg(record_json_v1(id, created, ip, method, uri, status_code), separator) AS part
                      FROM (SELECT id, created, ip, method, uri, status_code
                              FROM logs
                             WHERE created >= date_from
                               AND created < date_to
                             ORDER BY created
                             LIMIT wanted) AS matching) AS made
             WHERE count < 2
                OR octet_length(part) <= max_bytes;
        ELSE
            RETURN QUERY EXECUTE format($statement$
                %s
                SELECT count,
                       CASE WHEN count = $6 THEN last + interval '1 microsecond' ELSE %s END,
                       octet_length(part)::bigint,
                       part
                  FROM (SELECT count(*) AS count, max(created) AS last, %s AS part
                          FROM (%s LIMIT $6) AS matching) AS made
                 WHERE count < 2
                    OR part IS NULL
                    OR octet_length(part) <= $8
            $statement$, looked_at, end_of_look, text_of_part, matching)
            USING date_from, date_to, method, status_code, ip, wanted, separator, max_bytes;
        END IF;
        EXIT WHEN FOUND;
        wanted := greatest(1, wanted / 4);
    END LOOP;
END
$read_part_v1$;

-- As read_part_v1, without the text: for finding where a window with a limit ends.
CREATE OR REPLACE FUNCTION count_part_v1(
    date_from timestamptz, date_to timestamptz, method text, status_code smallint, ip inet, max_rows integer,
    OUT count bigint, OUT next_from timestamptz
)
LANGUAGE sql STABLE AS $count_part_v1$
    SELECT part.count, part.next_from
      FROM read_part_v1(date_from, date_to, method, status_code, ip, max_rows, NULL, NULL) AS part
$count_part_v1$;

DO $search_path$
DECLARE
    own text := (SELECT relnamespace::regnamespace FROM pg_class WHERE oid = 'logs'::regclass);
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['window_end_v1', 'seconds_ahead_v1', 'read_part_v1', 'count_part_v1'] LOOP
        EXECUTE format('ALTER FUNCTION %I SET search_path = %s, pg_temp', name, own);
    END LOOP;
END
$search_path$;

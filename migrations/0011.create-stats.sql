-- depends: 0010.create-retention
-- What GET /api/stats reads through. Records are counted by minute, method and status once and for all, by backends in the
-- background; what is not counted yet, and what a window cuts off from a minute, is counted in `logs` as it is asked for.
--
-- Why the numbers are exact, for every snapshot, whatever has been counted so far:
--   1. What is counted is final: counting ends at the newest record that it sees, below which nothing will ever be added
--      (see 0004).
--   2. `counted_to` moves in the transaction that counts: a snapshot has both or neither, so each record before it is
--      counted once and none from it on. One session at a time: the lock is held until the commit can be seen, and the
--      statements after it have new snapshots. Under REPEATABLE READ, which keeps the old one, writing a `counted_to` that
--      was written meanwhile fails: nothing happens.
--   3. What retention has deleted lies before `kept_from`, in the minute of `kept_from` at the latest. Counts are used from
--      the next whole minute on; those before go in the transaction that moves `kept_from`.
--   4. Whoever else deletes or changes rows, or inserts some past the guard, makes all be counted anew (logs_recount).
--   5. A reply is one statement of STABLE functions, hence of one snapshot: `counted_to`, `kept_from`, counts and records
--      are of the same moment.
-- Storing pays nothing: nothing of this runs when a line is stored, no lock of this is one that storing takes.

CREATE TABLE IF NOT EXISTS minutes (
    minute      timestamptz      NOT NULL,
    method      text COLLATE "C" NOT NULL,
    status_code smallint         NOT NULL,
    count       bigint           NOT NULL,
    CONSTRAINT minutes_pkey PRIMARY KEY (minute, method, status_code)
);

-- One row. All records from `kept_from` on and before `counted_to` are counted in `minutes`, and no others of the minutes
-- that are read there. To have all counted anew: DELETE FROM logs WHERE FALSE.
CREATE TABLE IF NOT EXISTS counting (
    only_row   boolean     NOT NULL CONSTRAINT counting_pkey PRIMARY KEY CONSTRAINT counting_only_row CHECK (only_row),
    counted_to timestamptz NOT NULL
);

CREATE OR REPLACE FUNCTION counted_to_v1()
RETURNS timestamptz LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
AS $counted_to_v1$
BEGIN
    RETURN coalesce((SELECT counted_to FROM counting WHERE only_row), '-infinity');
END
$counted_to_v1$;

-- Whole minutes of UTC, in any session.
CREATE OR REPLACE FUNCTION minute_of(moment timestamptz)
RETURNS timestamptz LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN date_bin('1 minute', moment, '1970-01-01Z');

-- Counts at most `max_rows` records, the oldest first; `counted` is how many, NULL if another session is at it.
-- The commit does not wait for the disk or a standby: lost in a crash, the records are counted again.
CREATE OR REPLACE FUNCTION count_minutes_v1(max_rows integer, OUT counted bigint, OUT counted_to timestamptz)
LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET max_parallel_workers_per_gather = 0
SET jit = off
AS $count_minutes_v1$
DECLARE
    start timestamptz;
    last timestamptz;
BEGIN
    PERFORM refuse_recovery();
    LOCK TABLE logs IN ACCESS SHARE MODE;
    IF NOT pg_try_advisory_xact_lock(7021961410472345605) THEN
        RETURN;
    END IF;
    PERFORM set_config('synchronous_commit', 'off', TRUE);
    counted_to := counted_to_v1();
    start := greatest(counted_to, kept_from_v1());

      WITH step AS MATERIALIZED (
               SELECT created, method, status_code
                 FROM logs
                WHERE created >= start
                ORDER BY created
                LIMIT max_rows
           ), added AS (
               INSERT INTO minutes AS sums (minute, method, status_code, count)
               SELECT minute_of(created), method, status_code, count(*)
                 FROM step
                GROUP BY 1, 2, 3
                ORDER BY 1, 2, 3  -- as they are read
                   ON CONFLICT (minute, method, status_code) DO UPDATE SET count = sums.count + excluded.count
           )
    SELECT count(*), max(created)
      INTO counted, last
      FROM step;
    IF counted > 0 THEN
        counted_to := last + interval '1 microsecond';
        INSERT INTO counting (only_row, counted_to)
        VALUES (TRUE, count_minutes_v1.counted_to)
            ON CONFLICT (only_row) DO UPDATE SET counted_to = excluded.counted_to;
    END IF;
END
$count_minutes_v1$;

-- Counts are no longer true once rows of `logs` are deleted or changed by others than retention: all are counted anew.
-- Nobody waits in a circle: whoever takes this lock has locked the table before, and locks rows after it.
CREATE OR REPLACE FUNCTION forget_minutes()
RETURNS trigger LANGUAGE plpgsql AS $forget_minutes$
BEGIN
    IF TG_OP = 'DELETE' AND current_setting('log_pipeline.deleting', TRUE) = 'on' THEN
        RETURN NULL;
    END IF;
    PERFORM pg_advisory_xact_lock(7021961410472345605);
    INSERT INTO counting (only_row, counted_to)
    VALUES (TRUE, '-infinity')
        ON CONFLICT (only_row) DO UPDATE SET counted_to = excluded.counted_to;
    DELETE FROM minutes;
    RETURN NULL;
END
$forget_minutes$;

-- As in 0010, and the counts of minutes that begin before `kept_from` go too. In place, as a backend from before that
-- deletes has to do it as well. A step waits for one that counts, some ms: the counts that it deletes are all there are.
CREATE OR REPLACE FUNCTION delete_expired_v1(
    older_than interval, max_rows integer, OUT deleted bigint, OUT kept_from timestamptz
)
LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET max_parallel_workers_per_gather = 0
SET jit = off
AS $delete_expired_v1$
DECLARE
    expired_before timestamptz;
    last_expired timestamptz;
    last_to_go timestamptz;
BEGIN
    PERFORM refuse_recovery();
    IF older_than <= interval '0' THEN
        RAISE EXCEPTION 'older_than is %: it must be more than 0', older_than USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF NOT pg_try_advisory_xact_lock(7021961410472345603) THEN
        kept_from := kept_from_v1();
        RETURN;
    END IF;
    LOCK TABLE logs IN ROW EXCLUSIVE MODE;  -- before that lock: see forget_minutes
    PERFORM pg_advisory_xact_lock(7021961410472345605);
    PERFORM pg_advisory_xact_lock(7021961410472345604);
    PERFORM set_config('synchronous_commit', 'off', TRUE);
    deleted := 0;
    kept_from := kept_from_v1();
    expired_before := least(clock_timestamp(), (SELECT max(logs.created) FROM logs)) - older_than;
    last_expired := (SELECT max(logs.created) FROM logs WHERE logs.created < expired_before);
    last_to_go := (
        SELECT max(expired.created)
          FROM (SELECT logs.created
                  FROM logs
                 WHERE logs.created >= coalesce(delete_expired_v1.kept_from, '-infinity')
                   AND logs.created < last_expired
                 ORDER BY logs.created
                 LIMIT max_rows) AS expired
    );
    IF last_to_go IS NULL THEN
        RETURN;
    END IF;

    PERFORM set_config('log_pipeline.deleting', 'on', TRUE);  -- should an error end this, the transaction takes it back
    DELETE FROM logs
     WHERE logs.created >= coalesce(delete_expired_v1.kept_from, '-infinity')
       AND logs.created <= last_to_go;
    GET DIAGNOSTICS deleted = ROW_COUNT;
    PERFORM set_config('log_pipeline.deleting', '', TRUE);
    DELETE FROM minutes
     WHERE minutes.minute >= coalesce(minute_of(delete_expired_v1.kept_from), '-infinity')
       AND minutes.minute <= last_to_go;
    IF kept_from IS NULL THEN
        kept_from := last_to_go + interval '1 microsecond';
        INSERT INTO retention (kept_from) VALUES (delete_expired_v1.kept_from);
    ELSE
        UPDATE retention
           SET kept_from = last_to_go + interval '1 microsecond'
         WHERE retention.kept_from = delete_expired_v1.kept_from;
        kept_from := last_to_go + interval '1 microsecond';
    END IF;
END
$delete_expired_v1$;

-- As window_end_v2, and with it the oldest record that is kept.
CREATE OR REPLACE FUNCTION stats_window_v1(
    date_from timestamptz, date_to timestamptz,
    OUT window_end timestamptz, OUT oldest timestamptz, OUT newest timestamptz, OUT kept_from timestamptz
)
LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET jit = off
AS $stats_window_v1$
BEGIN
    SELECT ending.window_end, ending.newest, ending.kept_from
      INTO window_end, newest, kept_from
      FROM window_end_v2(date_from, date_to) AS ending;
    oldest := (
        SELECT min(created) FROM logs WHERE created >= coalesce(stats_window_v1.kept_from, '-infinity')
    );
END
$stats_window_v1$;

-- The statement that gives the newest records of a window, $8 at most; its other parameters are as in rows_of_window_v1.
CREATE OR REPLACE FUNCTION newest_of_window_v1(
    date_from timestamptz, date_to timestamptz, method text, status_code smallint, ip inet
)
RETURNS text LANGUAGE plpgsql STABLE AS $newest_of_window_v1$
DECLARE
    in_order CONSTANT text := CASE WHEN num_nonnulls(method, status_code, ip) = 0
                                   THEN 'ORDER BY created DESC'
                                   ELSE 'ORDER BY created DESC NULLS LAST' END;
BEGIN
    RETURN format(
        $newest$
            SELECT created, ip, method, uri, status_code
              FROM (%s) AS matching
             WHERE ($3 IS NULL OR method = $3)
               AND ($4 IS NULL OR status_code = $4)
               AND ($5 IS NULL OR ip = $5)
             %s
             LIMIT $8
        $newest$,
        regexp_replace(
            rows_of_window_v1(date_from, date_to, method, status_code, ip),
            'ORDER BY created( NULLS FIRST)?', in_order, 'g'
        ),
        in_order
    );
END
$newest_of_window_v1$;

-- The numbers of records of a window by method, by status code, and by class of status in buckets: JSON lists of
-- [value, number] and of [bucket from 0, class, number]. `date_to` is to come from stats_window_v1; filters may be NULL;
-- `edges` are the moments at which one bucket ends and the next begins. With an address, at most the newest `max_rows`
-- records that match are counted.
CREATE OR REPLACE FUNCTION stats_counts_v1(
    date_from timestamptz, date_to timestamptz, method text, status_code smallint, ip inet,
    edges timestamptz[], max_rows integer
)
RETURNS json LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET enable_incremental_sort = off
SET max_parallel_workers_per_gather = 0
SET jit = off
AS $stats_counts_v1$
DECLARE
    -- What is read in `minutes`, if anything: from a whole minute on, to another one or to the end of what is counted
    first_minute timestamptz := minute_of(
        greatest(date_from, kept_from_v1()) + interval '1 minute' - interval '1 microsecond'
    );
    counted_before timestamptz := CASE WHEN counted_to_v1() <= date_to THEN counted_to_v1() ELSE minute_of(date_to) END;
    of_minutes_and_records CONSTANT text := $of_minutes_and_records$
        SELECT width_bucket(minute, $6) AS bucket, method, status_code, count
          FROM minutes
         WHERE minute >= $9
           AND minute < $10
           AND ($3 IS NULL OR method = $3)
           AND ($4 IS NULL OR status_code = $4)
         UNION ALL
        SELECT width_bucket(created, $6), method COLLATE "C", status_code, count(*)
          FROM (VALUES ($1, $9), ($10, $2)) AS span (span_from, span_to)
         CROSS JOIN LATERAL (
                   SELECT created, method, status_code
                     FROM logs
                    WHERE created >= span_from
                      AND created < span_to
                      AND ($3 IS NULL OR method = $3)
                      AND ($4 IS NULL OR status_code = $4)
                    ORDER BY created
               ) AS records
         GROUP BY 1, 2, 3
    $of_minutes_and_records$;
    of_newest CONSTANT text := $of_newest$
        SELECT width_bucket(created, $6) AS bucket, method, status_code, count(*) AS count
          FROM (%s) AS newest
         GROUP BY 1, 2, 3
    $of_newest$;
    result json;
BEGIN
    PERFORM refuse_recovery();
    IF counted_before <= first_minute OR EXISTS (SELECT FROM unnest(edges) AS edge WHERE edge <> minute_of(edge)) THEN
        first_minute := date_from;
        counted_before := date_from;
    END IF;
    EXECUTE format($statement$
          WITH counted AS MATERIALIZED (%s)
        SELECT json_build_object(
                   'methods', (
                       SELECT json_agg(json_build_array(method, count))
                         FROM (SELECT method, sum(count) AS count FROM counted GROUP BY method) AS sums
                   ),
                   'status_codes', (
                       SELECT json_agg(json_build_array(status_code, count))
                         FROM (SELECT status_code, sum(count) AS count FROM counted GROUP BY status_code) AS sums
                   ),
                   'buckets', (
                       SELECT json_agg(json_build_array(bucket, class, count))
                         FROM (SELECT bucket, status_code / 100 AS class, sum(count) AS count
                                 FROM counted
                                GROUP BY bucket, class) AS sums
                   )
               )
    $statement$, CASE WHEN ip IS NULL THEN of_minutes_and_records
                      ELSE format(of_newest, newest_of_window_v1(date_from, date_to, method, status_code, ip)) END)
       INTO result
      USING date_from, date_to, method, status_code, ip, edges, NULL, max_rows, first_minute, counted_before;
    RETURN result;
END
$stats_counts_v1$;

-- The most frequent addresses or URIs (`field` is ip or uri) of the newest `max_rows` records of a window, `top` at most:
-- a JSON list of [value, number of records].
CREATE OR REPLACE FUNCTION stats_top_v1(
    date_from timestamptz, date_to timestamptz, method text, status_code smallint, ip inet,
    field text, top integer, max_rows integer
)
RETURNS json LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET enable_incremental_sort = off
SET max_parallel_workers_per_gather = 0
SET jit = off
SET work_mem = '4MB'  -- more is not quicker, not even for a million different values
AS $stats_top_v1$
DECLARE
    result json;
BEGIN
    PERFORM refuse_recovery();
    EXECUTE format($statement$
        SELECT json_agg(json_build_array(%s, count) ORDER BY count DESC, value)
          FROM (SELECT value, count
                  FROM (SELECT %s AS value, count(*) AS count
                          FROM (%s) AS newest
                         GROUP BY value) AS counted
                 ORDER BY count DESC, value
                 LIMIT $7) AS ranked
    $statement$, CASE field WHEN 'ip' THEN 'host(value)' ELSE 'value' END,
                 CASE field WHEN 'ip' THEN 'ip' ELSE 'uri COLLATE "C"' END,
                 newest_of_window_v1(date_from, date_to, method, status_code, ip))
       INTO result
      USING date_from, date_to, method, status_code, ip, NULL, top, max_rows;
    RETURN result;
END
$stats_top_v1$;

DO $search_path$
DECLARE
    own text := (SELECT relnamespace::regnamespace FROM pg_class WHERE oid = 'logs'::regclass);
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['counted_to_v1', 'count_minutes_v1', 'forget_minutes', 'delete_expired_v1',
                                'stats_window_v1', 'stats_counts_v1', 'stats_top_v1'] LOOP
        EXECUTE format('ALTER FUNCTION %I SET search_path = %s, pg_temp', name, own);
    END LOOP;
END
$search_path$;

-- Whoever waits for this lock behind a VACUUM, say, holds up all writers meanwhile: hence a second at a time.
DO $lock_logs$
BEGIN
    PERFORM set_config('lock_timeout', '1s', TRUE);
    LOOP
        BEGIN
            LOCK TABLE logs IN SHARE ROW EXCLUSIVE MODE;
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(1);
        END;
    END LOOP;
END
$lock_logs$;

-- ALWAYS: also where session_replication_role = replica, by which the guard of 0004 is passed. REPLICA: only there, as
-- the guard refuses it everywhere else; the trigger does not run when lines are stored.
CREATE OR REPLACE TRIGGER logs_recount
    BEFORE DELETE OR TRUNCATE ON logs
    FOR EACH STATEMENT EXECUTE FUNCTION forget_minutes();
ALTER TABLE logs ENABLE ALWAYS TRIGGER logs_recount;
CREATE OR REPLACE TRIGGER logs_recount_past_the_guard
    BEFORE INSERT OR UPDATE ON logs
    FOR EACH STATEMENT EXECUTE FUNCTION forget_minutes();
ALTER TABLE logs ENABLE REPLICA TRIGGER logs_recount_past_the_guard;

-- Nothing is lost: what was counted can be counted again.
DROP TRIGGER IF EXISTS logs_recount_past_the_guard ON logs;
DROP TRIGGER IF EXISTS logs_recount ON logs;
DROP FUNCTION IF EXISTS forget_minutes();
DROP FUNCTION IF EXISTS stats_top_v1(
    timestamptz, timestamptz, text, smallint, inet, text, integer, integer
);
DROP FUNCTION IF EXISTS stats_counts_v1(
    timestamptz, timestamptz, text, smallint, inet, timestamptz[], integer
);
DROP FUNCTION IF EXISTS newest_of_window_v1(timestamptz, timestamptz, text, smallint, inet);
DROP FUNCTION IF EXISTS stats_window_v1(timestamptz, timestamptz);

-- As in 0010
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

    DELETE FROM logs
     WHERE logs.created >= coalesce(delete_expired_v1.kept_from, '-infinity')
       AND logs.created <= last_to_go;
    GET DIAGNOSTICS deleted = ROW_COUNT;
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

DO $search_path$
DECLARE
    own text := (SELECT relnamespace::regnamespace FROM pg_class WHERE oid = 'logs'::regclass);
BEGIN
    EXECUTE format('ALTER FUNCTION delete_expired_v1 SET search_path = %s, pg_temp', own);
END
$search_path$;
DROP FUNCTION IF EXISTS count_minutes_v1(integer);
DROP FUNCTION IF EXISTS counted_to_v1();
DROP FUNCTION IF EXISTS minute_of(timestamptz);
DROP TABLE IF EXISTS counting;
DROP TABLE IF EXISTS minutes;

-- depends: 0009.drop-old-indexes
-- Deleting what has expired, in small steps, so that every reader can tell whether something was deleted before it.

-- `kept_from`: everything before it was deleted, nothing from it on. No row: nothing was deleted yet. It is read by
-- max(), through the end of its index: while a long reader (a backup) keeps the versions of the row alive that each
-- step leaves behind, a look-up of the one row by a constant key would walk through all of them.
CREATE TABLE IF NOT EXISTS retention (
    kept_from timestamptz NOT NULL CONSTRAINT retention_pkey PRIMARY KEY
);

-- NULL: nothing was deleted yet. In one statement with read_part_v1 it belongs to what that one has read: both are
-- STABLE, so both look at the snapshot of the statement.
CREATE OR REPLACE FUNCTION kept_from_v1()
RETURNS timestamptz LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET jit = off
AS $kept_from_v1$
BEGIN
    RETURN (SELECT max(kept_from) FROM retention);
END
$kept_from_v1$;

-- Deletes at most `max_rows` records, the oldest first; `deleted` is how many, NULL if another session is at it.
-- A record goes when it and its successor are older than `older_than`. So whoever has a record's successor after that
-- time can still ask for what follows the record, and the newest record, from which the next `created` follows, stays.
--
-- Why `kept_from` is true at every moment, for every reader:
--   1. Rows go in the order of `created`, and `kept_from` moves in the same transaction: a snapshot has both or neither.
--   2. One session at a time: the lock is held until the commit can be seen (as in 0004), and the statements after it
--      have new snapshots. Under REPEATABLE READ the update of a row that was updated meanwhile fails: nothing happens.
--   3. New rows have a `created` above the newest one (see 0004), hence above all that is ever deleted.
-- Storing is held up only where ids are repeated. Were one of those rows deleted between the statement that finds its id
-- taken and the one that looks at it, it would be taken for a new line and acknowledged as such: hence the second lock,
-- which store_logs_v2 takes in between, shared, for these some ms. Nobody waits in a circle: a step waits for that lock
-- before it has deleted anything, and takes no other that storing takes.
-- The clock alone could be wrong by years: as age counts from the newest record too, a clock that jumps ahead deletes
-- nothing while nothing is stored.
-- The commit does not wait for the disk or a standby: lost in a crash, the rows are back, and so is `kept_from`. What was
-- stored later is on disk only with all that was committed before it.
-- The walk begins at `kept_from`: index entries of what was deleted stay until the next VACUUM.
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

-- As in 0004, with the lock against delete_expired_v1.
CREATE OR REPLACE FUNCTION store_logs_v2(
    ids uuid[], ips inet[], methods text[], uris text[], status_codes smallint[],
    OUT first_created timestamptz, OUT known bigint[], OUT known_created timestamptz[], OUT conflicting bigint[],
    OUT ahead_seconds float8
)
LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $store_logs_v2$
DECLARE
    last_created timestamptz;
BEGIN
    PERFORM refuse_recovery();
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'store_logs_v2 needs READ COMMITTED, this transaction is %: let it begin so, or ALTER ROLE or '
            'ALTER DATABASE ... SET default_transaction_isolation = ''read committed''',
            upper(current_setting('transaction_isolation')) USING ERRCODE = 'invalid_transaction_state';
    END IF;
    IF current_setting('synchronous_commit') NOT IN ('on', 'remote_apply') THEN
        PERFORM set_config('synchronous_commit', 'on', TRUE);
    END IF;
    PERFORM set_config('log_pipeline.storing', 'on', TRUE);  -- should an error end this, the transaction takes it back
    PERFORM pg_advisory_xact_lock(7021961410472345601);  -- any constant that nothing else in the database locks

    SELECT greatest(clock_timestamp(), max(logs.created) + interval '1 microsecond')
      INTO first_created
      FROM logs;
    last_created := first_created + (cardinality(ids) - 1) * interval '1 microsecond';
    ahead_seconds := extract(epoch FROM first_created - clock_timestamp());

    -- Functions that stand beside each other in a SELECT go on in step; in FROM, each would fill a buffer of its own.
    BEGIN
        INSERT INTO logs (id, created, ip, method, uri, status_code)
        SELECT unnest(ids), generate_series(first_created, last_created, interval '1 microsecond'),
               unnest(ips), unnest(methods), unnest(uris), unnest(status_codes);
        PERFORM set_config('log_pipeline.storing', '', TRUE);
        RETURN;
    EXCEPTION WHEN unique_violation THEN
        NULL;  -- an id is there already, or stands twice in `ids`: once more, the way that costs a sixth more
    END;

    PERFORM pg_advisory_xact_lock_shared(7021961410472345604);  -- see delete_expired_v1
    INSERT INTO logs (id, created, ip, method, uri, status_code)
    SELECT unnest(ids), generate_series(first_created, last_created, interval '1 microsecond'),
           unnest(ips), unnest(methods), unnest(uris), unnest(status_codes)
        ON CONFLICT (id) DO NOTHING;
    PERFORM set_config('log_pipeline.storing', '', TRUE);

      WITH present AS (
               SELECT line.n, logs.created,
                      (logs.ip, logs.method, logs.uri, logs.status_code)
                      = (line.ip, line.method, line.uri, line.status_code) AS same
                 FROM unnest(ids, ips, methods, uris, status_codes) WITH ORDINALITY
                      AS line (id, ip, method, uri, status_code, n)
                 JOIN logs ON logs.id = line.id
                WHERE logs.created <> first_created + (line.n - 1) * interval '1 microsecond'
           )
    SELECT array_agg(n ORDER BY n) FILTER (WHERE same),
           array_agg(created ORDER BY n) FILTER (WHERE same),
           array_agg(n ORDER BY n) FILTER (WHERE NOT same)
      INTO known, known_created, conflicting
      FROM present;
END
$store_logs_v2$;

-- As in 0008, from the highest kind down: so the first row of a kind that is met is its newest one, and not the index
-- entries of all those that were deleted since the last VACUUM.
CREATE OR REPLACE FUNCTION kinds_v1(method text, status_code smallint)
RETURNS SETOF integer LANGUAGE plpgsql STABLE AS $kinds_v1$
DECLARE
    last CONSTANT integer := method_number(method);
    kind integer := last;
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
             WHERE method_number(logs.method) - logs.status_code < kind
               AND method_number(logs.method) - logs.status_code > last - 1000
             ORDER BY method_number(logs.method) - logs.status_code DESC
             LIMIT 1;
            EXIT WHEN NOT FOUND;
            RETURN NEXT kind;
        END LOOP;
    END IF;
END
$kinds_v1$;

-- As window_end_v1, and with it the newest record and `kept_from`, as of the same moment.
CREATE OR REPLACE FUNCTION window_end_v2(
    date_from timestamptz, date_to timestamptz,
    OUT window_end timestamptz, OUT newest timestamptz, OUT kept_from timestamptz
)
LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET jit = off
AS $window_end_v2$
BEGIN
    PERFORM refuse_recovery();
    newest := (SELECT max(created) FROM logs);
    window_end := least(date_to, greatest(date_from, newest + interval '1 microsecond'));
    kept_from := kept_from_v1();
END
$window_end_v2$;

DO $search_path$
DECLARE
    own text := (SELECT relnamespace::regnamespace FROM pg_class WHERE oid = 'logs'::regclass);
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['kept_from_v1', 'delete_expired_v1', 'store_logs_v2', 'window_end_v2'] LOOP
        EXECUTE format('ALTER FUNCTION %I SET search_path = %s, pg_temp', name, own);
    END LOOP;
END
$search_path$;

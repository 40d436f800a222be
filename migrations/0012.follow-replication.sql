-- depends: 0011.create-stats
-- Synchronous replication and failover: which server answers, and what is known to be on its standby.

-- As in 0010, and where there are synchronous standbys the return of the commit without a warning means that they have
-- all that this call has stored or has found:
--   1. The warning arrives. PostgreSQL gives it when it stops waiting for the standby, after the commit, so the setting
--      has to last until then; a SET clause would not.
--   2. The commit waits, even if nothing was inserted: that of a transaction which has written nothing is no record in
--      the WAL, and returns at once. With the message it is one, behind the commits of all rows that the call has seen.
-- Older backends call this, too, and are told now whatever their role's settings are.
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
    IF current_setting('synchronous_standby_names') <> '' THEN
        IF current_setting('client_min_messages') = 'error' THEN
            PERFORM set_config('client_min_messages', 'warning', TRUE);
        END IF;
        PERFORM pg_logical_emit_message(TRUE, 'log_pipeline', ''::text);
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

-- `newest`: all records up to that one are on the synchronous standby, if this returns without a warning; as above.
CREATE OR REPLACE FUNCTION confirm_v1(OUT newest timestamptz)
LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET jit = off
AS $confirm_v1$
BEGIN
    PERFORM refuse_recovery();
    IF current_setting('synchronous_commit') NOT IN ('on', 'remote_apply') THEN
        PERFORM set_config('synchronous_commit', 'on', TRUE);
    END IF;
    IF current_setting('client_min_messages') = 'error' THEN
        PERFORM set_config('client_min_messages', 'warning', TRUE);
    END IF;
    newest := (SELECT max(created) FROM logs);
    PERFORM pg_logical_emit_message(TRUE, 'log_pipeline', ''::text);
END
$confirm_v1$;

-- Which server this is; fails if it has a lower timeline than one of the same cluster that the caller has met: another
-- server was promoted, and has taken over. The transaction is rolled back, so in one statement with store_logs_v2
-- nothing is stored. `synchronous`: a commit waits for a standby.
--
-- SQLSTATE: LP003 another server has taken over.
CREATE OR REPLACE FUNCTION server_v1(
    known_system bigint, known_timeline integer,
    OUT system bigint, OUT timeline integer, OUT synchronous boolean
)
LANGUAGE plpgsql VOLATILE AS $server_v1$
BEGIN
    PERFORM refuse_recovery();
    timeline := ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer;
    synchronous := current_setting('synchronous_standby_names') <> '';
    system := (SELECT system_identifier FROM pg_control_system());  -- 6 us: a small file is read
    IF system = known_system AND timeline < known_timeline THEN
        RAISE EXCEPTION 'this server is on timeline %, and timeline % was met before: it is an old primary from which '
            'another server has taken over, shut it off (if it was restored to an earlier time on purpose, restart the '
            'backends)', timeline, known_timeline USING ERRCODE = 'LP003';
    END IF;
END
$server_v1$;

DO $search_path$
DECLARE
    own text := (SELECT relnamespace::regnamespace FROM pg_class WHERE oid = 'logs'::regclass);
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['store_logs_v2', 'confirm_v1'] LOOP
        EXECUTE format('ALTER FUNCTION %I SET search_path = %s, pg_temp', name, own);
    END LOOP;
END
$search_path$;

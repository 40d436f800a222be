-- depends: 0002.create-store-logs
-- The second version of the one way into the table, and the guard that refuses every other way.
--
-- Why `created` increases in the order of commits, over all backends, also when the clock steps back:
--   1. The advisory lock is held from before the stamp is taken until after the commit is visible: PostgreSQL
--      releases a transaction's locks only once its rows can be seen. So stampers follow one another.
--   2. The statement after the lock has a new snapshot (VOLATILE function, READ COMMITTED), hence sees every
--      row that an earlier holder committed. Its stamp is above all of them, whatever the clock says.
--   3. Nobody else stamps: a row that did not come through here is refused by the trigger below.
-- A reader that sees a record therefore sees every record with a smaller `created`: below the newest one
-- nothing will ever be added. REPEATABLE READ would keep the snapshot from before the lock; it is refused, as it
-- cannot be changed any more once a statement has begun.
--
-- What the promises need of a session is set here, since poolers share sessions. synchronous_commit counts when the
-- transaction commits: a SET clause of the function would have ended by then, set_config(..., TRUE) lasts until then.
-- The planner's switches count while the function runs. Its plans are kept for the life of a session, that may have
-- begun with an empty table: they must be those for a large one. pg_temp is last, as somebody's temporary table that
-- is called logs would swallow lines.
--
-- SQLSTATEs: LP001 this server is in recovery; LP002 rows that came past the function.

CREATE OR REPLACE FUNCTION refuse_recovery()
RETURNS void LANGUAGE plpgsql STABLE AS $refuse_recovery$
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION 'this server is in recovery, a standby that may lag behind: lines are stored in and read from '
            'the primary only; name it in DATABASE_URL, or add target_session_attrs=read-write' USING ERRCODE = 'LP001';
    END IF;
END
$refuse_recovery$;

-- The n-th line of a call gets `created` = first_created + (n - 1) µs; `ahead_seconds` is how far first_created is
-- ahead of the clock. An id that is there already is not stored again, be it from before or from earlier in this
-- call. `known` has the position (from 1) of each such line that is the same as the stored one, as PostgreSQL sees the
-- values, and `known_created` the time under which that one was stored; `conflicting` the positions of those that
-- are different, hence stored nowhere.

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

-- The first version, for backends from before: it does not tell which of the repeated lines are different.
CREATE OR REPLACE FUNCTION store_logs(
    ids uuid[], ips inet[], methods text[], uris text[], status_codes smallint[],
    OUT first_created timestamptz, OUT repeated bigint[], OUT repeated_created timestamptz[]
)
LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $store_logs$
DECLARE
    positions bigint[];
BEGIN
    SELECT stored.first_created, stored.known || stored.conflicting
      INTO first_created, positions
      FROM store_logs_v2(ids, ips, methods, uris, status_codes) AS stored;
    IF positions IS NOT NULL THEN
        SELECT array_agg(n ORDER BY n), array_agg(logs.created ORDER BY n)
          INTO repeated, repeated_created
          FROM unnest(positions) AS n
          JOIN logs ON logs.id = ids[n];
    END IF;
END
$store_logs$;

-- The argument above holds for rows that come through the function; one that somebody inserts past it and commits
-- late has a `created` that readers have passed. What copies a database as a whole goes through: pg_restore makes
-- triggers after the rows (with --data-only: --disable-triggers), replication applies with
-- session_replication_role = replica. A marker is no lock: it stops errors, not a will.

CREATE OR REPLACE FUNCTION guard_logs()
RETURNS trigger LANGUAGE plpgsql AS $guard_logs$
BEGIN
    IF current_setting('log_pipeline.storing', TRUE) = 'on' THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'rows of logs come through the function store_logs_v2 only: readers would miss others; call it, or, '
        'to mend or restore rows while nothing else runs, SET session_replication_role = replica'
        USING ERRCODE = 'LP002';
END
$guard_logs$;

CREATE OR REPLACE TRIGGER logs_guard
    BEFORE INSERT OR UPDATE ON logs
    FOR EACH STATEMENT EXECUTE FUNCTION guard_logs();

DO $search_path$
DECLARE
    own text := (SELECT relnamespace::regnamespace FROM pg_class WHERE oid = 'logs'::regclass);
BEGIN
    EXECUTE format('ALTER FUNCTION store_logs_v2 SET search_path = %s, pg_temp', own);
    EXECUTE format('ALTER FUNCTION store_logs SET search_path = %s, pg_temp', own);
END
$search_path$;

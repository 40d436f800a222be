-- depends: 0001.create-logs
-- The one way into the table. The n-th line of a call gets `created` = first_created + (n - 1) µs.
--
-- Why `created` increases in the order of commits, over all backends, also when the clock steps back:
--   1. The advisory lock is held from before the stamp is taken until after the commit is visible: PostgreSQL
--      releases a transaction's locks only once its rows can be seen. So stampers follow one another.
--   2. The statement after the lock has a new snapshot (VOLATILE function, READ COMMITTED), hence sees every
--      row that an earlier holder committed. Its stamp is above all of them, whatever the clock says.
-- A reader that sees a record therefore sees every record with a smaller `created`: below the newest one
-- nothing will ever be added. REPEATABLE READ would keep the snapshot from before the lock; it is refused.
--
-- An id that is there already is not stored again. `repeated` has the position (from 1) of each such line, and
-- `repeated_created` the time under which its id was stored first.

CREATE OR REPLACE FUNCTION store_logs(
    ids uuid[], ips inet[], methods text[], uris text[], status_codes smallint[],
    OUT first_created timestamptz, OUT repeated bigint[], OUT repeated_created timestamptz[]
)
LANGUAGE plpgsql VOLATILE AS $store_logs$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'store_logs needs READ COMMITTED, this transaction is %',
            upper(current_setting('transaction_isolation')) USING ERRCODE = 'invalid_transaction_state';
    END IF;
    PERFORM pg_advisory_xact_lock(7021961410472345601);  -- any constant that nothing else in the database locks

    SELECT greatest(clock_timestamp(), max(logs.created) + interval '1 microsecond')
      INTO first_created
      FROM logs;

    BEGIN
        INSERT INTO logs (id, created, ip, method, uri, status_code)
        SELECT line.id, first_created + (line.n - 1) * interval '1 microsecond',
               line.ip, line.method, line.uri, line.status_code
          FROM unnest(ids, ips, methods, uris, status_codes) WITH ORDINALITY
               AS line (id, ip, method, uri, status_code, n);
        RETURN;
    EXCEPTION WHEN unique_violation THEN
        NULL;  -- an id is there already, or stands twice in `ids`: once more, the way that costs a sixth more
    END;

    INSERT INTO logs (id, created, ip, method, uri, status_code)
    SELECT line.id, first_created + (line.n - 1) * interval '1 microsecond',
           line.ip, line.method, line.uri, line.status_code
      FROM unnest(ids, ips, methods, uris, status_codes) WITH ORDINALITY
           AS line (id, ip, method, uri, status_code, n)
        ON CONFLICT (id) DO NOTHING;

    SELECT array_agg(line.n ORDER BY line.n), array_agg(logs.created ORDER BY line.n)
      INTO repeated, repeated_created
      FROM unnest(ids) WITH ORDINALITY AS line (id, n)
      JOIN logs ON logs.id = line.id
     WHERE logs.created <> first_created + (line.n - 1) * interval '1 microsecond';
END
$store_logs$;

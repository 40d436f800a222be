-- Nothing is lost: the records stay. Rows that are inserted past the function are refused no longer, and readers may
-- miss them.
DROP TRIGGER IF EXISTS logs_guard ON logs;
DROP FUNCTION IF EXISTS guard_logs();

-- As in 0002
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
DROP FUNCTION IF EXISTS store_logs_v2(uuid[], inet[], text[], text[], smallint[]);
DROP FUNCTION IF EXISTS refuse_recovery();

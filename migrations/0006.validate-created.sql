-- depends: 0005.limit-created
-- The rows that were there before 0005 are looked at, beside readers and writers. Those outside of the range are found
-- by the index on `created` and named; nobody but an operator knows what they should be.

DO $name_rows$
DECLARE
    wrong text := (
        SELECT string_agg(format('%s (created %s)', id, created), ', ')
          FROM (SELECT id, created FROM logs WHERE created < '1970-01-01T00:00:00Z'
                 UNION ALL
                SELECT id, created FROM logs WHERE created >= '3000-01-01T00:00:00Z'
                 LIMIT 10) AS named
    );
BEGIN
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'rows of logs have created outside of the years 1970 to 2999, at least those with id %: delete '
            'them, or SET session_replication_role = replica and UPDATE their created; then migrate again', wrong
            USING ERRCODE = 'check_violation', CONSTRAINT = 'logs_created_range', TABLE = 'logs';
    END IF;
END
$name_rows$;

ALTER TABLE logs VALIDATE CONSTRAINT logs_created_range;

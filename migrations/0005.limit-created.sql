-- depends: 0004.create-store-logs-v2
-- `created` stays where readers look and where it can still grow: a row at the end of all years would leave no
-- `created` for any line after it, and one before 1970 is behind every reader's start.
-- Here for new rows only (NOT VALID), which takes no time; 0006 looks at those that are there.
-- The lock is asked for a second at a time: whoever waits for it behind a long reader, such as a backup, would hold
-- up all writers meanwhile.

DO $limit_created$
BEGIN
    PERFORM set_config('lock_timeout', '1s', TRUE);
    LOOP
        BEGIN
            ALTER TABLE logs
                DROP CONSTRAINT IF EXISTS logs_created_range,
                ADD CONSTRAINT logs_created_range
                    CHECK (created >= '1970-01-01T00:00:00Z' AND created < '3000-01-01T00:00:00Z') NOT VALID;
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(1);
        END;
    END LOOP;
END
$limit_created$;

-- depends: 0011.create-stats
-- The trigger of 0011 that has all counted anew when rows are inserted or changed past the guard ran in replica sessions
-- only. Two ways past the guard are none: after ALTER TABLE ... DISABLE TRIGGER logs_guard the counts stayed what they
-- were; and ENABLE TRIGGER ALL, with which pg_restore --disable-triggers ends, made it run whenever lines were stored, so
-- that each POST threw all counts away.
--
-- Why it runs for all others now, and never when lines are stored, whichever way triggers are enabled: it asks for the
-- marker of the guard, which store_logs and store_logs_v2 set around each INSERT of theirs and nobody else does.

-- As in 0011
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

CREATE OR REPLACE TRIGGER logs_recount_past_the_guard
    BEFORE INSERT OR UPDATE ON logs
    FOR EACH STATEMENT
    WHEN (current_setting('log_pipeline.storing', TRUE) IS DISTINCT FROM 'on')
    EXECUTE FUNCTION forget_minutes();
ALTER TABLE logs ENABLE ALWAYS TRIGGER logs_recount_past_the_guard;
ALTER TABLE logs ENABLE ALWAYS TRIGGER logs_recount;  -- ENABLE TRIGGER ALL may have made it less

-- Nothing is lost. As in 0011.
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
    FOR EACH STATEMENT EXECUTE FUNCTION forget_minutes();
ALTER TABLE logs ENABLE REPLICA TRIGGER logs_recount_past_the_guard;

-- What was deleted cannot be brought back, and up to where is forgotten: a reader that comes too late is no longer told.
-- store_logs_v2 and kinds_v1 stay as they are: the lock is then nobody else's, and the kinds are the same.
DROP FUNCTION IF EXISTS window_end_v2(timestamptz, timestamptz);
DROP FUNCTION IF EXISTS delete_expired_v1(interval, integer);
DROP FUNCTION IF EXISTS kept_from_v1();
DROP TABLE IF EXISTS retention;

-- Nothing is lost: only a row outside of the range would be taken again.
ALTER TABLE IF EXISTS logs DROP CONSTRAINT IF EXISTS logs_created_range;

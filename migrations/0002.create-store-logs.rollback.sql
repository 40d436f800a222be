-- Nothing is lost: the records stay, only nothing can be stored until the function is back.
DROP FUNCTION IF EXISTS store_logs(uuid[], inet[], text[], text[], smallint[]);

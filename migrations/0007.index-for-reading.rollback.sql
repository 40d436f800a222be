-- Nothing is lost: filtered windows get slower, until the indexes of 0003 are back (0009).
DROP INDEX IF EXISTS logs_ip_number_created_idx;
DROP INDEX IF EXISTS logs_other_method_created_idx;
DROP INDEX IF EXISTS logs_kind_created_idx;
DROP FUNCTION IF EXISTS method_number(text);
DROP FUNCTION IF EXISTS ip_number(inet);

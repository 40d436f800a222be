-- Nothing is lost: filtered windows get slower.
DROP INDEX IF EXISTS logs_ip_created_idx;
DROP INDEX IF EXISTS logs_status_code_created_idx;
DROP INDEX IF EXISTS logs_method_created_idx;

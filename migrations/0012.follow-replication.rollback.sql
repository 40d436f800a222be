-- Nothing is lost. store_logs_v2 stays as it is: without synchronous standbys it does what it did.
DROP FUNCTION IF EXISTS server_v1(bigint, integer);
DROP FUNCTION IF EXISTS confirm_v1();

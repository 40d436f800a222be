-- Nothing is lost: only nothing can be read by a backend that knows these functions.
DROP FUNCTION IF EXISTS count_part_v1(timestamptz, timestamptz, text, smallint, inet, integer);
DROP FUNCTION IF EXISTS read_part_v1(timestamptz, timestamptz, text, smallint, inet, integer, text, integer);
DROP FUNCTION IF EXISTS record_json_v1(uuid, timestamptz, inet, text, text, smallint);
DROP FUNCTION IF EXISTS rows_of_window_v1(timestamptz, timestamptz, text, smallint, inet);
DROP FUNCTION IF EXISTS kinds_v1(text, smallint);
DROP FUNCTION IF EXISTS seconds_ahead_v1();
DROP FUNCTION IF EXISTS window_end_v1(timestamptz, timestamptz);

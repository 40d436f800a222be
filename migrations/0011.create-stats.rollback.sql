-- Nothing is lost.
DROP FUNCTION IF EXISTS stats_v1(
    timestamptz, timestamptz, text, smallint, inet, timestamptz[], integer, integer
);
DROP FUNCTION IF EXISTS stats_window_v1(timestamptz, timestamptz);

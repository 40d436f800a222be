-- depends: 0010.create-retention
-- What GET /api/stats reads through.

-- As window_end_v2, and with it the oldest record that is kept.
CREATE OR REPLACE FUNCTION stats_window_v1(
    date_from timestamptz, date_to timestamptz,
    OUT window_end timestamptz, OUT oldest timestamptz, OUT newest timestamptz, OUT kept_from timestamptz
)
LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET jit = off
AS $stats_window_v1$
BEGIN
    SELECT ending.window_end, ending.newest, ending.kept_from
      INTO window_end, newest, kept_from
      FROM window_end_v2(date_from, date_to) AS ending;
    oldest := (
        SELECT min(created) FROM logs WHERE created >= coalesce(stats_window_v1.kept_from, '-infinity')
    );
END
$stats_window_v1$;

-- Counts the records of a window; `date_to` is to come from stats_window_v1. Filters may be NULL. `edges` are the moments
-- at which one bucket ends and the next begins. With an address, and for the most frequent addresses and URIs, at most the
-- newest `most` records that match are counted.
-- The result is JSON: lists of [value, number of records], and for the buckets [bucket from 0, class of status, number].
CREATE OR REPLACE FUNCTION stats_v1(
    date_from timestamptz, date_to timestamptz, method text, status_code smallint, ip inet,
    edges timestamptz[], top integer, most integer
)
RETURNS text LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET enable_incremental_sort = off
SET max_parallel_workers_per_gather = 0
SET jit = off
SET work_mem = '64MB'
AS $stats_v1$
DECLARE
    filtered CONSTANT boolean := num_nonnulls(method, status_code, ip) > 0;
    in_order CONSTANT text := CASE WHEN filtered THEN 'created DESC NULLS LAST' ELSE 'created DESC' END;
    newest CONSTANT text := format(
        $newest$
            SELECT created, ip, method, uri, status_code
              FROM (%s) AS matching
             WHERE ($3 IS NULL OR method = $3)
               AND ($4 IS NULL OR status_code = $4)
               AND ($5 IS NULL OR ip = $5)
             ORDER BY %s
             LIMIT $8
        $newest$,
        regexp_replace(
            rows_of_window_v1(date_from, date_to, method, status_code, ip),
            'ORDER BY created( NULLS FIRST)?', 'ORDER BY ' || in_order, 'g'
        ),
        in_order
    );
    in_window CONSTANT text := $in_window$
        SELECT created, method, status_code
          FROM logs
         WHERE created >= $1
           AND created < $2
           AND ($3 IS NULL OR method = $3)
           AND ($4 IS NULL OR status_code = $4)
         ORDER BY created
    $in_window$;
    most_frequent CONSTANT text := $most_frequent$
        SELECT coalesce(json_agg(json_build_array(%s, count) ORDER BY count DESC, value), '[]')
          FROM (SELECT value, count
                  FROM (SELECT %s AS value, count(*) AS count
                          FROM (%s) AS newest
                         GROUP BY value) AS counted
                 ORDER BY count DESC, value
                 LIMIT $7) AS ranked
    $most_frequent$;
    counts json;
    top_ips json := '[]';
    top_uris json := '[]';
BEGIN
    PERFORM refuse_recovery();
    EXECUTE format($counts$
          WITH counted AS MATERIALIZED (
                   SELECT width_bucket(created, $6) AS bucket, method, status_code, count(*) AS count
                     FROM (%s) AS matching
                    GROUP BY 1, 2, 3
               )
        SELECT json_build_object(
                   'methods', (
                       SELECT coalesce(json_agg(json_build_array(method, count)), '[]')
                         FROM (SELECT method, sum(count) AS count FROM counted GROUP BY method) AS sums
                   ),
                   'status_codes', (
                       SELECT coalesce(json_agg(json_build_array(status_code, count)), '[]')
                         FROM (SELECT status_code, sum(count) AS count FROM counted GROUP BY status_code) AS sums
                   ),
                   'buckets', (
                       SELECT coalesce(json_agg(json_build_array(bucket, class, count)), '[]')
                         FROM (SELECT bucket, status_code / 100 AS class, sum(count) AS count
                                 FROM counted
                                GROUP BY bucket, class) AS sums
                   )
               )
    $counts$, CASE WHEN ip IS NULL THEN in_window ELSE newest END)
    INTO counts
    USING date_from, date_to, method, status_code, ip, edges, top, most;
    IF top > 0 THEN
        EXECUTE format(most_frequent, 'host(value)', 'ip', newest)
           INTO top_ips
          USING date_from, date_to, method, status_code, ip, edges, top, most;
        EXECUTE format(most_frequent, 'value', 'uri COLLATE "C"', newest)
           INTO top_uris
          USING date_from, date_to, method, status_code, ip, edges, top, most;
    END IF;
    RETURN json_build_object('counts', counts, 'top_ips', top_ips, 'top_uris', top_uris);
END
$stats_v1$;

DO $search_path$
DECLARE
    own text := (SELECT relnamespace::regnamespace FROM pg_class WHERE oid = 'logs'::regclass);
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['stats_window_v1', 'stats_v1'] LOOP
        EXECUTE format('ALTER FUNCTION %I SET search_path = %s, pg_temp', name, own);
    END LOOP;
END
$search_path$;

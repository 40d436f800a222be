-- depends: 0010.create-retention
-- As in 0008, with the method escaped. A backend stores tokens, which have nothing to escape; but whoever calls
-- store_logs_v2 by hand, or restores rows, may have stored a quote or a line feed, and one such row made every export
-- unreadable. GET by itself, as escaping each method would cost 8 % of a part.
CREATE OR REPLACE FUNCTION record_json_v1(
    id uuid, created timestamptz, ip inet, method text, uri text, status_code smallint
)
RETURNS text LANGUAGE sql STABLE PARALLEL SAFE
RETURN '{"id":"' || id
       || '","created":"' || to_char(created, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
       || '","log":{"ip":"' || host(ip)
       || '","method":' || CASE WHEN method = 'GET' THEN '"GET","uri":' ELSE to_json(method)::text || ',"uri":' END
       || to_json(uri)
       || ',"status_code":' || status_code
       || '}}';

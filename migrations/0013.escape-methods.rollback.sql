-- Nothing is lost. As in 0008.
CREATE OR REPLACE FUNCTION record_json_v1(
    id uuid, created timestamptz, ip inet, method text, uri text, status_code smallint
)
RETURNS text LANGUAGE sql STABLE PARALLEL SAFE
RETURN '{"id":"' || id
       || '","created":"' || to_char(created, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
       || '","log":{"ip":"' || host(ip)
       || '","method":"' || method
       || '","uri":' || to_json(uri)
       || ',"status_code":' || status_code
       || '}}';

-- The table of records: one row per access-log line.
-- `created` is the cursor that readers follow: unique, and strictly increasing in the order of commits (see 0002).

CREATE TABLE IF NOT EXISTS logs (
    id          uuid        NOT NULL CONSTRAINT logs_pkey PRIMARY KEY,
    created     timestamptz NOT NULL CONSTRAINT logs_created_key UNIQUE,
    ip          inet        NOT NULL,
    method      text        NOT NULL CONSTRAINT logs_method_length CHECK (octet_length(method) BETWEEN 1 AND 32),
    uri         text        NOT NULL CONSTRAINT logs_uri_length CHECK (octet_length(uri) BETWEEN 1 AND 8192),
    status_code smallint    NOT NULL CONSTRAINT logs_status_code_range CHECK (status_code BETWEEN 100 AND 599)
);

-- Cannot be brought back: every stored record goes with the table.
DROP TABLE IF EXISTS logs;

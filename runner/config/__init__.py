"""The fields and the file of params.yaml, and the names of execution modes and backends."""

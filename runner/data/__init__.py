"""Text into records, and records into batches."""

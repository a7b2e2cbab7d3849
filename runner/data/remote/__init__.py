"""Files in object storage: addresses, streamed reading, staging of records, upload of output."""

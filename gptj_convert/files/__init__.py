"""Files and folders: range reads, atomic writes, locks, digests, resumable output."""

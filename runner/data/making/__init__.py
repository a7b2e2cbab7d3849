"""Text into records: sources, tokenizers, packing and the resumable build."""

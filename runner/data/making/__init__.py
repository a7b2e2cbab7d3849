"""Training records from text: sources, tokenizers, packing and the resumable build."""

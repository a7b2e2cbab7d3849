"""The Hugging Face Hub: addresses, listings, the local cache and resumable downloads."""

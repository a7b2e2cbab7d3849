"""Checkpoint files (`containers`) and what GPT-J looks like in them (`layouts`)."""

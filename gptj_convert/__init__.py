"""Move GPT-J checkpoints between formats, and prove the result."""

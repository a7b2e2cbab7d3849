"""Moving GPT-J checkpoints between formats, and proving the result."""

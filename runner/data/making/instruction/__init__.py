"""Instruction data: shapes of its records, templates, and the loss on completions."""

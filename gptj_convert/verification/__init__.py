"""Proof that two checkpoints compute the same, level by level."""

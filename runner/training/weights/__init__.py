"""Weights that a run starts from: loaded, initialized at random, or adapted by LoRA."""

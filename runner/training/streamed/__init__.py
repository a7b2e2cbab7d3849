"""Training with the weights on disk, one block in memory at a time."""

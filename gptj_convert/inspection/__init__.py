"""What is in a checkpoint, how two differ, and whether its files are intact."""

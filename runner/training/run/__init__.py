"""What a run leaves in its folder: checkpoints, metrics, logs and the lock."""

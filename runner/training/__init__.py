"""A training run: its loop and the executors that make each step."""

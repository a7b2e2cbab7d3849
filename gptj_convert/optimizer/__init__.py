"""Optimizer state: found in a checkpoint of any format, and written into another."""

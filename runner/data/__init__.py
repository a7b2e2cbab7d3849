"""Training data: records made from text, and batches read from records."""

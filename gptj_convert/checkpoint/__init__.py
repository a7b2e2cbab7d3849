"""Opening a checkpoint of any format, and matching its tensors against the table."""

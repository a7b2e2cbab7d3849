"""Metrics of a model over records, texts and summaries."""

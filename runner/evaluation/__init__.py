"""Evaluation of a model on records, texts and summaries."""

"""The tasks of `gptj eval`: records, texts and summaries."""

"""Files that the `gptj data` commands read in a folder, as glob patterns.

The standard library only, so that the command line can name them without loading the readers.
"""

from __future__ import annotations

#: Files of documents: `gptj data pile`.
PILE_FILES = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.txt", "*.txt.gz", "*.txt.zst", "*.parquet")
#: Files of articles with summaries: `gptj data summarization`.
PAIR_FILES = ("*.bin", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.parquet")

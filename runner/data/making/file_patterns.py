"""Files that the `gptj data` commands read in a folder, as glob patterns.

The standard library only, so that the command line can name them without loading the readers.
"""

from __future__ import annotations

#: Suffixes of compressed text; see `runner.data.making.documents.streams`.
_COMPRESSED = ("", ".gz", ".zst", ".zstd", ".xz", ".bz2")


def _with_compressed(*suffixes: str) -> tuple[str, ...]:
    return tuple(f"*{suffix}{packed}" for suffix in suffixes for packed in _COMPRESSED)


#: Files of records with named values: `gptj data instruct`.
ROW_FILES = (*_with_compressed(".jsonl", ".json", ".csv", ".tsv"), "*.parquet", "*.arrow")
#: Files of documents: `gptj data pile`.
PILE_FILES = (*ROW_FILES, *_with_compressed(".txt"))
#: Files of articles with summaries: `gptj data summarization`.
PAIR_FILES = ("*.bin", *ROW_FILES)

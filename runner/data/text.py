"""Text files into packed training records.

Every file is a document: its tokens, then one end-of-text. Documents follow one another in one
stream, which is cut into pieces of max_sequence_length + 1 tokens: inputs are all but the last,
labels all but the first. The last piece is padded with end-of-text, and masked there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from gptj_convert.staging import staged_folder
from gptj_convert.tokenizer import END_OF_TEXT, TOKENIZER_FILE
from gptj_model.errors import DataFault, FileFault
from runner.data.records import RecordWriter, write_data_params

#: Characters of text that are tokenised together, on all cores.
_CHUNK = 1 << 22
#: Examples a record file.
_EXAMPLES_PER_FILE = 8192


@dataclass(slots=True)
class Counts:
    """What went in and what came out."""

    documents: int = 0
    skipped: int = 0
    bytes: int = 0
    tokens: int = 0
    """Of the text, with one end-of-text a document, without padding."""
    examples: int = 0
    files: int = 0


@dataclass(frozen=True, slots=True)
class Packing:
    """Progress: bytes of text done, of how many."""

    done: int
    total: int
    what: str


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder, without truncation or padding.

    A special token's name in the text is text: it is not read as that token.

    Raises:
        FileFault: there is none.
    """
    path = folder / TOKENIZER_FILE if folder.is_dir() else folder
    if not path.is_file():
        raise FileFault(
            f"{path}: not found, expected a tokenizer",
            hint="name a folder with tokenizer.json, such as ./gpt-j-6b",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception for a bad file
        raise FileFault(f"{path}: is not a tokenizer: {e}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def find_texts(sources: Sequence[Path], patterns: Sequence[str]) -> list[Path]:
    """The named files, and in named folders (and theirs) the files that match a pattern.

    Raises:
        DataFault: a source does not exist, or nothing is found.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_file():
            found.append(source)
        elif source.is_dir():
            inside = {p for pattern in patterns for p in source.rglob(pattern) if p.is_file()}
            found += sorted(inside)
        else:
            raise DataFault(f"{source}: not found, expected a text file or a folder of them")
    if not found:
        raise DataFault(
            f"{', '.join(map(str, sources))}: holds no file that matches {', '.join(patterns)}",
            hint="name what to read with --glob",
        )
    return found


def pack(
    texts: Sequence[Path],
    tokenizer: Tokenizer,
    out: Path,
    counts: Counts,
    *,
    length: int,
    skip_bad: bool = False,
    force: bool = False,
) -> Iterator[Packing]:
    """Write records of `texts` to a new folder `out`, which appears when it is complete.

    Args:
        texts: UTF-8 files, in this order.
        tokenizer: see `load_tokenizer`.
        out: the folder.
        counts: is filled.
        length: max_sequence_length, in tokens.
        skip_bad: leave out files that are not UTF-8 and count them, instead of stopping.
        force: replace an existing `out`.

    Raises:
        UsageError: `out` exists and `force` is off.
        DataFault: a text is not UTF-8 (file and line), or cannot be read.
    """
    total = sum(p.stat().st_size for p in texts)
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise DataFault(f"the tokenizer has no {END_OF_TEXT}, which separates documents")
    with staged_folder(out, force=force) as staging:
        writer = _Packer(staging.content, length, end, counts)
        try:
            for batch in _batches(texts, counts, skip_bad):
                for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                    writer.add(encoding.ids)
                yield Packing(counts.bytes, total, f"{counts.examples} examples")
            writer.finish()
        except BaseException:
            writer.discard()
            raise
        values = {
            "sources": [str(p) for p in texts],
            "max_sequence_length": length,
            "vocab_size": tokenizer.get_vocab_size(),
            **{name: getattr(counts, name) for name in Counts.__dataclass_fields__},
        }
        write_data_params(staging.content, values)


def _batches(texts: Iterable[Path], counts: Counts, skip_bad: bool) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for path in texts:
        text = _read(path, skip_bad)
        counts.bytes += path.stat().st_size
        if text is None:
            counts.skipped += 1
            continue
        counts.documents += 1
        batch.append(text)
        size += len(text)
        if size >= _CHUNK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read(path: Path, skip_bad: bool) -> str | None:
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise DataFault(f"{path}: cannot be read: {e.strerror}") from None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        if skip_bad:
            return None
        line = raw.count(b"\n", 0, e.start) + 1
        raise DataFault(
            f"{path}:{line}: byte {raw[e.start]:#04x} at {e.start} is not UTF-8",
            hint="convert the file, or leave out such files with `--on-error skip`",
        ) from None


class _Packer:
    """Tokens in, record files out."""

    def __init__(self, folder: Path, length: int, end: int, counts: Counts) -> None:
        self._folder = folder
        self._length = length
        self._end = end
        self._counts = counts
        self._pending: list[int] = []
        self._writer: RecordWriter | None = None

    def add(self, ids: Sequence[int]) -> None:
        """Append a document."""
        self._counts.tokens += len(ids) + 1
        pending = self._pending
        pending.extend(ids)
        pending.append(self._end)
        size = self._length + 1
        whole = len(pending) // size * size
        for start in range(0, whole, size):
            self._write(pending[start : start + size], size)
        del pending[:whole]

    def finish(self) -> None:
        """Write what is left, padded, and close the last file."""
        if self._pending:
            real = len(self._pending)
            padding = [self._end] * (self._length + 1 - real)
            self._write(self._pending + padding, real)
        if self._writer:
            self._writer.close()

    def discard(self) -> None:
        """Give up the file that is being written."""
        if self._writer:
            self._writer.discard()

    def _write(self, tokens: list[int], real: int) -> None:
        if self._writer is None or self._writer.count == _EXAMPLES_PER_FILE:
            if self._writer:
                self._writer.close()
            name = f"records-{self._counts.files:05d}.tfrecord"
            self._writer = RecordWriter(self._folder / name)
            self._counts.files += 1
        ids = np.asarray(tokens, np.int64)
        # A label counts when it is a token of the text, not padding.
        mask = (np.arange(1, len(tokens)) < real).astype(np.int64)
        self._writer.write(ids[:-1], mask, ids[1:])
        self._counts.examples += 1

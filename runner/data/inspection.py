"""Check every record of a folder, and summarize them.

files → checked records → figures and a few samples
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptj_convert.files.digest import digest
from gptj_convert.streams.progress import Progress
from gptj_model.config import END_OF_TEXT_ID, VOCAB_SIZE
from gptj_model.errors import DataFault, UsageError
from runner.data.making.instruction.shapes import AS_MESSAGES, CHAT, SHAPES
from runner.data.reading.data_params import DATA_PARAMS_FILE, read_params, stated_files
from runner.data.reading.example import FEATURES
from runner.data.reading.hdf5 import PATTERN as HDF5_PATTERN
from runner.data.reading.hdf5 import read_checked
from runner.data.reading.records import (
    DATA_HINT,
    PATTERN,
    check_files,
    is_index,
    listed_records,
    read_examples,
)

#: Number of examples whose figures are computed together.
_TOGETHER = 64
#: Number of bars in the histogram of lengths.
_BARS = 20


@dataclass(slots=True)
class RecordsSummary:
    """Figures and samples of a folder of valid records."""

    path: Path
    length: int = 0
    """Number of tokens per example, max_sequence_length."""
    bytes: int = 0
    """Size of the record files."""
    files: dict[str, int] = field(default_factory=dict)
    """Number of examples by file name."""
    counted: int = 0
    """Number of tokens that the loss counts, which are those with mask 1."""
    padding: int = 0
    """Number of tokens after the last counted token of each example."""
    real_lengths: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    """Number of examples by their number of tokens before the padding; int64."""
    frequencies: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Number of occurrences of each id in the inputs before the padding; int64."""
    samples: list[np.ndarray] = field(default_factory=list)
    """Examples drawn uniformly from all, int32 of shape (3, length)."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the command that made the records, if data_params.json states them."""
    counts: dict[str, Any] = field(default_factory=dict)
    """Counts of that command: documents, skipped, left_out by reason, and others."""

    @property
    def examples(self) -> int:
        """Number of examples in all files."""
        return sum(self.files.values())

    @property
    def tokens(self) -> int:
        """Number of tokens in all examples, including padding."""
        return self.examples * self.length

    def left_out(self) -> list[tuple[str, int]]:
        """Return what the command left out or altered, by reason, with the number of documents."""
        reasons: dict[str, int] = dict(self.counts.get("left_out") or {})
        for name, words in (("skipped", "malformed"), ("cut", "cut to the length")):
            if self.counts.get(name):
                reasons[words] = self.counts[name]
        return sorted(reasons.items())

    def templates(self) -> dict[str, str]:
        """Return the text of each template that wrote the records, by its name."""
        shapes = self.counts.get("shapes") or {}
        kinds = {shape.kind for shape in SHAPES if any(n.startswith(str(shape)) for n in shapes)}
        if any(name.endswith(AS_MESSAGES) for name in shapes):
            kinds.add(CHAT)
        stated = self.arguments.get("templates") or {}
        return {t["name"]: t["text"] for kind, t in stated.items() if kind in kinds}

    def most_frequent(self, count: int) -> list[tuple[int, int]]:
        """Return the `count` most frequent ids with their numbers of occurrences, in order."""
        order = np.argsort(-self.frequencies, kind="stable")[:count]
        return [(int(i), int(self.frequencies[i])) for i in order if self.frequencies[i]]

    def bars(self) -> list[tuple[int, int, int]]:
        """Return the histogram of lengths as (shortest, longest, number of examples) bars."""
        edges = np.unique(
            np.linspace(0, self.length + 1, min(_BARS, self.length + 1) + 1, dtype=int)
        )
        sums = np.add.reduceat(self.real_lengths, edges[:-1])
        return [
            (int(a), int(b) - 1, int(n)) for a, b, n in zip(edges, edges[1:], sums, strict=False)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        tokens = max(self.tokens, 1)
        return {
            "files": self.files,
            "bytes": self.bytes,
            "examples": self.examples,
            "max_sequence_length": self.length,
            "tokens": self.tokens,
            "counted_share": self.counted / tokens,
            "padding_share": self.padding / tokens,
            "distinct_ids": int(np.count_nonzero(self.frequencies)),
            "end_of_text": int(self.frequencies[END_OF_TEXT_ID : END_OF_TEXT_ID + 1].sum()),
            "most_frequent": [{"id": i, "count": n} for i, n in self.most_frequent(20)],
            "lengths": [{"from": a, "to": b, "examples": n} for a, b, n in self.bars()],
            "arguments": self.arguments,
            "counts": {k: v for k, v in self.counts.items() if k != "places"},
        }


def find_sets(folder: Path) -> dict[str, Path]:
    """Return folders of records by name: `folder` itself, as "", or the folders in it.

    Raises:
        UsageError: none of these folders holds records.
    """
    if is_index(folder) or _record_files(folder):
        return {"": folder}
    inside = [p for p in sorted(folder.glob("*")) if p.is_dir() and _record_files(p)]
    if not inside:
        raise UsageError(
            f"{folder}: holds neither {PATTERN} nor {HDF5_PATTERN}, expected training records",
            hint=DATA_HINT,
        )
    return {p.name: p for p in inside}


def summarize_records(
    folder: Path, *, vocab_size: int | None = None, samples: int = 3
) -> Generator[Progress, None, RecordsSummary]:
    """Read and check every record of a folder, yielding progress and returning the summary.

    Args:
        folder: folder of records.
        vocab_size: upper bound of ids, exclusive; None means that of data_params.json, or else
            GPT-J's.
        samples: number of examples to draw.

    Raises:
        DataFault: a file or record is invalid; with file, record and offset.
    """
    paths = _record_files(folder)
    if not is_index(folder):
        check_files(folder, paths)
    stated = stated_files(folder) or {}
    params = read_params(folder) or {}
    found = RecordsSummary(
        folder, arguments=params.get("arguments", {}), counts=params.get("counts", {})
    )
    found.length = found.arguments.get("max_sequence_length", 0)
    found.bytes = sum(p.stat().st_size for p in paths)
    rows = vocab_size or int(found.arguments.get("vocab_size", VOCAB_SIZE))
    found.frequencies = np.zeros(rows, np.int64)
    draw, done = random.Random(0), 0
    for path in paths:
        found.files[path.name] = 0
        for block in _blocks(path, found.length or None, rows):
            _add(found, path.name, block, draw, samples)
            yield Progress(done, found.bytes, path.name)
        done += path.stat().st_size
        if (facts := stated.get(path.name)) and (
            (facts.examples, facts.sha256) != (found.files[path.name], digest(path))
        ):
            raise DataFault(
                f"{path}: holds {found.files[path.name]} valid examples, but differs from the file "
                f"that {DATA_PARAMS_FILE} states ({facts.examples} examples, sha256 "
                f"{facts.sha256[:16]}…)",
                hint="make the records again",
            )
    return found


def _add(
    found: RecordsSummary, name: str, block: np.ndarray, draw: random.Random, samples: int
) -> None:
    if not found.length or len(found.real_lengths) == 1:
        found.length = block.shape[2]
        found.real_lengths = np.zeros(found.length + 1, np.int64)
    ids, mask = block[:, 0], block[:, 1]
    ends = np.where(mask.any(axis=1), found.length - mask[:, ::-1].argmax(axis=1), 0)
    found.real_lengths += np.bincount(ends, minlength=found.length + 1)
    found.counted += int(mask.sum())
    found.padding += int((found.length - ends).sum())
    real = ids[np.arange(found.length) < ends[:, None]]
    found.frequencies += np.bincount(real, minlength=len(found.frequencies))
    for example in block:
        seen = found.examples
        found.files[name] += 1
        # Reservoir sampling: every example has the same chance, whatever their final number.
        place = seen if seen < samples else draw.randrange(seen + 1)
        if seen < samples:
            found.samples.append(example.copy())
        elif place < samples:
            found.samples[place] = example.copy()


def _blocks(path: Path, length: int | None, vocab_size: int) -> Iterator[np.ndarray]:
    """Yield the checked examples of a file, int32 of shape (examples, 3, length)."""
    if path.match(HDF5_PATTERN):
        yield from read_checked(path, length=length, vocab_size=vocab_size)
        return
    rows: list[np.ndarray] = []
    for _, example in read_examples(path, length=length, vocab_size=vocab_size):
        rows.append(np.stack([example[name] for name in FEATURES]).astype(np.int32))
        if len(rows) == _TOGETHER:
            yield np.stack(rows)
            rows = []
    if rows:
        yield np.stack(rows)


def _record_files(folder: Path) -> list[Path]:
    if is_index(folder):
        return listed_records(folder)
    found = {*folder.glob(PATTERN), *folder.glob(HDF5_PATTERN)}
    return sorted(p for p in found if p.is_file() and p.name[0] != ".")

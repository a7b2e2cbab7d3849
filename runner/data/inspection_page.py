"""The summary of training records as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptj_convert.files import html_page
from runner.data.inspection import RecordsSummary

TEMPLATE_FILE = "inspection.html.j2"

#: Number of points of the frequency curve, and the size of its drawing in SVG units.
_POINTS = 160
_WIDTH, _HEIGHT = 640, 200
#: Number of tokens in the list of the most frequent ones.
_MOST = 40
#: Largest number of characters of a piece of a sample.
_PIECE = 600

Decode = Callable[[Sequence[int]], str]


class Piece(NamedTuple):
    """Successive tokens of a sample."""

    counts: bool
    """Whether the loss counts them."""
    special: bool
    """Whether they are special tokens."""
    text: str


def pieces(
    sample: np.ndarray, decode: Decode, special: Collection[int] = (), *, limit: int = _PIECE
) -> Iterator[Piece]:
    """Yield a sample's labels up to the padding in pieces.

    Where ids and labels are one sequence, its first token comes before them.

    Args:
        sample: one example, int32 of shape (3, length).
        decode: function from ids to text.
        special: ids of special tokens.
        limit: largest number of characters of a piece; a longer piece loses its middle.
    """
    ids, mask, labels = sample[:, : max(np.flatnonzero(sample[1]), default=-1) + 1]
    pairs = list(zip(mask.tolist(), labels.tolist(), strict=True))
    if len(ids) and np.array_equal(ids[1:], labels[:-1]):
        pairs.insert(0, (0, int(ids[0])))
    for (counts, is_special), group in groupby(
        pairs, key=lambda pair: (bool(pair[0]), pair[1] in special)
    ):
        text = decode([label for _, label in group])
        if len(text) > limit:
            half = limit // 2
            text = f"{text[:half]} … {text[-half:]}"
        yield Piece(counts, is_special, text)


def write_page(
    path: Path,
    summaries: Mapping[str, RecordsSummary],
    decode: Decode,
    *,
    decoded: bool,
    special: Collection[int] = (),
) -> None:
    """Write the page; it appears under its name once it is complete.

    Args:
        path: path of the page; an existing file is overwritten.
        summaries: summaries by the names of their folders.
        decode: function from ids to text.
        decoded: whether `decode` returns the tokens' text rather than their ids.
        special: ids of special tokens.

    Raises:
        OSError: the page cannot be written.
    """
    values = {
        "sets": [_set(name, found, decode, special) for name, found in summaries.items()],
        "decoded": decoded,
        "width": _WIDTH,
        "height": _HEIGHT,
    }
    html_page.write_page(path, "runner.data", TEMPLATE_FILE, values)


def _set(
    name: str, found: RecordsSummary, decode: Decode, special: Collection[int]
) -> dict[str, Any]:
    bars, most = found.bars(), found.most_frequent(_MOST)
    highest = max((n for *_, n in bars), default=0) or 1
    total = int(found.frequencies.sum()) or 1
    return {
        "name": name or str(found.path),
        "found": found,
        "facts": found.to_json(),
        "bars": [(first, last, n, n / highest) for first, last, n in bars],
        "curve": _curve(found.frequencies),
        "most": [(i, decode([i]), n, n / total, n / most[0][1]) for i, n in most],
        "samples": [list(pieces(sample, decode, special)) for sample in found.samples],
    }


def _curve(frequencies: np.ndarray) -> str:
    """Return the points of frequency over rank, both on logarithmic axes, for an SVG line."""
    ordered = np.sort(frequencies[frequencies > 0])[::-1]
    if not len(ordered):
        return ""
    ranks = np.unique(np.geomspace(1, len(ordered), min(_POINTS, len(ordered))).round().astype(int))
    right, top = math.log10(max(len(ordered), 2)), math.log10(max(int(ordered[0]), 2))
    return " ".join(
        f"{math.log10(rank) / right * _WIDTH:.1f},"
        f"{(1 - math.log10(int(ordered[rank - 1])) / top) * _HEIGHT:.1f}"
        for rank in map(int, ranks)
    )

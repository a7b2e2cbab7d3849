"""Deal source files to the shards of a job that several machines share.

    names and sizes of all files → the files, or byte ranges of files, of each shard

The names and sizes alone decide, so machines that see the same files need not speak to each other.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptj_model.errors import UsageError
from runner.data.making.documents.streams import compression
from runner.data.reading.data_params import SHARD_FOLDERS

if TYPE_CHECKING:
    from runner.data.making.sources import Part

#: Suffix of files that may be dealt in ranges: each line is a document.
_LINES = ".jsonl"
#: Number of digits of a number in the name of a shard's folder.
_DIGITS = 5
MOST_SHARDS = 10**_DIGITS - 1


@dataclass(frozen=True, slots=True)
class Shard:
    """One of the equal shares of a job.

    Raises:
        UsageError: index or count is out of range.
    """

    index: int
    """Number of the shard, from 0."""
    count: int
    """Number of shards."""
    origin: str = "--shard"
    """Where the index comes from: an option, or a variable of the environment."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_SHARDS:
            raise UsageError(
                f"{self.count} shards (from {self.origin}), expected 1 to {MOST_SHARDS:,}"
            )
        if not 0 <= self.index < self.count:
            raise UsageError(
                f"shard {self.index} of {self.count} (from {self.origin}), expected 0 to "
                f"{self.count - 1}",
                hint="number the shards from 0",
            )

    @property
    def folder(self) -> str:
        """Name of the folder that the shard's records go to."""
        return f"shard-{self.index:0{_DIGITS}d}-of-{self.count:0{_DIGITS}d}"


class Piece(NamedTuple):
    """Bytes of a source file that belong to one shard."""

    number: int
    """Number of the file in the list of all files."""
    begin: int
    end: int


def deal(sizes: Sequence[int], count: int, may_be_cut: Callable[[int], bool]) -> list[list[Piece]]:
    """Return the pieces of each shard, in the order of the files.

    A file that is larger than an equal share is cut where that fills the shards evenly, if it may
    be cut. All other files are dealt whole, the largest first, each to the shard that has least.

    Args:
        sizes: number of bytes of each file.
        count: number of shards.
        may_be_cut: returns whether the file of a number may be dealt in ranges; only called for
            files that are larger than an equal share.
    """
    total = sum(sizes)
    cut = [n for n, size in enumerate(sizes) if size * count > total and may_be_cut(n)]
    dealt: list[list[Piece]] = [[] for _ in range(count)]
    # Bytes, number of files and number of each shard: empty files are spread as well.
    loads = [(0, 0, shard) for shard in range(count)]
    for n in sorted(set(range(len(sizes))).difference(cut), key=lambda n: (-sizes[n], n)):
        load, files, shard = heapq.heappop(loads)
        dealt[shard].append(Piece(n, 0, sizes[n]))
        heapq.heappush(loads, (load + sizes[n], files + 1, shard))
    rooms = _rooms({shard: load for load, _, shard in loads}, sum(sizes[n] for n in cut))
    shard = 0
    for n in cut:
        begin = 0
        while begin < sizes[n]:
            if taken := min(rooms[shard], sizes[n] - begin):
                dealt[shard].append(Piece(n, begin, begin + taken))
                begin += taken
                rooms[shard] -= taken
            else:
                shard += 1
    return [sorted(pieces) for pieces in dealt]


def _rooms(loads: Mapping[int, int], total: int) -> dict[int, int]:
    """Return how many of `total` bytes each shard takes, so that all loads are as even as they
    can be."""
    order = sorted(loads, key=lambda shard: (loads[shard], shard))
    lowest, takers = total, 0  # bytes of the shards that take any, and their number
    for shard in order:
        if takers and loads[shard] * takers >= lowest:
            break
        lowest += loads[shard]
        takers += 1
    level, more = divmod(lowest, takers)
    return {
        shard: level + (n < more) - loads[shard] if n < takers else 0
        for n, shard in enumerate(order)
    }


def parts_of(parts: Sequence[Part], shard: Shard, *, whole_files: bool) -> list[Part]:
    """Return what a shard reads of each part; every part is dealt by itself.

    Args:
        parts: source files of the whole job.
        shard: shard to return.
        whole_files: whether a file is one document, and never cut.

    Raises:
        OSError: a file cannot be read.
    """
    return [_part_of(part, shard, whole_files) for part in parts]


def _part_of(part: Part, shard: Shard, whole_files: bool) -> Part:
    def may_be_cut(n: int) -> bool:
        path = part.files[n]
        # The content says whether it is compressed, whatever the name says.
        return not whole_files and path.suffix.lower() == _LINES and not compression(path)

    sizes = [path.stat().st_size for path in part.files]
    mine = deal(sizes, shard.count, may_be_cut)[shard.index]
    ranges = {
        part.files[n]: (begin, end) for n, begin, end in mine if (begin, end) != (0, sizes[n])
    }
    return replace(part, files=tuple(part.files[piece.number] for piece in mine), ranges=ranges)


def facts(parts: Sequence[Part], relative: Mapping[Path, Path], shard: Shard) -> dict[str, Any]:
    """Return what data_params.json states of a shard, as JSON values.

    Args:
        parts: source files of the whole job.
        relative: path of each file relative to its source; the machines may differ in the rest.
        shard: shard that is made.

    Raises:
        OSError: a file cannot be read.
    """
    listing = [
        [part.folder, relative[path].as_posix(), path.stat().st_size]
        for part in parts
        for path in part.files
    ]
    return {
        "index": shard.index,
        "count": shard.count,
        "from": shard.origin,
        "listing_sha256": sha256(json.dumps(listing).encode()).hexdigest(),
    }


def refuse_other_content(out: Path, shard: Shard) -> None:
    """Refuse a folder that holds anything else than shards of this count.

    Shards of two counts in one folder are the sign of an array of which only a part was submitted
    again: their sources overlap.

    Raises:
        UsageError: it holds shards of another count, or records of their own.
    """
    for path in sorted(out.glob(SHARD_FOLDERS)):
        if path.name.partition("-of-")[2].partition(".")[0] != shard.folder.partition("-of-")[2]:
            raise UsageError(
                f"{out}: holds {path.name}, and this is shard {shard.index} of {shard.count} (from "
                f"{shard.origin})",
                hint="give the number of shards, as in --shard /16, to make some of them again, or "
                "choose another folder with --out",
            )
    names = ("data_params.json", "*/data_params.json", "*.tfrecord*", "*.h5")
    found = (p for pattern in names for p in sorted(out.glob(pattern)))
    if other := next((p for p in found if not p.parent.match(SHARD_FOLDERS)), None):
        raise UsageError(
            f"{out}: holds {other.relative_to(out)}, expected only shards: this is shard "
            f"{shard.index} of {shard.count} (from {shard.origin})",
            hint="choose another folder with --out, or make all records in one run with "
            "--shard 0/1",
        )

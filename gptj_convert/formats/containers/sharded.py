"""Weights in several files, the shards, and an index that names the shard of each tensor.

The index is a `model.safetensors.index.json` or `pytorch_model.bin.index.json` of transformers:
`{"metadata": {"total_size": BYTES}, "weight_map": {TENSOR: SHARD}}`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_convert.files.json_file import parse_json, read_json
from gptj_convert.files.ranged_file import DOWNLOAD_HINT
from gptj_convert.formats.containers.safetensors import MAX_HEADER_BYTES, SafetensorsSource
from gptj_convert.formats.containers.torch_checkpoint import TorchCheckpointSource
from gptj_model.errors import FileFault, TensorFault, UsageError
from gptj_model.source import TensorInfo, TensorSource

INDEX_SUFFIX = ".index.json"

#: Kinds of weight files, by the usual suffix of their names.
SAFETENSORS, ARCHIVE = ".safetensors", ".bin"

#: Limits on an index, which for a GPT-J of 28 blocks (341 tensors with old buffers) has 30 kB.
MAX_INDEX_BYTES = 4 * 2**20
MAX_INDEX_MARKS = 2**15
#: Largest number of shards. Each stays open twice, and a process may have 1,024 open files.
MAX_SHARDS = 400

#: Names that writers give to shards; none of them leads out of the folder.
_SHARD_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.-]{0,149}", re.ASCII)
_NUMBERED = re.compile(r"[-_.]\d{1,6}-of-(\d{1,6})\.(safetensors|bin)", re.ASCII)
_PROVEN = "names, shapes and the end of every file agree"
_HINT = "fetch the index and all its shards again, from one revision: `gptj download`"

_log = logging.getLogger(__name__)

_shown = reprlib.Repr()
_shown.maxstring = 200


def is_index(name: str) -> bool:
    """Return whether a file of this name is an index of shards."""
    return name.endswith((f".safetensors{INDEX_SUFFIX}", f".bin{INDEX_SUFFIX}"))


def shards_of(name: str) -> int | None:
    """Return the number of shards in a name such as `model-00001-of-00002.safetensors`, or None."""
    found = _NUMBERED.search(name)
    return int(found[1]) if found and found.end() == len(name) else None


def open_file(path: Path) -> TensorSource:
    """Open one weight file. Its kind is known by its content or, failing that, by its name."""
    kind = kind_of_content(path) or (SAFETENSORS if path.suffix == SAFETENSORS else ARCHIVE)
    return SafetensorsSource(path) if kind == SAFETENSORS else TorchCheckpointSource(path)


def kind_of_content(path: Path) -> str | None:
    """Return `SAFETENSORS` or `ARCHIVE` by a file's first bytes; None for others.

    A bare pickle counts as `ARCHIVE`, whose reader gives the right error. A file that cannot be
    read is of no kind.
    """
    try:
        with path.open("rb") as f:
            head = f.read(9)
    except OSError:
        return None
    if head.startswith((b"PK\x03\x04", b"\x80")) and not head.endswith(b"{"):
        return ARCHIVE
    length = int.from_bytes(head[:8], "little")
    return SAFETENSORS if head[8:] == b"{" and length <= MAX_HEADER_BYTES else None


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Content of an index, and its problems as far as they show without the shards."""

    weight_map: Mapping[str, Any]
    """Shard of each tensor, not checked."""
    shards: tuple[str, ...]
    """Names of the shards that are valid, sorted."""
    metadata: Any
    """Object whose `total_size` is the size of all tensors in bytes, if it follows the format."""
    problems: tuple[str, ...]


def parse_index(data: bytes, name: str, *, where: str) -> ShardIndex:
    """Parse an index that is in memory.

    Args:
        data: content of the index, at most `MAX_INDEX_BYTES`.
        name: file name of the index, which determines the suffix of the shards.
        where: name of the place that the index came from, for errors.

    Raises:
        FileFault: the content is not an index.
    """
    return _index(parse_json(data, where=where, max_marks=MAX_INDEX_MARKS), name, where)


def _read_index(path: Path) -> ShardIndex:
    values = read_json(
        path,
        expected="an index of shards",
        max_bytes=MAX_INDEX_BYTES,
        max_marks=MAX_INDEX_MARKS,
    )
    return _index(values, path.name, str(path))


def _index(values: Mapping[str, Any], name: str, where: str) -> ShardIndex:
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFault(
            f"{where}: weight_map is {_shown.repr(weight_map)}, expected an object that names the "
            "shard of every tensor",
            hint=_HINT,
        )
    suffix = Path(name.removesuffix(INDEX_SUFFIX)).suffix
    shards: list[str] = []
    problems: list[str] = []
    # Keyed by their text: JSON values other than strings may not be hashable.
    for shown, shard in {_shown.repr(shard): shard for shard in weight_map.values()}.items():
        if isinstance(shard, str) and _SHARD_NAME.fullmatch(shard) and shard.endswith(suffix):
            shards.append(shard)
        else:
            problems.append(
                f"{shown} is not the name of a shard, expected letters, digits, '_', '-' and "
                f"single dots, ending in {suffix}"
            )
    if len(shards) > MAX_SHARDS:
        raise FileFault(
            f"{where}: names {len(shards)} shards, expected at most {MAX_SHARDS}",
            hint="load it with transformers, then save_pretrained(..., max_shard_size='5GB')",
        )
    metadata = values.get("metadata", {})
    return ShardIndex(weight_map, tuple(sorted(shards)), metadata, tuple(problems))


class ShardedSource:
    """Tensors of all shards, as a `gptj_model.source.TensorSource`.

    Args:
        index: path of the index.
        tied: names of two tensors that may have the same values; writers may count the second
            in the index's size, whether or not it is stored.

    Raises:
        FileFault: the file is not an index.
        TensorFault: index and shards disagree; the error names every disagreement. No file
            outside the index's folder is opened.
    """

    def __init__(self, index: Path, *, tied: tuple[str, str] | None = None) -> None:
        self._path = index
        self._index = _read_index(index)
        self._shards: dict[str, TensorSource] = {}
        self._holders: dict[str, TensorSource] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            problems, hints = self._open()
            problems = [*self._index.problems, *problems, *self._place()]
            if problems:
                # A hint about one problem is more specific than the general one.
                raise TensorFault(str(index), problems, hint=next(iter(hints), _HINT))
            self._note_size(tied)
        except BaseException:
            self.close()
            raise

    @property
    def files(self) -> list[Path]:
        """Index and shards."""
        return [self._path, *(self._path.with_name(shard) for shard in self._shards)]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSource.read_into`."""
        self._holders[name].read_into(name, offset, buffer)

    def close(self) -> None:
        """Close the shards."""
        for shard in self._shards.values():
            shard.close()

    def _open(self) -> tuple[list[str], list[str]]:
        """Open the shards; return the problems, and hints other than `DOWNLOAD_HINT`."""
        problems: list[str] = []
        hints: list[str] = []
        for shard in self._index.shards:
            path = self._path.with_name(shard)
            if not path.is_file():
                problems.append(f"shard {shard} does not exist")
                continue
            try:
                self._shards[shard] = open_file(path)
            except FileFault as e:
                problems.append(e.message)
                if e.hint and e.hint != DOWNLOAD_HINT:
                    hints.append(e.hint)
        return problems, hints

    def _place(self) -> list[str]:
        """Find the shard of every tensor; return the disagreements between index and shards."""
        problems = []
        weight_map = self._index.weight_map
        found: dict[str, list[str]] = {}
        for shard, source in self._shards.items():
            for name in source.tensors:
                found.setdefault(name, []).append(shard)
        for name, shard in weight_map.items():
            holders = found.get(name, [])
            if shard in holders:
                self._holders[name] = self._shards[shard]
                self.tensors[name] = self._shards[shard].tensors[name]
            elif isinstance(shard, str) and shard in self._shards:
                elsewhere = f", but in {holders[0]}" if holders else ""
                problems.append(
                    f"{_shown.repr(name)} is not in {shard}, as the index states{elsewhere}"
                )
        for name, holders in found.items():
            if len(holders) > 1:
                problems.append(
                    f"{_shown.repr(name)} is in {len(holders)} shards, {holders[0]} and "
                    f"{holders[1]}, expected in one"
                )
            elif name not in weight_map:
                problems.append(f"{_shown.repr(name)} is in {holders[0]}, but not in the index")
        return problems

    def _note_size(self, tied: tuple[str, str] | None) -> None:
        """Log a `total_size` that is not that of the tensors, whose own sizes are proven.

        Some versions of transformers count a bool as an eighth of a byte, and a tied tensor
        whether or not it is stored.
        """
        metadata = self._index.metadata
        if not isinstance(metadata, dict):
            shown = "null" if metadata is None else _shown.repr(metadata)
            _log.warning("%s: metadata is %s, expected an object; %s", self._path, shown, _PROVEN)
            return
        stated = metadata.get("total_size")
        if stated is None:
            return
        bools = sum(i.nbytes for i in self.tensors.values() if i.dtype == "bool")
        size = sum(i.nbytes for i in self.tensors.values())
        counts = {size}
        if tied and (first := self.tensors.get(tied[0])):
            stored = tied[1] in self.tensors
            counts.add(size - first.nbytes if stored else size + first.nbytes)
        if type(stated) in (int, float) and any(
            stated * 8 in (count * 8, count * 8 - bools * 7) for count in counts
        ):
            return
        _log.warning(
            "%s: metadata.total_size is %s, but the tensors have %d bytes; %s",
            *(self._path, _shown.repr(stated), size, _PROVEN),
        )


def split(
    tensors: Mapping[str, TensorInfo], file: str, max_bytes: int | None
) -> dict[str, dict[str, TensorInfo]]:
    """Divide tensors among files in the way of transformers.

    Args:
        tensors: tensors of the whole checkpoint, in order.
        file: name of the file if one is enough, such as model.safetensors.
        max_bytes: limit on the tensors of one shard, in bytes; None means no limit. A larger
            tensor gets a shard of its own.

    Returns:
        The tensors of each file, by the file's name.

    Raises:
        UsageError: there would be too many shards.
    """
    shards: list[dict[str, TensorInfo]] = []
    shard: dict[str, TensorInfo] = {}
    size = 0
    for name, info in tensors.items():
        if max_bytes is not None and info.nbytes > max_bytes:
            shards.append({name: info})
            continue
        if max_bytes is not None and size + info.nbytes > max_bytes:
            shards.append(shard)
            shard, size = {}, 0
        shard[name] = info
        size += info.nbytes
    if shard:
        shards.append(shard)
    if len(shards) > MAX_SHARDS:
        raise UsageError(
            f"shards of at most {max_bytes} bytes would make {len(shards)} files, "
            f"expected at most {MAX_SHARDS}",
            hint="choose a larger --max-shard-size",
        )
    if len(shards) == 1:
        return {file: shards[0]}
    stem, suffix = Path(file).stem, Path(file).suffix
    return {
        f"{stem}-{n:05d}-of-{len(shards):05d}{suffix}": shard
        for n, shard in enumerate(shards, start=1)
    }


def index_text(shards: Mapping[str, Mapping[str, TensorInfo]]) -> str:
    """Return the text of the index of these shards."""
    infos = [info for shard in shards.values() for info in shard.values()]
    metadata = {
        "total_parameters": sum(math.prod(info.shape) for info in infos),
        "total_size": sum(info.nbytes for info in infos),
    }
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    values = {"metadata": metadata, "weight_map": weight_map}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"

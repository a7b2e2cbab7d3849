"""Join the shards that several machines have made to one folder of records.

    shards → checked against each other → links to their record files → data_params.json

The record files keep their bytes and are numbered in the order of the shards.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptj_convert.files.output_file import FULL
from gptj_convert.files.output_folder import SUFFIX, output_folder, refuse_overlap
from gptj_convert.streams.progress import Progress, Work
from gptj_model.errors import DataFault, FileFault, UsageError
from runner.data.making.build import Counts, add_up
from runner.data.making.shards import Shard
from runner.data.reading.data_params import (
    DATA_PARAMS_FILE,
    MERGED,
    SHARD,
    SHARD_FOLDERS,
    read_params,
    stated_files,
    write_params,
)
from runner.data.reading.hdf5 import PATTERN as HDF5_PATTERN
from runner.data.reading.records import PATTERN, check_files

#: Largest number of missing shards and of differing arguments that an error names.
_NAMED = 10
#: Smallest number of digits in the name of a record file.
_DIGITS = 5


@dataclass(frozen=True, slots=True)
class _Shard:
    """A complete shard."""

    folder: Path
    parts: Mapping[str, Mapping[str, Any]]
    """Content of data_params.json by the folder of the part; "" for a set without parts."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Index, count and listing, which all parts state alike."""
        return next(iter(self.parts.values()))[SHARD]

    @property
    def index(self) -> int:
        """Number of the shard, from 0."""
        return self.facts["index"]

    @property
    def count(self) -> int:
        """Number of shards of the job."""
        return self.facts["count"]

    @property
    def files(self) -> list[Path]:
        """Record files of all parts."""
        return [self.folder / part / name for part in self.parts for name in self.names(part)]

    def names(self, part: str) -> list[str]:
        """Return the names of the record files of a part, in order."""
        return sorted(self.parts[part]["files"])


@dataclass(frozen=True, slots=True)
class MergeResult:
    """Counts by folder of the output, and what was joined."""

    counts: dict[str, Counts]
    shards: int
    bytes: int
    """Size of the record files."""


def merge(folders: Sequence[Path], out: Path, *, copy: bool, force: bool) -> Work[MergeResult]:
    """Join all shards of a job to a new folder `out`; progress is in bytes.

    Args:
        folders: shards, or folders that hold them.
        out: folder to create.
        copy: copy the record files instead of linking to them.
        force: replace an existing `out`.

    Raises:
        UsageError: a folder holds no shard, or `out` exists or overlaps with a shard.
        DataFault: a shard is missing, there twice, incomplete or of another job, or all are empty.
        FileFault: a link is impossible.
        OSError: reading or writing fails.
    """
    shards = _checked(folders)
    for shard in shards:
        refuse_overlap(out, shard.folder, shard.files)
    counts: dict[str, Counts] = {}
    total, done = sum(path.stat().st_size for shard in shards for path in shard.files), 0
    with output_folder(out, force=force) as staging:
        for part in shards[0].parts:
            folder = staging.content / part
            folder.mkdir(exist_ok=True)
            files: dict[str, Any] = {}
            for shard, name, new in _renamed(shards, part):
                path = shard.folder / part / name
                (_copy if copy else _link)(path, folder / new)
                files[new] = shard.parts[part]["files"][name]
                done += files[new]["bytes"]
                yield Progress(done, total, str(path))
            counts[part] = add_up(_counts(shard, part) for shard in shards)
            write_params(folder, _params(shards, part, counts[part], files))
    return MergeResult(counts, len(shards), total)


def _renamed(shards: Sequence[_Shard], part: str) -> Iterable[tuple[_Shard, str, str]]:
    """Yield the record files of a part, each with its shard, its name there and its new name."""
    files = [(shard, name) for shard in shards for name in shard.names(part)]
    digits = max(_DIGITS, len(str(len(files) - 1)))
    for number, (shard, name) in enumerate(files):
        yield shard, name, f"records-{number:0{digits}d}.{name.partition('.')[2]}"


def _link(path: Path, new: Path) -> None:
    try:
        os.link(path.resolve(), new)
    except OSError as e:
        if e.errno in FULL:
            raise
        raise FileFault(
            f"{path}: cannot be linked to from the output: {e.strerror}",
            hint="put the output on the file system of the shards, or copy them with --copy",
        ) from None


def _copy(path: Path, new: Path) -> None:
    shutil.copyfile(path, new)


def _params(
    shards: Sequence[_Shard], part: str, counts: Counts, files: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of data_params.json beside the joined records."""
    first = shards[0].parts[part]
    sources: dict[str, int] = {}
    for shard in shards:
        sources |= shard.parts[part]["sources"]
    return {
        **{key: value for key, value in first.items() if key != SHARD},
        "sources": sources,
        "counts": asdict(counts),
        "files": dict(files),
        MERGED: {
            "count": len(shards),
            "listing_sha256": shards[0].facts["listing_sha256"],
            "files": [len(shard.names(part)) for shard in shards],
        },
    }


def _counts(shard: _Shard, part: str) -> Counts:
    try:
        return Counts(**shard.parts[part]["counts"])
    except TypeError:
        raise _damaged(shard.folder / part) from None


def _checked(folders: Sequence[Path]) -> list[_Shard]:
    """Return all shards of one job in order.

    Raises:
        UsageError, DataFault: see `merge`.
    """
    paths, unfinished = _find(folders)
    shards = [_read(path) for path in paths]
    for shard in shards[1:]:
        _check_same_job(shards[0], shard)
    by_index: dict[int, _Shard] = {}
    for shard in shards:
        if twin := by_index.get(shard.index):
            raise DataFault(
                f"{shard.folder}: is shard {shard.index} of {shard.count}, and so is "
                f"{twin.folder}; expected each shard once",
                hint="name one of the two",
            )
        by_index[shard.index] = shard
    count = shards[0].count
    if missing := [n for n in range(count) if n not in by_index]:
        raise _missing(missing, count, unfinished)
    ordered = [by_index[n] for n in range(count)]
    _check_files(ordered)
    return ordered


def _find(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the folders of shards, each once, and what interrupted runs have left."""
    found: dict[Path, Path] = {}
    unfinished: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder}: is not a folder, expected a shard or a folder of shards")
        inside = sorted(p for p in folder.glob(SHARD_FOLDERS) if p.is_dir())
        unfinished += (p for p in inside if p.name.endswith(SUFFIX))
        inside = [p for p in inside if not p.name.endswith(SUFFIX)]
        if not inside and not _parts(folder):
            raise UsageError(
                f"{folder}: holds no shard, expected {DATA_PARAMS_FILE} or folders {SHARD_FOLDERS}",
                hint="make shards with `gptj data … --shard I/N`, and name their --out"
                if not unfinished
                else "resume the interrupted runs with --resume",
            )
        for path in inside or [folder]:
            found.setdefault(path.resolve(), path)
    return list(found.values()), unfinished


def _parts(folder: Path) -> dict[str, Path]:
    """Return the folders of a shard that hold data_params.json, by the name of the part."""
    if (folder / DATA_PARAMS_FILE).is_file():
        return {"": folder}
    return {p.parent.name: p.parent for p in sorted(folder.glob(f"*/{DATA_PARAMS_FILE}"))}


def _read(folder: Path) -> _Shard:
    parts: dict[str, Mapping[str, Any]] = {}
    for name, path in _parts(folder).items():
        stated_files(path)  # says where the file is cut
        params = read_params(path)
        if params is None:
            raise _damaged(path)
        facts = params.get(SHARD)
        if facts is None:
            raise DataFault(
                f"{path}: holds all records of a job, or some that are joined already; expected "
                "a shard",
                hint="only `gptj data … --shard I/N` makes shards",
            )
        if not _is_whole(facts):
            raise _damaged(path)
        parts[name] = params
    if not parts:
        raise DataFault(
            f"{folder}: has no {DATA_PARAMS_FILE}, expected a complete shard",
            hint="delete it, and make the shard again",
        )
    if len({(p[SHARD]["index"], p[SHARD]["count"]) for p in parts.values()}) > 1:
        raise DataFault(
            f"{folder}: its parts {', '.join(parts)} are of several shards, expected one",
            hint="make the shard again",
        )
    return _Shard(folder, parts)


def _is_whole(facts: Any) -> bool:
    return (
        isinstance(facts, dict)
        and isinstance(facts.get("listing_sha256"), str)
        and type(facts.get("index")) is int
        and type(facts.get("count")) is int
        and 0 <= facts["index"] < facts["count"]
    )


def _damaged(folder: Path) -> DataFault:
    return DataFault(
        f"{folder / DATA_PARAMS_FILE}: is not what `gptj data … --shard I/N` writes",
        hint="make the shard again",
    )


def _check_same_job(first: _Shard, other: _Shard) -> None:
    """Check that two shards belong to the same job.

    Raises:
        DataFault: they differ; with what differs.
    """
    where = f"{first.folder} and {other.folder}"
    if first.count != other.count:
        raise DataFault(
            f"{where}: are of {first.count} and of {other.count} shards, expected one job",
            hint="name only the shards of one job",
        )
    if first.parts.keys() != other.parts.keys():
        names = [", ".join(shard.parts) or "no part" for shard in (first, other)]
        raise DataFault(
            f"{where}: have the parts {names[0]} and {names[1]}, expected the same",
            hint="make the shards again, from the same sources",
        )
    for part in first.parts:
        differences = _differences(_recipe(first, part), _recipe(other, part))
        if differences:
            more = ["…"] if len(differences) > _NAMED else []
            raise DataFault(
                f"{where}: were made in different ways: " + "; ".join(differences[:_NAMED] + more),
                hint="make one of them again with the options and versions of the other",
            )
    if first.facts["listing_sha256"] != other.facts["listing_sha256"]:
        raise DataFault(
            f"{where}: were made from different listings of the sources: names or sizes differ, "
            "so documents would be lost or repeated",
            hint="let all machines see the same files, and make the shards again",
        )


def _recipe(shard: _Shard, part: str) -> dict[str, Any]:
    """Return everything that must be the same in all shards, by its name."""
    params = shard.parts[part]
    library: Mapping[str, Any] = params.get("tokenizer_backend") or {}
    tool: Mapping[str, Any] = params.get("tool") or {}
    return {
        **params["arguments"],
        "tokenizers": params.get("tokenizers"),
        "tokenizer_backend": f"{library.get('name')} {library.get('version')}",
        "tool": f"{tool.get('name')} {tool.get('version')}",
    }


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {_short(a.get(name))} and {_short(b.get(name))}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _missing(missing: Sequence[int], count: int, unfinished: Sequence[Path]) -> DataFault:
    numbers = [*map(str, missing[:_NAMED]), *(["…"] if len(missing) > _NAMED else [])]
    shown = f"{', '.join(numbers[:-1])} and {numbers[-1]}" if numbers[1:] else numbers[0]
    what = "shards" if missing[1:] else "shard"
    text = f"{what} {shown} of {count} {'are' if missing[1:] else 'is'} missing"
    names = {Shard(n, count).folder + SUFFIX for n in missing}
    if left := [path.name for path in unfinished if path.name in names]:
        text += f"; interrupted runs have left {', '.join(left[:_NAMED])}"
        text += ", …" if left[_NAMED:] else ""
    hint = f"make what is missing, as with --shard {missing[0]}/{count}"
    return DataFault(text, hint=f"{hint} --resume" if left else hint)


def _check_files(shards: Sequence[_Shard]) -> None:
    """Check names and sizes of all record files, and that every part has an example.

    Raises:
        DataFault: a file is missing or of another size, or a part is empty.
    """
    examples: Counter[str] = Counter()
    for shard in shards:
        for part, params in shard.parts.items():
            folder = shard.folder / part
            found = [*folder.glob(PATTERN), *folder.glob(HDF5_PATTERN)]
            check_files(folder, [p for p in found if p.name[0] != "."])
            examples[part] += sum(file["examples"] for file in params["files"].values())
    for part, number in examples.items():
        if not number:
            raise DataFault(
                f"{shards[0].folder.parent / part}: no shard has an example"
                f"{f' of the part {part}' if part else ''}",
                hint="name more sources, or choose a smaller --max-sequence-length",
            )

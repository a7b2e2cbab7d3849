"""Records in object storage, copied to a folder of this machine before they are read.

The folder is named by the address and by size and identity of every object, so it holds just what
is there now, and a later run finds it complete. It is in the user's cache folder; deleting it costs
another transfer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from gptj_convert.files.output_folder import sync
from gptj_convert.streams.progress import Progress, Work
from gptj_model.errors import FileFault, UsageError
from runner.data.reading.data_params import DATA_PARAMS_FILE, stated_files
from runner.data.reading.hdf5 import PATTERN as HDF5
from runner.data.reading.other_data import PATTERN as TFRECORDS
from runner.data.remote.path import BLOCK, RemotePath, Stat
from runner.data.remote.storage import changed

#: Patterns of the objects that are copied, beside data_params.json.
RECORDS = (TFRECORDS, HDF5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged:
    """Records in a folder of this machine."""

    folder: Path
    files: int
    bytes: int
    fetched: int
    """Number of bytes that were transferred now."""


def cache_folder() -> Path:
    """Return the folder that records are copied to, below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptj" / "records"


def stage_records(address: RemotePath) -> Work[Staged]:
    """Copy the records below an address to this machine, yielding progress in bytes.

    Records that are there already are not fetched again. Each file is compared with the SHA-256
    that data_params.json beside it states.

    Args:
        address: folder of records, or of such folders.

    Raises:
        UsageError: there are no records.
        FileFault: the disk is too small, or a transfer fails or brings something else.
        DataFault: data_params.json is damaged.
    """
    listed = _listed(address)
    listing = sorted((name, stat.st_size, stat.version) for name, stat in listed.items())
    key = hashlib.sha256(json.dumps([str(address), listing]).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{address.name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    total, fetched = sum(stat.st_size for stat in listed.values()), 0
    with _locked(folder):
        missing = {name: stat for name, stat in listed.items() if not _is_there(folder, name, stat)}
        _refuse_a_full_disk(address, folder, sum(stat.st_size for stat in missing.values()))
        for name in sorted(missing, key=lambda name: (not name.endswith(DATA_PARAMS_FILE), name)):
            for size in _fetch(address / name, folder / name, missing[name]):
                fetched += size
                yield Progress(fetched, sum(s.st_size for s in missing.values()), name)
    return Staged(folder=folder, files=len(listed), bytes=total, fetched=fetched)


def _listed(address: RemotePath) -> dict[str, Stat]:
    found: dict[str, Stat] = {}
    for path, stat in address.objects():
        name = str(path.relative_to(address))
        is_record = any(fnmatchcase(path.name, pattern) for pattern in RECORDS)
        if (
            name.count("/") < 2
            and path.name[0] != "."
            and (is_record or path.name == DATA_PARAMS_FILE)
        ):
            found[name] = stat
    if not any(not name.endswith(DATA_PARAMS_FILE) for name in found):
        what = "is a file" if address.is_file() else f"holds no {' or '.join(RECORDS)}"
        raise UsageError(
            f"{address}: {what}, expected a folder of training records",
            hint=f"make them with `gptj data … --out {address}`",
        )
    return found


def _is_there(folder: Path, name: str, stat: Stat) -> bool:
    path = folder / name
    return path.is_file() and path.stat().st_size == stat.st_size


def _refuse_a_full_disk(address: RemotePath, folder: Path, needed: int) -> None:
    if needed > (free := shutil.disk_usage(folder).free):
        raise FileFault(
            f"{address}: {needed / 1e9:.2f} GB of records are to be copied to {folder.parent}, "
            f"where {free / 1e9:.2f} GB are free",
            hint="free some space there, or name a folder on another disk with XDG_CACHE_HOME",
        )


def _fetch(source: RemotePath, path: Path, stat: Stat) -> Iterator[int]:
    """Copy one object, and yield the size of each piece; the file appears once it is complete."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    digest, size = hashlib.sha256(), 0
    with source.open() as file, partial.open("wb") as copy:
        while piece := file.read(BLOCK):
            copy.write(piece)
            digest.update(piece)
            size += len(piece)
            yield len(piece)
    if size != stat.st_size:
        raise changed(str(source))
    stated = (stated_files(path.parent) or {}).get(path.name)
    if stated and stated.sha256 != digest.hexdigest():
        partial.unlink()
        raise FileFault(
            f"{source}: has the SHA-256 {digest.hexdigest()[:16]}…, {DATA_PARAMS_FILE} states "
            f"{stated.sha256[:16]}…",
            hint="make the records again, or upload them again",
        )
    sync(partial)
    partial.rename(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for other processes that fill the same folder: workers of one run do so together."""
    with folder.with_name(f"{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

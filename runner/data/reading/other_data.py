"""What is there where records were expected, in words, with the next command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from gptj_model.errors import UsageError
from runner.data.reading.data_params import SHARD_FOLDERS

PATTERN = "*.tfrecord*"
#: Suffix of a file that lists record files.
INDEX_SUFFIX = ".index"
DATA_HINT = (
    "make records with `gptj data text SRC… --tokenizer DIR --max-sequence-length N --out data`"
)
_HDF5 = (".h5", ".hdf5")
_TEXTS = (".txt", ".jsonl", ".zst", ".gz", ".parquet", ".csv", ".tsv", ".md")
_TOKENS = (".bin", ".idx", ".npy", ".mds", ".arrow")


def not_a_folder(path: Path) -> UsageError:
    """Return the error for a `data_dir` that is missing, or a file."""
    expected = f"expected a folder of {PATTERN}"
    if not path.exists():
        return UsageError(f"{path}: not found, {expected}", hint=DATA_HINT)
    kind = _kind(path)
    hint = {
        "a record file": f"set data_dir to {path.parent}, whose {PATTERN} are all read",
    }.get(kind)
    return UsageError(f"{path}: is {kind}, {expected}", hint=hint or _hint([path]) or DATA_HINT)


def no_records(folders: Iterable[str]) -> UsageError:
    """Return the error for folders without a record file."""
    named = list(folders)
    deeper = sorted({p.parent for f in named for p in Path(f).glob(f"*/{PATTERN}")})
    files = [p for f in named for p in Path(f).iterdir() if p.is_file() and p.name[0] != "."]
    counts = Counter(p.suffix or "without a suffix" for p in files).most_common(3)
    found = ", ".join(f"{count} {suffix}" for suffix, count in counts) or "no files"
    hint = f"set data_dir to {', '.join(map(str, deeper))}" if deeper else _hint(files)
    if shards := [p.parent for p in deeper if p.match(SHARD_FOLDERS)]:
        hint = f"join the shards with `gptj data merge {shards[0]} --out data`"
    return UsageError(
        f"{', '.join(named)}: holds no {PATTERN}, expected training records; it holds {found}",
        hint=hint or DATA_HINT,
    )


def _kind(path: Path) -> str:
    if path.match(PATTERN):
        return "a record file"
    if path.suffix in _HDF5:
        return "an HDF5 file"
    return "a file"


def _hint(files: Iterable[Path]) -> str | None:
    """Return what makes records of files of another kind, where it is known."""
    suffixes = {p.suffix for p in files}
    if suffixes & {*_HDF5}:
        return (
            "HDF5 records are for the CS client; make TFRecords of the same texts with "
            "`gptj data … --format tfrecord`"
        )
    if suffixes & {*_TOKENS}:
        return "token files of other programs are not read; " + DATA_HINT
    if suffixes & {*_TEXTS}:
        return DATA_HINT.replace("SRC…", str(next(iter(files)).parent))
    return None

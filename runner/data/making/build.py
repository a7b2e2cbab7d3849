"""From sources to a folder of records that appears when it is complete.

    read → chunks → encode, in processes → assemble examples → record files → data_params.json

Each finished record file is noted in a journal, with the place in the sources where the next one
begins; an interrupted run is gone on with from there, and the result is the same to the byte.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gptj_convert.conversion.journal import JOURNAL_FILE, Journal, read_journal
from gptj_convert.files.digest import digest
from gptj_convert.files.output_file import FULL
from gptj_convert.files.output_folder import (
    PartialFolder,
    has_partial_content,
    output_folder,
    partial_path,
    remove_partial,
    sync,
)
from gptj_model import __version__
from gptj_model.errors import DataFault, FileFault, UsageError
from runner.data.making.encoding import Encoded, Encoder, Encoding, chunks
from runner.data.making.sources import Part, Problem, Reading, read
from runner.data.reading.data_params import PARAMS_FILE, read_params
from runner.data.reading.hdf5 import Hdf5Writer
from runner.data.reading.records import RecordWriter

TFRECORD, HDF5 = "tfrecord", "hdf5"
EXTENSIONS = {TFRECORD: "tfrecord", HDF5: "h5"}
#: Of the places of bad documents, how many are kept.
_PLACES = 100


class Assembler(Protocol):
    """What makes examples of what the encoder gives."""

    @property
    def left(self) -> int:
        """Units that are not in an example yet."""
        ...

    def add(self, units: np.ndarray) -> None:
        """Append."""
        ...

    def cut(self, most: int) -> np.ndarray:
        """Examples, int32 of shape (examples, 3, tokens): as many as there are, up to `most`."""
        ...

    def finish(self) -> np.ndarray:
        """The examples that only the end of the sources makes possible."""
        ...


class Recipe(Protocol):
    """What distinguishes one kind of data from another."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """All that the records depend on beside the sources, for JSON."""
        ...

    @property
    def length(self) -> int:
        """max_sequence_length."""
        ...

    def reading(self, spool: Path) -> Reading:
        """How the sources are read."""
        ...

    def encoder(self, split: str) -> Callable[[], Encoder]:
        """What makes the encoder for train, val, test, or ""; it is sent to processes."""
        ...

    def assembler(self, made: int) -> Assembler:
        """A new one, after so many examples."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How records are written."""

    format: str = TFRECORD
    compress: bool = False
    """TFRecords only: with gzip."""
    examples_per_file: int = 8192
    write_remainder: bool = True
    """Also the file that does not get full."""
    skip_bad: bool = False
    """Count bad documents and go on, instead of stopping at the first."""


@dataclass(slots=True)
class Counts:
    """What went in and what came out."""

    documents: int = 0
    skipped: int = 0
    """Bad ones."""
    left_out: dict[str, int] = field(default_factory=dict)
    """By a rule, by its name."""
    bytes: int = 0
    """Of text, in UTF-8."""
    tokens: int = 0
    """Of the text, without padding."""
    examples: int = 0
    files: int = 0
    places: list[str] = field(default_factory=list)
    """Where the first bad ones are, and what is wrong with them."""

    def add(self, encoded: Encoded) -> None:
        """Count a chunk."""
        self.documents += encoded.documents
        self.skipped += len(encoded.problems)
        self.bytes += encoded.bytes
        self.tokens += encoded.tokens
        for rule, count in encoded.left_out.items():
            self.left_out[rule] = self.left_out.get(rule, 0) + count
        room = _PLACES - len(self.places)
        self.places += map(str, encoded.problems[: max(room, 0)])


@dataclass(frozen=True, slots=True)
class Written:
    """A record file that is on the disk, and where the next one begins."""

    folder: str
    name: str
    bytes: int
    sha256: str
    examples: int
    chunk: int
    """The number of the chunk that the next example begins in."""
    consumed: int
    """Units of that chunk that are written already."""
    counts: dict[str, Any]
    """As they were before that chunk; when `last`, at the end."""
    last: bool = False
    """Nothing of the part is left."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Progress: bytes of the files read, of how many, and what they gave in this run."""

    part: str
    """That is at work, by its folder."""
    done: int
    total: int
    documents: int
    tokens: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Skipped:
    """A bad document that was left out."""

    problem: Problem


@dataclass(frozen=True, slots=True)
class Result:
    """What is in the output, by folder; the one without a name is the output itself."""

    counts: dict[str, Counts]
    kept_files: int = 0
    """That an interrupted run had written."""


def build(
    parts: Sequence[Part],
    recipe: Recipe,
    out: Path,
    options: Options,
    *,
    processes: int = 1,
    resume: bool = False,
    force: bool = False,
) -> Generator[Packing | Skipped | Result, None, None]:
    """Write records to a new folder `out`; yields progress, and the result last.

    Args:
        parts: what is read, and where in `out` its records go.
        recipe: what becomes of them.
        out: the folder.
        options: how.
        processes: that encode; the records do not depend on it.
        resume: go on with what was interrupted; a complete `out` of the same job is left.
        force: replace an existing `out`, and begin anew what was interrupted.

    Raises:
        UsageError: `out` exists, or an interrupted run is there, and neither option is given; or
            that run was another job.
        DataFault: a document is bad (file and line), or there is none.
        FileFault: a source has changed since.
        OSError: reading or writing fails.
    """
    job = _job(parts, recipe, options)
    path = partial_path(out) / JOURNAL_FILE
    found = read_journal(path, Written)
    if resume and not has_partial_content(out) and (complete := _complete(out, job)):
        remove_partial(out)
        yield Result(complete, kept_files=sum(c.files for c in complete.values()))
        return
    replaces = force or bool(resume and found and found.job["force"])
    with output_folder(out, force=replaces, fresh=False) as staging:
        found = None if force else read_journal(path, Written)
        if found:
            staging.resumable = True
            _check_job(found.job, job, out, resume=resume)
            job, good = found.job, _good(staging, found.parts)
        else:
            staging.clear()
            job, good = job | {"force": force}, []
        with closing(Journal(path, job, good)) as journal:
            _remove_others(staging, good)
            counts: dict[str, Counts] = {}
            try:
                yield from _write(parts, recipe, options, staging, journal, processes, counts)
            except DataFault:
                journal.parts.clear()  # going on would end the same way
                raise
            finally:
                staging.resumable = bool(journal.parts)
    yield Result(counts, kept_files=len(good))


def is_resumable(out: Path) -> bool:
    """Whether an interrupted run can be gone on with."""
    return read_journal(partial_path(out) / JOURNAL_FILE, Written) is not None


@dataclass(frozen=True, slots=True)
class _Done:
    """Bytes read of a part's files, and what a chunk gave."""

    bytes: int
    encoded: Encoded


def _write(
    parts: Sequence[Part],
    recipe: Recipe,
    options: Options,
    staging: PartialFolder,
    journal: Journal[Written],
    processes: int,
    counts: dict[str, Counts],
) -> Iterator[Packing | Skipped]:
    clock = _Clock(sum(_size(part.files) for part in parts))
    before = 0
    for part in parts:
        work = _Work(part, recipe, options, staging, journal)
        for event in work.run(processes):
            yield clock.tell(part.folder, before, event) if isinstance(event, _Done) else event
        before += _size(part.files)
        counts[part.folder] = work.counts
        _write_params(staging.content / part.folder, journal.job, part, work)


class _Clock:
    def __init__(self, total: int) -> None:
        self._total = total
        self._begun = time.monotonic()
        self._documents = self._tokens = self._bytes = 0

    def tell(self, part: str, before: int, done: _Done) -> Packing:
        self._documents += done.encoded.documents
        self._tokens += done.encoded.tokens
        self._bytes += done.encoded.bytes
        seconds = time.monotonic() - self._begun
        return Packing(
            part,
            before + done.bytes,
            self._total,
            self._documents,
            self._tokens,
            self._bytes,
            seconds,
        )


class _Work:
    """One part's records being written."""

    def __init__(
        self,
        part: Part,
        recipe: Recipe,
        options: Options,
        staging: PartialFolder,
        journal: Journal[Written],
    ) -> None:
        self._part = part
        self._recipe = recipe
        self._options = options
        self._staging = staging
        self._folder = staging.content / part.folder
        self._journal = journal
        self.written = [w for w in journal.parts if w.folder == part.folder]
        last = self.written[-1] if self.written else None
        self.counts = Counts(**last.counts) if last else Counts()
        self._first = last.chunk if last else 0
        self._skip = last.consumed if last else 0
        self._complete = bool(last and last.last)
        self._made = sum(w.examples for w in self.written)
        self._writer: RecordWriter | Hdf5Writer | None = None
        self._in_file = 0

    def run(self, processes: int) -> Iterator[_Done | Skipped]:
        if not self._complete:
            self._folder.mkdir(exist_ok=True)
            try:
                yield from self._write(processes)
            finally:
                if self._writer:
                    self._writer.discard()
                    self._partial(self._path).unlink(missing_ok=True)
        self.counts.examples, self.counts.files = self._made, len(self.written)
        if not self._made:
            raise DataFault(
                f"{', '.join(map(str, self._part.files[:3]))}: gave no example of "
                f"{self._recipe.length} tokens",
                hint="name other files, or a smaller --max-sequence-length",
            )

    def _write(self, processes: int) -> Iterator[_Done | Skipped]:
        done = 0

        def tell(bytes_read: int) -> None:
            nonlocal done
            done = bytes_read

        assembler = self._recipe.assembler(self._made)
        items = read(self._part.files, self._recipe.reading(self._staging.root), tell)
        todo = islice(chunks(items), self._first, None)
        skip, end = self._skip, self._first
        with Encoding(self._recipe.encoder(self._part.split), processes) as encoding:
            for number, encoded in enumerate(encoding.map(todo), start=self._first):
                end = number + 1
                for problem in encoded.problems:
                    if not self._options.skip_bad:
                        raise DataFault(
                            str(problem), hint="mend it, or leave such out with `--on-error skip`"
                        )
                    yield Skipped(problem)
                before = asdict(self.counts)
                self.counts.add(encoded)
                assembler.add(encoded.units[skip:])
                skip = 0
                while len(block := assembler.cut(self._room)):
                    self._append(block)
                    if not self._room:
                        self._close(number, len(encoded.units) - assembler.left, before)
                yield _Done(done, encoded)
        if len(block := assembler.finish()):
            self._append(block)
        if self._writer and self._options.write_remainder:
            self._close(end, 0, asdict(self.counts), last=True)

    @property
    def _room(self) -> int:
        return self._options.examples_per_file - self._in_file

    def _append(self, block: np.ndarray) -> None:
        with _faults(self._folder):
            self._writer = self._writer or self._open()
            self._writer.write(block)
        self._in_file += len(block)

    def _open(self) -> RecordWriter | Hdf5Writer:
        self._path = self._folder / self._file_name(len(self.written))
        partial = self._partial(self._path)
        if self._options.format == HDF5:
            return Hdf5Writer(partial, self._recipe.length)
        return RecordWriter(partial, compress=self._options.compress)

    @staticmethod
    def _partial(path: Path) -> Path:
        return path.with_name(f".{path.name}.partial")

    def _file_name(self, number: int) -> str:
        extension = EXTENSIONS[self._options.format] + (".gz" if self._options.compress else "")
        return f"records-{number:05d}.{extension}"

    def _close(
        self, chunk: int, consumed: int, counts: dict[str, Any], *, last: bool = False
    ) -> None:
        assert self._writer
        path = self._path
        with _faults(path):
            self._writer.close()
        self._writer = None
        self._partial(path).rename(path)
        size, sha256 = path.stat().st_size, digest(path)
        entry = Written(
            self._part.folder, path.name, size, sha256, self._in_file, chunk, consumed, counts, last
        )
        self._journal.add(entry)
        self.written.append(entry)
        self._made += self._in_file
        self._in_file = 0


def _job(parts: Sequence[Part], recipe: Recipe, options: Options) -> dict[str, Any]:
    """What is to be done, for JSON."""
    try:
        sources = {
            part.folder: {str(p): [(s := p.stat()).st_size, s.st_mtime_ns] for p in part.files}
            for part in parts
        }
    except OSError as e:
        raise FileFault(f"{e.filename}: cannot be read: {e.strerror}") from None
    how = asdict(options)
    return {"arguments": {**recipe.arguments, **how}, "sources": sources}


def _check_job(found: Mapping[str, Any], job: Mapping[str, Any], out: Path, *, resume: bool):
    if not resume:
        raise UsageError(
            f"{out}: an interrupted run has left its work",
            hint="go on with it with --resume, or begin anew with --force",
        )
    if found["arguments"] != job["arguments"] or {
        folder: list(files) for folder, files in found["sources"].items()
    } != {folder: list(files) for folder, files in job["sources"].items()}:
        raise UsageError(
            f"{out}: what was interrupted is another one, of other sources or options",
            hint="give the same arguments as then, or begin anew with --force",
        )
    for folder, files in job["sources"].items():
        for path, state in files.items():
            if list(state) != found["sources"][folder][path]:
                raise FileFault(
                    f"{path}: has changed since the run was interrupted",
                    hint="begin anew with --force",
                )


def _complete(out: Path, job: Mapping[str, Any]) -> dict[str, Counts] | None:
    """The counts of a finished job's folder; None when it is not this job's."""
    counts = {}
    for folder, files in job["sources"].items():
        params = read_params(out / folder)
        sizes = {path: size for path, (size, _) in files.items()}
        if not params or (params["arguments"], params["sources"]) != (job["arguments"], sizes):
            return None
        counts[folder] = Counts(**params["counts"])
    return counts


def _good(staging: PartialFolder, written: Iterable[Written]) -> list[Written]:
    """What is there as it was noted, up to the first that is not."""
    good: list[Written] = []
    for entry in written:
        path = staging.content / entry.folder / entry.name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            break
        if digest(path) != entry.sha256:
            break
        good.append(entry)
    return good


def _remove_others(staging: PartialFolder, good: Iterable[Written]) -> None:
    kept = {staging.content / e.folder / e.name for e in good}
    for path in staging.content.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()


def _write_params(folder: Path, job: Mapping[str, Any], part: Part, done: _Work) -> None:
    """Keep arguments, counts and digests beside the records, and the folder's names durable."""
    values = {
        "arguments": job["arguments"],
        "sources": {path: size for path, (size, _) in job["sources"][part.folder].items()},
        "counts": asdict(done.counts),
        "files": {
            w.name: {"bytes": w.bytes, "sha256": w.sha256, "examples": w.examples}
            for w in done.written
        },
        "tool": {"name": "gptj", "version": __version__},
    }
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"
    (folder / PARAMS_FILE).write_text(text, encoding="utf-8")
    sync(folder / PARAMS_FILE)
    sync(folder)


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise FileFault(
            f"{path}: cannot be written: {e.strerror or e}",
            hint="free some space" if e.errno in FULL else None,
        ) from None


def _size(files: Iterable[Path]) -> int:
    return sum(p.stat().st_size for p in files)

"""Make a folder of records from sources; the folder appears once it is complete.

    read → chunks → encode, in processes → assemble examples → record files → data_params.json

A journal lists every finished record file with the place in the sources where the next one begins.
An interrupted run resumes from there, and its result is the same to the byte.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import __version__ as tokenizers_version

from gptj_convert.files.digest import digest
from gptj_convert.files.journal import Journal
from gptj_convert.files.output_file import FULL
from gptj_convert.files.output_folder import PartialFolder
from gptj_convert.files.resumable_folder import has_journal, is_kept, resumable_folder
from gptj_convert.streams.progress import Progress, Work
from gptj_model import __version__
from gptj_model.errors import DataFault, FileFault, UsageError
from runner.data.making.documents.document import Reading
from runner.data.making.encoding import TOO_LONG, Chunk, Encoded, Encoder, Encoding, chunks
from runner.data.making.sources import Part, read
from runner.data.reading.data_params import MERGED, SHARD, read_params, write_params
from runner.data.reading.hdf5 import Hdf5Writer
from runner.data.reading.records import RecordWriter
from runner.data.remote.path import identity
from runner.data.tokenizing.backend import GIGATOKEN, Backend, backend_of

TFRECORD, HDF5 = "tfrecord", "hdf5"
EXTENSIONS = {TFRECORD: "tfrecord", HDF5: "h5"}
#: Largest number of malformed documents whose places are recorded.
_PLACES = 100
#: Difference between the numbers that two shards give their first examples.
_APART = 2**40
_SKIP_HINT = "fix the document, or skip it with `--on-error skip`"


class Assembler(Protocol):
    """Builds examples from the units that an encoder returns."""

    @property
    def left(self) -> int:
        """Number of units that are not in an example yet."""
        ...

    def add(self, units: np.ndarray) -> None:
        """Append units."""
        ...

    def cut(self, most: int) -> np.ndarray:
        """Return at most `most` complete examples, int32 of shape (examples, 3, tokens)."""
        ...

    def finish(self) -> np.ndarray:
        """Return the examples that remain at the end of the sources, in the same shape."""
        ...


class Recipe(Protocol):
    """Everything that distinguishes one kind of training data from another."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Everything that the records depend on besides the sources, as JSON values."""
        ...

    @property
    def length(self) -> int:
        """Number of tokens per example, max_sequence_length."""
        ...

    def reading(self, spool: Path) -> Reading:
        """Return how the sources are read, with `spool` as the folder for oversized documents."""
        ...

    def encoder(self, split: str) -> Callable[[], Encoder]:
        """Return a picklable factory of the encoder for a split: train, val, test or ""."""
        ...

    def assembler(self, made: int) -> Assembler:
        """Return a new assembler that continues after `made` examples."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Format and size of the record files, and the policy for malformed documents."""

    format: str = TFRECORD
    compress: bool = False
    """Compress TFRecord files with gzip."""
    examples_per_file: int = 8192
    write_remainder: bool = True
    """Write the last file even if it has fewer examples than the others."""
    skip_bad: bool = False
    """Skip and count malformed documents instead of stopping at the first."""


@dataclass(slots=True)
class Counts:
    """Numbers of documents, tokens, examples and files of one part."""

    documents: int = 0
    skipped: int = 0
    """Number of malformed documents that were skipped."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of documents that a rule left out, by the name of the rule."""
    cut: int = 0
    """Number of documents that were cut to the length of an example."""
    special_names: int = 0
    """Number of names of special tokens in the texts that were read as text."""
    shapes: dict[str, int] = field(default_factory=dict)
    """Number of documents by their shape, where documents have one."""
    bytes: int = 0
    """Size of the text in UTF-8."""
    tokens: int = 0
    """Number of tokens of the text, without padding."""
    examples: int = 0
    files: int = 0
    places: list[str] = field(default_factory=list)
    """Places of the first malformed documents, each with its problem."""

    def add(self, encoded: Encoded) -> None:
        """Add the counts of a chunk."""
        self.documents += encoded.documents
        self.skipped += sum(not problem.reason for problem in encoded.problems)
        self.cut += encoded.cut
        for shape, count in encoded.shapes.items():
            self.shapes[shape] = self.shapes.get(shape, 0) + count
        self.special_names += encoded.special_names
        self.bytes += encoded.bytes
        self.tokens += encoded.tokens
        rules = [problem.reason for problem in encoded.problems if problem.reason]
        for rule, count in [*encoded.left_out.items(), *((rule, 1) for rule in rules)]:
            self.left_out[rule] = self.left_out.get(rule, 0) + count
        room = _PLACES - len(self.places)
        self.places += map(str, encoded.problems[: max(room, 0)])


def add_up(parts: Iterable[Counts]) -> Counts:
    """Return the sums of all counts, and the first places."""
    total = Counts()
    for counts in parts:
        for name, value in asdict(counts).items():
            mine = getattr(total, name)
            if isinstance(value, dict):
                for rule, count in value.items():
                    mine[rule] = mine.get(rule, 0) + count
            elif isinstance(value, list):
                mine.extend(value[: _PLACES - len(mine)])
            else:
                setattr(total, name, mine + value)
    return total


@dataclass(frozen=True, slots=True)
class RecordFile:
    """Journal entry of a complete record file, with the place where the next file begins."""

    folder: str
    name: str
    bytes: int
    sha256: str
    examples: int
    chunk: int
    """Number of the chunk that the next example begins in."""
    consumed: int
    """Number of units of that chunk that are already written."""
    counts: dict[str, Any]
    """Counts before that chunk, or final counts if `last`."""
    last: bool = False
    """Whether the part is complete."""


@dataclass(frozen=True, slots=True)
class BuildResult:
    """Counts by folder of the output; the empty name stands for the output folder itself."""

    counts: dict[str, Counts]
    kept_files: int = 0
    """Number of record files reused from an interrupted run."""


def build(
    parts: Sequence[Part],
    recipe: Recipe,
    out: Path,
    options: Options,
    *,
    processes: int | None = 1,
    resume: bool = False,
    force: bool = False,
    shard: Mapping[str, Any] | None = None,
) -> Work[BuildResult]:
    """Write records to a new folder `out`; progress is in bytes of the sources.

    Args:
        parts: source files, each part with the folder of `out` that its records go to.
        recipe: kind of data to make.
        out: folder to create.
        options: format of the record files and policy for malformed documents.
        processes: number of processes that encode; the records do not depend on it. None leaves
            it to the recipe's encoder; see `Encoding`.
        resume: resume an interrupted run; a complete `out` of the same job is left as it is.
        force: replace an existing `out`, and discard an interrupted run.
        shard: facts of the shard that `parts` are; see `shards.facts`. A shard may have no
            example.

    Raises:
        UsageError: `out` or an interrupted run exists and neither `resume` nor `force` is given,
            or the interrupted run was another job.
        DataFault: a document is malformed (with file and line), or a part has no example.
        FileFault: a source has changed since the interrupted run.
        OSError: reading or writing fails.
    """
    job = _job(parts, recipe, options, shard)
    complete: dict[str, Counts] = {}
    if is_kept(out, resume=resume, is_complete=lambda: _is_complete(out, job, complete)):
        return _kept(complete)
    check = partial(_check_job, job=job, out=out)
    with resumable_folder(
        out, job, RecordFile, resume=resume, force=force, check=check, keep=_keep_good
    ) as (staging, journal):
        kept = len(journal.parts)
        try:
            counts = yield from _write(parts, recipe, options, staging, journal, processes)
        except DataFault:
            journal.parts.clear()  # a resumed run would fail in the same way
            raise
    return BuildResult(counts, kept_files=kept)


def find_complete(
    parts: Sequence[Part],
    recipe: Recipe,
    out: Path,
    options: Options,
    shard: Mapping[str, Any] | None = None,
) -> BuildResult | None:
    """Return the result of a build whose data_params.json files are in `out`, or None if there is
    none, or one of another job."""
    complete: dict[str, Counts] = {}
    job = _job(parts, recipe, options, shard)
    return _kept(complete) if _is_complete(out, job, complete) else None


def _kept(complete: dict[str, Counts]) -> BuildResult:
    return BuildResult(complete, kept_files=sum(c.files for c in complete.values()))


def is_resumable(out: Path) -> bool:
    """Return whether an interrupted run exists that can be resumed."""
    return has_journal(out, RecordFile)


@dataclass(frozen=True, slots=True)
class _Done:
    """Bytes read of a part's files so far, and the result of one chunk."""

    bytes: int
    encoded: Encoded


def _write(
    parts: Sequence[Part],
    recipe: Recipe,
    options: Options,
    staging: PartialFolder,
    journal: Journal[RecordFile],
    processes: int | None,
) -> Work[dict[str, Counts]]:
    clock = _Clock(sum(part.bytes for part in parts))
    counts: dict[str, Counts] = {}
    before = 0
    for part in parts:
        work = _PartWriter(part, recipe, options, staging, journal)
        for done in work.run(processes):
            yield clock.progress(part.folder, before, done)
        before += part.bytes
        counts[part.folder] = work.counts
        folder = staging.content / part.folder
        _write_params(folder, journal.job, part, work, backend_of(recipe))
    return counts


class _Clock:
    """Turns what was encoded into progress, with the rates of this run."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._begun = time.monotonic()
        self._documents = self._tokens = self._bytes = 0

    def progress(self, part: str, before: int, done: _Done) -> Progress:
        self._documents += done.encoded.documents
        self._tokens += done.encoded.tokens
        self._bytes += done.encoded.bytes
        seconds = max(time.monotonic() - self._begun, 1e-3)
        documents, tokens = self._documents / seconds, self._tokens / seconds
        rates = f"{documents:,.0f} documents/s, {tokens:,.0f} tokens/s, "
        rates += f"{self._bytes / seconds / 1e6:.1f} MB/s"
        what = f"{part}: {rates}" if part else rates
        return Progress(before + done.bytes, self._total, what)


class _PartWriter:
    """Writes the records of one part."""

    def __init__(
        self,
        part: Part,
        recipe: Recipe,
        options: Options,
        staging: PartialFolder,
        journal: Journal[RecordFile],
    ) -> None:
        self._part = part
        self._recipe = recipe
        self._options = options
        self._staging = staging
        self._folder = staging.content / part.folder
        self._journal = journal
        self._shard: Mapping[str, Any] | None = journal.job.get(SHARD)
        self.written = [w for w in journal.parts if w.folder == part.folder]
        last = self.written[-1] if self.written else None
        self.counts = Counts(**last.counts) if last else Counts()
        self._first = last.chunk if last else 0
        self._skip = last.consumed if last else 0
        self._complete = bool(last and last.last)
        self._made = sum(w.examples for w in self.written)
        self._writer: RecordWriter | Hdf5Writer | None = None
        self._in_file = 0

    def run(self, processes: int | None) -> Iterator[_Done]:
        if not self._complete:
            self._folder.mkdir(exist_ok=True)
            try:
                yield from self._write(processes)
            finally:
                if self._writer:
                    self._writer.discard()
                    self._partial(self._path).unlink(missing_ok=True)
        self.counts.examples, self.counts.files = self._made, len(self.written)
        if not self._made and self._shard is None:
            raise self._nothing()

    def _nothing(self) -> DataFault:
        where = ", ".join(map(str, self._part.files[:3]))
        reasons = self.counts.left_out | (
            {"malformed": self.counts.skipped} if self.counts.skipped else {}
        )
        if reasons:
            why = ", ".join(f"{count:,} {rule}" for rule, count in sorted(reasons.items()))
            why += f", such as {self.counts.places[0]}" if self.counts.places else ""
            hint = "choose a larger --max-sequence-length" if TOO_LONG in reasons else None
            return DataFault(f"{where}: every document was left out: {why}", hint=hint)
        return DataFault(
            f"{where}: too little text for one example of {self._recipe.length} tokens",
            hint="name more files, or choose a smaller --max-sequence-length",
        )

    def _write(self, processes: int | None) -> Iterator[_Done]:
        done = 0

        def tell(bytes_read: int) -> None:
            nonlocal done
            done = bytes_read

        places: deque[int] = deque()  # bytes read at the end of each chunk that is being encoded

        def noted(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
            for chunk in chunks:
                places.append(done)
                yield chunk

        # Random choices go by the number of the example, so shards number theirs apart.
        number = _APART * self._shard["index"] if self._shard else 0
        assembler = self._recipe.assembler(number + self._made)
        reading = self._recipe.reading(self._staging.root)
        items = read(self._part.files, reading, tell, self._part.ranges)
        todo = noted(islice(chunks(items), self._first, None))
        skip, end = self._skip, self._first
        with Encoding(self._recipe.encoder(self._part.split), processes) as encoding:
            for number, encoded in enumerate(encoding.map(todo), start=self._first):
                end = number + 1
                for problem in encoded.problems:
                    if not self._options.skip_bad:
                        raise DataFault(str(problem), hint=problem.hint or _SKIP_HINT)
                before = asdict(self.counts)
                self.counts.add(encoded)
                assembler.add(encoded.units[skip:])
                skip = 0
                while len(block := assembler.cut(self._room)):
                    self._append(block)
                    if not self._room:
                        self._close(number, len(encoded.units) - assembler.left, before)
                yield _Done(places.popleft(), encoded)
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
        entry = RecordFile(
            self._part.folder, path.name, size, sha256, self._in_file, chunk, consumed, counts, last
        )
        self._journal.add(entry)
        self.written.append(entry)
        self._made += self._in_file
        self._in_file = 0


def _job(
    parts: Sequence[Part], recipe: Recipe, options: Options, shard: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return arguments, sources and shard of the build as JSON values."""
    try:
        sources = {part.folder: {str(p): list(identity(p)) for p in part.files} for part in parts}
    except OSError as e:
        raise FileFault(f"{e.filename}: cannot be read: {e.strerror}") from None
    how = asdict(options)
    arguments = {**recipe.arguments, **how}
    job = {"arguments": arguments, "sources": sources, "tokenizers": tokenizers_version}
    if shard:
        ranges = {p.folder: {str(f): list(r) for f, r in p.ranges.items()} for p in parts}
        job |= {SHARD: dict(shard), "ranges": ranges}
    return job


def _shard_of(job: Mapping[str, Any], folder: str) -> dict[str, Any] | None:
    """Return what data_params.json states of the shard in a folder, or None without shards."""
    return {**job[SHARD], "ranges": job["ranges"][folder]} if SHARD in job else None


def _is_same_shard(found: Mapping[str, Any] | None, expected: Mapping[str, Any] | None) -> bool:
    """Return whether two shards read the same, wherever their numbers come from."""
    if not found or not expected:
        return found == expected
    return {**found, "from": None} == {**expected, "from": None}


def _check_job(found: Mapping[str, Any], *, job: Mapping[str, Any], out: Path) -> None:
    if (
        found["arguments"] != job["arguments"]
        or {folder: list(files) for folder, files in found["sources"].items()}
        != {folder: list(files) for folder, files in job["sources"].items()}
        or any(
            not _is_same_shard(_shard_of(found, folder), _shard_of(job, folder))
            for folder in job["sources"]
        )
    ):
        raise UsageError(
            f"{out}: the interrupted run has other sources or options",
            hint="repeat its arguments, or start from scratch with --force",
        )
    # Its edition of Unicode determines the words that a text is split into.
    if (before := found.get("tokenizers", tokenizers_version)) != tokenizers_version:
        raise UsageError(
            f"{out}: the interrupted run has tokens of tokenizers {before}, found version "
            f"{tokenizers_version}",
            hint=f"run `pip install tokenizers=={before}`, or start from scratch with --force",
        )
    for folder, files in job["sources"].items():
        for path, state in files.items():
            if list(state) != found["sources"][folder][path]:
                raise FileFault(
                    f"{path}: has changed since the run was interrupted",
                    hint="start from scratch with --force",
                )


def _is_complete(out: Path, job: Mapping[str, Any], counts: dict[str, Counts]) -> bool:
    """Return whether `out` is the complete result of `job`; add the counts of each folder."""
    for folder, files in job["sources"].items():
        params = read_params(out / folder)
        sizes = {path: size for path, (size, _) in files.items()}
        if not params or (params["arguments"], params["sources"]) != (job["arguments"], sizes):
            return False
        if MERGED in params or not _is_same_shard(params.get(SHARD), _shard_of(job, folder)):
            return False
        counts[folder] = Counts(**params["counts"])
    return True


def _keep_good(staging: PartialFolder, written: Iterable[RecordFile]) -> list[RecordFile]:
    """Return the entries of the journal up to the first whose file is missing or differs, and
    delete all other files."""
    good: list[RecordFile] = []
    for entry in written:
        path = staging.content / entry.folder / entry.name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            break
        if digest(path) != entry.sha256:
            break
        good.append(entry)
    kept = {staging.content / e.folder / e.name for e in good}
    for path in staging.content.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
    return good


def _write_params(
    folder: Path, job: Mapping[str, Any], part: Part, done: _PartWriter, backend: Backend
) -> None:
    """Write data_params.json beside the records, and sync the file and its folder."""
    values = {
        "arguments": job["arguments"],
        "sources": {path: size for path, (size, _) in job["sources"][part.folder].items()},
        "counts": asdict(done.counts),
        "files": {
            w.name: {"bytes": w.bytes, "sha256": w.sha256, "examples": w.examples}
            for w in done.written
        },
        "tool": {"name": "gptj", "version": __version__},
        "tokenizer_backend": {"name": backend.name, "version": backend.version}
        | ({"why": f"{GIGATOKEN} is not used: {backend.why}"} if backend.why else {}),
        "tokenizers": tokenizers_version,
    }
    if shard := _shard_of(job, part.folder):
        values[SHARD] = shard
    write_params(folder, values)


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise FileFault(
            f"{path}: cannot be written: {e.strerror or e}",
            hint="free some disk space" if e.errno in FULL else None,
        ) from None

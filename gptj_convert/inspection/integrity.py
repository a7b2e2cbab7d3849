"""Integrity of a checkpoint: its files and tensors against recorded sizes, hashes and checksums.

Recorded are sizes and digests in a converted folder's manifest.json or a download's record, digests
in a model's signature, crc32c of tensors in the manifest and in a bundle's index, and CRC32s in a
`.bin` archive.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gptj_convert.conversion.manifest import EDITED_FILES, MANIFEST_FILE, Manifest
from gptj_convert.files.digest import GIT, SHA256, FileDigest
from gptj_convert.formats.containers import sharded
from gptj_convert.formats.containers.leveldb_table import unmasked
from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_convert.formats.containers.torch_checkpoint import TorchCheckpointSource
from gptj_convert.hub.download import RECORD_FILE, read_record
from gptj_convert.inspection.inspect import Inspection
from gptj_convert.inspection.signature import (
    SIGNATURE_FILE,
    Signer,
    read_statement,
    verify_signer,
)
from gptj_convert.streams.progress import Progress, Work
from gptj_convert.streams.strips import Panels
from gptj_model.errors import FileFault, UsageError
from gptj_model.op import Op
from gptj_model.source import TensorSource
from gptj_model.tensors import Scheme

BUNDLE_INDEX = "the bundle's index"
ARCHIVE = "the .bin archive"

_WORDS = {SHA256: "SHA-256", GIT: "git blob"}


class StatedFile:
    """A file with a recorded size, if any, and digest (in hex, of a kind of
    `gptj_convert.files.digest`).

    Iterating reads the file and yields the size of each piece. Afterwards `fault` is None, or what
    was found and what was expected.
    """

    def __init__(self, path: Path, size: int | None, digest: str, kind: str = SHA256) -> None:
        self.path = path
        self.size = size
        self.fault: tuple[str, str] | None = None
        self._digest = digest
        self._kind = kind

    def __iter__(self) -> Iterator[int]:
        try:
            found = f"{self.path.stat().st_size} bytes"
            if not self.path.is_file():
                found = "not a file"
            elif self.size in (None, self.path.stat().st_size):
                read = FileDigest(self.path, self._kind)
                yield from read
                if read.hex == self._digest:
                    return
                found += f", {_WORDS[self._kind]} {read.hex}"
        except OSError as e:
            found = e.strerror or str(e)
        size = "" if self.size is None else f"{self.size} bytes, "
        self.fault = found, f"{size}{_WORDS[self._kind]} {self._digest}"


def stated_checksums(
    source: TensorSource, name: str, manifest: Manifest | None, hf: str
) -> dict[str, int]:
    """Return the recorded crc32c values of a tensor, by who records them: a bundle's index and the
    manifest.

    Args:
        source: the checkpoint.
        name: name of the tensor in it.
        manifest: manifest in the checkpoint's folder.
        hf: HF name of the tensor, which the manifest uses.
    """
    stated: dict[str, int] = {}
    if isinstance(source, BundleSource):
        stated[BUNDLE_INDEX] = unmasked(source.entries[name].crc)
    if manifest and hf in manifest.tensors:
        stated[MANIFEST_FILE] = int(manifest.tensors[hf]["crc32c"], 16)
    return stated


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A file or tensor that differs from what is recorded."""

    kind: str
    """"file" or "tensor"."""
    name: str
    found: str
    expected: str
    stated_by: str


@dataclass(slots=True)
class Check:
    """Outcome of a check."""

    checked: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of files and tensors that were compared, by who records them."""
    mismatches: list[Mismatch] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    """Files in the folder that neither manifest nor record nor signature names."""
    signer: str | None = None
    """Whose signature model.sig has, where that was checked."""
    unknown_signer: bool = False
    """Whether there is a signature and nobody said whose it should be."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON object."""
        return {
            "checked": self.checked,
            "problems": [asdict(m) for m in self.mismatches],
            "extra": self.extra,
            "signer": self.signer,
        }

    def add(self, kind: str, name: str, fault: tuple[str, str] | None, stated_by: str) -> None:
        """Count a file or tensor that was compared; `fault` is what was found and what was
        expected."""
        self.checked.setdefault(stated_by, {"files": 0, "tensors": 0})[f"{kind}s"] += 1
        if fault:
            self.mismatches.append(Mismatch(kind, name, *fault, stated_by))


@dataclass(frozen=True, slots=True)
class _Work:
    """One item to read: iterating `pieces` fills the result and yields bytes that are done."""

    name: str
    size: int
    pieces: Iterator[int]


def check(path: Path, opened: Inspection | FileFault, signer: Signer | None = None) -> Work[Check]:
    """Compare a checkpoint with everything that is recorded about it; progress is in bytes.

    Args:
        path: folder, weight file, or prefix of a bundle.
        opened: the open checkpoint, or why it cannot be opened.
        signer: who must have signed the model; None does not ask.

    Raises:
        UsageError: nothing is recorded, there is no signature to compare a signer with, or the
            signer's key cannot be read.
        ModuleNotFoundError: the library that verifies signatures is not installed.
        FileFault: nothing is recorded and the checkpoint cannot be opened, or a device fails.
    """
    result = Check()
    folder = path if path.is_dir() else path.parent
    manifest = _read_manifest(path, folder, result)
    work = [
        *_signed(path, folder, signer, result),
        *_files(path, folder, manifest, result),
    ]
    if isinstance(opened, Inspection):
        work += _tensors(opened, manifest, result)
        work += _archives(opened, result)
    if not work and not result.mismatches:
        if isinstance(opened, FileFault):
            raise opened
        raise UsageError(
            f"{path}: holds no checksums, expected {MANIFEST_FILE}, {RECORD_FILE} or "
            f"{SIGNATURE_FILE} in {folder}, or checksums in the checkpoint itself",
            hint="compare it with another copy: `gptj inspect PATH --diff OTHER`",
        )
    if isinstance(opened, FileFault):
        unreadable = opened.message, "a checkpoint that can be read"
        result.add("file", path.name or str(path), unreadable, "its format")
    total, done = sum(w.size for w in work), 0
    for item in work:
        for piece in item.pieces:
            yield Progress(done := done + piece, total, item.name)
    return result


def _concerns(path: Path, names: Collection[str]) -> bool:
    """Return whether records of files with these names concern the checkpoint at `path`."""
    return path.is_dir() or any(name.startswith(path.name) for name in names)


def _signed(path: Path, folder: Path, signer: Signer | None, result: Check) -> list[_Work]:
    """Return the files that a signature lists; note those that it should list, and its signer."""
    signature = folder / SIGNATURE_FILE
    if not (path.is_dir() and signature.is_file()):
        if signer:
            raise UsageError(
                f"{path}: no {SIGNATURE_FILE} in this folder, expected one of {signer}",
                hint="fetch it from where the model came from, or leave out the signer",
            )
        return []
    try:
        statement = read_statement(signature)
    except FileFault as e:
        result.add("file", SIGNATURE_FILE, (e.message, "a model signature"), SIGNATURE_FILE)
        return []
    result.unknown_signer = not signer
    if signer:
        fault = verify_signer(signature, statement, signer)
        found = (
            (f"not signed by {signer}: {fault}", f"the signature of {signer}") if fault else None
        )
        result.add("file", SIGNATURE_FILE, found, SIGNATURE_FILE)
        result.signer = None if fault else str(signer)
    for name, found in statement.unsigned(folder):
        result.add("file", name, (found, "nothing"), SIGNATURE_FILE)
    stated = [StatedFile(folder / name, None, digest) for name, digest in statement.files.items()]
    return [_Work(f.path.name, _size(f.path), _file(f, SIGNATURE_FILE, result)) for f in stated]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _read_manifest(path: Path, folder: Path, result: Check) -> Manifest | None:
    try:
        manifest = Manifest.read(folder)
    except FileFault as e:
        result.add("file", MANIFEST_FILE, (e.message, "a manifest"), MANIFEST_FILE)
        return None
    return manifest if manifest and _concerns(path, manifest.files) else None


def _files(path: Path, folder: Path, manifest: Manifest | None, result: Check) -> list[_Work]:
    """Return the files that the manifest and a download's record name; note the others."""
    stated = [
        (MANIFEST_FILE, StatedFile(folder / name, file["bytes"], file["sha256"]))
        for name, file in (manifest.files if manifest else {}).items()
    ]
    record = read_record(folder)
    if record and _concerns(path, record.files):
        stated += [
            (RECORD_FILE, StatedFile(folder / name, file.size, file.hex, file.kind))
            for name, file in record.files.items()
        ]
    elif not record and (folder / RECORD_FILE).exists():
        fault = "cannot be read", "the record of a download"
        result.add("file", RECORD_FILE, fault, RECORD_FILE)
    if stated and path.is_dir():
        known = {
            MANIFEST_FILE,
            RECORD_FILE,
            SIGNATURE_FILE,
            *EDITED_FILES,
            *(f.path.relative_to(folder).parts[0] for _, f in stated),
        }
        result.extra += sorted({p.name for p in folder.iterdir()} - known)
    return [_Work(f.path.name, f.size or 0, _file(f, by, result)) for by, f in stated]


def _file(file: StatedFile, stated_by: str, result: Check) -> Iterator[int]:
    yield from file
    result.add("file", file.path.name, file.fault, stated_by)


def _tensors(opened: Inspection, manifest: Manifest | None, result: Check) -> list[_Work]:
    """Return the tensors whose checksums the manifest or the bundle's index records."""
    if manifest and not {p.name for p in opened.files} <= manifest.files.keys():
        manifest = None  # it describes another checkpoint in the folder
    present = {f.tensor.hf if f.tensor else f.name: f for f in opened.findings if f.info}
    # Without a config, the HF names of a bundle's tensors are unknown.
    if manifest and (opened.config or opened.scheme is Scheme.HF):
        for hf, stated in manifest.tensors.items():
            if hf not in present:
                fault = "missing", f"crc32c {stated['crc32c']}"
                result.add("tensor", hf, fault, MANIFEST_FILE)
    work = []
    for hf, finding in present.items():
        checksums = stated_checksums(opened.source, finding.name, manifest, hf)
        if checksums and finding.info:
            pieces = _tensor(opened.source, finding.name, checksums, result)
            work.append(_Work(finding.name, finding.info.nbytes, pieces))
    return work


def _tensor(
    source: TensorSource, name: str, stated: Mapping[str, int], result: Check
) -> Iterator[int]:
    panels = Panels(source, name, Op.COPY)
    for values in panels:
        yield values.nbytes
    for stated_by, crc in stated.items():
        differs = f"crc32c {panels.crc:08x}", f"crc32c {crc:08x}"
        result.add("tensor", name, None if crc == panels.crc else differs, stated_by)


def _archives(opened: Inspection, result: Check) -> list[_Work]:
    """Return the `.bin` files, which record a CRC32 of each storage."""
    archives = [
        p
        for p in opened.files
        if sharded.kind_of_content(p) == sharded.ARCHIVE and _has_checksums(p)
    ]
    return [_Work(p.name, p.stat().st_size, _archive(p, result)) for p in archives]


def _has_checksums(path: Path) -> bool:
    with closing(TorchCheckpointSource(path)) as archive:
        return archive.checksummed


def _archive(path: Path, result: Check) -> Iterator[int]:
    with closing(TorchCheckpointSource(path)) as archive:
        for size, fault in archive.crc_faults():
            yield size
            differs = (fault, "the CRC32 that it states") if fault else None
            result.add("tensor", path.name, differs, ARCHIVE)

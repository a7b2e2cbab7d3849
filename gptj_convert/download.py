"""Fetching a GPT-J from the Hugging Face hub: the files that are needed, and no others."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gptj_convert.digest import digest
from gptj_convert.file_name import is_file_name
from gptj_convert.formats.hf import GENERATION_FILE, TOKENIZER_FILES, WEIGHT_FILES
from gptj_convert.formats.sharded import MAX_INDEX_BYTES, is_index, parse_index
from gptj_convert.hub import (
    Unreachable,
    WrongContent,
    file_size,
    hub_faults,
    persist,
    transfer,
)
from gptj_convert.progress import Progress
from gptj_model.config import CONFIG_FILE
from gptj_model.errors import FileFault, HubFault, TensorFault, UsageError

#: Written last into a finished folder: what is in it, and from where.
RECORD_FILE = ".gptj-download.json"

_EXTRAS = (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES)
_OTHER_WEIGHTS = (".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".pt", ".bin", ".safetensors")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on the hub; `digest` is "sha256:…" or "git:…", its blob's name."""

    size: int
    digest: str

    @property
    def kind(self) -> str:
        """Of the digest, as `gptj_convert.digest` names it."""
        return self.digest.partition(":")[0]

    @property
    def hex(self) -> str:
        """The digest without its kind."""
        return self.digest.partition(":")[2]


@dataclass(frozen=True, slots=True)
class Listing:
    """One commit's files; `offline` when a finished folder's record stands in for the hub."""

    repository: str
    revision: str | None
    commit: str
    files: dict[str, RemoteFile]
    offline: bool = False

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(f.size for f in self.files.values())


def list_files(repository: str, revision: str | None, folder: Path) -> Listing:
    """Choose one set of weights and the small files beside it.

    Which shards are a set, only their index says: it is fetched for that.
    If the hub cannot be reached and `folder` holds the finished download, that is the answer.

    Raises:
        UsageError: no repository can have this name.
        HubFault: no network, no access, no such repository, or no weights that can be read.
        TensorFault: the index names shards that no checkpoint has, or that are not there.
    """
    from httpx2 import ConnectError
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import logging, validate_repo_id

    logging.set_verbosity_error()  # its warnings would stand between our own lines
    try:
        validate_repo_id(repository)
    except HFValidationError:
        hint = "expected OWNER/NAME, as in EleutherAI/gpt-j-6b"
        raise UsageError(f"{repository!r} is not a repository's name", hint=hint) from None

    def ask() -> Any:
        options = {"files_metadata": True, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
        return HfApi().model_info(repository, revision=revision, **options)

    try:
        with hub_faults(repository):
            # A refused connection does not mend in seconds, and a finished folder needs none.
            info = persist(ask, at_once=(ConnectError,))
        stated = {f.rfilename: f for f in info.siblings}
        if not re.fullmatch("[0-9a-f]{40}", info.sha):
            raise ValueError
    except Unreachable:
        if record := _finished(folder, repository, revision):
            return record
        raise
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _not_a_hub(repository) from None
    weights = next((name for name in WEIGHT_FILES if name in stated), None)
    if not weights or CONFIG_FILE not in stated:
        raise _unreadable(repository, list(stated))
    # Besides these, only names of shards that their index was checked for become paths.
    wanted = [name for name in (weights, *_EXTRAS) if name in stated]
    files = {name: _remote_file(stated[name], repository) for name in wanted}
    listing = Listing(repository, revision, info.sha, files)
    if is_index(weights):
        shards = _shards(listing, weights, folder, stated)
        files |= {name: _remote_file(stated[name], repository) for name in shards}
    return replace(listing, files=files)


def fetch(listing: Listing, folder: Path, report: Callable[[Progress], None]) -> int:
    """Bring `folder` to what is listed; returns the bytes that had to come.

    A file gets its name once it is whole; until then it is a part that the next run goes on with.

    Raises:
        UsageError: another file of that name is there that no download brought, or one that
            every reader prefers to the weights to come.
        FileFault: too little space, known before the first byte; or writing fails.
        HubFault: the transfer failed, or what arrives is not what the hub states.
    """
    if listing.offline:
        return 0
    weights = next(name for name in WEIGHT_FILES if name in listing.files)
    for other in WEIGHT_FILES[: WEIGHT_FILES.index(weights)]:
        if (folder / other).exists():
            raise UsageError(
                f"{folder / other}: is there and would be taken for the model, not {weights}, "
                "which is to come; it is left as it is",
                hint="choose another folder with --out, or delete the file",
            )
    record = read_record(folder)
    known = record.files if record else {}
    missing: dict[str, RemoteFile] = {}
    for name, remote in listing.files.items():
        report(Progress(0, listing.total, f"checking {name}"))
        if file_size(folder / name) != remote.size or (
            known.get(name) != remote and _digest(folder / name, remote) != remote.digest
        ):
            missing[name] = remote
            if (folder / name).exists() and name not in known:
                raise UsageError(
                    f"{folder / name}: exists already and is not the hub's; it is left as it is",
                    hint="choose another folder with --out, or delete the file",
                )
    needed = sum(f.size - (file_size(_part(folder, n, f)) or 0) for n, f in missing.items())
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    if needed > (free := shutil.disk_usage(existing).free):
        raise FileFault(
            f"{folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            hint="free some space, or name a folder on another disk with --out",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as handle:
        done = listing.total - sum(f.size for f in missing.values())
        # Small files first, so that a wrong repository shows before the long transfer.
        for name in sorted(missing, key=lambda name: missing[name].size):
            tell = partial(_tell, report, listing.total, name, done)
            _fetch_one(listing, name, folder, tell)
            done += missing[name].size
        if missing or record != replace(listing, offline=True):
            text = json.dumps(asdict(listing), indent=1)
            (folder / f"{RECORD_FILE}.part").write_text(text, encoding="utf-8")
            (folder / f"{RECORD_FILE}.part").replace(folder / RECORD_FILE)
        os.fsync(handle)
    report(Progress(listing.total, listing.total, "done"))
    return needed


def read_record(folder: Path) -> Listing | None:
    """What a finished download's record says is in a folder; None when there is no good record."""
    try:
        fields = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        files = {name: _stated(**f) for name, f in fields.pop("files").items()}
        if not all(is_file_name(name) for name in files):
            return None
        return Listing(**fields | {"files": files, "offline": True})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # as good as none: everything is compared with the hub again


def _fetch_one(listing: Listing, name: str, folder: Path, tell: Callable[[int], None]) -> None:
    from huggingface_hub import hf_hub_url

    remote = listing.files[name]
    url = hf_hub_url(listing.repository, name, revision=listing.commit)
    part = _part(folder, name, remote)

    def kept() -> str:
        return f"; {file_size(part) or 0} of {remote.size} bytes are kept"

    for last_try in (False, True):
        try:
            with hub_faults(f"{listing.repository}: {name}", kept):
                persist(
                    lambda: transfer(url, part, remote.size, tell), lambda: file_size(part) or 0
                )
            if (found := _digest(part, remote)) != remote.digest:
                raise WrongContent(f"is {found}, the hub states {remote.digest}")
            part.replace(folder / name)
            break
        except WrongContent as e:
            part.unlink(missing_ok=True)
            if last_try:
                message = f"{listing.repository}: {name}: what arrives, twice, {e}"
                raise HubFault(message, hint="try another network, or later") from None
    for stale in folder.glob(f".{name}.*.part"):  # of a commit that was asked for before
        stale.unlink()


def _shards(listing: Listing, index: str, folder: Path, stated: Container[str]) -> tuple[str, ...]:
    """Names of the shards of an index, all fit to be files, and in the repository."""
    where, remote = f"{listing.repository}: {index}", listing.files[index]
    hint = "name another repository, or with --revision another branch"
    if remote.size > MAX_INDEX_BYTES:
        message = f"{where}: has {remote.size} bytes, expected at most {MAX_INDEX_BYTES}"
        raise HubFault(message, hint=hint)
    path = folder / index
    if file_size(path) == remote.size and _digest(path, remote) == remote.digest:
        data = path.read_bytes()
    else:
        with TemporaryDirectory() as temporary:
            _fetch_one(listing, index, Path(temporary), lambda _: None)
            data = (Path(temporary) / index).read_bytes()
    try:
        found = parse_index(data, index, where=where)
    except FileFault as e:
        raise HubFault(e.message, hint=hint) from None
    missing = [n for n in found.shards if n not in stated]
    problems = [*found.problems, *(f"shard {n} is not in the repository" for n in missing)]
    if problems:
        raise TensorFault(where, problems, hint=hint)
    return found.shards


def _not_a_hub(repository: str) -> HubFault:
    hint = "check HF_ENDPOINT, and whether the network asks for a login"
    return HubFault(f"{repository}: the answer is not a hub's", hint=hint)


def _remote_file(sibling: Any, repository: str) -> RemoteFile:
    """As the hub states it."""
    try:
        if sibling.lfs:
            return _stated(sibling.lfs.size, f"sha256:{sibling.lfs.sha256}")
        return _stated(sibling.size, f"git:{sibling.blob_id}")
    except ValueError:
        raise _not_a_hub(repository) from None


def _stated(size: Any, digest: Any) -> RemoteFile:
    """What others state. The digest becomes part of a file's name, so its form is checked.

    Raises:
        ValueError: it is not a size and a digest.
    """
    if not isinstance(size, int) or not re.fullmatch(
        "sha256:[0-9a-f]{64}|git:[0-9a-f]{40}", digest
    ):
        raise ValueError
    return RemoteFile(size, digest)


def _unreadable(repository: str, names: list[str]) -> HubFault:
    if CONFIG_FILE not in names:
        hint = "check the name: a model's repository has one"
        return HubFault(f"{repository}: has no {CONFIG_FILE}", hint=hint)
    found = ", ".join(repr(n) for n in names if n.endswith(_OTHER_WEIGHTS)) or "no weights"
    return HubFault(
        f"{repository}: has neither {' nor '.join(WEIGHT_FILES)}; found {found[:300]}",
        hint="name a repository, or with --revision a branch, that has one of them",
    )


def _finished(folder: Path, repository: str, revision: str | None) -> Listing | None:
    record = read_record(folder)
    if record is None or (record.repository, record.revision) != (repository, revision):
        return None
    whole = all(file_size(folder / name) == f.size for name, f in record.files.items())
    return record if whole else None


def _tell(report: Callable[[Progress], None], total: int, name: str, before: int, now: int) -> None:
    report(Progress(before + now, total, name))


def _part(folder: Path, name: str, remote: RemoteFile) -> Path:
    # The digest in its name keeps bytes of two versions from being joined.
    return folder / f".{name}.{remote.hex[:16]}.part"


def _digest(path: Path, like: RemoteFile) -> str:
    """The file's digest in the same kind as the hub's; returns once the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return f"{like.kind}:{digest(path, like.kind)}"


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Keep other downloads out of the folder; the kernel lets go when the process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError:
        hint = "wait for it, or choose another folder with --out"
        raise FileFault(f"{folder}: another download is at work here", hint=hint) from None
    finally:
        os.close(handle)

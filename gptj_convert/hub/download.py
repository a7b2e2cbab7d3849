"""Fetching files of a repository of the Hugging Face hub: those that are chosen, and no others."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from glob import escape
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from gptj_convert.files.digest import digest
from gptj_convert.files.file_name import is_inner_path
from gptj_convert.files.output_folder import sync
from gptj_convert.hub.cache import cached_blob, cached_listing, copy_blob
from gptj_convert.hub.client import (
    Unreachable,
    WrongContent,
    file_size,
    hub_faults,
    persist,
    transfer,
)
from gptj_convert.hub.listing import (
    MODEL,
    Choose,
    Contents,
    Listing,
    RemoteFile,
    stated_file,
)
from gptj_convert.streams.progress import Progress
from gptj_model.errors import FileFault, HubFault, UsageError

_log = logging.getLogger(__name__)

#: What is whole in a folder, and from where.
RECORD_FILE = ".gptj-download.json"

_HEX_16 = "[0-9a-f]" * 16


def list_files(
    repository: str, revision: str | None, folder: Path, choose: Choose, *, kind: str = MODEL
) -> Listing:
    """Choose from what a repository holds.

    If the hub cannot be reached, the record of a `folder` that holds all that is chosen is the
    answer, or else the hub's cache on this machine.

    Args:
        repository: OWNER/NAME.
        revision: branch, tag or commit; None is the main branch.
        folder: where the files go.
        choose: is asked which.
        kind: `MODEL` or `DATA_SET`.

    Raises:
        UsageError: no repository can have this name.
        HubFault: no network, no access, no such repository, or a name that leads elsewhere.
        GptjError: whatever else `choose` raises.
    """
    from httpx2 import ConnectError
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import logging, validate_repo_id

    logging.set_verbosity_error()  # its warnings would stand between our own lines
    try:
        validate_repo_id(repository)
    except HFValidationError:
        example = "EleutherAI/gpt-j-6b" if kind == MODEL else "monology/pile-uncopyrighted"
        hint = f"expected OWNER/NAME, as in {example}"
        raise UsageError(f"{repository!r} is not a repository's name", hint=hint) from None

    def ask() -> Any:
        return HfApi().repo_info(
            repository,
            revision=revision,
            repo_type=kind,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            files_metadata=True,
        )

    try:
        with hub_faults(repository):
            # A refused connection does not mend in seconds, and a finished folder needs none.
            info = persist(ask, at_once=(ConnectError,))
        stated = {f.rfilename: f for f in info.siblings}
        if not re.fullmatch("[0-9a-f]{40}", info.sha):
            raise ValueError
    except Unreachable:
        if listing := _finished(folder, (repository, revision, kind), choose):
            return listing
        if listing := cached_listing(repository, revision, kind, choose):
            return listing
        raise
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _not_a_hub(repository) from None

    def listed(names: Iterable[str]) -> Listing:
        files = {name: _remote_file(stated[name], repository) for name in names}
        others = tuple(sorted(stated.keys() - files.keys()))
        return Listing(repository, revision, info.sha, files, kind=kind, others=others)

    def read(name: str, most: int) -> bytes:
        return _read(listed([name]), name, folder, most)

    chosen = list(choose(Contents(repository, stated.keys(), read)))
    for name in chosen:
        if not is_inner_path(name):
            hint = "name another repository, or another of its revisions"
            message = f"{repository}: a file is called {name!r}, which leads out of a folder"
            raise HubFault(message, hint=hint)
    return listed(chosen)


def fetch(
    listing: Listing,
    folder: Path,
    report: Callable[[Progress], None],
    *,
    named_by: str = "with --out",
) -> int:
    """Bring `folder` to what is listed; returns the bytes that had to come.

    A file gets its name once it is whole; until then it is a part that the next run goes on with.

    Args:
        listing: what is wanted.
        folder: is made if need be. What else was fetched into it of the same commit stays known.
        report: is told how it goes.
        named_by: how another folder is chosen, for hints.

    Raises:
        UsageError: another file of that name is there that no download brought.
        FileFault: too little space, known before the first byte; or writing fails.
        HubFault: the transfer failed, or what arrives is not what the hub states.
    """
    if listing.offline:
        return 0
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
                    hint=f"choose another folder {named_by}, or delete the file",
                )
    needed = sum(f.size - (file_size(_part(folder, n, f)) or 0) for n, f in missing.items())
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    if needed > (free := shutil.disk_usage(existing).free):
        raise FileFault(
            f"{folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            hint=f"free some space, or name a folder on another disk {named_by}",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, named_by) as handle:
        done = listing.total - sum(f.size for f in missing.values())
        whole = {name: f for name, f in listing.files.items() if name not in missing}
        # Small files first, so that a wrong repository shows before the long transfer.
        for name in sorted(missing, key=lambda name: missing[name].size):
            tell = partial(_tell, report, listing.total, name, done)
            _fetch_one(listing, name, folder, tell)
            done += missing[name].size
            whole[name] = missing[name]
            # What another commit brought is known as ours until all of it is replaced.
            if not record or _is_of(record, listing):
                _note(folder, record, listing, whole)
        for inner in {p for name in missing for p in PurePosixPath(name).parents}:
            sync(folder / inner)
        _note(folder, record, listing, whole)
        os.fsync(handle)
    report(Progress(listing.total, listing.total, "done"))
    return needed


def read_record(folder: Path) -> Listing | None:
    """What the record of downloads says is whole in a folder; None when there is no good record."""
    try:
        fields = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        files = {name: stated_file(**f) for name, f in fields.pop("files").items()}
        others = tuple(fields.pop("others", ()))
        if not all(map(is_inner_path, files)):
            return None
        return Listing(**fields | {"files": files, "others": others, "offline": True})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # as good as none: everything is compared with the hub again


def _is_of(record: Listing, listing: Listing) -> bool:
    """Whether both are of the same commit."""
    return (record.repository, record.kind, record.commit) == (
        listing.repository,
        listing.kind,
        listing.commit,
    )


def _note(
    folder: Path, record: Listing | None, listing: Listing, whole: dict[str, RemoteFile]
) -> None:
    """Record what is whole of a commit, with what was so before."""
    files = record.files | whole if record and _is_of(record, listing) else whole
    now = replace(
        listing,
        files={name: files[name] for name in sorted(files)},
        others=tuple(sorted({*listing.files, *listing.others} - files.keys())),
        offline=True,
        cached=False,
    )
    if now != read_record(folder):
        text = json.dumps(asdict(now), indent=1)
        (folder / f"{RECORD_FILE}.part").write_text(text, encoding="utf-8")
        (folder / f"{RECORD_FILE}.part").replace(folder / RECORD_FILE)


def _finished(folder: Path, asked: tuple[str, str | None, str], choose: Choose) -> Listing | None:
    """What is chosen, by the record of a folder that has all of it."""
    record = read_record(folder)
    if not record or (record.repository, record.revision, record.kind) != asked:
        return None

    def has(name: str) -> bool:
        return name in record.files and file_size(folder / name) == record.files[name].size

    def read(name: str, most: int) -> bytes:
        if not has(name):
            raise LookupError(name)
        return (folder / name).read_bytes()

    try:
        chosen = list(choose(Contents(record.repository, {*record.files, *record.others}, read)))
    except LookupError:
        return None
    if not all(map(has, chosen)):
        return None
    return replace(record, files={name: record.files[name] for name in chosen})


def _fetch_one(listing: Listing, name: str, folder: Path, tell: Callable[[int], None]) -> None:
    from huggingface_hub import hf_hub_url

    remote = listing.files[name]
    url = hf_hub_url(listing.repository, name, repo_type=listing.kind, revision=listing.commit)
    part = _part(folder, name, remote)
    part.parent.mkdir(parents=True, exist_ok=True)

    def kept() -> str:
        return f"; {file_size(part) or 0} of {remote.size} bytes are kept"

    if blob := cached_blob(listing.repository, listing.kind, remote):
        copy_blob(blob, part, tell)
        if _digest(part, remote) != remote.digest:
            part.unlink()
            _log.warning("%s: is damaged in the hub's cache (%s)", name, blob)
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
    # Parts of a commit that was asked for before.
    for stale in part.parent.glob(f".{escape(PurePosixPath(name).name)}.{_HEX_16}.part"):
        stale.unlink()


def _read(listing: Listing, name: str, folder: Path, most: int) -> bytes:
    """A small file's content, from the folder if it is there."""
    remote, path = listing.files[name], folder / name
    if remote.size > most:
        message = f"{listing.repository}: {name}: has {remote.size} bytes, expected at most {most}"
        raise HubFault(message, hint="name another repository, or another of its revisions")
    if file_size(path) == remote.size and _digest(path, remote) == remote.digest:
        return path.read_bytes()
    with TemporaryDirectory() as temporary:
        _fetch_one(listing, name, Path(temporary), lambda _: None)
        return (Path(temporary) / name).read_bytes()


def _not_a_hub(repository: str) -> HubFault:
    hint = "check HF_ENDPOINT, and whether the network asks for a login"
    return HubFault(f"{repository}: the answer is not a hub's", hint=hint)


def _remote_file(sibling: Any, repository: str) -> RemoteFile:
    """As the hub states it."""
    try:
        if sibling.lfs:
            return stated_file(sibling.lfs.size, f"sha256:{sibling.lfs.sha256}")
        return stated_file(sibling.size, f"git:{sibling.blob_id}")
    except ValueError:
        raise _not_a_hub(repository) from None


def _tell(report: Callable[[Progress], None], total: int, name: str, before: int, now: int) -> None:
    report(Progress(before + now, total, name))


def _part(folder: Path, name: str, remote: RemoteFile) -> Path:
    # The digest in its name keeps bytes of two versions from being joined.
    whole = folder / name
    return whole.with_name(f".{whole.name}.{remote.hex[:16]}.part")


def _digest(path: Path, like: RemoteFile) -> str:
    """The file's digest in the same kind as the hub's; returns once the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return f"{like.kind}:{digest(path, like.kind)}"


@contextmanager
def _alone(folder: Path, named_by: str) -> Generator[int]:
    """Keep other downloads out of the folder; the kernel lets go when the process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError:
        hint = f"wait for it, or choose another folder {named_by}"
        raise FileFault(f"{folder}: another download is at work here", hint=hint) from None
    finally:
        os.close(handle)

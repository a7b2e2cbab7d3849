"""Downloads of chosen files of a Hugging Face hub repository, resumable and verified."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
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
    retry,
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
from gptj_convert.streams.progress import Progress, Work
from gptj_model.errors import FileFault, HubFault, UsageError

_log = logging.getLogger(__name__)

#: Name of the download record: the complete files of a folder, and their origin.
RECORD_FILE = ".gptj-download.json"

_HEX_16 = "[0-9a-f]" * 16


def list_files(
    repository: str, revision: str | None, folder: Path, choose: Choose, *, kind: str = MODEL
) -> Listing:
    """List the files of a repository that are wanted.

    If the hub cannot be reached, the download record of `folder` or else the hub's cache on this
    machine answers, provided that it has all chosen files.

    Args:
        repository: name of the repository, as OWNER/NAME.
        revision: branch, tag or commit; None is the main branch.
        folder: folder that the files will be downloaded to.
        choose: function that chooses the files.
        kind: `MODEL` or `DATA_SET`.

    Raises:
        UsageError: no repository can have this name.
        HubFault: the hub or the repository cannot be accessed, or the name of a file leads out of
            the folder.
        GptjError: any other error of `choose`.
    """
    try:
        commit, stated = _ask(repository, revision, kind)
    except Unreachable:
        if listing := _finished(folder, (repository, revision, kind), choose):
            return listing
        if listing := cached_listing(repository, revision, kind, choose):
            return listing
        raise

    def listed(names: Iterable[str]) -> Listing:
        files = {name: _remote_file(stated[name], repository) for name in names}
        others = tuple(sorted(stated.keys() - files.keys()))
        return Listing(repository, revision, commit, files, kind=kind, others=others)

    def read(name: str, most: int) -> bytes:
        return _read(listed([name]), name, folder, most)

    chosen = list(choose(Contents(repository, stated.keys(), read)))
    for name in chosen:
        if not is_inner_path(name):
            hint = "name another repository, or another of its revisions"
            message = f"{repository}: a file is named {name!r}, which points outside the folder"
            raise HubFault(message, hint=hint)
    return listed(chosen)


def _ask(repository: str, revision: str | None, kind: str) -> tuple[str, dict[str, Any]]:
    """Ask the hub for a revision's commit and its description of each file, by the file's path.

    Raises:
        UsageError: no repository can have this name.
        HubFault: the hub cannot be reached (`Unreachable`), denies access, or is not a hub.
    """
    from httpx2 import ConnectError
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import logging, validate_repo_id

    logging.set_verbosity_error()  # its warnings would appear between our own lines
    try:
        validate_repo_id(repository)
    except HFValidationError:
        example = "EleutherAI/gpt-j-6b" if kind == MODEL else "monology/pile-uncopyrighted"
        hint = f"name it as OWNER/NAME, for example {example}"
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
            # A refused connection does not recover within seconds, and a complete folder does not
            # need one.
            info = retry(ask, at_once=(ConnectError,))
        stated = {f.rfilename: f for f in info.siblings}
        if not re.fullmatch("[0-9a-f]{40}", info.sha):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _not_a_hub(repository) from None
    return info.sha, stated


def fetch(listing: Listing, folder: Path, *, named_by: str = "with --out") -> Work[int]:
    """Download the listed files that a folder lacks; progress is in bytes of all files.

    Each file is a part under another name until it is complete; the next run resumes the part.

    Args:
        listing: files to download.
        folder: folder for the files, which is created if necessary. Its record keeps other files of
            the same commit.
        named_by: way to choose another folder, for hints.

    Returns:
        Number of bytes that were downloaded.

    Raises:
        UsageError: the folder has a different file of that name which was not downloaded.
        FileFault: the disk has too little space, which is known before the first byte, or writing
            fails.
        HubFault: the transfer failed, or the content is not what the hub states.
    """
    if listing.offline:
        return 0
    record = read_record(folder)
    missing = yield from _find_missing(listing, folder, record, named_by)
    needed = sum(f.size - (file_size(_part(folder, n, f)) or 0) for n, f in missing.items())
    _check_space(folder, needed, named_by)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, named_by) as handle:
        done = listing.total - sum(f.size for f in missing.values())
        whole = {name: f for name, f in listing.files.items() if name not in missing}
        # Small files first, so that a wrong repository shows before the long transfer.
        for name in sorted(missing, key=lambda name: missing[name].size):
            for reached in _fetch_one(listing, name, folder):
                yield Progress(done + reached, listing.total, name)
            done += missing[name].size
            whole[name] = missing[name]
            # The record of another commit stays until all of its files have been replaced.
            if not record or _is_of(record, listing):
                _note(folder, record, listing, whole)
        for inner in {p for name in missing for p in PurePosixPath(name).parents}:
            sync(folder / inner)
        _note(folder, record, listing, whole)
        os.fsync(handle)
    yield Progress(listing.total, listing.total, "done")
    return needed


def _find_missing(
    listing: Listing, folder: Path, record: Listing | None, named_by: str
) -> Work[dict[str, RemoteFile]]:
    """Return the listed files that a folder lacks or has with other content.

    Raises:
        UsageError: such a file exists and was not downloaded.
    """
    known = record.files if record else {}
    missing: dict[str, RemoteFile] = {}
    for name, remote in listing.files.items():
        yield Progress(0, listing.total, f"checking {name}")
        if file_size(folder / name) != remote.size or (
            known.get(name) != remote and _digest(folder / name, remote) != remote.digest
        ):
            missing[name] = remote
            if (folder / name).exists() and name not in known:
                raise UsageError(
                    f"{folder / name}: already exists and differs from the hub's file",
                    hint=f"choose another folder {named_by}, or delete the file",
                )
    return missing


def _check_space(folder: Path, needed: int, named_by: str) -> None:
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    if needed > (free := shutil.disk_usage(existing).free):
        raise FileFault(
            f"{folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            hint=f"free some space, or name a folder on another disk {named_by}",
        )


def read_record(folder: Path) -> Listing | None:
    """Return the files that a folder's download record states as complete.

    Returns:
        The files as an offline listing, or None if there is no valid record.
    """
    try:
        fields = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        files = {name: stated_file(**f) for name, f in fields.pop("files").items()}
        others = tuple(fields.pop("others", ()))
        if not all(map(is_inner_path, files)):
            return None
        return Listing(**fields | {"files": files, "others": others, "offline": True})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # then all files are compared with the hub again


def _is_of(record: Listing, listing: Listing) -> bool:
    """Return whether both are of the same commit."""
    return (record.repository, record.kind, record.commit) == (
        listing.repository,
        listing.kind,
        listing.commit,
    )


def _note(
    folder: Path, record: Listing | None, listing: Listing, whole: dict[str, RemoteFile]
) -> None:
    """Record the complete files of a commit, including those recorded before."""
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
    """Return the chosen files according to a folder's record, or None if it lacks any of them."""
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


def _fetch_one(listing: Listing, name: str, folder: Path) -> Iterator[int]:
    """Download one file, or copy it from the hub's cache, and verify its digest; yield the number
    of its bytes that are there."""
    from huggingface_hub import hf_hub_url

    remote = listing.files[name]
    url = hf_hub_url(listing.repository, name, repo_type=listing.kind, revision=listing.commit)
    part = _part(folder, name, remote)
    part.parent.mkdir(parents=True, exist_ok=True)

    def progress_text() -> str:
        return f"; {file_size(part) or 0} of {remote.size} bytes have been downloaded"

    if blob := cached_blob(listing.repository, listing.kind, remote):
        yield from copy_blob(blob, part)
        if _digest(part, remote) != remote.digest:
            part.unlink()
            _log.warning("%s: the copy in the hub's cache is damaged (%s)", name, blob)
    for last_try in (False, True):
        try:
            with hub_faults(f"{listing.repository}: {name}", progress_text):
                yield from transfer(url, part, remote.size)
            if (found := _digest(part, remote)) != remote.digest:
                raise WrongContent(f"is {found}, the hub states {remote.digest}")
            part.replace(folder / name)
            break
        except WrongContent as e:
            part.unlink(missing_ok=True)
            if last_try:
                message = f"{listing.repository}: {name}: after two downloads, the content {e}"
                raise HubFault(message, hint="try another network, or try again later") from None
    # Parts of the same file in another commit.
    for stale in part.parent.glob(f".{escape(PurePosixPath(name).name)}.{_HEX_16}.part"):
        stale.unlink()


def _read(listing: Listing, name: str, folder: Path, most: int) -> bytes:
    """Return the content of a small file, from the folder if it exists there."""
    remote, path = listing.files[name], folder / name
    if remote.size > most:
        message = f"{listing.repository}: {name}: has {remote.size} bytes, expected at most {most}"
        raise HubFault(message, hint="name another repository, or another of its revisions")
    if file_size(path) == remote.size and _digest(path, remote) == remote.digest:
        return path.read_bytes()
    with TemporaryDirectory() as temporary:
        for _ in _fetch_one(listing, name, Path(temporary)):
            pass  # small, so nobody waits for it
        return (Path(temporary) / name).read_bytes()


def _not_a_hub(repository: str) -> HubFault:
    hint = "check HF_ENDPOINT, and whether the network requires a login"
    return HubFault(f"{repository}: the answer does not come from a hub", hint=hint)


def _remote_file(sibling: Any, repository: str) -> RemoteFile:
    """Return the size and digest that the hub states."""
    try:
        if sibling.lfs:
            return stated_file(sibling.lfs.size, f"sha256:{sibling.lfs.sha256}")
        return stated_file(sibling.size, f"git:{sibling.blob_id}")
    except ValueError:
        raise _not_a_hub(repository) from None


def _part(folder: Path, name: str, remote: RemoteFile) -> Path:
    # With the digest in the name, the bytes of two versions are never joined.
    whole = folder / name
    return whole.with_name(f".{whole.name}.{remote.hex[:16]}.part")


def _digest(path: Path, like: RemoteFile) -> str:
    """Flush a file to the device, and return its digest in the kind of the hub's."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return f"{like.kind}:{digest(path, like.kind)}"


@contextmanager
def _alone(folder: Path, named_by: str) -> Generator[int]:
    """Lock a folder against other downloads; the kernel releases the lock when the process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError:
        hint = f"wait for it, or choose another folder {named_by}"
        raise FileFault(f"{folder}: another download is using this folder", hint=hint) from None
    finally:
        os.close(handle)

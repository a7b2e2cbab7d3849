"""The hub's own cache on this machine: what its library has fetched, and what it is proven by.

A repository lies in `models--OWNER--NAME`: `refs/REVISION` names a commit, `snapshots/COMMIT`
holds links to `blobs/HASH`, named by what each file must hash to. A file that is no such link is
not taken: nothing says what it must be.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from gptj_convert.files.digest import GIT, SHA256
from gptj_convert.hub.listing import Choose, Contents, Listing, RemoteFile
from gptj_model.errors import FileFault, HubFault, TensorFault

_PIECE = 4 * 2**20
_KINDS = {64: SHA256, 40: GIT}


def cached_listing(
    repository: str, revision: str | None, kind: str, choose: Choose
) -> Listing | None:
    """Return what is chosen of a repository, if the cache holds all of it; else None.

    Args:
        repository: OWNER/NAME.
        revision: branch, tag or commit; None is the main branch.
        kind: `MODEL` or `DATA_SET`.
        choose: is asked which files.

    Raises:
        ConfigError: see `choose`.
    """
    root = _root(repository, kind)
    commit = _commit(root, revision)
    snapshot = root / "snapshots" / commit if commit else root
    if not commit or not snapshot.is_dir():
        return None
    files = {
        path.relative_to(snapshot).as_posix(): remote
        for path in snapshot.rglob("*")
        if (remote := _remote_file(path, root))
    }

    def read(name: str, most: int) -> bytes:
        with (snapshot / name).open("rb") as f:
            return f.read(most)

    try:
        chosen = list(choose(Contents(repository, files.keys(), read)))
    except (HubFault, TensorFault, OSError):
        return None  # not all of it was fetched
    others = tuple(sorted(files.keys() - set(chosen)))
    return Listing(
        repository,
        revision,
        commit,
        {name: files[name] for name in chosen},
        kind=kind,
        others=others,
        cached=True,
    )


def cached_blob(repository: str, kind: str, remote: RemoteFile) -> Path | None:
    """Return where the cache has a file of this size and digest; None if it has not."""
    blob = _root(repository, kind) / "blobs" / remote.hex
    try:
        return blob if blob.stat().st_size == remote.size else None
    except OSError:
        return None


def copy_blob(blob: Path, part: Path, tell: Callable[[int], None]) -> None:
    """Copy a file of the cache, continuing a copy that was interrupted.

    Args:
        blob: to be copied.
        part: what there is of the copy.
        tell: is told how many bytes are there.

    Raises:
        FileFault: reading or writing fails.
    """
    try:
        with blob.open("rb") as source, part.open("ab") as copy:
            source.seek(copy.tell())
            while piece := source.read(_PIECE):
                copy.write(piece)
                tell(copy.tell())
    except OSError as e:
        hint = "free some space and run the same command again to resume"
        raise FileFault(f"{part}: cannot be written: {e.strerror}", hint=hint) from None


def _root(repository: str, kind: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind)


def _commit(root: Path, revision: str | None) -> str | None:
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    refs = root / "refs"
    ref = refs / (revision or "main")
    try:
        if not ref.resolve().is_relative_to(refs.resolve()):
            return None
        text = ref.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if re.fullmatch("[0-9a-f]{40}", text) else None


def _remote_file(path: Path, root: Path) -> RemoteFile | None:
    """A file of a snapshot, by the name of the blob that it links to."""
    blob = path.resolve()
    kind = _KINDS.get(len(blob.name))
    if not kind or not re.fullmatch("[0-9a-f]+", blob.name):
        return None
    if blob.parent != (root / "blobs").resolve() or not blob.is_file():
        return None
    return RemoteFile(blob.stat().st_size, f"{kind}:{blob.name}")

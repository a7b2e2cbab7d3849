"""The cache of huggingface_hub on this machine, used where a file's digest can be verified.

The folder `models--OWNER--NAME` holds a repository: `refs/REVISION` names a commit, and
`snapshots/COMMIT` holds links to `blobs/HASH`, whose names are the digests of the files. A file
that is not such a link is ignored, because its digest is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from gptj_convert.files.digest import GIT, SHA256
from gptj_convert.hub.listing import Choose, Contents, Listing, RemoteFile
from gptj_model.errors import FileFault, HubFault, TensorFault

#: Number of bytes that are copied at once.
_PIECE = 4 * 2**20
#: Kind of a digest by the number of its hex digits.
_KINDS = {64: SHA256, 40: GIT}


def cached_listing(
    repository: str, revision: str | None, kind: str, choose: Choose
) -> Listing | None:
    """Return the chosen files of a repository if the cache holds all of them, otherwise None.

    Args:
        repository: name of the repository, as OWNER/NAME.
        revision: branch, tag or commit; None is the main branch.
        kind: `MODEL` or `DATA_SET`.
        choose: function that chooses the files.

    Raises:
        ConfigError: `choose` refuses the model.
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
        return None  # a file is not in the cache
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
    """Return the path in the cache of a file of this size and digest, or None."""
    blob = _root(repository, kind) / "blobs" / remote.hex
    try:
        return blob if blob.stat().st_size == remote.size else None
    except OSError:
        return None


def copy_blob(blob: Path, part: Path) -> Iterator[int]:
    """Copy a file of the cache, resuming an interrupted copy.

    Args:
        blob: file to copy.
        part: path of the partial copy.

    Yields:
        The number of bytes copied so far.

    Raises:
        FileFault: reading or writing fails.
    """
    try:
        with blob.open("rb") as source, part.open("ab") as copy:
            source.seek(copy.tell())
            while piece := source.read(_PIECE):
                copy.write(piece)
                yield copy.tell()
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
    """Return size and digest of a snapshot's file by the blob it links to; None for other files."""
    blob = path.resolve()
    kind = _KINDS.get(len(blob.name))
    if not kind or not re.fullmatch("[0-9a-f]+", blob.name):
        return None
    if blob.parent != (root / "blobs").resolve() or not blob.is_file():
        return None
    return RemoteFile(blob.stat().st_size, f"{kind}:{blob.name}")

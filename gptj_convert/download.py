"""Fetching a GPT-J from the Hugging Face hub: the files that are needed, and no others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_convert.execute import Progress
from gptj_convert.formats.hf import GENERATION_FILE, TOKENIZER_FILES, WEIGHT_FILES
from gptj_model.config import CONFIG_FILE
from gptj_model.errors import FileFault, HubFault

#: What the hub's file list is asked for: the smaller, safer format first.
_EXTRAS = (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES)


@dataclass(frozen=True, slots=True)
class Listing:
    """What will be fetched: one commit's files, with sizes."""

    repository: str
    commit: str
    files: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.files.values())


def list_files(repository: str, revision: str | None) -> Listing:
    """Choose one set of weights and the small files beside it.

    Raises:
        HubFault: no network, no access, no such repository, or no weights that can be read.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except HFValidationError as e:
        raise HubFault(f"{repository!r} is not a repository's name: {e}") from None
    except HfHubHTTPError as e:
        raise _fault(repository, e) from None
    except OSError as e:
        raise HubFault(
            f"{repository}: the hub cannot be reached: {e}",
            hint="check the network; a complete folder needs no download",
        ) from None
    sizes = {f.rfilename: f.size or 0 for f in info.siblings or ()}
    weights = next((name for name in WEIGHT_FILES if name in sizes), None)
    if weights is None or CONFIG_FILE not in sizes:
        raise HubFault(
            f"{repository}: has neither {' nor '.join(WEIGHT_FILES)}"
            if weights is None
            else f"{repository}: has no {CONFIG_FILE}"
        )
    chosen = [weights, *(name for name in _EXTRAS if name in sizes)]
    return Listing(repository, info.sha or "main", {name: sizes[name] for name in chosen})


def fetch(listing: Listing, folder: Path, report: Callable[[Progress], None]) -> None:
    """Download what is listed into `folder`; files that are there and whole are not fetched again.

    Raises:
        FileFault: too little space, known before the first byte.
        HubFault: the transfer failed; what arrived is kept for the next try.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    folder.mkdir(parents=True, exist_ok=True)
    missing = {n: size for n, size in listing.files.items() if _size(folder / n) != size}
    needed, free = sum(missing.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise FileFault(
            f"{folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            hint="free some space, or name a folder on another disk with --out",
        )
    done = listing.total - needed
    # Small files first, so that a wrong repository shows before the long transfer.
    for name, size in sorted(missing.items(), key=lambda item: item[1]):
        report(Progress(done, listing.total, name))
        try:
            hf_hub_download(
                listing.repository,
                name,
                revision=listing.commit,
                local_dir=folder,
                tqdm_class=_reporter(name, done, listing.total, report),
            )
        except HfHubHTTPError as e:
            raise _fault(listing.repository, e) from None
        except OSError as e:
            raise HubFault(
                f"{listing.repository}: {name} was not fetched: {e}",
                hint="run the same command again",
            ) from None
        if _size(folder / name) != size:
            raise HubFault(
                f"{folder / name}: has {_size(folder / name)} bytes, the hub says {size}",
                hint="delete the file and run the same command again",
            )
        done += size
    report(Progress(listing.total, listing.total, "done"))


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _reporter(name: str, done: int, total: int, report: Callable[[Progress], None]) -> type:
    """A progress bar, as the library wants one, that draws nothing and reports bytes."""
    from tqdm.std import tqdm

    class Reporter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})
            self._fetched = kwargs.get("initial") or 0

        def update(self, n: float | None = 1) -> bool | None:
            self._fetched += n or 0
            report(Progress(int(done + self._fetched), total, name))
            return None

    return Reporter


def _fault(repository: str, error: Exception) -> HubFault:
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return HubFault(
            f"{repository}: access is gated",
            hint="accept its terms on the hub, then `hf auth login`",
        )
    if isinstance(error, RevisionNotFoundError):
        return HubFault(f"{repository}: has no such revision")
    if isinstance(error, RepositoryNotFoundError):
        return HubFault(
            f"{repository}: not found, or private",
            hint="check the name; for a private repository, `hf auth login`",
        )
    return HubFault(
        f"{repository}: {str(error).splitlines()[0]}", hint="run the same command again"
    )

"""Downloads from the hub with notes and progress, for every command that fetches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj_convert.options import DEFAULT_SOURCE
from runner.cli.shared.output import Output
from runner.cli.shared.progress import follow

if TYPE_CHECKING:
    from gptj_convert.hub.listing import Listing


DEFAULT_REPOSITORY = "EleutherAI/gpt-j-6b"


def default_folder(repository: str) -> Path:
    """Return the folder that a repository is fetched into by default."""
    return DEFAULT_SOURCE if repository == DEFAULT_REPOSITORY else Path(Path(repository).name)


def fetch_to(
    output: Output,
    repository: str,
    revision: str | None,
    out: Path,
    *,
    for_conversion: bool = False,
) -> dict[str, Any]:
    """Download the model of a repository; see `list_model` and `fetch_listed`."""
    from gptj_convert.formats.containers.sharded import is_index
    from gptj_convert.formats.layouts.hf import choose_settings
    from gptj_convert.hub.model_files import list_model

    listing = list_model(repository, revision, out, for_conversion=for_conversion)
    fields = fetch_listed(output, listing, out)
    if left := [name for name in choose_settings(listing.others) if not is_index(name)]:
        output.note(f"note: not fetched: {', '.join(left)}")
    return fields


def fetch_listed(
    output: Output, listing: Listing, out: Path, *, named_by: str = "with --out"
) -> dict[str, Any]:
    """Download listed files with notes and progress; return the fields of the JSON object.

    `named_by` says how another folder is named.
    """
    from gptj_convert.hub.download import fetch

    output.note(
        f"{listing.repository} at {listing.commit[:12]}: {len(listing.files)} files, "
        f"{listing.total / 1e9:.2f} GB → {out}"
    )
    if listing.offline:
        output.note("the hub cannot be reached; the folder is complete, and stays as it is")
    if listing.cached:
        output.note("the hub cannot be reached; its cache on this machine holds the files")
    fetched = follow(output, "downloading", fetch(listing, out, named_by=named_by))
    return {
        "output": str(out),
        "commit": listing.commit,
        "bytes": listing.total,
        "fetched": fetched,
        "offline": listing.offline,
    }

"""Transfers from the hub and from object storage, with notes and progress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj_convert.options import DEFAULT_SOURCE
from runner.cli.shared.output import Output
from runner.cli.shared.progress import follow

if TYPE_CHECKING:
    from gptj_convert.hub.listing import Listing
    from runner.config.params import InputParams, Params


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


def local_folder(output: Output, folder: str | Path) -> Path:
    """Return a folder of records on this machine: the folder itself, or a copy of the records of an
    address in object storage, which is made if there is none yet.

    Raises:
        GptjError: see `stage_records`.
    """
    from runner.data.remote.path import as_remote, place
    from runner.data.remote.staged_records import stage_records

    here = place(folder) if isinstance(folder, str) else folder
    if not (address := as_remote(here)):
        return here
    staged = follow(output, "fetching records", stage_records(address))
    output.note(
        f"note: {address}: {staged.files} files, {staged.bytes / 1e9:.2f} GB, "
        f"{'copied to' if staged.fetched else 'found in'} {staged.folder}"
    )
    return staged.folder


def with_local_records(output: Output, params: Params, *names: str) -> Params:
    """Return parameters for this process alone, whose sections read records on this machine.

    Args:
        output: where notes and progress go.
        params: parameters whose `data_dir` may be an address in object storage.
        names: sections that are read: train_input, eval_input.
    """
    from runner.data.remote.address import is_remote

    changed: dict[str, InputParams] = {}
    for name in names:
        section: InputParams | None = getattr(params, name)
        if section is not None:
            folders = [
                str(local_folder(output, folder)) if is_remote(folder) else folder
                for folder in section.data_dir
            ]
            changed[name] = section.model_copy(update={"data_dir": folders})
    return params.model_copy(update=changed)


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

"""Data sets on the hub: choose the files of a repository that belong to the requested parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath

from gptj_convert.hub.download import list_files
from gptj_convert.hub.listing import DATA_SET, Contents, Listing
from gptj_model.errors import HubFault, UsageError
from runner.data.making.sources import TEST, TRAIN, VALIDATION, split_of

SPLITS = (TRAIN, VALIDATION, TEST)
_NAME = re.compile(r"([^/@]+/[^/@]+)(?:/([^@]+))?(?:@(.+))?")


@dataclass(frozen=True, slots=True)
class DataSet:
    """A repository of the hub, or one folder of a repository."""

    repository: str
    folder: str = ""
    """Folder within the repository; "" means the whole repository."""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> DataSet:
        """Parse OWNER/NAME or OWNER/NAME/FOLDER, either optionally followed by @REVISION.

        Raises:
            UsageError: the text has none of these forms.
        """
        found = _NAME.fullmatch(text)
        if not found:
            raise UsageError(
                f"{text!r} is not the name of a data set, expected OWNER/NAME[/FOLDER][@REVISION]",
                hint="name a data set of the hub, such as monology/pile-uncopyrighted",
            )
        return cls(found[1], (found[2] or "").strip("/"), found[3])


def list_parts(
    data_set: DataSet, parts: Sequence[str], patterns: Sequence[str], folder: Path
) -> Listing:
    """Choose the files of parts of a data set.

    Args:
        data_set: repository to list.
        parts: train, val, test, or prefixes of the files' paths; empty means all three splits.
        patterns: patterns of file names, at least one of which must match.
        folder: folder to download to.

    Raises:
        UsageError: the name of the repository is invalid.
        HubFault: see `list_files`; or the repository lacks one of the parts.
    """
    choose = partial(_choose, inside=data_set.folder, parts=parts, patterns=patterns)
    return list_files(data_set.repository, data_set.revision, folder, choose, kind=DATA_SET)


def _choose(
    contents: Contents, *, inside: str, parts: Sequence[str], patterns: Sequence[str]
) -> Iterable[str]:
    before = f"{inside}/" if inside else ""
    where = f"{contents.repository}/{inside}" if inside else contents.repository
    relative = sorted(
        name.removeprefix(before)
        for name in contents.names
        if name.startswith(before)
        and any(fnmatchcase(PurePosixPath(name).name, pattern) for pattern in patterns)
    )
    chosen: set[str] = set()
    for part in parts or SPLITS:
        found = {name for name in relative if _belongs(name, part)}
        if parts and not found:
            raise _no_part(f"{where}: has no part {part!r}", relative)
        chosen |= found
    if not chosen:
        raise _no_part(f"{where}: no file's name says that it is train, val or test", relative)
    return [before + name for name in sorted(chosen)]


def _belongs(name: str, part: str) -> bool:
    return split_of(Path(name)) == part if part in SPLITS else name.startswith(part)


def _no_part(problem: str, names: Sequence[str]) -> HubFault:
    found = ", ".join(map(repr, names)) or "no file that can be read"
    shown = found if len(found) <= 300 else found[:299] + "…"
    return HubFault(
        f"{problem}; found {shown}",
        hint="choose an existing part with --part: train, val, test, or the beginning of a path",
    )

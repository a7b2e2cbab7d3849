"""Data sets on the hub: which files of a repository are the parts that are wanted."""

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
    """A repository of the hub, or one folder of it."""

    repository: str
    folder: str = ""
    """Where in the repository it is; "" is all of it."""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> DataSet:
        """Of OWNER/NAME, OWNER/NAME/FOLDER, and either with @REVISION.

        Raises:
            UsageError: it is none of these.
        """
        found = _NAME.fullmatch(text)
        if not found:
            hint = "expected OWNER/NAME[/FOLDER][@REVISION]"
            raise UsageError(f"{text!r} is not a data set's name", hint=hint)
        return cls(found[1], (found[2] or "").strip("/"), found[3])


def list_parts(
    data_set: DataSet, parts: Sequence[str], patterns: Sequence[str], folder: Path
) -> Listing:
    """Choose the files of parts of a data set.

    Args:
        data_set: where they are.
        parts: train, val, test, or the beginning of files' paths; none are all of the three.
        patterns: one of which a file's name must match.
        folder: where they go.

    Raises:
        UsageError: no repository can have this name.
        HubFault: see `list_files`; or there is no such part.
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
        hint="name parts that are there with --part: train, val, test, or how a path begins",
    )

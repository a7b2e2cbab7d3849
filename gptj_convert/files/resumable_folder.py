"""Output folders of long work, which a killed process can resume.

A journal in the partial folder describes the whole job in its first line, and then every part that
is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gptj_convert.files.journal import Journal, read_journal
from gptj_convert.files.output_folder import (
    PartialFolder,
    has_partial_content,
    output_folder,
    partial_path,
    remove_partial,
)
from gptj_model.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Part = TypeVar("Part", bound=DataclassInstance)
else:
    Part = TypeVar("Part")

JOURNAL_FILE = "journal.jsonl"


@contextmanager
def resumable_folder(
    out: Path,
    job: Mapping[str, Any],
    kind: type[Part],
    *,
    resume: bool,
    force: bool,
    check: Callable[[Mapping[str, Any]], None],
    keep: Callable[[PartialFolder, list[Part]], list[Part]] = lambda folder, parts: parts,
) -> Generator[tuple[PartialFolder, Journal[Part]]]:
    """Yield the partial folder of `out` and its journal, empty or as an interrupted run left them.

    If the body fails, the folder stays while its journal has a part; the body may clear the journal
    where a resumed run would fail in the same way.

    Args:
        out: output folder; see `output_folder`.
        job: description of the work, as JSON values.
        kind: dataclass of a finished part.
        resume: whether to resume an interrupted run.
        force: whether to replace an existing output, and to discard an interrupted run.
        check: raises if the interrupted run, described by its job, was another one.
        keep: returns the finished parts whose content is still there.

    Raises:
        UsageError: `out` or an interrupted run exists, and neither `resume` nor `force` is given;
            or as `check` raises it.
        FileFault: another process is writing the same output.
        OSError: the disk is full or not writable.
    """
    path = partial_path(out) / JOURNAL_FILE
    found = read_journal(path, kind)
    replaces = force or bool(resume and found and found.job["force"])
    with output_folder(out, force=replaces, fresh=False) as folder:
        found = None if force else read_journal(path, kind)
        if found:
            folder.resumable = True
            if not resume:
                raise UsageError(
                    f"{out}: an interrupted run exists ({folder.root})",
                    hint="resume it with --resume, or start from scratch with --force",
                )
            check(found.job)
            job, parts = found.job, keep(folder, found.parts)
        else:
            folder.clear()
            job, parts = {**job, "force": force}, []
        with closing(Journal(path, job, parts)) as journal:
            try:
                yield folder, journal
            finally:
                folder.resumable = bool(journal.parts)


def has_journal(out: Path, kind: type[Any]) -> bool:
    """Return whether an interrupted run exists whose journal has parts of this dataclass."""
    return read_journal(partial_path(out) / JOURNAL_FILE, kind) is not None


def is_kept(out: Path, *, resume: bool, is_complete: Callable[[], bool]) -> bool:
    """Return whether `out` is the complete result of a run that is resumed again.

    What an interrupted replacement has left beside it is deleted.
    """
    if not resume or has_partial_content(out) or not is_complete():
        return False
    remove_partial(out)
    return True

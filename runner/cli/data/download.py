"""`--download` of `gptj data`: parts of a published data set, fetched before they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.download import fetch_listed
from runner.cli.shared.output import Output

if TYPE_CHECKING:
    from runner.data.making.published import DataSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What is fetched when nothing else is asked for."""

    repository: str
    """As `runner.data.making.published.DataSet` reads it."""
    folder: Path
    """Where its files go."""

    def named(self, sources: Sequence[Path], repository: str | None) -> tuple[Path, DataSet]:
        """The folder and the data set that a command line asks for."""
        from runner.data.making.published import DataSet

        data_set = DataSet.parse(repository or self.repository)
        if len(sources) > 1:
            raise click.UsageError("--download fetches to one folder, expected one SRC at most")
        if sources:
            return sources[0], data_set
        return (Path(Path(data_set.repository).name) if repository else self.folder), data_set


PILE = Published(repository="monology/pile-uncopyrighted", folder=Path("pile"))
SUMMARIES = Published(repository="abisee/cnn_dailymail/3.0.0", folder=Path("cnn_dailymail"))


def downloading(default: Published) -> tuple[Callable[[Any], Any], ...]:
    """The options of a command that can fetch what it reads."""
    return (
        click.option(
            "--download",
            is_flag=True,
            help=f"Fetch from the hub first, to SRC.  [default: ./{default.folder}]",
        ),
        click.option(
            "--repository",
            metavar="OWNER/NAME[/FOLDER][@REVISION]",
            help=f"With --download: the data set.  [default: {default.repository}]",
        ),
        click.option(
            "--part",
            "parts",
            multiple=True,
            help="With --download: train, val, test, or how paths begin, such as train/00; may be "
            "repeated.  [default: all three]",
        ),
    )


def fetch_parts(
    output: Output,
    data_set: DataSet,
    folder: Path,
    parts: Sequence[str],
    patterns: Sequence[str],
) -> tuple[list[tuple[Path, Path]], dict[str, Any]]:
    """Fetch what is missing of the parts.

    Returns:
        Their files, as `find_source_files` does; and fields for the JSON object.
    """
    from runner.data.making.published import list_parts

    listing = list_parts(data_set, parts, patterns, folder)
    fields = fetch_listed(output, listing, folder, named_by="as SRC")
    return [(folder / name, name) for name in sorted(map(Path, listing.files))], fields

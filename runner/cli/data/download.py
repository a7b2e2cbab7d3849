"""`--download` of `gptj data`: parts of a published data set, fetched before they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.shared.fetching import fetch_listed
from runner.cli.shared.options import Decorator, options
from runner.cli.shared.output import Output

if TYPE_CHECKING:
    from runner.data.making.published import DataSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Data set that a command fetches unless another is named."""

    repository: str
    """Address of the repository, as `DataSet.parse` reads it."""
    folder: Path
    """Folder that its files are fetched into."""

    def named(self, sources: Sequence[Path], repository: str | None) -> tuple[Path, DataSet]:
        """Return the folder and the data set that a command line asks for.

        Raises:
            click.UsageError: several sources are named.
        """
        from runner.data.making.published import DataSet

        data_set = DataSet.parse(repository or self.repository)
        if len(sources) > 1:
            raise click.UsageError("--download fetches into one folder, expected at most one SRC")
        if sources:
            return sources[0], data_set
        return (Path(Path(data_set.repository).name) if repository else self.folder), data_set


PILE = Published(repository="monology/pile-uncopyrighted", folder=Path("pile"))
SUMMARIES = Published(repository="abisee/cnn_dailymail/3.0.0", folder=Path("cnn_dailymail"))


def downloading_options(default: Published) -> Decorator:
    """Return the options of a command that can fetch what it reads."""
    return options(
        click.option(
            "--download",
            is_flag=True,
            help=f"Fetch the data set from the hub into SRC first.  [default: ./{default.folder}]",
        ),
        click.option(
            "--repository",
            metavar="OWNER/NAME[/FOLDER][@REVISION]",
            help=f"Data set that --download fetches.  [default: {default.repository}]",
        ),
        click.option(
            "--part",
            "parts",
            multiple=True,
            help="Part that --download fetches: train, val, test, or the beginning of its paths, "
            "such as train/00; can be given several times.  [default: all three]",
        ),
    )


def fetch_parts(
    output: Output,
    data_set: DataSet,
    folder: Path,
    parts: Sequence[str],
    patterns: Sequence[str],
) -> tuple[list[tuple[Path, Path]], dict[str, Any]]:
    """Fetch the files of the parts that are missing.

    Returns:
        The files, as `find_source_files` returns them, and fields of the JSON object.
    """
    from runner.data.making.published import list_parts

    listing = list_parts(data_set, parts, patterns, folder)
    fields = fetch_listed(output, listing, folder, named_by="as SRC")
    return [(folder / name, name) for name in sorted(map(Path, listing.files))], fields

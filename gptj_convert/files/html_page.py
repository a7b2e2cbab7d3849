"""A self-contained HTML page made of a template, for people to read, print and show to others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from gptj_convert.files.whole_file import write_whole


def _figure(value: Any) -> str:
    """A number as it is read most easily."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_page(
    path: Path,
    package: str,
    template: str,
    values: Mapping[str, Any],
    *,
    figure: Callable[[Any], str] = _figure,
) -> None:
    """Write the page; an existing one is replaced when the new one is complete.

    Args:
        path: of the page.
        package, template: where the Jinja template is; what it prints is escaped, and what it
            names must be there.
        values: what the template is given.
        figure: the template's filter of that name, which shows a number.

    Raises:
        OSError: it cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["figure"] = figure
    text = (files(package) / template).read_text(encoding="utf-8")
    write_whole(path, environment.from_string(text).render(values))

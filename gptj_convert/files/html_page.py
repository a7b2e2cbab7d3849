"""Self-contained HTML pages, rendered from a template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from gptj_convert.files.whole_file import write_whole


def _figure(value: Any, digits: int = 3) -> str:
    """Return a value as text: thousands separated, fractions at some digits."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def write_page(
    path: Path,
    package: str,
    template: str,
    values: Mapping[str, Any],
    *,
    figure: Callable[..., str] = _figure,
) -> None:
    """Write a page, replacing an existing one once the new one is complete.

    Args:
        path: path of the page.
        package: package that holds the template.
        template: file name of the Jinja template. Its output is escaped, and a name that `values`
            lacks is an error.
        values: variables of the template.
        figure: function behind the template's filter `figure`, which formats a value.

    Raises:
        OSError: the page cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["figure"] = figure
    text = (files(package) / template).read_text(encoding="utf-8")
    write_whole(path, environment.from_string(text).render(values))

"""Names that files state of other files."""

from __future__ import annotations


def is_file_name(name: str) -> bool:
    """Whether a stated name can only mean a file in the same folder."""
    return name.isprintable() and "/" not in name and name not in ("", ".", "..")


def is_inner_path(path: str) -> bool:
    """Whether a stated path, with `/` between its names, can only mean a file further inside."""
    return all(map(is_file_name, path.split("/")))

"""Checks of file names that other files state."""

from __future__ import annotations


def is_file_name(name: str) -> bool:
    """Return whether a stated name can only refer to a file in the same folder."""
    return name.isprintable() and "/" not in name and name not in ("", ".", "..")


def is_inner_path(path: str) -> bool:
    """Return whether a stated path, separated by `/`, can only refer to a file below the folder."""
    return all(map(is_file_name, path.split("/")))

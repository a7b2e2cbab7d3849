"""Checks of file names that other files state, and of names that have a meaning of their own."""

from __future__ import annotations

import re

_LICENSE = re.compile(r"(licen[sc]e|copying|copyright|notice)([._-][\w.+-]*)?", re.IGNORECASE)
#: Ends of names of programs, settings and weights, whatever their beginning.
_NO_TEXT = (".py", ".json", ".jinja", ".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".h5", ".mdl")


def is_file_name(name: str) -> bool:
    """Return whether a stated name can only refer to a file in the same folder."""
    return name.isprintable() and "/" not in name and name not in ("", ".", "..")


def is_inner_path(path: str) -> bool:
    """Return whether a stated path, separated by `/`, can only refer to a file below the folder."""
    return all(map(is_file_name, path.split("/")))


def is_license(name: str) -> bool:
    """Return whether a file's name says that it holds a license or the notices that go with one."""
    return bool(_LICENSE.fullmatch(name)) and not name.lower().endswith(_NO_TEXT)

"""Addresses of hub repositories, in the forms that people type and paste."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from gptj_model.errors import UsageError

#: Host names of the hub.
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_EXAMPLE = "expected OWNER/NAME, OWNER/NAME@REVISION or the address of its page on the hub"
_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_SCHEME = re.compile(r"(https?|hf):/{1,2}", re.IGNORECASE)
#: Path segments that precede a revision in the address of a page.
_PAGES = ("tree", "blob", "resolve", "commit", "raw")


@dataclass(frozen=True, slots=True)
class HubAddress:
    """Model repository and revision."""

    repository: str
    """Name of the repository, as OWNER/NAME."""
    revision: str | None
    """Branch, tag or commit; None is the main branch."""


def parse_address(text: str) -> HubAddress:
    """Parse OWNER/NAME, OWNER/NAME@REVISION, hf://OWNER/NAME@REVISION or the address of a page.

    An address with a single slash after the scheme is accepted: `Path` removes the second one.

    Raises:
        UsageError: the text is none of these, or not the address of a model on the hub.
    """
    found = _SCHEME.match(text)
    if not found:
        host, _, rest = text.partition("/")
        if host.lower() in HOSTS:  # pasted without https://
            return _page(text, host, rest)
        return _plain(text, text)
    rest = text[found.end() :]
    if found[1].lower() == "hf":
        return _plain(text, rest.removeprefix("models/").rstrip("/"))
    parts = urlsplit("https://" + rest)
    return _page(text, parts.netloc, parts.path.lstrip("/"))


def is_repository(text: str) -> bool:
    """Return whether a text has the form OWNER/NAME."""
    found = _NAME.fullmatch(text)
    return bool(found and not found["revision"])


def is_address(text: str) -> bool:
    """Return whether a text begins with `http`, `hf:` or the host of the hub."""
    return bool(_SCHEME.match(text)) or text.split("/")[0].lower() in HOSTS


def _plain(text: str, name: str) -> HubAddress:
    found = _NAME.fullmatch(name)
    if not found:
        raise UsageError(f"{text!r} is not a repository's name", hint=_EXAMPLE)
    return HubAddress(found["name"], found["revision"])


def _page(text: str, host: str, path: str) -> HubAddress:
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    if host.lower() not in {*HOSTS, endpoint.lower()}:
        raise UsageError(
            f"{text!r} is an address on {host!r}, expected one on {HOSTS[0]}",
            hint="for a mirror, set HF_ENDPOINT to its address",
        )
    path = path.partition("?")[0].partition("#")[0]
    parts = [unquote(p) for p in path.rstrip("/").split("/")]
    if parts[0] in ("datasets", "spaces"):
        raise UsageError(f"{text!r} is an address in {parts[0]}, expected that of a model")
    if len(parts) < 2:
        raise UsageError(f"{text!r} is not the address of a model's page", hint=_EXAMPLE)
    name, revision = "/".join(parts[:2]).removesuffix(".git"), None
    if len(parts) > 3 and parts[2] in _PAGES:
        # In such an address, the slashes of a revision are written as %2F, except in refs/pr/N.
        several = 3 if parts[3] == "refs" else 1
        revision = "/".join(parts[3 : 3 + several])
    plain = _plain(text, name)
    return HubAddress(plain.repository, revision or plain.revision)

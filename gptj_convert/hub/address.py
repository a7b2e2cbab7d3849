"""Names of the hub's repositories as people write and paste them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from gptj_model.errors import UsageError

#: Where the hub is.
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_EXAMPLE = "expected OWNER/NAME, OWNER/NAME@REVISION or the address of its page on the hub"
_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_SCHEME = re.compile(r"(https?|hf):/{1,2}", re.IGNORECASE)
#: What stands before a revision in the address of a page.
_PAGES = ("tree", "blob", "resolve", "commit", "raw")


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A repository of models, and which state of it."""

    repository: str
    """OWNER/NAME."""
    revision: str | None
    """Branch, tag or commit; None is the main branch."""


def parse_address(text: str) -> HubAddress:
    """Read OWNER/NAME, OWNER/NAME@REVISION, hf://OWNER/NAME@REVISION or a page's address.

    A path of the file system has lost a slash of such an address, which is taken all the same.

    Raises:
        UsageError: it is none of these, or an address that is not of the hub's models.
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


def is_address(text: str) -> bool:
    """Whether a text is an address, with `http`, `hf:` or the host of the hub."""
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
            f"{text!r} is an address of {host!r}, expected one of {HOSTS[0]}",
            hint="for a mirror, set HF_ENDPOINT to its address",
        )
    path = path.partition("?")[0].partition("#")[0]
    parts = [unquote(p) for p in path.rstrip("/").split("/")]
    if parts[0] in ("datasets", "spaces"):
        raise UsageError(f"{text!r} is an address of {parts[0]}, expected one of a model")
    if len(parts) < 2:
        raise UsageError(f"{text!r} is not the address of a model's page", hint=_EXAMPLE)
    name, revision = "/".join(parts[:2]).removesuffix(".git"), None
    if len(parts) > 3 and parts[2] in _PAGES:
        # A revision with a slash is written with %2F in such an address, but for refs/pr/N.
        several = 3 if parts[3] == "refs" else 1
        revision = "/".join(parts[3 : 3 + several])
    plain = _plain(text, name)
    return HubAddress(plain.repository, revision or plain.revision)

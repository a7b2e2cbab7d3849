"""Addresses in object storage, such as s3://bucket/path.

The standard library only, so that the command line can tell them from paths without loading the
clients.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gptj_model.errors import UsageError

#: Module of the client by the protocol of an address. The extra `remote` installs them.
CLIENTS: Mapping[str, str] = {"s3": "s3fs", "gs": "gcsfs"}
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)


def is_remote(text: str) -> bool:
    """Return whether a text is an address in object storage rather than a path.

    Raises:
        UsageError: it is an address of another kind, or names no bucket.
    """
    if not (found := _ADDRESS.fullmatch(text)):
        return False
    protocol, rest = found.groups()
    if protocol not in CLIENTS:
        raise UsageError(
            f"{text}: has the protocol {protocol}://, expected a path or one of "
            + ", ".join(f"{name}://" for name in CLIENTS)
        )
    if not rest.strip("/") or rest.startswith("/"):
        raise UsageError(f"{text}: names no bucket, expected {protocol}://BUCKET/PATH")
    return True

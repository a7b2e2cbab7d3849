"""Asking the hub for one thing, again and again while that may help, with faults a person can use.

The library's client does the asking: its session, headers, token and errors. Its own download
begins again from zero after an interruption and compares sizes only, hence `transfer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptj_model.errors import FileFault, HubFault

#: Failures in a row that bring no byte more, and seconds before the second try; then they double.
TRIES, WAIT = 5, 1.0


class Unreachable(HubFault):
    """No answer from the hub, or none that helps."""


class WrongContent(Exception):
    """What arrived is not the file."""


@contextmanager
def hub_faults(where: str, kept: Callable[[], str] = lambda: "") -> Generator[None]:
    """The client's exceptions as ours. Their texts hold URLs, which may be signed: not shown."""
    from httpx2 import RequestError
    from huggingface_hub import errors

    again = "check the network, then run the same command again: a partial download is resumed"
    try:
        yield
    except errors.GatedRepoError:
        hint = "accept its terms on the hub, then `hf auth login`"
        raise HubFault(f"{where}: access is gated", hint=hint) from None
    except errors.RevisionNotFoundError:
        hint = "see its branches and tags on the hub"
        raise HubFault(f"{where}: has no such revision", hint=hint) from None
    except errors.RepositoryNotFoundError:
        hint = "check the name; for a private repository, `hf auth login`"
        raise HubFault(f"{where}: not found, or private", hint=hint) from None
    except errors.HfHubHTTPError as e:
        answer = f"{where}: the hub answers {e.response.status_code} {e.response.reason_phrase}"
        if e.response.status_code in (401, 403):
            hint = "check the token: `hf auth login`, or HF_TOKEN if it is set"
            raise HubFault(answer, hint=hint) from None
        raise Unreachable(answer + kept(), hint=again) from None
    except errors.OfflineModeIsEnabled:
        why = "HF_HUB_OFFLINE is set, and its cache does not hold all that is needed"
        hint = "unset HF_HUB_OFFLINE, or name a folder that holds the files"
        raise Unreachable(f"{where}: the hub cannot be reached: {why}{kept()}", hint=hint) from None
    except RequestError as e:
        why = str(e) or type(e).__name__
        raise Unreachable(
            f"{where}: the hub cannot be reached: {why}{kept()}", hint=again
        ) from None


def persist(
    attempt: Callable[[], Any],
    reached: Callable[[], int] = lambda: 0,
    at_once: tuple[type[Exception], ...] = (),
) -> Any:
    """Call again while that may help; `at_once` and the hub's refusals are raised directly."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError

    failures, furthest = 0, reached()
    while True:
        try:
            return attempt()
        except (TransportError, HfHubHTTPError) as e:
            failures = 1 if reached() > furthest else failures + 1
            furthest = max(furthest, reached())
            if failures == TRIES or not _passing(e) or isinstance(e, at_once):
                raise
        time.sleep(WAIT * 2 ** (failures - 1))


def transfer(url: str, part: Path, size: int, tell: Callable[[int], None]) -> None:
    """One request: go on with `part` from where it ends."""
    from httpx2 import RemoteProtocolError
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    if (have := file_size(part)) == size:
        return
    if have is None or have > size:
        have = 0
    # Compressed answers have neither the sizes nor the offsets of the file.
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        if response.status_code == 416:
            part.unlink(missing_ok=True)
        hf_raise_for_status(response)
        have = have if response.status_code == 206 else 0
        length = response.headers.get("Content-Length", str(size - have))
        if length != str(size - have):
            kind = response.headers.get("Content-Type", "unknown type")
            raise WrongContent(f"has {length} bytes ({kind}), expected {size - have}")
        try:
            with part.open("ab" if have else "wb") as out:
                for chunk in response.iter_bytes(2**20):
                    out.write(chunk)
                    have += len(chunk)
                    if have > size:
                        raise WrongContent(f"has more than {size} bytes")
                    tell(have)
        except OSError as e:
            hint = "see to the disk and run the same command again; it goes on from there"
            raise FileFault(f"{part}: cannot be written: {e.strerror}", hint=hint) from None
    if have < size:
        raise RemoteProtocolError(f"the answer ended after {have} of {size} bytes")


def _passing(error: Exception) -> bool:
    """Whether the next try may fare better: everything but an answer that will stay the same."""
    response = getattr(error, "response", None)
    return response is None or response.status_code in (408, 416, 429) or response.is_server_error


def file_size(path: Path) -> int | None:
    """Bytes of a file; None when there is none."""
    return path.stat().st_size if path.is_file() else None

"""Requests to the hub, with retries and errors that name a remedy.

Session, headers, token and errors are those of huggingface_hub. Its own download starts again from
zero after an interruption and compares only sizes, hence `transfer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from gptj_model.errors import FileFault, HubFault

T = TypeVar("T")

#: Number of failures in a row without a new byte after which a request is given up, and seconds
#: before the second attempt, which double with each further one.
TRIES, WAIT = 5, 1.0


class Unreachable(HubFault):
    """The hub does not answer, or not usefully."""


class WrongContent(Exception):
    """The content that arrived is not that of the file."""


@contextmanager
def hub_faults(where: str, progress_text: Callable[[], str] = lambda: "") -> Generator[None]:
    """Turn exceptions of huggingface_hub into faults.

    The texts of HTTP errors contain URLs, which may be signed, and are not shown.

    Args:
        where: repository or file, for errors.
        progress_text: function that returns a suffix about a partial download, for errors.
    """
    from httpx2 import RequestError
    from huggingface_hub import errors

    again = "check the network, then run the same command again: a partial download resumes"
    try:
        yield
    except errors.GatedRepoError:
        hint = "accept its terms on the hub, then run `hf auth login`"
        raise HubFault(f"{where}: access is gated", hint=hint) from None
    except errors.RevisionNotFoundError:
        hint = "see its branches and tags on the hub"
        raise HubFault(f"{where}: the revision does not exist", hint=hint) from None
    except errors.RepositoryNotFoundError:
        hint = "check the name; for a private repository, run `hf auth login`"
        raise HubFault(f"{where}: not found, or private", hint=hint) from None
    except errors.HfHubHTTPError as e:
        answer = f"{where}: the hub answered {e.response.status_code} {e.response.reason_phrase}"
        if e.response.status_code in (401, 403):
            hint = "check the token: `hf auth login`, or HF_TOKEN if it is set"
            raise HubFault(answer, hint=hint) from None
        raise Unreachable(answer + progress_text(), hint=again) from None
    except errors.OfflineModeIsEnabled:
        why = "HF_HUB_OFFLINE is set, and the hub's cache lacks a required file"
        hint = "unset HF_HUB_OFFLINE, or name a folder that holds the files"
        raise Unreachable(
            f"{where}: the hub cannot be reached: {why}{progress_text()}", hint=hint
        ) from None
    except RequestError as e:
        why = str(e) or type(e).__name__
        raise Unreachable(
            f"{where}: the hub cannot be reached: {why}{progress_text()}", hint=again
        ) from None


class _Attempts:
    """Counts failed attempts, and waits before the next one.

    Args:
        reached: function that returns the number of bytes downloaded so far.
        at_once: exceptions that are raised without another attempt.
    """

    def __init__(
        self, reached: Callable[[], int], at_once: tuple[type[Exception], ...] = ()
    ) -> None:
        self._reached = reached
        self._at_once = at_once
        self._failures, self._furthest = 0, reached()

    def fail(self, error: Exception) -> None:
        """Wait before another attempt, or raise the error if none may succeed."""
        reached = self._reached()
        self._failures = 1 if reached > self._furthest else self._failures + 1
        self._furthest = max(self._furthest, reached)
        last = self._failures == TRIES
        if last or not _may_pass(error) or isinstance(error, self._at_once):
            raise error
        time.sleep(WAIT * 2 ** (self._failures - 1))


def retry(attempt: Callable[[], T], at_once: tuple[type[Exception], ...] = ()) -> T:
    """Return the result of a function, called again while another attempt may succeed.

    Args:
        attempt: function that sends the request.
        at_once: exceptions that are raised without another attempt.
    """
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError

    attempts = _Attempts(lambda: 0, at_once)
    while True:
        try:
            return attempt()
        except (TransportError, HfHubHTTPError) as e:
            attempts.fail(e)


def transfer(url: str, part: Path, size: int) -> Iterator[int]:
    """Download a file, resuming at the end of its part while another attempt may succeed.

    Args:
        url: address of the file.
        part: path of the partial file.
        size: size of the whole file, in bytes.

    Yields:
        The number of bytes downloaded so far.

    Raises:
        WrongContent: the answer has another size.
        FileFault: writing fails.
    """
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError

    attempts = _Attempts(lambda: file_size(part) or 0)
    while True:
        try:
            yield from _transfer_once(url, part, size)
            return
        except (TransportError, HfHubHTTPError) as e:
            attempts.fail(e)


def _transfer_once(url: str, part: Path, size: int) -> Iterator[int]:
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
                    yield have
        except OSError as e:
            hint = "check the disk, then run the same command again to resume"
            raise FileFault(f"{part}: cannot be written: {e.strerror}", hint=hint) from None
    if have < size:
        raise RemoteProtocolError(f"the answer ended after {have} of {size} bytes")


def _may_pass(error: Exception) -> bool:
    """Return whether another attempt may succeed, as after any error but a final answer."""
    response = getattr(error, "response", None)
    return response is None or response.status_code in (408, 416, 429) or response.is_server_error


def file_size(path: Path) -> int | None:
    """Return the size of a file in bytes, or None if it does not exist."""
    return path.stat().st_size if path.is_file() else None

"""Clients of object storage, and their failures as one clear error each."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from gptj_model.errors import FileFault, GptjError
from runner.data.remote.address import CLIENTS

#: What names the credentials of a protocol.
_CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
}
#: Seconds to wait for a connection, and for bytes on it, and number of attempts.
_CONNECT, _READ, _ATTEMPTS = 10, 60, 3


@cache
def client(protocol: str) -> Any:
    """Return the fsspec file system of a protocol, with few retries and without cached listings.

    Raises:
        ModuleNotFoundError: its package is not installed.
    """
    module = import_module(CLIENTS[protocol])
    for name in (CLIENTS[protocol], "aiobotocore", "botocore"):  # faults are reported here
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    if protocol == "s3":
        config = {
            "retries": {"mode": "standard", "total_max_attempts": _ATTEMPTS},
            "connect_timeout": _CONNECT,
            "read_timeout": _READ,
        }
        return module.S3FileSystem(config_kwargs=config, use_listings_cache=False)
    # The class of the package itself asks for the layout of a bucket first, through gRPC.
    return import_module("gcsfs.core").GCSFileSystem(use_listings_cache=False)


@contextmanager
def faults(address: str, doing: str = "read", *, begun: bool = False) -> Iterator[None]:
    """Turn what the clients raise into one error that names the address.

    Args:
        address: address that is used.
        doing: "read", "written" or "deleted".
        begun: whether it existed when the work began.

    Raises:
        FileFault: the file or bucket does not exist, access is denied, credentials are missing,
            or the network fails.
    """
    try:
        yield
    except (GptjError, ImportError, MemoryError):
        raise
    except Exception as e:  # they raise OSErrors, and errors of several libraries below them
        fault = _fault(e, address, doing)
        if begun and fault.message == f"{address}: not found":
            fault = FileFault(f"{address}: has vanished while it was read")
        raise fault from None


def changed(address: str) -> FileFault:
    """Return the error for an object that is replaced while a command uses it."""
    return FileFault(
        f"{address}: has changed while it was read",
        hint="run the command again when nobody writes it",
    )


def _fault(error: Exception, address: str, doing: str) -> FileFault:
    protocol = address.partition(":")[0]
    kinds = {kind.__name__ for kind in type(error).__mro__}
    words = " ".join(str(error).split()) or type(error).__name__
    code = str(getattr(error, "code", ""))
    if kinds & {"FileExpired"}:
        return changed(address)
    if "bucket does not exist" in words or "NoSuchBucket" in words:
        bucket = "/".join(address.split("/")[:3])
        return FileFault(f"{bucket}: the bucket does not exist", hint="check its name")
    if isinstance(error, FileNotFoundError) or code == "404":
        return FileFault(f"{address}: not found", hint="check the address, or list the bucket")
    credentials = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
    if kinds & {*credentials, "TokenRetrievalError", "ProfileNotFound", "RefreshError"}:
        return FileFault(f"{address}: no valid credentials: {words}", hint=_CREDENTIALS[protocol])
    if isinstance(error, PermissionError) or code in ("401", "403"):
        return FileFault(f"{address}: access is denied: {words}", hint=_CREDENTIALS[protocol])
    network = {"HTTPClientError", "ClientConnectionError", "ServerTimeoutError", "TimeoutError"}
    if kinds & {*network, "ConnectionError", "ClientError", "EndpointConnectionError"}:
        return FileFault(
            f"{address}: the storage cannot be reached: {words}",
            hint="check the network, and run the command again",
        )
    return FileFault(f"{address}: cannot be {doing}: {words}")

"""A local S3 server, as the AWS client finds it by its environment."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from runner.data.remote import storage

BUCKET = "bucket"


def forget_clients() -> None:
    """Make the next use of object storage read the environment again."""
    storage.client.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextmanager
def s3_server() -> Iterator[Any]:
    """Run a server with one bucket, and yield the fsspec client of it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        forget_clients()
        files = storage.client("s3")
        files.mkdir(BUCKET)
        yield files
    server.stop()
    forget_clients()


@contextmanager
def gs_server() -> Iterator[Any]:
    """Run a server of Google Cloud Storage with one bucket, and yield the client of it."""
    import fsspec.config
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    api: Any = server._api._httpd
    port = api.server_port
    # It prints a traceback where a client that has read enough closes the connection.
    api.handle_error = lambda *arguments: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        storage.client.cache_clear()
        yield storage.client("gs")
    server.stop()
    storage.client.cache_clear()

"""What libraries of C++ write while they start, kept from people and from results."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_chatter(descriptor: int) -> Iterator[None]:
    """Drop what is written to a file descriptor, by whatever library.

    Args:
        descriptor: 1 for stdout, 2 for stderr.
    """
    kept = os.dup(descriptor)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), descriptor)
        try:
            yield
        finally:
            os.dup2(kept, descriptor)
            os.close(kept)

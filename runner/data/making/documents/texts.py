"""Documents of plain text: whole files, and texts that are read in pieces."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

from runner.data.making.documents import document
from runner.data.making.documents.document import Form, Problem, Raw, damage, not_utf8
from runner.data.making.documents.streams import Stream, damages, in_words
from runner.data.making.long_line import Damaged
from runner.data.making.pieces import pieces


def read_whole(path: Path) -> Iterator[tuple[Raw | Problem, int]]:
    """Yield the content of a file as one document, or as its pieces."""
    with closing(Stream(path)) as stream:
        try:
            stream.begin()
            data = stream.file.read(document.LONG)
            if len(data) < document.LONG:
                yield Raw(data, Form.TEXT, str(path), 1), stream.tell()
                return
        except Damaged as e:
            yield damage(path, e), stream.tell()
            return
        except damages() as e:
            yield Problem(f"{path}:1", in_words(e)), stream.tell()
            return
    for item in long_text(path, 1, lambda: _blocks(path)):
        yield item, 0


def _blocks(path: Path) -> Iterator[bytes]:
    with closing(Stream(path)) as stream:
        stream.begin()
        while block := stream.file.read(document.PIECE):
            yield block


def long_text(
    path: Path, place: int, blocks: Callable[[], Iterable[bytes]], *, in_lines: bool = True
) -> Iterator[Raw | Problem]:
    """Yield a long text in pieces, or its problem.

    Args:
        path: file that holds the text.
        place: line or number of the document.
        blocks: function whose every call yields the bytes of the text.
        in_lines: whether the place of a problem is a line of the file.
    """
    line = place
    try:
        for text in _decoded(blocks()):
            line += text.count("\n") if in_lines else 0
    except UnicodeDecodeError as e:
        line += bytes(e.object[: e.start]).count(b"\n") if in_lines else 0
        yield Problem(f"{path}:{line}", not_utf8(e))
        return
    except damages() as e:
        yield Problem(f"{path}:{line}", in_words(e))
        return
    yield from in_pieces(_decoded(blocks()), str(path), place)


def in_pieces(texts: Iterable[str], path: str, place: int, after: int = 0) -> Iterator[Raw]:
    """Yield a text as pieces of a document; path, place and after are those of `Raw`."""
    last: str | None = None
    for text in pieces(texts, document.PIECE):
        if last is not None:
            yield Raw(last.encode(), Form.TEXT, path, place, more=True, after=after)
        last = text
    yield Raw((last or "").encode(), Form.TEXT, path, place, after=after)


def _decoded(blocks: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for block in blocks:
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)

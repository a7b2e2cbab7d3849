"""Which library turns texts into ids, and the ids by it.

`tokenizers` says what the ids are. gigatoken gives the same ids a hundred times faster, and does so
for texts that it is known to treat alike: see `guard`. It is optional; without it, or with a
tokenizer that is not GPT-2's kind of byte-level BPE, `tokenizers` does all of the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import orjson
from tokenizers import Tokenizer
from tokenizers import __version__ as tokenizers_version

from gptj_model.errors import DataFault
from runner.data.tokenizing import guard

NAMES = TOKENIZERS, GIGATOKEN = "tokenizers", "gigatoken"

#: Number of characters given to `tokenizers` in one call: until its id is read, a token takes 100
#: bytes.
_TOGETHER = 2**18
#: One text of this many is encoded by both libraries and compared.
_CHECKED = 1000
#: Growth of a process in bytes at which gigatoken, whose cache has no bound, begins again.
_MOST_GROWTH = 32 * 2**20
#: Number of characters between two looks at the memory.
_LOOK = 2**20


@dataclass(frozen=True, slots=True)
class Backend:
    """Library that was chosen, and what it leaves to `tokenizers`."""

    name: str
    version: str
    differing: guard.Ranges = ()
    """Code points whose texts are left to `tokenizers`."""
    why: str = ""
    """Reason why gigatoken is not used."""


@runtime_checkable
class HasBackend(Protocol):
    """What chooses a backend; anything else uses `tokenizers`."""

    @property
    def backend(self) -> Backend:
        """Library that turns its texts into ids."""
        ...


def backend_of(user: object) -> Backend:
    """Return the backend that an object uses."""
    return user.backend if isinstance(user, HasBackend) else _plain("")


class TokensDiffer(Exception):
    """The libraries gave different ids for a text.

    Attributes:
        number: which of the texts it is.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"text {number}")
        self.number = number


def tokens_differ(where: str, backend: Backend) -> DataFault:
    """Return the error for a document that the libraries give different ids for."""
    return DataFault(
        f"{where}: {backend.name} {backend.version} gives other tokens than tokenizers, expected "
        "the same",
        hint=f"run `pip uninstall {backend.name}`; the command works without it",
    )


@lru_cache(maxsize=4)
def choose(settings: str) -> Backend:
    """Return the backend for a tokenizer.json, given as text; it depends on the tokenizer and what
    is installed."""
    try:
        version = metadata.version(GIGATOKEN)
        import gigatoken.gigatoken_rs  # noqa: F401
    except ImportError:
        return _plain("it is not installed")
    if why := unsupported(orjson.loads(settings)):
        return _plain(why)
    bare = _bare(settings)
    try:
        differing, other = _differing(version), _open(bare)
    except Exception as e:  # what it raises is not documented
        return _plain(f"it cannot read the tokenizer: {e}")
    tokenizer = Tokenizer.from_str(bare)
    if guard.unequal(tokenizer, other, guard.vocabulary_sample(tokenizer)):
        return _plain("it gives other ids for tokens of the vocabulary")
    return Backend(GIGATOKEN, version, differing)


def _plain(why: str) -> Backend:
    return Backend(TOKENIZERS, tokenizers_version, why=why)


@lru_cache
def _differing(version: str) -> guard.Ranges:
    """Return the code points that gigatoken of this version classes differently."""
    pair = f"{GIGATOKEN} {version}", f"{TOKENIZERS} {tokenizers_version}"
    if known := guard.KNOWN.get(pair):
        # On another processor, another path through its code may run.
        marking = _open(guard.marking_tokenizer().to_str())
        if guard.digest(marking, known.differing) == known.digest:
            return known.differing
    return guard.differing(_open)  # takes seconds


def unsupported(settings: dict[str, Any]) -> str | None:
    """Return why gigatoken is not used with a tokenizer.json, or None if it may be used."""
    model, splitter = settings["model"], settings["pre_tokenizer"] or {}
    if model.get("type") != "BPE":
        return f"the model is {model.get('type')}, expected BPE"
    extras = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    extras += ("byte_fallback", "ignore_merges")
    if extra := next((name for name in extras if model.get(name)), None):
        return f"the model has {extra}"
    if settings["normalizer"] is not None:
        return "the tokenizer normalizes texts"
    if (splitter.get("type"), splitter.get("use_regex", True)) != ("ByteLevel", True):
        return "the tokenizer does not split words as GPT-2's does"
    if splitter["add_prefix_space"]:
        return "the tokenizer adds a space before a text"
    if not guard.covers_bytes(model["vocab"]):
        return "the vocabulary lacks bytes"
    return None


def _open(settings: str) -> guard.Encode:
    """Return gigatoken's function from a text to its ids, for a tokenizer.json as text."""
    from gigatoken.gigatoken_rs import load_hf_json

    return load_hf_json(settings).encode


@lru_cache(maxsize=4)
def _bare(settings: str) -> str:
    """Return a tokenizer.json, given as text, without added tokens."""
    bare = orjson.loads(settings) | {"added_tokens": [], "post_processor": None}
    return orjson.dumps(bare).decode()


class TextTokenizer:
    """Turns texts into ids, exactly those of `tokenizers`.

    Args:
        tokenizer: the tokenizer that says what the ids are.
        backend: library to use where it gives the same ids; see `choose`.

    Attributes:
        dtype: type of the ids: uint16 if it suffices, to send half the bytes between processes.
    """

    def __init__(self, tokenizer: Tokenizer, backend: Backend) -> None:
        self._tokenizer = tokenizer
        last = max(tokenizer.get_vocab().values(), default=0)
        self.dtype = np.dtype(np.uint16 if last < 2**16 else np.int32)
        is_fast = backend.name == GIGATOKEN
        self._settings = _bare(tokenizer.to_str()) if is_fast else ""
        self._differing = guard.Characters(backend.differing)
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self._added = added
        self._prefix = os.path.commonprefix(added)  # noqa: RUF071 - a prefix of texts is meant
        self._fast: guard.Encode | None = None
        self._seen = self._looked = 0

    def _begin(self) -> None:
        self._fast = None  # frees the cache before the next one grows
        self._fast = _open(self._settings)
        self._before = _resident()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, of the type `dtype`.

        Raises:
            TokensDiffer: the libraries give different ids for a text.
        """
        if not self._settings:
            return self._plain(texts)
        if self._fast is None:
            self._begin()
        left = [n for n, text in enumerate(texts) if self._leaves(text)]
        plain = dict(zip(left, self._plain([texts[n] for n in left]), strict=True))
        return [plain[n] if n in plain else self._encode(text, n) for n, text in enumerate(texts)]

    def _leaves(self, text: str) -> bool:
        """Return whether a text is left to `tokenizers`."""
        if self._added and self._prefix in text and any(word in text for word in self._added):
            return True
        return not text.isascii() and self._differing.occur_in(text)

    def _encode(self, text: str, number: int) -> np.ndarray:
        assert self._fast
        if self._looked >= _LOOK:
            self._looked = 0
            if _resident() - self._before > _MOST_GROWTH:
                self._begin()
        ids = self._fast(text).astype(self.dtype)
        if self._seen % _CHECKED == 0 and not np.array_equal(ids, self._plain([text])[0]):
            raise TokensDiffer(number)
        self._seen += 1
        self._looked += len(text)
        return ids

    def _plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [
            np.array(encoding.ids, self.dtype)
            for group in _groups(texts)
            for encoding in self._tokenizer.encode_batch_fast(group, add_special_tokens=False)
        ]


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


def _resident() -> int:
    """Return the memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")

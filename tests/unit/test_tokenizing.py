"""The fast backend gives exactly the ids of `tokenizers`, and what is uncertain is left to it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from runner.data.making.tokenizer import load_tokenizer
from runner.data.tokenizing import backend, guard
from runner.data.tokenizing.backend import GIGATOKEN, TextTokenizer, TokensDiffer, choose

#: Assigned in Unicode 17, so one of the libraries takes it for a letter.
NEW_LETTER = "\U000323b0"
Opened = Callable[[str], guard.Encode]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts that each opened gigatoken has encoded."""
    found: list[list[str]] = []
    real = backend._open

    def opening(settings: str) -> guard.Encode:
        encode, seen = real(settings), []
        found.append(seen)
        return lambda text: (seen.append(text), encode(text))[1]

    backend.choose.cache_clear()
    monkeypatch.setattr(backend, "_open", opening)
    return found


def same(ours: TextTokenizer, tokenizer: Tokenizer, texts: list[str]) -> None:
    expected = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, ids, encoding in zip(texts, ours.encode(texts), expected, strict=True):
        assert ids.dtype == np.uint16
        assert ids.tolist() == encoding.ids, ascii(text)


# Fuzzing.

SPACES = "  \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u180e\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"
SPECIAL = [
    *("'s", "'S", "'t", "'re", "'ve", "'m", "'ll", "'d", "''s", "\u2019s", "n't", "'"),
    *("<|endoftext|>", "<|extratoken_1|>", "<|extratoken_143|>", "<|", "<|endoftext", "|>"),
    *("\u0301", "\u0345", "e\u0301", "\u1e9e", "\u0130", "\ufb01", "\u05d0\u05b0", "\u0e01\u0e33"),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f"),
    *("\ud7ff", "\ue000", "\ufffd", "\uffff", "\U0010ffff", "\0", "\x7f", "\x80", "\u2160"),
    *("\u00b2", "\u00bd", "\u0660", "\u4e00", "\u3007", "\U00020000", "\U0002ebf0", NEW_LETTER),
    *("https://", "www.", "->", "==", "...", "!!", "\u2026", "://", "\\n", "0x", "1_000", "3.14"),
]
WORDS = ["the", "of", "hello", "don't", "GPT", "Straße", "naïve", "你好", "世界", "мир", "नमस्ते"]


def _any_character(draw: random.Random) -> str:
    point = draw.choice((0x250, 0x3000, 0x10000, 0x20000, 0x33500, 0x110000))
    character = chr(draw.randrange(point))
    return "?" if "\ud800" <= character <= "\udfff" else character


def fuzzed(seed: int, count: int) -> Iterator[str]:
    """Yield texts of every plane, and of what splits words in unusual ways."""
    draw = random.Random(seed)
    for _ in range(count):
        parts: list[str] = []
        for _ in range(draw.randrange(1, 9)):
            kind = draw.randrange(8)
            if kind == 0:
                parts.append("".join(draw.choices(SPACES, k=draw.randrange(1, 5))))
            elif kind == 1:
                parts.append(draw.choice(SPECIAL))
            elif kind == 2:
                parts.append(str(draw.randrange(10 ** draw.randrange(1, 12))))
            elif kind == 3:
                parts.append(chr(draw.randrange(0x80)) * draw.randrange(1, 4))
            elif kind < 6:
                parts.append(draw.choice(("", " ")) + draw.choice(WORDS))
            else:
                parts.append("".join(_any_character(draw) for _ in range(draw.randrange(1, 4))))
        if draw.random() < 0.001:
            parts.append(draw.choice(("a", "ab1", "!?", "\u4e00", " ")) * draw.randrange(3000))
        yield "".join(parts)


def _fuzz(folder: Path, opened: list[list[str]], seeds: range, count: int) -> None:
    for seed in seeds:
        tokenizer = load_tokenizer(folder, allow_special=bool(seed % 2))
        assert choose(tokenizer.to_str()).name == GIGATOKEN
        ours = TextTokenizer(tokenizer, choose(tokenizer.to_str()))
        texts = list(fuzzed(seed, count))
        same(ours, tokenizer, texts)
        # Most of them are not left to the other library, which would prove nothing.
        assert len(opened.pop()) > 0.8 * count


def test_fuzzed_texts(folder: Path, opened: list[list[str]]):
    _fuzz(folder, opened, range(2), 25_000)


@pytest.mark.full
def test_two_million_fuzzed_texts(folder: Path, opened: list[list[str]]):
    _fuzz(folder, opened, range(100, 140), 50_000)


def test_very_long_words(tokenizer: Tokenizer):
    ours = TextTokenizer(tokenizer, choose(tokenizer.to_str()))
    draw = random.Random(1)
    same(ours, tokenizer, ["".join(draw.choices("abcde", k=n)) for n in (10**4, 10**5)])
    same(ours, tokenizer, ["\u4e00" * 50_000, " " * 50_000, "1" * 50_000, "\U0001f600" * 20_000])


# The guard.


@pytest.mark.full
def test_the_known_differences_are_all():
    (known,) = guard.KNOWN.values()
    differing = guard.differing(backend._open)
    assert differing == known.differing
    assert sum(last - first + 1 for first, last in differing) == 4657
    assert guard.Characters(differing).occur_in(f"x{NEW_LETTER}")
    assert not guard.Characters(differing).occur_in("Straße \U0001f600 你好")
    tokenizer = guard.marking_tokenizer()

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text).ids)

    assert guard.digest(encode, differing) == known.digest


def test_the_known_differences_are_not_trusted_blindly(monkeypatch: pytest.MonkeyPatch):
    (known,) = guard.KNOWN.values()
    measured: list[Opened] = []
    monkeypatch.setattr(guard, "differing", lambda opened: measured.append(opened) or ())
    backend._differing.cache_clear()
    assert backend._differing("0.10.0") == known.differing
    backend._differing.cache_clear()
    monkeypatch.setattr(backend, "_open", _mistaken(backend._open, "\U0001f600", "A"))
    assert backend._differing("0.10.0") == ()
    assert backend._differing("0.11.0") == ()
    backend._differing.cache_clear()
    assert len(measured) == 2


def _mistaken(real: Opened, character: str, for_: str) -> Opened:
    def opening(settings: str) -> guard.Encode:
        encode = real(settings)
        return lambda text: encode(text.replace(character, for_))

    return opening


@pytest.mark.parametrize("planted", ["é", "²", "\u2003", "\U000e0100"])
def test_a_planted_class_is_found(planted: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "_LAST", 0x3000 if planted < "\u3000" else 0xE0200)
    monkeypatch.setattr(guard, "_SURROGATES", range(0x3000, 0xE0000))
    found = guard.differing(_mistaken(backend._open, planted, "!"))
    assert (ord(planted), ord(planted)) in found


def test_a_text_with_a_differing_character_is_left(tokenizer: Tokenizer, opened: list[list[str]]):
    ours = TextTokenizer(tokenizer, choose(tokenizer.to_str()))
    opened.clear()
    texts = ["plain", f"a{NEW_LETTER}1", "<|endoftext|> is text", "x<|extratoken_7|>", "<|other|>"]
    same(ours, tokenizer, texts)
    assert opened == [["plain", "<|other|>"]]


def test_every_thousandth_text_is_compared(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    chosen = choose(tokenizer.to_str())
    monkeypatch.setattr(backend, "_open", _mistaken(backend._open, "wrong", "other"))
    with pytest.raises(TokensDiffer) as caught:
        TextTokenizer(tokenizer, chosen).encode(["wrong"])
    assert caught.value.number == 0
    ours = TextTokenizer(tokenizer, chosen)
    ours.encode(["right", *["wrong"] * 999])  # these are not looked at
    with pytest.raises(TokensDiffer) as caught:
        ours.encode(["wrong"])
    ours = TextTokenizer(tokenizer, chosen)
    ours.encode([f"<|endoftext|> {NEW_LETTER}", "right"])
    with pytest.raises(TokensDiffer) as caught:
        ours.encode(["right"] * 999 + ["wrong"])
    assert caught.value.number == 999


def test_another_vocabulary_is_noticed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    real = backend._open

    def without_some_merges(settings: str) -> guard.Encode:
        values = json.loads(settings)
        del values["model"]["merges"][49_000:]
        return real(json.dumps(values))

    backend.choose.cache_clear()
    monkeypatch.setattr(backend, "_open", without_some_merges)
    chosen = choose(tokenizer.to_str())
    backend.choose.cache_clear()
    assert (chosen.name, chosen.why) == (
        "tokenizers",
        "it gives other ids for tokens of the vocabulary",
    )


def test_what_it_cannot_read_is_left(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    def broken(settings: str) -> guard.Encode:
        raise RuntimeError("no such thing")

    backend.choose.cache_clear()
    monkeypatch.setattr(backend, "_open", broken)
    chosen = choose(tokenizer.to_str())
    backend.choose.cache_clear()
    assert chosen.name == "tokenizers"
    assert "no such thing" in chosen.why


def test_it_begins_again_at_a_limit(
    tokenizer: Tokenizer, opened: list[list[str]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backend, "_LOOK", 1)
    monkeypatch.setattr(backend, "_MOST_GROWTH", -(2**40))
    ours = TextTokenizer(tokenizer, choose(tokenizer.to_str()))
    opened.clear()
    same(ours, tokenizer, ["one", "two", "three"])
    assert opened == [["one"], ["two"], ["three"]]


# Tokenizers that it is not used with.


def _small() -> Tokenizer:
    vocabulary = {sign: n for n, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary | {"he": 256}, [("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _prefixed(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _normalized(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()


def _whole(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _with_dropout(tokenizer: Tokenizer) -> None:
    tokenizer.model.dropout = 0.5


def _without_bytes(tokenizer: Tokenizer) -> None:
    tokenizer.model = BPE({"h": 0, "e": 1, "he": 2}, [("h", "e")])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_prefixed, "adds a space"),
        (_normalized, "normalizes"),
        (_whole, "does not split words"),
        (_with_dropout, "dropout"),
        (_without_bytes, "lacks bytes"),
    ],
)
def test_other_kinds_are_left(change: Callable[[Tokenizer], None], why: str):
    tokenizer = _small()
    assert choose(tokenizer.to_str()).name == GIGATOKEN
    change(tokenizer)
    chosen = choose(tokenizer.to_str())
    assert chosen.name == "tokenizers"
    assert why in chosen.why
    if change is not _with_dropout:
        same(TextTokenizer(tokenizer, chosen), tokenizer, ["hello", " he", ""])


@pytest.mark.parametrize(("last", "dtype"), [(2**16 - 1, np.uint16), (2**16, np.int32)])
def test_large_ids(last: int, dtype: type):
    vocabulary = {sign: n for n, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = _small()
    tokenizer.model = BPE(vocabulary | {"he": last}, [("h", "e")])
    chosen = choose(tokenizer.to_str())
    ids = TextTokenizer(tokenizer, chosen).encode(["he", "\U000323b0"])
    assert {i.dtype for i in ids} == {np.dtype(dtype)}
    assert [i.tolist() for i in ids] == [tokenizer.encode(t).ids for t in ("he", "\U000323b0")]
    assert ids[0].tolist() == [last]


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}])
@pytest.mark.parametrize("normalized", [False, True])
def test_added_tokens_of_every_kind(flags: dict[str, bool], normalized: bool):
    tokenizer = _small()
    tokenizer.add_tokens([AddedToken("hell", normalized=normalized, **flags)])
    tokenizer.add_special_tokens([AddedToken("[E]", **flags)])
    for splits in (False, True):
        tokenizer.encode_special_tokens = splits
        ours = TextTokenizer(tokenizer, choose(tokenizer.to_str()))
        assert choose(tokenizer.to_str()).name == GIGATOKEN
        same(ours, tokenizer, ["hello", " hell  he", "he [E] he", "[E]hell[E]", "he", "", "shell"])

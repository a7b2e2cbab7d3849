"""A tokenizer's files give the ids that transformers' AutoTokenizer gives, whatever they hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer

from gptj_convert.tokenizer import write_tokenizer
from gptj_model.errors import FileFault
from runner.data.tokenizer import end_of_text, load_tokenizer

END = "<|endoftext|>"
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o")]
VOCAB = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
VOCAB |= {a + b: 256 + n for n, (a, b) in enumerate(MERGES)} | {END: 262}

NAMES = (END, "<|im_start|>", "<|im_end|>", "<pad>", " wo", "hello", "lo", "Ⅸ")
TEXTS = st.lists(
    st.sampled_from([*NAMES, " ", "  ", "\n", "hello world", "x", "é", "é", "IX", "1"]), max_size=8
).map("".join)
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@st.composite
def objects(draw: st.DrawFn, *, special: bool = True) -> dict[str, Any]:
    """A token with its flags, as JSON has it."""
    keys = (*FLAGS, "special") if special else FLAGS
    flags = {flag: draw(st.booleans()) for flag in keys if draw(st.booleans())}
    return {"content": draw(st.sampled_from(NAMES)), **flags}


TAGGED = objects().map(lambda token: {"__type": "AddedToken", **token})
NAMED = st.sampled_from(["bos_token", "eos_token", "unk_token", "pad_token", "sep_token"])
IDS = st.integers(255, 275)


def optional(entries: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=entries)


@st.composite
def tokenizer_json(draw: st.DrawFn) -> dict[str, Any]:
    tokenizer = Tokenizer(BPE(VOCAB, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=draw(st.booleans()))
    tokenizer.decoder = decoders.ByteLevel()
    if draw(st.booleans()):
        tokenizer.normalizer = normalizers.NFKC()
    if draw(st.booleans()):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END}:0 $A:0", special_tokens=[(END, 262)]
        )
    if draw(st.booleans()):
        tokenizer.enable_padding(pad_token=draw(st.sampled_from(NAMES)), length=32)
    if draw(st.booleans()):
        tokenizer.enable_truncation(2)
    for token in draw(st.lists(objects(), max_size=3)):
        content = token.pop("content")
        tokenizer.add_tokens([AddedToken(content, **token)])
    return json.loads(tokenizer.to_str()) | {"model": None}


FILES = {
    "tokenizer.json": tokenizer_json(),
    "tokenizer_config.json": optional({
        "tokenizer_class": st.sampled_from([
            "GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "GPTNeoXTokenizerFast",
            "PreTrainedTokenizerFast", "NobodysTokenizer",
        ]),
        "add_prefix_space": st.booleans(),
        "add_bos_token": st.booleans(),
        "add_eos_token": st.booleans(),
        "split_special_tokens": st.booleans(),
        "bos_token": st.none() | st.sampled_from(NAMES) | TAGGED,
        "eos_token": st.none() | st.sampled_from(NAMES) | TAGGED,
        "pad_token": st.none() | st.sampled_from(NAMES) | TAGGED,
        "tool_token": st.sampled_from(NAMES) | TAGGED,
        "additional_special_tokens": st.lists(st.sampled_from(NAMES) | TAGGED, max_size=3),
        "extra_special_tokens": st.lists(st.sampled_from(NAMES) | TAGGED, max_size=3)
        | st.dictionaries(st.sampled_from(["a_token", "b_token"]), st.sampled_from(NAMES)),
        "added_tokens_decoder": st.dictionaries(IDS.map(str), objects(), max_size=4),
    }),
    "special_tokens_map.json": st.dictionaries(NAMED, st.sampled_from(NAMES) | objects()).flatmap(
        lambda named: optional({
            "additional_special_tokens": st.lists(st.sampled_from(NAMES), max_size=3),
            "extra_special_tokens": st.lists(
                st.sampled_from(NAMES) | objects(special=False), max_size=3
            ),
            "tool_token": st.sampled_from(NAMES) | objects(),
        }).map(lambda more: named | more)
    ),
    "added_tokens.json": st.dictionaries(st.sampled_from(NAMES), IDS, max_size=4),
}  # fmt: skip


@st.composite
def folders(draw: st.DrawFn) -> dict[str, Any]:
    """Files by name, of which at least one has a vocabulary."""
    found: dict[str, Any] = {
        name: draw(content) for name, content in FILES.items() if draw(st.booleans())
    }
    config = found.get("tokenizer_config.json", {})
    if config.get("tokenizer_class") in ("PreTrainedTokenizerFast", "NobodysTokenizer"):
        # Such a class reads nothing else.
        found.setdefault("tokenizer.json", draw(FILES["tokenizer.json"]))
    if draw(st.booleans()):
        found["config.json"] = {"model_type": "gptj"}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


def write(folder: Path, files: dict[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(VOCAB))
    merges = "".join(f"{a} {b}\n" for a, b in MERGES)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    model = {"type": "BPE", "vocab": VOCAB, "merges": [" ".join(pair) for pair in MERGES]}
    for name, content in files.items():
        whole = content | {"model": model} if name == "tokenizer.json" else content
        (folder / name).write_text(json.dumps(whole))


def same_as_transformers(folder: Path, texts: list[str]) -> None:
    try:
        theirs = AutoTokenizer.from_pretrained(folder)
    except ValueError:  # a token with a space in it cannot stand before or after every text
        with pytest.raises(FileFault, match="is not a tokenizer"):
            load_tokenizer(folder)
        return
    ours = load_tokenizer(folder, allow_special=None)
    for text in texts:
        expected = theirs(text).input_ids
        assert ours.encode(text).ids == expected
        bare = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, add_special_tokens=False).ids == bare
        assert ours.decode(expected, skip_special_tokens=False) == theirs.decode(expected)
    for special in (False, True):
        pair = load_tokenizer(folder, allow_special=special)
        for text in texts:
            expected = theirs(text, split_special_tokens=not special).input_ids
            assert pair.encode(text).ids == expected
    assert ours.get_vocab_size() == len(theirs)
    if theirs.eos_token is not None:
        assert end_of_text(folder) == theirs.eos_token_id


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(folders(), st.lists(TEXTS, min_size=1, max_size=4))
def test_ids_are_those_of_transformers(folder: Path, files: dict[str, Any], texts: list[str]):
    if "tokenizer.json" not in files and "config.json" not in files:
        # Nothing says which class it is, and transformers does not guess.
        files["config.json"] = {"model_type": "gptj"}
    write(folder, files)
    same_as_transformers(folder, texts)

"""A tokenizer's files give the ids that transformers' AutoTokenizer gives, whatever they hold."""

from __future__ import annotations

import json
import random
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer

from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from gptj_model.errors import FileFault
from runner.data.making.tokenizer import end_of_text, load_tokenizer, notes
from tests.small_tokenizer import END, END_ID, MERGES, VOCAB, write_vocabulary

NAMES = (END, "<|im_start|>", "<|im_end|>", "<pad>", " wo", "hello", "lo", "Ⅸ")
TEXTS = st.lists(
    st.sampled_from([*NAMES, " ", "  ", "\n", "hello world", "x", "é", "é", "IX", "1"]), max_size=8
).map("".join)
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@st.composite
def objects(draw: st.DrawFn, *, special: bool = True) -> dict[str, Any]:
    """A token with its flags, as JSON."""
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
            single=f"{END}:0 $A:0", special_tokens=[(END, END_ID)]
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
    write_vocabulary(folder)
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
# Which of two overlapping tokens is found first hangs on whether each is special from the start.
@example(
    {
        "config.json": {"model_type": "gptj"},
        "special_tokens_map.json": {"pad_token": "lo"},
        "added_tokens.json": {"hello": 263, "lo": 264},
    },
    ["hello"],
)
@example(
    {
        "config.json": {"model_type": "gptj"},
        "tokenizer_config.json": {
            "additional_special_tokens": [{"__type": "AddedToken", "content": "lo"}]
        },
        "added_tokens.json": {"hello": 263, "lo": 264},
    },
    ["hello"],
)
# A token that is named by a default alone is not the one that another file states.
@example(
    {
        "config.json": {"model_type": "gptj"},
        "added_tokens.json": {END: 263, "lo": 263, f"{END}x": 264},
    },
    [f"{END}xhello"],
)
@given(folders(), st.lists(TEXTS, min_size=1, max_size=4))
def test_ids_are_those_of_transformers(folder: Path, files: dict[str, Any], texts: list[str]):
    if "tokenizer.json" not in files and "config.json" not in files:
        # Nothing says which class it is, and transformers does not guess.
        files["config.json"] = {"model_type": "gptj"}
    write(folder, files)
    same_as_transformers(folder, texts)


LACKING = ((), ("tokenizer.json",), ("vocab.json", "merges.txt", "added_tokens.json"))


@pytest.mark.parametrize(
    "combinations",
    [
        pytest.param(lambda all: random.sample(all, 4), id="some"),
        pytest.param(lambda all: all, id="all", marks=pytest.mark.full),
    ],
)
def test_the_true_vocabulary_in_combinations_of_its_files(combinations, tmp_path: Path):
    """GPT-J's own files, less what a folder may lack, and with a chat fine-tune's tokens."""
    whole = tmp_path / "whole"
    whole.mkdir()
    write_tokenizer(whole)
    chat = {"50400": {"content": "<|im_start|>", "special": True, "normalized": False}}
    chat |= {"50256": {"content": END, "special": True}}
    added: dict[str, dict[str, Any]] = {
        "none": {},
        "decoder": {"tokenizer_config.json": {"added_tokens_decoder": chat}},
        "added": {"added_tokens.json": {"<|im_start|>": 50257, "<|im_end|>": 50258}},
        "map": {"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}}},
    }
    for case, lacking in combinations(list(product(added, LACKING))):
        folder = tmp_path / f"{case}-{len(lacking)}"
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(*lacking))
        for name, content in added[case].items():
            (folder / name).write_text(json.dumps(content))
        (folder / "config.json").write_text('{"model_type": "gptj"}')
        text = f"<|im_start|>user\n  naïve 漢字{END} <|extratoken_7|><|im_end|>"
        same_as_transformers(folder, [text, "", "\u3000x"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 300) | st.sampled_from([*NAMES, "", "x"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from([
            "content", "id", "special", "added_tokens", "model", "vocab", "merges", "__type",
            "added_tokens_decoder", "eos_token", "extra_special_tokens", "tokenizer_class",
            "post_processor", "padding", "add_bos_token", "add_prefix_space", "lstrip", "258", "x",
        ]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from([*FILES, "config.json"]), JSON, min_size=1))
def test_any_content_is_a_tokenizer_or_one_error(folder: Path, files: dict[str, Any]):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_vocabulary(folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    said = ""
    try:
        load_tokenizer(folder).encode("hello")
    except FileFault as fault:
        said = fault.message
    assert not said or str(folder) in said


CONFIG = "tokenizer_config.json"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("added_tokens.json", "{", "added_tokens.json: is not valid JSON"),
        ("added_tokens.json", "[]", "holds a JSON list, expected an object"),
        ("added_tokens.json", '{"<a>": "5"}', "'<a>': the id is '5', expected a whole number"),
        (CONFIG, '{"added_tokens_decoder": []}', "is a JSON list, expected an object"),
        (
            CONFIG,
            '{"added_tokens_decoder": {"a": {"content": "x"}}}',
            "added_tokens_decoder: the id is 'a', expected a whole number",
        ),
        (
            CONFIG,
            '{"added_tokens_decoder": {"300": "x"}}',
            "added_tokens_decoder['300'] is a JSON str, expected a token's object",
        ),
        (
            CONFIG,
            '{"added_tokens_decoder": {"300": {"content": "x", "lstrip": 1}}}',
            "lstrip of a token is 1, expected true or false",
        ),
        (CONFIG, '{"eos_token": 5}', "eos_token is a JSON int, expected a token"),
        (CONFIG, '{"tokenizer_class": 5}', "tokenizer_class is 5, expected a name"),
        (CONFIG, '{"add_prefix_space": "no"}', "add_prefix_space is 'no', expected true or false"),
        ("tokenizer.json", '{"model": {}}', "its model is not a byte-pair encoding"),
        ("tokenizer.json", "{}", "its model is not a byte-pair encoding"),
        ("special_tokens_map.json", '{"pad_token": 1}', "pad_token is a JSON int"),
        ("merges.txt", None, "merges.txt: not found, expected the merges of vocab.json"),
    ],
)
def test_the_fault_of_a_file_is_named(name: str, content: str | None, said: str, tmp_path: Path):
    write_vocabulary(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gptj"}')
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(FileFault) as refused:
        load_tokenizer(tmp_path)
    assert said in refused.value.message
    assert str(tmp_path) in refused.value.message


def test_an_id_that_is_not_the_stated_one_is_noted(tmp_path: Path):
    write_vocabulary(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gptj"}')
    (tmp_path / "added_tokens.json").write_text('{"<a>": 500, "<b>": 600}')
    (note,) = notes(tmp_path)
    assert "'<a>' has the id 500 in a file and gets the id 263, as in transformers; 1 more" in note
    same_as_transformers(tmp_path, ["<a><b>"])
    (tmp_path / "added_tokens.json").write_text('{"<a>": 263}')
    assert notes(tmp_path) == ()

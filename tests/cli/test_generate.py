"""`gptj generate`: every option as in transformers, its defaults, files, output and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJForCausalLM

from gptj_convert.resources.footprint import cache_bytes, streamed_memory
from gptj_convert.settings.generation_settings import generation_defaults
from gptj_model.config import GPTJConfig
from gptj_model.decoding.generation import Generator
from gptj_model.streaming.residency import Residency
from runner.cli.generate import generate
from runner.cli.shared.output import Output, json_line, one_line, printable, visible
from runner.generation.choices import choose_options, in_words
from tests.conftest import any_backend, make_checkpoint
from tests.small_tokenizer import write_vocabulary

PROMPT = "hello w"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer, which tests may not change."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("generate") / "hf", vocab_size=263, n_layer=1, n_positions=64
    )
    write_vocabulary(folder)
    return folder


@pytest.fixture
def own(model: Path, workdir: Path):
    """Function that makes ./hf, whose generation_config.json has these fields."""

    def make(**fields: Any) -> Path:
        folder = workdir / "hf"
        if not folder.exists():
            folder.mkdir()
            for path in model.iterdir():
                (folder / path.name).symlink_to(path)
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "generation_config.json").write_text(json.dumps(fields))
        return folder

    return make


def _theirs(folder: Path, prompt: str = PROMPT, **options: Any) -> list[list[int]]:
    """What transformers generates, without the tokens that fill or end texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, GPTJForCausalLM)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends])}
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer, **options
    ).tolist()
    begun = ids.shape[1]
    length = (next((n for n, i in enumerate(row) if n >= begun and i in ends), None)
              for row in found)  # fmt: skip
    return [row[:n] for row, n in zip(found, length, strict=True)]


def _given(options: dict[str, Any]) -> list[object]:
    words: list[object] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        option = "--stop" if name == "stop_strings" else "--" + name.replace("_", "-")
        words += [w for v in values for w in (option, str(v).lower() if v is True else v)]
    return words


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.4},
    "n-grams": {"no_repeat_ngram_size": 2},
    "shortest": {"min_new_tokens": 6},
    "beams": {"num_beams": 3},
    "best beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0},
    "early": {"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 3},
    "never": {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_options_are_those_of_transformers(case: str, own, gptj):
    """Given on the command line, in memory; and given by the folder, streamed."""
    options = CASES[case] | {"max_new_tokens": 10}
    free = _theirs(own(eos_token_id=None), **options, pad_token_id=0)
    ends = [free[0][-4], free[-1][-2]]
    folder = own(eos_token_id=ends, pad_token_id=0)
    expected = _theirs(folder, **options)
    call = ("generate", "--model", folder, "--prompt", PROMPT, "--json")
    done = gptj(*call, *_given(options))
    assert done.code == 0, done.stderr
    assert [s["ids"] for s in done.json.get("sequences", [done.json])] == expected
    assert done.json["ids"] == expected[0]
    own(eos_token_id=ends, pad_token_id=0, **options)
    by_file = gptj(*call, "--execution", "streaming")
    assert [s["ids"] for s in by_file.json.get("sequences", [by_file.json])] == expected
    assert all(name in by_file.stderr for name in options)


def test_texts_are_printed_verbatim(model: Path, gptj):
    call = ("generate", "--model", model, "--prompt", "a\t\u00a0\x07\u3000\u200d\u2028z")
    for more in ((), ("--num-beams", 2), ("--temperature", 1, "--num-return-sequences", 2)):
        made = gptj(*call, *more, "--max-new-tokens", 6, "--json").json
        printed = gptj(*call, *more, "--max-new-tokens", 6).stdout
        assert printed == "".join(s["text"] + "\n" for s in made.get("sequences", [made]))


@pytest.mark.parametrize("given", ["option", "file"])
def test_stop_strings_are_those_of_transformers(given: str, own, gptj):
    folder = own(eos_token_id=None, pad_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"max_new_tokens": 20, "repetition_penalty": 2.0}
    (whole,) = _theirs(folder, **options)
    new = whole[len(tokenizer(PROMPT).input_ids) :]
    at = next(n for n in range(4, 20) if tokenizer.decode(new[n]).isprintable()
              and new[n] not in new[:n] and "\ufffd" not in tokenizer.decode(new[n]))  # fmt: skip
    stops = ["never comes", tokenizer.decode(new[at])]
    expected = _theirs(folder, stop_strings=stops, **options)
    assert len(expected[0]) < len(whole)
    if given == "option":
        done = gptj("generate", "--model", folder, "--prompt", PROMPT, "--json",
                    *_given(options | {"stop_strings": stops}))  # fmt: skip
    else:
        folder = own(eos_token_id=None, stop_strings=stops)
        done = gptj("generate", "--model", folder, "--prompt", PROMPT, "--json", *_given(options))
        assert "stop_strings" in done.stderr
    assert done.json["ids"] == expected[0]
    assert done.json["text"].endswith(stops[1])


#: Fields of transformers that options give.
CHOICES = {
    *("max_new_tokens", "min_new_tokens", "stop_strings", "temperature", "top_k", "top_p"),
    *("repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty"),
    *("early_stopping", "num_return_sequences"),
}
DEFAULTS: list[tuple[dict[str, Any], tuple[object, ...], str]] = [
    ({"temperature": 0.5}, (), ""),
    ({"do_sample": True, "temperature": 0.5, "top_p": 0.9}, (),
     "do_sample true, temperature 0.5, top_p 0.9"),
    ({"do_sample": True, "temperature": 0.5}, ("--temperature", 2), ""),
    ({"do_sample": True, "top_k": 3}, ("--temperature", 0), ""),
    ({"top_k": 3}, ("--temperature", 1), "top_k 3"),
    ({"max_length": 12, "max_new_tokens": 3}, (), "max_new_tokens 3"),
    ({"max_length": 12}, (), "max_length 12"),
    ({"max_length": 12}, ("--max-new-tokens", 2), ""),
    ({"min_length": 12, "length_penalty": 3.0}, (), "min_length 12"),
    ({"num_beams": 2, "length_penalty": 3}, (), "num_beams 2, length_penalty 3"),
    ({"num_beams": 2, "length_penalty": 3}, ("--num-beams", 1), ""),
    ({"num_beams": 2}, ("--early-stopping", "true"), "num_beams 2"),
    ({"min_p": 0.1, "typical_p": 1.0}, (), "min_p 0.1"),
    ({"temperature": None, "num_beams": 1, "repetition_penalty": 1.0}, (), ""),
]  # fmt: skip


@pytest.mark.parametrize(("stated", "given", "said"), DEFAULTS)
def test_the_folder_says_what_options_do_not(stated: dict, given: tuple, said: str, own):
    folder = own(**stated)
    words = ["--prompt", "x", *map(str, given)]
    asked = generate.make_context("generate", words).params
    asked = {name: value for name, value in asked.items() if name in CHOICES}
    defaults = generation_defaults(folder, GPTJConfig.from_file(folder / "config.json"))
    choices = choose_options(asked, defaults, seed=3)
    assert in_words(choices.taken or defaults.unapplied) == said
    samples = stated.get("do_sample", False)
    temperature = (stated.get("temperature") or 1.0) if samples else 0.0
    if "--temperature" in given:
        temperature = given[1]
    assert choices.options.temperature == temperature
    assert choices.options.seed == 3
    if "--max-new-tokens" in given:
        assert choices.options.max_new_tokens == 2
    elif "max_length" in stated and "max_new_tokens" not in stated:
        assert (choices.options.max_new_tokens, choices.options.max_length) == (None, 12)
    else:
        assert choices.options.max_new_tokens == stated.get("max_new_tokens", 32)


def test_a_length_of_the_whole_text(own, gptj):
    call = ("generate", "--model", own(max_length=12, eos_token_id=None, min_p=0.1), "--ids", "1,2")
    done = gptj(*call, "--json")
    assert len(done.json["ids"]) == 12
    assert "note: generation_config.json sets max_length 12\n" in done.stderr
    assert "note: generation_config.json sets min_p 0.1, which is not applied\n" in done.stderr
    assert len(gptj(*call, "--json", "--max-new-tokens", 15).json["ids"]) == 17


def test_a_config_json_counts_where_there_is_no_other(own, gptj):
    folder = own()
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"num_beams": 3, "max_length": 20}))
    done = gptj("generate", "--model", folder, "--prompt", PROMPT, "--json")
    assert "note: config.json sets max_length 20, num_beams 3" in done.stderr
    assert [done.json["ids"]] == _theirs(folder, pad_token_id=0)


WRONG: dict[str, tuple[Any, str]] = {
    "temperature": ("hot", "a number of at least 0"),
    "do_sample": ("yes", "true or false"),
    "num_beams": (0, "a whole number of at least 1"),
    "top_k": (2.5, "a whole number of at least 0"),
    "top_p": (1.5, "a number from 0 to 1"),
    "early_stopping": ("soon", 'true, false or "never"'),
    "stop_strings": (["a", ""], "a text or a list of texts, none of them empty"),
    "max_length": (True, "a whole number of at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_in_the_file_is_named(name: str, own, gptj):
    value, words = WRONG[name]
    done = gptj("generate", "--model", own(**{name: value}), "--prompt", PROMPT)
    assert done.code == 2
    expected = f"generation_config.json: {name} is {value!r}, expected {words}"
    assert expected in done.stderr.splitlines()[0]


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "an empty stop": (("--stop", ""), "--stop is empty"),
    "an empty prompt": (("--prompt", ""), "--prompt is empty"),
    "a stop that is no text": (
        ("--stop", "a\udcff"),
        "--stop is not UTF-8: it holds the byte 0xff",
    ),
    "a prompt that is no text": (("--prompt", "\udce9"), "--prompt is not UTF-8"),
    "one greedy text": (("--num-return-sequences", 2), "--num-return-sequences 2: the most likely"),
    "more than beams": (("--num-beams", 2, "--num-return-sequences", 3), "at most the 2 beams"),
    "no beams": (("--length-penalty", 2), "--length-penalty has no effect without --num-beams"),
    "no search": (("--early-stopping", "never"), "--early-stopping has no effect"),
    "no sampling": (("--top-p", 0.5), "--top-p has no effect without --temperature above 0"),
    "too short": (("--min-new-tokens", 9, "--max-new-tokens", 8), "--min-new-tokens 9, expected"),
    "no JSON": (("--logprobs",), "--logprobs is part of a JSON object"),
    "no room": (("--max-new-tokens", 64), "--prompt: prompt and continuation are 2 + 64 tokens"),
    "nan": (("--temperature", "nan"), "--temperature is nan, expected a number"),
    "no number": (("--length-penalty", "x"), "not a valid float"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_one_line(case: str, model: Path, gptj):
    words, said = REFUSED[case]
    prompt = () if "--prompt" in words else ("--prompt", PROMPT)
    done = gptj("generate", "--model", model, *prompt, *words)
    assert done.code == 2
    assert done.stdout == ""
    assert said in done.stderr.splitlines()[0]


def test_a_stop_string_needs_a_tokenizer(small_hf: Path, gptj):
    done = gptj("generate", "--model", small_hf, "--ids", "1,2", "--stop", "x")
    assert done.code == 2
    assert "a stop string needs the model's tokenizer" in done.stderr


def test_logprobs(own, gptj):
    folder = own(eos_token_id=None)
    options = {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.5}
    done = gptj("generate", "--model", folder, "--prompt", PROMPT, "--logprobs", "--json",
                "--max-new-tokens", 6, *_given(options))  # fmt: skip
    model = GPTJForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for sequence in done.json["sequences"]:
        ids = torch.tensor([sequence["ids"]])
        with torch.no_grad():
            found = model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[-6:, 0]
        assert sequence["logprobs"] == pytest.approx(found.tolist(), abs=1e-4)
    assert done.json["logprobs"] == done.json["sequences"][0]["logprobs"]


def test_samples_take_successive_seeds(model: Path, gptj):
    call = ("generate", "--model", model, "--prompt", PROMPT, "--temperature", 1, "--json")
    call += ("--max-new-tokens", 8)
    two = gptj(*call, "--num-return-sequences", 2, "--seed", 4).json["sequences"]
    assert [s["ids"] for s in two] == [gptj(*call, "--seed", 4 + n).json["ids"] for n in range(2)]
    assert two[0]["ids"] != two[1]["ids"]
    beams = gptj(*call, "--num-beams", 3, "--num-return-sequences", 2, "--seed", 4).json
    assert len(beams["sequences"]) == 2


# In memory and streamed.


@pytest.mark.parametrize("sampling", [(), ("--temperature", 1, "--top-k", 40, "--seed", 3)])
def test_streamed_text_is_the_resident_one(sampling: tuple, small_hf: Path, gptj):
    made = [
        gptj("generate", "--model", small_hf, "--ids", "5,7,1,9", "--max-new-tokens", 12,
             "--json", "--execution", way, *sampling).json["ids"]
        for way in ("resident", "streaming")
    ]  # fmt: skip
    assert made[0] == made[1]
    assert len(made[0]) > 4


KEPT = [
    Residency(),
    Residency(head=True),
    Residency(blocks=2, head=True),
    Residency(blocks=3, head=True),
]


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.full)])
def test_text_within_any_budget_is_the_same(tied: bool, workdir: Path, gptj):
    hf = make_checkpoint(workdir / "hf", vocab_size=50400, tie_word_embeddings=tied)
    config = GPTJConfig.from_file(hf / "config.json")
    many = ("generate", "--model", hf, "--prompts", "prompts.txt", "--max-new-tokens", 5, "--json")
    Path("prompts.txt").write_text("abcdef\n\u00e9\n")
    expected = gptj(*many).json["continuations"]
    batch, length = 2, len(expected[0]["ids"])
    needs: dict[str, Any] = {
        "stored": "float32",
        "batch": batch,
        "length": length,
        "states": cache_bytes(config, batch, length),
    }
    for kept in KEPT:
        budget = streamed_memory(config, **needs, kept=kept)
        done = gptj(*many, "--memory", budget)
        assert done.json["continuations"] == expected
        assert (done.json["kept_blocks"], done.json["kept_head"]) == (kept.blocks, kept.head)
        assert done.json["planned_rss_bytes"] == budget
        assert f"{kept.blocks} of 3 blocks" in done.stderr
    refused = gptj(*many, "--memory", streamed_memory(config, **needs) - 1)
    assert refused.code == 2
    assert "one block at a time" in refused.stdout
    contrary = gptj(*many, "--memory", "8GB", "--execution", "resident")
    assert contrary.code == 2


# Prompts of a file.


def test_prompts_of_a_file(model: Path, workdir: Path, gptj):
    options = ("--model", model, "--max-new-tokens", 9, "--temperature", 1)
    texts = ["Once", "a longer prompt, with é and 你", "x"]
    Path("prompts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    many = ("generate", *options, "--prompts", "prompts.txt", "--batch-size", 2, "--seed", 5)
    found = gptj(*many, "--json").json["continuations"]
    assert [c["prompt"] for c in found] == texts
    assert [json.loads(line) for line in gptj(*many).stdout.splitlines()] == found
    for n, (text, made) in enumerate(zip(texts, found, strict=True)):
        alone = gptj("generate", *options, "--prompt", text, "--seed", 5 + n, "--json").json
        assert alone["ids"] == made["ids"]
        assert alone["text"] == made["text"]
        assert made["text"].startswith(text)
        printed = gptj("generate", *options, "--prompt", text, "--seed", 5 + n).stdout
        assert printed == made["text"] + "\n"
    Path("prompts.txt").write_text("a\n\nb\n")
    done = gptj(*many)
    assert done.code == 1
    assert "prompts.txt:2: is empty" in done.stderr


def test_a_penalty_for_repetition(small_hf: Path, gptj):
    model = ("--model", small_hf, "--ids", "5,7", "--max-new-tokens", 60, "--json")
    plain, penalised = (
        gptj("generate", *model, *more).json["ids"] for more in ((), ("--repetition-penalty", 50))
    )
    assert len(set(penalised)) == len(penalised)
    assert len(set(plain)) < len(plain)


def test_prompts_as_json_objects(model: Path, workdir: Path, gptj):
    rows: list[dict[str, Any]] = [
        {"prompt": "hello\u2028w\r", "id": "\ud800é", "other": 1},
        {"ids": [5, 7], "id": None},
        {"prompt": "x\x00\x1b[31m", "id": {"deep": [1.5, True]}},
    ]
    lines = "\r\n".join(map(json.dumps, rows))
    common = ("generate", "--model", model, "--max-new-tokens", 3)
    for name in ("a.jsonl", "a.txt"):
        Path(name).write_bytes(b"\xef\xbb\xbf" + lines.encode())
        done = gptj(*common, "--prompts", name, "--num-beams", 2, "--num-return-sequences", 2)
        assert done.code == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.removesuffix("\n").split("\n")]
        assert [f["id"] for f in found] == [row["id"] for row in rows]
        assert [f["prompt"] for f in found] == [row.get("prompt") for row in rows]
        assert all("other" not in f for f in found)
        for row, f in zip(rows, found, strict=True):
            assert f["text"].startswith(row.get("prompt", ""))
            assert [f["sequences"][0][k] for k in ("ids", "text")] == [f["ids"], f["text"]]
        alone = gptj(*common, "--prompt", rows[0]["prompt"], "--num-beams", 2, "--json")
        assert alone.json["ids"] == found[0]["ids"]
        whole = gptj(*common, "--prompts", name, "--num-beams", 2, "--json").json["continuations"]
        assert [{k: v for k, v in f.items() if k != "sequences"} for f in found] == whole


def test_lines_of_text_end_with_newlines_alone(model: Path, workdir: Path, gptj):
    texts = ["he\u2028ll", "a\rb", "\x00\x85\t\u3000\u200d", '{"prompt": 1', "{}x", "é"]
    Path("a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode() + b"\n")
    done = gptj("generate", "--model", model, "--prompts", "a.txt", "--max-new-tokens", 1)
    found = [json.loads(line) for line in done.stdout.removesuffix("\n").split("\n")]
    assert [f["prompt"] for f in found] == texts
    assert set(found[0]) == {"prompt", "text", "ids"}


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "no prompt": (b'{"text": "a", "n": 1}', "neither prompt nor ids; its keys are 'text', 'n'"),
    "both": (b'{"prompt": "a", "ids": [1]}', "has both prompt and ids"),
    "no text": (b'{"prompt": 5}', "prompt is 5, expected a text"),
    "no ids": (b'{"ids": [1, true]}', "ids is [1, True], expected a list of token ids"),
    "empty ids": (b'{"ids": []}', "the prompt is empty"),
    "outside": (b'{"ids": [263]}', "the prompt holds the id 263, expected 0 to 262"),
    "half a pair": (b'{"prompt": "a\\ud83d"}', "prompt holds half of a surrogate pair"),
    "no JSON": (b'{"prompt": "a"', "is not valid JSON"),
    "no number": (b'{"prompt": "a", "id": NaN}', "NaN is not a JSON number"),
    "huge number": (b'{"prompt": "a", "id": 1e999}', "1e999 is too large a number"),
    "no object": (b'["a"]', "holds a JSON list, expected an object"),
    "empty": (b"", "is empty, expected a prompt on every line"),
    "no UTF-8": (b'{"prompt": "\xff"}', "is not UTF-8"),
    "too long": (b'{"prompt": "%s"}' % (b"x" * 50), "prompt and continuation are 50 + 32 tokens"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_before_anything_is_computed(
    case: str, model: Path, workdir: Path, gptj, monkeypatch: pytest.MonkeyPatch
):
    line, said = BAD_LINES[case]
    Path("a.jsonl").write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    monkeypatch.setattr("runner.evaluation.restore.model_of", None)
    done = gptj("generate", "--model", model, "--prompts", "a.jsonl", "--batch-size", 1)
    assert done.code == 1
    assert done.stdout == ""
    first = done.stderr.splitlines()[0]
    assert first.startswith("error: a.jsonl:2: ")
    assert said in first


def test_a_long_prompt_loses_its_beginning(own, gptj):
    folder, text = own(eos_token_id=None), "hello" * 61 + " w"
    call = ("generate", "--model", folder, "--max-new-tokens", 5, "--prompt", text)
    refused = gptj(*call)
    assert refused.code == 2
    assert "hint: --truncate drops the beginning" in refused.stderr
    done = gptj(*call, "--truncate", "--json")
    assert "--prompt: the first 3 tokens of the prompt are dropped, 59 stay" in done.stderr
    assert len(done.json["ids"]) == 64
    assert done.json["text"].startswith("hello" * 58 + " w")
    Path("a.txt").write_text(f"{text}\nhello\n{text}\n")
    many = gptj("generate", "--model", folder, "--max-new-tokens", 5, "--prompts", "a.txt",
                "--truncate")  # fmt: skip
    assert "2 prompts lose their beginning, 6 tokens in all, the first at a.txt:1" in many.stderr
    first, middle, last = map(json.loads, many.stdout.splitlines())
    assert first["ids"] == last["ids"] == done.json["ids"]
    assert first["prompt"] == text
    assert len(middle["ids"]) == 6


def test_a_prompt_as_long_as_max_length(own, gptj):
    folder = own(max_length=3)
    done = gptj("generate", "--model", folder, "--ids", "1,2,3")
    assert done.code == 2
    assert "the prompt has 3 tokens, expected fewer than max_length, 3" in done.stderr
    with pytest.raises(ValueError, match="max_length"):
        _theirs(folder, "abc")


# What is printed.


def test_an_interruption_leaves_what_was_printed(
    model: Path, gptj, monkeypatch: pytest.MonkeyPatch
):
    whole = gptj("generate", "--model", model, "--prompt", PROMPT, "--min-new-tokens", 9).stdout
    made = Generator.stream

    def stream(self: Generator, *arguments: Any) -> Any:
        for n, continuation in enumerate(made(self, *arguments)):
            if n == 5:
                raise KeyboardInterrupt
            yield continuation

    monkeypatch.setattr(Generator, "stream", stream)
    done = gptj("generate", "--model", model, "--prompt", PROMPT, "--min-new-tokens", 9)
    assert done.code == 130
    assert done.stdout.startswith(PROMPT)
    assert whole.startswith(done.stdout.removesuffix("\n").rstrip("\ufffd"))
    assert len(done.stdout) > len(PROMPT) + 1
    assert "interrupted" in done.stderr


def test_an_encoding_that_lacks_characters(model: Path, workdir: Path):
    """One process, which prints a text, JSON and help."""
    Path("a.jsonl").write_text(json.dumps({"prompt": "é你", "id": "你"}))
    program = (
        "import sys; from runner.cli.root import main\n"
        f"common = ['generate', '--model', {str(model)!r}, '--max-new-tokens', '1']\n"
        "print(main([*common, '--prompt', 'h\\u4f60']), file=sys.stderr)\n"
        "print(main([*common, '--prompts', 'a.jsonl']), file=sys.stderr)\n"
        "print(main(['generate', '--help']), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        encoding="ascii",
    )
    assert "a fault in gptj itself" not in done.stderr
    assert "error: stdout has the encoding ascii, which has no U+4F60" in done.stderr
    assert "hint: set PYTHONIOENCODING=utf-8" in done.stderr
    found = json.loads(done.stdout.splitlines()[0])
    assert (found["prompt"], found["id"]) == ("é你", "你")
    assert [n for n in done.stderr.splitlines() if n.isdigit()] == ["1", "0", "0"]


class _Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [StringIO, _Terminal])
def test_a_terminal_alone_shows_escapes(stream: type[StringIO], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout", written := stream())
    Output().part("a\x1b[31m\t\u00a0")
    Output().data("\x85\rb\n")
    shown = "a\\x1b[31m\t\u00a0\\x85\\x0db\n\n"
    assert written.getvalue() == (shown if written.isatty() else "a\x1b[31m\t\u00a0\x85\rb\n\n")


@given(st.text(), st.sampled_from(["utf-8", "ascii", "latin-1", "cp1252"]))
def test_a_json_line_is_one_line_in_every_encoding(text: str, encoding: str):
    line = json_line({"a": text}, encoding)
    assert json.loads(line) == {"a": text}
    assert len(line.encode(encoding).decode(encoding).splitlines()) == 1
    assert visible(line) == line


@given(st.text(st.characters()))
def test_what_a_terminal_shows_has_no_control_characters(text: str):
    kept = "\n\t\u00a0\u3000\u200d\u2028"
    assert visible(kept) == kept
    for c in visible(text):
        assert c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff")
    assert "\n" not in one_line(text)
    assert visible(printable(text)) == printable(text)


def test_the_json_object_is_json_for_every_number(capfd: pytest.CaptureFixture[str]):
    Output(json=True).finish({"a": [float("inf"), {"b": float("nan")}], "c": 1.5, "d": 2})
    found = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)
    assert found == {"a": ["inf", {"b": "nan"}], "c": 1.5, "d": 2}


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"])))
def test_letters_stay_as_they_are(text: str):
    assert visible(text) == text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_16_bits(dtype: str, model: Path, gptj):
    """The probabilities are those of float32, rounded; a streamed model has no such choice."""
    asked = ("generate", "--model", model, "--ids", "7,3,9", "--max-new-tokens", 1, "--json",
             "--logprobs")  # fmt: skip
    wide = gptj(*asked, "--dtype", "float32").json
    assert wide == gptj(*asked).json | {k: wide[k] for k in ("seconds", "peak_rss_bytes")}
    narrow = gptj(*asked, "--dtype", dtype)
    assert narrow.code == 0, narrow.stderr
    assert narrow.json["logprobs"] == pytest.approx(wide["logprobs"], abs=0.1)
    assert narrow.json["logprobs"] != wide["logprobs"]
    refused = gptj(*asked, "--dtype", dtype, "--execution", "streaming")
    assert refused.code == 2
    assert "--dtype is of a model in memory" in refused.stderr


_ON_JAX = """
import json, sys
from runner.cli.root import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0
"""


def test_tokens_of_jax_are_those_of_tensorflow(workdir: Path, gptj):
    """JAX starts steps before it knows their tokens; where it was wrong, it repeats them: at an end
    that comes too early. Prompts end at different times."""
    hf = make_checkpoint(workdir / "hf", seed=3)
    Path("prompts.jsonl").write_text("".join(
        json.dumps({"ids": ids}) + "\n" for ids in ([1, 2, 3], [5, 6, 7, 8, 9], [4])
    ))  # fmt: skip
    base = ["generate", "--model", "hf", "--prompts", "prompts.jsonl", "--max-new-tokens", "20",
            "--logprobs", "--quiet"]  # fmt: skip
    free = [json.loads(line)["ids"] for line in gptj(*base).stdout.splitlines()]
    ends = [free[0][3 + 6], free[1][5 + 11]]
    settings = json.loads((hf / "generation_config.json").read_text())
    (hf / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": ends}))
    commands = [base, [*base, "--min-new-tokens", "15"]]
    expected = [json.loads(line) for one in commands for line in gptj(*one).stdout.splitlines()]
    assert len({len(row["ids"]) for row in expected[:3]}) > 1
    lists = [[*one, "--backend", "jax"] for one in commands]
    environment = any_backend(PYTHONPATH=str(Path(__file__).parents[2]))
    command = [sys.executable, "-c", _ON_JAX, json.dumps(lists)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["ids"] for row in found] == [row["ids"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-4)

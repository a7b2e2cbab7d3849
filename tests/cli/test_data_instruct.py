"""`gptj data instruct`: shapes, templates, and the loss on completions."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer

from runner.data.making import encoding
from runner.data.making.documents.document import Form, Raw
from runner.data.making.instruction.encoder import InstructOptions
from runner.data.making.instruction.packing import COUNTED, LAST
from runner.data.making.instruction.shapes import COMPLETION, Columns, recognized, sample
from runner.data.making.instruction.templates import Renderer, Template, find_template
from runner.data.making.tokenizer import load_tokenizer
from runner.data.reading.records import read_examples
from tests.small_tokenizer import END, END_ID, write_vocabulary

LENGTH = 1000


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the special tokens of chats, and without a template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_vocabulary(folder)
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    extra = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]"]
    tokenizer.add_special_tokens({"extra_special_tokens": extra, "pad_token": "<|pad|>"})
    saved = folder / "saved"
    tokenizer.save_pretrained(saved)
    return saved


@pytest.fixture
def instruct(gptj, workdir: Path, tokenizer_folder: Path):
    """Write rows to ./a.jsonl unless told otherwise, and call `gptj data instruct`."""

    def call(rows: list[Any] | None, *arguments: object, length: int = LENGTH, source="a.jsonl"):
        if rows is not None:
            Path(source).write_text("".join(json.dumps(row) + "\n" for row in rows))
        common: list[object] = ["--max-sequence-length", length, "--json"]
        if "--tokenizer" not in arguments:
            common += ["--tokenizer", tokenizer_folder]
        if "--processes" not in arguments:
            common += ["--processes", 1]
        return gptj("data", "instruct", source, *arguments, *common)

    return call


@pytest.fixture
def decode(tokenizer_folder: Path) -> Callable[[Any], str]:
    tokenizer = load_tokenizer(tokenizer_folder)
    return lambda ids: tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)


def _examples(folder: str = "data") -> list[dict[str, np.ndarray]]:
    paths = sorted(Path(folder).glob("*.tfrecord"))
    return [e for path in paths for _, e in read_examples(path, vocab_size=10_000)]


def _refused(done, code: int, *words: str) -> None:
    assert done.code == code, done.stdout
    assert done.stderr.count("error: ") == 1
    for word in words:
        assert word in done.stderr, done.stderr
    assert not Path("data").exists()


ALPACA = {"instruction": "Add them.", "input": "1 and 2", "output": "3, said hello"}
DOLLY = {"instruction": "Who?", "context": "A man.", "response": "He.", "category": "x"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello world"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "hello"},
]
SHARED = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], "system"), "value": m["content"]}
    for m in CHAT
]
INTRO = "Below is an instruction that describes a task"
ALPACA_TEXT = (
    f"{INTRO}, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\nAdd them.\n\n### Input:\n1 and 2"
    "\n\n### Response:\n{3, said hello<|endoftext|>}"
)
ALPACA_SHORT = (
    f"{INTRO}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd them.\n\n### Response:\n{3, said hello<|endoftext|>}"
)
DOLLY_TEXT = (
    f"{INTRO}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nWho?\n\nInput:\nA man.\n\n### Response:\n{He.\n\n### End<|endoftext|>}"
)
CHAT_TEXT = (
    "Be brief.\nUser: hello\nAssistant:{ hello world<|endoftext|>}\nUser: again\n"
    "Assistant:{ hello<|endoftext|>}"
)
LAST_TURN = CHAT_TEXT.replace("{", "", 1).replace("}", "", 1)
SOUND: list[tuple[Any, tuple[str, ...], str]] = [
    ({"prompt": "Q: x\nA:", "completion": " hello"}, (), "Q: x\nA:{ hello<|endoftext|>}"),
    ({"prompt": "", "completion": "hello"}, (), "<|endoftext|>{hello<|endoftext|>}"),
    (
        {"q": "a", "a": "b", "prompt": "other"},
        ("--columns", "prompt=q,completion=a"),
        "a{b<|endoftext|>}",
    ),
    (ALPACA, (), ALPACA_TEXT),
    (ALPACA | {"input": ""}, (), ALPACA_SHORT),
    ({k: v for k, v in ALPACA.items() if k != "input"}, (), ALPACA_SHORT),
    (ALPACA | {"input": None, "text": "whole"}, (), ALPACA_SHORT),
    (DOLLY, ("--template", "dolly"), DOLLY_TEXT),
    (
        DOLLY,
        ("--template", "plain-chat"),
        "User: Who?\n\nA man.\nAssistant:{ He.<|endoftext|>}",
    ),
    ({"messages": CHAT}, (), CHAT_TEXT),
    ({"conversations": SHARED}, (), CHAT_TEXT),
    ({"prompt": CHAT[:4], "completion": CHAT[4:]}, (), LAST_TURN),
    (
        {"messages": [*CHAT[:2], CHAT[2] | {"weight": 0}, CHAT[3], CHAT[4] | {"weight": 1}]},
        (),
        LAST_TURN,
    ),
    (
        {"messages": [*CHAT, {"role": "user", "content": "end"}]},
        (),
        f"{CHAT_TEXT}\nUser: end<|endoftext|>",
    ),
    ({"messages": [{"role": "User", "content": [{"type": "text", "text": "a"}]}, CHAT[4]]}, (),
     "User: a\nAssistant:{ hello<|endoftext|>}"),
]  # fmt: skip


def _shown(example: dict[str, np.ndarray], decode: Callable[[Any], str]) -> str:
    """Return the text of an example up to its padding, what counts in braces."""
    ids, mask, labels = example.values()
    assert np.array_equal(ids[1:], labels[:-1])
    ends = np.flatnonzero(labels == END_ID)
    last = max(np.flatnonzero(mask).max(initial=0), ends[0] if not mask.any() else 0)
    rest = labels[last + 1 :]
    while len(rest) and set(rest.tolist()) != {END_ID}:  # tokens after the last that counts
        last += 1 + int(np.flatnonzero(rest == END_ID)[0])
        rest = labels[last + 1 :]
    text, begin = decode(ids[:1]), 0
    for at in range(1, last + 2):
        if at > last or mask[at] != mask[begin]:
            piece = decode(labels[begin:at])
            text += f"{{{piece}}}" if mask[begin] else piece
            begin = at
    return text


@pytest.mark.parametrize(("record", "options", "expected"), SOUND)
@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_the_text_and_what_counts_in_it(
    packing: str, record: Any, options: tuple[str, ...], expected: str, instruct, decode
):
    done = instruct([record], *options, packing)
    assert done.code == 0, done.stderr
    (example,) = _examples()
    assert _shown(example, decode) == expected
    assert (done.json["documents"], done.json["skipped"]) == (1, 0)
    done = instruct([record], *options, packing, "--train-on-prompt", "--out", "all")
    (whole,) = _examples("all")
    assert whole["input_mask"].sum() == done.json["tokens"] - 1


BAD: list[tuple[Any, str]] = [
    (["a"], "holds a list, expected an object"),
    ({"question": "a", "answer": "b"}, "has the keys 'question', 'answer', expected one of"),
    ({"text": "a"}, "has the keys 'text'"),
    ({"prompt": "a", "completion": 5}, "'completion' is a number, expected a string"),
    ({"prompt": None, "completion": "b"}, "'prompt' is null, expected a string"),
    (ALPACA | {"prompt": "a", "completion": "b"}, "fits several shapes: prompt and"),
    ({"messages": "hello"}, "'messages' is a string, expected a list of messages"),
    ({"messages": []}, "'messages' is an empty list"),
    ({"messages": [5]}, "message 1 of 'messages' is a number, expected an object"),
    ({"messages": [{"role": "x", "content": "a"}]}, "has the role 'x', expected one of user"),
    ({"messages": [{"role": "user"}]}, "the content of message 1 of 'messages' is missing"),
    ({"messages": [CHAT[1], CHAT[2] | {"weight": 2}]}, "has the weight 2, expected 0 or 1"),
    ({"prompt": "a\ufdd1", "completion": "b"}, "holds a code point from U+FDD0"),
]  # fmt: skip
RULES: list[tuple[Any, str, str]] = [
    ({"prompt": "a", "completion": " "}, "'completion' is empty", "with an empty completion"),
    (ALPACA | {"output": ""}, "'output' is empty", "with an empty completion"),
    ({"messages": CHAT[2:]}, "begins with an assistant turn", "with turns out of order"),
    ({"messages": [CHAT[1], *CHAT[1:]]}, "has two user turns in a row", "with turns out of order"),
    ({"messages": [*CHAT, CHAT[2]]}, "has two assistant turns in a row", "with turns out of order"),
    ({"messages": [*CHAT, CHAT[0]]}, "a system message after other", "with turns out of order"),
    ({"messages": CHAT[:2]}, "has no assistant turn", "without an assistant turn"),
    (
        {"messages": [*CHAT[:2], {"role": "assistant", "content": ""}]},
        "has an empty assistant turn",
        "with an empty completion",
    ),
    (
        {"messages": [*CHAT[:2], CHAT[2] | {"weight": 0}]},
        "has weight 0 on every assistant turn",
        "with weight 0 on every assistant turn",
    ),
]


def _like(record: Any) -> Any:
    """Return a sound record of the same shape."""
    if isinstance(record, dict) and "messages" in record:
        return {"messages": CHAT}
    return ALPACA if isinstance(record, dict) and "instruction" in record else SOUND[0][0]


@pytest.mark.parametrize(("record", "words"), BAD)
def test_a_malformed_record_has_its_place(record: Any, words: str, instruct):
    rows = [_like(record), record, _like(record)]
    _refused(instruct(rows), 1, "a.jsonl:2: ", words, "hint: ")
    done = instruct(rows, "--on-error", "skip")
    assert done.code == 0, done.stderr
    assert (done.json["documents"], done.json["skipped"]) == (2, 1)
    assert "skipped: a.jsonl:2: " in done.stderr


@pytest.mark.parametrize(("record", "words", "reason"), RULES)
def test_what_breaks_a_rule_is_counted_by_its_reason(
    record: Any, words: str, reason: str, instruct
):
    rows = [_like(record), record, record, _like(record)]
    _refused(instruct(rows), 1, "a.jsonl:2: ", words, "hint: ")
    done = instruct(rows, "--on-error", "skip")
    assert done.code == 0, done.stderr
    assert done.json["left_out"] == {reason: 2}
    assert (done.json["documents"], done.json["skipped"]) == (4, 0)
    assert f"2 {reason}" in done.stderr
    done = instruct([record, record], "--on-error", "skip", "--out", "none")
    assert done.code == 1
    assert f"every document was left out: 2 {reason}" in done.stderr


def test_a_file_has_one_shape(instruct):
    rows = [SOUND[0][0], SOUND[0][0], ALPACA]
    _refused(
        instruct(rows),
        1,
        "a.jsonl:3: has the shape 'instruction and output', expected 'prompt and completion' as "
        "at a.jsonl:1",
    )
    assert instruct(rows, "--on-error", "skip").json["skipped"] == 1
    Path("b.jsonl").write_text(json.dumps(ALPACA))
    done = instruct(rows[:2], "b.jsonl", "--out", "both")
    assert done.json["shapes"] == {"prompt and completion": 2, "instruction and output": 1}


def test_the_options_for_names(instruct, tokenizer_folder: Path):
    rows = [{"q": "a", "a": "b"}]
    for value in ("", "q", "prompt=", "prompt=q,prompt=a", "question=q", "prompt=q,output=a"):
        _refused(instruct(rows, "--columns", value), 2, "--columns ")
    _refused(
        instruct(rows, "--columns", "prompt=question,completion=a"),
        1,
        "a.jsonl:1: has no 'question', found 'q', 'a'",
    )
    both = ALPACA | SOUND[0][0]
    assert instruct([both], "--columns", "prompt=prompt,completion=completion").code == 0


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_examples_that_are_too_long(packing: str, instruct, decode):
    rows = [{"prompt": "p" * n, "completion": "c" * 5} for n in (4, 6, 5, 8, 30)]
    done = instruct(rows, packing, length=10)
    assert done.json["left_out"] == {"too long": 3}
    assert done.json["tokens"] == 10 + 11
    assert "3 too long" in done.stderr
    done = instruct(rows, packing, "--too-long", "cut", "--out", "cut", length=10)
    assert (done.json["left_out"], done.json["cut"]) == ({"too long": 1}, 2)
    assert [_shown(e, decode) for e in _examples("cut")] == [
        "pppp{ccccc<|endoftext|>}",
        "pppppp{ccccc}",
        "ppppp{ccccc<|endoftext|>}",
        "pppppppp{ccc}",
    ]
    done = instruct(
        rows, packing, "--too-long", "stop", "--on-error", "skip", "--out", "s", length=10
    )
    assert done.code == 1
    assert "a.jsonl:2: needs 11 tokens, max_sequence_length is 10" in done.stderr
    assert "--max-sequence-length 11" in done.stderr
    done = instruct(rows[3:], packing, "--out", "none", length=10)
    assert done.code == 1
    assert "every document was left out: 2 too long" in done.stderr
    assert "hint: choose a larger --max-sequence-length" in done.stderr


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% else %}
{{ bos_token + message['content'] | tojson }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% endif %}{{ bos_token }}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}{% if loop.first and system_message %}"
    "{{ system_message + '\n' }}{% endif %}{{ message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{%- for message in messages %}{%- if message.role == 'tool' %}{% continue %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' }}{%- if message.role == 'assistant' %}"
    "{%- generation %}{{- message.content }}{{- '<|im_end|>' }}{%- endgeneration %}{%- else %}"
    "{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
#: Shows the thoughts of the last turn only, as some do: no beginning of a chat is that of a longer.
FORGETS = (
    "{% for m in messages %}{{ m.role + ':' }}{% if loop.last %}{{ '(thought)' }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "zephyr": ZEPHYR, "llama": LLAMA, "marked": MARKED}


def _with_template(folder: Path, template: str, out: str = "tokenizer") -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(out)
    return Path(out)


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_those_of_transformers(name: str, instruct, decode, tokenizer_folder: Path):
    folder = _with_template(tokenizer_folder, TEMPLATES[name])
    theirs = AutoTokenizer.from_pretrained(folder)
    chats = [
        CHAT,
        CHAT[1:],
        [CHAT[1], CHAT[2] | {"content": "  “é”\n <b> 🦜 "}, CHAT[3], CHAT[4]],
    ]
    options = ("--tokenizer", folder, "--no-packing", "--allow-special")
    done = instruct([{"messages": chat} for chat in chats], *options)
    assert done.code == 0, done.stderr
    for chat, example in zip(chats, _examples(), strict=True):
        text = theirs.apply_chat_template(chat, tokenize=False)
        found = theirs(text, add_special_tokens=False)["input_ids"]
        expected = found if found[-1] == END_ID else [*found, END_ID]
        ids = [int(example["input_ids"][0]), *example["labels"].tolist()]
        assert ids[: len(expected)] == expected
        assert set(ids[len(expected) :]) <= {END_ID}
        counted = [0, *example["input_mask"].tolist()]
        if name == "marked":
            both = theirs.apply_chat_template(
                chat, return_dict=True, return_assistant_tokens_mask=True
            )
            assert counted[: len(found)] == both["assistant_masks"]
        else:
            texts = re.findall(r"\{(.*?)\}", _shown(example, decode), re.DOTALL)
            said = [m["content"].strip() for m in chat if m["role"] == "assistant"]
            for one, content in zip(texts, said, strict=True):
                assert content in one
                assert not {"user", "system", "INST"} & set(re.findall("[A-Za-z]+", one))


@given(
    st.lists(st.tuples(st.text(), st.text(min_size=1).filter(str.strip)), min_size=1, max_size=3),
    st.sampled_from(sorted(TEMPLATES)),
)
@settings(deadline=None, max_examples=40)
def test_any_chat_is_rendered_as_in_transformers(turns: list[tuple[str, str]], name: str):
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [
        m
        for u, a in turns
        for m in ({"role": "user", "content": u}, {"role": "assistant", "content": a})
    ]
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs, _ = render_jinja_template([chat], chat_template=TEMPLATES[name], **special)
    made = sample(*recognized({"messages": chat}, Columns()))
    ours = Renderer(Template(name, TEMPLATES[name]), special)(made)
    assert ours.text == theirs[0]
    assert len(ours.spans) == len(turns)
    for (begin, end), (_, answer) in zip(ours.spans, turns, strict=True):
        assert answer.strip() in ours.text[begin:end]


def test_a_template_that_changes_earlier_turns(instruct, tokenizer_folder: Path):
    folder = _with_template(tokenizer_folder, FORGETS)
    done = instruct([{"messages": CHAT}], "--tokenizer", folder)
    _refused(done, 1, "a.jsonl:1: the template 'chat' changes a turn", "{% generation %}")
    Path("own.jinja").write_text(
        FORGETS.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    )
    _refused(instruct([{"messages": CHAT}], "--template", "own.jinja"), 1, "marks 5 generations")


def test_the_template_in_the_tokenizers_settings(instruct, decode, tokenizer_folder: Path):
    shutil.copytree(tokenizer_folder, "own")
    file = Path("own/tokenizer_config.json")
    config = json.loads(file.read_text())
    for n, value in enumerate((ZEPHYR, [{"name": "default", "template": ZEPHYR}])):
        file.write_text(json.dumps(config | {"chat_template": value}))
        done = instruct([{"messages": CHAT[1:]}], "--tokenizer", "own", "--out", f"out{n}")
        assert done.code == 0, done.stderr
        text = _shown(_examples(f"out{n}")[0], decode)
        assert text.startswith("<|user|>\nhello<|endoftext|>\n<|assistant|>\n{hello world")
    file.write_text(json.dumps(config | {"chat_template": [{"name": "rag", "template": "x"}]}))
    done = instruct([{"messages": CHAT}], "--tokenizer", "own")
    _refused(
        done, 2, "own/tokenizer_config.json: has several chat templates and none called default"
    )


def test_templates_in_files(instruct, decode, tokenizer_folder: Path):
    Path("own.jinja").write_text("Q {{ instruction }}\nA:{{ output | trim }}.\n{# end #}")
    record = ALPACA | {"output": "  3, hello\n"}
    assert instruct([record], "--template", "own.jinja").code == 0
    assert _shown(_examples()[0], decode) == "Q Add them.\nA:{3, hello.\n<|endoftext|>}"
    arguments = json.loads(Path("data/data_params.json").read_text())["arguments"]
    assert arguments["templates"]["instruction"]["name"] == "own.jinja"
    assert arguments["templates"]["instruction"]["text"].startswith("Q {{ instruction")
    cases = {
        "{{ output }": "own.jinja:1: is not a Jinja template",
        "{{ instruction }}": "reads none of messages, output and completion",
        "{% if instruction == 'x' %}{{ output }}{% endif %}": "does not show the completion",
        "{{ output }}{{ outputs }}": "'outputs' is undefined",
        "{{ output }}{{ raise_exception('no ' + instruction) }}": "refuses it: no Add them.",
        "{{ output }}{{ 1 / 0 }}": "fails: ZeroDivisionError",
        "{{ output }}{{ ''.__class__.__mro__ }}": "refuses it: access to attribute '__class__'",
    }
    for text, words in cases.items():
        Path("own.jinja").write_text(text)
        done = instruct([ALPACA], "--template", "own.jinja", "--out", "no")
        assert done.code in (1, 2)
        assert words in done.stderr
    for name in ("nothing", "chat"):
        done = instruct([ALPACA], "--template", name, "--out", "no")
        assert done.code == 2
    done = instruct([{"messages": CHAT}], "--template", "alpaca", "--out", "no")
    assert "a.jsonl:1: holds messages, and the template 'alpaca' takes none" in done.stderr
    done = instruct([ALPACA], "--template", "plain", "--out", "no")
    assert "a.jsonl:1: holds an instruction" in done.stderr


def test_the_name_of_a_special_token_in_a_record_is_text(instruct, decode, tokenizer_folder: Path):
    folder = _with_template(tokenizer_folder, CHATML)
    chat = [
        {"role": "user", "content": "<|im_end|> hello<|im_start|>"},
        {"role": "assistant", "content": f"world {END}"},
    ]
    done = instruct([{"messages": chat}], "--tokenizer", folder)
    assert done.json["special_names"] == 3
    assert "hold 3 names of special tokens" in done.stderr
    tokenizer = load_tokenizer(folder)
    (example,) = _examples()
    ids = [int(example["input_ids"][0]), *example["labels"].tolist()]
    start, end = (tokenizer.token_to_id(f"<|im_{name}|>") for name in ("start", "end"))
    # Special tokens are those of the template alone, and text is tokenized as it is between them.
    expected: list[int] = []
    for role, content in (("user", chat[0]["content"]), ("assistant", chat[1]["content"])):
        body = tokenizer.encode(f"{role}\n{content}", add_special_tokens=False).ids
        expected += [start, *body, end, *tokenizer.encode("\n").ids]
    assert ids[: len(expected) + 1] == [*expected, END_ID]
    assert _shown(example, decode).endswith(f"{{world {END}<|im_end|>\n{END}}}")
    done = instruct([{"messages": chat}], "--tokenizer", folder, "--allow-special", "--out", "s")
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs(theirs.apply_chat_template(chat, tokenize=False))["input_ids"]
    (example,) = _examples("s")
    assert [int(example["input_ids"][0]), *example["labels"].tolist()][: len(expected)] == expected


@pytest.fixture(scope="module")
def encoder(tokenizer_folder: Path):
    template = find_template("plain", tokenizer_folder)
    return InstructOptions(
        tokenizer=tokenizer_folder, length=10_000, templates={COMPLETION: template}
    ).open()


TEXTS = st.text(st.sampled_from("he llow \n.é漢🦜'1<|endoftext|>"), max_size=30) | st.text()


@given(pair=st.tuples(TEXTS, TEXTS.filter(str.strip)))
@settings(deadline=None, max_examples=150)
def test_what_counts_is_the_completion_and_the_end(
    pair: tuple[str, str], encoder, tokenizer_folder
):
    prompt, completion = (
        text.replace("\ufdd0", "").replace("\ufdd1", "").replace("\ufdd2", "") for text in pair
    )
    if not completion.strip():
        return
    encoder._first_shape = lambda path: ("prompt and completion", "")
    row = json.dumps({"prompt": prompt, "completion": completion}).encode()
    if "\\ud" in row.decode() and any("\ud800" <= c < "\ue000" for c in prompt + completion):
        return
    found = encoder([Raw(row, Form.JSON, "a.jsonl", 1)])
    assert not found.problems
    ids, flags = found.units.T
    tokenizer = load_tokenizer(tokenizer_folder)
    whole = tokenizer.encode(prompt + completion, add_special_tokens=False).ids
    assert ids.tolist() in ([*whole, END_ID], [END_ID, *whole, END_ID])
    assert np.flatnonzero(flags & LAST).tolist() == [len(ids) - 1]
    counted = np.flatnonzero(flags & COUNTED)
    assert counted.tolist() == list(range(counted[0], len(ids)))  # one piece, up to the end
    assert counted[0] > 0
    learned = tokenizer.decode(ids[counted].tolist(), skip_special_tokens=False).encode()
    expected = (completion + END).encode()
    # A token, or one character, that begins in the prompt counts as a whole.
    first = tokenizer.decode([int(ids[counted[0]])]).encode()
    assert learned.endswith(expected)
    surplus = learned[: -len(expected)]
    assert (prompt + END).encode().find(surplus) >= 0
    assert len(surplus) < max(len(first), 5)


def test_the_same_records_whatever_the_processes_and_the_format(instruct, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 300)
    rows = [{"messages": CHAT[: 3 + 2 * (n % 2)]} for n in range(60)]
    options = ("--files-per-record", 5)
    for processes in (1, 3):
        done = instruct(
            rows, "--processes", processes, "--out", f"out{processes}", *options, length=80
        )
        assert done.code == 0, done.stderr

    def content(folder: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in Path(folder).iterdir()}

    assert content("out1") == content("out3")
    assert len(content("out1")) > 3
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet")
    Path("a.json").write_text(json.dumps(rows, indent=1))
    for name in ("a.parquet", "a.json"):
        done = instruct(None, "--out", f"out-{name}", *options, source=name, length=80)
        assert done.code == 0, done.stderr
        records = content(f"out-{name}")
        assert {k: v for k, v in records.items() if "tfrecord" in k} == {
            k: v for k, v in content("out1").items() if "tfrecord" in k
        }


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_a_killed_run_resumes_to_the_same_bytes(packing: str, instruct, tokenizer_folder: Path):
    rows = [{"prompt": f"question {n} ", "completion": "answer " * (n % 7 + 1)} for n in range(400)]
    options = (packing, "--files-per-record", 4)
    program = (
        "import os, signal, sys; from runner.data.making import build, encoding; "
        "encoding.CHUNK_BYTES = 300; close = build._PartWriter._close; count = []\n"
        "def closed(*a, **k):\n"
        "    close(*a, **k); count.append(1)\n"
        "    if len(count) == int(os.environ['KILL']): os.kill(os.getpid(), signal.SIGKILL)\n"
        "build._PartWriter._close = closed\n"
        "from runner.cli.root import main; sys.exit(main())"
    )
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        "--tokenizer",
        str(tokenizer_folder),
        "--max-sequence-length",
        "80",
        "--processes",
        "1",
    )

    def run(out: str, kill: int, *more: str) -> int:
        command = ["data", "instruct", "a.jsonl", *map(str, options), *common, "--out", out, *more]
        environment = {**os.environ, "KILL": str(kill)}
        return subprocess.run(
            [sys.executable, "-c", program, *command], env=environment, capture_output=True
        ).returncode

    assert run("whole", 0) == 0
    expected = {p.name: p.read_bytes() for p in Path("whole").iterdir()}
    assert len(expected) > 8
    assert run("data", 3) == -signal.SIGKILL
    assert run("data", 4, "--resume") == -signal.SIGKILL
    assert run("data", 0, "--resume") == 0
    assert {p.name: p.read_bytes() for p in Path("data").iterdir()} == expected


def test_inspecting(instruct, gptj, tokenizer_folder: Path, monkeypatch):
    rows = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    assert instruct(rows, "--on-error", "skip").code == 0
    done = gptj("data", "inspect", "data", "--tokenizer", tokenizer_folder, "--html", "a.html")
    assert done.code == 0, done.stderr
    assert "Assistant:⟦ hello world‹<|endoftext|>›⟧" in done.stdout
    assert "1 documents without an assistant turn" in done.stdout
    assert "template plain-chat:\n{% for message in messages %}" in done.stdout
    page = Path("a.html").read_text()
    assert "<mark> hello world</mark><mark><b>&lt;|endoftext|&gt;</b></mark>" in page
    assert "Template plain-chat" in page
    assert "without an assistant turn" in page
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = gptj("data", "inspect", "data", "--tokenizer", tokenizer_folder)
    assert "\x1b[32m hello world" in done.stdout
    assert "\x1b[1;32m<|endoftext|>" in done.stdout
    assert "⟦" not in done.stdout


def test_records_are_for_training(instruct, tokenizer_folder: Path):
    from runner.config.params import InputParams
    from runner.data.reading.input_fn import batches

    assert instruct([SOUND[0][0]] * 30, length=32).code == 0
    params = InputParams(data_dir=["data"], max_sequence_length=32, batch_size=2)
    ids, ignored, labels = next(batches(params, vocab_size=300, training=False))
    assert ids.shape == labels.shape == (2, 32)
    assert 0 < float(np.sum(ignored)) < 64

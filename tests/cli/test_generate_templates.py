"""`gptj generate --template` and `--chat`: prompts get the ids that they have in records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer

from gptj_model.decoding.generation import Generator
from runner.data.making.documents.document import Form, Raw
from runner.data.making.instruction.encoder import InstructOptions
from runner.data.making.instruction.templates import find_template
from runner.data.reading.records import read_examples
from runner.generation.prompt_templates import PromptRenderer
from runner.generation.prompts import Prompt
from runner.generation.template_choice import named_templates
from tests.conftest import make_checkpoint
from tests.small_tokenizer import END, END_ID, write_vocabulary

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
#: A template that changes earlier turns, and so marks what the assistant writes.
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}"
    "{{ ' ' + (m.content if loop.last else '…') + eos_token }}{% endgeneration %}"
    "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)
FIELDS = "Q {{ instruction }}{% if input %} ({{ input }}){% endif %}\nA {{ output }}<|im_end|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, with a tokenizer that has the special tokens of chats and no template."""
    root = tmp_path_factory.mktemp("templates")
    write_vocabulary(root)
    tokenizer = GPT2Tokenizer.from_pretrained(root)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    folder = make_checkpoint(root / "hf", vocab_size=270, n_layer=1, n_positions=512)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat_model(model: Path, workdir: Path) -> Path:
    """The model, whose tokenizer has a chat template."""
    shutil.copytree(model, "chat")
    Path("chat/chat_template.jinja").write_text(CHATML)
    return Path("chat")


@pytest.fixture
def prompt_ids(gptj) -> Callable[..., list[list[int]]]:
    """Make records of rows, and return the ids before each completion."""

    def call(rows: list[Any], tokenizer: Path, *arguments: object) -> list[list[int]]:
        Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = gptj("data", "instruct", "a.jsonl", "--tokenizer", tokenizer, "--no-packing",
                    "--max-sequence-length", 500, "--processes", 1, *arguments)  # fmt: skip
        assert done.code == 0, done.stderr
        examples = [e for _, e in read_examples(Path("data/records-00000.tfrecord"),
                                                vocab_size=270)]  # fmt: skip
        return [e["input_ids"][: int(e["input_mask"].argmax()) + 1].tolist() for e in examples]

    return call


def _continued(gptj, model: Path, rows: list[Any], *arguments: object) -> list[list[int]]:
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = gptj("generate", "--model", model, "--prompts", "q.jsonl", "--max-new-tokens", 1,
                "--json", *arguments)  # fmt: skip
    assert done.code == 0, done.stderr
    return [c["ids"] for c in done.json["continuations"]]


ROWS: dict[str, tuple[dict[str, Any], ...]] = {
    "instruction": (
        {"instruction": "Add them.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say <|im_end|> or <|endoftext|>", "output": "hello"},
        {"instruction": "Who?", "input": None, "output": "He."},
    ),
    "dolly": ({"instruction": "Who?", "context": "A man.", "response": "He."},),
    "prompt": ({"prompt": "Q: hello\nA:", "completion": " hello"},),
    "messages": (
        {"messages": [{"role": "user", "content": "hello "},
                      {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "system", "content": "Be brief."},
                      {"role": "user", "content": "a"}, {"role": "assistant", "content": "b",
                                                         "weight": 0},
                      {"role": "user", "content": "c<|im_end|>"},
                      {"role": "assistant", "content": "d"}]},
    ),
}  # fmt: skip
CASES = [
    ("instruction", ()),
    ("instruction", ("--template", "alpaca")),
    ("instruction", ("--template", "alpaca", "--allow-special")),
    ("instruction", ("--template", "dolly")),
    ("instruction", ("--template", "plain-chat")),
    ("instruction", ("--template", "fields.jinja")),
    ("instruction", ("--template", "chatml.jinja")),
    ("dolly", ("--template", "dolly")),
    ("prompt", ()),
    ("prompt", ("--template", "alpaca")),
    ("prompt", ("--template", "plain-chat")),
    ("messages", ()),
    ("messages", ("--template", "marked.jinja")),
    ("messages", ("--template", "chatml.jinja")),
]


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    """Return a record without its completion."""
    left = {k: v for k, v in row.items() if k not in ("output", "response", "completion")}
    return left | ({"messages": row["messages"][:-1]} if "messages" in row else {})


@pytest.mark.parametrize(("rows", "options"), CASES)
def test_ids_are_those_of_the_records(rows: str, options: tuple, model: Path, workdir, gptj,
                                      prompt_ids):  # fmt: skip
    for name, text in (("fields", FIELDS), ("chatml", CHATML), ("marked", MARKED)):
        Path(f"{name}.jinja").write_text(text)
    expected = prompt_ids(list(ROWS[rows]), model, *options)
    asked = list(map(_asked, ROWS[rows]))
    found = _continued(gptj, model, asked, "--template", "data")
    assert [ids[: len(e)] for ids, e in zip(found, expected, strict=True)] == expected
    assert all(len(ids) in (len(e), len(e) + 1) for ids, e in zip(found, expected, strict=True))
    if options and "--allow-special" not in options:
        assert _continued(gptj, model, asked, *options) == found


def test_the_chat_template_of_the_tokenizer(chat_model: Path, gptj, prompt_ids):
    expected = prompt_ids(list(ROWS["messages"]), chat_model)
    asked = list(map(_asked, ROWS["messages"]))
    for options in (("--chat",), ("--template", "chat"), ("--template", "data")):
        found = _continued(gptj, chat_model, asked, *options)
        assert [ids[: len(e)] for ids, e in zip(found, expected, strict=True)] == expected
    done = gptj("generate", "--model", chat_model, "--chat", "--prompt", "hello ", "--json",
                "--max-new-tokens", 2)  # fmt: skip
    assert done.json["ids"][: len(expected[0])] == expected[0]


def test_a_text_gets_the_template_of_the_records(model: Path, workdir: Path, gptj, prompt_ids):
    (expected,) = prompt_ids([{"instruction": "Who?", "output": "He."}], model)
    for options in (("--template", "alpaca"), ("--template", "data")):
        done = gptj("generate", "--model", model, "--prompt", "Who?", *options, "--json",
                    "--max-new-tokens", 4)  # fmt: skip
        assert done.json["ids"][: len(expected)] == expected
        assert done.json["text"].endswith("### Response:\n" + done.json["completion"])
    plain = gptj("generate", "--model", model, "--prompt", "Who?", "--template", "data",
                 "--max-new-tokens", 4)  # fmt: skip
    assert plain.stdout == done.json["completion"] + "\n"
    assert "note: prompts get the template alpaca of data" in plain.stderr


@given(
    st.fixed_dictionaries({k: st.text(max_size=12) for k in ("instruction", "input")}),
    st.text(min_size=1, max_size=4),
    st.sampled_from(["alpaca", "dolly", "plain-chat"]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_instruction_has_the_ids_of_its_record(
    model: Path, asked: dict[str, str], output: str, name: str, end: bool
):
    """The ids that precede the completion are the prompt's, up to a token that holds both."""
    asked = asked | ({"input": asked["input"] + END} if end else {})
    texts = "".join((*asked.values(), output))
    if any(mark in texts for mark in "\ufdd0\ufdd1\ufdd2") or not output.strip():
        return
    template = find_template(name, model)
    kinds = dict.fromkeys(("instruction", "completion", "chat"), template)
    encode = InstructOptions(tokenizer=model, length=500, templates=kinds, packing=False).open()
    row = json.dumps(asked | {"output": "x" + output}).encode()
    encoder: Any = encode
    encoder._shapes["a"] = ("instruction and output", "a:1")
    found = encode([Raw(row, Form.JSON, "a", 1)])
    assert not found.problems
    ids, mask, _ = found.units[0]
    prompts = [Prompt(where="a", record=asked)]
    (prompt,) = PromptRenderer(named_templates(name, model).stated, model)(prompts)
    assert prompt.ids == ids[: int(np.argmax(mask)) + 1].tolist()


@pytest.mark.parametrize(("template", "ends"), [("plain-chat", {END_ID}), ("alpaca", {END_ID}),
                                                ("chatml.jinja", {END_ID, 264})])  # fmt: skip
def test_what_ends_an_answer(template: str, ends: set[int], model: Path, workdir: Path, gptj,
                             monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    Path("chatml.jinja").write_text(CHATML)
    seen: list[set[int]] = []
    begin = Generator.__init__

    def noted(self: Generator, model: Any, *, stop_at: Any, **more: Any) -> None:
        seen.append(set(stop_at))
        begin(self, model, stop_at=stop_at, **more)

    monkeypatch.setattr(Generator, "__init__", noted)
    done = gptj("generate", "--model", model, "--template", template, "--prompt", "a",
                "--max-new-tokens", 1)  # fmt: skip
    assert done.code == 0, done.stderr
    assert seen[0] - {269} == ends


def test_the_template_of_a_run(model: Path, workdir: Path, gptj, prompt_ids):
    (expected,) = prompt_ids([{"instruction": "Who?", "output": "He."}], model)
    assert gptj("convert", model, "--to", "tf", "--quiet").code == 0
    done = gptj("train", "--init-from", "converted", "--max-steps", 1, "--quiet",
                "--set", "train_input.max_sequence_length=500",
                "--set", "train_input.batch_size=1")  # fmt: skip
    assert done.code == 0, done.stderr
    untrained = gptj("generate", "--chat", "--prompt", "Who?", "--model", "converted")
    assert untrained.code == 2
    assert "converted: the tokenizer has no chat template" in untrained.stderr
    kept = Path("model_dir/templates.json")
    call = ("generate", "--chat", "--prompt", "Who?", "--max-new-tokens", 1, "--json")
    kept.rename("moved.json")
    assert gptj(*call).json["ids"][: len(expected)] == expected
    Path("moved.json").rename(kept)
    shutil.rmtree("data")
    done = gptj(*call)
    assert done.json["ids"][: len(expected)] == expected
    assert "note: prompts get the template alpaca of the run model_dir" in done.stderr
    Path("model_dir/chat_template.jinja").write_text(CHATML)
    done = gptj(*call)
    assert "the records of the run were made with alpaca; --template names another" in done.stderr
    assert done.json["text"].startswith("<|im_start|>user")
    Path("model_dir/chat_template.jinja").unlink()
    kept.write_text("{")
    done = gptj(*call)
    assert done.code == 1
    assert "model_dir/templates.json: is not JSON" in done.stderr


REFUSED: dict[str, tuple[tuple[object, ...], int, str]] = {
    "no template": (("--chat", "--prompt", "a"), 2, "hint: name the template with --template"),
    "no such": (("--template", "x.jinja", "--prompt", "a"), 2, "--template is 'x.jinja'"),
    "no records": (("--template", ".", "--prompt", "a"), 2, "holds no data_params.json"),
    "ids": (("--template", "alpaca", "--ids", "1"), 2, "exclude each other"),
    "both": (("--template", "alpaca", "--chat", "--prompt", "a"), 2, "exclude each other"),
    "a chat": (("--template", "alpaca", "--prompts", "chat.jsonl"), 1, "chat.jsonl:1: holds mess"),
    "answered": (("--template", "plain-chat", "--prompts", "answered.jsonl"), 1,
                 "answered.jsonl:1: ends with an assistant turn"),
    "no keys": (("--template", "alpaca", "--prompts", "other.jsonl"), 1,
                "other.jsonl:1: has the keys 'ids', expected one of prompt, instruction, mess"),
    "two keys": (("--template", "alpaca", "--prompts", "two.jsonl"), 1,
                 "two.jsonl:1: has prompt and instruction, expected one of"),
    "marks": (("--template", "alpaca", "--prompt", "\ufdd1"), 2, "--prompt: holds a code point"),
    "not rendered": (("--prompts", "chat.jsonl"), 1, "hint: give --template or --chat"),
    "not Jinja": (("--template", "bad.jinja", "--prompt", "a"), 2, "bad.jinja:1: is not a Jinja"),
    "no room": (("--template", "alpaca", "--prompt", "a" * 600), 2, "--prompt: prompt and contin"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, model: Path, workdir: Path, gptj):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    files = {
        "chat": {"messages": turns[:1]},
        "answered": {"messages": turns},
        "other": {"ids": [1]},
        "two": {"prompt": "a", "instruction": "b"},
    }
    for name, row in files.items():
        Path(f"{name}.jsonl").write_text(json.dumps(row))
    Path("bad.jinja").write_text("{% if")
    arguments, code, said = REFUSED[case]
    done = gptj("generate", "--model", model, *arguments)
    assert (done.code, done.stdout) == (code, ""), done.stderr
    assert said in done.stderr


def test_records_of_several_kinds_need_a_choice(model: Path, workdir: Path, gptj, prompt_ids):
    Path("b.jsonl").write_text(json.dumps(ROWS["messages"][0]))
    prompt_ids([{"instruction": "Who?", "output": "He."}], model, "b.jsonl")
    call = ("generate", "--model", model, "--template", "data", "--max-new-tokens", 1, "--json")
    done = gptj(*call, "--prompt", "a")
    assert done.code == 2
    assert "--prompt: is a completion, and the records hold chat and instruction" in done.stderr
    done = gptj(*call, "--prompts", "b.jsonl")
    assert done.code == 1
    Path("c.jsonl").write_text(json.dumps({"messages": ROWS["messages"][0]["messages"][:1]}))
    done = gptj(*call, "--prompts", "c.jsonl")
    assert done.json["continuations"][0]["prompt"] == "User: hello \nAssistant:"

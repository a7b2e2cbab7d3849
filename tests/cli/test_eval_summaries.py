"""`gptj eval --task summarization`: summaries generated from a test set, and their scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptj_model.decoding.generation import Generator
from gptj_model.decoding.options import GenerationOptions
from runner.data.making.tokenizer import load_tokenizer
from tests.conftest import make_checkpoint

PAIRS = [(f"Town {n} met today.", f"Town {n} met.") for n in range(2)]
EVAL = ("eval", "--task", "summarization", "--model", "hf", "--max-new-tokens", 6)


@pytest.fixture
def model(workdir: Path) -> None:
    """A random model at ./hf with room for the separator, and ./test.jsonl."""
    make_checkpoint(workdir / "hf", vocab_size=50400, n_layer=1, n_positions=64)
    lines = [json.dumps({"article": a, "highlights": s}) for a, s in PAIRS]
    Path("test.jsonl").write_text("\n".join(lines))


def test_greedy_and_beams(model, gptj):
    done = gptj(*EVAL, "--data", "test.jsonl", "--summaries", "s.jsonl", "--json")
    assert done.code == 0, done.stderr
    names = [f"{d}/{m}" for d in ("greedy", "beam4") for m in ("rouge1", "rouge2", "rougeL")]
    assert list(done.json["metrics"]) == names
    assert done.json["summaries"] == 2
    rows = [json.loads(line) for line in Path("s.jsonl").read_text().splitlines()]
    assert [r["expected"] for r in rows] == [s for _, s in PAIRS] * 2
    # What was generated, as the reference, is a perfect score.
    found = [r["found"] for r in rows if r["decoding"] == "greedy"]
    pairs = [{"article": a, "summary": s} for (a, _), s in zip(PAIRS, found, strict=True)]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    own = gptj(*EVAL, "--data", "own.jsonl", "--beams", 1, "--json").json
    assert own["metrics"]["greedy/rouge1"] == pytest.approx(100)
    assert own["metrics"]["greedy/rougeL"] == pytest.approx(100)


def test_a_test_set_is_taken_whole_or_refused(model, gptj):
    Path("long.jsonl").write_text(json.dumps({"article": "word " * 80, "highlights": "w"}))
    done = gptj(*EVAL, "--data", "long.jsonl")
    assert done.code == 1
    assert "long.jsonl:1: the article makes a prompt of" in done.stderr
    assert gptj(*EVAL, "--data", "long.jsonl", "--truncate-article", "--beams", 1).code == 0
    Path("bad.jsonl").write_text('{"article": "a", "highlights": null}')
    done = gptj(*EVAL, "--data", "bad.jsonl")
    assert done.code == 1
    assert "bad.jsonl:1: " in done.stderr
    assert gptj(*EVAL).code == 2


#: Articles of different lengths, so that the shorter prompts of a batch are padded.
MANY = [("Town met. " * (1 + n % 4), f"Town {n} met.") for n in range(9)]


def _rows(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_batches_change_nothing(model, gptj):
    lines = [json.dumps({"text": a, "short": s}) for a, s in MANY]
    Path("many.jsonl").write_text("\n".join(lines))
    ask = (*EVAL, "--data", "many.jsonl", "--article-column", "text", "--summary-column", "short")
    for size in (1, 4):
        assert gptj(*ask, "--batch-size", size, "--summaries", f"{size}.jsonl").code == 0
    assert _rows("1.jsonl") == _rows("4.jsonl")
    assert [row["expected"] for row in _rows("1.jsonl")] == [s for _, s in MANY] * 2


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], GenerationOptions]]:
    """The prompts that are continued, and with which options."""
    found: list[tuple[list[int], GenerationOptions]] = []
    call = Generator.__call__

    def recording(self: Generator, prompts: Any, options: Any, **more: Any) -> Any:
        found.extend((list(prompt), options) for prompt in prompts)
        return call(self, prompts, options, **more)

    monkeypatch.setattr(Generator, "__call__", recording)
    return found


def test_a_template_renders_as_it_does_for_records(model, gptj, asked):
    tokenizer = load_tokenizer(Path("hf"))
    row = {"instruction": "Sum up:", "input": "Town met.", "output": "Met."}
    Path("rows.jsonl").write_text(json.dumps(row))
    columns = ("--article-column", "input", "--summary-column", "output")
    ask = (*EVAL, "--data", "rows.jsonl", "--beams", 1)
    Path("t.jinja").write_text("{{ instruction }} {{ input }} ->{{ output }}")
    assert gptj(*ask, *columns, "--template", "t.jinja").code == 0
    assert tokenizer.decode(asked[-1][0]) == "Sum up: Town met. ->"
    plain = gptj(*EVAL, "--data", "test.jsonl", "--beams", 1, "--template", "plain")
    assert plain.code == 0, plain.stderr
    assert {tokenizer.decode(ids) for ids, _ in asked[-2:]} == {a for a, _ in PAIRS}
    long = {**row, "input": "word " * 90}
    Path("long.jsonl").write_text(json.dumps(long))
    ask = (*EVAL, "--data", "long.jsonl", "--beams", 1, *columns, "--template", "t.jinja")
    refused = gptj(*ask)
    assert refused.code == 1
    assert "long.jsonl:1: the article makes a prompt of" in refused.stderr
    shortened = gptj(*ask, "--truncate-article")
    assert "note: prompts shortened to 58 tokens: 1" in shortened.stderr
    text = tokenizer.decode(asked[-1][0])
    assert text.startswith("Sum up: word")
    assert text.endswith("->")
    assert len(asked[-1][0]) <= 58
    assert gptj(*EVAL, "--data", "test.jsonl", "--template", "nothing").code == 2


def test_the_preset_of_mlperf(workdir: Path, gptj, asked):
    make_checkpoint(workdir / "hf", vocab_size=50400, n_layer=1, n_positions=256)
    instruction = "Summarize the following news article:"
    rows = [
        {"instruction": instruction, "input": "Town met. " * n, "output": "Met."} for n in (3, 90)
    ]
    Path("cnn_eval.json").write_text(json.dumps(rows, indent=4))
    ask = ("eval", "--task", "summarization", "--model", "hf", "--data", "cnn_eval.json")
    done = gptj(*ask, "--preset", "mlperf", "--json")
    assert done.code == 0, done.stderr
    assert list(done.json["metrics"]) == [
        f"beam4/{name}" for name in ("rouge1", "rouge2", "rougeL", "gen_len")
    ]
    assert done.json["shortened_prompts"] == 1
    options = asked[-1][1]
    assert (options.num_beams, options.early_stopping) == (4, True)
    assert (options.min_new_tokens, options.max_new_tokens) == (30, 128)
    expected = (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        f"{instruction}\n\n### Input:\n{{}}\n\n### Response:"
    )
    tokenizer = load_tokenizer(Path("hf"))
    short, long = sorted((ids for ids, _ in asked), key=len)
    assert short == tokenizer.encode(expected.format("Town met. " * 3)).ids
    assert long == tokenizer.encode(expected.format("Town met. " * 90)).ids[:128]

"""`gptj eval --task summarization`: summaries generated from a test set, and their scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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

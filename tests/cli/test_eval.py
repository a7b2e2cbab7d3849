"""`gptj eval`: the whole model in memory, and one block at a time, are one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTJForCausalLM

from gptj_convert.resources.footprint import streamed_memory
from gptj_model.config import GPTJConfig
from gptj_model.streaming.residency import Residency
from runner.config.params_file import load_params
from runner.data.making.tokenizer import load_tokenizer
from runner.evaluation import evaluate
from tests.conftest import make_checkpoint


@pytest.mark.parametrize("golden_run", ["adamw", "shared_embedding"], indirect=True)
@pytest.mark.parametrize("passes", ["one pass", "a pass for each batch"])
def test_streamed_metrics_are_the_resident_ones(
    golden_run: Path, passes: str, gptj, monkeypatch: pytest.MonkeyPatch
):
    if passes != "one pass":
        monkeypatch.setattr(evaluate.StreamedEvaluator.__init__, "__kwdefaults__", {"memory": 1})
    model = ("--model", "tf_model.ckpt", "--params", "params.yaml", "--json")
    resident, streamed = (
        gptj("eval", *model, "--execution", way) for way in ("resident", "streaming")
    )
    assert resident.code == streamed.code == 0, streamed.stderr
    assert streamed.json["metrics"] == pytest.approx(resident.json["metrics"], rel=1e-6)


@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_a_number_of_batches(golden_run: Path, gptj):
    model = ("--model", "tf_model.ckpt", "--params", "params.yaml", "--json", "--eval-steps", 1)
    resident, streamed = (
        gptj("eval", *model, "--execution", way).json["metrics"]
        for way in ("resident", "streaming")
    )
    assert streamed == pytest.approx(resident, rel=1e-6)


@pytest.mark.parametrize("golden_run", ["adamw", "shared_embedding"], indirect=True)
def test_metrics_within_any_budget_are_the_same(golden_run: Path, gptj):
    common = ("eval", "--model", "tf_model.ckpt", "--params", "params.yaml", "--json")
    config = GPTJConfig.from_file(golden_run / "hf/config.json")
    section = load_params(Path("params.yaml")).eval_input
    assert section
    batch, length = section.batch_size, section.max_sequence_length
    expected = gptj(*common, "--execution", "streaming").json["metrics"]
    needs: dict[str, Any] = {
        "stored": "float32",
        "batch": batch,
        "length": length,
        "states": 4 * batch * length * config.n_embd,
    }
    for blocks in range(config.n_layer + 1):
        # Too little is left for a second batch to share a reading of the weights.
        budget = streamed_memory(config, **needs, kept=Residency(blocks=blocks, head=True))
        done = gptj(*common, "--memory", budget)
        assert done.json["kept_blocks"] == blocks
        assert done.json["metrics"] == expected
    assert gptj(*common, "--memory", "1GB", "--task", "summarization").code == 2


TEXT = "Once upon a time, in a caf\u00e9, \u4f60 said: read on. " * 9


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has the tokenizer's vocabulary, and a short context."""
    return make_checkpoint(tmp_path_factory.mktemp("reader") / "hf", vocab_size=50400)


@pytest.mark.parametrize(
    ("window", "stride"),
    [(16, 5), (64, 32), *(pytest.param(*p, marks=pytest.mark.full) for p in ((16, 16), (7, 1)))],
)
def test_a_text_scored_in_windows(reader: Path, window: int, stride: int, workdir: Path, gptj):
    Path("a.txt").write_text(TEXT, encoding="utf-8")
    text = ("eval", "--model", reader, "--task", "text", "--data", "a.txt", "--json")
    found = gptj(*text, "--window", window, "--stride", stride, "--batch-size", 3).json
    tokens = [50256, *load_tokenizer(reader).encode(TEXT, add_special_tokens=False).ids]
    with torch.no_grad():
        model, losses = GPTJForCausalLM.from_pretrained(reader), []
        last = len(tokens) - 1
        for start in range(0, last, stride):
            stop = min(start + window, last)
            begin = stop - min(window, last)
            logits = model(torch.tensor([tokens[begin:stop]])).logits[0]
            new = torch.nn.functional.cross_entropy(
                logits, torch.tensor(tokens[begin + 1 : stop + 1]), reduction="none"
            )
            losses += new[len(losses) - begin :].tolist()
            if stop == last:
                break
    assert found["tokens"] == len(losses) == last
    assert found["bytes"] == len(TEXT.encode())
    metrics = found["metrics"]
    assert metrics["loss"] == pytest.approx(sum(losses) / last, rel=1e-6)
    assert metrics["eval/lm_perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    bits = sum(losses) / math.log(2) / found["bytes"]
    assert metrics["eval/bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_texts_that_cannot_be_scored(reader: Path, workdir: Path, gptj):
    text = ("eval", "--model", reader, "--task", "text")
    Path("bad.txt").write_bytes(b"one\ntwo \xff")
    Path("empty.txt").write_bytes(b"")
    for more, code, words in (
        ((), 2, "needs a text"),
        (("--data", "bad.txt"), 1, "bad.txt:2: byte 0xff"),
        (("--data", "empty.txt"), 1, "empty.txt: is empty"),
        (("--data", "missing.txt"), 1, "missing.txt"),
        (("--data", "bad.txt", "--window", 9, "--stride", 10), 2, "the next 10 further on"),
        (("--data", "bad.txt", "--window", 5000), 2, "expected at most"),
    ):
        done = gptj(*text, *more)
        assert done.code == code, done.stderr
        assert words in done.stderr

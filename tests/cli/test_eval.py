"""`gptj eval` and `generate`: the whole model in memory, and one block at a time, are one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTJForCausalLM

from gptj_convert.resources.footprint import cache_bytes, streamed_memory
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


def test_prompts_of_a_file(workdir: Path, gptj):
    hf = make_checkpoint(workdir / "hf", vocab_size=50400)
    model = ("--model", hf, "--max-new-tokens", 9, "--temperature", 1)
    texts = ["Once", "a longer prompt, with é and 你", "x"]
    Path("prompts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    many = ("generate", *model, "--prompts", "prompts.txt", "--batch-size", 2, "--seed", 5)
    found = gptj(*many, "--json").json["continuations"]
    assert [c["prompt"] for c in found] == texts
    assert [json.loads(line) for line in gptj(*many).stdout.splitlines()] == found
    for n, (text, made) in enumerate(zip(texts, found, strict=True)):
        alone = gptj("generate", *model, "--prompt", text, "--seed", 5 + n, "--json").json
        assert alone["ids"] == made["ids"]
        assert alone["text"] == made["text"]
        assert made["text"].startswith(text)
        printed = gptj("generate", *model, "--prompt", text, "--seed", 5 + n).stdout
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


TEXT = "Once upon a time, in a caf\u00e9, \u4f60 said: read on. " * 9


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has the tokenizer's vocabulary, and a short context."""
    return make_checkpoint(tmp_path_factory.mktemp("reader") / "hf", vocab_size=50400)


@pytest.mark.parametrize(("window", "stride"), [(16, 5), (16, 16), (7, 1), (64, 32)])
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

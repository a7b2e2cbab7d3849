"""`gptj verify --level tasks`: log-likelihoods of tasks, on both sides."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keras import ops
from transformers import GPTJForCausalLM

from golden.prompts import questions
from gptj_convert.checkpoint.open import open_checkpoint
from gptj_convert.streams.progress import finish
from gptj_convert.verification.evidence.verdict import Verdict
from gptj_convert.verification.levels import tasks
from gptj_convert.verification.levels.task_requests import TaskRequest, TaskRequests, chosen
from gptj_model.config import GPTJConfig
from gptj_model.decoding.likelihood import Likelihood, Query
from gptj_model.errors import GptjError
from gptj_model.network import layers
from gptj_model.tensors import table
from runner import api
from tests.cli.harness_tasks import task_folder
from tests.cli.rewriting import rewrite_bundle
from tests.conftest import load_tensors, make_checkpoint, save_tensors

_Q = "gptj_decoder/1/attn/q_proj/q_proj/kernel"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with ./tasks, and with ./whole, a checkpoint that has a tokenizer."""
    folder = tmp_path_factory.mktemp("harness")
    make_checkpoint(folder / "whole", n_layer=1, vocab_size=50400)
    with task_folder(folder):
        yield folder


@pytest.fixture
def compare(hf: Path, converted: Path) -> Callable[..., dict[str, Any]]:
    """Run the level alone, and return the verdict as the JSON object shows it."""

    def run(asked: TaskRequests | None = None) -> dict[str, Any]:
        verdict = Verdict(1e-4, asked=("tasks",))
        with open_checkpoint(converted) as checkpoint, open_checkpoint(hf) as source:
            finish(tasks.compare_tasks(checkpoint, source, verdict, asked=asked))
        return {"ok": verdict.ok, **verdict.to_json()}

    return run


def test_both_sides_are_hugging_faces_own_likelihoods(
    compare, hf: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tasks, "_STATES", 0)  # a pass over the weights for every batch
    found = compare()["levels"]["tasks"]
    model = GPTJForCausalLM.from_pretrained(hf).double()
    with open_checkpoint(hf) as source:
        asked = [(q, a) for q in questions(source.config) for a in q.answers]
    assert found["compared"] == len(asked) == len(found["requests"]) == 44
    for row, (question, answer) in zip(found["requests"], asked, strict=True):
        ids = torch.tensor([[*question.context, *answer]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0, -len(answer) :]
        logprobs = logits.log_softmax(-1)[range(len(answer)), list(answer)]
        for side in ("found", "expected"):
            assert row[side] == pytest.approx(float(logprobs.sum()), rel=1e-6)
            assert row[f"{side}_greedy"] == (logits.argmax(-1).tolist() == list(answer))
        deltas = abs(row["difference"])
        assert deltas <= len(answer) * row["relative"] * float(logits.std()) * 1.01
    acc = found["metrics"]["text"]["acc"]
    of_text = [row["expected"] for row in found["requests"] if row["task"] == "text"]
    first = [max(range(4), key=lambda n: own[n]) == 0 for own in np.reshape(of_text, (-1, 4))]
    assert acc == {"found": np.mean(first), "expected": np.mean(first)}


def test_a_fault_is_found_in_every_request_and_its_block(compare, converted: Path):
    rewrite_bundle(converted, lambda t: t.update({_Q: t[_Q] * 1.5}))
    done = compare()
    level = done["levels"]["tasks"]
    assert not done["ok"]
    assert not level["ok"]
    assert level["relative"] > level["tolerance"] == pytest.approx(2e-4)
    first = done["first_difference"]
    assert (first["level"], first["block"]) == ("tasks", 1)
    assert first["prompt"] == "text, document 0, choice 0"
    assert "log-likelihood" in first["found"]


def test_a_fault_of_the_head_has_no_block(compare, converted: Path):
    name = next(t.tf for t in table(GPTJConfig.preset("tiny")) if t.hf == "lm_head.bias")
    rewrite_bundle(converted, lambda t: t[name].__setitem__(5, 3.0))
    done = compare()
    assert not done["ok"]
    assert done["first_difference"]["block"] is None


def test_nan_on_one_side_is_a_mismatch_and_on_the_other_nothing(
    compare, hf: Path, converted: Path, gptj
):
    rewrite_bundle(converted, lambda t: t.update({_Q: t[_Q] * np.nan}))
    done = compare()
    assert not done["ok"]
    row = done["levels"]["tasks"]["requests"][0]
    assert (row["found"], row["relative"]) == ("nan", "nan")
    bad = make_checkpoint(hf.parent / "bad")
    _spoil(bad)
    with (
        open_checkpoint(converted) as checkpoint,
        open_checkpoint(bad) as source,
        pytest.raises(GptjError, match="so nothing can be judged"),
    ):
        finish(tasks.compare_tasks(checkpoint, source, Verdict(1e-4), asked=None))


def _spoil(folder: Path) -> None:
    tensors = load_tensors(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"] += np.nan
    save_tensors(folder / "model.safetensors", tensors)


def test_requests_of_several_windows_and_answers_that_change(compare, converted: Path):
    rewrite_bundle(converted, lambda t: t.update({_Q: -t[_Q]}))
    ids = tuple(range(1, 100))
    windows = tuple(Query(ids[n : n + 21], 20) for n in (0, 20, 40))
    # Choices that differ in their last token alone share a pass; there are as many as tokens, so
    # that the most likely one is another one in the wrong model.
    choices = [(Query((*ids[:30], n), 1),) for n in range(211)]
    requests = [
        TaskRequest(task="long", document=0, choice=0, shown="long", queries=windows),
        *(
            TaskRequest(task="any", document=7, choice=n, shown=f"token {n}", queries=own)
            for n, own in enumerate(choices)
        ),
    ]
    asked = TaskRequests(source="test", requests=requests, metrics=lambda found: {})
    level = compare(asked)["levels"]["tasks"]
    assert level["requests"][0]["tokens"] == 60
    assert [t["documents"] for t in level["tasks"]] == [1, 1]
    answers = {
        side: max(range(211), key=lambda n: level["requests"][1 + n][side])
        for side in ("found", "expected")
    }
    of_any = level["tasks"][1]
    assert of_any["answers_changed"] == (answers["found"] != answers["expected"])
    greedy = [r["choice"] for r in level["requests"][1:] if r["expected_greedy"]]
    assert greedy == [answers["expected"]]
    assert math.isclose(sum(math.exp(r["found"]) for r in level["requests"][1:]), 1, rel_tol=1e-5)


def test_an_answer_is_the_most_likely_choice():
    likely = [Likelihood(x, False) for x in (-3.0, -1.0, -2.0)]
    assert chosen(likely) == 1
    assert chosen([Likelihood(-9.0, True)]) is True


def test_tasks_of_the_harness(place: Path, workdir: Path, gptj, monkeypatch: pytest.MonkeyPatch):
    hf = make_checkpoint(workdir / "hf", vocab_size=50400, n_layer=1, n_positions=96)
    assert gptj("convert", hf, "--to", "tf", "--quiet").code == 0
    ask = ("--task", "lm-eval:local_choice,local_rolling", "--include-path", place / "tasks")
    few = ("--num-fewshot", 1, "--limit", 3)
    scored = gptj("eval", "--model", "converted", *ask, *few, "--json").json["metrics"]
    sound = ops.gelu
    monkeypatch.setattr(layers.ops, "gelu", lambda x, approximate: sound(x, approximate=False))
    done = gptj(
        "verify", "--level", "all", "--keep-going", *ask, *few, "--json", "--report", "r.html"
    )
    assert done.code == 3, done.stderr
    assert "requests that lost their beginning" in done.stderr
    level = done.json["levels"]["tasks"]
    assert not level["ok"]
    assert "lm-eval:local_choice,local_rolling, 3 documents of each" in level["source"]
    rows = {name: (t["documents"], t["requests"]) for t in level["tasks"] if (name := t["name"])}
    assert rows == {"local_choice": (3, 9), "local_rolling": (3, 3)}
    for name, value in scored.items():
        task, _, figure = name.partition("/")
        if "stderr" not in name:
            expected = level["metrics"][task][figure]["expected"]
            assert math.log1p(expected) == pytest.approx(math.log1p(value), rel=1e-5), name
    page = Path("r.html").read_text()
    assert "Requests with the largest differences" in page
    assert "The quick brown fox jumps" in page


def test_the_function_takes_tasks(place: Path, hf: Path, converted: Path):
    with pytest.raises(GptjError, match="level logits does not run tasks"):
        api.verify(converted, task="lm-eval:local_choice", include_path=[place / "tasks"])
    with pytest.raises(GptjError, match="have no effect without task"):
        api.verify(converted, level="tasks", limit=3)
    with pytest.raises(GptjError, match="expected names such as"):
        api.verify(converted, level="tasks", task="piqa")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--task", "lm-eval:local_choice"), 2, "level logits does not run tasks"),
        (("--level", "tasks", "--limit", "3"), 2, "--limit has no effect without --task"),
        (("--level", "tasks", "--task", "piqa"), 2, "'piqa' is not lm-eval:NAMES"),
        (("--level", "tasks", "--task", "lm-eval:local_text"), 2, "asks for generated texts"),
        pytest.param(  # reads every task that the harness has
            *(("--level", "tasks", "--task", "lm-eval:local_chioce"), 2, "has no task"),
            marks=pytest.mark.full,
        ),
        (("--level", "tasks", "--task", "lm-eval:local_choice"), 1, "of the model's 211 tokens"),
        (("--against-golden", "--task", "lm-eval:a"), 2, "--task goes with a comparison"),
    ],
)
def test_what_cannot_be_asked(
    options: tuple[str, ...], code: int, words: str, place: Path, converted: Path, hf: Path, gptj
):
    include = ("--include-path", place / "tasks") if "--task" in options else ()
    for path in (place / "whole").glob("*token*"):
        shutil.copy(path, hf)
    done = gptj("verify", *options, *include)
    assert done.code == code, done.stderr
    assert words in " ".join(done.stderr.split())
    assert done.stdout == ""

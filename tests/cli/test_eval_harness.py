"""`gptj eval --task lm-eval:…`: the harness's tasks, as its own model class answers them."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, GPTJForCausalLM

from runner.evaluation.harness import language_model
from runner.evaluation.harness.kept_answers import KeptAnswers
from tests.cli.harness_tasks import CHOICE, LIKELIHOOD, TEXT, task_folder
from tests.conftest import any_backend, make_checkpoint

#: Float32 in another order: each side is as far from float64.
ROUNDING = 1e-5
TASKS = ("local_choice", "local_rolling", "local_text")
ASK = f"lm-eval:{','.join(TASKS)}"
SENTENCE = "Question: what is it?\nAnswer: it is a fox, and the fox is it.\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with ./tasks, and with the caches of the library that loads their data."""
    folder = tmp_path_factory.mktemp("harness")
    with task_folder(folder):
        yield folder


@pytest.fixture(scope="module", params=["random", "trained"])
def model(request: pytest.FixtureRequest, place: Path) -> Path:
    """A small model with GPT-J's vocabulary and a context that some requests do not fit in."""
    folder = make_checkpoint(place / request.param, vocab_size=50400, n_layer=2, n_positions=96)
    if request.param == "trained":
        torch.manual_seed(0)
        tokenizer, hf = (
            AutoTokenizer.from_pretrained(folder),
            GPTJForCausalLM.from_pretrained(folder),
        )
        ids = torch.tensor([tokenizer.encode(SENTENCE)])
        optimizer = torch.optim.Adam(hf.parameters(), lr=0.02)
        for _ in range(12):
            hf(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        hf.save_pretrained(folder)
    return folder


class _Recording(HFLM):
    """The harness's own model class, whose answers are kept."""

    answers: dict[str, list[Any]]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self.answers["choices"] = super().loglikelihood(requests, disable_tqdm=True)
        return self.answers["choices"]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self.answers["rolling"] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return self.answers["rolling"]

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self.answers["texts"] = super().generate_until(requests, disable_tqdm=True)
        return self.answers["texts"]


@pytest.fixture(scope="module")
def expected(model: Path, place: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The harness's results with its own model class, and its answers in the order of requests."""
    own = _Recording(str(model), device="cpu", dtype="float32", batch_size=3)
    own.answers = {}
    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes seconds
        found = simple_evaluate(own, tasks=list(TASKS), task_manager=manager, log_samples=False)
    assert found
    return dict(found["results"]), own.answers


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Our answers in the order of requests."""
    found: dict[str, Any] = {}
    for name, method in (
        ("choices", "loglikelihood"), ("rolling", "loglikelihood_rolling"),
        ("texts", "generate_until"),
    ):  # fmt: skip
        original = getattr(language_model.HarnessModel, method)

        def keeping(self: Any, requests: Any, *, original: Any = original, name: str = name) -> Any:
            found[name] = original(self, requests)
            return found[name]

        monkeypatch.setattr(language_model.HarnessModel, method, keeping)
    return found


def _ask(gptj: Callable[..., Any], model: Path, place: Path, *more: object) -> Any:
    tasks = ("eval", "--model", model, "--task", ASK, "--include-path", place / "tasks")
    return gptj(*tasks, "--batch-size", 3, "--json", *more)


@pytest.mark.parametrize(
    ("model", "way"),
    [
        *(("random", "resident"), ("trained", "streaming")),
        pytest.param("random", "streaming", marks=pytest.mark.full),
        pytest.param("trained", "resident", marks=pytest.mark.full),
    ],
    indirect=["model"],
)
def test_every_answer_is_that_of_the_harness_own_model(
    way: str, model: Path, place: Path, expected, recorded, workdir: Path, gptj
):
    done = _ask(gptj, model, place, "--execution", way)
    assert done.code == 0, done.stderr
    results, answers = expected
    for (ours, greedy), (theirs, their_greedy) in zip(
        recorded["choices"], answers["choices"], strict=True
    ):
        assert ours == pytest.approx(theirs, rel=ROUNDING, abs=ROUNDING)
        assert greedy == their_greedy
    assert recorded["rolling"] == pytest.approx(answers["rolling"], rel=ROUNDING)
    assert recorded["texts"] == answers["texts"]
    assert done.json["results"].keys() == results.keys() == set(TASKS)
    for task, metrics in results.items():
        found = done.json["results"][task]
        assert found.keys() == metrics.keys()
        for name, value in metrics.items():
            if name.startswith(("word_", "byte_")) and value != "N/A":
                assert math.log(found[name]) == pytest.approx(math.log(value), rel=ROUNDING)
            elif name == "bits_per_byte,none":
                assert found[name] == pytest.approx(value, rel=ROUNDING)
            else:
                assert found[name] == value, name
    assert "requests that lost their beginning" in done.stderr


def test_the_backends_agree(place: Path, workdir: Path, gptj):
    model = make_checkpoint(workdir / "hf", vocab_size=50400, n_layer=1, n_positions=96)
    ask = ["eval", "--model", model, "--task", "lm-eval:local_choice,local_text", "--limit", "2"]
    ask += ["--include-path", place / "tasks", "--json"]
    expected = gptj(*ask).json["metrics"]
    command = [sys.executable, "-m", "runner.cli.root", *ask, "--backend", "jax"]
    environment = any_backend(HF_DATASETS_CACHE=str(place / "cache"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["metrics"] == expected
    assert found["reused_answers"] == 0  # those of TensorFlow are its own


@pytest.fixture(scope="module")
def one_block(place: Path) -> Path:
    return make_checkpoint(place / "one", vocab_size=50400, n_layer=1, n_positions=96)


def test_an_interrupted_run_resumes_where_it_was(
    one_block: Path, place: Path, workdir: Path, gptj, monkeypatch: pytest.MonkeyPatch
):
    whole = _ask(gptj, one_block, place, "--work-dir", "whole").json
    computed: list[int] = []
    original = KeptAnswers.add

    def add(self: Any, answers: Any) -> None:
        if len(computed) == 4:
            signal.raise_signal(signal.SIGINT)
        original(self, answers)
        computed.append(len(answers))

    monkeypatch.setattr(KeptAnswers, "add", add)
    stopped = _ask(gptj, one_block, place)
    assert stopped.code == 130
    assert "run the same command again to resume with the answers in" in stopped.stderr
    before = sum(computed)
    (kept,) = Path("lm-eval-answers").iterdir()
    kept.write_bytes(kept.read_bytes()[:-7])  # as a kill in the middle of a line leaves it
    computed[:] = [0] * 5
    resumed = _ask(gptj, one_block, place).json
    assert resumed["results"] == whole["results"]
    assert resumed["reused_answers"] == before - 1
    lines = Path(whole["answers"]).read_text().splitlines()
    assert sum(computed) == len(lines) - before + 1
    computed[:] = [0] * 5
    assert _ask(gptj, one_block, place).json["results"] == whole["results"]
    assert sum(computed) == 0


def test_answers_are_those_of_one_model(one_block: Path, place: Path, workdir: Path, gptj):
    ask = ("eval", "--task", "lm-eval:local_rolling", "--include-path", place / "tasks", "--json")
    first = gptj(*ask, "--model", one_block).json
    other = make_checkpoint(workdir / "one", seed=8, vocab_size=50400, n_layer=1, n_positions=96)
    second = gptj(*ask, "--model", other).json
    assert second["reused_answers"] == 0
    assert second["metrics"] != first["metrics"]


def test_examples_and_limits(one_block: Path, place: Path, workdir: Path, gptj):
    ask = ("eval", "--model", one_block, "--include-path", place / "tasks", "--limit", 3)
    done = gptj(*ask, "--task", "lm-eval:local_choice", "--num-fewshot", 2, "--json")
    assert done.json["n_samples"] == {"local_choice": {"original": 7, "effective": 3}}
    assert done.json["n_shot"] == {"local_choice": 2}
    table = gptj(*ask, "--task", "lm-eval:local_choice")
    assert "|local_choice|Yaml   |none  |     0|acc     |" in table.stdout


@pytest.mark.parametrize(
    ("task", "code", "words"),
    [
        ("lm-eval:local_choice,", 2, "lacks a name"),
        ("lm-eval", 2, "or lm-eval:NAMES"),
        ("lm-eval:local_chioce", 2, "no task is defined in more/bad.yaml"),
        ("lm-eval:no_data", 1, "no_data"),
        ("lm-eval:odd_options", 1, "generation_kwargs with penalty_alpha"),
        ("lm-eval:too_long", 1, "max_gen_toks 200, expected fewer than the model's 96"),
        ("lm-eval:empty_choice", 1, "document 0: has an empty continuation"),
        ("lm-eval:no_field", 1, "no_field"),
    ],
)
def test_what_cannot_be_asked(
    task: str, code: int, words: str, one_block: Path, place: Path, workdir: Path, gptj
):
    Path("more").mkdir()
    files = f"dataset_kwargs: {{data_files: {{test: {place}/tasks/local_choice.jsonl}}}}\n"
    data = f"test_split: test\ndataset_path: json\n{files}"
    for name, text in {
        "bad": "output_type: [\n",
        "no_data": "dataset_path: json\ndataset_kwargs: {data_files: missing.jsonl}\n" + CHOICE,
        "odd_options": data + TEXT.replace("max_gen_toks: 12", "max_gen_toks: 9, penalty_alpha: 1"),
        "too_long": data + TEXT.replace("12", "200"),
        "empty_choice": data + LIKELIHOOD,
        "no_field": data + CHOICE.replace("choices", "nothing"),
    }.items():
        Path(f"more/{name}.yaml").write_text(f"task: {name}\n{text}")
    include = ("--include-path", place / "tasks", "--include-path", "more")
    done = gptj("eval", "--model", one_block, "--task", task, *include)
    assert done.code == code, done.stderr
    assert words in done.stderr
    assert task != "lm-eval:local_chioce" or "names like it: local_choice, " in done.stderr
    assert done.stderr.count("error: ") == 1
    assert done.stdout == ""


def test_a_data_set_that_is_not_cached_without_network(
    one_block: Path, workdir: Path, gptj, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("tasks").mkdir()
    far = "task: far\ndataset_path: nobody/nothing\ntest_split: test\n"
    Path("tasks/far.yaml").write_text(far + CHOICE)
    done = gptj("eval", "--model", one_block, "--task", "lm-eval:far", "--include-path", "tasks")
    assert done.code == 1
    assert "error: task far: its data set is not cached and cannot be fetched" in done.stderr
    assert "--include-path DIR" in done.stderr


def test_two_runs_do_not_write_one_file(one_block: Path, place: Path, workdir: Path, gptj):
    first = _ask(gptj, one_block, place, "--limit", 1).json
    with KeptAnswers(Path(first["answers"])):
        second = _ask(gptj, one_block, place, "--limit", 1)
    assert second.code == 1
    assert "another process writes answers of this model there" in second.stderr

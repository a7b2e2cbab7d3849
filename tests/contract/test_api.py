"""The functions of `runner.api`: the page about them runs, and they have the commands' options."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest

from gptj_convert.streams.progress import Progress
from gptj_model.errors import ConfigError, FileFault, GptjError, TrainingFault, UsageError
from runner import api
from runner.cli.root import root
from tests.conftest import make_checkpoint, write_records
from tests.doc_commands import REPOSITORY

HEAVY = ("torch", "tensorflow", "keras", "transformers", "jax", "numpy", "pydantic")
PAGE = REPOSITORY / "docs/api.md"

#: Options of each command that its function lacks: modes with a function of their own or none,
#: what is asked for by another keyword, and what is said on a terminal only.
WITHOUT = {
    "convert": {"to", "dry_run"},
    "verify": {"against_golden", "report", "self_test"},
    "train": {
        "mode", "eval_steps", "execution", "backend", "set", "workers", "validate_only",
        "compile_only", "cs_ip", "target", "run_py", "dry_run",
    },
}  # fmt: skip
GLOBAL = {"json", "quiet", "help"}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_function_has_the_options_of_its_command(name: str):
    command = root.commands[name]
    options = {
        p.opts[0].removeprefix("--").replace("-", "_")
        for p in command.params
        if isinstance(p, click.Option)
    }
    keywords = set(inspect.signature(getattr(api, name)).parameters)
    assert options - GLOBAL - WITHOUT[name] <= keywords
    assert not keywords & WITHOUT[name]


def test_a_plan_takes_what_a_conversion_takes():
    of_plan, of_conversion = (set(inspect.signature(f).parameters) for f in (api.plan, api.convert))
    assert of_conversion - of_plan == {"out", "resume", "force", "progress"}
    assert not of_plan - of_conversion


def test_importing_it_loads_nothing_heavy():
    probe = "import json, sys, runner.api; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & set(HEAVY)


class Enough(Exception):
    """Raised by a callback."""


def _enough(event: object) -> None:
    raise Enough


def _records(folder: Path) -> None:
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 50257, (8, 16))
    write_records(folder / "a.tfrecord", [(row, np.ones(16), row) for row in rows])


def test_the_page_runs(workdir: Path, capsys: pytest.CaptureFixture[str]):
    make_checkpoint(Path("gpt-j-6b"), vocab_size=50400, n_layer=1)
    _records(Path("data"))
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(code, PAGE.name, "exec"), names)
    shown = capsys.readouterr().out
    assert "100%" in shown
    assert "saved run/model.ckpt-2" in shown
    assert "usage\nconverted: already exists" in shown
    assert np.shape(names["logits"]) == (1, 4, 50400)
    run = names["run"]
    assert isinstance(run, api.TrainingResult)
    assert (run.step, run.target, run.stopped_early, run.best) == (3, 3, None, None)
    assert api.verify("trained", "run", level="weights").ok
    _streams_the_same(run.model_dir)
    _stops_and_resumes(run.model_dir)


def _streams_the_same(model_dir: Path) -> None:
    with api.stream_model(model_dir) as streamed:
        ids = np.array([[464, 2068]], np.int32)
        x_BTD = streamed.embed(ids)
        for block in streamed.blocks():
            x_BTD = block.run(x_BTD, np.arange(2)[None])
        head = streamed.head()
        [found] = head.logits(head.normed([x_BTD]))
    expected = np.asarray(api.load_model(model_dir)(ids))
    assert np.abs(found - expected).max() < 1e-4 * expected.std()


def _stops_and_resumes(model_dir: Path) -> None:
    with pytest.raises(Enough):
        api.train(model_dir, max_steps=5, progress=_enough)
    asked: list[bool] = []
    done = api.train(model_dir, max_steps=5, stopped=lambda: bool(asked.append(True)) or True)
    assert asked
    assert (done.step, done.target) == (3, 5)  # of the last checkpoint: the folder is free again


@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_what_a_run_refuses(golden_run: Path, caplog: pytest.LogCaptureFixture):
    for keywords, kind in (
        ({"max_steps": 1, "steps": 1}, UsageError),
        ({"init_from": "hf", "checkpoint_path": "hf"}, UsageError),
        ({"init_from": "hf", "steps": 0}, UsageError),
        ({"init_from": "hf", "epochs": float("nan")}, UsageError),
        ({"init_from": "hf", "epochs": "2"}, UsageError),
        ({"init_from": "hf", "max_steps": 2.5}, UsageError),
        ({}, ConfigError),
        ({"init_from": "hf", "params": "missing.yaml"}, GptjError),
        ({"init_from": "hf", "params": "params.yaml", "settings": {"a.b": 1}}, ConfigError),
        ({"init_from": "hf", "params": "params.yaml",
          "settings": {"runconfig.enable_distributed": True}}, ConfigError),
    ):  # fmt: skip
        with pytest.raises(kind):
            api.train("m", **keywords)
        assert not Path("m").exists(), keywords
    Path("m").mkdir()
    Path("m/checkpoint").write_text('model_checkpoint_path: "model.ckpt-7"\n')
    with pytest.raises(TrainingFault):
        api.train("m", init_from="hf", params="params.yaml")


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"target": "onnx"}, "target is 'onnx', expected one of tf, hf, keras, cs"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"vocab_size": "211"}, "vocab_size is '211'"),
        ({"max_shard_size": "2 parsecs", "target": "hf"}, "max_shard_size: '2 parsecs'"),
        ({"max_shard_size": 10**6}, "does not go with --to tf"),
        ({"param_groups": "one"}, "no effect without optimizer_state"),
        ({"adapter": "a", "optimizer_state": True}, "exclude each other"),
        ({"drop": "v_head.weight"}, "expected a list of names"),
        ({"drop": ["v_head.weight"]}, "v_head.weight"),
    ],
    ids=str,
)
def test_what_a_plan_refuses(small_hf: Path, keywords: dict, words: str):
    with pytest.raises(UsageError, match=re.escape(words)):
        api.plan(small_hf, **{"target": "tf"} | keywords)


def test_what_the_others_refuse(small_hf: Path, workdir: Path):
    with pytest.raises(UsageError):
        api.convert(small_hf, "tf", "out", resume=True, force=True)
    with pytest.raises(UsageError):
        api.convert(small_hf, "tf", small_hf, force=True)
    for call in (api.plan, api.convert):
        with pytest.raises(FileFault):
            call("missing", "tf", *(["out"] if call is api.convert else []))
    with pytest.raises(UsageError):
        api.verify(small_hf, level="bits")
    with pytest.raises(UsageError):
        api.verify(small_hf, tolerance=0.0)
    with pytest.raises(FileFault):
        api.load_model("missing")
    with pytest.raises(UsageError):
        api.load_model(small_hf, dtype="keep")
    with pytest.raises(UsageError):
        api.load_model(small_hf, backend="torch")
    with pytest.raises(UsageError), api.stream_model(small_hf, kept_blocks=-1):
        pass


def test_an_interrupted_conversion_is_resumed(small_hf: Path, workdir: Path, small_pieces: None):
    def refuse(progress: Progress) -> None:
        if progress.done > progress.total / 2:
            raise Enough

    with pytest.raises(Enough):
        api.convert(small_hf, "tf", "out", progress=refuse)
    assert not Path("out").exists()
    assert api.convert(small_hf, "tf", "out", resume=True).kept_bytes > 0
    Path("out/config.json").write_text("{")
    verdict = api.verify("out", level="structure")
    assert not verdict.ok


def test_notes_are_logged(hf: Path, caplog: pytest.LogCaptureFixture):
    (hf / "generation_config.json").unlink(missing_ok=True)
    api.convert(hf, "tf", "out")
    assert "no tokenizer files beside the weights, so none are carried over" in caplog.messages

"""`gptj runs`: runs compared by what they logged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptj_convert.formats.layouts.tf import best_text
from runner.reports.evaluations import record_evaluation
from runner.training.run.folder import locked
from runner.training.run.starts import Start, record_start

PARAMS = (
    "train_input:\n  batch_size: {batch}\noptimizer:\n  learning_rate: [{{scheduler: {name}}}]\n"
)


def _run(name: str, steps: int, *, batch: int = 2, schedule: str = "Constant") -> Path:
    folder = Path(name)
    folder.mkdir()
    rows = [{"step": n, "loss": 8 / n, "learning_rate": 0.1, "unclipped_grad_norm": 1.0,
             "tokens_per_second": 100.0 + n} for n in range(1, steps + 1)]  # fmt: skip
    rows.append({"step": steps, "eval/loss": 2.5, "eval/accuracy": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "params.yaml").write_text(PARAMS.format(batch=batch, name=schedule))
    return folder


def test_figures_and_what_differs(workdir: Path, gptj):
    _run("a", 4)
    _run("b", 21, batch=3)
    found = gptj("runs", "a", "b", "--json").json
    assert found["runs"][0] == {
        "model_dir": "a", "step": 4, "target": None, "loss": pytest.approx(25 / 6),
        "eval_loss": 2.5, "tokens_per_second": 102.5, "running": False,
        "evaluations": [{"step": 4, "eval/loss": 2.5, "eval/accuracy": 0.5}], "best": [],
        "resumed_at": [], "skipped_steps": None,
    }  # fmt: skip
    assert found["differences"] == {"train_input.batch_size": [2, 3]}
    shown = gptj("runs", "a", "b").stdout.splitlines()
    assert re.fullmatch(r"a +4 +4\.167 +2\.5 +102\.5", shown[1])
    assert shown[3] == "train_input.batch_size: 2, 3"


def test_the_page_has_every_run_and_needs_nothing_else(workdir: Path, gptj):
    _run("a<b>", 3)
    _run("long", 5000, schedule="Linear")
    assert gptj("runs", "a<b>", "long", "--html", "runs.html").code == 0
    page = Path("runs.html").read_text()
    assert page.count("<polyline") == 2 * 4
    assert page.count("<circle") == 2 * 2
    assert "a&lt;b&gt;" in page
    assert "a<b>" not in page
    assert "http" not in page
    assert "optimizer.learning_rate[0].scheduler" in page
    assert len(page) < 100_000


def test_a_line_that_a_kill_has_cut(workdir: Path, gptj):
    path = _run("a", 3) / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert gptj("runs", "a", "--json").json["runs"][0]["step"] == 3
    path.write_text(path.read_text() + "\n" + '{"step": 5, "loss": 1}\n')
    done = gptj("runs", "a")
    assert done.code == 1
    assert "metrics.jsonl: line 5" in done.stderr


def test_what_is_no_run(workdir: Path, gptj):
    done = gptj("runs", "nothing")
    assert done.code == 2
    assert "nothing/metrics.jsonl: not found" in done.stderr
    (workdir / "metrics.jsonl").write_text("")
    assert gptj("runs", ".").code == 2


def test_a_page_follows_a_run_until_it_ends(workdir: Path):
    folder = _run("a", 3)
    command = (sys.executable, "-m", "runner.cli.root", "runs", "a", "--html", "p.html", "--follow")
    with locked(folder):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr
        assert process.stderr.readline() == "a: step 3\n"
        page = Path("p.html").read_text()
        assert 'http-equiv="refresh"' in page
        assert "training" in page
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r"^a +3 +4", out, re.MULTILINE)
    assert "refresh" not in Path("p.html").read_text()


def test_resumptions_skipped_steps_and_evaluations_of_every_checkpoint(workdir: Path, gptj):
    folder = _run("a", 5)
    for step, target in ((0, 4), (3, 9)):
        place = {"epoch": 0, "record": 2 * step, "records": 9, "batch_size": 2}
        record_start(
            folder, Start(step=step, target=target, skipped=0, grad_accum_steps=1, **place)
        )
    record_evaluation(folder, 2, {"loss": 3.0, "eval/accuracy": 0.1})
    record_evaluation(folder, 5, {"loss": 2.0, "eval/accuracy": 0.2})
    (folder / "best.json").write_text(best_text("eval/loss", {"model.ckpt-5": 2.0}))
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "loss": 1.0, "skipped_steps": 2}\n')
    with (folder / "evaluations.jsonl").open("a") as f:
        f.write('{"step": 5, "ev')
    found = gptj("runs", "a", "--json").json["runs"][0]
    assert [row["eval/loss"] for row in found["evaluations"]] == [3.0, 2.0]
    assert (found["target"], found["resumed_at"], found["skipped_steps"]) == (9, [3], 2)
    shown = gptj("runs", "a", "--html", "p.html").stdout.splitlines()
    assert re.fullmatch(r"5 +2 +0.2 +– +– +best", shown[-1])
    page = Path("p.html").read_text()
    assert page.count('class="best') == 2
    assert page.count('class="resumed') == 4
    assert "refresh" not in page


def test_an_evaluation_after_a_line_that_a_kill_has_cut(workdir: Path, gptj):
    folder = _run("a", 3)
    (folder / "evaluations.jsonl").write_text('{"step": 1, "ev')
    record_evaluation(folder, 2, {"loss": 3.0})
    found = gptj("runs", "a", "--json").json["runs"][0]
    assert [row["step"] for row in found["evaluations"]] == [2, 3]

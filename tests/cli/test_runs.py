"""`gptj runs`: runs compared by what they logged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

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
        "model_dir": "a", "step": 4, "loss": pytest.approx(25 / 6), "eval_loss": 2.5,
        "tokens_per_second": 102.5,
    }  # fmt: skip
    assert found["differences"] == {"train_input.batch_size": [2, 3]}
    shown = gptj("runs", "a", "b").stdout.splitlines()
    assert re.fullmatch(r"a +4 +4\.167 +2\.5 +102\.5", shown[1])
    assert shown[-1] == "train_input.batch_size: 2, 3"


def test_the_page_has_every_run_and_needs_nothing_else(workdir: Path, gptj):
    _run("a<b>", 3)
    _run("long", 5000, schedule="Linear")
    assert gptj("runs", "a<b>", "long", "--html", "runs.html").code == 0
    page = Path("runs.html").read_text()
    assert page.count("<polyline") == 2 * 3
    assert page.count("<circle") == 2
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

"""Best checkpoints, early stopping and epochs of `gptj train`, and the place in its records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from runner.config.params import RunConfig
from runner.data.reading.records import read_records
from runner.training.run.selection import Selection
from runner.training.run.starts import read_starts
from tests.cli.test_train import BEGIN, _computed, _refused, _rows
from tests.conftest import write_records

adamw = pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
EVERY_2 = ("--set", "runconfig.save_checkpoints_steps=2")
BOTH = (*BEGIN, "--mode", "train_and_eval", *EVERY_2)


def _set(**values: object) -> tuple[str, ...]:
    return tuple(w for k, v in values.items() for w in ("--set", f"runconfig.{k}={v}"))


def _steps() -> list[int]:
    return sorted(int(p.stem.rpartition("-")[2]) for p in Path("model_dir").glob("*.index"))


def _best() -> list[int]:
    stated = json.loads(Path("model_dir/best.json").read_text())
    return [int(entry["checkpoint"].rpartition("-")[2]) for entry in stated["checkpoints"]]


def _start() -> tuple[int, int]:
    """Return epoch and record that the newest process of the run started at."""
    start = read_starts(Path("model_dir"))[-1]
    return start.epoch, start.record


@adamw
@pytest.mark.parametrize("count", [1, 2])
def test_the_best_checkpoints_stay_beside_the_newest(golden_run: Path, count: int, gptj):
    rising = ("--set", "optimizer.learning_rate=0.3")
    done = gptj(*BOTH, *rising, *_set(keep_best=count, keep_checkpoint_max=1), "--max-steps", 10,
                "--json")  # fmt: skip
    assert done.code == 0, done.stderr
    losses = {row["step"]: row["eval/loss"] for row in _rows() if "eval/loss" in row}
    ranked = sorted(losses, key=lambda step: (losses[step], step))
    assert ranked[0] != 10, "the run is to get worse at its end"
    assert _best() == ranked[:count]
    assert _steps() == sorted({*ranked[:count], 10})
    assert done.json["best"]["eval/loss"] == losses[ranked[0]]
    assert gptj("convert", "model_dir@best", "--to", "hf", "--out", "best").code == 0
    prefix = f"model_dir/model.ckpt-{ranked[0]}"
    assert gptj("convert", prefix, "--to", "hf", "--out", "same").code == 0
    assert (
        Path("best/model.safetensors").read_bytes() == Path("same/model.safetensors").read_bytes()
    )
    found = gptj("runs", "model_dir", "--json").json["runs"][0]
    assert found["best"] == ranked[:count]
    assert [row["step"] for row in found["evaluations"]] == [2, 4, 6, 8, 10]


@adamw
def test_a_metric_that_rises(golden_run: Path, gptj):
    done = gptj(*BOTH, *_set(keep_best=1, best_metric="accuracy"), "--max-steps", 8)
    assert done.code == 0, done.stderr
    values = {row["step"]: row["eval/accuracy"] for row in _rows() if "eval/loss" in row}
    assert _best() == [max(values, key=lambda step: (values[step], -step))]


@adamw
def test_a_run_stops_early_and_says_how_to_train_on(golden_run: Path, gptj):
    rule = _set(**{"early_stopping.patience": 2, "early_stopping.min_delta": 100})
    done = gptj(*BOTH, *rule, "--max-steps", 20, "--json")
    assert (done.code, done.json["step"]) == (0, 6)
    assert "stopped early at step 6" in done.stderr
    assert "stopped_early" in done.json
    before = {p.name: p.read_bytes() for p in Path("model_dir").iterdir()}
    again = gptj("train", "--mode", "train_and_eval", "--max-steps", 20, "--json")
    assert (again.code, again.json["step"]) == (0, 6)
    changed = {p.name for p in Path("model_dir").iterdir() if before.get(p.name) != p.read_bytes()}
    assert changed <= {".lock"}
    more = gptj("train", "--mode", "train_and_eval", "--max-steps", 8, "--json",
                *_set(early_stopping="null"))  # fmt: skip
    assert more.json["step"] == 8


@adamw
def test_a_run_in_parts_selects_as_the_run_in_one(golden_run: Path, gptj):
    """Also when it was stopped between a checkpoint and its evaluation."""
    options = (*BOTH, "--set", "optimizer.learning_rate=0.3",
               *_set(keep_best=1, keep_checkpoint_max=1))  # fmt: skip
    assert gptj(*options, "--max-steps", 8, "--model-dir", "whole", "--quiet").code == 0
    for last in (3, 6):
        assert gptj(*options, "--max-steps", last, "--quiet").code == 0
    rows = [row for row in _rows() if row["step"] != 3 or "loss" in row]
    lines = [json.dumps(row) + "\n" for row in rows if row["step"] != 6 or "loss" in row]
    Path("model_dir/metrics.jsonl").write_text("".join(lines))  # as a kill leaves it
    assert gptj(*options, "--max-steps", 8, "--quiet").code == 0
    whole = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert [_computed(row) for row in _rows()] == [_computed(row) for row in whole]
    assert Path("model_dir/best.json").read_text() == Path("whole/best.json").read_text()
    assert _steps() == sorted(int(p.stem.rpartition("-")[2]) for p in Path("whole").glob("*.index"))


@adamw
def test_a_best_checkpoint_outlives_lost_metrics(golden_run: Path, gptj):
    options = (*BOTH, "--set", "optimizer.learning_rate=0.3",
               *_set(keep_best=1, keep_checkpoint_max=1))  # fmt: skip
    assert gptj(*options, "--max-steps", 6, "--quiet").code == 0
    best = _best()
    assert best != [6]
    Path("model_dir/metrics.jsonl").unlink()
    assert gptj(*options, "--max-steps", 8, "--quiet").code == 0
    assert set(best) < set(_steps())
    Path("model_dir/best.json").write_text("{")
    _refused(gptj(*options, "--max-steps", 10), 1, "best.json", "delete it")
    assert set(best) < set(_steps())


def test_rules_of_selection(tmp_path: Path):
    def stops(values: Sequence[float], patience: int, delta: float, metric: str) -> int | None:
        rule = {"metric": metric, "patience": patience, "min_delta": delta}
        selection = Selection(tmp_path, RunConfig.model_validate({"early_stopping": rule}), 0)
        for step, value in enumerate(values, start=1):
            selection.add(step, {metric: value})
            if selection.stop:
                return step
        return None

    nan = float("nan")
    assert stops([3, 2, 2, 2], 2, 0, "loss") == 4
    assert stops([3, 2, 2.5, 1.9, 3], 2, 0, "loss") is None
    assert stops([3, 2.9, 2.8, 2.7], 2, 0.15, "loss") is None
    assert stops([3, 2.9, 2.8, 2.7], 2, 0.5, "loss") == 3
    assert stops([0.1, 0.2, 0.2, 0.1], 2, 0, "eval/accuracy") == 4
    assert stops([nan, nan, 1], 2, 0, "loss") == 2
    assert stops([nan, 1, nan, 0.5], 2, 0, "loss") is None


@adamw
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("keep_best=-1", "keep_best"),
        ("keep_best=many", "keep_best"),
        ("best_metric=bleu", "'eval/accuracy'"),
        ("early_stopping.patience=0", "early_stopping.patience"),
        ("early_stopping={}", "early_stopping.patience is missing"),
        ("early_stopping={patience: 1, metrik: loss}", "did you mean 'metric'"),
        ("early_stopping=3", "early_stopping"),
    ],
)
def test_a_setting_that_cannot_be(golden_run: Path, setting: str, words: str, gptj):
    _refused(gptj(*BOTH, "--set", f"runconfig.{setting}"), 2, words)


@adamw
def test_what_needs_an_evaluation_is_refused_without_one(golden_run: Path, gptj):
    for setting in ("keep_best=1", "early_stopping.patience=1"):
        done = gptj(*BEGIN, "--set", f"runconfig.{setting}")
        _refused(done, 2, "--mode train_and_eval", setting.partition(".")[0].partition("=")[0])
    assert not Path("model_dir").exists()


@adamw
def test_a_checkpoint_that_a_run_does_not_have(golden_run: Path, gptj):
    assert gptj(*BEGIN, "--max-steps", 1, "--quiet").code == 0
    _refused(
        gptj("generate", "--model", "model_dir@best", "--ids", "1"), 1, "best.json", "keep_best"
    )
    _refused(gptj("convert", "model_dir@7"), 1, "model.ckpt-7: not found", "model.ckpt-1")
    _refused(gptj("inspect", "model_dir@last"), 1, "'last' names no checkpoint")
    assert gptj("inspect", "model_dir@1").code == 0


@adamw
def test_epochs(golden_run: Path, gptj):
    """16 records, 4 in a batch."""
    done = gptj(*BEGIN, "--epochs", "1.5", "--json")
    assert (done.code, done.json["step"]) == (0, 6)
    assert "16 records, 512 tokens, 4 steps an epoch" in done.stderr
    assert gptj("train", "--epochs", "1.5", "--json").json["step"] == 6
    assert gptj("train", "--json").json["step"] == 6, "params.yaml has the number of steps"
    more = gptj("train", "--epochs", 2, "--set", "train_input.batch_size=2", "--json").json
    assert more["step"] == 6 + 4
    assert gptj("train", "--max-steps", 11, "--quiet").code == 0
    assert _start() == (1, 16)
    for options in (("--epochs", 0), ("--epochs", 1, "--steps", 1), ("--epochs", "some")):
        _refused(gptj(*BEGIN, *options), 2, "--epochs")


@adamw
def test_another_batch_size_reads_on_where_the_run_stood(golden_run: Path, gptj):
    """The loss of a step at learning rate 0 names its records."""
    Path("data").mkdir()
    random = np.random.default_rng(3)
    rows = [(ids, [1] * 32, ids) for ids in random.integers(0, 512, (16, 32)).tolist()]
    write_records(Path("data/a.tfrecord"), rows)
    still = ("--set", "optimizer.learning_rate=0", "--set", "train_input.shuffle=true",
             "--set", "train_input.data_dir=data", "--quiet")  # fmt: skip
    one = ("--set", "train_input.batch_size=1", "--set", "train_input.shuffle_buffer=40")
    assert gptj(*BEGIN, *still, *one, "--max-steps", 16, "--model-dir", "one").code == 0
    lines = Path("one/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert gptj(*BEGIN, *still, "--max-steps", 1).code == 0
    for setting, last in (
        ("train_input.batch_size=3", 3),
        ("train_input.batch_size=2", 4),
        ("optimizer.grad_accum_steps=2", 5),
    ):
        assert gptj("train", "--set", setting, "--max-steps", last, "--quiet").code == 0
    found = [row["loss"] for row in _rows()]
    groups = [losses[:4], losses[4:7], losses[7:10], losses[10:12], losses[12:]]
    assert found == pytest.approx([np.mean(group) for group in groups], rel=1e-5)
    assert gptj("train", "--max-steps", 6, "--quiet").code == 0
    assert _start() == (0, 16)


@adamw
def test_a_checkpoint_without_a_place_counts_the_steps_that_it_had(golden_run: Path, gptj):
    """Those of other programs and of older versions."""
    assert gptj("train", "--init-from", "ckpt/model.ckpt-20", "--params", "params.yaml",
                "--max-steps", 21, "--quiet").code == 0  # fmt: skip
    assert _start() == (4, 16)
    Path("model_dir/starts.jsonl").unlink()
    more = ("--set", "train_input.batch_size=2", "--max-steps", 22, "--quiet")
    assert gptj("train", *more).code == 0
    assert _start() == (5, 4)


@adamw
def test_records_that_change_are_noted(golden_run: Path, gptj):
    assert gptj(*BEGIN, "--max-steps", 2, "--quiet").code == 0
    path = Path("records/data.tfrecord")
    whole = path.read_bytes()
    starts = [at for _, at, _ in read_records(path, max_bytes=10**6)]
    path.write_bytes(whole[starts[1] :] + whole[: starts[1]])
    _refused(gptj("train", "--max-steps", 3, "--strict"), 1, "1 changed (data.tfrecord)")
    checked = gptj("train", "--max-steps", 3, "--validate-only")
    done = gptj("train", "--max-steps", 3)
    for outcome in (checked, done):
        assert outcome.code == 0
        assert "1 changed (data.tfrecord); the run resumes at record 8 of epoch 0" in outcome.stderr
    assert "changed" not in gptj("train", "--max-steps", 4).stderr
    shutil.copytree("records", "elsewhere")
    moved = gptj("train", "--max-steps", 5, "--set", "train_input.data_dir=elsewhere", "--strict")
    assert moved.code == 0, "the same files in another folder are the same records"


@adamw
def test_both_sections_are_checked_before_the_first_step(golden_run: Path, gptj):
    bad = ("--set", "eval_input.data_dir=nowhere")
    for more in ((), ("--validate-only",)):
        done = gptj(*BOTH, *bad, *more)
        _refused(done, 2, "eval_input: nowhere: not found")
    short = ("--set", "eval_input.max_sequence_length=16")
    _refused(gptj(*BOTH, *short), 1, "eval_input: ", "input_ids has 32 tokens")
    assert not list(Path("model_dir").glob("model.ckpt*"))


@adamw
@pytest.mark.parametrize("mode", ["train", "train_and_eval", "eval", "eval_all"])
def test_every_mode_can_be_validated(golden_run: Path, mode: str, gptj):
    assert gptj(*BEGIN, "--max-steps", 1, "--quiet").code == 0
    done = gptj("train", "--mode", mode, "--max-steps" if "train" in mode else "--eval-steps", 5,
                "--validate-only", "--json")  # fmt: skip
    assert done.code == 0, done.stderr
    sections = {"train": ["train_input"], "train_and_eval": ["train_input", "eval_input"]}
    epochs = done.json["epochs"]
    assert list(epochs) == sections.get(mode, ["eval_input"])
    assert {e["records"] for e in epochs.values()} == {16}
    if "train" in mode:
        assert (done.json["step"], done.json["target"]) == (1, 5)
        assert done.json["seconds_per_step"] >= 0
        assert done.json["disk_bytes"] > 0


@adamw
def test_eval_all_gives_every_step(golden_run: Path, gptj):
    assert gptj(*BEGIN, *EVERY_2, "--max-steps", 4, "--quiet").code == 0
    done = gptj("train", "--mode", "eval_all", "--json")
    assert [e["global_step"] for e in done.json["evaluations"]] == [2, 4]
    assert done.json["metrics"] == done.json["evaluations"][-1]
    lines = gptj("train", "--mode", "eval_all").stdout.splitlines()
    assert ["global_step = 2" in lines[0], "global_step = 4" in lines[1]] == [True, True]
    shown = gptj("runs", "model_dir", "--html", "runs.html").stdout
    assert sum("eval/loss" in line for line in shown.splitlines()) == 1
    assert Path("runs.html").read_text().count("<circle") >= 2


@adamw
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: "records/data.tfrecord", ("is a record file", "set data_dir to records")),
        (lambda: _folder("h5", "a.h5", "b.h5"), ("it holds 2 .h5", "CS client")),
        (lambda: _folder("raw", "a.jsonl"), ("it holds 1 .jsonl", "gptj data text raw")),
        (lambda: _folder("tokens", "a.npy"), ("it holds 1 .npy", "of other programs")),
        (lambda: _folder("empty"), ("it holds no files",)),
        (lambda: _listing(), ("lists gs://bucket/a.tfrecords, which is not a file here",)),
        (lambda: _foreign(), ("has no input_ids", "it has image, tokens", "another program")),
    ],
    ids=["file", "hdf5", "texts", "tokens", "empty", "index", "other records"],
)
def test_what_is_there_instead_of_records(golden_run: Path, make, words, gptj):
    done = gptj(*BEGIN, "--set", f"train_input.data_dir={make()}")
    assert done.code in (1, 2)
    _refused(done, done.code, *words)


def _folder(name: str, *files: str) -> str:
    Path(name).mkdir()
    for file in files:
        Path(name, file).write_bytes(b"x")
    return name


def _listing() -> str:
    Path("train.index").write_text("gs://bucket/a.tfrecords\n")
    return "train.index"


def _foreign() -> str:
    import tensorflow as tf

    Path("foreign").mkdir()
    features = {
        "tokens": tf.train.Feature(int64_list=tf.train.Int64List(value=range(9))),
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"png"])),
    }
    example = tf.train.Example(features=tf.train.Features(feature=features))
    with tf.io.TFRecordWriter("foreign/a.tfrecord") as writer:
        writer.write(example.SerializeToString())
    return "foreign"


@adamw
@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("trainer: {init: {}}\n", "the CS client"),
        ('{"pipe-parallel-size": 1, "num-layers": 12}', "GPT-NeoX"),
        ("per_device_train_batch_size: 4\n", "transformers' Trainer"),
        ('{"layers": 28, "d_model": 4096, "tpu_size": 8}', "original JAX trainer"),
        ("train_input: {data_processor: GptHDF5DataProcessor}\nmodel: {}\n", "CS PyTorch client"),
    ],
)
def test_a_configuration_of_another_program(golden_run: Path, text: str, program: str, gptj):
    Path("other.yaml").write_text(text)
    done = gptj("train", "--init-from", "hf", "--params", "other.yaml")
    _refused(done, 2, "other.yaml: is a configuration of", program)


@adamw
def test_too_large_a_fixed_loss_scale_is_named(golden_run: Path, gptj):
    half = ("--set", "model.mixed_precision=true", "--set", "optimizer.loss_scaling_factor=1e+15")
    done = gptj(*BEGIN, *half, "--max-steps", 2)
    _refused(done, 1, "fixed loss scale 1e+15", "optimizer.loss_scaling_factor=dynamic")

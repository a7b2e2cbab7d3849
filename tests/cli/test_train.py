"""`gptj train` and `gptj eval`: bad input, runs that stop, and runs that resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gptj_convert.formats.containers.tensor_bundle import BundleSource, data_path, index_path
from gptj_model.source import read_tensor
from runner.evaluation.reuse import reuse_programs
from tests.conftest import load_tensors, save_tensors, write_records

adamw = pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
MEASURED = ("tokens_per_second", "seconds_per_step", "model_flops_utilization", "peak_rss_bytes",
            "seconds_left")  # fmt: skip
BEGIN = ("train", "--init-from", "hf", "--params", "params.yaml")


def _computed(row: dict) -> dict:
    """Return the fields of a line of metrics that do not depend on the clock."""
    return {k: v for k, v in row.items() if k not in MEASURED}


def _rows() -> list[dict]:
    return [json.loads(line) for line in Path("model_dir/metrics.jsonl").read_text().splitlines()]


def _tensors(prefix: str) -> dict[str, np.ndarray]:
    source = BundleSource(Path(prefix))
    return {name: read_tensor(source, name) for name in source.tensors}


def _refused(done, code: int, *words: str) -> None:
    assert done.code == code, done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr


@adamw
@pytest.mark.parametrize(
    "stop_at",
    [7, pytest.param(10, marks=pytest.mark.full), pytest.param(13, marks=pytest.mark.full)],
)
def test_a_run_in_two_parts_is_the_run_in_one(golden_run: Path, stop_at: int, gptj):
    more = ("--set", "optimizer.grad_accum_steps=2", "--set", "train_input.shuffle=true",
            "--set", "model.residual_dropout_rate=0.1")  # fmt: skip
    assert gptj(*BEGIN, *more, "--max-steps", 16, "--model-dir", "whole", "--quiet").code == 0
    assert gptj(*BEGIN, *more, "--max-steps", stop_at, "--quiet").code == 0
    assert gptj("train", "--max-steps", 16, "--quiet").code == 0
    for row, other in zip(
        _rows(), map(json.loads, Path("whole/metrics.jsonl").read_text().splitlines()), strict=True
    ):
        assert _computed(row) == _computed(other)
    found, expected = _tensors("model_dir/model.ckpt-16"), _tensors("whole/model.ckpt-16")
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


@adamw
@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="whole"),
        pytest.param(("--set", "model.lora.rank=2"), id="lora", marks=pytest.mark.full),
    ],
)
def test_a_model_that_another_run_left_computes_the_same(more: tuple[str, ...], golden_run, gptj):
    options = (*BEGIN, *more, "--max-steps", 4, "--quiet")
    with reuse_programs(limit=0):
        assert gptj(*options, "--model-dir", "first").code == 0
    with reuse_programs():
        other = ("--set", "optimizer.learning_rate=0.1", "--max-steps", 3, "--model-dir", "other")
        assert gptj(*options, *other).code == 0
        assert gptj(*options).code == 0
    found, expected = _tensors("model_dir/model.ckpt-4"), _tensors("first/model.ckpt-4")
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


@adamw
def test_grad_accum_is_the_mean_of_means(golden_run: Path, gptj):
    """One step over two batches logs the mean of the losses of the two single batches."""
    one = ("--set", "optimizer.learning_rate=0", "--quiet")
    assert gptj(*BEGIN, *one, "--max-steps", 2).code == 0
    two = (*one, "--set", "optimizer.grad_accum_steps=2", "--model-dir", "two")
    assert gptj(*BEGIN, *two, "--max-steps", 1).code == 0
    losses = [row["loss"] for row in _rows()]
    (row,) = map(json.loads, Path("two/metrics.jsonl").read_text().splitlines())
    assert row["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


@adamw
def test_a_finished_run_changes_nothing(golden_run: Path, gptj):
    assert gptj(*BEGIN, "--max-steps", 2, "--quiet").code == 0
    before = {p.name: p.read_bytes() for p in Path("model_dir").glob("model.ckpt*")}
    done = gptj("train", "--max-steps", 2)
    assert done.code == 0
    assert "nothing to do" in done.stderr
    assert before == {p.name: p.read_bytes() for p in Path("model_dir").glob("model.ckpt*")}


@adamw
def test_steps_are_added_to_those_done(golden_run: Path, gptj):
    assert gptj(*BEGIN, "--steps", 2, "--quiet").code == 0
    assert gptj("train", "--steps", 3, "--json", "--quiet").json["step"] == 5


@adamw
def test_old_checkpoints_go_and_the_state_file_names_the_rest(golden_run: Path, gptj):
    settings = ("--set", "runconfig.save_checkpoints_steps=2", "--max-steps", 9)
    assert gptj(*BEGIN, *settings, "--quiet").code == 0
    assert sorted(p.name for p in Path("model_dir").glob("*.index")) == [
        "model.ckpt-8.index",
        "model.ckpt-9.index",
    ]
    import tensorflow as tf

    state = tf.train.get_checkpoint_state("model_dir")
    assert Path(state.model_checkpoint_path).name == "model.ckpt-9"
    assert len(state.all_model_checkpoint_paths) == 2


@adamw
def test_train_and_eval_writes_rows_without_loss(golden_run: Path, gptj):
    done = gptj(*BEGIN, "--mode", "train_and_eval", "--max-steps", 3)
    assert done.code == 0
    assert "eval/lm_perplexity" in done.stdout
    last = _rows()[-1]
    assert last["step"] == 3
    assert "loss" not in last
    assert {"eval/accuracy", "eval/lm_perplexity", "eval/bits_per_byte"} <= last.keys()


@adamw
def test_eval_all_evaluates_every_checkpoint(golden_run: Path, gptj):
    settings = ("--set", "runconfig.save_checkpoints_steps=2", "--max-steps", 4)
    assert gptj(*BEGIN, *settings, "--quiet").code == 0
    done = gptj("train", "--mode", "eval_all")
    assert done.code == 0
    assert len(done.stdout.splitlines()) == 2


@adamw
def test_a_checkpoint_of_another_folder_begins_a_run_where_it_stood(golden_run: Path, gptj):
    done = gptj("train", "--init-from", "ckpt/model.ckpt-20", "--params", "params.yaml",
                "--max-steps", 21, "--json", "--quiet")  # fmt: skip
    assert done.json["step"] == 21
    assert [row["step"] for row in _rows()] == [21]


@adamw
@pytest.mark.parametrize(
    "damage",
    [
        "flip",
        *(pytest.param(d, marks=pytest.mark.full) for d in ("cut", "no data", "cut index")),
    ],
)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(golden_run: Path, damage: str, gptj):
    settings = ("--set", "runconfig.save_checkpoints_steps=2", "--max-steps", 4)
    assert gptj(*BEGIN, *settings, "--quiet").code == 0
    newest = Path("model_dir/model.ckpt-4")
    data, index = data_path(newest), index_path(newest)
    if damage == "flip":
        raw = bytearray(data.read_bytes())
        raw[1000] ^= 1
        data.write_bytes(raw)
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "no data":
        data.unlink()
    else:
        index.write_bytes(index.read_bytes()[:-9])
    _refused(gptj("train", "--max-steps", 5, "--strict"), 1, "damaged", "--strict")
    done = gptj("train", "--max-steps", 5, "--json")
    assert done.code == 0
    assert done.json["step"] == 5
    assert "warning: checkpoint of step 4 is damaged" in done.stderr
    assert [row["step"] for row in _rows()] == [1, 2, 3, 4, 5]


@adamw
def test_a_run_without_an_intact_checkpoint_never_restarts(golden_run: Path, gptj):
    assert gptj(*BEGIN, "--max-steps", 2, "--quiet").code == 0
    data_path(Path("model_dir/model.ckpt-2")).unlink()
    _refused(gptj(*BEGIN, "--max-steps", 5), 1, "none of its checkpoints is whole")


@adamw
def test_changed_parameters_of_a_run_are_refused(golden_run: Path, gptj):
    assert gptj(*BEGIN, "--max-steps", 1, "--quiet").code == 0
    text = Path("params.yaml").read_text()
    text = text.replace("optimizer_type: adamw", "optimizer_type: sgd")
    Path("params.yaml").write_text(text.replace("batch_size: 4", "batch_size: 2", 1))
    go_on = ("train", "--params", "params.yaml", "--max-steps", 2)
    words = (
        "optimizer.optimizer_type was 'adamw', now 'sgd'",
        "train_input.batch_size was 4, now 2",
    )
    _refused(gptj(*go_on), 2, *words, "--set")
    one = ("--set", "optimizer.optimizer_type=sgd")
    done = gptj(*go_on, *one)
    _refused(done, 2, words[1])
    assert words[0] not in done.stderr
    assert gptj(*go_on, *one, "--set", "train_input.batch_size=2").code == 0


@adamw
def test_a_second_trainer_is_refused(golden_run: Path, gptj):
    from runner.training.run.folder import locked

    with locked(Path("model_dir")):
        _refused(gptj(*BEGIN), 1, "another run is writing there")


@adamw
def test_a_loss_that_is_not_finite_stops_the_run(golden_run: Path, gptj):
    tensors = load_tensors(Path("hf/model.safetensors"))
    tensors["transformer.ln_f.weight"][:] = np.inf
    save_tensors(Path("hf/model.safetensors"), tensors)
    _refused(gptj(*BEGIN, "--max-steps", 3), 1, "step 1: the loss is nan")
    assert not list(Path("model_dir").glob("model.ckpt*"))


# Bad input.


def test_no_records_in_an_empty_folder(converted: Path, gptj):
    _refused(gptj("train", "--init-from", converted), 2, "data: not found", "hint:", "gptj data")
    Path("data").mkdir()
    _refused(gptj("train", "--init-from", converted), 2, "holds no *.tfrecord*", "gptj data")


@adamw
def test_records_of_another_length(golden_run: Path, gptj):
    done = gptj(*BEGIN, "--set", "train_input.max_sequence_length=16")
    hint = "max_sequence_length to 32"
    _refused(done, 1, "data.tfrecord: record 0", "has 32 tokens", "= 16", hint)


@adamw
@pytest.mark.parametrize(("ids", "found"), [([600] * 32, "600"), ([-1] * 32, "-1")])
def test_an_id_beyond_the_vocabulary(golden_run: Path, ids: list[int], found: str, gptj):
    good, bad = np.arange(32), np.asarray(ids)
    rows = (good, good, good, good, good, bad, good, good)
    write_records(golden_run / "records/data.tfrecord", [(r, np.ones(32, int), r) for r in rows])
    _refused(gptj(*BEGIN, "--max-steps", 5), 1, "data.tfrecord: record 5", f"holds {found}")


@adamw
def test_a_damaged_record_is_named(golden_run: Path, gptj):
    path = golden_run / "records/data.tfrecord"
    raw = bytearray(path.read_bytes())
    raw[-30] ^= 4
    path.write_bytes(raw)
    _refused(gptj(*BEGIN), 1, "data.tfrecord: record 15 at byte", "checksum")


@adamw
def test_fewer_records_than_a_batch(golden_run: Path, gptj):
    _refused(gptj(*BEGIN, "--set", "train_input.batch_size=17"), 1, "at least one batch of 17")


@adamw
def test_an_unknown_key_names_the_nearest_known_one(golden_run: Path, gptj):
    text = Path("params.yaml").read_text().replace("weight_decay_rate", "weight_decay_rat")
    Path("params.yaml").write_text(text)
    _refused(gptj(*BEGIN), 2, "optimizer.weight_decay_rat", "did you mean 'weight_decay_rate'?")


@adamw
def test_parameters_of_another_architecture(golden_run: Path, gptj):
    done = gptj(*BEGIN, "--set", "model.num_hidden_layers=2")
    _refused(done, 2, "n_layer is 2 in the YAML, 3 in the checkpoint")


@adamw
def test_a_nonsense_setting(golden_run: Path, gptj):
    _refused(gptj(*BEGIN, "--set", "nonsense"), 2, "KEY=VALUE")


def test_nothing_to_train(workdir: Path, gptj):
    _refused(gptj("train"), 2, "model_dir: holds no run", "--init-from")

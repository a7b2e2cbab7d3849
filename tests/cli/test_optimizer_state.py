"""AdamW's state, carried between TensorFlow's, PyTorch's and the CS client's checkpoints: bit for
bit, and so that each resumes where another has stopped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from gptj_convert.formats.containers.tensor_bundle import BundleSource, write_bundle
from gptj_model.source import read_tensor
from tests.conftest import GOLDEN_RUNS, make_checkpoint

CLIENTS = GOLDEN_RUNS / "cs" / "checkpoint_20.mdl"


def _bundle(prefix: Path | str) -> dict[str, np.ndarray]:
    source = BundleSource(Path(prefix))
    try:
        return {name: read_tensor(source, name) for name in source.tensors}
    finally:
        source.close()


def _assert_same(found: Path | str, expected: Path | str) -> None:
    ours, theirs = _bundle(found), _bundle(expected)
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype, name
        assert ours[name].tobytes() == values.tobytes(), name


def _convert(gptj: Any, source: Path | str, to: str, out: str, *options: str) -> None:
    done = gptj("convert", source, "--to", to, "--out", out, "--optimizer-state", *options)
    assert done.code == 0, done.stderr


@pytest.fixture
def run(request: pytest.FixtureRequest, workdir: Path) -> Path:
    """A recorded run's last checkpoint, with its params.yaml one folder up."""
    folder = workdir / "run"
    source = GOLDEN_RUNS / getattr(request, "param", "adamw")
    shutil.copytree(source / "ckpt", folder / "ckpt")
    shutil.copytree(source / "records", folder / "records")
    for name in ("params.yaml", "hf/config.json"):
        shutil.copyfile(source / name, folder / "ckpt" / Path(name).name)
    return folder / "ckpt" / "model.ckpt-20"


both = pytest.mark.parametrize("run", ["adamw", "shared_embedding"], indirect=True)
WAYS = (("cs",), ("hf",), ("cs", "hf"), ("hf", "cs"))


def _round_trips() -> Iterator[Any]:
    """Yield every run, way and grouping; half of them are for the whole suite alone."""
    for n, run in enumerate(("adamw", "shared_embedding")):
        for way in WAYS:
            for m, groups in enumerate(("one", "decay")):
                marks = () if (n + m + len(way)) % 2 else pytest.mark.full
                name = "-".join((groups, *way, run))
                yield pytest.param(run, way, groups, marks=marks, id=name)


@pytest.mark.parametrize(("run", "way", "groups"), list(_round_trips()), indirect=["run"])
def test_the_round_trip(run: Path, way: tuple[str, ...], groups: str, small_pieces: None, gptj):
    """One run with bias correction, and one with a tied head and without it."""
    source = run
    for to in way:
        options = ["--param-groups", groups] if to == "hf" else []
        _convert(gptj, source, to, f"on-{to}", *options)
        source = Path(f"on-{to}")
    _convert(gptj, source, "tf", "back")
    _assert_same("back/tf_model.ckpt", run)


def test_what_the_client_keeps_comes_back_to_it(workdir: Path, gptj):
    import h5py
    import hdf5plugin  # noqa: F401  what the client compresses with

    shutil.copyfile(GOLDEN_RUNS / "cs" / "trainer.yaml", "trainer.yaml")
    shutil.copyfile(CLIENTS, "checkpoint_20.mdl")
    _convert(gptj, "checkpoint_20.mdl", "tf", "home")
    _convert(gptj, "home", "hf", "torch")
    _convert(gptj, "torch", "cs", "again")
    with h5py.File("again/model.mdl") as ours, h5py.File(CLIENTS) as theirs:
        names = [name for name in theirs if name.startswith("optimizer.")]
        assert names == [name for name in ours if name.startswith("optimizer.")]
        for name in names:
            assert ours[name][()].tobytes() == theirs[name][()].tobytes(), name
            assert dict(ours[name].attrs).keys() == dict(theirs[name].attrs).keys()
        groups = [key for key in theirs.attrs if key.startswith("optimizer.param_groups.")]
        assert set(groups) == {k for k in ours.attrs if k.startswith("optimizer.param_groups.")}


def test_the_loss_scale_goes_along(run: Path, gptj):
    scale = {
        "current_loss_scale": np.asarray(4096, np.float32),
        "good_steps": np.asarray(0, np.int64),
        "steps_since_rescale": np.asarray(12, np.int64),
        "overflows_since_rescale": np.asarray(1, np.int64),
        "skipped_steps": np.asarray(3, np.int64),
    }
    write_bundle(run.with_name("model.ckpt-21"), _bundle(run) | scale)
    _convert(gptj, run.with_name("model.ckpt-21"), "hf", "torch")
    _convert(gptj, "torch", "tf", "back")
    _assert_same("back/tf_model.ckpt", run.with_name("model.ckpt-21"))
    _convert(gptj, run.with_name("model.ckpt-21"), "cs", "client")
    _convert(gptj, "client", "tf", "home")
    found = _bundle("home/tf_model.ckpt")
    assert {n: found[n] for n in scale if n != "good_steps"} == {
        n: v for n, v in scale.items() if n != "good_steps"
    }


def test_the_clients_schedulers_keep_counting(run: Path, gptj):
    import h5py

    _convert(gptj, run, "cs", "client")
    with h5py.File("client/model.mdl") as file:
        counts = {n.rpartition(".")[0]: v[()] for n, v in file.items() if n.startswith("sched")}
    at = "schedulers.0._schedulers"
    assert counts == {"schedulers.0": 20, f"{at}.0": 20, f"{at}.1": 15, f"{at}.2": 5}
    trainer = YAML(typ="safe", pure=True).load(Path("client/trainer.yaml"))["trainer"]["init"]
    assert trainer["optimizer"]["adamw"]["weight_decay"] == 0.1
    assert trainer["loop"]["max_steps"] == 20


def _set(path: Path, **optimizer: Any) -> None:
    yaml = YAML(typ="safe", pure=True)
    values = yaml.load(path)
    values["optimizer"] |= optimizer
    with path.open("w") as f:
        yaml.dump(values, f)


def _loss(model: Any, records: Path) -> Any:
    """Return the loss of the batch after step 20: 16 examples make four, so the first again."""
    import tensorflow as tf
    import torch

    rows = []
    for raw in tf.data.TFRecordDataset(str(records / "data.tfrecord")).take(4):
        feature = tf.train.Example.FromString(raw.numpy()).features.feature
        names = ("input_ids", "input_mask", "labels")
        rows.append([list(feature[name].int64_list.value) for name in names])
    ids, mask, labels = torch.tensor(rows).unbind(1)
    logits = model(ids).logits.flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum() / mask.sum()


@pytest.mark.parametrize(
    ("through", "groups"),
    [("tf", "one"), ("cs", "decay"), pytest.param("hf", "decay", marks=pytest.mark.full)],
)
def test_one_further_step_is_pytorchs(run: Path, through: str, groups: str, gptj):
    """Both rules agree here: epsilon is 1e-12, and PyTorch's groups decay as the run does."""
    import torch
    from transformers import AutoModelForCausalLM

    decay = 0.1 if groups == "decay" else 0.0
    patterns = ["ln_1", "layer_norm", "bias"]
    _set(run.with_name("params.yaml"), epsilon=1e-12, weight_decay_rate=decay,
         learning_rate=1e-3, exclude_from_weight_decay=patterns)  # fmt: skip
    _convert(gptj, run, "hf", "torch", "--param-groups", groups)
    source = run
    if through != "tf":
        _convert(gptj, run, through, "through")
        source = Path("through")
    params = ("--params", run.with_name("params.yaml"), "--max-steps", 21, "--quiet")
    records = ("--set", f"train_input.data_dir={run.parent.parent / 'records'}")
    assert gptj("train", "--init-from", source, *params, *records).code == 0
    _convert(gptj, "model_dir", "hf", "ours")

    model = AutoModelForCausalLM.from_pretrained("torch")
    rows = dict(model.named_parameters())
    sets = [list(rows.values())]
    if groups == "decay":
        sets = [[p for p in rows.values() if (p.dim() > 1) is big] for big in (True, False)]
    optimizer = torch.optim.AdamW([{"params": s} for s in sets])
    optimizer.load_state_dict(torch.load("torch/optimizer.pt", weights_only=True))
    _loss(model, run.parent.parent / "records").backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    after = AutoModelForCausalLM.from_pretrained("ours").state_dict()
    for name, values in model.state_dict().items():
        delta = (values - after[name]).abs().max().item()
        assert delta <= 1e-6, (name, delta)  # of a step of 1e-3


def _momentum(prefix: Path) -> None:
    tensors = {n.replace("/AdamW_1", "/SGDM"): v for n, v in _bundle(prefix).items()}
    _rewrite(prefix, {n: v for n, v in tensors.items() if not n.endswith("/AdamW")})


def _without(*endings: str) -> Any:
    def change(prefix: Path) -> None:
        _rewrite(prefix, {n: v for n, v in _bundle(prefix).items() if not n.endswith(endings)})

    return change


def _rewrite(prefix: Path, tensors: dict[str, np.ndarray]) -> None:
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        path.unlink()
    write_bundle(prefix, tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without("/AdamW", "/AdamW_1"), "holds no optimizer state, expected slots …/AdamW"),
        (_without("/ln_1/beta/AdamW_1"), "3 problem(s)"),
        (_without("k_proj/kernel/AdamW"), "k_proj/kernel/AdamW', a moment of"),
        (_without("beta2_power"), "'beta2_power' is missing"),
        (_without("global_step"), "'global_step' is missing"),
        (_momentum, "holds slots of momentum, expected of adamw or adam"),
    ],
    ids=["none", "some", "a moment", "a power", "the step", "another optimizer"],
)
def test_state_that_is_not_whole_is_refused(change: Any, words: str, run: Path, gptj):
    change(run)
    done = gptj("convert", run, "--to", "cs", "--optimizer-state")
    assert done.code == 1
    assert words in done.stderr
    assert "without --optimizer-state" in done.stderr
    assert not Path("converted-cs").exists()
    assert gptj("convert", run, "--to", "cs").code == 0


def _state_dict(folder: str, change: Any) -> None:
    import torch

    path = Path(folder) / "optimizer.pt"
    values = torch.load(path, weights_only=True)
    change(values)
    torch.save(values, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["state"].pop(7), "is missing"),
        (lambda d: d["state"][3].update(momentum_buffer=None), "keeps 'momentum_buffer'"),
        (lambda d: d["state"][3].update(exp_avg=d["state"][0]["exp_avg"]), "has shape"),
        (lambda d: d["state"][3]["step"].fill_(21), "is 21.0, not 20.0 as the first"),
        (lambda d: [s["step"].fill_(0.5) for s in d["state"].values()], "a whole number"),
        (lambda d: d["param_groups"][0]["params"].pop(), "groups of 34 parameters, expected one"),
        (lambda d: d["param_groups"][0].pop("betas"), "are not those of Adam"),
        (lambda d: d.pop("state"), "is not an optimizer's state dict"),
        (lambda d: d["param_groups"][0].update(lr=Path), "is not allowed"),
    ],
    ids=["parameter", "kind", "shape", "steps", "step", "groups", "settings", "keys", "class"],
)
def test_an_optimizer_pt_of_another_kind_is_refused(change: Any, words: str, run: Path, gptj):
    _convert(gptj, run, "hf", "torch")
    _state_dict("torch", change)
    done = gptj("convert", "torch", "--to", "tf", "--optimizer-state")
    assert done.code == 1
    assert words in done.stderr
    assert gptj("convert", "torch", "--to", "tf").code == 0


def test_pytorchs_own_state_after_more_steps(run: Path, gptj):
    """Carried powers of the betas no longer count after PyTorch has made further steps."""
    _convert(gptj, run, "hf", "torch")
    _state_dict("torch", lambda d: [s["step"].add_(5) for s in d["state"].values()])
    _convert(gptj, "torch", "tf", "home")
    found = _bundle("home/tf_model.ckpt")
    assert found["global_step"] == 25
    assert found["beta1_power"] == pytest.approx(0.9**26, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "keras", "--optimizer-state"), "--to keras"),
        (("--to", "hf", "--optimizer-state", "--share-embeddings"), "--share-embeddings"),
        (("--to", "hf", "--param-groups", "decay"), "no effect without --optimizer-state"),
        (("--to", "cs", "--optimizer-state", "--param-groups", "one"), "goes with --to hf"),
    ],
)
def test_what_has_no_place_for_it(options: tuple[str, ...], words: str, run: Path, gptj):
    done = gptj("convert", run, *options)
    assert done.code == 2
    assert words in done.stderr


def test_a_model_without_state(workdir: Path, gptj):
    source = GOLDEN_RUNS / "adamw" / "hf"
    done = gptj("convert", source, "--to", "tf", "--optimizer-state")
    assert done.code == 1
    assert "expected optimizer.pt beside the weights" in done.stderr
    shutil.copyfile(GOLDEN_RUNS / "cs" / "model.mdl", "model.mdl")
    shutil.copyfile(source / "config.json", "config.json")
    done = gptj("convert", "model.mdl", "--to", "tf", "--optimizer-state")
    assert done.code == 1
    assert "optimizer.state.0.exp_avg" in done.stderr
    params = ("--params", GOLDEN_RUNS / "adamw" / "params.yaml", "--max-steps", 1)
    records = f"train_input.data_dir={GOLDEN_RUNS / 'adamw' / 'records'}"
    done = gptj("train", "--init-from", "model.mdl", *params, "--set", records)
    assert done.code == 0
    assert "warning: model.mdl holds no optimizer state: the run starts at step 0" in done.stderr


def test_streaming_begins_with_state_in_tensorflows_format(run: Path, gptj):
    _convert(gptj, run, "hf", "torch")
    params = ("--params", run.with_name("params.yaml"), "--max-steps", 21, "--quiet")
    streamed = (*params, "--set", f"train_input.data_dir={run.parent.parent / 'records'}",
                "--execution", "streaming")  # fmt: skip
    done = gptj("train", "--init-from", "torch", *streamed)
    assert done.code == 2
    assert "gptj convert torch --to tf --optimizer-state" in done.stderr
    assert not Path("model_dir/checkpoint").exists()
    _convert(gptj, "torch", "tf", "home")
    assert gptj("train", "--init-from", "home", *streamed).code == 0
    assert _bundle("model_dir/model.ckpt-21")["global_step"] == 21


MOMENTS = st.floats(width=32)
#: Powers of a run whose state did not begin where PyTorch's would, too.
POWERS = st.floats(0, 1, width=32)


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tied=st.booleans(),
    way=st.lists(st.sampled_from(["cs", "hf", "hf decay", "tf"]), min_size=1, max_size=3),
    step=st.integers(0, 2**24),
    powers=st.none() | st.tuples(POWERS, POWERS),
    moments=st.lists(MOMENTS, min_size=1, max_size=9),
)
def test_any_state_survives_the_round_trip(
    tied: bool, way: list[str], step: int, powers: Any, moments: list[float], workdir: Path, gptj
):
    """The state includes NaN, infinities and subnormal numbers."""
    shutil.rmtree(workdir / "any", ignore_errors=True)
    hf = make_checkpoint(workdir / "any" / "hf", tie_word_embeddings=tied)
    assert gptj("convert", hf, "--to", "tf", "--out", "any/0", "--quiet").code == 0
    tensors = _bundle("any/0/tf_model.ckpt")
    for name, values in [(n, v) for n, v in tensors.items() if n != "global_step"]:
        for slot in ("AdamW", "AdamW_1"):
            moments = [*moments[1:], moments[0]]
            tensors[f"{name}/{slot}"] = np.resize(np.asarray(moments, np.float32), values.shape)
    tensors["global_step"] = np.asarray(step, np.int64)
    for name, power in zip(("beta1_power", "beta2_power"), powers or (), strict=False):
        tensors[name] = np.asarray(power, np.float32)
    _rewrite(Path("any/0/tf_model.ckpt"), tensors)
    for n, to in enumerate([*way, "tf"]):
        options = ["--param-groups", "decay"] if to == "hf decay" else []
        _convert(gptj, f"any/{n}", to.split()[0], f"any/{n + 1}", "--quiet", *options)
    _assert_same(f"any/{len(way) + 1}/tf_model.ckpt", "any/0/tf_model.ckpt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("global_step", np.zeros(3, np.int64)),
        ("beta1_power", np.zeros(2, np.float32)),
        ("global_step", np.asarray(-1, np.int64)),
        ("good_steps", np.asarray(np.nan, np.float32)),
    ],
)
def test_scalars_that_are_none_are_refused(name: str, value: np.ndarray, run: Path, gptj):
    _rewrite(run, _bundle(run) | {name: value})
    done = gptj("convert", run, "--to", "hf", "--optimizer-state")
    assert done.code == 1
    assert f"{name!r} is" in done.stderr

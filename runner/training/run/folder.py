"""The folder of a run: held by one process, with parameters that change only on purpose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptj_convert.files.lock_file import is_held, try_lock
from gptj_convert.files.whole_file import PARTIAL
from gptj_convert.settings.params_yaml import PARAMS_FILE
from gptj_model.config import CONFIG_FILE, GPTJConfig
from gptj_model.errors import ConfigError, TrainingFault
from gptj_model.optimizer_names import ADAMS
from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import GLOBAL_STEP, SKIPPED_STEPS
from runner.config.params import Params
from runner.config.params_file import load_params
from runner.data.reading.place import Place, place_after
from runner.data.reading.records import count_records, find_records
from runner.training.run.starts import read_starts

LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"

#: Parameters that a resumed run may change: how long and how often, not what is computed.
_FREE = (
    "runconfig",
    "eval_input",
    "model.flash_attention",
    "model.recompute",
    "optimizer.log_hists",
)
#: Number of batches that a run skips at its start; when it resumes, its place in the data counts.
_SKIPPED = "train_input.skip_steps"
#: Parameters that bind a run: dropout masks differ from worker to worker.
_BOUND = ("runconfig.workers",)


@contextmanager
def locked(model_dir: Path) -> Iterator[None]:
    """Hold the run's folder for this process; the kernel releases it when the process ends.

    A folder that did not exist, and holds nothing when an error ends the run, is removed again.

    Raises:
        TrainingFault: another process holds it.
    """
    is_new = not model_dir.exists()
    model_dir.mkdir(parents=True, exist_ok=True)
    with (model_dir / LOCK_FILE).open("a+") as f:
        if holder := try_lock(f):
            raise TrainingFault(
                f"{model_dir}: another run is writing there (process {holder})",
                hint="wait for it, stop it, or name another --model-dir",
            )
        for left in model_dir.glob(f"{PARTIAL}*"):
            left.unlink()  # left by a process that was killed
        try:
            yield
        except BaseException:
            if is_new and [path.name for path in model_dir.iterdir()] == [LOCK_FILE]:
                (model_dir / LOCK_FILE).unlink()
                model_dir.rmdir()
            raise


def is_locked(model_dir: Path) -> bool:
    """Return whether a process trains the run now."""
    return is_held(model_dir / LOCK_FILE)


def kept_config(model_dir: Path, params: Params) -> GPTJConfig:
    """Return the config of a run that has checkpoints; a run of the reference has only its YAML.

    Raises:
        ConfigError: the config cannot be read, or describes no GPT-J.
    """
    path = model_dir / CONFIG_FILE
    return GPTJConfig.from_file(path) if path.is_file() else params.config


def stored_step(source: TensorSource) -> int:
    """Return the global step that a checkpoint stores, or 0."""
    return _stored_count(source, GLOBAL_STEP)


def stored_skips(source: TensorSource) -> int:
    """Return the number of steps without an update that a checkpoint stores, or 0."""
    return _stored_count(source, SKIPPED_STEPS)


def place_of(
    source: TensorSource, params: Params, folder: Path | None, *, continued: bool
) -> Place:
    """Return the place in the training records after the step of a checkpoint.

    It follows from the start of the process that made the checkpoint, and from the number of
    batches since. Runs of other programs, and of older versions of this one, have no such starts:
    their steps are multiplied by the batch size that the run had.

    Args:
        source: checkpoint.
        params: parameters that the run resumes with.
        folder: folder of the run that made the checkpoint; None if it is not known.
        continued: whether this run made it, so that its params.yaml has the batch size.

    Raises:
        ConfigError: the params.yaml of the run cannot be read.
        UsageError, DataFault: see `place_after`.
    """
    steps = stored_step(source) + stored_skips(source)
    starts = read_starts(folder) if folder else []
    for start in reversed(starts):
        if start.step <= stored_step(source):
            records = start.records or count_records(find_records(params.train_input.data_dir))
            batches = (steps - start.step - start.skipped) * start.grad_accum_steps
            return start.place.after(batches, size=start.batch_size, records=records)
    kept = folder / PARAMS_FILE if folder and continued else None
    if kept and kept.is_file():
        before = load_params(kept)
        # The CS client states there where its last launch started.
        params = params if before.runconfig.cs_ip else before
    section, group = params.train_input, params.optimizer.grad_accum_steps
    return place_after(section, steps * group + section.skip_steps)


def _stored_count(source: TensorSource, name: str) -> int:
    return int(read_tensor(source, name)) if name in source.tensors else 0


#: Parameters without effect on a run that has checkpoints: they concern initial weights or logging,
#: or nothing at all. The architecture is compared with the checkpoint itself.
_WITHOUT_EFFECT = (
    "csconfig",
    "train_input.data_processor",
    "train_input.mixed_precision",
    "train_input.use_multiple_workers",
    "train_input.vocab_file",
    "model.attention_softmax_fp32",
    "model.bits_per_x_dataset",
    "model.boundary_casting",
    "model.embedding_initializer",
    "model.initializer",
    "model.output_layer_initializer",
    "model.precision_opt_level",
    "model.tf_summary",
    "model.use_cache",
    "model.weight_initialization_seed",
    "optimizer.disable_standard_logs",
    "optimizer.log_grads",
    "optimizer.log_summaries",
    "optimizer.ws_summary",
)
#: Settings of the optimizer that only some optimizers read.
_READ_BY = {
    "momentum": ("momentum",),
    "beta1": ADAMS,
    "beta2": ADAMS,
    "epsilon": ADAMS,
    "rmsprop_decay": ("rmsprop",),
    "rmsprop_momentum": ("rmsprop",),
    "weight_decay_rate": ("adamw",),
    "exclude_from_weight_decay": ("adamw",),
    "use_bias_correction": ("adamw",),
}
#: Settings that only dynamic loss scales read, and those that only "dynamic" reads.
_OF_DYNAMIC_SCALES = ("initial_loss_scale", "steps_per_increase")
_OF_DYNAMIC = ("min_loss_scale", "max_loss_scale", "overflow_tolerance")


def _effective(params: Params) -> dict[str, Any]:
    """Return the parameters that take effect, by dotted key: with defaults filled in, and without
    those that are not read."""
    inputs, optimizer = params.train_input, params.optimizer
    kind, scale = optimizer.optimizer_type, optimizer.loss_scaling_factor
    dropped = {key for key, kinds in _READ_BY.items() if kind not in kinds}
    dropped.update(_OF_DYNAMIC if scale != "dynamic" else ())
    dropped.update(_OF_DYNAMIC_SCALES if not isinstance(scale, str) else ())
    if not optimizer.weight_decay_rate:
        dropped.add("exclude_from_weight_decay")
    found = {
        key: value
        for key, value in _flat(params.model_dump()).items()
        if not _is_under(key, (*_WITHOUT_EFFECT, *(f"optimizer.{name}" for name in dropped)))
    }
    filled: dict[str, Any] = {
        "train_input.vocab_size": params.config.vocab_size,
        "train_input.shuffle": inputs.shuffle is not False,
        "train_input.repeat": inputs.repeat is not False,
        "model.filter_size": params.config.ffn_dim,
        "model.dropout_seed": params.model.dropout_seed or 0,
        "optimizer.max_gradient_norm": optimizer.max_gradient_norm or None,
        "optimizer.max_gradient_value": optimizer.max_gradient_value or None,
    }
    order = {
        "train_input.shuffle_seed": inputs.effective_shuffle_seed,
        "train_input.shuffle_buffer": inputs.effective_shuffle_buffer,
    }
    if filled["train_input.shuffle"]:
        return found | filled | order
    return {key: value for key, value in (found | filled).items() if key not in order}


def accept_changes(params: Params, saved: Params, settings: Mapping[str, Any]) -> None:
    """Refuse parameters that would turn a resumed run into another one, unless they are set
    explicitly.

    The reference's client keeps more in the folder than the file it was given: defaults and
    initializers are written out, and on a CS system also where its data started.

    Raises:
        ConfigError: names each such key with the saved and the given value.
    """
    given, before = _effective(params), _effective(saved)
    if saved.runconfig.cs_ip:  # step that its last launch started at
        before[_SKIPPED] = given[_SKIPPED]
    if given[_SKIPPED] != before[_SKIPPED]:
        raise ConfigError(
            f"{_SKIPPED} was {before[_SKIPPED]}, now {given[_SKIPPED]}, and it counts only at the "
            "start of a run",
            hint=f"leave it at {before[_SKIPPED]}: the run resumes at its place in the records",
        )
    problems = [
        f"{key} was {before.get(key)!r}, now {given.get(key)!r}"
        for key in sorted(given.keys() | before.keys())
        if (key in _BOUND or not _is_under(key, _FREE))
        and given.get(key) != before.get(key)
        # A setting that only one side reads follows from another difference, which is named.
        and (key.startswith("model.") or (key in given and key in before))
        and not _is_under(key, settings)
    ]
    if problems:
        raise ConfigError(
            "the run was begun with other parameters: " + "; ".join(problems),
            hint="accept a change with `--set KEY=VALUE`, or name another --model-dir",
        )


def _is_under(key: str, sections: Iterable[str]) -> bool:
    return any(key == s or key.startswith(f"{s}.") for s in sections)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found

"""Parameters of a run: where they come from, and which of them a resumed run may change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runner.cli.training.job import TRAINING_MODES

if TYPE_CHECKING:
    from gptj_model.config import GPTJConfig
    from runner.cli.training.job import Job
    from runner.config.params import Params
    from runner.data.reading.epoch import Epoch
    from runner.data.reading.place import Place


def params_of(job: Job) -> Params:
    """Return the parameters of the run: those it was started with, unless a file is named."""
    from gptj_convert.checkpoint.open import open_checkpoint
    from gptj_convert.settings.params_yaml import PARAMS_FILE
    from gptj_model.errors import ConfigError
    from runner.cli.shared.model_choice import params_for
    from runner.config.params_file import load_params
    from runner.training.run import checkpoints

    saved = job.model_dir / PARAMS_FILE
    if checkpoints.steps(job.model_dir) and saved.is_file():
        return load_params(job.params_file or saved, job.settings)
    if job.params_file:
        return load_params(job.params_file, job.settings)
    begin = job.init_from or job.checkpoint_path
    if begin is None:
        raise ConfigError(
            f"{job.model_dir}: holds no run to resume",
            hint="start one: `gptj train --init-from converted/`; --params alone starts at random",
        )
    with open_checkpoint(begin) as checkpoint:
        return params_for(begin, None, dict(job.settings), checkpoint.config)


def accepted(job: Job, params: Params, workers: int | None = None) -> Params:
    """Return the parameters as they are saved, after checking that a run may resume with them.

    Args:
        job: job of the command line.
        params: parameters as they were given.
        workers: number of workers; None if it is not known yet.

    Raises:
        ConfigError: as `accept_changes` raises it.
    """
    from gptj_convert.settings.params_yaml import PARAMS_FILE
    from runner.config.params_file import load_params
    from runner.training.run import checkpoints
    from runner.training.run.folder import accept_changes

    saved = job.model_dir / PARAMS_FILE
    before = None
    if checkpoints.steps(job.model_dir) and saved.is_file():
        before = load_params(saved)
        workers = workers or before.runconfig.workers
    effective: dict[str, int] = {"workers": workers or 1}
    if job.max_steps is not None:
        effective["max_steps"] = job.max_steps
    runconfig = params.runconfig.model_copy(update=effective)
    # The order of the records depends on the buffer, so another batch size must not change it.
    order = (before or params).train_input.effective_shuffle_buffer
    section = params.train_input
    section = section.model_copy(update={"shuffle_buffer": section.shuffle_buffer or order})
    params = params.model_copy(update={"runconfig": runconfig, "train_input": section})
    if before and is_training(job):
        accept_changes(params, before, job.settings)
    if job.mode == "train":
        _refuse_choice_without_evaluation(params)
    return params


def _refuse_choice_without_evaluation(params: Params) -> None:
    """Refuse settings that need evaluations in a mode that makes none.

    Raises:
        ConfigError: the parameters keep the best checkpoints, or stop early.
    """
    from gptj_model.errors import ConfigError

    asked = {"keep_best": 0, "early_stopping": None}
    for name, off in asked.items():
        if getattr(params.runconfig, name):
            raise ConfigError(
                f"runconfig.{name} is set, and --mode train makes no evaluation to judge by",
                hint="--mode train_and_eval, or "
                f"--set runconfig.{name}={'null' if off is None else off}",
            )


def config_of(job: Job, params: Params) -> GPTJConfig:
    """Return the config to train: from the folder of a run that has checkpoints, else from the
    weights that the run starts from, whose headers are checked together with those of its adapter.

    Raises:
        ConfigError: YAML and checkpoint disagree.
        FileFault, TensorFault: the initial weights cannot be read, or are incomplete.
    """
    from gptj_convert.checkpoint.open import open_checkpoint
    from gptj_convert.conversion.plan import match
    from runner.config.params_file import reconcile
    from runner.training.run import checkpoints
    from runner.training.run.folder import kept_config
    from runner.training.weights.adapter_factors import factors, without_base

    named = job.checkpoint_path if job.mode == "eval" else None
    if checkpoints.steps(job.model_dir) and not named:
        return reconcile(params, kept_config(job.model_dir, params), job.model_dir)
    begin = weights_to_begin_with(job, params)
    if begin is None:
        if job.adapter:
            raise without_base(job.adapter)
        return params.config
    with open_checkpoint(begin) as checkpoint:
        match(checkpoint)
        if job.adapter:
            factors(job.adapter, checkpoint.config, params)
        return reconcile(params, checkpoint.config, begin)


def is_training(job: Job) -> bool:
    """Return whether the job trains."""
    return job.mode in TRAINING_MODES


def target_of(
    job: Job, params: Params, step: int, place: Place | None = None, epoch: Epoch | None = None
) -> int:
    """Return the step that a run trains to.

    Args:
        job: job of the command line.
        params: parameters of the run.
        step: step that the run has reached.
        place: its place in the training records, for --epochs.
        epoch: size of an epoch of them, for --epochs.
    """
    if job.max_steps is not None:
        return job.max_steps
    if job.epochs is not None:
        assert place is not None, "--epochs reads the records"
        assert epoch is not None, "--epochs reads the records"
        return step + epoch.steps_to(job.epochs, place, params.train_input.batch_size)
    more = job.steps if job.steps is not None else params.runconfig.steps
    return params.runconfig.max_steps if more is None else step + more


def weights_to_begin_with(job: Job, params: Params) -> Path | None:
    """Return the initial weights that the command line names, else those of the YAML; a run that
    has checkpoints needs none."""
    named = params.runconfig.checkpoint_path
    return job.init_from or job.checkpoint_path or (Path(named) if named else None)


def checkpoints_to_evaluate(job: Job, params: Params) -> list[tuple[int | None, Path]]:
    """Return step and path of each checkpoint that a job evaluates; a checkpoint outside of the
    run's folder has no step.

    Raises:
        UsageError: there is none.
    """
    from gptj_model.errors import UsageError
    from runner.training.run import checkpoints

    named = job.checkpoint_path or weights_to_begin_with(job, params)
    steps = checkpoints.steps(job.model_dir)
    if job.mode == "eval" and named and (job.checkpoint_path or not steps):
        return [(None, named)]
    if not steps:
        raise UsageError(
            f"{job.model_dir} holds no checkpoint to evaluate",
            hint="name the folder of a run with --model-dir, or a checkpoint with "
            "--checkpoint-path",
        )
    chosen = steps if job.mode == "eval_all" else steps[-1:]
    return [(step, checkpoints.prefix(job.model_dir, step)) for step in chosen]

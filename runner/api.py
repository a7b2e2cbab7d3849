"""The program as Python functions: convert, verify, load and train, with typed results.

The functions call the parts that the commands are made of, so both behave alike; it therefore
stands above `runner.cli`. Importing this module loads no framework.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj_convert.options import (
    ALL_LEVELS,
    CS_BACKENDS,
    DEFAULT_LEVEL,
    DEFAULT_OUT,
    DTYPES,
    GROUPINGS,
    KEEP,
    LEVELS,
    MODEL_LEVELS,
    VOCAB_SIZES,
    parse_bytes,
)
from gptj_convert.streams.progress import Progress, finish
from gptj_model.errors import ConfigError, UsageError
from runner.cli.shared.errors import as_fault
from runner.cli.shared.output import Output
from runner.evaluation.reuse import reuse_programs as reuse_programs

if TYPE_CHECKING:
    from gptj_convert.conversion.execute import Result
    from gptj_convert.conversion.plan import Plan
    from gptj_convert.verification.evidence.verdict import Verdict
    from gptj_model.network.model import GPTJ
    from gptj_model.streaming.forward import StreamedModel
    from runner.config.params import Params
    from runner.training.run.events import Event

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """State of a run when `train` returns."""

    model_dir: Path
    """Folder of the run, itself a checkpoint that every function here takes."""
    step: int
    """Number of updates so far, all of them saved."""
    target: int
    """Step that the run trains to."""
    stopped_early: str | None
    """Reason why early_stopping ended the run, None if it did not."""
    best: Mapping[str, Any] | None
    """Path (`checkpoint`) and metric of the best checkpoint, None if the run keeps none."""


def _ignore(event: object) -> None:
    """Take an event, and do nothing."""


def plan(
    source: str | Path,
    target: str,
    *,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    vocab_size: str | None = None,
    drop: Sequence[str] = (),
    share_embeddings: bool = False,
    adapter: str | Path | None = None,
    optimizer_state: bool = False,
    param_groups: str | None = None,
    cs_backend: str | None = None,
    config: str | Path | None = None,
    saturate: bool = False,
) -> Plan:
    """Plan a conversion from the headers of a checkpoint, and write nothing.

    Args:
        source: checkpoint of any format: folder, weight file, index of shards, or prefix of a
            TensorFlow checkpoint.
        target: format to write: tf, hf, keras or cs.
        dtype: float32, float16, bfloat16, or keep; None is float32 for tf, and keep for the others.
        max_shard_size: largest size of one weight file, for hf: bytes, or text such as "2GB".
        vocab_size: from-tensors or from-config, where config and tensors disagree; None makes this
            an error.
        drop: names, or shell patterns of names, of tensors that are not part of GPT-J.
        share_embeddings: whether to drop an output head that equals the embedding.
        adapter: folder of a peft adapter to merge into the source.
        optimizer_state: whether to carry over the state of AdamW.
        param_groups: one or decay, the parameter groups of optimizer.pt; None is the usual choice
            of the format.
        cs_backend: CSX or CPU, for cs.
        config: config.json of a source that has none beside it.
        saturate: whether values beyond the range of the dtype become its largest value.

    Returns:
        Every move, the files of the target, and their sizes in bytes.

    Raises:
        GptjError: the source cannot be read, is no GPT-J, or cannot be converted as asked.
    """
    with _planned(source, None, locals()) as (_, found):
        return found


def convert(
    source: str | Path,
    target: str,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    vocab_size: str | None = None,
    drop: Sequence[str] = (),
    share_embeddings: bool = False,
    adapter: str | Path | None = None,
    optimizer_state: bool = False,
    param_groups: str | None = None,
    cs_backend: str | None = None,
    config: str | Path | None = None,
    saturate: bool = False,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[Progress], None] = _ignore,
) -> Result:
    """Convert a checkpoint; `out` appears when it is complete.

    Args:
        source, target: see `plan`, as are the options of the conversion.
        out: folder to write.
        resume: whether to resume an interrupted conversion to `out`.
        force: whether to overwrite `out`, and to discard an interrupted conversion.
        progress: is called with the number of bytes written so far; what it raises stops the
            conversion, which `resume` continues.

    Returns:
        Checksums of every tensor, the values that are not finite or were replaced, and the number
        of bytes that were reused.

    Raises:
        GptjError: as `plan` raises it; or `out` exists, the disk is too small, or a value is beyond
            the range of the dtype.
    """
    if resume and force:
        raise UsageError("resume and force exclude each other", hint="leave out force")
    with _planned(source, Path(out), locals()) as (checkpoint, found), _faults():
        from gptj_convert.conversion.execute import execute
        from runner.cli.convert import note_companions, note_result

        note_companions(_OUTPUT, checkpoint)
        work = execute(found, checkpoint, Path(out), force=force, resume=resume)
        result = finish(work, progress)
        note_result(_OUTPUT, result)
        return result


def verify(
    converted: str | Path,
    against: str | Path | None = None,
    *,
    level: str = DEFAULT_LEVEL,
    tolerance: float | None = None,
    adapter: str | Path | None = None,
    config: str | Path | None = None,
    thorough: bool = False,
    keep_going: bool = False,
    task: str | None = None,
    include_path: Sequence[str | Path] = (),
    num_fewshot: int | None = None,
    limit: int = 0,
    backend: str | None = None,
    progress: Callable[[Progress], None] = _ignore,
) -> Verdict:
    """Prove that a converted checkpoint computes what its source computes.

    A difference is a verdict whose `ok` is False, not an error.

    Args:
        converted: checkpoint to judge.
        against: source that it must equal; None is the source that its manifest names.
        level: last level to run: structure, weights, logits, gradients, generation, tasks, or
            all.
        tolerance: largest difference of the logits that passes, divided by their standard
            deviation; None is 1e-4.
        adapter: folder of a peft adapter to merge into the source; None is what the manifest names.
        config: config.json of a side that has none beside it.
        thorough: whether to run a prompt of the model's full length, too.
        keep_going: whether to run the later levels although one fails.
        task: tasks of the harness whose requests level tasks puts to both sides, such as
            "lm-eval:piqa,hellaswag"; None is a few passages that are built in.
        include_path: folders of further task files.
        num_fewshot: number of examples before each question; None leaves it to each task.
        limit: number of documents of each task; 0 means all.
        backend: tensorflow or jax, for the levels that run the model; None chooses.
        progress: is called with the state of the level that runs.

    Raises:
        GptjError: nothing can be judged: the source cannot be read or has changed, `converted` does
            not exist, or a library is missing.
    """
    _check("level", level, (*LEVELS, ALL_LEVELS))
    if tolerance is not None and not tolerance > 0:
        raise UsageError(f"tolerance is {tolerance}, expected a number greater than 0")
    _check_task(task, num_fewshot, limit, include_path)
    with _faults():
        from golden import tolerances
        from gptj_convert.verification import verify as verification
        from runner.cli.evaluation.harness import requests_of

        if level in (*MODEL_LEVELS, ALL_LEVELS):
            _prepare(backend, proving=True)
        source = _path(against) or verification.source_of(Path(converted))
        requests = requests_of(
            _OUTPUT,
            Path(converted),
            source,
            task,
            level=level,
            include=[Path(folder) for folder in include_path],
            fewshot=num_fewshot,
            limit=limit,
            config_file=_path(config),
        )
        work = verification.verify(
            Path(converted),
            source,
            tolerance=tolerance or tolerances.LOGITS,
            level=level,
            adapter=_path(adapter) or verification.adapter_of(Path(converted), source),
            config_file=_path(config),
            keep_going=keep_going,
            thorough=thorough,
            tasks=requests,
        )
        return finish(work, progress)


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    config: str | Path | None = None,
    backend: str | None = None,
) -> GPTJ:
    """Load a checkpoint of any format into the Keras model.

    Args:
        path: checkpoint; see `plan`. A folder of a run is its newest checkpoint.
        dtype: dtype of weights and products: float32, bfloat16 or float16.
        config: config.json of a bundle that has none beside it.
        backend: tensorflow or jax; None is that of this process, else TensorFlow if it is
            installed.

    Returns:
        A Keras model from token ids, int32 (batch, time), to logits (batch, time, vocabulary).

    Raises:
        GptjError: there is no checkpoint, it is damaged, its tensors are not those of its config,
            or the backend is missing.
    """
    _check("dtype", dtype, DTYPES)
    with _faults():
        _prepare(backend)
        from gptj_convert.checkpoint.open import open_checkpoint
        from runner.evaluation.restore import loaded

        with open_checkpoint(Path(path), config_file=_path(config)) as checkpoint:
            return loaded(checkpoint, checkpoint.config, dtype=dtype)


@contextmanager
def stream_model(
    path: str | Path,
    *,
    kept_blocks: int = 0,
    keep_head: bool = False,
    config: str | Path | None = None,
    backend: str | None = None,
) -> Iterator[StreamedModel]:
    """Open a checkpoint as a model that reads one block at a time, in the memory of one block.

    Args:
        path: checkpoint; see `load_model`, as are `config` and `backend`.
        kept_blocks: number of blocks that stay in memory, beside the one that computes.
        keep_head: whether the output head stays in memory.

    Returns:
        A context manager that yields the model, which can be used while the context is open.

    Raises:
        GptjError: as `load_model` raises it.
    """
    if kept_blocks < 0:
        raise UsageError(f"kept_blocks is {kept_blocks}, expected 0 or more")
    with _faults():
        _prepare(backend)
        from gptj_convert.checkpoint.open import open_checkpoint
        from gptj_model.streaming.residency import Residency
        from runner.evaluation.restore import model_of

        checkpoint = open_checkpoint(Path(path), config_file=_path(config))
    with checkpoint:
        with _faults():
            blocks = min(kept_blocks, checkpoint.config.n_layer)
            kept = Residency(blocks=blocks, head=keep_head)
            model = model_of(checkpoint, keep=lambda _: kept)
        yield model  # pyright: ignore[reportReturnType]  # streamed, since something is kept


def train(
    model_dir: str | Path,
    *,
    init_from: str | Path | None = None,
    checkpoint_path: str | Path | None = None,
    adapter: str | Path | None = None,
    params: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    max_steps: int | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    evaluate: bool = False,
    strict: bool = False,
    progress: Callable[[Event], None] = _ignore,
    stopped: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train in this process; a run whose folder has checkpoints resumes from the newest.

    Args:
        model_dir: folder of the run.
        init_from: checkpoint whose weights, optimizer state and step the run starts from.
        checkpoint_path: checkpoint whose weights alone it starts from; without either, the weights
            are random, and `params` is needed.
        adapter: folder of a peft adapter to train further.
        params: params.yaml; None is that of the run, else the one beside the initial weights, else
            the defaults for them.
        settings: values that replace those of the YAML, by keys such as
            "optimizer.learning_rate".
        max_steps: step to train to.
        steps: number of steps to train more.
        epochs: number of passes over the training records, counted from the start of the run.
        evaluate: whether to evaluate on eval_input whenever a checkpoint is saved.
        strict: whether a damaged newest checkpoint is an error.
        progress: is called with each event. What it raises ends the run at once; the checkpoints
            saved so far remain, and another call resumes from the newest.
        stopped: is called after each step; True saves a checkpoint and ends the call.

    Raises:
        GptjError: the parameters, the records or the weights cannot be used, another process trains
            in the folder, the loss is not finite, or several processes are asked for.
    """
    _check_length(max_steps=max_steps, steps=steps, epochs=epochs)
    _at_most_one({"init_from": init_from, "checkpoint_path": checkpoint_path})
    with _faults():
        from runner.cli.training.job import Job
        from runner.cli.training.parameters import accepted, params_of

        job = Job(
            model_dir=Path(model_dir),
            mode="train_and_eval" if evaluate else "train",
            params_file=_path(params),
            init_from=_path(init_from),
            checkpoint_path=_path(checkpoint_path),
            adapter=_path(adapter),
            max_steps=max_steps,
            steps=steps,
            epochs=epochs,
            settings=settings or {},
            strict=strict,
        )
        given = params_of(job)
        _refuse_other_processes(given)
        _prepare(given.runconfig.backend)
        from runner.cli.training.launch import begun, best_of
        from runner.training import train as training
        from runner.training.devices.backend import check_backend
        from runner.training.devices.distribution import Alone

        check_backend(given)
        with begun(_OUTPUT, job, accepted(job, given, 1), Alone(), nullcontext()) as start:
            events = training.train(start.run, start.target, stopped=stopped, evaluate=evaluate)
            early = _follow(events, progress)
        return TrainingResult(
            model_dir=job.model_dir,
            step=start.run.step,
            target=start.target,
            stopped_early=early,
            best=best_of(job.model_dir),
        )


def _follow(events: Iterator[Event], progress: Callable[[Event], None]) -> str | None:
    """Report the events of a run, and return the reason why it stopped early, if it did."""
    from runner.training.run.events import StoppedEarly, Warning

    early = None
    for event in events:
        if isinstance(event, Warning):
            _log.warning(event.text)
        early = event.reason if isinstance(event, StoppedEarly) else early
        progress(event)
    return early


class _Logged(Output):
    """Output whose notes go to the log of this module, warnings and remarks at level WARNING."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def note(self, text: str) -> None:
        """Log a note."""
        kind, colon, rest = text.partition(": ")
        if colon and kind in ("note", "warning"):
            _log.warning(rest)
        else:
            _log.info(text)


_OUTPUT = _Logged()


@contextmanager
def _faults() -> Iterator[None]:
    """Turn what the system, a library or the command line's parts raise into a GptjError, as the
    commands do before they print it."""
    try:
        yield
    except Exception as e:
        fault = as_fault(e)
        if fault is None or fault is e:
            raise
        raise fault from e


def _prepare(backend: str | None, *, proving: bool = False) -> None:
    """Import Keras as the commands do; None keeps the backend of this process.

    Raises:
        UsageError: the backend is unknown.
        ConfigError: as `framework.prepare` raises it.
    """
    import sys

    from runner.cli.shared import framework
    from runner.config.execution import Backend

    if backend is None and "keras" in sys.modules:
        backend = sys.modules["keras"].backend.backend()
    if backend is not None:
        _check("backend", backend, [b.value for b in Backend])
    framework.prepare(backend=backend, proving=proving, bare=False)


@contextmanager
def _planned(source: str | Path, out: Path | None, options: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the open source and its plan, after checking the arguments of `plan`, by name."""
    target, groups = options["target"], options["param_groups"]
    _check("target", target, DEFAULT_OUT)
    for name, known in _CHOICES.items():
        if options[name] is not None:
            _check(name, options[name], known)
    if groups and not (options["optimizer_state"] and target == "hf"):
        raise UsageError("param_groups has no effect without optimizer_state and target hf")
    if options["adapter"] and options["optimizer_state"]:
        raise UsageError("adapter and optimizer_state exclude each other")
    if isinstance(options["drop"], str):
        raise UsageError(f"drop is {options['drop']!r}, expected a list of names")
    with _faults():
        from runner.cli.convert import note_plan, planned

        with planned(
            Path(source),
            target,
            out,
            dtype=options["dtype"],
            max_shard_bytes=_bytes(options["max_shard_size"]),
            vocab_choice=options["vocab_size"],
            drop=options["drop"],
            share_embeddings=options["share_embeddings"],
            adapter=_path(options["adapter"]),
            optimizer_state=options["optimizer_state"],
            param_groups=groups,
            cs_backend=options["cs_backend"],
            config_file=_path(options["config"]),
            saturate=options["saturate"],
        ) as (checkpoint, found):
            note_plan(_OUTPUT, checkpoint, found)
            yield checkpoint, found


#: Values of the options of `plan` that are words.
_CHOICES: dict[str, Collection[str]] = {
    "dtype": (*DTYPES, KEEP),
    "vocab_size": VOCAB_SIZES,
    "param_groups": GROUPINGS,
    "cs_backend": CS_BACKENDS,
}


def _refuse_other_processes(params: Params) -> None:
    """Refuse a run of several processes, which must be started together.

    Raises:
        ConfigError: the parameters, or what has started this process, ask for one.
    """
    from runner.config.execution import Backend
    from runner.training.devices.distribution import cluster_here, launcher_here

    runconfig = params.runconfig
    asked = runconfig.enable_distributed or runconfig.multiple_workers
    if asked or (runconfig.backend == Backend.JAX and (cluster_here() or launcher_here())):
        raise ConfigError(
            "the run asks for several processes, and this function trains in one",
            hint="start `gptj train` in each, or set runconfig.enable_distributed and "
            "runconfig.multiple_workers to false",
        )


def _check(name: str, value: str, known: Collection[str]) -> None:
    """Check that a word is known.

    Raises:
        UsageError: it is not.
    """
    if value not in known:
        raise UsageError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def _check_task(
    task: str | None, fewshot: int | None, limit: int, include: Sequence[str | Path]
) -> None:
    """Check the arguments that say which tasks are asked.

    Raises:
        UsageError: the name of a task lacks its prefix, or there are options without a task, or
            numbers below 0.
    """
    from runner.cli.evaluation.harness import PREFIX

    if task is None and (include or limit or fewshot is not None):
        raise UsageError("include_path, num_fewshot and limit have no effect without task")
    if task is not None and not (
        task.startswith(PREFIX) and all(n.strip() for n in task.removeprefix(PREFIX).split(","))
    ):
        raise UsageError(f"task is {task!r}, expected names such as {PREFIX}piqa,hellaswag")
    if isinstance(include, str | Path):
        raise UsageError(f"include_path is {include!r}, expected a list of folders")
    for name, value in (("num_fewshot", fewshot), ("limit", limit)):
        if value is not None and value < 0:
            raise UsageError(f"{name} is {value!r}, expected 0 or more")


def _check_length(**lengths: float | None) -> None:
    """Check the arguments that say how long to train, of which epochs alone may be a fraction.

    Raises:
        UsageError: several are given, or one is not a number of its kind greater than 0.
    """
    _at_most_one(lengths)
    for name, value in lengths.items():
        kind = int | float if name == "epochs" else int
        if value is not None and not (isinstance(value, kind) and value > 0):
            what = "a number" if name == "epochs" else "a whole number"
            raise UsageError(f"{name} is {value!r}, expected {what} greater than 0")


def _at_most_one(options: Mapping[str, object]) -> None:
    """Check that one option at most is given.

    Raises:
        UsageError: several are.
    """
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", hint=f"leave out {given[-1]}")


def _path(path: str | Path | None) -> Path | None:
    """Return the path, None if there is none."""
    return None if path is None else Path(path)


def _bytes(size: str | int | None) -> int | None:
    """Return a number of bytes.

    Raises:
        UsageError: the text is not a size.
    """
    try:
        return size if size is None else parse_bytes(str(size))
    except ValueError as e:
        raise UsageError(f"max_shard_size: {e}") from None

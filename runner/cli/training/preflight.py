"""What a run needs, checked before anything is loaded or computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.training.parameters import config_of, is_training, target_of

if TYPE_CHECKING:
    from gptj_model.config import GPTJConfig
    from runner.cli.shared.output import Output
    from runner.cli.training.job import Job
    from runner.config.params import InputParams, Params
    from runner.data.reading.epoch import Epoch
    from runner.data.reading.place import Place


TRAIN_INPUT = "train_input"
EVAL_INPUT = "eval_input"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """Facts that the checks of a job have found."""

    config: GPTJConfig
    epochs: dict[str, Epoch]
    """Size of an epoch of each section of the YAML that the job reads."""
    step: int
    """Step of the newest checkpoint, 0 without one."""
    place: Place
    """Place in the training records after that step."""
    target: int
    """Step that the job trains to."""
    changed: list[str]
    """What has changed in the records since the run read them, in words."""
    fingerprints: dict[str, dict[str, str]]
    """Fingerprint of each record file, by section; none unless the job trains."""

    @property
    def lines(self) -> Iterator[str]:
        """Yield a line about the records of each section."""
        for name, epoch in self.epochs.items():
            line = f"{name}: {epoch}"
            if name == TRAIN_INPUT and self.target > self.step:
                passes = float((self.target - self.step) / epoch.steps)
                line += f"; {self.target - self.step:,} steps to train are {passes:.3g} epochs"
            yield line

    @property
    def fields(self) -> dict[str, Any]:
        """Sizes of the epochs as fields of the JSON object."""
        return {
            name: {
                "records": epoch.records,
                "exact": epoch.exact,
                "tokens": epoch.records * epoch.length,
                "batches": epoch.batches,
                "steps": float(epoch.steps),
            }
            for name, epoch in self.epochs.items()
        }


def preflight(job: Job, params: Params, workers: int = 1) -> Preflight:
    """Check what a job reads: weights, adapter, records of every section it uses, schedules.

    Args:
        job: job of the command line.
        params: accepted parameters.
        workers: number of processes that share each batch.

    Raises:
        GptjError: the first problem that the job would meet before or after its first step, as far
            as files show it.
        UsageError: the job evaluates, and the parameters name no records for that.
    """
    from gptj_model.errors import DataFault, UsageError
    from runner.data.reading.epoch import check_section
    from runner.data.reading.place import Place
    from runner.planning.training_cost import check_executor
    from runner.training.run.records_file import changed_records, fingerprints_of

    config = config_of(job, params)
    sections = sections_of(job, params)
    epochs: dict[str, Epoch] = {}
    for name, section in sections.items():
        trains = name == TRAIN_INPUT
        try:
            epochs[name] = check_section(
                section,
                vocab_size=config.vocab_size,
                group=params.optimizer.grad_accum_steps if trains else 1,
                exact=trains and job.epochs is not None,
            )
        except (UsageError, DataFault) as fault:
            raise type(fault)(f"{name}: {fault.message}", hint=fault.hint) from None
    step, place, target, changed = 0, Place(), 0, list[str]()
    found: dict[str, dict[str, str]] = {}
    if is_training(job):
        check_executor(params, workers)
        step, place = _position(job, params)
        found = fingerprints_of(sections)
        if step:
            changed = list(changed_records(job.model_dir, found))
        if changed and job.strict:
            raise DataFault(
                changed[0],
                hint="restore those records, name another --model-dir, or accept the change by "
                "leaving out --strict",
            )
        target = target_of(job, params, step, place, epochs[TRAIN_INPUT])
    return Preflight(
        config=config,
        epochs=epochs,
        step=step,
        place=place,
        target=target,
        changed=changed,
        fingerprints=found,
    )


def _position(job: Job, params: Params) -> tuple[int, Place]:
    """Return the step of the newest checkpoint and its place in the records; those of a fresh run
    where there is none that can be read."""
    from gptj_convert.formats.containers.tensor_bundle import BundleSource
    from gptj_model.errors import FileFault
    from runner.data.reading.place import place_after
    from runner.training.run import checkpoints
    from runner.training.run.folder import place_of

    for step in reversed(checkpoints.steps(job.model_dir)):
        try:
            source = BundleSource(checkpoints.prefix(job.model_dir, step))
        except FileFault:
            continue
        with closing(source):
            return step, place_of(source, params, job.model_dir, continued=True)
    return 0, place_after(params.train_input, params.train_input.skip_steps)


def sections_of(job: Job, params: Params) -> dict[str, InputParams]:
    """Return the sections that the job reads, by their names in the YAML."""
    found = {TRAIN_INPUT: params.train_input} if is_training(job) else {}
    if job.mode != "train":
        if params.eval_input is None:
            raise click.UsageError(
                f"eval_input is missing, expected the records that --mode {job.mode} evaluates on"
            )
        found[EVAL_INPUT] = params.eval_input
    return found


def say_facts(output: Output, facts: Preflight, say: Callable[[str], None] | None = None) -> None:
    """Print the size of each section, and what has changed in its records.

    Args:
        output: where notes are printed.
        facts: what the checks have found.
        say: prints the sizes; None prints them as notes.
    """
    for text in facts.changed:
        output.note(
            f"note: {text}; the run resumes at record {facts.place.record:,} of epoch "
            f"{facts.place.epoch} of what is there now"
        )
    for line in facts.lines:
        (say or output.note)(line)

"""The four commands planned for a model and a machine, from the model's config or headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from golden.prompts import battery
from gptj_convert.conversion import cost
from gptj_convert.conversion.plan import Plan, make_plan
from gptj_convert.options import DEFAULT_OUT, DEFAULT_SOURCE, KEEP
from gptj_convert.resources import footprint, machine
from gptj_convert.resources.gpu import Gpu, gpus
from gptj_convert.resources.rates import Rates
from gptj_convert.settings.params_yaml import PARAMS_FILE
from gptj_convert.settings.pretraining import continued_pretraining, fitting_batch_size
from gptj_model.config import NOT_COMPUTED, GPTJConfig, differing_fields
from gptj_model.tensors import Scheme
from runner.config.execution import Execution
from runner.config.params_file import load_params, validate
from runner.planning.planned_source import Source
from runner.planning.training_cost import plan_training

_CONVERTED = DEFAULT_OUT["tf"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Resources that a command may use."""

    memory: int
    """Bytes of memory that are available now."""
    disk: int
    """Bytes that may be written in the current folder."""
    cores: float
    gpus: tuple[Gpu, ...] = ()

    @classmethod
    def here(cls) -> Machine:
        """Return the resources of this machine."""
        memory, disk = machine.memory_available(), machine.disk_free(Path())
        return cls(memory, disk, machine.cores(), tuple(gpus()))


@dataclass(frozen=True, slots=True)
class Step:
    """One command, and what it needs."""

    command: str
    memory: int
    disk: int
    """Bytes that it writes."""
    seconds: float | None
    """Estimated seconds; None if they depend on others."""
    short_of: tuple[str, ...] = ()
    """Resources that the machine lacks: "memory", "disk"."""
    per: str = ""
    """What the seconds are for, if not for the whole command."""
    on_gpus: tuple[int, ...] = ()
    """Numbers of the GPUs whose memory is sufficient, for training."""

    @property
    def fits(self) -> bool:
        """Whether the machine has what it needs."""
        return not self.short_of


@dataclass(slots=True)
class CommandPlan:
    """Every step, and the commands to run."""

    steps: list[Step] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    """What must differ from the plain commands, and why."""


@dataclass(frozen=True, slots=True)
class _Way:
    """A source and a conversion of it."""

    source: Source
    plan: Plan
    fetch: Step | None
    convert: Step

    @property
    def steps(self) -> list[Step]:
        return [self.fetch, self.convert] if self.fetch else [self.convert]

    @property
    def fits(self) -> bool:
        return all(step.fits for step in self.steps)

    @property
    def disk(self) -> int:
        return sum(step.disk for step in self.steps)


def plan_commands(sources: Sequence[Source], has: Machine, rates: Rates) -> CommandPlan:
    """Plan download, conversion, verification and training.

    Args:
        sources: sources of one model, the best first; the first conversion that fits is used.
        has: resources of the machine.
        rates: rates of the machine.
    """
    ways = [way for source in sources for way in _ways(source, has, rates)]
    chosen = next((w for w in ways if w.fits), ways[-1])
    outlook = CommandPlan()
    # A source with two conversions is fetched once.
    outlook.steps += dict.fromkeys(step for way in ways for step in way.steps)
    config = chosen.plan.config
    weights, logits = _verifications(chosen, has, rates)
    training, batch = _training(config, has, rates, taken=chosen.disk)
    streaming, *adapters = _trainings(config, has, rates, taken=chosen.disk)
    trainings = [_placed(step, has) for step in (training, streaming, *adapters)]
    outlook.steps += [weights, logits, *trainings, *_inference(chosen, has, rates)]
    outlook.advice = list(_advice(ways, chosen, weights, logits, training, streaming, has, batch))
    outlook.commands = [step.command for step in chosen.steps]
    outlook.commands += [s.command for s in (logits, weights) if s.fits][:1]
    for step in [s for s in (training, streaming) if "memory" not in s.short_of][:1]:
        elsewhere = "" if step.fits else " --model-dir /on/another/disk/model_dir"
        outlook.commands.append(step.command + elsewhere)
    return outlook


def _ways(source: Source, has: Machine, rates: Rates) -> Iterator[_Way]:
    checkpoint = source.checkpoint
    fetch = None
    if source.fetch:
        size = sum(info.nbytes for info in checkpoint.source.tensors.values())
        fetch = _judged(Step(source.fetch, footprint.DOWNLOAD, size, None), has)
    default = checkpoint.path == DEFAULT_SOURCE
    command = f"gptj convert{'' if default else f' {checkpoint.path}'} --to tf"
    for dtype in ("float32", KEEP):
        plan = make_plan(checkpoint, Scheme.TF, dtype)
        if dtype == KEEP and plan.dtype == "float32":
            continue
        step = Step(
            command + (" --dtype keep" if dtype == KEEP else ""),
            cost.conversion_memory(plan),
            plan.layout.total,
            cost.conversion_seconds(plan, rates, has.cores),
        )
        yield _Way(source, plan, fetch, _judged(step, has, taken=fetch.disk if fetch else 0))


def _verifications(way: _Way, has: Machine, rates: Rates) -> tuple[Step, Step]:
    config = way.plan.config
    lengths = [prompt.ids.size for prompt in battery(config)]
    memory = cost.comparison_memory((m.source, m.op, m.target) for m in way.plan.in_file_order)
    seconds = cost.comparison_seconds(way.plan, rates)
    weights = Step("gptj verify --level weights", memory, 0, seconds)
    logits = Step(
        "gptj verify --tolerance 1e-4",
        max(memory, footprint.logits_memory(config, lengths)),
        0,
        seconds + footprint.logits_seconds(config, sum(lengths), rates),
    )
    return _judged(weights, has), _judged(logits, has)


def _training(config: GPTJConfig, has: Machine, rates: Rates, *, taken: int) -> tuple[Step, int]:
    """Return the training step with the batch of the converted params.yaml, or with a smaller one
    that fits."""
    command = f"gptj train --init-from {_CONVERTED}/"
    usual = batch = fitting_batch_size(config)
    while batch > 1 and footprint.training_memory(config, batch) > has.memory:
        batch -= 1
    smaller = "" if batch == usual else f" --set train_input.batch_size={batch}"
    step = Step(
        command + smaller,
        footprint.training_memory(config, batch),
        plan_training(config, validate(_parameters(config), {}, where="the plan")).disk,
        footprint.step_seconds(config, batch, rates),
        per="a step",
    )
    return _judged(step, has, taken=taken), batch


def _trainings(config: GPTJConfig, has: Machine, rates: Rates, *, taken: int) -> Iterator[Step]:
    """Yield cheaper trainings: one block in memory, only an adapter, both; one sequence per
    step."""
    streaming = {"runconfig.execution": Execution.STREAMING.value}, "--execution streaming"
    adapter = {"model.lora.rank": 8}, "--set model.lora.rank=8"
    smaller = "" if fitting_batch_size(config) == 1 else " --set train_input.batch_size=1"
    for ways in ((streaming,), (adapter,), (adapter, streaming)):
        settings: dict[str, Any] = {"train_input.batch_size": 1}
        command = f"gptj train --init-from {_CONVERTED}/"
        for values, given in ways:
            settings |= values
            command += f" {given}"
        params = validate(_parameters(config), settings, where="the plan")
        plan = plan_training(config, params)
        step = Step(command + smaller, plan.memory, plan.disk, plan.seconds(rates), per="a step")
        yield _judged(step, has, taken=taken)


def _parameters(config: GPTJConfig) -> dict[str, Any]:
    """Return the parameters that the planned run will have: continued pre-training, with the steps
    and checkpoints that the converted folder states, if there is one of this model."""
    values = continued_pretraining(config)
    path = _CONVERTED / PARAMS_FILE
    if path.is_file():
        own = load_params(path)
        if not differing_fields(own.config, config).keys() - NOT_COMPUTED:
            values["runconfig"] = own.runconfig.model_dump(mode="json", exclude_unset=True)
    return values


def _inference(way: _Way, has: Machine, rates: Rates) -> Iterator[Step]:
    """Return evaluation and generation with the least --memory: one sequence of full length, one
    block."""
    config, T = way.plan.config, way.plan.config.n_positions
    reading = way.plan.layout.total / rates.read
    computing = 2 * footprint.parameters(config) * T / rates.multiplication
    for command, states, seconds, per in (
        ("eval", 4 * T * config.n_embd, max(reading, computing), "a sequence"),
        ("generate", footprint.cache_bytes(config, 1, T), reading, "a token"),
    ):
        least = footprint.streamed_memory(
            config, stored=way.plan.dtype, batch=1, length=T, states=states
        )
        named = f"gptj {command} --memory {-(-least // 10**7) / 100:.2f}GB"
        yield _judged(Step(named, least, 0, seconds, per=per), has)


def _judged(step: Step, has: Machine, *, taken: int = 0) -> Step:
    """Return the step with the resources it lacks, on a disk where earlier steps take their space
    first."""
    short = []
    if step.memory > has.memory:
        short.append("memory")
    if step.disk and step.disk + taken > has.disk:
        short.append("disk")
    return replace(step, short_of=tuple(short))


def _placed(step: Step, has: Machine) -> Step:
    """Return the step with the GPUs that it fits."""
    fitting = (n for n, gpu in enumerate(has.gpus) if step.memory <= (gpu.free or 0))
    return replace(step, on_gpus=tuple(fitting))


def _advice(
    ways: Sequence[_Way],
    chosen: _Way,
    weights: Step,
    logits: Step,
    training: Step,
    streaming: Step,
    has: Machine,
    batch: int,
) -> Iterator[str]:
    disk, memory = f"{has.disk / 1e9:.1f} GB free", f"{has.memory / 1e9:.1f} GB available"
    best = ways[0]
    if not chosen.fits:
        short = {what for step in chosen.steps for what in step.short_of}
        if "disk" in short:
            yield (
                f"source and conversion need at least {chosen.disk / 1e9:.1f} GB of disk, {disk}: "
                "work in a folder on another disk"
            )
        if "memory" in short:
            yield (
                f"the conversion needs {chosen.convert.memory / 1e9:.2f} GB of memory, {memory}: "
                "close other programs, or take another machine"
            )
    elif chosen is not best:
        commands = " and ".join(f"`{step.command}`" for step in chosen.steps)
        yield (
            f"`{best.convert.command}` needs {best.disk / 1e9:.1f} GB of disk with its source, "
            f"{disk}: {commands} take {chosen.disk / 1e9:.1f} GB"
        )
    if not logits.fits:
        then = "only the weights are compared" if weights.fits else "verify on another machine"
        yield f"verify needs {logits.memory / 1e9:.1f} GB of memory, {memory}: {then}"
    last = training
    if "memory" in training.short_of:
        last = streaming
        instead = f"with --execution streaming {streaming.memory / 1e9:.1f} GB are enough"
        if "memory" in streaming.short_of:
            instead = f"it takes another machine; {instead}"
        yield (
            f"training needs {training.memory / 1e9:.1f} GB of memory with a batch of {batch}, "
            f"{memory}: {instead}"
        )
    if "disk" in last.short_of:
        yield (
            f"checkpoints of training take {last.disk / 1e9:.1f} GB of disk, {disk}, some of "
            "it needed before: put --model-dir on another disk"
        )

"""`gptj doctor`: check this machine, and plan what fits on it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.shared.command import command
from runner.cli.shared.errors import Exit
from runner.cli.shared.output import Output, one_line

if TYPE_CHECKING:
    from runner.planning.command_plan import CommandPlan, Machine

_DEFAULT_MODEL = "6b"


@command("gptj doctor", "gptj doctor --plan 6b")
@click.option(
    "--plan",
    "model",
    metavar="[SRC]",
    is_flag=False,
    flag_value=_DEFAULT_MODEL,
    help="Show memory, disk and time of every command for a model: a preset (tiny, 125m, 6b), a "
    f"config.json, a folder or a checkpoint.  [default: {_DEFAULT_MODEL}]",
)
def doctor(output: Output, model: str | None) -> dict[str, Any]:
    """Check this machine; with --plan, show what fits on it.

    A plan reads only headers and downloads nothing. Its times are estimates from a measurement of
    about a second; a disk that slows down, or other work on the machine, makes them several times
    longer. The exit code is 1 if something is missing that every command needs.
    """
    return _examine(output) if model is None else _plan(output, model)


def _examine(output: Output) -> dict[str, Any]:
    from runner.planning.doctor import State, examine

    facts = examine()
    for fact in facts:
        output.data(f"{fact.state.value:<8} {fact.name:<18} {one_line(fact.value)}".rstrip())
        if fact.state is not State.OK:
            output.data(f"{'':<8}   for {fact.needed_for}" + (f": {fact.fix}" * bool(fact.fix)))
    broken = any(fact.state is State.MISSING and fact.core for fact in facts)
    return {
        "facts": [asdict(fact) | {"state": fact.state.value} for fact in facts],
        "exit": Exit.OPERATIONAL if broken else Exit.OK,
    }


def _plan(output: Output, model: str) -> dict[str, Any]:
    from pathlib import Path

    from gptj_convert.resources.footprint import parameters
    from gptj_convert.resources.rates import measure
    from runner.planning.command_plan import Machine, plan_commands
    from runner.planning.planned_source import find_sources

    sources = find_sources(model)
    has, rates = Machine.here(), measure(Path())
    try:
        plan = plan_commands(sources, has, rates)
    finally:
        for source in sources:
            source.checkpoint.source.close()
    count = parameters(sources[0].checkpoint.config)
    output.data(f"{one_line(model)}: {count:,} parameters")
    _show(output, has, plan)
    return {
        "model": model,
        "parameters": count,
        "machine": asdict(has),
        "rates": asdict(rates),
        "steps": [asdict(step) | {"fits": step.fits} for step in plan.steps],
        "commands": plan.commands,
        "advice": plan.advice,
    }


def _show(output: Output, has: Machine, plan: CommandPlan) -> None:
    width = max(len(step.command) for step in plan.steps)
    output.data(f"{'':<{width}}  {'memory':>10}  {'disk':>9}  {'time, estimated':<16}  fits")
    for step in plan.steps:
        disk = f"{step.disk / 1e9:.1f} GB" if step.disk >= 5e7 else f"{step.disk / 1e6:.1f} MB"
        verdict = f"no: too little {' and '.join(step.short_of)}" if step.short_of else "yes"
        if step.on_gpus:
            verdict += f"; GPU {', '.join(map(str, step.on_gpus))}: yes"
        output.data(
            f"{one_line(step.command):<{width}}  {step.memory / 1e9:>7.2f} GB  "
            f"{disk if step.disk else '-':>9}  {_time(step.seconds, step.per):<16}  {verdict}"
        )
    memory, disk = (f"{n / 1e9:.1f} GB" for n in (has.memory, has.disk))
    output.data(f"here: {memory} of memory available, {disk} of disk free, {has.cores:g} cores")
    for line in plan.advice:
        output.data(f"advice: {one_line(line)}")
    output.data("run:")
    for line in plan.commands:
        output.data(f"  {one_line(line)}")


def _time(seconds: float | None, per: str) -> str:
    if seconds is None:
        return "your network's"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} {per}".rstrip()
    return f"{seconds:.0f} s {per}".rstrip() if seconds >= 1 else f"under 1 s {per}".rstrip()

"""`--shard` of `gptj data`: the share of the work that this machine does."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import rich_click as click

from gptj_model.errors import UsageError

if TYPE_CHECKING:
    from runner.data.making.shards import Shard

SLURM, KUBERNETES = "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"
_LOW, _HIGH, _COUNT = (f"SLURM_ARRAY_TASK_{name}" for name in ("MIN", "MAX", "COUNT"))

_FORM = re.compile(r"([0-9]{1,9})?/([0-9]{1,9})")
_HINT = (
    "give the number of shards, as in --shard /16, or make all records in one run with --shard 0/1"
)


@dataclass(frozen=True, slots=True)
class Share:
    """What a command line says of its shard."""

    index: int | None
    """Number of the shard, from 0; None takes it from the environment."""
    count: int


class _ShareParam(click.ParamType):
    name = "share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Share:
        if isinstance(value, Share):
            return value
        if not (found := _FORM.fullmatch(value)):
            raise UsageError(
                f"--shard is {value!r}, expected I/N with I from 0 to N-1",
                hint="for the first of 16 shards, give --shard 0/16",
            )
        return Share(None if found[1] is None else int(found[1]), int(found[2]))


shard_option = click.option(
    "--shard",
    "share",
    type=_ShareParam(),
    metavar="I/N",
    help="Make only share I of N, from 0 to N-1, in a folder of its own in --out; "
    "`gptj data merge` joins them. /N takes I from the environment, 0/1 makes all records.  "
    f"[default: as {SLURM} says, else 0/1]",
)


def find_shard(share: Share | None, environment: Mapping[str, str] = os.environ) -> Shard | None:
    """Return the shard that a command line or else the environment asks for, or None for all
    records in one run.

    Args:
        share: what the command line says; None leaves all to the environment.
        environment: variables of the environment.

    Raises:
        UsageError: a number is out of range, or the environment does not say which of how many
            shards is meant.
    """
    from runner.data.making.shards import Shard

    if share and share.index is not None:
        shard = Shard(share.index, share.count)
    else:
        variable = _variable(environment, share)
        if variable is None:
            return None
        index = _number(environment, variable)
        shard = (
            Shard(index, share.count, variable) if share else _of_all(environment, variable, index)
        )
    return shard if shard.count > 1 else None


def _variable(environment: Mapping[str, str], share: Share | None) -> str | None:
    """Return the variable that holds the number of the shard, or None if none is set."""
    found = [name for name in (SLURM, KUBERNETES) if environment.get(name)]
    if len(found) > 1:
        raise UsageError(
            f"{SLURM} and {KUBERNETES} are both set, expected one of them",
            hint="give both numbers, as in --shard 0/16, or make all records in one run with "
            "--shard 0/1",
        )
    if not found and share:
        raise UsageError(
            f"--shard is /{share.count}, but neither {SLURM} nor {KUBERNETES} is set",
            hint=f"give the number of the shard as well, as in --shard 0/{share.count}",
        )
    return found[0] if found else None


def _of_all(environment: Mapping[str, str], variable: str, index: int) -> Shard:
    """Return the shard of a task where the environment must say how many there are."""
    from runner.data.making.shards import Shard

    if variable == KUBERNETES:
        raise UsageError(
            f"{variable} is {index}, but Kubernetes does not say how many completions the job has",
            hint=_HINT,
        )
    low, high, count = (_number(environment, name) for name in (_LOW, _HIGH, _COUNT))
    # One task, or a beginning other than 0 and 1, is a part of an array that was submitted again.
    whole = count > 1 and low in (0, 1) and high - low + 1 == count
    if not whole or not low <= index <= high:
        raise UsageError(
            f"{variable} is {index} in an array of {count} tasks from {low} to {high}, expected "
            "all of 0 to N-1 or of 1 to N",
            hint=_HINT,
        )
    return Shard(index - low, count, variable)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not re.fullmatch(r"[0-9]{1,9}", text):
        found = repr(text) if text else "not set"
        raise UsageError(f"{name} is {found}, expected a number", hint=_HINT)
    return int(text)

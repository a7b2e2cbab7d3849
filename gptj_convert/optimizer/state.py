"""The state that Adam keeps between steps, independent of any format, and checks that every
format's reader makes.

Moments stay where they are; the state names them. Everything else is a few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptj_convert.checkpoint.open import Checkpoint
from gptj_model.errors import TensorFault
from gptj_model.optimizer_names import ADAMS
from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import (
    BETA1_POWER,
    BETA2_POWER,
    CURRENT_LOSS_SCALE,
    GLOBAL_STEP,
    GOOD_STEPS,
    OVERFLOWS_SINCE_RESCALE,
    SKIPPED_STEPS,
    STEPS_SINCE_RESCALE,
)

#: Dtype of all state, as each of the optimizers makes it.
DTYPE = "float32"

#: Variables of a dynamic loss scale.
LOSS_SCALE = (
    CURRENT_LOSS_SCALE,
    STEPS_SINCE_RESCALE,
    OVERFLOWS_SINCE_RESCALE,
    SKIPPED_STEPS,
    GOOD_STEPS,
)
#: The setting that each power belongs to.
BETAS = {BETA1_POWER: "beta1", BETA2_POWER: "beta2"}
#: Hint where there is no state, or none that can be resumed.
WITHOUT = (
    "convert without --optimizer-state, or train with --checkpoint-path, to take only the weights"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamSettings:
    """Settings of the optimizer, under the names of params.yaml."""

    learning_rate: float
    """Learning rate of the next step."""
    beta1: float
    beta2: float
    epsilon: float
    weight_decay_rate: float
    exclude_from_weight_decay: tuple[str, ...]
    use_bias_correction: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerState:
    """Optimizer state after a step."""

    step: int
    powers: Mapping[str, np.float32]
    """Each beta to the power of step + 1, by TF name; empty without bias correction."""
    loss_scale: Mapping[str, np.ndarray]
    """Variables of the loss scale by TF name; empty unless it is dynamic."""
    moments: Mapping[str, tuple[str, str]]
    """Names of both moments in the checkpoint, by HF name of their weight."""
    settings: AdamSettings | None
    """Settings that are stored with the state."""

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """Everything except the moments, as TensorFlow checkpoints store it."""
        powers = {name: np.asarray(power) for name, power in self.powers.items()}
        return {GLOBAL_STEP: np.asarray(self.step, np.int64), **powers, **self.loss_scale}


def refuse(checkpoint: Checkpoint, problems: Iterable[str]) -> None:
    """Raise a TensorFault of all problems, if there are any."""
    if found := list(problems):
        raise TensorFault(str(checkpoint.path), found, hint=WITHOUT)


def other_optimizers(names: Iterable[str], known: tuple[str, ...]) -> Iterator[str]:
    """Return problems that name state of optimizers other than Adam, one per kind."""
    kinds = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    for kind in kinds:
        if kind not in known:
            yield f"its optimizer keeps {kind!r}, which {' or '.join(ADAMS)} does not have"


def common_value(checkpoint: Checkpoint, values: Mapping[str, float | None]) -> float:
    """Return the value that all names share."""
    first = next(iter(values.values()))
    refuse(
        checkpoint,
        (
            f"{name!r} is " + ("missing" if value is None else f"{value}, not {first} as the first")
            for name, value in values.items()
            if value is None or value != first
        ),
    )
    assert first is not None
    return first


def one_number(source: TensorSource, name: str) -> float | None:
    """Return the value of a one-element tensor; None if it has another number of elements."""
    info = source.tensors[name]
    return read_tensor(source, name).item() if math.prod(info.shape) == 1 else None


def whole_number(checkpoint: Checkpoint, name: str, value: float | None) -> int:
    """Return a count as a whole number.

    Raises:
        TensorFault: the value is not a whole number.
    """
    if value is None or not 0 <= value < 2**63 or value != int(value):
        raise TensorFault(
            str(checkpoint.path),
            [f"{name!r} is {value}, expected a whole number"],
            hint=WITHOUT,
        )
    return int(value)


def scale_variables(
    checkpoint: Checkpoint, values: Mapping[str, float | None]
) -> dict[str, np.ndarray]:
    """Return those values that belong to a loss scale."""
    found: dict[str, np.ndarray] = {}
    for name in (n for n in LOSS_SCALE if values.get(n) is not None):
        if name == CURRENT_LOSS_SCALE:
            found[name] = np.asarray(values[name], np.float32)
        else:
            found[name] = np.asarray(whole_number(checkpoint, name, values[name]), np.int64)
    return found


def adam_settings(
    rate: Any,
    beta1: Any,
    beta2: Any,
    epsilon: Any,
    decay: Any,
    exclusions: tuple[str, ...],
    corrects: bool,
) -> AdamSettings:
    """Return the settings from numbers of whatever type a file has.

    Raises:
        TypeError, ValueError: a value is not a number.
    """
    return AdamSettings(
        learning_rate=float(rate),
        beta1=float(beta1),
        beta2=float(beta2),
        epsilon=float(epsilon),
        weight_decay_rate=float(decay),
        exclude_from_weight_decay=exclusions,
        use_bias_correction=corrects,
    )

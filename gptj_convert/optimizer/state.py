"""What Adam keeps between steps, in no format's words; and what every format's reader checks.

The moments stay where they are: what is read says where. Everything else is a few numbers.
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

#: All state is float32, as each of the optimizers makes it.
DTYPE = "float32"

#: The variables of a dynamic loss scale.
LOSS_SCALE = (
    CURRENT_LOSS_SCALE,
    STEPS_SINCE_RESCALE,
    OVERFLOWS_SINCE_RESCALE,
    SKIPPED_STEPS,
    GOOD_STEPS,
)
#: The setting that each power is of.
BETAS = {BETA1_POWER: "beta1", BETA2_POWER: "beta2"}
#: What to do when there is no state, or none that can be gone on with.
WITHOUT = (
    "to take the weights alone, convert without --optimizer-state, or train with --checkpoint-path"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamSettings:
    """Parameters of the optimizer, in the words of params.yaml."""

    learning_rate: float
    """Of the next step."""
    beta1: float
    beta2: float
    epsilon: float
    weight_decay_rate: float
    exclude_from_weight_decay: tuple[str, ...]
    use_bias_correction: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerState:
    """The state after a step."""

    step: int
    powers: Mapping[str, np.float32]
    """By TF name, as after that step: each beta to the power of step + 1; empty without bias
    correction."""
    loss_scale: Mapping[str, np.ndarray]
    """By TF name; empty unless it is dynamic."""
    moments: Mapping[str, tuple[str, str]]
    """By HF name of the weight, the names of its two moments in the checkpoint."""
    settings: AdamSettings | None
    """Those that are stored with the state."""

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """All but the moments, as TensorFlow's checkpoints hold it."""
        powers = {name: np.asarray(power) for name, power in self.powers.items()}
        return {GLOBAL_STEP: np.asarray(self.step, np.int64), **powers, **self.loss_scale}


def refuse(checkpoint: Checkpoint, problems: Iterable[str]) -> None:
    """Raise a TensorFault of all of them, if there are any."""
    if found := list(problems):
        raise TensorFault(str(checkpoint.path), found, hint=WITHOUT)


def other_optimizers(names: Iterable[str], known: tuple[str, ...]) -> Iterator[str]:
    """State that is not Adam's, once a kind."""
    kinds = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    for kind in kinds:
        if kind not in known:
            yield f"its optimizer keeps {kind!r}, which is not of {' or '.join(ADAMS)}"


def common_value(checkpoint: Checkpoint, values: Mapping[str, float | None]) -> float:
    """The one value that all have, by name of each."""
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
    """The one value of a tensor; None if it has another number of them."""
    info = source.tensors[name]
    return read_tensor(source, name).item() if math.prod(info.shape) == 1 else None


def whole_number(checkpoint: Checkpoint, name: str, value: float | None) -> int:
    """The value of a count.

    Raises:
        TensorFault: it is none.
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
    """Those of the values that are of a loss scale."""
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
    """From numbers of whatever type a file has.

    Raises:
        TypeError, ValueError: they are none.
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

"""What Adam keeps between steps, found in a checkpoint of any format, and put into another.

TensorFlow's checkpoints hold it beside the weights, by name; a `.mdl` in its tree, by number; of
Hugging Face's formats PyTorch's optimizer.pt beside the weights does. The moments stay where
they are: what is read here says where. Everything else is a few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptj_convert.checkpoint import Checkpoint
from gptj_convert.formats.cs import CsSource
from gptj_convert.formats.torch_optimizer import OPTIMIZER_FILE, OptimizerSource
from gptj_model.dtypes import FLOATS, is_lossless
from gptj_model.errors import FileFault, TensorFault
from gptj_model.moments import (
    ADAMS,
    GROUPINGS,
    MOMENTS,
    STATE,
    Grouping,
    named_moments,
    numbered_moments,
    parameter_groups,
)
from gptj_model.source import TensorInfo, TensorSource, raw_bytes, read_tensor
from gptj_model.tensors import (
    BETA1_POWER,
    BETA2_POWER,
    CURRENT_LOSS_SCALE,
    GLOBAL_STEP,
    GOOD_STEPS,
    LORA_ALPHA,
    OVERFLOWS_SINCE_RESCALE,
    SKIPPED_STEPS,
    SLOTS,
    STEPS_SINCE_RESCALE,
    Op,
    Scheme,
    table,
)

#: All state is float32, as each of the optimizers makes it.
DTYPE = "float32"

#: A dynamic loss scale's variables, and how the CS client calls them in its tree.
CS_LOSS_SCALE = {
    CURRENT_LOSS_SCALE: "loss_scale",
    STEPS_SINCE_RESCALE: "steps_since_rescale",
    OVERFLOWS_SINCE_RESCALE: "overflows_since_rescale",
    SKIPPED_STEPS: "num_skipped_steps",
}
CS_SCALER = "grad_scaler"
_LOSS_SCALE = (*CS_LOSS_SCALE, GOOD_STEPS)
#: The setting that each power is of.
BETAS = {BETA1_POWER: "beta1", BETA2_POWER: "beta2"}
#: Under this key an optimizer.pt keeps what PyTorch's optimizer has no place for.
TORCH_MORE = "gptj"
#: Steps after which a power does not change any more: PyTorch counts them in float32.
_LONGEST = 2**24
_WITHOUT = (
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


def read_state(checkpoint: Checkpoint) -> OptimizerState:
    """The state in a checkpoint that was opened with it.

    Raises:
        FileFault: there is none.
        TensorFault: it is of another optimizer, or not whole; all that is missing is named.
    """
    state = find_state(checkpoint)
    if state is None:
        raise FileFault(
            f"{checkpoint.path}: holds no optimizer state, expected {_expected(checkpoint.scheme)}",
            hint=_WITHOUT,
        )
    return state


def find_state(checkpoint: Checkpoint) -> OptimizerState | None:
    """The same; None when there is none."""
    if checkpoint.scheme is Scheme.TF:
        state = _from_tf(checkpoint)
    elif checkpoint.scheme is Scheme.CS:
        state = _from_cs(checkpoint)
    elif checkpoint.optimizer:
        state = _from_torch(checkpoint, checkpoint.optimizer)
    else:
        return None
    if state:
        _refuse(checkpoint, _faulty_moments(checkpoint, state))
    return state


def _expected(scheme: Scheme) -> str:
    match scheme:
        case Scheme.TF:
            first, second = SLOTS[ADAMS[0]]
            return (
                f"slots …/{first} and …/{second} beside every weight, as a run's checkpoints have"
            )
        case Scheme.CS:
            return f"{STATE}0.{MOMENTS[0]} and so on, as the client's checkpoints have"
        case Scheme.HF:
            return f"{OPTIMIZER_FILE} beside the weights"
        case Scheme.KERAS:
            return "another format: a Keras weights file has no place for it"


def _refuse(checkpoint: Checkpoint, problems: Iterable[str], hint: str = _WITHOUT) -> None:
    if found := list(problems):
        raise TensorFault(str(checkpoint.path), found, hint=hint)


def _faulty_moments(checkpoint: Checkpoint, state: OptimizerState) -> Iterator[str]:
    tensors, scheme = checkpoint.everything.tensors, checkpoint.scheme
    for tensor in table(checkpoint.config):
        for name in state.moments[tensor.hf]:
            info, shape = tensors.get(name), tensor.shape_in(scheme)
            if info is None:
                yield f"{name!r}, a moment of {tensor.name(scheme)!r}, is missing"
            elif info.shape != shape:
                yield (
                    f"{name!r} has shape {list(info.shape)}, expected {list(shape)}, that of "
                    f"{tensor.name(scheme)!r}"
                )
            elif info.dtype not in FLOATS or not is_lossless(info.dtype, DTYPE):
                yield f"{name!r} holds {info.dtype}, expected {DTYPE}"


class StateInTf:
    """Optimizer state of any checkpoint, by the names and in the layout of TensorFlow's.

    A `TensorSource` of slots and scalars, to begin a run with: a moment is read whole, and kept
    until another is asked for.

    Args:
        checkpoint: open, with its optimizer's state.
        state: found in it.
        optimizer_type: of the run; if it is none of `ADAMS`, there are no slots for it.
    """

    def __init__(self, checkpoint: Checkpoint, state: OptimizerState, optimizer_type: str) -> None:
        self._source = checkpoint.everything
        self._scalars = state.scalars
        self._moments: dict[str, tuple[str, Op]] = {}
        self._last: tuple[str, np.ndarray] | None = None
        self.tensors = {n: TensorInfo(v.dtype.name, v.shape) for n, v in self._scalars.items()}
        if optimizer_type not in ADAMS:
            return
        names = named_moments(checkpoint.config, optimizer_type)
        for tensor in table(checkpoint.config):
            op = tensor.op(checkpoint.scheme, Scheme.TF)
            pairs = zip(names[tensor.hf], state.moments[tensor.hf], strict=True)
            self._moments |= {name: (stored, op) for name, stored in pairs}
            info = TensorInfo(DTYPE, tensor.shape_in(Scheme.TF))
            self.tensors |= dict.fromkeys(names[tensor.hf], info)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSource.read_into`."""
        values = self._scalars[name] if name in self._scalars else self._moment(name)
        buffer[:] = raw_bytes(values)[offset : offset + len(buffer)]

    def _moment(self, name: str) -> np.ndarray:
        if self._last is None or self._last[0] != name:
            stored, op = self._moments[name]
            self._last = None  # not two of them at once
            values = np.ascontiguousarray(op(read_tensor(self._source, stored)), DTYPE)
            self._last = name, values
        return self._last[1]

    def close(self) -> None:
        """The checkpoint is closed by whoever has opened it."""


# TensorFlow: by name.


def _from_tf(checkpoint: Checkpoint) -> OptimizerState | None:
    source = checkpoint.source
    slots = {name.rsplit("/", 1)[-1] for name in source.tensors if "/" in name}
    kinds = [kind for kind, suffixes in SLOTS.items() if slots.intersection(suffixes)]
    if not kinds:
        return None
    others = [kind for kind in kinds if kind not in ADAMS]
    _refuse(
        checkpoint, (f"holds slots of {kind}, expected of {' or '.join(ADAMS)}" for kind in others)
    )
    if LORA_ALPHA in source.tensors:
        _refuse(checkpoint, ["its moments are those of a LoRA adapter, not of the weights"])
    kind = next(kind for kind in ADAMS if kind in kinds)
    names = (GLOBAL_STEP, *BETAS, *_LOSS_SCALE)
    read = {name: _scalar(source, name) for name in names if name in source.tensors}
    needed = (GLOBAL_STEP, *(BETAS if BETAS.keys() & read.keys() else ()))
    _refuse(checkpoint, (f"{name!r} is missing" for name in needed if name not in read))
    _refuse(checkpoint, (f"{name!r} is not one number" for name in read if read[name] is None))
    return OptimizerState(
        step=_whole(checkpoint, GLOBAL_STEP, read[GLOBAL_STEP]),
        powers={name: np.float32(read[name]) for name in BETAS if name in read},
        loss_scale=_loss_scale(checkpoint, read),
        moments=named_moments(checkpoint.config, kind),
        settings=None,
    )


# The CS client: by number, in a tree.


def _from_cs(checkpoint: Checkpoint) -> OptimizerState | None:
    source = checkpoint.source
    assert isinstance(source, CsSource)
    stored = [name for name in source.tensors if name.startswith(STATE)]
    if not stored:
        return None
    _refuse(checkpoint, _other_state(stored, (*MOMENTS, *BETAS)))
    step = source.number("global_step")
    keys = [f"{STATE}{n}" for n in range(len(table(checkpoint.config)))]
    powers = {
        name: _common(checkpoint, {f"{k}.{name}": source.number(f"{k}.{name}") for k in keys})
        for name in BETAS
        if f"{STATE}0.{name}" in source.tensors
    }
    scale = {tf: source.number(f"{CS_SCALER}.{cs}") for tf, cs in CS_LOSS_SCALE.items()}
    return OptimizerState(
        step=_whole(checkpoint, "global_step", step),
        powers={name: np.float32(power) for name, power in powers.items()},
        # A scale that is fixed is a number, not a tensor.
        loss_scale=_loss_scale(checkpoint, scale)
        if f"{CS_SCALER}.loss_scale" in source.tensors
        else {},
        moments=numbered_moments(checkpoint.config, Scheme.CS, Grouping.DECAY),
        settings=_cs_settings(checkpoint, source),
    )


def _other_state(names: Iterable[str], known: tuple[str, ...]) -> Iterator[str]:
    """State that is not Adam's, once a kind."""
    kinds = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    for kind in kinds:
        if kind not in known:
            yield f"its optimizer keeps {kind!r}, which is not of {' or '.join(ADAMS)}"


def _common(checkpoint: Checkpoint, values: Mapping[str, float | None]) -> float:
    """The one value that all have, by name of each."""
    first = next(iter(values.values()))
    _refuse(
        checkpoint,
        (
            f"{name!r} is " + ("missing" if value is None else f"{value}, not {first} as the first")
            for name, value in values.items()
            if value is None or value != first
        ),
    )
    assert first is not None
    return first


def _scalar(source: TensorSource, name: str) -> float | None:
    """The one value of a tensor; None if it has another number of them."""
    info = source.tensors[name]
    return read_tensor(source, name).item() if math.prod(info.shape) == 1 else None


def _whole(checkpoint: Checkpoint, name: str, value: float | None) -> int:
    if value is None or not 0 <= value < 2**63 or value != int(value):
        raise TensorFault(
            str(checkpoint.path),
            [f"{name!r} is {value}, expected a whole number"],
            hint=_WITHOUT,
        )
    return int(value)


def _loss_scale(
    checkpoint: Checkpoint, values: Mapping[str, float | None]
) -> dict[str, np.ndarray]:
    """Those of the values that are of a loss scale."""
    found: dict[str, np.ndarray] = {}
    for name in (n for n in _LOSS_SCALE if values.get(n) is not None):
        if name == CURRENT_LOSS_SCALE:
            found[name] = np.asarray(values[name], np.float32)
        else:
            found[name] = np.asarray(_whole(checkpoint, name, values[name]), np.int64)
    return found


def _cs_settings(checkpoint: Checkpoint, source: CsSource) -> AdamSettings | None:
    """Those of the first group, whose parameters are decayed."""
    group = "optimizer.param_groups.0"
    keys = ("lr", "betas.0", "betas.1", "eps", "weight_decay", "correct_bias")
    lr, beta1, beta2, eps, decay, corrects = (source.number(f"{group}.{key}") for key in keys)
    if source.number(f"{group}.l2_regularization_rate"):
        _refuse(
            checkpoint, ["its optimizer adds the weights to the gradients, which none here does"]
        )
    if None in (lr, beta1, beta2, eps, decay):
        return None
    return _settings(lr, beta1, beta2, eps, decay, corrects is None or bool(corrects))


def _settings(
    rate: Any, beta1: Any, beta2: Any, epsilon: Any, decay: Any, corrects: bool
) -> AdamSettings:
    return AdamSettings(
        learning_rate=float(rate),
        beta1=float(beta1),
        beta2=float(beta2),
        epsilon=float(epsilon),
        weight_decay_rate=float(decay),
        use_bias_correction=corrects,
    )


# PyTorch: by number, in groups, in a file of its own.


def _from_torch(checkpoint: Checkpoint, source: OptimizerSource) -> OptimizerState:
    names = (*source.tensors, *source.plain)
    _refuse(checkpoint, _other_state(names, (*MOMENTS, "step")))
    groups, config = source.groups, checkpoint.config
    grouping = _grouping(checkpoint, source)
    moments = numbered_moments(config, Scheme.HF, grouping)
    steps = {f"{STATE}{n}.step": _torch_step(source, n) for n in range(len(moments))}
    step = _whole(checkpoint, "step", _common(checkpoint, steps))
    try:
        settings = _torch_settings(groups)
    except (KeyError, TypeError, ValueError, IndexError, StopIteration):
        _refuse(checkpoint, [f"{OPTIMIZER_FILE}: its param_groups are not those of Adam"])
        raise
    more = source.more.get(TORCH_MORE)
    kept = more if isinstance(more, dict) and more.get("step") == step else {}
    powers: dict[str, np.float32] = {}
    if settings.use_bias_correction:
        powers = {
            name: np.float32(kept[name])
            if type(kept.get(name)) is float
            else beta_power(getattr(settings, beta), step)
            for name, beta in BETAS.items()
        }
    scale = {n: v for n, v in kept.items() if type(v) in (int, float)}
    return OptimizerState(
        step=step,
        powers=powers,
        loss_scale=_loss_scale(checkpoint, scale),
        moments=moments,
        settings=settings,
    )


def beta_power(beta: float, step: int) -> np.float32:
    """A beta's power after so many steps, rounded at each as the optimizers round it."""
    count = min(step + 1, _LONGEST)
    with np.errstate(all="ignore"):
        return np.multiply.accumulate(np.full(count, beta, np.float32))[-1]


def _grouping(checkpoint: Checkpoint, source: OptimizerSource) -> Grouping:
    """How the file's parameters were numbered."""
    found = [group["params"] for group in source.groups]
    for grouping in GROUPINGS[Scheme.HF]:
        groups = parameter_groups(checkpoint.config, Scheme.HF, grouping)
        numbers = iter(range(sum(map(len, groups))))
        names = [group.get("param_names") for group in source.groups]
        if found == [[next(numbers) for _ in group] for group in groups] and all(
            given is None or given == [t.hf for t in group]
            for given, group in zip(names, groups, strict=True)
        ):
            return grouping
    rows = table(checkpoint.config)
    matrices = sum(len(t.shape) > 1 for t in rows)
    sizes = " and ".join(str(len(group)) for group in found) or "no"
    raise TensorFault(
        str(checkpoint.path),
        [
            f"{OPTIMIZER_FILE}: has groups of {sizes} parameters, expected one of {len(rows)} in "
            f"the order of GPTJForCausalLM.parameters(), or those of transformers' Trainer, "
            f"{matrices} and {len(rows) - matrices}"
        ],
        hint=_WITHOUT,
    )


def _torch_step(source: OptimizerSource, number: int) -> float | None:
    name = f"{STATE}{number}.step"
    if name in source.tensors:
        return _scalar(source, name)
    value = source.plain.get(name)
    return float(value) if isinstance(value, int | float) else None


def _torch_settings(groups: list[dict[str, Any]]) -> AdamSettings:
    group = groups[0]
    if group.get("amsgrad"):
        raise ValueError("another rule")
    beta1, beta2 = group["betas"]
    corrects = bool(group.get("correct_bias", True))
    # A rate may be a tensor; then the one that a schedule began with must do.
    rate = next(r for r in (group["lr"], group.get("initial_lr")) if isinstance(r, int | float))
    return _settings(rate, beta1, beta2, group["eps"], group["weight_decay"], corrects)

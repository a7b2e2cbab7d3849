"""How a model that one device cannot hold is divided among several; numpy and stdlib only.

The devices form a mesh of two axes: each batch is divided along `BATCH`, tensors along `MODEL`.
A device holds its part of every tensor that `SPLITS` divides, and the whole of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from gptj_model.op import Op
from gptj_model.tensors import Scheme, Tensor, table

BATCH, MODEL = "batch", "model"

#: Axes of a matrix in HF's layout: what comes out (of the embedding and the head: a token each),
#: what goes in. A tensor that is `_WHOLE` is small, and every device has a copy.
_OUT, _IN, _WHOLE = 0, 1, None

#: Which axis is divided along `MODEL`, by the HF name of the row of THE TABLE. What is divided on
#: its way out of one matrix goes divided into the next: a block exchanges its two sums alone.
SPLITS: dict[str, int | None] = {
    "transformer.wte.weight": _OUT,  # tokens
    "transformer.h.{i}.ln_1.weight": _WHOLE,
    "transformer.h.{i}.ln_1.bias": _WHOLE,
    "transformer.h.{i}.attn.q_proj.weight": _OUT,  # heads
    "transformer.h.{i}.attn.k_proj.weight": _OUT,
    "transformer.h.{i}.attn.v_proj.weight": _OUT,
    "transformer.h.{i}.attn.out_proj.weight": _IN,  # summed over the devices
    "transformer.h.{i}.mlp.fc_in.weight": _OUT,
    "transformer.h.{i}.mlp.fc_in.bias": _OUT,
    "transformer.h.{i}.mlp.fc_out.weight": _IN,  # summed over the devices
    "transformer.h.{i}.mlp.fc_out.bias": _WHOLE,
    "transformer.ln_f.weight": _WHOLE,
    "transformer.ln_f.bias": _WHOLE,
    "lm_head.weight": _OUT,  # tokens
    "lm_head.bias": _OUT,
}


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many devices there are along each axis."""

    batch: int
    model: int

    @property
    def size(self) -> int:
        """How many there are."""
        return self.batch * self.model

    def __str__(self) -> str:
        return f"{self.batch} × {self.model}"


def split_axis(tensor: Tensor) -> int | None:
    """The axis of a tensor, in HF's layout, that is divided along `MODEL`; None: it is not."""
    rows = {row.format(i=tensor.block): axis for row, axis in SPLITS.items()}
    return rows[tensor.hf]


def axes(tensor: Tensor) -> tuple[str | None, ...]:
    """The axis of the mesh that each axis of a tensor in Keras' layout is divided along."""
    split = split_axis(tensor)
    named = tuple(MODEL if n == split else None for n in range(len(tensor.shape)))
    return named[::-1] if tensor.op(Scheme.HF, Scheme.KERAS) is Op.TRANSPOSE else named


def part_size(tensor: Tensor, mesh: Mesh) -> int:
    """Number of elements of a tensor that one device holds."""
    return tensor.size // (1 if split_axis(tensor) is None else mesh.model)


def check_divides(config: GPTJConfig, mesh: Mesh) -> None:
    """See that every device gets the same part of each tensor, and whole heads.

    Raises:
        ConfigError: it does not; with the tensors, their dimensions, and the mesh.
    """
    # Many tensors have the same dimension: one speaks for all of them.
    undivided: dict[int, list[str]] = {}
    for tensor in table(config):
        axis = split_axis(tensor)
        if axis is not None and tensor.shape[axis] % mesh.model:
            undivided.setdefault(tensor.shape[axis], []).append(f"{tensor.hf} (axis {axis})")
    problems = [f"the {config.n_head} heads"] if config.n_head % mesh.model else []
    for size, (first, *others) in undivided.items():
        problems.append(f"the {size} of {first}" + f" and {len(others)} more" * bool(others))
    if problems:
        raise ConfigError(
            f"a mesh of {mesh} devices (batch × model): {mesh.model} does not divide "
            + ", ".join(problems),
            hint="choose another second number of runconfig.mesh; a vocabulary is given more rows "
            "by `gptj convert --vocab-size`",
        )

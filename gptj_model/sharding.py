"""How a model that one device cannot hold is divided among several; numpy and stdlib only.

The devices form a mesh of two axes: each batch is divided along `BATCH`, tensors along `MODEL`.
A device holds its part of every tensor that has a `split` in the table, and a copy of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from gptj_model.op import Op
from gptj_model.tensors import Scheme, Tensor, table

BATCH, MODEL = "batch", "model"


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


def axes(tensor: Tensor) -> tuple[str | None, ...]:
    """The axis of the mesh that each axis of a tensor in Keras' layout is divided along."""
    named = tuple(MODEL if n == tensor.split else None for n in range(len(tensor.shape)))
    return named[::-1] if tensor.op(Scheme.HF, Scheme.KERAS) is Op.TRANSPOSE else named


def part_size(tensor: Tensor, mesh: Mesh) -> int:
    """Number of elements of a tensor that one device holds."""
    return tensor.size // (1 if tensor.split is None else mesh.model)


def check_divides(config: GPTJConfig, mesh: Mesh) -> None:
    """See that every device gets the same part of each tensor, and whole heads.

    Raises:
        ConfigError: it does not; with the tensors, their dimensions, and the mesh.
    """
    # Many tensors have the same dimension: one speaks for all of them.
    undivided: dict[int, list[str]] = {}
    for tensor in table(config):
        axis = tensor.split
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

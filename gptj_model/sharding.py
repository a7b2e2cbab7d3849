"""How a model is divided among devices; numpy and the standard library only.

The devices form a mesh of two axes: each batch is divided along `BATCH`, tensors along `MODEL`. A
device holds its part of every tensor that has a `split` in the table, and a copy of the others.
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
    """Numbers of devices along each axis."""

    batch: int
    model: int

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.batch * self.model

    def __str__(self) -> str:
        return f"{self.batch} × {self.model}"


def axes(tensor: Tensor) -> tuple[str | None, ...]:
    """Return the mesh axis that each axis of a tensor in Keras' layout is divided along, or
    None."""
    named = tuple(MODEL if n == tensor.split else None for n in range(len(tensor.shape)))
    return named[::-1] if tensor.op(Scheme.HF, Scheme.KERAS) is Op.TRANSPOSE else named


def part_size(tensor: Tensor, mesh: Mesh) -> int:
    """Return the number of elements of a tensor that one device holds."""
    return tensor.size // (1 if tensor.split is None else mesh.model)


def check_divides(config: GPTJConfig, mesh: Mesh) -> None:
    """Check that every device gets an equal part of each tensor, and whole heads.

    Raises:
        ConfigError: the mesh does not divide the model evenly; names tensors, dimensions and mesh.
    """
    # Many tensors share a dimension, so one is named for all of them.
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
            hint="choose another second number for runconfig.mesh, or add rows to the vocabulary "
            "with `gptj convert --vocab-size`",
        )

"""How a model is divided among devices; numpy and the standard library only.

The devices form a mesh of two axes: each batch is divided along `BATCH`, tensors along `MODEL`. A
device holds its part of every tensor that has a `split` in the table, and a copy of the others
unless the weights are sharded along `BATCH` as well.
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


def axes(tensor: Tensor, mesh: Mesh, *, shard_weights: bool = False) -> tuple[str | None, ...]:
    """Return the mesh axis that each axis of a tensor in Keras' layout is divided along, or None.

    Args:
        tensor: row of the table or of an adapter.
        mesh: mesh of the devices.
        shard_weights: whether the largest other axis that `mesh.batch` divides is divided along
            `BATCH`, so that no device holds what another one has (ZeRO-3, arXiv 1910.02054).
    """
    named: list[str | None] = [
        MODEL if n == tensor.split else None for n in range(len(tensor.shape))
    ]
    if shard_weights:
        free = [n for n, name in enumerate(named) if not name and tensor.shape[n] % mesh.batch == 0]
        if free:
            named[max(free, key=lambda n: tensor.shape[n])] = BATCH
    transposed = tensor.op(Scheme.HF, Scheme.KERAS) is Op.TRANSPOSE
    return tuple(named[::-1] if transposed else named)


def part_size(tensor: Tensor, mesh: Mesh, *, shard_weights: bool = False) -> int:
    """Return the number of elements of a tensor that one device holds."""
    named = axes(tensor, mesh, shard_weights=shard_weights)
    parts = (mesh.model if MODEL in named else 1) * (mesh.batch if BATCH in named else 1)
    return tensor.size // parts


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

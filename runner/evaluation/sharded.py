"""Evaluation of a model on JAX's devices.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import cast

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.plan import match
from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from gptj_model.network.device_arrays import DeviceArrays
from gptj_model.network.loss import TokenLoss
from gptj_model.network.stacked import StackedModel, Weights
from gptj_model.network.weights import read_part
from gptj_model.sharding import BATCH, MODEL, Mesh, axes
from gptj_model.tensors import table
from runner.config.mesh import jax_devices, mesh_of
from runner.config.params import Params
from runner.data.reading.input_fn import ALL_ROWS, Batch


class ShardedEvaluator:
    """Evaluator of the weights as they are at each batch.

    Args:
        model: model as a function of its weights.
        weights: returns the weights.
        place: sharding of a batch.
    """

    def __init__(
        self, model: StackedModel, weights: Callable[[], Weights], place: NamedSharding
    ) -> None:
        self._weights = weights
        self._place = place
        whole = NamedSharding(place.mesh, PartitionSpec())
        self._run = jax.jit(model.losses, out_shardings=whole)

    def losses(self, batches: Iterable[Batch]) -> Iterator[TokenLoss]:
        """Implement `Evaluator`."""
        for batch in batches:
            yield self._run(self._weights(), [spread(part_BT, self._place) for part_BT in batch])


def checkpoint_evaluator(
    checkpoint: Checkpoint, config: GPTJConfig, params: Params | None
) -> ShardedEvaluator:
    """Return the evaluator of a checkpoint in float32.

    Args:
        checkpoint: open checkpoint, which is read here.
        config: configuration to compute with.
        params: parameters that name a mesh; None means one device.

    Raises:
        ConfigError: as `device_mesh` raises it.
        GptjError: as `match` raises it.
    """
    match(checkpoint)
    mesh = device_mesh(params) if params else _mesh_of_devices(Mesh(1, 1))
    place = partial(axes, mesh=Mesh(*mesh.devices.shape))
    weights = DeviceArrays(table(config), mesh, axes=place)
    for row in weights:
        weights.put(row, partial(read_part, row, checkpoint.source, checkpoint.scheme))
    model = StackedModel(config, dtype="float32", recompute=False, devices=mesh.devices.size)
    by_sequence = NamedSharding(mesh, PartitionSpec(BATCH))
    return ShardedEvaluator(model, lambda: weights.values, by_sequence)


def device_mesh(params: Params) -> jax.sharding.Mesh:
    """Return the devices in the shape that the parameters ask for.

    Raises:
        ConfigError: the mesh does not divide model or batch, or there are too few devices.
    """
    devices, processes = jax_devices(), jax.process_count()
    mesh = mesh_of(params, lambda: (processes, len(devices) // processes))
    if mesh.size > len(devices):
        raise ConfigError(
            f"runconfig.mesh is {mesh}, {mesh.size} devices, and JAX has {len(devices)} "
            f"({devices[0].platform})",
            hint="choose a smaller mesh; to try one without such devices, set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={mesh.size}",
        )
    if processes > 1 and mesh.size < len(devices):
        raise ConfigError(
            f"runconfig.mesh is {mesh}, {mesh.size} devices, and the {processes} processes have "
            f"{len(devices)}, of which each must compute",
            hint="choose a mesh of all devices, or start fewer processes",
        )
    return _mesh_of_devices(mesh)


def rows_here(mesh: jax.sharding.Mesh, batch_size: int) -> slice:
    """Return the rows of a batch that the devices of this process compute."""
    if jax.process_count() == 1:
        return ALL_ROWS
    place = NamedSharding(mesh, PartitionSpec(BATCH))
    parts = place.addressable_devices_indices_map((batch_size,)).values()
    found = [part[0].indices(batch_size) for part in parts if part]
    return slice(min(start for start, _, _ in found), max(stop for _, stop, _ in found))


def spread(local: np.ndarray, place: NamedSharding, axis: int = 0) -> jax.Array:
    """Return an array over the devices of all processes, each of which has its rows of the batch.

    Args:
        local: the rows of this process along `axis`, as `rows_here` chooses them.
        place: sharding of the whole array, whose mesh has the axis `BATCH`.
        axis: axis of the batch.
    """
    parts = place.mesh.shape[BATCH]
    mesh = cast(jax.sharding.Mesh, place.mesh)
    first, last, _ = rows_here(mesh, parts).indices(parts)
    rows = local.shape[axis] // (last - first)  # along one device
    shape = (*local.shape[:axis], rows * parts, *local.shape[axis + 1 :])

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[axis].indices(shape[axis])
        own = slice(start - first * rows, stop - first * rows)
        return local[(*index[:axis], own, *index[axis + 1 :])]

    return jax.make_array_from_callback(shape, place, part)


def _mesh_of_devices(mesh: Mesh) -> jax.sharding.Mesh:
    devices = np.reshape(jax.devices()[: mesh.size], (mesh.batch, mesh.model))
    return jax.sharding.Mesh(devices, (BATCH, MODEL))

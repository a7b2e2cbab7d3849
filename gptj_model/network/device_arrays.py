"""Rows of the table or of an adapter as parts of large arrays on JAX's devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptj_model.network.stacked import stack_name, stacks
from gptj_model.tensors import Scheme, Tensor

#: From an index of the parts of a row to the values there; see `jax.make_array_from_callback`.
ReadPart = Callable[[tuple[slice, ...]], np.ndarray]


class DeviceArrays:
    """Arrays on the devices of a mesh, one for each stack of rows.

    Args:
        rows: rows, all blocks of a stack or none.
        mesh: mesh of devices.
        axes: returns the mesh axis that each axis of a row in Keras' layout is divided along.
        dtype: returns the dtype that a row is kept in.
        fill: value of every element at first.
    """

    def __init__(
        self,
        rows: Iterable[Tensor],
        mesh: jax.sharding.Mesh,
        *,
        axes: Callable[[Tensor], tuple[str | None, ...]],
        dtype: Callable[[Tensor], Any] = lambda tensor: jnp.float32,
        fill: float = 0.0,
    ) -> None:
        self.rows = stacks(rows)
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        """Shape, dtype and place of each array; nothing is allocated for it."""
        self._fill = fill
        self._row_sharding: dict[str, NamedSharding] = {}
        self._whole = NamedSharding(mesh, PartitionSpec())
        for name, members in self.rows.items():
            first = members[0]
            blocks = (len(members),) if first.block is not None else ()
            spec = axes(first)
            self._row_sharding[name] = NamedSharding(mesh, PartitionSpec(*spec))
            sharding = NamedSharding(mesh, PartitionSpec(*(None for _ in blocks), *spec))
            shape = (*blocks, *first.shape_in(Scheme.KERAS))
            self.shapes[name] = jax.ShapeDtypeStruct(shape, dtype(first), sharding=sharding)
        self._values: dict[str, jax.Array] | None = None

    @property
    def shardings(self) -> dict[str, Any]:
        """Place of each array."""
        return {name: shape.sharding for name, shape in self.shapes.items()}

    @property
    def values(self) -> dict[str, jax.Array]:
        """The arrays; they are allocated when they are asked for first."""
        if self._values is None:
            fill = jax.jit(
                lambda: {n: jnp.full(s.shape, self._fill, s.dtype) for n, s in self.shapes.items()},
                out_shardings=self.shardings,
            )
            self._values = fill()
        assert self._values is not None
        return self._values

    def update(self, values: dict[str, jax.Array]) -> None:
        """Replace arrays."""
        self.values.update(values)

    def is_stacked(self, name: str) -> bool:
        """Return whether an array has one row for each block."""
        return self.rows[name][0].block is not None

    def by_row(self, name: str, value: Callable[[Tensor], Any]) -> Any:
        """Return a value of every row of an array, one after the other."""
        return jnp.asarray([value(row) for row in self.rows[name]])

    def row(self, tensor: Tensor) -> DeviceRow:
        """Return one row."""
        return DeviceRow(self, tensor)

    def __iter__(self) -> Iterator[Tensor]:
        return (row for rows in self.rows.values() for row in rows)

    def put(self, tensor: Tensor, read: ReadPart) -> None:
        """Set a row; every process reads the parts of its own devices."""
        name, values = stack_name(tensor), self.values
        shape, sharding = tensor.shape_in(Scheme.KERAS), self._row_sharding[name]
        dtype = values[name].dtype

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return np.ascontiguousarray(read(index), dtype)

        row = jax.make_array_from_callback(shape, sharding, part)
        values[name] = row if tensor.block is None else _set(values[name], row, tensor.block)

    def get(self, tensor: Tensor) -> np.ndarray:
        """Return a row, float32 in Keras' layout; every process must ask for the same one."""
        array = self.values[stack_name(tensor)]
        block = None if tensor.block is None else np.int32(tensor.block)
        # The result, a copy, is dropped: JAX keeps a host copy of every array that was read.
        return np.asarray(_get(self._whole)(array, block).addressable_data(0))


class DeviceRow:
    """One row, as an array for numpy and as a variable that can be assigned."""

    dtype = "float32"

    def __init__(self, arrays: DeviceArrays, tensor: Tensor) -> None:
        self.shape = tensor.shape_in(Scheme.KERAS)
        self._arrays = arrays
        self._tensor = tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._arrays.get(self._tensor), dtype)

    def assign(self, values: Any) -> None:
        """Set the row to values in Keras' layout."""
        self._arrays.put(self._tensor, lambda index: np.asarray(values)[index])

    def read(self, read: ReadPart) -> None:
        """Set the row to the parts that a function reads."""
        self._arrays.put(self._tensor, read)


@partial(jax.jit, donate_argnums=0)
def _set(stack: Any, row: Any, block: int) -> Any:
    return jax.lax.dynamic_update_index_in_dim(stack, row, block, 0)


@cache
def _get(whole: NamedSharding) -> Callable[[jax.Array, Any], jax.Array]:
    """Return a compiled function that copies a row to every device, in float32."""

    @partial(jax.jit, out_shardings=whole)
    def get(array: Any, block: Any) -> Any:
        row = array if block is None else jax.lax.dynamic_index_in_dim(array, block, 0, False)
        return row.astype(jnp.float32)

    return get

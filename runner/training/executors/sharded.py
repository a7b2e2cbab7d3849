"""Training of a model that is divided among devices with its slots, by one program on JAX.

Arrays are placed by the `split` column of the table; the compiler finds out what the devices must
exchange.

Shape suffixes: n batches of an update, B batch, T time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from typing_extensions import override

from gptj_model.config import GPTJConfig
from gptj_model.network.device_arrays import DeviceArrays
from gptj_model.network.stacked import StackedModel, stack_name
from gptj_model.network.weights import read_part
from gptj_model.sharding import BATCH, Mesh, axes
from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import Role, Scheme, Tensor, table
from runner.config.params import Params
from runner.config.trainable import model_rows, trainable_rows
from runner.data.reading.input_fn import Batch
from runner.evaluation.evaluate import Evaluator
from runner.evaluation.flash_attention import chosen_attention
from runner.evaluation.sharded import ShardedEvaluator, device_mesh, rows_here, spread
from runner.training.devices.distribution import Workers
from runner.training.executors.executor import Executor, StepResult
from runner.training.executors.stacked_update import StackedUpdate
from runner.training.run import checkpoints
from runner.training.update.rule import BetaPowers, UpdateRule
from runner.training.weights.initialize import initialization_seed, initialize
from runner.training.weights.lora import Adapter

#: Number of seeds of JAX's generators, which have 32 bits.
_SEEDS = 2**32
#: Number that tells the random bits of an update from those of dropout masks.
_OF_UPDATE = 1


class ShardedExecutor(Executor):
    """Executor of a model whose weights and slots are divided among devices.

    Args:
        config: configuration of the model.
        params: parameters of the run.
        model_dir: folder of the run.
        workers: processes that compute together; the first one writes checkpoints.

    Raises:
        ConfigError: the mesh does not divide model or batch, or there are too few devices; see also
            `trainable_rows` and `chosen_attention`.
        TrainingFault: as `chosen_attention` raises it.
    """

    @override
    def __init__(
        self, config: GPTJConfig, params: Params, model_dir: Path, workers: Workers
    ) -> None:
        self._config = config
        self._params = params
        self._model_dir = model_dir
        self._workers = workers
        self.trained = trainable_rows(config, params)
        self._mesh = device_mesh(params)
        self.devices = self._mesh.devices.size
        lora = params.model.lora.lora if params.model.lora else None
        self._model = StackedModel(
            config,
            dtype=params.dtype_policy,
            recompute=params.model.recompute,
            lora=lora,
            devices=self.devices,
            constrain=partial(
                jax.lax.with_sharding_constraint, shardings=self._sharding(BATCH, None, None)
            ),
            attend=chosen_attention(config, params),
        )
        self._rule = UpdateRule(params.optimizer, jnp)
        self._powers = BetaPowers(params.optimizer)
        self._lora_rows = dict(lora.rows(config)) if lora else {}
        rows = model_rows(config, params)
        in_update = {stack_name(t) for t in self.trained}
        self._weights = self._arrays(t for t in rows if stack_name(t) in in_update)
        self._others = self._arrays(
            (t for t in rows if stack_name(t) not in in_update), dtype=self._dtype_of_others
        )
        fills = list(self._rule.slots(self.trained[0]).values())
        dtype = jnp.dtype(params.optimizer.moments_dtype)
        self._slots = [
            self._arrays(self._weights, dtype=lambda _: dtype, fill=fill) for fill in fills
        ]
        self._apply = StackedUpdate(self._rule, self._weights, self.trained)
        whole = self._sharding()
        self._update = jax.jit(
            self._run,
            donate_argnums=(0, 1),
            out_shardings=(
                self._weights.shardings,
                [s.shardings for s in self._slots],
                whole,
                whole,
            ),
        )

    @property
    def arrays(self) -> tuple[DeviceArrays, DeviceArrays]:
        """Weights on the devices: stacks with a trained row, and all others."""
        return self._weights, self._others

    @property
    def placement(self) -> str:
        """Where weights and slots are, read from the arrays themselves."""
        held = Counter[Any]()
        for arrays in (self._weights, self._others, *self._slots):
            for array in arrays.values.values():
                for shard in array.addressable_shards:
                    held[shard.device] += shard.data.nbytes
        shape, first = " × ".join(map(str, self._mesh.devices.shape)), self._mesh.devices.flat[0]
        return (
            f"{shape} devices (batch × model, {first.device_kind}) hold {max(held.values()):,} "
            "bytes of weights and slots each"
        )

    @override
    def rows(self, batch_size: int) -> slice:
        return rows_here(self._mesh, batch_size)

    @override
    def load(self, source: TensorSource, scheme: Scheme) -> None:
        rows = self._rows
        for tensor in table(self._config):
            rows[tensor.hf].read(partial(read_part, tensor, source, scheme))
        self._initialize_adapter()

    @override
    def initialize(self) -> None:
        initialize(self._rows, self._config, self._params)
        self._initialize_adapter()

    @override
    def load_adapter(self, values: Mapping[str, np.ndarray]) -> None:
        adapter = self._adapter
        assert adapter, "checked"
        adapter.begin(values)

    @override
    def load_state(self, source: TensorSource, step: int) -> str | None:
        if adapter := self._adapter:
            if not adapter.load(source):
                return "no such adapter: training starts with a new one"
            adapter.load_kernels(source)
        if any(name not in source.tensors for t in self.trained for name in self._rule.slots(t)):
            return f"no slots of {self._params.optimizer.optimizer_type}: they start from zero"
        for tensor in self.trained:
            for arrays, name in zip(self._slots, self._rule.slots(tensor), strict=True):
                arrays.row(tensor).assign(read_tensor(source, name))
        self._powers.load(source, step)
        return None

    @override
    def step(
        self, group: Sequence[Batch], draw: tuple[int, int], scale: float, rate: float
    ) -> StepResult:
        slots = [arrays.values for arrays in self._slots]
        arguments = self._arguments(group, draw, scale, rate)
        weights, slots, loss, norm = self._update(
            self._weights.values, slots, self._others.values, *arguments
        )
        self._weights.update(weights)
        for arrays, values in zip(self._slots, slots, strict=True):
            arrays.update(values)
        return StepResult(float(loss), float(norm))

    def compiled(self, batch: Batch) -> Any:
        """Return JAX's compiled program of a step with such batches; nothing is allocated."""
        count, place = self._params.optimizer.grad_accum_steps, self._sharding(None, BATCH)
        batches_nBT = [
            jax.ShapeDtypeStruct((count, *part_BT.shape), part_BT.dtype, sharding=place)
            for part_BT in batch
        ]
        slots = [arrays.shapes for arrays in self._slots]
        scalar = jax.ShapeDtypeStruct((), np.float32)
        seed = jax.ShapeDtypeStruct((2,), np.uint32)
        lowered = self._update.lower(
            self._weights.shapes, slots, self._others.shapes, seed, batches_nBT, *[scalar] * 3
        )
        return lowered.compile()

    @override
    def advance(self) -> None:
        self._powers.advance()

    @override
    def save(self, step: int, state: Mapping[str, np.ndarray], *, stays: bool) -> Path:
        """Save the checkpoint of a step; one tensor at a time is gathered from the devices."""
        rows = self._rows
        tensors: dict[str, Any] = {t.tf: rows[t.hf] for t in table(self._config)}
        for tensor in self.trained:
            names = self._rule.slots(tensor)
            tensors |= {
                name: arrays.row(tensor) for arrays, name in zip(self._slots, names, strict=True)
            }
        tensors |= self._powers.scalars()
        if adapter := self._adapter:
            tensors |= adapter.tensors()
        limit = self._params.runconfig.keep_checkpoint_max or 0
        if self._workers.index:
            for tensor in tensors.values():
                np.asarray(tensor)  # gathered together with the first process, which writes it
            return checkpoints.prefix(self._model_dir, step)
        return checkpoints.save(self._model_dir, step, tensors | dict(state), keep=limit)

    @override
    def evaluator(self) -> Evaluator:
        return ShardedEvaluator(
            self._model, lambda: self._weights.values | self._others.values, self._sharding(BATCH)
        )

    @override
    def weights(self) -> Mapping[str, Any]:
        rows = self._rows
        return {t.hf: rows[t.hf] for t in table(self._config)}

    @override
    def close(self) -> None:
        """Do nothing: there are no files or threads."""

    @property
    def _rows(self) -> dict[str, Any]:
        """Every row by HF name."""
        return {t.hf: arrays.row(t) for arrays in (self._weights, self._others) for t in arrays}

    def _arrays(self, rows: Iterable[Tensor], **options: Any) -> DeviceArrays:
        mesh = Mesh(*self._mesh.devices.shape)
        shard = self._params.runconfig.shard_weights
        place = partial(axes, mesh=mesh, shard_weights=shard)
        return DeviceArrays(rows, self._mesh, axes=place, **options)

    def _dtype_of_others(self, tensor: Tensor) -> Any:
        """Return the dtype of a weight that is not trained."""
        lora = self._params.model.lora
        is_vector = tensor.role in (Role.GAIN, Role.BIAS)
        return jnp.dtype("float32" if is_vector or not lora else lora.base_dtype)

    def _initialize_adapter(self) -> None:
        if adapter := self._adapter:
            adapter.initialize(initialization_seed(self._params))

    @property
    def _adapter(self) -> Adapter | None:
        if not (section := self._params.model.lora):
            return None
        rows = self._rows
        added = {row: rows[row.hf] for pair in self._lora_rows.values() for row in pair}
        return Adapter(section.lora, {k: rows[k.hf] for k in self._lora_rows}, added)

    def _sharding(self, *spec: str | None) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec(*spec))

    def _arguments(
        self, group: Sequence[Batch], draw: tuple[int, int], scale: float, rate: float
    ) -> tuple[Any, ...]:
        """Return the arguments of `_run` behind weights and slots, on the devices."""
        columns = zip(*group, strict=True)
        place = self._sharding(None, BATCH)
        batches_nBT = [spread(np.stack(column), place, axis=1) for column in columns]
        seed = np.asarray([n % _SEEDS for n in draw], np.uint32)
        return seed, batches_nBT, np.float32(scale), np.float32(rate), self._powers.correction

    def _run(self, weights, slots, others, seed, batches_nBT, scale, rate, correction):
        """Return new weights and slots, mean loss and norm of one update. Traced, not run."""
        loss, gradients = self._gradients(weights, others, seed, batches_nBT, scale)
        key = jax.random.fold_in(seed, _OF_UPDATE)
        weights, slots, norm = self._apply(weights, slots, gradients, scale, rate, correction, key)
        return weights, slots, loss, norm

    def _gradients(self, weights, others, seed, batches_nBT, scale):
        """Return mean loss and mean gradients over the batches, times `scale`."""
        count = len(batches_nBT[0])

        def gradients_of(n, batch):
            key = jax.random.fold_in(seed, 2 + n)
            return self._model.gradients(weights, others, batch, key, scale / count)

        if count == 1:
            return gradients_of(0, [part[0] for part in batches_nBT])

        def add(sums, row):
            loss, gradients = gradients_of(*row)
            return {k: sums[k] + g.astype(jnp.float32) for k, g in gradients.items()}, loss

        zeros = {k: jnp.zeros_like(w, jnp.float32) for k, w in weights.items()}
        sums, losses = jax.lax.scan(add, zeros, (jnp.arange(count), batches_nBT))
        return jnp.mean(losses), sums

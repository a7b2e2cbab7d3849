"""Training of a model that is divided among devices with its slots, by one program on JAX.

Keras places the variables (`keras.distribution.ModelParallel`, by the `split` column of the table);
the compiler finds out what the devices must exchange.

Shape suffixes: n batches of an update, B batch, T time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from typing_extensions import override

from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from gptj_model.network.loss import TokenLoss
from gptj_model.network.model import GPTJ
from gptj_model.network.weights import load_weights, variables
from gptj_model.sharding import BATCH, MODEL, axes
from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import Scheme, table
from runner.config.params import Params
from runner.config.trainable import trainable_rows
from runner.data.reading.input_fn import Batch
from runner.evaluation.evaluate import Evaluator
from runner.training.devices.backend import mesh_of
from runner.training.executors.executor import Executor, StepResult
from runner.training.run import checkpoints
from runner.training.update.rule import BetaPowers, UpdateRule
from runner.training.weights.initialize import initialize
from runner.training.weights.lazy_array import LazyArray

#: Number of seeds of JAX's generators, which have 32 bits.
_SEEDS = 2**32


class ShardedExecutor(Executor):
    """Executor of a model whose weights and slots are divided among devices.

    Args:
        config: configuration of the model.
        params: parameters of the run.
        model_dir: folder of the run.

    Raises:
        ConfigError: the mesh does not divide model or batch, or there are too few devices; see also
            `trainable_rows`.
    """

    @override
    def __init__(self, config: GPTJConfig, params: Params, model_dir: Path) -> None:
        self._config = config
        self._params = params
        self._model_dir = model_dir
        self.trained = trainable_rows(config, params)
        self._mesh = _device_mesh(params)
        self.devices = self._mesh.devices.size
        with _distribution(config, self._mesh).scope():
            self._model = GPTJ(config, dtype=params.dtype_policy, recompute=params.model.recompute)
        self._variables = variables(self._model)
        self._rule = UpdateRule(params.optimizer)
        self._powers = BetaPowers(params.optimizer)
        self._slots = {
            t: [jnp.full(v.shape, fill, jnp.float32, device=v.value.sharding) for fill in fills]
            for t in self.trained
            for v, fills in [(self._variables[t.hf], self._rule.slots(t).values())]
        }
        whole = self._sharding()
        placed = {t: self._variables[t.hf].value.sharding for t in self.trained}
        slots = {t.tf: [placed[t]] * len(old) for t, old in self._slots.items()}
        weights = {t.hf: sharding for t, sharding in placed.items()}
        self._update = jax.jit(
            self._run, donate_argnums=(0, 1), out_shardings=(weights, slots, whole, whole)
        )

    @property
    def placement(self) -> str:
        """Where weights and slots are, read from the arrays themselves."""
        slots = (array for old in self._slots.values() for array in old)
        held = Counter[Any]()
        for array in (*(v.value for v in self._variables.values()), *slots):
            for shard in array.addressable_shards:
                held[shard.device] += shard.data.nbytes
        shape, first = " × ".join(map(str, self._mesh.devices.shape)), self._mesh.devices.flat[0]
        return (
            f"{shape} devices (batch × model, {first.device_kind}) hold {max(held.values()):,} "
            "bytes of weights and slots each"
        )

    @override
    def load(self, source: TensorSource, scheme: Scheme) -> None:
        load_weights(self._model, source, scheme)

    @override
    def initialize(self) -> None:
        initialize(self._model, self._params)

    @override
    def load_adapter(self, values: Mapping[str, np.ndarray]) -> None:
        """Refuse an adapter: all weights are trained here."""
        raise NotImplementedError

    @override
    def load_state(self, source: TensorSource, step: int) -> str | None:
        if any(name not in source.tensors for t in self.trained for name in self._rule.slots(t)):
            return f"no slots of {self._params.optimizer.optimizer_type}: they start from zero"
        for tensor, old in self._slots.items():
            for n, name in enumerate(self._rule.slots(tensor)):
                values = read_tensor(source, name).astype(np.float32, copy=False)
                old[n] = jax.device_put(values, old[n].sharding)
        self._powers.load(source, step)
        return None

    @override
    def step(
        self, group: Sequence[Batch], draw: tuple[int, int], scale: float, rate: float
    ) -> StepResult:
        arguments = self._arguments(group, draw, scale, rate)
        weights, slots, loss, norm = self._update(*arguments)
        for tensor in self.trained:
            self._variables[tensor.hf].assign(weights[tensor.hf])
            self._slots[tensor] = slots[tensor.tf]
        return StepResult(float(loss), float(norm))

    def compiled(self, batch: Batch) -> Any:
        """Return JAX's compiled program of a step with such batches; nothing runs."""
        group = [batch] * self._params.optimizer.grad_accum_steps
        return self._update.lower(*self._arguments(group, (0, 0), 1.0, 1.0)).compile()

    @override
    def advance(self) -> None:
        self._powers.advance()

    @override
    def save(self, step: int, state: Mapping[str, np.ndarray], *, stays: bool) -> Path:
        """Save the checkpoint of a step; one tensor at a time is gathered from the devices."""
        found = {t.tf: self._variables[t.hf].value for t in table(self._config)}
        for tensor, values in self._slots.items():
            found |= dict(zip(self._rule.slots(tensor), values, strict=True))
        tensors: dict[str, Any] = {name: _gathered(array) for name, array in found.items()}
        tensors |= {**self._powers.scalars(), **state}
        limit = self._params.runconfig.keep_checkpoint_max or 0
        return checkpoints.save(self._model_dir, step, tensors, keep=limit)

    @override
    def evaluator(self) -> Evaluator:
        return _Evaluator(self._model, self._variables, self._sharding(BATCH))

    @override
    def weights(self) -> Mapping[str, Any]:
        return {name: _gathered(v.value) for name, v in self._variables.items()}

    @override
    def close(self) -> None:
        """Do nothing: there are no files or threads."""

    def _sharding(self, *spec: str | None) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec(*spec))

    def _arguments(
        self, group: Sequence[Batch], draw: tuple[int, int], scale: float, rate: float
    ) -> tuple[Any, ...]:
        """Return the arguments of `_run` on the devices; it overwrites the first two."""
        columns = zip(*group, strict=True)
        stacked = [np.stack([np.asarray(part_BT) for part_BT in column]) for column in columns]
        batches_nBT = jax.device_put(stacked, self._sharding(None, BATCH))
        seed = np.asarray([n % _SEEDS for n in draw], np.uint32)
        slots = {t.tf: old for t, old in self._slots.items()}
        scalars = (np.float32(scale), np.float32(rate), self._powers.correction)
        weights, rest = self._weights()
        return weights, slots, rest, seed, batches_nBT, *scalars

    def _weights(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the values of trained weights and of the others, by HF name."""
        values = {name: v.value for name, v in self._variables.items()}
        return {t.hf: values.pop(t.hf) for t in self.trained}, values

    def _run(self, weights, slots, rest, seed, batches_nBT, scale, rate, correction):
        """Return new weights and slots, mean loss and norm of one update. Traced, not run."""
        loss, gradients = self._gradients(weights, rest, seed, batches_nBT, scale)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in gradients.values()))
        finite = jnp.isfinite(norm)
        for tensor in self.trained:
            w, old = weights[tensor.hf], slots[tensor.tf]
            gradient = self._rule.clipped(gradients[tensor.hf], norm)
            new = self._rule.take(gradient, old or [w], rate)
            if old:
                moved = self._rule.move(w, new, rate, correction, self._rule.decay(tensor))
            else:
                (moved,), new = new, []
            weights[tensor.hf] = jnp.where(finite, moved, w)
            slots[tensor.tf] = [jnp.where(finite, n, o) for n, o in zip(new, old, strict=True)]
        return weights, slots, loss, norm

    def _gradients(self, weights, rest, seed, batches_nBT, scale):
        """Return loss and gradients, averaged over the batches; the gradients are unscaled, in
        float32."""
        count = len(batches_nBT[0])

        def scaled_loss(weights, seed, batch):
            loss, seed = self._loss(weights | rest, seed, batch)
            return loss * (scale / count), (loss, seed)

        def add(carry, batch):
            sums, seed = carry
            gradients, (loss, seed) = jax.grad(scaled_loss, has_aux=True)(weights, seed, batch)
            unscaled = {k: g.astype(jnp.float32) * (1 / scale) for k, g in gradients.items()}
            return ({k: sums[k] + g for k, g in unscaled.items()} if sums else unscaled, seed), loss

        if count == 1:
            (gradients, _), loss = add(({}, seed), [part[0] for part in batches_nBT])
            return loss, gradients
        zeros = {k: jnp.zeros_like(w, jnp.float32) for k, w in weights.items()}
        (gradients, _), losses = jax.lax.scan(add, (zeros, seed), batches_nBT)
        return jnp.mean(losses), gradients

    def _loss(self, values, seed, batch):
        """Return the token mean of one batch, and the new state of the seed."""
        ids_BT, ignored_BT, labels_BT = batch
        state = self._model.seeds.state
        pairs = [(v, values[name]) for name, v in self._variables.items()]
        with keras.StatelessScope(state_mapping=[*pairs, (state, seed)]) as scope:
            sums = self._model.token_loss(
                ids_BT, labels_BT, ignored_BT, training=True, devices=self.devices
            )
            return sums.mean, scope.get_current_value(state)


class _Evaluator:
    """Evaluator of the weights as they are at each batch."""

    def __init__(
        self, model: GPTJ, variables: Mapping[str, Any], batch_sharding: NamedSharding
    ) -> None:
        self._variables = variables
        self._sharding = batch_sharding

        @jax.jit
        def run(values, ids_BT, ignored_BT, labels_BT):
            pairs = [(v, values[name]) for name, v in variables.items()]
            with keras.StatelessScope(state_mapping=pairs):
                devices = batch_sharding.mesh.size
                return model.token_loss(ids_BT, labels_BT, ignored_BT, devices=devices)

        self._run = run

    def losses(self, batches: Iterable[Batch]) -> Iterator[TokenLoss]:
        """Implement `Evaluator`."""
        for batch in batches:
            values = {name: v.value for name, v in self._variables.items()}
            yield self._run(values, *jax.device_put(list(map(np.asarray, batch)), self._sharding))


def _gathered(array: jax.Array) -> LazyArray:
    """Return an array that is gathered from its devices when it is read.

    JAX keeps a host copy of every array that was read, for as long as the array lives.
    """

    def gather() -> np.ndarray:
        parts = [shard.data for shard in array.addressable_shards]
        return np.asarray(
            jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
        )

    return LazyArray(array.shape, gather, dtype=array.dtype)


def _device_mesh(params: Params) -> jax.sharding.Mesh:
    """Return the devices in the shape that the parameters ask for."""
    devices = jax.devices()
    mesh = mesh_of(params, lambda: len(devices))
    if mesh.size > len(devices):
        raise ConfigError(
            f"runconfig.mesh is {mesh}, {mesh.size} devices, and JAX has {len(devices)} "
            f"({devices[0].platform})",
            hint="choose a smaller mesh; to try one without such devices, set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={mesh.size}",
        )
    shape = (mesh.batch, mesh.model)
    return jax.sharding.Mesh(np.reshape(devices[: mesh.size], shape), (BATCH, MODEL))


def _distribution(config: GPTJConfig, mesh: jax.sharding.Mesh) -> Any:
    """Return the distribution that places each variable by its Keras path."""
    shape = (mesh.shape[BATCH], mesh.shape[MODEL])
    names = [f"{d.platform}:{d.id}" for d in mesh.devices.flat]
    device_mesh = keras.distribution.DeviceMesh(shape, (BATCH, MODEL), names)
    layouts = keras.distribution.LayoutMap(device_mesh)
    for tensor in table(config):
        layouts[f"gptj/{tensor.keras}"] = axes(tensor)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name=BATCH)

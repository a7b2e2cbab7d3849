"""GPT-J on JAX as a function of its weights, with one compiled body for all blocks.

The weights of the blocks are stacked, row `i` of a stack being block `i`, and a loop runs through
the rows (`jax.lax.scan`). So compiling takes the same time for 2 blocks as for 28, and devices hold
large arrays rather than many.

Shape suffixes: L blocks, B batch, T time, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras

from gptj_model.config import GPTJConfig
from gptj_model.lora import Lora
from gptj_model.network.array_type import Tensor as Array
from gptj_model.network.layers import Attend
from gptj_model.network.loss import TokenLoss, head_loss
from gptj_model.network.model import GPTJ
from gptj_model.network.weights import assigned_variables, enable_lora
from gptj_model.tensors import Tensor, table

#: Arrays by the name of their stack; see `stack_name`.
Weights = dict[str, Array]
#: From ids int32 (B, T), 1 on ignored labels float32 (B, T), and labels int32 (B, T).
Batch = Sequence[Array]


def stack_name(tensor: Tensor) -> str:
    """Return the name of the array that holds a tensor: its HF name, with `{i}` for the block."""
    if tensor.block is None:
        return tensor.hf
    return tensor.hf.replace(f".{tensor.block}.", ".{i}.", 1)


def stacks(rows: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """Return rows of the table or of an adapter by the array that holds them."""
    found: dict[str, list[Tensor]] = {}
    for row in rows:
        found.setdefault(stack_name(row), []).append(row)
    return found


class StackedModel:
    """Losses and gradients of GPT-J, as functions that JAX compiles.

    Args:
        config: configuration of the model.
        dtype: Keras dtype policy, such as "float32" or "mixed_bfloat16".
        recompute: whether the backward pass computes the activations of each block again, from the
            block's input. The gradients of its kernels then have the compute dtype, and so take
            half the memory where that has 16 bits.
        lora: adapter beside the weights, or None.
        devices: number of devices that share a batch; see `head_loss`.
        constrain: places hidden states (B, T, D) on the devices.
        attend: attention in place of the plain product; see `flash_attention`.
    """

    def __init__(
        self,
        config: GPTJConfig,
        *,
        dtype: str,
        recompute: bool,
        lora: Lora | None = None,
        devices: int = 1,
        constrain: Callable[[Array], Array] = lambda x_BTD: x_BTD,
        attend: Attend | None = None,
    ) -> None:
        self.config = config
        self._recompute = recompute
        self._devices = devices
        self._constrain = constrain
        one = replace(config, n_layer=1)
        with keras.StatelessScope(initialize_variables=False):
            self._model = GPTJ(one, dtype=dtype)
            added = enable_lora(self._model, lora, 0) if lora else {}
        self._model.blocks[0].attn.attend = attend
        rows = {t.hf: t for t in table(one)}
        found = assigned_variables(self._model, rows, prefix=self._model.name)
        named = {stack_name(rows[hf]): variable for hf, variable in found.items()}
        named |= {stack_name(row): variable for row, variable in added.items()}
        in_block = {stack_name(t) for t in (*rows.values(), *added) if t.block is not None}
        self._variables = named
        self._in_block = in_block

    def losses(self, weights: Weights, batch: Batch) -> TokenLoss:
        """Return the sums of a batch, without dropout."""
        ids_BT, ignored_BT, labels_BT = batch
        key = jnp.zeros(2, jnp.uint32)
        x_BTD = self._embed(self._outer(weights), ids_BT, key, training=False)
        block = self._block(ids_BT, training=False)
        x_BTD, _ = jax.lax.scan(
            lambda x, row: (block(row, x, key), None), x_BTD, self._inner(weights)
        )
        return self._head(self._outer(weights), x_BTD, labels_BT, ignored_BT, training=False)

    def gradients(
        self, trained: Weights, others: Weights, batch: Batch, key: Array, scale: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Return the mean loss of a batch, and the gradients of it times `scale`.

        Args:
            trained: weights whose gradients are wanted.
            others: all other weights.
            batch: ids, ignored and labels.
            key: seed of the dropout masks, uint32 (2,).
            scale: factor on the loss, for the gradients.
        """
        ids_BT, ignored_BT, labels_BT = batch
        run = self._recomputed if self._recompute else self._kept
        outer, fixed = self._outer(trained), self._outer(others)

        x_BTD, pull_embed = jax.vjp(
            lambda w: self._embed(fixed | w, ids_BT, key, training=True), outer
        )
        block = self._block(ids_BT, training=True)
        keys_L2 = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(self.config.n_layer) + 1)
        x_BTD, pull_blocks = run(block, self._inner(trained), self._inner(others), keys_L2, x_BTD)

        def head(w: Weights, x_BTD: Array) -> Array:
            return self._head(fixed | w, x_BTD, labels_BT, ignored_BT, training=True).mean

        loss, pull_head = jax.vjp(head, outer, x_BTD)
        of_head, d_x_BTD = pull_head(scale.astype(loss.dtype))
        of_blocks, d_x_BTD = pull_blocks(d_x_BTD)
        (of_embedding,) = pull_embed(d_x_BTD)
        return loss, of_blocks | {name: of_head[name] + of_embedding[name] for name in outer}

    def _kept(
        self, block: Any, trained: Weights, others: Weights, keys_L2: Array, x_BTD: Array
    ) -> tuple[Array, Callable[[Array], tuple[dict[str, Array], Array]]]:
        """Run the blocks and keep their activations; also return the backward pass."""

        def run(trained: Weights, x_BTD: Array) -> Array:
            def body(x_BTD: Array, row: Any) -> tuple[Array, None]:
                w, fixed, key = row
                return block(fixed | w, x_BTD, key), None

            return jax.lax.scan(body, x_BTD, (trained, others, keys_L2))[0]

        return jax.vjp(run, trained, x_BTD)

    def _recomputed(
        self, block: Any, trained: Weights, others: Weights, keys_L2: Array, x_BTD: Array
    ) -> tuple[Array, Callable[[Array], tuple[dict[str, Array], Array]]]:
        """Run the blocks and keep their inputs alone; also return the backward pass."""

        def forward(x_BTD: Array, row: Any) -> tuple[Array, Array]:
            w, fixed, key = row
            return block(fixed | w, x_BTD, key), x_BTD

        rows = trained, others, keys_L2
        x_BTD, inputs_LBTD = jax.lax.scan(forward, x_BTD, rows)

        def backward(d_x_BTD: Array, row: Any) -> tuple[Array, dict[str, Array]]:
            (w, fixed, key), x_BTD = row
            narrow = {name: self._narrow(value) for name, value in w.items()}
            _, pull = jax.vjp(lambda w, x: block(fixed | w, x, key), narrow, x_BTD)
            gradients, d_x_BTD = pull(d_x_BTD)
            return d_x_BTD, gradients

        def pull(d_x_BTD: Array) -> tuple[dict[str, Array], Array]:
            d_x_BTD, gradients = jax.lax.scan(backward, d_x_BTD, (rows, inputs_LBTD), reverse=True)
            return gradients, d_x_BTD

        return x_BTD, pull

    def _narrow(self, value: Array) -> Array:
        """Return a kernel in the compute dtype, to which the layer would cast it."""
        return value.astype(self._model.compute_dtype) if value.ndim > 1 else value

    def _embed(self, weights: Weights, ids_BT: Array, key: Array, *, training: bool) -> Array:
        with self._scope(weights, key):
            return self._constrain(self._model.embed(ids_BT, training=training))

    def _block(self, ids_BT: Array, *, training: bool) -> Callable[[Weights, Array, Array], Array]:
        """Return one block as a function of its weights, hidden states and seed."""
        context = self._model.context(ids_BT)
        (block,) = self._model.blocks

        def run(weights: Weights, x_BTD: Array, key: Array) -> Array:
            with self._scope(weights, key):
                return self._constrain(block(x_BTD, context, training=training)[0])

        return run

    def _head(
        self, weights: Weights, x_BTD: Array, labels_BT: Array, ignored_BT: Array, *, training: bool
    ) -> TokenLoss:
        model = self._model
        with self._scope(weights, None):
            return head_loss(
                model.ln_f(x_BTD),
                model.lm_head.kernel_or(model.wte.embeddings),
                model.lm_head.bias,
                labels_BT,
                ignored_BT,
                training,
                devices=self._devices,
            )

    def _scope(self, weights: Weights, key: Array | None) -> keras.StatelessScope:
        pairs = [(self._variables[name], value) for name, value in weights.items()]
        if key is not None:
            pairs.append((self._model.seeds.state, key))
        return keras.StatelessScope(pairs, initialize_variables=False)

    def _inner(self, weights: Weights) -> dict[str, Array]:
        return {name: value for name, value in weights.items() if name in self._in_block}

    def _outer(self, weights: Weights) -> dict[str, Array]:
        return {name: value for name, value in weights.items() if name not in self._in_block}

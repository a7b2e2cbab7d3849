"""Cached decoding of several sequences at once, by a model in memory or by a streamed one.

Shape suffixes: B batch, T time, S length of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np
from keras import ops

from gptj_model.network.array_type import Tensor
from gptj_model.network.layers import Cache
from gptj_model.network.model import GPTJ
from gptj_model.streaming.forward import StreamedModel


class Decoder(Protocol):
    """A model that has read some tokens, and takes more."""

    def __call__(
        self, ids_BT: np.ndarray, positions_BT: np.ndarray, visible_BS: np.ndarray
    ) -> np.ndarray:
        """Read further tokens.

        Args:
            ids_BT: int32 token ids.
            positions_BT: int32 position of each of these tokens.
            visible_BS: False at tokens that none may attend to, S being the cache's length.

        Returns:
            Logits (B, V) of the next tokens, float32.
        """
        ...

    def reorder(self, parents: np.ndarray) -> None:
        """Continue each sequence `n` from what sequence `parents[n]` has read; there may be more or
        fewer sequences than before."""
        ...


class _Ahead(NamedTuple):
    """A step that was started before its tokens were known for certain."""

    ids_B1: Tensor
    """The tokens it takes: the most likely ones."""
    logits_BV: Tensor


class ResidentDecoder:
    """Decoder of a model in memory.

    Args:
        step: the compiled decoding step of the model.
        caches: empty caches, one per block.
        ahead: whether to start each step of a single token with the most likely ones before the
            logits that they follow from are read, so that an accelerator does not wait for them.
            Results are the same: a step whose tokens turn out to be others is repeated.
    """

    def __init__(self, step: Any, caches: list[Cache], *, ahead: bool = False) -> None:
        self._step = step
        self._caches = caches
        self._start = 0
        self._looks_ahead = ahead
        self._ahead: _Ahead | None = None

    def __call__(
        self, ids_BT: np.ndarray, positions_BT: np.ndarray, visible_BS: np.ndarray
    ) -> np.ndarray:
        """Implement `Decoder`."""
        ahead, self._ahead = self._ahead, None
        if ahead and np.array_equal(np.asarray(ahead.ids_B1), ids_BT):
            logits_BV = ahead.logits_BV
        else:  # keys and values of a step with other tokens are overwritten
            logits_BV = self._run(ids_BT, positions_BT, visible_BS)
        self._start += ids_BT.shape[1]
        if self._looks_ahead and self._start < visible_BS.shape[1]:
            ids_B1 = ops.argmax(logits_BV, axis=-1, keepdims=True)
            next_B1 = positions_BT[:, -1:] + np.int32(1)
            self._ahead = _Ahead(ids_B1, self._run(ids_B1, next_B1, visible_BS))
        return np.asarray(logits_BV).astype(np.float32, copy=False)

    def reorder(self, parents: np.ndarray) -> None:
        """Implement `Decoder`."""
        self._ahead = None
        _reorder(self._caches, parents)

    def _run(self, ids_BT: Tensor, positions_BT: np.ndarray, visible_BS: np.ndarray) -> Tensor:
        start = np.int32(self._start)
        logits_BV, self._caches = self._step(ids_BT, positions_BT, visible_BS, self._caches, start)
        return logits_BV


class StreamedDecoder:
    """Decoder of a model that is read block by block, once per token; only the caches stay in
    memory.

    Args:
        model: the streamed model.
        batch: number of prompts.
        length: largest number of tokens per prompt, read and written.
    """

    def __init__(self, model: StreamedModel, batch: int, length: int) -> None:
        self._model = model
        self._caches = [model.empty_cache(batch, length) for _ in range(model.config.n_layer)]
        self._start = 0

    def __call__(
        self, ids_BT: np.ndarray, positions_BT: np.ndarray, visible_BS: np.ndarray
    ) -> np.ndarray:
        """Implement `Decoder`."""
        x_BTD = self._model.embed(ids_BT)
        for block in self._model.blocks():
            i = block.number
            x_BTD, self._caches[i] = block.run_cached(
                x_BTD, positions_BT, self._caches[i], self._start, visible_BS
            )
        self._start += ids_BT.shape[1]
        head = self._model.head()
        (logits_BTV,) = head.logits(head.normed([x_BTD[:, -1:]]))
        return logits_BTV[:, 0]

    def reorder(self, parents: np.ndarray) -> None:
        """Implement `Decoder`."""
        _reorder(self._caches, parents)


def _reorder(caches: list[Cache], parents: np.ndarray) -> None:
    """Replace the caches one by one, so that one of them exists twice at a time."""
    rows = ops.convert_to_tensor(parents, dtype="int32")
    for i, (keys, values) in enumerate(caches):
        caches[i] = ops.take(keys, rows, axis=0), ops.take(values, rows, axis=0)


_Step = Callable[..., tuple[Tensor, list[Cache]]]


def compiled_step(model: GPTJ) -> _Step:
    """Return one decoding step, compiled: from numpy arrays, caches and the number of tokens in
    them to logits (B, V) of the last token, and caches.

    On TensorFlow, a model has one such step, which always has its present weights.
    """
    if keras.backend.backend() == "jax":
        return _compiled_by_jax(model, _step(model), donated=(4,))  # the caches
    return model.once("step", lambda: _compiled_by_tensorflow(model))


def _step(model: GPTJ) -> _Step:
    def step(
        ids_BT: Tensor,
        positions_BT: Tensor,
        visible_BS: Tensor,
        caches: list[Cache],
        start: Tensor,
    ) -> tuple[Tensor, list[Cache]]:
        logits_BTV, caches = model.call_cached(
            ids_BT, caches, start, positions_BT, visible_BS, last=True
        )
        return logits_BTV[:, 0], caches

    return step


def _compiled_by_tensorflow(model: GPTJ) -> _Step:
    import tensorflow as tf

    step = _step(model)
    plain = compiled(model, step)
    # For a single token, launching the operations one by one takes a third of the time.
    of_one = tf.function(step, jit_compile=True, autograph=False)

    def either(
        ids_BT: np.ndarray,
        positions_BT: np.ndarray,
        visible_BS: np.ndarray,
        caches: list[Cache],
        start: np.int32,
    ) -> tuple[Tensor, Any]:
        given = map(ops.convert_to_tensor, (ids_BT, positions_BT, visible_BS))
        # A number would be a constant of the program.
        place = ops.convert_to_tensor(start, dtype="int32")
        return (of_one if ids_BT.shape == (1, 1) else plain)(*given, caches, place)

    return either


def compiled(
    model: GPTJ, function: Callable[..., Any], *arguments: tuple[tuple[int | None, ...], str]
) -> Callable[..., Any]:
    """Return a function of tensors that uses the model, compiled by the backend.

    Args:
        model: model with its weights loaded.
        function: the function.
        arguments: shape, None where it varies, and dtype of each argument, if they are known;
            TensorFlow then compiles once for all shapes.
    """
    if keras.backend.backend() == "jax":
        return _compiled_by_jax(model, function)
    import tensorflow as tf

    signature = [tf.TensorSpec(*argument) for argument in arguments] or None
    return tf.function(function, reduce_retracing=True, autograph=False, input_signature=signature)


def _compiled_by_jax(
    model: GPTJ, function: Callable[..., Any], donated: Sequence[int] = ()
) -> Callable[..., Any]:
    """Return the function, compiled with the present weights as its first argument: JAX would copy
    what it closes over. The memory of the `donated` arguments is used again."""
    import jax

    variables = model.variables
    # Looked up once: asking hundreds of variables takes as long as a GPU takes for a small token.
    values = [v.value for v in variables]

    def of_weights(weights: list[Any], *arguments: Any) -> Any:
        with keras.StatelessScope(list(zip(variables, weights, strict=True))):
            return function(*arguments)

    run = jax.jit(of_weights, donate_argnums=donated)
    return lambda *arguments: run(values, *arguments)

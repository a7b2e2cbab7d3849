"""The model with the signatures of its SavedModel: `serve` and `generate`.

A SavedModel holds variables and graphs alone, so TensorFlow runs it without this project and
without Keras.

Shape suffixes: B batch, T time, S length of the cache, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

from gptj_model.decoding.generation import CACHE_STEP
from gptj_model.network.array_type import Tensor
from gptj_model.network.model import GPTJ
from gptj_model.serving.choice import Sampling, chosen
from gptj_model.serving.numpy_random import Generators, default_rng, uniform

SERVE, GENERATE = "serve", "generate"


def _spec(name: str, dtype: tf.DType, *shape: int | None) -> tf.TensorSpec:
    return tf.TensorSpec(shape, dtype, name)


_SERVE = (_spec("ids", tf.int32, None, None),)
_GENERATE = (
    _spec("ids", tf.int32, None, None),
    _spec("lengths", tf.int32, None),
    _spec("max_new_tokens", tf.int32),
    _spec("temperature", tf.float32),
    _spec("top_k", tf.int32),
    _spec("top_p", tf.float32),
    _spec("seed", tf.int64),
)


class _Written(NamedTuple):
    """Continuations in the making."""

    count: Tensor
    """Number of steps so far."""
    ids_B: Tensor
    """Token of the last step."""
    new_BN: Tensor
    """Tokens so far, with the filler after them."""
    lengths_B: Tensor
    """Number of tokens of each continuation."""
    done_B: Tensor
    """Whether the continuation has ended."""
    generators: Generators
    caches: list[Any]


class ServedModel(tf.Module):
    """A model in memory as a module that TensorFlow writes, with its weights as variables.

    Args:
        model: model with its weights loaded.
        ends: token ids that each end a text and are not part of it.
        longest: largest number of tokens of a prompt with its continuation.
    """

    def __init__(self, model: GPTJ, ends: Sequence[int], longest: int) -> None:
        super().__init__(name="gptj")
        # A Keras model would be saved as one, and need Keras to be loaded.
        self._model = _Untracked(model)
        self.weights = [variable.value for variable in model.weights]
        self._ends = tuple(ends)
        self._longest = longest
        self._filler = next(iter(self._ends), 0)

    def serve(self, ids: Tensor) -> dict[str, Tensor]:
        """Return `logits`, float32 (B, T, V), of token ids (B, T).

        No token sees those after it, so shorter texts of a batch may be padded on the right with
        any token.
        """
        model = self._model.value
        fits = _check(
            tf.shape(ids)[1] <= model.config.n_positions,
            f"ids has more columns than the model's {model.config.n_positions} positions",
        )
        ids = _after([self._check_ids(ids), fits], ids)
        return {"logits": tf.cast(model(ids), tf.float32)}

    def generate(
        self,
        ids: Tensor,
        lengths: Tensor,
        max_new_tokens: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        seed: Tensor,
    ) -> dict[str, Tensor]:
        """Return the continuations of prompts.

        Args:
            ids: token ids (B, T), each row padded on the right with any token.
            lengths: number of tokens of each prompt, (B,).
            max_new_tokens: largest number of new tokens, N.
            temperature, top_k, top_p: see `Sampling`.
            seed: seed of the first prompt's draws; each further prompt takes the next number.

        Returns:
            `new_ids`, int32 (B, N), with a token that ends texts, or 0, after the last one; and
            `new_lengths`, int32 (B,), the number of new tokens without the one that ended the text.
        """
        checks = self._checks(ids, lengths, max_new_tokens, temperature, top_k, top_p, seed)
        ids, lengths = _after(checks, ids), _after(checks, lengths)
        sampling = Sampling(temperature, top_k, top_p)
        longest = tf.reduce_max(lengths)
        padding_B1 = (longest - lengths)[:, None]
        ids_BT = _left_padded(ids, longest, padding_B1)
        B, V = tf.shape(ids)[0], self._model.value.config.vocab_size
        S = -(-(longest + max_new_tokens) // CACHE_STEP) * CACHE_STEP
        caches = self._model.value.empty_caches(B, S)
        logits_BV, caches = self._read(ids_BT, caches, 0, padding_B1, S)
        generators, drawn_B = uniform(default_rng(seed + tf.range(B, dtype=tf.int64)))
        nothing = _Written(
            count=tf.constant(0),
            ids_B=tf.zeros((B,), tf.int32),
            new_BN=tf.fill((B, max_new_tokens), self._filler),
            lengths_B=tf.zeros((B,), tf.int32),
            done_B=tf.zeros((B,), tf.bool),
            generators=generators,
            caches=caches,
        )
        first = self._with(nothing, chosen(logits_BV, drawn_B, sampling))

        def step(written: _Written) -> tuple[_Written]:
            start = longest + written.count - 1
            logits_BV, caches = self._read(
                written.ids_B[:, None], written.caches, start, padding_B1, S
            )
            logits_BV = tf.ensure_shape(logits_BV, (None, V))
            generators, drawn_B = uniform(written.generators)
            following = written._replace(generators=generators, caches=caches)
            return (self._with(following, chosen(logits_BV, drawn_B, sampling)),)

        (last,) = tf.while_loop(
            lambda w: (w.count < max_new_tokens) & ~tf.reduce_all(w.done_B), step, (first,)
        )
        return {"new_ids": last.new_BN, "new_lengths": last.lengths_B}

    def _with(self, written: _Written, ids_B: Tensor) -> _Written:
        """Return the continuations with one more token."""
        ends = tf.constant(self._ends, tf.int32, shape=(len(self._ends),))
        is_end_B = tf.reduce_any(ids_B[:, None] == ends[None], axis=1)
        done_B = written.done_B | is_end_B
        place_1N = tf.range(tf.shape(written.new_BN)[1])[None] == written.count
        added_BN = place_1N & ~done_B[:, None]
        return written._replace(
            count=written.count + 1,
            ids_B=ids_B,
            new_BN=tf.where(added_BN, ids_B[:, None], written.new_BN),
            lengths_B=written.lengths_B + tf.cast(~done_B, tf.int32),
            done_B=done_B,
        )

    def _read(
        self, ids_BT: Tensor, caches: list[Any], start: Tensor, padding_B1: Tensor, S: Tensor
    ) -> tuple[Tensor, list[Any]]:
        """Return the float32 logits (B, V) after further tokens, which begin at column `start`, and
        the caches."""
        columns_1T = (start + tf.range(tf.shape(ids_BT)[1]))[None]
        positions_BT = tf.maximum(columns_1T - padding_B1, 0)
        visible_BS = tf.range(S)[None] >= padding_B1
        logits_BTV, caches = self._model.value.call_cached(
            ids_BT, caches, start, positions_BT, visible_BS, last=True
        )
        return tf.cast(logits_BTV[:, 0], tf.float32), caches

    def _check_ids(self, ids: Tensor) -> Any:
        size = self._model.value.config.vocab_size
        return _check(
            tf.reduce_all((ids >= 0) & (ids < size)), f"ids holds an id beyond 0 to {size - 1}"
        )

    def _checks(
        self,
        ids: Tensor,
        lengths: Tensor,
        max_new_tokens: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        seed: Tensor,
    ) -> list[Any]:
        """Return the operations that let a request fail with what it asks wrongly."""
        B, T = tf.shape(ids)[0], tf.shape(ids)[1]
        whole = tf.reduce_max(lengths) + max_new_tokens
        return [
            self._check_ids(ids),
            _check(
                tf.reduce_all(tf.shape(lengths) == [B]),
                "lengths has not one number for each row of ids",
            ),
            _check(
                tf.reduce_all((lengths >= 1) & (lengths <= T)),
                "lengths holds a number that is not 1 to the columns of ids",
            ),
            _check(max_new_tokens >= 1, "max_new_tokens is below 1"),
            _check(
                whole <= self._longest,
                f"a prompt and max_new_tokens are together more than {self._longest} tokens",
            ),
            _check(
                tf.math.is_finite(temperature) & (temperature >= 0), "temperature is not 0 or more"
            ),
            _check(top_k >= 0, "top_k is below 0"),
            _check((top_p > 0) & (top_p <= 1), "top_p is not above 0 and at most 1"),
            _check(seed >= 0, "seed is below 0"),
        ]


class Traced(NamedTuple):
    """A model with the graphs of its signatures."""

    module: ServedModel
    signatures: dict[str, Any]
    """Concrete functions, by name of the signature."""


def traced(model: GPTJ, ends: Sequence[int], longest: int) -> Traced:
    """Return a model with its signatures; the arguments are those of `ServedModel`."""
    module = ServedModel(model, ends, longest)
    functions = ((SERVE, module.serve, _SERVE), (GENERATE, module.generate, _GENERATE))
    signatures = {
        name: tf.function(function, input_signature=inputs, autograph=False).get_concrete_function()
        for name, function, inputs in functions
    }
    return Traced(module, signatures)


def save(served: Traced, folder: Path) -> None:
    """Write a SavedModel.

    Args:
        served: model to write.
        folder: folder to write into.

    Raises:
        OSError: the disk is full or not writable.
    """
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    try:
        tf.saved_model.save(served.module, str(folder), served.signatures, options)
    except tf.errors.OpError as e:
        raise OSError(f"{folder}: {e.message}") from e


class _Untracked:
    """An object that a `tf.Module` does not take for one of its parts."""

    def __init__(self, value: GPTJ) -> None:
        self.value = value


def _left_padded(ids: Tensor, longest: Tensor, padding_B1: Tensor) -> Tensor:
    """Return ids (B, longest) with the padding of each row moved to the left, as 0."""
    columns_BT = tf.range(longest)[None] - padding_B1
    moved_BT = tf.gather(ids, tf.maximum(columns_BT, 0), axis=1, batch_dims=1)
    return tf.where(columns_BT >= 0, moved_BT, 0)


def _check(holds: Tensor, problem: str) -> Any:
    """Return an operation that fails with these words unless the condition holds."""
    return tf.debugging.Assert(holds, [problem])


def _after(checks: Sequence[Any], value: Tensor) -> Tensor:
    """Return the value, which exists once the checks have passed: what is computed from it cannot
    fail before them, in words of its own."""
    with tf.control_dependencies(checks):
        return tf.identity(value)

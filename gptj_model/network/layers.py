"""The layers of one GPT-J block.

Shape suffixes: B batch, T time (queries), S time (keys), D hidden, F feed-forward,
H heads, K features of a head, R rotated features.
"""

# keras.ops is annotated as if its functions returned None.
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false
# pyright: reportOptionalMemberAccess=false, reportOptionalIterable=false

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from gptj_model.config import GPTJConfig
from gptj_model.network.array_type import Tensor
from gptj_model.network.matmul import matmul
from gptj_model.network.observation import observe
from gptj_model.network.rotary import rotate

# A sequence of one token attends only to itself, as intended.
warnings.filterwarnings("ignore", message="You are using a softmax over axis -1")

#: Initializer of weights. They always come from elsewhere, and random numbers would take three
#: times the memory and most of the time of building a large model.
UNSET = "zeros"


class Context(NamedTuple):
    """What all blocks share in one forward pass."""

    sin_BTR2: Tensor
    cos_BTR2: Tensor
    bias_B1TS: Tensor
    """0 where a query may attend to a key, a large negative number elsewhere; float32."""
    cache_start: Tensor
    """Index of the first query among the cached keys; 0 without a cache."""


#: Keys (float32) and values (compute dtype) of one block, each (B, H, S, K).
Cache = tuple[Tensor, Tensor]

#: From rotated queries and keys (float32) and values (compute dtype) of whole sequences without
#: padding on the left, each (B, T, H, K), to the values that each query attends to, likewise.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Dropout(keras.layers.Layer):
    """Dropout whose masks all come from one generator, so that its state restores them all."""

    def __init__(self, rate: float, seeds: keras.random.SeedGenerator, **kwargs: Any):
        super().__init__(**kwargs)
        self.rate = rate
        self.seeds = seeds

    def call(self, x: Tensor, training: bool = False) -> Tensor:
        if not training or self.rate == 0:
            return x
        return keras.random.dropout(x, self.rate, seed=self.seeds)


class Dense(keras.layers.Dense):
    """Keras' dense layer, except that LoRA is applied to the input instead of a copy of the kernel,
    and that a single token is multiplied in parts."""

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        y = matmul(inputs, self._kernel)
        if self.lora_enabled:
            narrow = ops.matmul(inputs, self.lora_kernel_a)
            y = y + (self.lora_alpha / self.lora_rank) * ops.matmul(narrow, self.lora_kernel_b)
        return y if self.bias is None else y + self.bias


class Attention(keras.layers.Layer):
    """Causal self-attention with rotary positions, without biases, with the softmax in float32."""

    def __init__(self, config: GPTJConfig, seeds: keras.random.SeedGenerator, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)  # angles and mask stay in float32
        self.config = config
        self.attend: Attend | None = None
        """Kernel in place of `mix`, for training and evaluation alone: it knows neither a cache nor
        a mask. See `gptj_model.network.flash_attention`."""

        def projection(name: str) -> Dense:
            return dense(config.n_embd, name, self.dtype_policy, use_bias=False)

        self.q_proj = projection("q_proj")
        self.k_proj = projection("k_proj")
        self.v_proj = projection("v_proj")
        self.out_proj = projection("out_proj")
        self.drop_probabilities = Dropout(config.attn_pdrop, seeds, dtype=self.dtype_policy)
        self.drop_residual = Dropout(config.resid_pdrop, seeds, dtype=self.dtype_policy)

    def build(self, input_shape: Any) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            layer.build(input_shape)

    def call(
        self, h_BTD: Tensor, context: Context, cache: Cache | None = None, training: bool = False
    ) -> tuple[Tensor, Cache | None]:
        """Return the output (B, T, D) and the cache."""
        B, T = ops.shape(h_BTD)[:2]
        heads = (B, T, self.config.n_head, self.config.head_dim)
        q_BTHK = ops.reshape(observe("q_proj", self.q_proj(h_BTD)), heads)
        k_BTHK = ops.reshape(observe("k_proj", self.k_proj(h_BTD)), heads)
        v_BTHK = ops.reshape(observe("v_proj", self.v_proj(h_BTD)), heads)

        # Rotation, scores and softmax stay in float32 whatever the compute dtype.
        q_BTHK = rotate(ops.cast(q_BTHK, "float32"), context.sin_BTR2, context.cos_BTR2)
        k_BTHK = rotate(ops.cast(k_BTHK, "float32"), context.sin_BTR2, context.cos_BTR2)
        if self.attend is None:
            mixed_BTHK, cache = self.mix(q_BTHK, k_BTHK, v_BTHK, context, cache, training)
        else:
            assert cache is None, "the kernel attends to whole sequences"
            mixed_BTHK = self.attend(q_BTHK, k_BTHK, v_BTHK)
        mixed_BTD = ops.reshape(mixed_BTHK, ops.shape(h_BTD))
        attended_BTD = observe("out_proj", self.out_proj(observe("attention", mixed_BTD)))
        return self.drop_residual(attended_BTD, training=training), cache

    def mix(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHK: Tensor,
        context: Context,
        cache: Cache | None,
        training: bool,
    ) -> tuple[Tensor, Cache | None]:
        """Return the values (B, T, H, K) that each query attends to, and the cache."""
        q_BHTK, k_BHSK, v_BHSK = (ops.transpose(x, (0, 2, 1, 3)) for x in (q_BTHK, k_BTHK, v_BTHK))
        observe("rotary_q", q_BHTK)
        observe("rotary_k", k_BHSK)
        if cache is not None:
            start = (0, 0, context.cache_start, 0)
            k_BHSK = ops.slice_update(cache[0], start, k_BHSK)
            v_BHSK = ops.slice_update(cache[1], start, v_BHSK)
            cache = (k_BHSK, v_BHSK)

        scores_BHTS = ops.matmul(q_BHTK, ops.transpose(k_BHSK, (0, 1, 3, 2)))
        scores_BHTS = scores_BHTS * self.config.head_dim**-0.5 + context.bias_B1TS
        probabilities_BHTS = observe("softmax", ops.softmax(scores_BHTS, axis=-1))
        probabilities_BHTS = ops.cast(probabilities_BHTS, v_BHSK.dtype)
        probabilities_BHTS = self.drop_probabilities(probabilities_BHTS, training=training)
        mixed_BHTK = ops.matmul(probabilities_BHTS, v_BHSK)
        return ops.transpose(mixed_BHTK, (0, 2, 1, 3)), cache


class FeedForward(keras.layers.Layer):
    """Two dense layers with a tanh-form GELU between them."""

    def __init__(self, config: GPTJConfig, seeds: keras.random.SeedGenerator, **kwargs: Any):
        super().__init__(**kwargs)
        self.fc_in = dense(config.ffn_dim, "fc_in", self.dtype_policy)
        self.fc_out = dense(config.n_embd, "fc_out", self.dtype_policy)
        self.drop_residual = Dropout(config.resid_pdrop, seeds, dtype=self.dtype_policy)

    def build(self, input_shape: Any) -> None:
        self.fc_in.build(input_shape)
        self.fc_out.build((*input_shape[:-1], self.fc_in.units))

    def call(self, h_BTD: Tensor, training: bool = False) -> Tensor:
        a_BTF = observe("gelu", ops.gelu(observe("fc_in", self.fc_in(h_BTD)), approximate=True))
        return self.drop_residual(observe("fc_out", self.fc_out(a_BTF)), training=training)


class Block(keras.layers.Layer):
    """x + attention(ln(x)) + feed_forward(ln(x)): both branches read the same normed input."""

    def __init__(self, config: GPTJConfig, seeds: keras.random.SeedGenerator, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        self.ln_1 = layer_norm(config, "ln_1", self.dtype_policy)
        self.attn = Attention(config, seeds, name="attn", dtype=self.dtype_policy)
        self.mlp = FeedForward(config, seeds, name="mlp", dtype=self.dtype_policy)

    def build(self, input_shape: Any) -> None:
        for layer in (self.ln_1, self.attn, self.mlp):
            layer.build(input_shape)

    def call(
        self, x_BTD: Tensor, context: Context, cache: Cache | None = None, training: bool = False
    ) -> tuple[Tensor, Cache | None]:
        """Return the hidden states (B, T, D) and the cache."""
        h_BTD = observe("ln_1", self.ln_1(x_BTD))
        in_turn = cache is None and not training  # few tokens at a time need little memory
        attended_BTD, cache = self.attn(h_BTD, context, cache, training=training)
        if in_turn:
            h_BTD = _after(attended_BTD, h_BTD)
        summed_BTD = x_BTD + attended_BTD + self.mlp(h_BTD, training=training)
        return observe("residual", summed_BTD), cache


class Head(keras.layers.Layer):
    """The layer from hidden states to logits. Its `kernel` (D, V) is absent when it is tied to the
    embedding (V, D)."""

    def __init__(self, config: GPTJConfig, **kwargs: Any):
        super().__init__(**kwargs)
        self.config = config

    def build(self, input_shape: Any) -> None:
        D, V = self.config.n_embd, self.config.vocab_size
        self.kernel = None
        if not self.config.tie_word_embeddings:
            self.kernel = self.add_weight(name="kernel", shape=(D, V), initializer=UNSET)
        self.bias = self.add_weight(name="bias", shape=(V,), initializer=UNSET)

    def call(self, x_BTD: Tensor, embeddings_VD: Tensor) -> Tensor:
        kernel_DV = self.kernel_or(embeddings_VD)
        return matmul(x_BTD, ops.cast(kernel_DV, self.compute_dtype)) + self.bias

    def kernel_or(self, embeddings_VD: Tensor) -> Tensor:
        """Return the kernel (D, V): its own, or that of the embedding it is tied to."""
        return ops.transpose(embeddings_VD) if self.kernel is None else self.kernel


def dense(units: int, name: str, dtype: Any, *, use_bias: bool = True) -> Dense:
    """Return a dense layer whose weights are assigned later."""
    return Dense(units, use_bias=use_bias, name=name, dtype=dtype, kernel_initializer=UNSET)


def layer_norm(config: GPTJConfig, name: str, dtype: Any) -> keras.layers.LayerNormalization:
    """Return a layer norm over the hidden axis with the model's epsilon."""
    return keras.layers.LayerNormalization(
        epsilon=config.layer_norm_epsilon, name=name, dtype=dtype
    )


def _after(first: Tensor, value: Tensor) -> Tensor:
    """Return the value, delayed in a TensorFlow graph until `first` exists: side by side, the two
    branches of a block would need their memory at once."""
    if keras.backend.backend() != "tensorflow":
        return value
    import tensorflow as tf

    with tf.control_dependencies([first]):
        return tf.identity(value)

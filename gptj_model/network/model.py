"""GPT-J as a Keras model.

Shape suffixes: B batch, T time (queries), S time (keys), D hidden, V vocabulary.
"""

# keras.ops is annotated as if its functions returned None.
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false
# pyright: reportOptionalMemberAccess=false, reportOptionalIterable=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import keras
from keras import ops

from gptj_model.config import GPTJConfig
from gptj_model.network.array_type import Tensor
from gptj_model.network.layers import UNSET, Block, Cache, Context, Dropout, Head, layer_norm
from gptj_model.network.loss import TokenLoss, head_loss
from gptj_model.network.rotary import sin_cos_tables

T = TypeVar("T")

#: Number added to the score of a key that must not be attended to: its probability underflows to 0.
MASKED = -1e9


@keras.saving.register_keras_serializable(package="gptj")
class GPTJ(keras.Model):
    """The model from token ids to logits.

    `embed`, each of `blocks`, and `unembed` are the three stages of `call`; executors that hold one
    block at a time run them separately.

    Args:
        config: shapes and constants of the model.
        dtype: Keras dtype or policy, such as "float32" or "mixed_bfloat16".
        seed: seed of the dropout masks, used only in training.
        recompute: whether to recompute the activations of a block in the backward pass instead of
            keeping them.
    """

    def __init__(
        self,
        config: GPTJConfig,
        *,
        dtype: str = "float32",
        seed: int = 0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=kwargs.pop("name", "gptj"), dtype=dtype, **kwargs)
        self.config = config
        self.seed = seed
        self.recompute = recompute
        self.seeds = keras.random.SeedGenerator(seed, name="dropout")
        policy = self.dtype_policy
        self.wte = keras.layers.Embedding(
            config.vocab_size,
            config.n_embd,
            embeddings_initializer=UNSET,
            name="wte",
            dtype=policy,
        )
        self.drop = Dropout(config.embd_pdrop, self.seeds, dtype=policy)
        self.blocks = [
            Block(config, self.seeds, name=f"h_{i}", dtype=policy) for i in range(config.n_layer)
        ]
        self.ln_f = layer_norm(config, "ln_f", policy)
        self.lm_head = Head(config, name="lm_head", dtype=policy)
        self.build((None, None))

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` makes the same model from; `config` is in Hugging Face's
        terms."""
        hf = self.config.to_hf(dtype=self.compute_dtype)
        return {"config": hf, "dtype": self.dtype_policy.name, "seed": self.seed, "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> GPTJ:
        """Return the model that `get_config` describes; missing keys take their defaults."""
        del custom_objects
        known = {k: config[k] for k in ("dtype", "seed", "name") if k in config}
        return cls(GPTJConfig.from_hf(config["config"]), **known)

    def build(self, input_shape: Any) -> None:
        hidden_shape = (None, None, self.config.n_embd)
        self.wte.build((None, None))
        for layer in (*self.blocks, self.ln_f, self.lm_head):
            layer.build(hidden_shape)
        self.built = True

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return what `make` has made for this model under this name, at the first call: a compiled
        function, which always uses the present weights."""
        made = self.__dict__.setdefault("_made_once", {})
        if name not in made:
            made[name] = make()
        return made[name]

    def call(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor = None,
        attention_mask_BT: Tensor = None,
        training: bool = False,
    ) -> Tensor:
        """Return logits (B, T, V) in the compute dtype.

        Args:
            ids_BT: int32 token ids.
            positions_BT: int32 position of each token, shape (B, T) or (1, T); default 0, 1, ….
            attention_mask_BT: 0 at padding that no query may attend to; default none.
            training: whether dropout is on.
        """
        context = self.context(ids_BT, positions_BT, attention_mask_BT)
        x_BTD = self.decode(self.embed(ids_BT, training=training), context, training=training)
        return self.unembed(x_BTD)

    def token_loss(
        self,
        ids_BT: Tensor,
        labels_BT: Tensor,
        ignored_BT: Tensor,
        training: bool = False,
        devices: int = 1,
    ) -> TokenLoss:
        """Return the cross-entropy of the labels without ever holding all logits; see
        `head_loss`."""
        x_BTD = self.embed(ids_BT, training=training)
        x_BTD = self.decode(x_BTD, self.context(ids_BT), training=training)
        kernel_DV = self.lm_head.kernel_or(self.wte.embeddings)
        return head_loss(
            self.ln_f(x_BTD),
            kernel_DV,
            self.lm_head.bias,
            labels_BT,
            ignored_BT,
            training,
            devices=devices,
        )

    def call_cached(
        self,
        ids_BT: Tensor,
        caches: Sequence[Cache],
        start: Tensor,
        positions_BT: Tensor = None,
        attention_mask_BS: Tensor = None,
        last: bool = False,
    ) -> tuple[Tensor, list[Cache]]:
        """Return logits of tokens start … start + T, and the caches with their keys and values.

        Args:
            ids_BT: int32 token ids.
            caches: caches from `empty_caches` or from the previous call.
            start: int32 scalar, number of tokens already in the caches.
            positions_BT: as in `call`; default start, start + 1, ….
            attention_mask_BS: 0 at cached padding that no query may attend to, S being the cache's
                length.
            last: whether to return only the logits of the last token.
        """
        T, S = ops.shape(ids_BT)[1], ops.shape(caches[0][0])[2]
        context = make_context(self.config, T, S, positions_BT, attention_mask_BS, start)
        x_BTD = self.embed(ids_BT)
        updated = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x_BTD, cache = block(x_BTD, context, cache)
            updated.append(cache)
        return self.unembed(x_BTD[:, -1:] if last else x_BTD), updated

    def context(
        self, ids_BT: Tensor, positions_BT: Tensor = None, attention_mask_BT: Tensor = None
    ) -> Context:
        """Return what the blocks share when these ids are one whole sequence each."""
        T = ops.shape(ids_BT)[1]
        return make_context(self.config, T, T, positions_BT, attention_mask_BT)

    def embed(self, ids_BT: Tensor, training: bool = False) -> Tensor:
        """Return hidden states (B, T, D) before the first block."""
        return self.drop(self.wte(ids_BT), training=training)

    def decode(self, x_BTD: Tensor, context: Context, training: bool = False) -> Tensor:
        """Return the hidden states after every block."""
        for block in self.blocks:
            if training and self.recompute:
                x_BTD = self._recomputed(block, context)(x_BTD)
            else:
                x_BTD, _ = block(x_BTD, context, training=training)
        return x_BTD

    def _recomputed(self, block: Block, context: Context) -> Callable[[Tensor], Tensor]:
        """Return a block for training whose activations are recomputed in the backward pass, with
        the same dropout masks."""

        seed_state = ops.copy(self.seeds.state)

        def run(x_BTD: Tensor) -> Tensor:
            self.seeds.state.assign(seed_state)
            return block(x_BTD, context, training=True)[0]

        return keras.remat(run)

    def unembed(self, x_BTD: Tensor) -> Tensor:
        """Return logits (B, T, V) of hidden states after the last block."""
        return self.lm_head(self.ln_f(x_BTD), self.wte.embeddings)

    def empty_caches(self, batch: int | Tensor, length: int | Tensor) -> list[Cache]:
        """Return caches for the keys and values of `length` tokens, one per block; both sizes may
        be scalars of a graph."""
        shape = (batch, self.config.n_head, length, self.config.head_dim)
        return [
            (ops.zeros(shape, "float32"), ops.zeros(shape, self.compute_dtype)) for _ in self.blocks
        ]


def make_context(
    config: GPTJConfig,
    T: Tensor,
    S: Tensor,
    positions_BT: Tensor = None,
    attention_mask_BS: Tensor = None,
    start: Tensor = 0,
) -> Context:
    """Return rotary angles and the causal mask for queries start … start + T over S keys."""
    start = ops.convert_to_tensor(start, dtype="int32")
    query_T = ops.arange(T, dtype="int32") + start
    if positions_BT is None:
        positions_BT = query_T[None, :]
    sin, cos = sin_cos_tables(config.n_positions, config.rotary_dim)
    visible_B1TS = (query_T[:, None] >= ops.arange(S, dtype="int32")[None, :])[None, None]
    if attention_mask_BS is not None:
        seen_B11S = ops.cast(attention_mask_BS, "bool")[:, None, None, :]
        visible_B1TS = ops.logical_and(visible_B1TS, seen_B11S)
    return Context(
        sin_BTR2=ops.take(ops.convert_to_tensor(sin), positions_BT, axis=0),
        cos_BTR2=ops.take(ops.convert_to_tensor(cos), positions_BT, axis=0),
        bias_B1TS=ops.where(visible_B1TS, 0.0, MASKED),
        cache_start=start,
    )

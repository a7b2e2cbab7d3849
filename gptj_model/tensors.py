"""THE TABLE: what every GPT-J tensor is called in each format, its shape, and how it moves.

Five global rows and ten per block. Converting, verifying, loading, training and exporting
all interpret these rows; nothing else knows a tensor's name.

Names of the TF column are those of the reference's name-based checkpoints, of the CS column
those of the cerebras-pytorch 2.10 client, of the HF column those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np

from gptj_model.config import GPTJConfig
from gptj_model.op import Op


class Scheme(Enum):
    """A way of naming and laying out the tensors: one column of the table."""

    HF = "hf"
    TF = "tf"
    KERAS = "keras"
    CS = "cs"

    @property
    def transposes(self) -> bool:
        """Whether `Op`s apply to tensors in this scheme (the others keep HF's layout)."""
        return self in (Scheme.TF, Scheme.KERAS)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One row of the table. `{i}` is the block; `{dense_in}`, `{dense_out}` see `_dense`."""

    hf: str
    tf: str
    keras: str
    cs: tuple[str, ...]
    dims: tuple[str, ...]
    """Letters of `GPTJConfig.dims`, in HF order."""
    tf_op: Op
    tied: bool = False
    """Vanishes when the head is tied to the embedding."""
    tf_if_tied: str | None = None
    """The TF name when the head is tied, where it differs."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A row written out for one config and one block: exact names and shapes."""

    hf: str
    tf: str
    keras: str
    cs: tuple[str, ...]
    shape: tuple[int, ...]
    """Shape in HF and CS."""
    tf_op: Op
    block: int | None

    def name(self, scheme: Scheme) -> str:
        """Its name in a scheme."""
        return self._names(scheme)[0]

    def copies(self, scheme: Scheme) -> tuple[str, ...]:
        """Further names under which a scheme stores the same values once more; only CS does."""
        return self._names(scheme)[1:]

    def _names(self, scheme: Scheme) -> tuple[str, ...]:
        found = getattr(self, scheme.value)
        return found if isinstance(found, tuple) else (found,)

    def op(self, source: Scheme, target: Scheme) -> Op:
        """What happens to the values on the way from one scheme to another."""
        return self.tf_op if source.transposes != target.transposes else Op.COPY

    def shape_in(self, scheme: Scheme) -> tuple[int, ...]:
        """Its shape in a scheme."""
        return self.op(Scheme.HF, scheme).shape(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=object))


def _projection(which: str, cs: str) -> TensorSpec:
    return TensorSpec(
        hf=f"transformer.h.{{i}}.attn.{which}_proj.weight",
        tf=f"gptj_decoder/{{i}}/attn/{which}_proj/{which}_proj/kernel",
        keras=f"h_{{i}}/attn/{which}_proj/kernel",
        cs=(f"transformer_decoder.layers.{{i}}.self_attn.{cs}_dense_layer.weight",),
        dims=("D", "D"),
        tf_op=Op.TRANSPOSE,
    )


def _norm(hf: str, tf: str, keras: str, cs: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            hf=f"{hf}.{part}",
            tf=f"{tf}/{tf_part}",
            keras=f"{keras}/{tf_part}",
            cs=tuple(f"{name}.{part}" for name in cs),
            dims=("D",),
            tf_op=Op.COPY,
        )
        for part, tf_part in (("weight", "gamma"), ("bias", "beta"))
    )


def _feed_forward(which: str, dense: str, cs: int, out: str, in_: str) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            hf=f"transformer.h.{{i}}.mlp.{which}.{part}",
            tf=f"gptj_decoder/{{i}}/mlp/{{{dense}}}/{{{dense}}}/{tf_part}",
            keras=f"h_{{i}}/mlp/{which}/{tf_part}",
            cs=(f"transformer_decoder.layers.{{i}}.ffn.ffn.{cs}.linear_layer.{part}",),
            dims=dims,
            tf_op=op,
        )
        for part, tf_part, dims, op in (
            ("weight", "kernel", (out, in_), Op.TRANSPOSE),
            ("bias", "bias", (out,), Op.COPY),
        )
    )


EMBEDDING = TensorSpec(
    hf="transformer.wte.weight",
    tf="input_embedding/embedding_weights",
    keras="wte/embeddings",
    cs=("embedding_layer.word_embeddings.weight",),
    dims=("V", "D"),
    tf_op=Op.COPY,
)

#: Rows of one block, in the order of its computation.
BLOCK: tuple[TensorSpec, ...] = (
    *_norm(
        "transformer.h.{i}.ln_1",
        "gptj_decoder/{i}/ln_1/ln_1",
        "h_{i}/ln_1",
        ("transformer_decoder.layers.{i}.norm1",),
    ),
    _projection("q", "proj_q"),
    _projection("k", "proj_k"),
    _projection("v", "proj_v"),
    _projection("out", "proj_output"),
    *_feed_forward("fc_in", "dense_in", 0, "F", "D"),
    *_feed_forward("fc_out", "dense_out", 1, "D", "F"),
)

FINAL_NORM = _norm(
    "transformer.ln_f",
    "post_decoder_layer_norm/post_decoder_layer_norm",
    "ln_f",
    ("transformer_decoder.norm", "ln_f"),
)

HEAD_WEIGHT = TensorSpec(
    hf="lm_head.weight",
    tf="lm_head/lm_head/kernel",
    keras="lm_head/kernel",
    cs=("lm_head.weight",),
    dims=("V", "D"),
    tf_op=Op.TRANSPOSE,
    tied=True,
)

HEAD_BIAS = TensorSpec(
    hf="lm_head.bias",
    tf="lm_head/lm_head/bias",
    keras="lm_head/bias",
    cs=("lm_head.bias",),
    dims=("V",),
    tf_op=Op.COPY,
    tf_if_tied="bias",
)

#: Buffers that old HF files carry beside the weights: the causal mask and its fill value.
IGNORED_HF = ("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias")

_HF_TEMPLATES = frozenset(
    {
        *(spec.hf for spec in (EMBEDDING, *BLOCK, *FINAL_NORM, HEAD_WEIGHT, HEAD_BIAS)),
        *IGNORED_HF,
    }
)
#: Which part of a block's HF name is its number.
_BLOCK_PART = BLOCK[0].hf.split(".").index("{i}")

GLOBAL_STEP = "global_step"
BETA1_POWER = "beta1_power"
BETA2_POWER = "beta2_power"

#: Suffixes of optimizer slots in the reference's TF checkpoints, by optimizer_type.
SLOTS: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "momentum": ("SGDM",),
    "rmsprop": ("RMSProp", "RMSProp_1"),
    "adam": ("Adam", "Adam_1"),
    "adamw": ("AdamW", "AdamW_1"),
}

#: What a dynamic loss scale keeps: the scale; steps without overflow (TensorFlow's own); steps
#: and overflows since it changed (the reference's).
CURRENT_LOSS_SCALE = "current_loss_scale"
GOOD_STEPS = "good_steps"
STEPS_SINCE_RESCALE = "steps_since_rescale"
OVERFLOWS_SINCE_RESCALE = "overflows_since_rescale"
#: How many groups of batches gave no update: the data are further on than the step by so many.
SKIPPED_STEPS = "skipped_steps"

#: What a run with LoRA keeps beside its kernels, which are merged: the kernel that it began with,
#: the two factors of the update, and once what the update is scaled by, times its rank.
LORA_BASE = "lora_base"
LORA_A = "lora_a"
LORA_B = "lora_b"
LORA_ALPHA = "lora_alpha"

_TRAINING_SCALARS = (
    GLOBAL_STEP,
    BETA1_POWER,
    BETA2_POWER,
    CURRENT_LOSS_SCALE,
    GOOD_STEPS,
    STEPS_SINCE_RESCALE,
    OVERFLOWS_SINCE_RESCALE,
    SKIPPED_STEPS,
    "accum_step_counter",
    LORA_ALPHA,
)


def slot_name(tf_name: str, slot: str) -> str:
    """The TF name of an optimizer slot of the variable `tf_name`."""
    return f"{tf_name}/{slot}"


#: Top-level parts of what the CS client saves beside the model.
_CS_TRAINING_STATE = (
    "optimizer",
    "global_step",
    "dataloader",
    "__metadata__",
    "grad_scaler",
    "schedulers",
    "lr_scheduler",
)


def is_training_state(name: str, scheme: Scheme) -> bool:
    """Whether a name is of what an optimizer, a hook or a client keeps, not of a weight."""
    if scheme is Scheme.CS:
        return name.split(".")[0] in _CS_TRAINING_STATE
    return scheme is Scheme.TF and _is_tf_training_state(name)


def _is_tf_training_state(tf_name: str) -> bool:
    last = tf_name.rsplit("/", 1)[-1]
    return (
        tf_name in _TRAINING_SCALARS
        or ("/" in tf_name and any(last in slots for slots in SLOTS.values()))
        or last in (LORA_BASE, LORA_A, LORA_B)
        or "_grad_accum_" in last
        or last.endswith("_hook_counter")
    )


def _dense(index: int) -> str:
    """TF numbers its dense layers through the whole model; the first has no number."""
    return "dense_layer" if index == 0 else f"dense_layer_{index}"


def _write_out(spec: TensorSpec, config: GPTJConfig, block: int | None) -> Tensor:
    words: dict[str, int | str] = {}
    if block is not None:
        words = {"i": block, "dense_in": _dense(2 * block), "dense_out": _dense(2 * block + 1)}
    # A tied head is stored by CS although it is the embedding.
    tied_head = HEAD_WEIGHT.cs if config.tie_word_embeddings and spec is EMBEDDING else ()
    tf = spec.tf_if_tied if config.tie_word_embeddings and spec.tf_if_tied else spec.tf
    return Tensor(
        hf=spec.hf.format(**words),
        tf=tf.format(**words),
        keras=spec.keras.format(**words),
        cs=tuple(name.format(**words) for name in (*spec.cs, *tied_head)),
        shape=tuple(config.dims[d] for d in spec.dims),
        tf_op=spec.tf_op,
        block=block,
    )


def embedding(config: GPTJConfig) -> Tensor:
    """The token embedding, HF shape (V, D)."""
    return _write_out(EMBEDDING, config, None)


def block(config: GPTJConfig, i: int) -> list[Tensor]:
    """The ten tensors of block `i`, in the order of `BLOCK`."""
    return [_write_out(spec, config, i) for spec in BLOCK]


def head(config: GPTJConfig) -> list[Tensor]:
    """What follows the blocks: final norm, head weight unless tied, head bias."""
    specs = (*FINAL_NORM, HEAD_WEIGHT, HEAD_BIAS)
    kept = [s for s in specs if not (s.tied and config.tie_word_embeddings)]
    return [_write_out(spec, config, None) for spec in kept]


def table(config: GPTJConfig) -> list[Tensor]:
    """Every tensor of the model, in the order of its computation."""
    blocks: Iterator[Tensor] = (t for i in range(config.n_layer) for t in block(config, i))
    return [embedding(config), *blocks, *head(config)]


def vocabulary(config: GPTJConfig) -> list[Tensor]:
    """The tensors with one row (in HF's layout) a token: embedding and head."""
    rows = (EMBEDDING.hf, HEAD_WEIGHT.hf, HEAD_BIAS.hf)
    return [t for t in (embedding(config), *head(config)) if t.hf in rows]


def is_hf_name(name: str) -> bool:
    """Whether a GPT-J of some depth has a tensor, or an ignored buffer, of this HF name."""
    parts = name.split(".")
    template = ".".join(
        "{i}" if n == _BLOCK_PART and p.isdecimal() else p for n, p in enumerate(parts)
    )
    return template in _HF_TEMPLATES


def ignored_hf(config: GPTJConfig) -> frozenset[str]:
    """Exact HF names that are dropped on reading."""
    return frozenset(n.format(i=i) for i in range(config.n_layer) for n in IGNORED_HF)

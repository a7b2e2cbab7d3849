"""THE TABLE: the name of every GPT-J tensor in each format, its shape, its role, and how it moves.

Five global rows and ten per block. Converting, verifying, loading, sharding, initializing, training
and exporting all interpret these rows; nothing but the layouts and the layers of the network spells
a tensor's name.

Names in the TF column are those of the reference's name-based checkpoints, names in the CS column
those of the cerebras-pytorch 2.10 client, names in the HF column those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Literal, get_args

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
        """Whether the scheme's tensors are transposed by their `Op`; the others keep HF's
        layout."""
        return self in (Scheme.TF, Scheme.KERAS)


class Role(StrEnum):
    """What a tensor does in the model."""

    EMBEDDING = "embedding"
    """One row per token, looked up by id."""
    GAIN = "gain"
    """Factors of a layer norm."""
    BIAS = "bias"
    """Vector that a layer adds."""
    INPUT = "input"
    """Kernel of a layer that reads the residual stream."""
    RESIDUAL = "residual output"
    """Kernel of a layer that adds to the residual stream."""
    HEAD = "head"
    """Kernel that turns hidden states into logits, one row per token in HF."""
    ADAPTER = "adapter"
    """Factor of a LoRA, which is in no row of the table itself."""


#: Roles of the kernels of a block's dense layers.
KERNELS = (Role.INPUT, Role.RESIDUAL)
#: Dense layers of a block, by their HF names.
DenseLayer = Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]
DENSE_LAYERS: tuple[str, ...] = get_args(DenseLayer)
#: Layers that LoRA adapts unless others are named, as in its paper (arXiv 2106.09685).
LORA_LAYERS: list[DenseLayer] = ["q_proj", "v_proj"]

#: Axes of a tensor in HF's layout. The first axis of a matrix is its output (for embedding and
#: head, one row per token), the second its input.
_OUT, _IN = 0, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One row of the table. `{i}` stands for the block; for `{dense_in}` and `{dense_out}` see
    `_dense`."""

    layer: str
    """HF name of the layer that owns the tensor."""
    role: Role
    hf: str
    tf: str
    keras: str
    cs: tuple[str, ...]
    dims: tuple[str, ...]
    """Letters of `GPTJConfig.dims`, in HF order."""
    tf_op: Op
    """Op between the HF and the TF layout."""
    split: int | None
    """Axis in HF's layout that is divided among devices; None means that every device has a copy.
    The divided output of one matrix is the divided input of the next, so a block exchanges only its
    two sums."""
    heads_axis: int | None = None
    """Axis, in HF's layout, that holds the attention heads one after the other."""
    tied: bool = False
    """Whether the tensor vanishes when the head is tied to the embedding."""
    tf_if_tied: str | None = None
    """TF name when the head is tied, where it differs."""

    def at(self, block: int) -> str:
        """Return the HF name of this row in one block."""
        return self.hf.format(i=block)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A row written out for one config and one block: exact names and shapes."""

    layer: str
    role: Role
    hf: str
    tf: str
    keras: str
    cs: tuple[str, ...]
    shape: tuple[int, ...]
    """Shape in HF and CS."""
    tf_op: Op
    block: int | None
    split: int | None = None
    heads_axis: int | None = None

    def name(self, scheme: Scheme) -> str:
        """Return the name in a scheme."""
        return self._names(scheme)[0]

    def copies(self, scheme: Scheme) -> tuple[str, ...]:
        """Return the further names under which a scheme stores the same values again; only CS
        does."""
        return self._names(scheme)[1:]

    def _names(self, scheme: Scheme) -> tuple[str, ...]:
        found = getattr(self, scheme.value)
        return found if isinstance(found, tuple) else (found,)

    def op(self, source: Scheme, target: Scheme) -> Op:
        """Return the op that leads from one scheme to another."""
        return self.tf_op if source.transposes != target.transposes else Op.COPY

    def shape_in(self, scheme: Scheme) -> tuple[int, ...]:
        """Return the shape in a scheme."""
        return self.op(Scheme.HF, scheme).shape(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=object))


def _projection(which: str, cs: str) -> TensorSpec:
    # Heads are divided among devices; the outputs are summed over the devices.
    axis = _IN if which == "out" else _OUT
    return TensorSpec(
        layer=f"{which}_proj",
        role=Role.RESIDUAL if which == "out" else Role.INPUT,
        split=axis,
        heads_axis=axis,
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
            layer=hf.rpartition(".")[2],
            role=role,
            split=None,
            hf=f"{hf}.{part}",
            tf=f"{tf}/{tf_part}",
            keras=f"{keras}/{tf_part}",
            cs=tuple(f"{name}.{part}" for name in cs),
            dims=("D",),
            tf_op=Op.COPY,
        )
        for part, tf_part, role in (("weight", "gamma", Role.GAIN), ("bias", "beta", Role.BIAS))
    )


def _feed_forward(which: str, dense: str, cs: int, out: str, in_: str) -> tuple[TensorSpec, ...]:
    is_output = which == "fc_out"
    return tuple(
        TensorSpec(
            layer=which,
            role=role,
            split=split,
            hf=f"transformer.h.{{i}}.mlp.{which}.{part}",
            tf=f"gptj_decoder/{{i}}/mlp/{{{dense}}}/{{{dense}}}/{tf_part}",
            keras=f"h_{{i}}/mlp/{which}/{tf_part}",
            cs=(f"transformer_decoder.layers.{{i}}.ffn.ffn.{cs}.linear_layer.{part}",),
            dims=dims,
            tf_op=op,
        )
        for part, tf_part, dims, op, role, split in (
            (
                "weight",
                "kernel",
                (out, in_),
                Op.TRANSPOSE,
                Role.RESIDUAL if is_output else Role.INPUT,
                _IN if is_output else _OUT,
            ),
            # The output is summed over the devices before its bias is added.
            ("bias", "bias", (out,), Op.COPY, Role.BIAS, None if is_output else _OUT),
        )
    )


EMBEDDING = TensorSpec(
    layer="wte",
    role=Role.EMBEDDING,
    split=_OUT,
    hf="transformer.wte.weight",
    tf="input_embedding/embedding_weights",
    keras="wte/embeddings",
    cs=("embedding_layer.word_embeddings.weight",),
    dims=("V", "D"),
    tf_op=Op.COPY,
)

NORM = _norm(
    "transformer.h.{i}.ln_1",
    "gptj_decoder/{i}/ln_1/ln_1",
    "h_{i}/ln_1",
    ("transformer_decoder.layers.{i}.norm1",),
)
QUERY = _projection("q", "proj_q")
KEY = _projection("k", "proj_k")
VALUE = _projection("v", "proj_v")
OUTPUT = _projection("out", "proj_output")

#: Rows of one block, in the order of its computation.
BLOCK: tuple[TensorSpec, ...] = (
    *NORM,
    QUERY,
    KEY,
    VALUE,
    OUTPUT,
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
    layer="lm_head",
    role=Role.HEAD,
    split=_OUT,
    hf="lm_head.weight",
    tf="lm_head/lm_head/kernel",
    keras="lm_head/kernel",
    cs=("lm_head.weight",),
    dims=("V", "D"),
    tf_op=Op.TRANSPOSE,
    tied=True,
)

HEAD_BIAS = TensorSpec(
    layer="lm_head",
    role=Role.BIAS,
    split=_OUT,
    hf="lm_head.bias",
    tf="lm_head/lm_head/bias",
    keras="lm_head/bias",
    cs=("lm_head.bias",),
    dims=("V",),
    tf_op=Op.COPY,
    tf_if_tied="bias",
)

#: Prefix of all HF names but the head's, and prefix of the names of one block.
HF_BODY = "transformer."
HF_BLOCK = "transformer.h.{i}."

#: Buffers that old HF files carry beside the weights: the causal mask and its fill value.
IGNORED_HF = ("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias")

_HF_TEMPLATES = frozenset(
    {
        *(spec.hf for spec in (EMBEDDING, *BLOCK, *FINAL_NORM, HEAD_WEIGHT, HEAD_BIAS)),
        *IGNORED_HF,
    }
)
#: Position of the block number among the dot-separated parts of an HF name.
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

#: State of a dynamic loss scale: the scale, the number of steps without overflow (TensorFlow's),
#: and the numbers of steps and of overflows since the last change (the reference's).
CURRENT_LOSS_SCALE = "current_loss_scale"
GOOD_STEPS = "good_steps"
STEPS_SINCE_RESCALE = "steps_since_rescale"
OVERFLOWS_SINCE_RESCALE = "overflows_since_rescale"
#: Number of groups of batches that gave no update; the data is that many groups ahead of the step.
SKIPPED_STEPS = "skipped_steps"

#: State of a run with LoRA beside its merged kernels: the base kernel, the two factors, and once
#: for the run alpha, the scale of the update times the rank.
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
    """Return the TF name of an optimizer slot of the variable `tf_name`."""
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
    """Return whether a name belongs to the state of an optimizer, a hook or a client instead of a
    weight."""
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
    """Return TF's name of a dense layer; numbers run through the whole model, and the first layer
    has none."""
    return "dense_layer" if index == 0 else f"dense_layer_{index}"


def _write_out(spec: TensorSpec, config: GPTJConfig, block: int | None) -> Tensor:
    words: dict[str, int | str] = {}
    if block is not None:
        words = {"i": block, "dense_in": _dense(2 * block), "dense_out": _dense(2 * block + 1)}
    # CS stores a tied head although it is the embedding.
    tied_head = HEAD_WEIGHT.cs if config.tie_word_embeddings and spec is EMBEDDING else ()
    tf = spec.tf_if_tied if config.tie_word_embeddings and spec.tf_if_tied else spec.tf
    return Tensor(
        layer=spec.layer,
        role=spec.role,
        split=spec.split,
        heads_axis=spec.heads_axis,
        hf=spec.hf.format(**words),
        tf=tf.format(**words),
        keras=spec.keras.format(**words),
        cs=tuple(name.format(**words) for name in (*spec.cs, *tied_head)),
        shape=tuple(config.dims[d] for d in spec.dims),
        tf_op=spec.tf_op,
        block=block,
    )


def embedding(config: GPTJConfig) -> Tensor:
    """Return the row of the token embedding, HF shape (V, D)."""
    return _write_out(EMBEDDING, config, None)


def block(config: GPTJConfig, i: int) -> list[Tensor]:
    """Return the ten rows of block `i`, in the order of `BLOCK`."""
    return [_write_out(spec, config, i) for spec in BLOCK]


def final_norm(config: GPTJConfig) -> list[Tensor]:
    """Return the rows of the layer norm after the last block: gain and bias."""
    return [_write_out(spec, config, None) for spec in FINAL_NORM]


def head(config: GPTJConfig) -> list[Tensor]:
    """Return the rows after the blocks: final norm, head weight unless it is tied, head bias."""
    specs = (*FINAL_NORM, HEAD_WEIGHT, HEAD_BIAS)
    kept = [s for s in specs if not (s.tied and config.tie_word_embeddings)]
    return [_write_out(spec, config, None) for spec in kept]


def table(config: GPTJConfig) -> list[Tensor]:
    """Return every row of the model, in the order of its computation."""
    blocks: Iterator[Tensor] = (t for i in range(config.n_layer) for t in block(config, i))
    return [embedding(config), *blocks, *head(config)]


def vocabulary(config: GPTJConfig) -> list[Tensor]:
    """Return the rows that have one entry per token along HF's first axis: embedding and head."""
    rows = (EMBEDDING.hf, HEAD_WEIGHT.hf, HEAD_BIAS.hf)
    return [t for t in (embedding(config), *head(config)) if t.hf in rows]


def is_hf_name(name: str) -> bool:
    """Return whether a GPT-J of any depth has a tensor or an ignored buffer of this HF name."""
    parts = name.split(".")
    template = ".".join(
        "{i}" if n == _BLOCK_PART and p.isdecimal() else p for n, p in enumerate(parts)
    )
    return template in _HF_TEMPLATES


def ignored_hf(config: GPTJConfig) -> frozenset[str]:
    """Return the HF names that are dropped on reading."""
    return frozenset(n.format(i=i) for i in range(config.n_layer) for n in IGNORED_HF)

"""What a conversion will do, decided from headers alone: a plan, or every problem at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gptj_convert import vocabulary
from gptj_convert.checkpoint import Checkpoint
from gptj_convert.formats.hf import hf_layout
from gptj_convert.formats.layout import Layout
from gptj_convert.formats.tf import tf_layout
from gptj_convert.options import KEEP
from gptj_convert.panels import Panels
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import FLOATS
from gptj_model.errors import TensorFault, UsageError
from gptj_model.source import TensorInfo, raw_bytes
from gptj_model.tensors import (
    EMBEDDING,
    GLOBAL_STEP,
    HEAD_WEIGHT,
    Op,
    Scheme,
    Tensor,
    ignored_hf,
    is_training_state,
    table,
)


@dataclass(frozen=True, slots=True)
class Move:
    """One tensor's way from a source to a target."""

    tensor: Tensor
    source_name: str
    source: TensorInfo
    target_name: str
    target: TensorInfo
    op: Op


@dataclass(frozen=True, slots=True)
class Plan:
    """Every move of a conversion, in the order of the table."""

    config: GPTJConfig
    scheme: Scheme
    """Of the target."""
    moves: tuple[Move, ...]
    layout: Layout
    """Of the target."""
    saturate: bool = False
    """Values beyond the target's range become its largest, instead of an error."""

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return sum(m.source.nbytes for m in self.moves)

    @property
    def target_bytes(self) -> int:
        """Bytes to write."""
        return sum(m.target.nbytes for m in self.moves)

    @property
    def dtype(self) -> str:
        """The target's dtype, or the widest of them."""
        widths = {m.target.dtype: FLOATS[m.target.dtype].itemsize for m in self.moves}
        return max(widths, key=lambda name: widths[name])


def match(checkpoint: Checkpoint) -> list[tuple[Tensor, str, TensorInfo]]:
    """Every row of the table with the name and header of the checkpoint's tensor for it.

    Raises:
        TensorFault: a tensor is missing, unknown, or of another shape or kind than the config
            calls for; all such tensors are named.
    """
    scheme, config = checkpoint.scheme, checkpoint.config
    left = dict(checkpoint.source.tensors)
    rows = vocabulary.rows(config, scheme, left)
    disagreement = vocabulary.disagreement(config, rows)
    matched, problems = [], [disagreement] if disagreement else []
    for tensor in table(config):
        (name,) = tensor.names(scheme)
        info = left.pop(name, None)
        expected = tensor.shape_in(scheme)
        if info is None:
            problems.append(f"{name!r} is missing, expected shape {list(expected)}")
        elif info.shape != expected and name not in rows:
            problems.append(f"{name!r} has shape {list(info.shape)}, expected {list(expected)}")
        elif info.dtype not in FLOATS:
            problems.append(f"{name!r} holds {info.dtype}, expected one of {', '.join(FLOATS)}")
        else:
            matched.append((tensor, name, info))
    dropped = ignored_hf(config) if scheme is Scheme.HF else frozenset()
    for name in left:
        if name in dropped or (scheme is Scheme.TF and is_training_state(name)):
            continue
        if scheme is Scheme.HF and name == HEAD_WEIGHT.hf and _repeats_embedding(checkpoint):
            continue
        problems.append(f"{name!r} is not a tensor of this model")
    if problems == [disagreement]:
        hint = vocabulary.hint(rows, checkpoint.vocab_choice)
        raise TensorFault(str(checkpoint.path), problems, hint=hint)
    if problems:
        raise TensorFault(str(checkpoint.path), problems, hint=_hint(checkpoint, left))
    return matched


def make_plan(
    checkpoint: Checkpoint,
    target: Scheme,
    dtype: str,
    *,
    max_shard_bytes: int | None = None,
    saturate: bool = False,
) -> Plan:
    """Plan the conversion of an open checkpoint.

    Args:
        checkpoint: the source.
        target: `Scheme.TF` or `Scheme.HF`.
        dtype: one of `options.DTYPES`, or `options.KEEP`.
        max_shard_bytes: of the tensors of one file of weights, for `Scheme.HF`; None: one file.
        saturate: see `Plan`.

    Raises:
        TensorFault: see `match`.
        UsageError: the format has no shards, or there would be too many.
    """
    if max_shard_bytes is not None and target is not Scheme.HF:
        raise UsageError(
            f"--max-shard-size does not go with --to {target.value}, whose weights are one file",
            hint="leave it out, or choose --to hf",
        )
    moves = []
    for tensor, name, info in match(checkpoint):
        stored = info.dtype if dtype == KEEP else dtype
        (target_name,) = tensor.names(target)
        moves.append(
            Move(
                tensor=tensor,
                source_name=name,
                source=info,
                target_name=target_name,
                target=TensorInfo(stored, tensor.shape_in(target)),
                op=tensor.op(checkpoint.scheme, target),
            )
        )
    tensors = {m.target_name: m.target for m in moves}
    layout = _layout(target, tensors, max_shard_bytes)
    return Plan(checkpoint.config, target, tuple(moves), layout, saturate)


def _layout(target: Scheme, tensors: dict[str, TensorInfo], max_shard_bytes: int | None) -> Layout:
    if target is Scheme.TF:
        return tf_layout(tensors | {GLOBAL_STEP: TensorInfo("int64", ())})
    return hf_layout(tensors, max_shard_bytes)


def _repeats_embedding(checkpoint: Checkpoint) -> bool:
    """Whether the head that a tied model's file holds is the embedding once more, bit for bit."""
    names = (HEAD_WEIGHT.hf, EMBEDDING.hf)
    source = checkpoint.source
    if not all(name in source.tensors for name in names):
        return False
    if source.tensors[names[0]] != source.tensors[names[1]]:
        return False
    sides = (Panels(source, name, Op.COPY) for name in names)
    return all(raw_bytes(a) == raw_bytes(b) for a, b in zip(*sides, strict=True))


def _hint(checkpoint: Checkpoint, unknown: dict[str, TensorInfo]) -> str | None:
    if any(name.startswith("h.0.") for name in unknown):
        return (
            "this is a GPTJModel without its head; save the GPTJForCausalLM that it came from "
            "(a head is never made up)"
        )
    if checkpoint.config.tie_word_embeddings and HEAD_WEIGHT.hf in unknown:
        return "config.json ties the head to the embedding, but the file holds another head"
    untied = replace(checkpoint.config, tie_word_embeddings=True)
    names = {t.names(checkpoint.scheme)[0] for t in table(untied)}
    present = set(checkpoint.source.tensors)
    if not checkpoint.config.tie_word_embeddings and names <= present:
        return "the file holds a tied model: set tie_word_embeddings to true in config.json"
    return None

"""The plan of a conversion, made from headers alone: every move, or every problem at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gptj_convert.checkpoint import vocabulary_size
from gptj_convert.checkpoint.match import same_bits, settle_copies, survey
from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.checkpoint.tensor_problems import hint, whole_problem
from gptj_convert.formats.containers.layout import Layout
from gptj_convert.formats.layouts.cs import cs_layout
from gptj_convert.formats.layouts.hf import hf_layout
from gptj_convert.formats.layouts.keras import keras_layout
from gptj_convert.formats.layouts.tf import tf_layout
from gptj_convert.formats.layouts.torch_optimizer import optimizer_file
from gptj_convert.optimizer.state import DTYPE
from gptj_convert.optimizer.target import Continuation, cs_tree, torch_state
from gptj_convert.options import CS_BACKENDS, KEEP
from gptj_convert.settings.trainer_yaml import scheduler_states
from gptj_convert.streams.strips import Panels, stored_op
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import widest
from gptj_model.errors import FileFault, TensorFault, UsageError
from gptj_model.op import Op
from gptj_model.optimizer_names import ADAMS, named_moments, numbered_moments
from gptj_model.source import TensorInfo
from gptj_model.tensors import EMBEDDING, GLOBAL_STEP, HEAD_WEIGHT, Scheme, Tensor, table


@dataclass(frozen=True, slots=True)
class Move:
    """The way of one tensor from a source to a target."""

    tensor: Tensor
    source_name: str
    source: TensorInfo
    target_name: str
    target: TensorInfo
    op: Op
    """Op from the source's layout to the target's."""
    is_moment: bool = False
    """Whether it is an optimizer moment of the weight `tensor`."""

    @property
    def stored_op(self) -> Op:
        """Op from the array in the source's file to the target's layout."""
        return stored_op(self.source, self.op)


@dataclass(frozen=True, slots=True)
class Plan:
    """Every move of a conversion in the order of the table, moments after the weights."""

    source_config: GPTJConfig
    config: GPTJConfig
    """Configuration of the target."""
    scheme: Scheme
    """Naming scheme of the target."""
    moves: tuple[Move, ...]
    layout: Layout
    """Files of the target."""
    saturate: bool = False
    """Whether values beyond the target's range become its largest value instead of an error."""
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Small tensors of the target that have no tensor in the source, by name."""
    continuation: Continuation | None = None
    """Optimizer state that is carried over."""
    cs_backend: str = CS_BACKENDS[0]
    """Backend of the CS client: one of `options.CS_BACKENDS`."""
    max_shard_bytes: int | None = None
    """Largest size of the tensors in one weight file, as it was asked for."""

    @property
    def weights(self) -> list[Move]:
        """Moves of weights."""
        return [m for m in self.moves if not m.is_moment]

    @property
    def in_file_order(self) -> list[Move]:
        """Moves in the order of the target's bytes."""
        moves = {m.target_name: m for m in self.moves}
        return [moves[n] for n in self.layout.tensors_from(0, 0) if n in moves]

    @property
    def source_bytes(self) -> int:
        """Number of bytes to read."""
        return sum(m.source.nbytes for m in self.moves)

    @property
    def target_bytes(self) -> int:
        """Number of bytes to write."""
        return sum(m.target.nbytes for m in self.moves)

    @property
    def disk_bytes(self) -> int:
        """Number of bytes of all large files, including those made from the weights file."""
        return self.layout.total * (2 if self.scheme is Scheme.KERAS else 1)

    @property
    def shares_embeddings(self) -> bool:
        """Whether the source's head is dropped because it equals the embedding."""
        return self.config != self.source_config

    @property
    def dtype(self) -> str:
        """Dtype of the weights in the target, or the widest of them."""
        return widest(m.target.dtype for m in self.weights)


def match(checkpoint: Checkpoint) -> list[tuple[Tensor, str, TensorInfo]]:
    """Return every row of the table with the name and header of the checkpoint's tensor for it.

    Raises:
        FileFault: the weights are quantized, or an adapter beside them is not merged.
        TensorFault: a tensor is missing, unknown, or of another shape or kind than the config calls
            for; all such tensors are named.
    """
    source, scheme, config = checkpoint.source, checkpoint.scheme, checkpoint.config
    if whole := whole_problem(source.tensors):
        raise FileFault(f"{checkpoint.path}: {whole[0]}", hint=whole[1])
    findings = settle_copies(survey(source.tensors, scheme, config), source)
    rows = vocabulary_size.rows(config, scheme, source.tensors)
    disagreement = vocabulary_size.disagreement(config, rows)
    # A wrong vocabulary size is one problem, not one per tensor that has it.
    problems = [f.problem for f in findings if f.problem and not (disagreement and f.name in rows)]
    if disagreement:
        problems.insert(0, disagreement)
    if problems == [disagreement]:
        advice = vocabulary_size.hint(rows, checkpoint.vocab_choice)
        raise TensorFault(str(checkpoint.path), problems, hint=advice)
    if problems:
        raise TensorFault(str(checkpoint.path), problems, hint=hint(findings, scheme, config))
    return [(f.tensor, f.name, f.info) for f in findings if f.tensor and f.info]


def make_plan(
    checkpoint: Checkpoint,
    target: Scheme,
    dtype: str,
    *,
    max_shard_bytes: int | None = None,
    share_embeddings: bool = False,
    saturate: bool = False,
    continuation: Continuation | None = None,
    cs_backend: str | None = None,
) -> Plan:
    """Plan the conversion of an open checkpoint.

    Args:
        checkpoint: source of the conversion.
        target: scheme of one of `options.DEFAULT_OUT`.
        dtype: one of `options.DTYPES`, or `options.KEEP`.
        max_shard_bytes: largest size of the tensors in one weight file, for `Scheme.HF`; None
            writes one file.
        share_embeddings: whether to drop a head that equals the embedding.
        saturate: whether values beyond the target's range become its largest value.
        continuation: optimizer state of the checkpoint to carry over.
        cs_backend: one of `options.CS_BACKENDS`, for `Scheme.CS`; None is the first.

    Raises:
        TensorFault: as `match` raises it.
        UsageError: the format has no shards, or there would be too many; the head differs from the
            embedding; or the format has no place for the state.
        ConfigError: the optimizer or schedule has no counterpart in the format.
    """
    if max_shard_bytes is not None and target is not Scheme.HF:
        raise UsageError(
            f"--max-shard-size does not go with --to {target.value}, whose weights are one file",
            hint="leave it out, or choose --to hf",
        )
    if cs_backend and target is not Scheme.CS:
        raise UsageError(f"--cs-backend does not go with --to {target.value}, only with --to cs")
    if continuation and (target is Scheme.KERAS or share_embeddings):
        raise UsageError(
            "--optimizer-state does not go with "
            + ("--share-embeddings" if share_embeddings else "--to keras")
            + ", which has no place for all of it"
        )
    found = {tensor.hf: (name, info) for tensor, name, info in match(checkpoint)}
    config = checkpoint.config
    if share_embeddings and not config.tie_word_embeddings:
        if not head_is_embedding(checkpoint):
            raise UsageError(
                f"{checkpoint.path}: its head differs from its embedding, so they cannot be shared",
                hint="leave out --share-embeddings",
            )
        config = replace(config, tie_word_embeddings=True)
    moves = []
    for tensor in table(config):
        name, info = found[tensor.hf]
        stored = TensorInfo(
            checkpoint.stored_dtype(name) if dtype == KEEP else dtype, tensor.shape_in(target)
        )
        op = tensor.op(checkpoint.scheme, target)
        for target_name in (tensor.name(target), *tensor.copies(target)):
            moves.append(Move(tensor, name, info, target_name, stored, op))
    if continuation:
        moves += _moments(checkpoint, target, continuation)
    layout, values = _layout(target, config, moves, max_shard_bytes, continuation)
    return Plan(
        checkpoint.config,
        config,
        target,
        tuple(moves),
        layout,
        saturate,
        values,
        continuation,
        cs_backend or CS_BACKENDS[0],
        max_shard_bytes,
    )


def _moments(checkpoint: Checkpoint, target: Scheme, continuation: Continuation) -> list[Move]:
    """Return both moments of every weight, which move as the weight does."""
    config, sources = checkpoint.config, continuation.state.moments
    names = (
        named_moments(config, ADAMS[0])
        if target is Scheme.TF
        else numbered_moments(config, target, continuation.grouping)
    )
    infos = checkpoint.everything.tensors
    return [
        Move(
            tensor,
            name,
            infos[name],
            target_name,
            TensorInfo(DTYPE, tensor.shape_in(target)),
            tensor.op(checkpoint.scheme, target),
            is_moment=True,
        )
        for tensor in table(config)
        for name, target_name in zip(sources[tensor.hf], names[tensor.hf], strict=True)
    ]


def head_is_embedding(checkpoint: Checkpoint) -> bool:
    """Return whether the head of an untied checkpoint equals its embedding bit for bit; reads
    both."""
    scheme = checkpoint.scheme
    sides = []
    for spec in (HEAD_WEIGHT, EMBEDDING):
        tensor = next(t for t in table(checkpoint.config) if t.hf == spec.hf)
        name = tensor.name(scheme)
        sides.append(Panels(checkpoint.source, name, tensor.op(scheme, Scheme.HF)))
    return same_bits(*sides)


def _layout(
    target: Scheme,
    config: GPTJConfig,
    moves: Sequence[Move],
    max_shard_bytes: int | None,
    continuation: Continuation | None,
) -> tuple[Layout, dict[str, np.ndarray]]:
    """Return the files of the target, and the small tensors in them."""
    weights = {m.target_name: m.target for m in moves if not m.is_moment}
    moments = {m.target_name: m.target for m in moves if m.is_moment}
    if target is Scheme.TF:
        values = {GLOBAL_STEP: np.asarray(0, np.int64)}
        if continuation:
            values = continuation.state.scalars
        small = {name: TensorInfo(v.dtype.name, v.shape) for name, v in values.items()}
        return tf_layout(weights | moments | small), values
    if target is Scheme.KERAS:
        return keras_layout(weights), {}
    if target is Scheme.CS:
        if not continuation:
            return cs_layout(weights), {}
        schedulers = scheduler_states(continuation.params, continuation.state.step)
        tree, values = cs_tree(
            config, continuation.state, continuation.settings, continuation.grouping, schedulers
        )
        return cs_layout(weights, tree), values
    layout = hf_layout(weights, max_shard_bytes)
    if not continuation:
        return layout, {}
    parts = torch_state(config, continuation.state, continuation.settings, continuation.grouping)
    file = optimizer_file(*parts, moments)
    return replace(layout, tensors=weights | moments, files=(*layout.files, file)), {}
